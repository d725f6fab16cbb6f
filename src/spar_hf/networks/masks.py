"""Regions of an image, whoever drew them: SAM's automatic masks, a folder of masks, or superpixels.

A source of regions is called with one image's pixels and their normalisation and gives `Regions` at that size:
`SamRegions` asks SAM on a grid of points, as the authors' automatic mask generator does; `MaskFolder` reads masks that
were made before; `Superpixels` (SLIC) needs no network. A method that reads regions takes any of them as its network
`regions`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from ..encoders.base import rgb
from ..extras import extra_package
from ..files import digest
from ..image_file_spar import InvalidImageError
from .sam import MASK_NUMBERS, Sam


@dataclass(frozen=True, eq=False)
class Regions:
    """Regions of one image; give one of the two.

    Attributes:
        ids: (H, W) int, the region of each pixel; 0 is none.
        drawn: (R, H, W), bool, or soft and above 0 inside; they may overlap.
        original: what they were resized from, so that resizing twice is resizing once.
    """

    ids: Tensor | None = None
    drawn: Tensor | None = None
    original: Regions | None = None

    @property
    def size_hw(self) -> tuple[int, int]:
        shape = (self.ids if self.drawn is None else self.drawn).shape  # type: ignore[union-attr]
        return shape[-2], shape[-1]

    @cached_property
    def masks(self) -> Tensor:
        """(R, H, W) bool, or soft; of a map, one for each id that occurs, in their order."""
        if self.drawn is not None:
            return self.drawn
        assert self.ids is not None
        return self.ids.expand(len(self.numbers), -1, -1) == self.numbers[:, None, None]

    @cached_property
    def map(self) -> Tensor:
        """(H, W) int64: 0 where there is none, else 1 + the number of the mask; large masks over small ones."""
        if self.ids is not None:
            return self.ids.long()
        painted = torch.zeros(self.size_hw, dtype=torch.int64, device=self.masks.device)
        solid = self.masks > 0
        for number in solid.sum(dim=(1, 2)).argsort(stable=True).tolist():
            painted[solid[number]] = 1 + number
        return painted

    def some(self, chosen: Tensor) -> Regions:
        """Those of the masks, in their order, for which `chosen` (R) bool holds."""
        if self.drawn is not None:
            return Regions(drawn=self.drawn[chosen])
        assert self.ids is not None
        return Regions(ids=self.ids * torch.isin(self.ids, self.numbers[chosen]))

    @cached_property
    def numbers(self) -> Tensor:
        """(R) the ids that occur in a map, in their order, without 0."""
        assert self.ids is not None
        present = self.ids.unique()
        return present[present != 0]

    def on_grid(self, grid_hw: tuple[int, int]) -> Tensor:
        """(R, h * w): each mask bilinear on a grid, clamped to at most 1."""
        step = max(MASK_NUMBERS // (self.size_hw[0] * self.size_hw[1]), 1)
        if self.drawn is not None:
            some = iter(self.drawn.split(step))
        else:  # all masks of a map of many regions are never held
            some = (self.ids == numbers[:, None, None] for numbers in self.numbers.split(step))
        parts = [
            F.interpolate(masks[:, None].float(), size=grid_hw, mode="bilinear", align_corners=False).flatten(1)
            for masks in some
        ]
        return torch.cat(parts).clamp_(max=1)

    def spread(self, values: Tensor) -> Tensor:
        """(K, R) values of the regions -> (K, H, W), at each pixel the sum over its regions, by mask up to 1."""
        if self.drawn is None:
            assert self.ids is not None
            place = (torch.searchsorted(self.numbers, self.ids) + 1) * (self.ids != 0)
            return F.pad(values, (1, 0))[:, place]
        out = torch.empty(len(values), *self.size_hw, device=values.device)
        step = max(MASK_NUMBERS // (max(len(self.drawn), 1) * self.size_hw[1]), 1)
        for first in range(0, self.size_hw[0], step):
            rows = self.drawn[:, first : first + step].float().clamp_(max=1)
            out[:, first : first + step] = torch.einsum("kr,rhw->khw", values, rows)
        return out

    def at(self, size_hw: tuple[int, int]) -> Regions:
        """The same at another size: soft masks bilinear, others nearest."""
        if size_hw == self.size_hw:
            return self
        if self.original is not None:
            return self.original.at(size_hw)
        if self.drawn is None:
            assert self.ids is not None
            return Regions(ids=nearest(self.ids, size_hw), original=self)
        if not self.drawn.is_floating_point():
            return Regions(drawn=nearest(self.drawn, size_hw), original=self)
        resized = F.interpolate(self.drawn[None], size=size_hw, mode="bilinear", align_corners=False)[0]
        return Regions(drawn=resized, original=self)

    def to(self, device: torch.device) -> Regions:
        """The same on a device."""
        ids, drawn = (part if part is None else part.to(device) for part in (self.ids, self.drawn))
        return Regions(ids, drawn, None if self.original is None else self.original.to(device))


def nearest(maps: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Maps (..., H, W) of any type at another size, by the nearest pixel as `interpolate(mode="nearest-exact")`."""
    down, across = (
        ((torch.arange(n, device=maps.device) + 0.5) * side / n).long()
        for n, side in zip(size_hw, maps.shape[-2:], strict=True)
    )
    return maps[..., down, :][..., across]


def pixels_digest(pixel_values: Tensor) -> str:
    """A digest of pixels, by which the same image is known again."""
    return digest([pixel_values.float().cpu().contiguous().numpy().tobytes()])


class RegionSource(Protocol):
    """Whatever draws regions."""

    def __call__(self, pixel_values: Tensor, config: Any) -> Regions:
        """Regions of one image (1, 3, H, W), normalised by `config`, at its size."""
        ...


@dataclass(frozen=True)
class SamSettings:
    """Of SAM's automatic masks; the defaults are those of the authors' generator.

    Attributes:
        points_per_side: of the grid of prompts.
        several: three masks a point, or one.
        min_iou: a mask's expected IoU is above it.
        min_stability: IoU of the masks at logits 1 above and below zero, at least.
        max_box_iou: of two masks whose boxes overlap more, the one of lower expected IoU goes.
        soft: masks are their logits, from 0 to 3, and not the logits' sign.
        min_area: masks of at most this share of the image go.
        max_shared: masks of which the smaller one shares more with the other become one; see `merged`. 1 merges none.
    """

    points_per_side: int = 32
    several: bool = True
    min_iou: float = 0.88
    min_stability: float = 0.95
    max_box_iou: float = 0.7
    soft: bool = False
    min_area: float = 0.0
    max_shared: float = 1.0


class SamRegions(nn.Module):
    """SAM's or SAM 2's automatic masks. Those of the last image are kept for whoever asks the same SAM again.

    Args:
        sam: an adapter, a module, or the id or folder to load it from.
        settings: of the generator.
    """

    def __init__(self, sam: Sam | str | nn.Module, settings: SamSettings | None = None) -> None:
        super().__init__()
        self.sam = Sam.of(sam)
        self.settings = settings or SamSettings()

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self.settings).items())

    @torch.no_grad()
    def forward(self, pixel_values: Tensor, config: Any) -> Regions:
        """See `RegionSource`; there may be no mask at all."""
        key = (pixels_digest(pixel_values), self.settings)
        if self.sam.kept is None or self.sam.kept[0] != key:
            self.sam.kept = (key, self.drawn(pixel_values, config))
        return self.sam.kept[1]

    def drawn(self, pixel_values: Tensor, config: Any) -> Regions:
        settings = self.settings
        masks, scores, boxes, levels = [], [], [], []
        image = self.sam.encode(pixel_values, config)
        for logits, expected in self.sam.grid_masks(image, settings.points_per_side, settings.several):
            level = torch.arange(len(expected), device=expected.device) % (3 if settings.several else 1)
            good = expected > settings.min_iou
            logits, expected, level = logits[good], expected[good], level[good]
            inner, outer = ((logits > bound).sum(dim=(1, 2)) for bound in (1.0, -1.0))
            stable = inner / outer.clamp(min=1) >= settings.min_stability
            logits, expected, level = logits[stable], expected[stable], level[stable]
            solid = logits > 0
            masks.append(logits.clamp(0, 3) if settings.soft else solid)
            scores.append(expected)
            boxes.append(boxes_of(solid))
            levels.append(level)
        found, places = torch.cat(masks), torch.cat(boxes)
        kept = suppressed(places, torch.cat(scores), settings.max_box_iou)
        if settings.min_area > 0:
            kept = kept[(found[kept] > 0).float().mean(dim=(1, 2)) > settings.min_area]
        if settings.max_shared < 1:
            # SAM's three masks of a point are a part of a part, a part, and the whole, which goes first.
            kept = kept[torch.cat(levels)[kept].argsort(descending=True, stable=True)]
            return Regions(drawn=merged(found[kept], places[kept], settings.max_shared))
        return Regions(drawn=found[kept])


def boxes_of(masks: Tensor) -> Tensor:
    """Left, top, right, bottom of the outermost pixels of masks (R, H, W) bool; zeros for an empty one."""
    sides = []
    for axis in (1, 2):  # along x, along y
        there = masks.any(dim=axis)
        first = there.int().argmax(dim=1)
        last = there.shape[1] - 1 - there.flip(1).int().argmax(dim=1)
        sides.append((first, last * there.any(dim=1)))
    (left, right), (top, bottom) = sides
    return torch.stack([left, top, right, bottom], dim=1)


def overlap(box: Tensor, boxes: Tensor, min_iou: float) -> Tensor:
    """(R) bool: which boxes (R, 4) have a higher IoU with a box (4)."""
    box, boxes = box.float(), boxes.float()
    shared = (torch.minimum(box[2:], boxes[:, 2:]) - torch.maximum(box[:2], boxes[:, :2])).clamp(min=0).prod(dim=1)
    return shared > min_iou * ((box[2:] - box[:2]).prod() + (boxes[:, 2:] - boxes[:, :2]).prod(dim=1) - shared)


def suppressed(boxes: Tensor, scores: Tensor, max_iou: float) -> Tensor:
    """Indices of the boxes (R, 4) that remain after non-maximum suppression, best score (R) first."""
    order = scores.argsort(descending=True, stable=True)
    boxes = boxes[order]
    gone = torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    for number in range(len(boxes)):
        if not gone[number]:
            gone[number + 1 :] |= overlap(boxes[number], boxes[number + 1 :], max_iou)
    return order[~gone]


def merged(masks: Tensor, boxes: Tensor, max_shared: float, min_box_iou: float = 0.2) -> Tensor:
    """Masks (R, H, W) with those that share more than `max_shared` of the smaller one united by their maximum.

    Each in turn takes those after it whose boxes (R, 4) have a higher IoU with its own than `min_box_iou`.
    """
    areas = masks.sum(dim=(1, 2)).float()
    left = torch.ones(len(masks), dtype=torch.bool, device=masks.device)
    united = []
    for number in range(len(masks)):
        if not left[number]:
            continue
        left[number] = False
        near = (left & overlap(boxes[number], boxes, min_box_iou)).nonzero().flatten()
        shared = torch.minimum(masks[number], masks[near]).sum(dim=(1, 2))
        near = near[shared > max_shared * torch.minimum(areas[number], areas[near])]
        left[near] = False
        united.append(torch.cat([masks[number][None], masks[near]]).amax(dim=0))
    return torch.stack(united) if united else masks


def region_network(given: Any) -> Any:
    """What the network `regions` stands for: `slic`, a SAM by id, folder or module, or a source of regions itself."""
    if isinstance(given, str) and given == "slic":
        return Superpixels()
    return Sam.of(given) if isinstance(given, str | PreTrainedModel) else given


def region_source(given: Any, settings: SamSettings) -> RegionSource:
    """The source of regions that `given` stands for, see `region_network`; a SAM draws them by the settings."""
    network = region_network(given)
    return SamRegions(network, settings) if isinstance(network, Sam) else network


@dataclass(frozen=True)
class SlicSettings:
    """Of the superpixels; see `skimage.segmentation.slic`.

    Attributes:
        segments: about how many.
        compactness: how much nearness counts beside colour.
    """

    segments: int = 100
    compactness: float = 10.0


class Superpixels:
    """SLIC superpixels of the image's colours: regions without a network (scikit-image).

    Args:
        settings: of the superpixels.
    """

    def __init__(self, settings: SlicSettings | None = None) -> None:
        self.settings = settings or SlicSettings()

    def __repr__(self) -> str:
        return f"Superpixels({self.settings})"

    def __call__(self, pixel_values: Tensor, config: Any) -> Regions:
        """See `RegionSource`."""
        slic = extra_package("skimage.segmentation", "vfm").slic
        colours = rgb(pixel_values, config)[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        settings = self.settings
        ids = slic(colours, n_segments=settings.segments, compactness=settings.compactness, start_label=1)
        return Regions(ids=torch.from_numpy(ids).to(pixel_values.device))


class MaskFolder:
    """Regions that were drawn before: NAME.png, a map of region ids (0 is none), or NAME.json, COCO RLE masks.

    A JSON file is a list of `{"segmentation": {"size": [h, w], "counts": ...}}`, or a mapping that has such a list as
    `annotations`, as SAM's generator and SA-1B write it.

    Pixels have no name, so whoever reads pictures calls `select` with each before its pixels go to the method. The
    regions are of the whole upright picture, and of that one alone: a window, a mirrored view or the next picture of
    a batch that asks for them too is refused.

    Args:
        folder: of the files, named as the pictures.

    Raises:
        ValueError: there is no such folder.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise ValueError(
                f"--masks {folder} is no folder; give one that holds NAME.png or NAME.json for each picture."
            )
        self.chosen: Regions | None = None
        self.asked = ""  # digest of the pixels that `chosen` was given to

    def __str__(self) -> str:
        return f"masks in {self.folder}"

    def __repr__(self) -> str:
        """With a digest of the files' names, sizes and times, since it is part of fingerprints."""
        files = sorted((path.name, path.stat()) for path in self.folder.iterdir())
        listed = digest(f"{name}/{stat.st_size}/{stat.st_mtime_ns}\n".encode() for name, stat in files)
        return f"MaskFolder({str(self.folder)!r}, {listed[:16]})"

    def select(self, picture: str, image_hw: tuple[int, int]) -> None:
        """The picture to come: the name of its file, and its own height and width, which its masks must have.

        Raises:
            InvalidImageError: it has no masks, or they are of another size or form.
        """
        stem = Path(picture).stem
        files = [self.folder / f"{stem}{ending}" for ending in (".png", ".json")]
        found = next((path for path in files if path.is_file()), None)
        if found is None:
            raise InvalidImageError(f"{picture} has no masks: neither {files[0]} nor {files[1]} is there.")
        read = read_map if found.suffix == ".png" else read_rle
        self.chosen, self.asked = read(found, image_hw), ""

    def __call__(self, pixel_values: Tensor, config: Any) -> Regions:
        """See `RegionSource`."""
        if self.chosen is None:
            raise ValueError(f"masks of {self.folder} are asked for before a picture is named; call select() first.")
        key = pixels_digest(pixel_values)
        if self.asked not in ("", key):
            raise ValueError(
                f"the masks of {self.folder} are of one whole picture, and other pixels ask for them too; run the "
                "method without a window or views around it, one picture at a time."
            )
        self.asked = key
        return self.chosen.at((pixel_values.shape[2], pixel_values.shape[3])).to(pixel_values.device)


def check_size(path: Path, came_hw: tuple[int, int], image_hw: tuple[int, int]) -> None:
    """Raises an `InvalidImageError` unless masks have their picture's size."""
    if came_hw != image_hw:
        raise InvalidImageError(
            f"{path} is {came_hw[0]}x{came_hw[1]} px (height x width) and its picture {image_hw[0]}x{image_hw[1]}; "
            "masks must have the picture's own size."
        )


def read_map(path: Path, image_hw: tuple[int, int]) -> Regions:
    """Regions of a PNG whose numbers are region ids.

    Raises:
        InvalidImageError: it is no such PNG, or has another size.
    """
    try:
        with Image.open(path, formats=["PNG"]) as image:
            check_size(path, (image.height, image.width), image_hw)
            if image.mode not in ("1", "L", "P", "I", "I;16"):
                raise InvalidImageError(
                    f"{path} is a picture of mode {image.mode}; a map of regions has one number a pixel (8 or 16 bit)."
                )
            ids = np.array(image, dtype=np.int64)
    except OSError as error:
        raise InvalidImageError(f"{path} can't be read as a PNG: {error}. Write it anew.") from None
    return Regions(ids=torch.from_numpy(ids))


def read_rle(path: Path, image_hw: tuple[int, int]) -> Regions:
    """Regions of a JSON file of COCO RLE masks.

    Raises:
        InvalidImageError: it is no such file, or its masks have another size.
    """
    form = 'a list of {"segmentation": {"size": [h, w], "counts": ...}}'
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = content["annotations"] if isinstance(content, dict) else content
        sizes, counts = [], []
        for entry in entries:
            entry = entry["segmentation"]
            height, width = entry["size"]
            sizes.append((int(height), int(width)))
            counts.append(entry["counts"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise InvalidImageError(f"{path} is not {form} ({type(error).__name__}: {error}); write it so.") from None
    masks = torch.zeros(len(counts), *image_hw, dtype=torch.bool)
    for number, (size, runs) in enumerate(zip(sizes, counts, strict=True)):
        check_size(path, size, image_hw)
        try:
            masks[number] = torch.from_numpy(decode_rle(runs, size))
        except (ValueError, TypeError, IndexError) as error:
            raise InvalidImageError(
                f"{path}: mask {number} is no COCO RLE of its size ({error}); write it anew."
            ) from None
    return Regions(drawn=masks)


def decode_rle(counts: str | list[int], size_hw: tuple[int, int]) -> np.ndarray:
    """A COCO run-length mask (H, W) bool: runs of 0 and 1 in turn, down the columns; packed into a string or not.

    Raises:
        ValueError: the runs don't add up to the size.
    """
    runs = unpack(counts) if isinstance(counts, str) else [int(run) for run in counts]
    height, width = size_hw
    if any(run < 0 for run in runs) or sum(runs) != height * width:
        raise ValueError(f"its runs cover {sum(runs)} pixels of {height * width}")
    values = np.repeat(np.arange(len(runs)) % 2 == 1, runs)
    return values.reshape(width, height).T


def unpack(packed: str) -> list[int]:
    """COCO's packed runs: five bits a character from "0" on, bit 6 for more to come, differences from the third on."""
    runs: list[int] = []
    value = shift = 0
    for character in packed:
        bits = ord(character) - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {character!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    return runs
