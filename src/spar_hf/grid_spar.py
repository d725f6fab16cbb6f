"""From an image's size to a grid of patches: size rules, position tables, and where a grid lies over an image."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

POSITION_RULES = ("size", "offset", "antialias", "bilinear", "bilinear_antialias", "square")
SIZE_RULES = ("floor", "pad", "stretch")


def fit_to_patches(pixel_values: torch.Tensor, patch_px: int, rule: str) -> tuple[torch.Tensor, tuple[int, int]]:
    """Makes an image fit the patch grid.

    Args:
        pixel_values: (B, 3, H, W).
        patch_px: side of a patch.
        rule: `floor` leaves the pixels alone (the patch convolution drops the remainder; SPAR's CLIP), `pad` adds
            zeros at the right and the bottom (SPAR's SigLIP2), `stretch` resizes bicubically to the next multiple
            (SPAR's DINOv3.txt).

    Returns:
        The pixels to embed, and the (height, width) in pixels *of the image given* that the patch grid covers:
        less than the image for `floor`, more for `pad`, the image itself for `stretch`.

    Raises:
        ValueError: the image is smaller than one patch and the rule is `floor`.
    """
    height, width = pixel_values.shape[-2:]
    if rule == "floor":
        if height < patch_px or width < patch_px:
            raise ValueError(
                f"image is {height}x{width} px (height x width); both sides must be at least one patch, {patch_px} px."
                " Resize it with SparImageProcessor, or load the model with size_rule='pad'."
            )
        return pixel_values, (height // patch_px * patch_px, width // patch_px * patch_px)
    padded_hw = (math.ceil(height / patch_px) * patch_px, math.ceil(width / patch_px) * patch_px)
    if rule == "pad":
        return nn.functional.pad(pixel_values, (0, padded_hw[1] - width, 0, padded_hw[0] - height)), padded_hw
    if padded_hw != (height, width):
        pixel_values = nn.functional.interpolate(
            pixel_values.float(), size=padded_hw, mode="bicubic", align_corners=False
        ).to(pixel_values.dtype)
    return pixel_values, (height, width)


def whole_patches(pixels: torch.Tensor, patch_px: int) -> torch.Tensor:
    """(B, 3, H, W) without what is left of the last whole patch at the right and the bottom."""
    return pixels[..., : pixels.shape[-2] // patch_px * patch_px, : pixels.shape[-1] // patch_px * patch_px]


def resize_positions(table: torch.Tensor, grid_hw: tuple[int, int], rule: str) -> torch.Tensor:
    """Resizes a square table of learned patch positions to any grid.

    Args:
        table: (n * n, C), row-major; no class token.
        grid_hw: rows and columns wanted.
        rule: `size`: bicubic to the grid (transformers' rule). `offset`: bicubic with the scale (rows + 0.1) / n
            of the old DINO code, which most training-free methods and SPAR's CLIP were run with. `antialias`:
            `size` with an antialiasing filter (GEM). `bilinear`: CLIP Surgery, CLIPer. `bilinear_antialias`: the same
            with the filter (TIPSv2, SigLIP2 NaFlex). `square`: bilinear to the square of the longer side, of which
            the top left rows and columns are taken (RADIO).

    Returns:
        (rows * columns, C) in the table's dtype; the table itself on its native grid.
    """
    part = current_part()
    if part is not None:
        return _positions_of_part(table, grid_hw, rule, part)
    side = math.isqrt(table.shape[0])
    rows, columns = grid_hw
    # The grid decides, not the number of tokens: 7 x 28 is not 14 x 14. An exported graph has one path for all grids.
    exporting = torch.compiler.is_exporting()
    if not exporting and rows == side and columns == side:
        return table
    image = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)  # (n * n, C) -> (1, C, n, n)
    if rule == "offset":
        # The scale only sets the sampling points, (i + 0.5) * n / (rows + 0.1), here from -1 to 1 along the table. As
        # points they compile for any grid; interpolate takes a scale as a constant and compiles anew for each size.
        more: Any = 0.1
        if exporting:  # the native grid keeps the table
            sides = [torch.scalar_tensor(n, device=table.device) for n in grid_hw]
            more = 0.1 * ((sides[0] - side).abs() + (sides[1] - side).abs()).clamp(max=1)
        y, x = ((2 * torch.arange(n, device=table.device) + 1) / (n + more) - 1 for n in grid_hw)
        points = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1)  # (h, w, 2), x first
        image = nn.functional.grid_sample(
            image, points[None], mode="bicubic", padding_mode="border", align_corners=False
        )
    else:
        size = (max(grid_hw),) * 2 if rule == "square" else grid_hw
        mode = "bicubic" if rule in ("size", "antialias") else "bilinear"
        image = nn.functional.interpolate(
            image, size=size, mode=mode, align_corners=False, antialias=rule.endswith("antialias")
        )[..., :rows, :columns]
    return image.flatten(2).squeeze(0).T.to(table.dtype)  # (1, C, h, w) -> (h * w, C)


# ---------------------------------------------------------------------------- a part of a larger picture


@dataclass(frozen=True)
class Part:
    """The patches that a network is given are a rectangle of a larger picture's; they lie there, not on their own.

    Attributes:
        whole_hw: rows and columns of the whole picture's patches.
        start: row and column of the first patch given.
        own: rows and columns, among those given, of the patches that are asked for; the others are what they reach.
        pool: adds up what the tokens that are no patches attend to over all parts (`reach_spar.Pool`).
    """

    whole_hw: tuple[int, int]
    start: tuple[int, int]
    own: tuple[slice, slice]
    pool: Any = None


_PART: ContextVar[Part | None] = ContextVar("part", default=None)


@contextmanager
def part_of(part: Part) -> Iterator[None]:
    """Inside, patches have the positions and the reach that they have in the larger picture."""
    token = _PART.set(part)
    try:
        yield
    finally:
        _PART.reset(token)


def current_part() -> Part | None:
    """The part that is given; None for a whole picture, which a compiled graph always has."""
    return None if torch.compiler.is_compiling() else _PART.get()


def grid_places(grid_hw: tuple[int, int], device: torch.device) -> list[tuple[torch.Tensor, int]]:
    """Rows, then columns: the numbers of the patches of a grid in its whole picture, fp32, and how many that has."""
    part = current_part()
    starts, whole_hw = ((0, 0), grid_hw) if part is None else (part.start, part.whole_hw)
    return [
        (torch.arange(start, start + length, dtype=torch.float32, device=device), whole)
        for start, length, whole in zip(starts, grid_hw, whole_hw, strict=True)
    ]


def _positions_of_part(table: torch.Tensor, grid_hw: tuple[int, int], rule: str, part: Part) -> torch.Tensor:
    """Those rows of `resize_positions` of the whole grid, which is never made.

    All rules are separable: position (y, x) is the sum of down[y, i] across[x, j] table[i, j]. Resizing unit vectors
    along one axis gives an axis's weights.
    """
    side = math.isqrt(table.shape[0])
    if part.whole_hw == (side, side):
        image = table.view(side, side, -1)
        rows, columns = (slice(s, s + n) for s, n in zip(part.start, grid_hw, strict=True))
        return image[rows, columns].flatten(0, 1)
    # (1, n, n, 2): n maps of n rows; maps of one column are read as channels last by the filters, and wrongly.
    units = torch.eye(side, device=table.device)[None, :, :, None].repeat(1, 1, 1, 2)
    weights = []
    for start, length, whole in zip(part.start, grid_hw, part.whole_hw, strict=True):
        if rule == "offset":
            y = (2 * torch.arange(whole, device=table.device) + 1) / (whole + 0.1) - 1
            points = torch.stack([torch.full_like(y, -0.5), y], dim=-1)[None, :, None]  # (1, h, 1, 2), x first
            axis = nn.functional.grid_sample(units, points, mode="bicubic", padding_mode="border", align_corners=False)
        else:
            size = (max(part.whole_hw) if rule == "square" else whole, 2)
            mode = "bicubic" if rule in ("size", "antialias") else "bilinear"
            axis = nn.functional.interpolate(
                units, size=size, mode=mode, align_corners=False, antialias=rule.endswith("antialias")
            )
        weights.append(axis[0, :, start : start + length, 0].T)  # (length, n)
    down, across = weights
    along = torch.einsum("xj,ijc->ixc", across, table.float().view(side, side, -1))
    return torch.einsum("yi,ixc->yxc", down, along).flatten(0, 1).to(table.dtype)


# ---------------------------------------------------------------------------------- a grid over an image


def coverage(image_hw: tuple[int, int] | None, extent_hw: tuple[int, int] | None) -> tuple[float, float]:
    """Image size over the pixels that the patch grid covers, per axis.

    Above 1 where a remainder was cut off (`floor`), below 1 where the image was padded (`pad`), 1 where the grid fits.
    """
    if image_hw is None or extent_hw is None:
        return (1.0, 1.0)
    return (image_hw[0] / extent_hw[0], image_hw[1] / extent_hw[1])


def axis_positions(pixels: slice, size_px: int, grid: int, coverage: float, device: torch.device) -> torch.Tensor:
    """Where some pixels of an axis of `size_px` lie on a grid of patches, in patches from the first one's centre.

    As `align_corners=False`: (y + 0.5) / size_px * coverage * grid - 0.5, kept within the outer patch centres; fp64.
    """
    centres = (torch.arange(pixels.start, pixels.stop, dtype=torch.float64, device=device) + 0.5) / size_px
    return (centres * coverage * grid - 0.5).clamp_(0, grid - 1)


def axis_block(
    pixels: slice, size_px: int, grid: int, coverage: float, device: torch.device
) -> tuple[slice, torch.Tensor]:
    """The run of patches that some pixels of an axis lie between, and their bilinear weights (pixels, patches)."""
    positions = axis_positions(pixels, size_px, grid, coverage, device)
    patches = slice(int(positions[0]), min(int(positions[-1]) + 2, grid))
    places = torch.arange(patches.start, patches.stop, dtype=torch.float64, device=device)
    return patches, (1 - (positions[:, None] - places).abs()).clamp_(min=0).float()


def upsample(
    maps: torch.Tensor, size_hw: tuple[int, int], coverage_hw: tuple[float, float] = (1.0, 1.0)
) -> torch.Tensor:
    """Maps on a patch grid, bilinear at the size of the image that the grid lies over; two weights a pixel and axis.

    Args:
        maps: (..., h, w), fp32.
        size_hw: height and width wanted, pixels.
        coverage_hw: see `coverage`.

    Returns:
        (..., H, W).
    """
    for axis, (size_px, covered) in enumerate(zip(size_hw, coverage_hw, strict=True), start=-2):
        every = slice(0, size_px)
        maps = resample_axis(maps, axis, axis_positions(every, size_px, maps.shape[axis], covered, maps.device))
    return maps


def resample_axis(maps: torch.Tensor, axis: int, positions: torch.Tensor) -> torch.Tensor:
    """Maps (..., h, w) at some positions along axis -2 or -1, linear between the two nearest; see `axis_positions`."""
    before = positions.long()
    after = (before + 1).clamp_(max=maps.shape[axis] - 1)
    weight = (positions - before).to(maps.dtype)
    weight = weight[:, None] if axis == -2 else weight
    return torch.lerp(maps.index_select(axis, before), maps.index_select(axis, after), weight)
