"""What `pretrain_vit.py` learns from: scenes drawn by a process of their own, and pairs of views of one scene."""

from __future__ import annotations

import mmap
import os
import time
from multiprocessing.sharedctypes import Synchronized
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from spar_hf.picture_book.dataset import PictureBook

SCENE_PX, SIDE_PX, PATCH_PX = 256, 96, 8  # side of a scene, of a view, of a patch
GRID = SIDE_PX // PATCH_PX
MAX_ZOOM = 4.0
LEAST_OVERLAP = 0.3  # of the smaller view's area
# Light, contrast and cast; colour stays a cue.
GAIN, OFFSET, CAST = 0.15, 0.08, 0.05


def allocate(scenes: int) -> np.ndarray:
    """Anonymous shared memory for pictures, (scenes, side, side, 3) uint8: a forked process sees the same."""
    shape = (scenes, SCENE_PX, SCENE_PX, 3)
    return np.frombuffer(mmap.mmap(-1, int(np.prod(shape))), dtype=np.uint8).reshape(shape)


def draw_forever(pictures: np.ndarray, drawn: Synchronized, used: Synchronized, seed: int, first_index: int) -> None:
    """The drawing process: fills the pool, then replaces a picture for every 32 views used, in a ring."""
    os.setsid()  # with its own share of the cores, apart from training; scarce at first
    training = os.getppid()
    book = PictureBook("train", SCENE_PX, SCENE_PX, seed)
    while os.getppid() == training:  # until that process is gone
        if drawn.value > len(pictures) + used.value // 32:
            time.sleep(0.05)
            continue
        pictures[drawn.value % len(pictures)] = book.scene(first_index + drawn.value).image
        drawn.value += 1


class Places(NamedTuple):
    """Where views lie in their scenes, in pixels of the scene; (views,) each."""

    top: Tensor
    left: Tensor
    side: Tensor
    flipped: Tensor

    def centres(self) -> Tensor:
        """Of every patch, in the scene, (views, grid, grid, 2), x first."""
        step = (torch.arange(GRID) + 0.5) / GRID
        across = torch.where(self.flipped[:, None], 1 - step, step) * self.side[:, None] + self.left[:, None]
        down = step * self.side[:, None] + self.top[:, None]
        return torch.stack(torch.broadcast_tensors(across[:, None, :], down[:, :, None]), dim=-1)

    def to_view(self, points: Tensor) -> Tensor:
        """Points in the scene (views, ..., 2) in the view, x first, where -1 and 1 are its edges."""
        corner = torch.stack([self.left, self.top], dim=-1)[:, None, None]
        inside = 2 * (points - corner) / self.side[:, None, None, None] - 1
        sign = torch.where(self.flipped, -1.0, 1.0)[:, None, None]
        return torch.stack([inside[..., 0] * sign, inside[..., 1]], dim=-1)


def pairs(pictures: np.ndarray, rng: np.random.Generator) -> tuple[Tensor, Places]:
    """Two views of each picture (n, H, H, 3) that overlap.

    Returns:
        Pixels (2n, 3, side, side), normalised, first views first, and where the views lie.
    """
    first, second = (np.array(rows) for rows in zip(*(_pair(rng) for _ in pictures), strict=True))
    rows = np.concatenate([first, second])
    flipped = rng.random(len(rows)) < 0.5
    views = []
    for number, (top, left, side) in enumerate(rows):
        crop = pictures[number % len(pictures), top : top + side, left : left + side]
        crop = crop[:, ::-1] if flipped[number] else crop
        image = torch.from_numpy(np.ascontiguousarray(crop)).permute(2, 0, 1)[None].float() / 255
        views.append(F.interpolate(image, size=(SIDE_PX, SIDE_PX), mode="bilinear", antialias=True))
    pixels = torch.cat(views)
    gain, offset = (torch.from_numpy(rng.normal(0, width, (len(rows), 1, 1, 1))).float() for width in (GAIN, OFFSET))
    cast = torch.from_numpy(rng.normal(1, CAST, (len(rows), 3, 1, 1))).float()
    pixels = (((pixels - 0.5) * (1 + gain) + 0.5 + offset) * cast).clamp(0, 1)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    top, left, side = torch.from_numpy(rows).float().unbind(1)
    return (pixels - mean) / std, Places(top, left, side, torch.from_numpy(flipped))


def _pair(rng: np.random.Generator) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Top, left and side of two squares of a scene that overlap."""
    while True:
        sides = [round(SCENE_PX / MAX_ZOOM ** rng.random()) for _ in range(2)]
        (top, left), (low, right) = (rng.integers(0, SCENE_PX - side + 1, 2).tolist() for side in sides)
        height = min(top + sides[0], low + sides[1]) - max(top, low)
        width = min(left + sides[0], right + sides[1]) - max(left, right)
        if height > 0 and width > 0 and height * width >= LEAST_OVERLAP * min(sides) ** 2:
            return (top, left, sides[0]), (low, right, sides[1])


def masks(views: int, rng: np.random.Generator) -> Tensor:
    """Which patches the student does not see, (views, grid * grid): two rectangles in every second view."""
    hidden = np.zeros((views, GRID, GRID), bool)
    for view in hidden[::2]:
        for _ in range(2):
            height, width = rng.integers(GRID // 4, GRID // 2 + 1, 2)
            top, left = rng.integers(0, GRID - height + 1), rng.integers(0, GRID - width + 1)
            view[top : top + height, left : left + width] = True
    return torch.from_numpy(hidden.reshape(views, -1))
