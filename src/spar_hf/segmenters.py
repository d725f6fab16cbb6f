"""Segmenters around segmenters: windows whose scores are averaged pixel by pixel, frames smoothed in time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import singledispatch
from itertools import product
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .encoders.sliding_window import window_starts
from .segmentation_spar import FullScores, GridScores, ScoreMaps, Segmenter

MAX_SMOOTHED = 10**9  # numbers of scores that are kept from frame to frame where there is no grid of patches, 4 GB


class SegmenterWrapper:
    """A segmenter around another one is where that one is, as precise, and wants the same of the words."""

    segmenter: Segmenter

    @property
    def config(self) -> Any:
        return self.segmenter.config

    @property
    def dtype(self) -> torch.dtype:
        return self.segmenter.dtype

    @property
    def device(self) -> torch.device:
        return self.segmenter.device

    @property
    def networks(self) -> tuple[torch.nn.Module, ...]:
        return self.segmenter.networks

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`."""
        return self.segmenter.encode_labels(labels, templates, unlabelled)


class SlidingScores(SegmenterWrapper):
    """Runs a segmenter in windows and averages their scores pixel by pixel, as SCLIP's evaluation does.

    Windows are cut from the pixels as they are; what is no multiple of the patch is up to the segmenter, in each
    window. (A `SlidingWindow` averages features instead.)

    Args:
        segmenter: any segmenter.
        window_px: side of the window. An image that is smaller in one direction is taken whole in that direction.
        stride_px: step between windows.
        batch_size: windows run at once. It bounds the memory.

    Raises:
        ValueError: window or stride out of range.
    """

    def __init__(self, segmenter: Segmenter, window_px: int, stride_px: int, batch_size: int = 32) -> None:
        if not 0 < stride_px <= window_px:
            raise ValueError(f"stride_px is {stride_px}; it must be from 1 to the window's {window_px} px.")
        self.segmenter = segmenter
        self.window_px = window_px
        self.stride_px = stride_px
        self.batch_size = batch_size

    def __repr__(self) -> str:
        return f"SlidingScores({self.segmenter!r}, window_px={self.window_px}, stride_px={self.stride_px})"

    def __call__(self, pixel_values: Tensor, encoded: Any) -> list[ScoreMaps]:
        """See `Segmenter`."""
        return [self._of_one(single, encoded) for single in pixel_values]

    def _of_one(self, pixels: Tensor, encoded: Any) -> ScoreMaps:
        """The maps of one image (3, H, W)."""
        image_hw = (pixels.shape[1], pixels.shape[2])
        window_hw = (min(image_hw[0], self.window_px), min(image_hw[1], self.window_px))
        places = list(product(*(window_starts(side, self.window_px, self.stride_px) for side in image_hw)))
        windows: list[ScoreMaps] = []
        for first in range(0, len(places), self.batch_size):
            chunk = places[first : first + self.batch_size]
            crops = torch.stack([pixels[:, y : y + window_hw[0], x : x + window_hw[1]] for y, x in chunk])
            windows += self.segmenter(crops, encoded)
        if any(window.corrections for window in windows):
            raise ValueError(
                "a correction of finished label maps runs in each window, and its scores cannot be averaged; put it "
                "around the windows."
            )

        def mean(names: slice, size_hw: tuple[int, int]) -> Tensor:
            total = count = torch.zeros(())
            for (top, left), window in zip(places, windows, strict=True):
                single = window(names)
                if count.ndim == 0:
                    total, count = single.new_zeros(len(single), *image_hw), single.new_zeros(image_hw)
                inside = (..., slice(top, top + window_hw[0]), slice(left, left + window_hw[1]))
                total[inside] += single
                count[inside] += 1
            return F.interpolate((total / count)[None], size=size_hw, mode="bilinear", align_corners=False)[0]

        return FullScores(
            make=mean,
            size_hw=image_hw,
            num_names=windows[0].num_names,
            device=windows[0].device,
            logit_scale=windows[0].logit_scale,
            patches_hw=windows[0].grid_hw,
        )


@singledispatch
def sliding_scores(segmenter: Any, window_px: int, stride_px: int) -> Segmenter:
    """The segmenter in windows whose scores are averaged; what must see the whole image stays around them."""
    return SlidingScores(segmenter, window_px, stride_px)


class Smoothed(SegmenterWrapper):
    """A segmenter for the frames of one video: the scores of a frame are mixed with those of the frames before it.

    score = keep * (smoothed score of the frame before) + (1 - keep) * (score of this frame), at each patch and for
    each name, before the arg-max. A frame of another size begins anew. Frames come in order, one at a time.

    Args:
        segmenter: any segmenter.
        keep: share of the past, from 0 to below 1; after n frames its weight is keep^n.

    Raises:
        ValueError: `keep` is out of range.
    """

    def __init__(self, segmenter: Segmenter, keep: float) -> None:
        if not 0 <= keep < 1:
            raise ValueError(f"the share of the past is {keep}; it must be from 0 to below 1.")
        self.segmenter = segmenter
        self.keep = keep
        self._past: Tensor | None = None

    def __repr__(self) -> str:
        return f"Smoothed({self.segmenter!r}, keep={self.keep})"

    def __call__(self, pixel_values: Tensor, encoded: Any) -> list[ScoreMaps]:
        """See `Segmenter`; the images of a batch are frames in order."""
        return [self._mixed(maps) for maps in self.segmenter(pixel_values, encoded)]

    def _mixed(self, maps: ScoreMaps) -> ScoreMaps:
        grid = maps if isinstance(maps, GridScores) else _at_every_pixel(maps)
        # Scores are linear in what a grid holds, be it scores or features: mixing that mixes them.
        now, past = grid.scores, self._past
        if past is not None and past.shape == now.shape:
            now = self.keep * past + (1 - self.keep) * now
        self._past = now
        return replace(grid, scores=now)


def _at_every_pixel(maps: ScoreMaps) -> GridScores:
    """Scores that live on no grid of patches, on one of pixels."""
    if maps.num_names * prod(maps.size_hw) > MAX_SMOOTHED:
        raise ValueError(
            f"the scores of {maps.num_names} names at {maps.size_hw[0]} x {maps.size_hw[1]} pixels are too many to be "
            "kept from frame to frame; leave --smooth out, take fewer classes, or a smaller --short-side."
        )
    scores = maps(slice(0, maps.num_names))
    return GridScores.of(scores, maps.size_hw, logit_scale=maps.logit_scale, corrections=maps.corrections)
