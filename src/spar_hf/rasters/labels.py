"""From features on disk to the classes of a window of pixels: the same numbers as `FeatureScores` of the whole."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid_spar import axis_block
from ..segmentation_spar import TILE_NUMBERS, Chunks, ScoreMaps, Tile
from .blocks import Grid, runs
from .features import Features
from .source import Rectangle
from .store import GridFile


@dataclass(frozen=True, eq=False, kw_only=True)
class WindowScores(ScoreMaps):
    """The scores of a window of a raster's pixels; `size_hw` is the window's.

    Attributes:
        file: the features of all patches (h, w, D).
        normalized: whether they are to be compared with words as they are.
        text: text features (K, D), L2-normalised.
        window: rows and columns of pixels.
        whole_hw: height and width of the raster.
        coverage_hw: see `Grid`.
    """

    file: GridFile
    normalized: bool
    text: Tensor
    window: Rectangle
    whole_hw: tuple[int, int]
    coverage_hw: tuple[float, float]

    @classmethod
    def of(cls, file: GridFile, features: Features, text: Tensor, grid: Grid, window: Rectangle) -> WindowScores:
        height, width = (axis.stop - axis.start for axis in window)
        return cls(
            file=file, normalized=features.normalized, text=text, window=window, whole_hw=grid.raster.size_hw,
            coverage_hw=grid.coverage_hw, size_hw=(height, width), num_names=len(text), device=text.device,
        )  # fmt: skip

    def tiles(self) -> Iterator[tuple[Tile, Chunks]]:
        numbers = TILE_NUMBERS.get(self.device.type, TILE_NUMBERS["cpu"])
        step = max(16, int((numbers / self.num_names) ** 0.5))
        every = slice(0, self.num_names)
        axes = []
        for pixels, size_px, patches, covered in zip(
            self.window, self.whole_hw, self.file.grid_hw, self.coverage_hw, strict=True
        ):
            moved = [
                (run, slice(pixels.start + run.start, pixels.start + run.stop))
                for run in runs(self._side(pixels), step)
            ]
            axes.append([(run, *axis_block(at, size_px, patches, covered, self.device)) for run, at in moved])
        columns = slice(axes[1][0][1].start, axes[1][-1][1].stop)
        for y, i, down in axes[0]:
            vectors = self.file.read((i, columns)).to(self.device).float()
            if not self.normalized:
                vectors = F.normalize(vectors, dim=-1)
            band = torch.einsum("kd,ijd->kij", self.text, vectors)
            for x, j, weights in axes[1]:
                inside = slice(j.start - columns.start, j.stop - columns.start)
                yield (y, x), [(every, down @ (band[:, :, inside] @ weights.T))]

    @staticmethod
    def _side(pixels: slice) -> int:
        return int(pixels.stop - pixels.start)


def unit_text(encoded: Any, device: torch.device) -> Tensor:
    """Text features (K, D) of length 1, fp32."""
    return F.normalize(encoded.text_embeds.to(device).float(), dim=-1)
