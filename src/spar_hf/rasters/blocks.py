"""How a raster is cut into blocks, and what is read around each: by the attention's reach, or by the window."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from .source import Raster, Rectangle

# Bytes that a block takes at once, for each patch: fp32 numbers of a block of the network, as many as its tokens are
# wide; and pixels as bytes, as fp32, and as fp32 in the order that the convolution wants.
NUMBERS_A_CHANNEL = 14
BYTES_A_PIXEL = 3 + 4 * 3 * 2


@dataclass(frozen=True)
class Block:
    """A rectangle of patches, and the larger one that its features depend on (in one step), both of the whole grid."""

    own: Rectangle
    given: Rectangle

    @property
    def own_hw(self) -> tuple[int, int]:
        return _lengths(self.own)

    @property
    def given_hw(self) -> tuple[int, int]:
        return _lengths(self.given)

    @property
    def start(self) -> tuple[int, int]:
        """Row and column of the first patch given."""
        return self.given[0].start, self.given[1].start

    @property
    def own_in_given(self) -> Rectangle:
        rows, columns = (
            slice(own.start - given.start, own.stop - given.start)
            for own, given in zip(self.own, self.given, strict=True)
        )
        return rows, columns


def _lengths(rectangle: Rectangle) -> tuple[int, int]:
    return rectangle[0].stop - rectangle[0].start, rectangle[1].stop - rectangle[1].start


@dataclass(frozen=True)
class Surroundings:
    """What is read around a block.

    Attributes:
        before, after: patches at the top and left, and at the bottom and right.
        unit: what is given begins at a multiple of this many patches.
    """

    before: int
    after: int
    unit: int = 1

    @classmethod
    def of_reach(cls, window: int) -> Surroundings:
        """Attention within the reach of a window of n patches: n - 1, since each step runs a single block."""
        return cls(window - 1, window - 1)

    @classmethod
    def of_windows(cls, window_px: int, stride_px: int, patch_px: int) -> Surroundings:
        """Every window that is over a patch of the block, from a place where windows begin: they are the same ones."""
        window = math.ceil(window_px / patch_px)
        return cls(window, window, math.lcm(stride_px, patch_px) // patch_px)

    def around(self, own: slice, length: int) -> slice:
        start = max(own.start - self.before, 0) // self.unit * self.unit
        return slice(start, min(own.stop + self.after, length))


def cut(grid_hw: tuple[int, int], surroundings: Surroundings, side: int) -> list[Block]:
    """The blocks of a grid, row by row, as equal as they can be.

    Args:
        grid_hw: rows and columns of patches.
        surroundings: what is read around each.
        side: patches that a block may have along each side, surroundings included.
    """
    axes = []
    for length in grid_hw:
        around = surroundings.before + surroundings.after + surroundings.unit - 1
        own = side if length <= side else max(side - around, surroundings.unit, 1)
        own = math.ceil(length / math.ceil(length / own))
        parts = [slice(start, min(start + own, length)) for start in range(0, length, own)]
        axes.append([(part, surroundings.around(part, length)) for part in parts])
    return [Block((y, x), (near_y, near_x)) for (y, near_y), (x, near_x) in product(*axes)]


def block_side(memory_bytes: int, width: int, patch_px: int) -> int:
    """Patches along the side of a square block that fits in so much memory, for tokens of this width."""
    of_a_patch = 4 * NUMBERS_A_CHANNEL * width + BYTES_A_PIXEL * patch_px**2
    return max(int((memory_bytes / of_a_patch) ** 0.5), 1)


@dataclass(frozen=True)
class Grid:
    """The patches of a raster, and its pixels as a network wants them.

    Attributes:
        raster: the pixels.
        patch_px: side of a patch.
        size_rule: what happens to a side that is no multiple of it; see `fit_to_patches`. Under `stretch` the last
            pixels are repeated instead: stretching a raster would move every pixel for the sake of the last few.
        mean, std: of each colour, 0 to 1.
    """

    raster: Raster
    patch_px: int
    size_rule: str
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def of(cls, raster: Raster, config: Any, image_processor: Any) -> Grid:
        mean, std = tuple(image_processor.image_mean), tuple(image_processor.image_std)
        return cls(raster, config.patch_size, config.size_rule, mean, std)

    @property
    def size_hw(self) -> tuple[int, int]:
        """Rows and columns of patches.

        Raises:
            ValueError: there is none.
        """
        round_to = math.floor if self.size_rule == "floor" else math.ceil
        rows, columns = (round_to(side / self.patch_px) for side in self.raster.size_hw)
        if min(rows, columns) == 0:
            height, width = self.raster.size_hw
            raise ValueError(
                f"{self.raster.name} is {height} x {width} px (height x width); both sides must be at least one "
                f"patch, {self.patch_px} px."
            )
        return rows, columns

    @property
    def coverage_hw(self) -> tuple[float, float]:
        """Pixels over those that the grid covers, per axis."""
        height, width = (
            side / (patches * self.patch_px) for side, patches in zip(self.raster.size_hw, self.size_hw, strict=True)
        )
        return height, width

    def pixels(self, patches: Rectangle) -> Tensor:
        """The normalised pixels (1, 3, H, W) of some patches, fp32."""
        spans = [slice(axis.start * self.patch_px, axis.stop * self.patch_px) for axis in patches]
        rows, columns = (
            slice(span.start, min(span.stop, side)) for span, side in zip(spans, self.raster.size_hw, strict=True)
        )
        values = torch.from_numpy(self.raster.rgb((rows, columns)).copy()).permute(2, 0, 1).contiguous().float()
        for channel, mean, std in zip(values, self.mean, self.std, strict=True):
            channel.div_(255).sub_(mean).div_(std)
        beyond = (0, spans[1].stop - columns.stop, 0, spans[0].stop - rows.stop)
        if any(beyond):
            mode = "constant" if self.size_rule == "pad" else "replicate"
            values = nn.functional.pad(values[None], beyond, mode=mode)[0]
        return values[None]


def runs(length: int, step: int) -> Iterator[slice]:
    """A side in stretches."""
    return (slice(start, min(start + step, length)) for start in range(0, length, step))
