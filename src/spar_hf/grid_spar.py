"""From an image's size to a grid of patches: size rules, position tables, and where a grid lies over an image."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable

import torch
from torch import nn

POSITION_RULES = ("size", "offset", "antialias", "bilinear")
SIZE_RULES = ("floor", "pad", "stretch")


def unknown(what: str, name: object, allowed: Iterable[str]) -> str:
    """The sentence about a name that is none of the allowed ones: what they are, and which was probably meant."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(name), allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"there is no {what} {name!r}; choose one of {', '.join(allowed)}.{hint}"


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises the `ValueError` that every named choice shares: what came and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}; choose one of {', '.join(map(repr, allowed))}.")


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


def resize_positions(table: torch.Tensor, grid_hw: tuple[int, int], rule: str) -> torch.Tensor:
    """Resizes a square table of learned patch positions to any grid.

    Args:
        table: (n * n, C), row-major; no class token.
        grid_hw: rows and columns wanted.
        rule: `size`: bicubic to the grid (transformers' rule). `offset`: bicubic with the scale (rows + 0.1) / n
            of the old DINO code, which most training-free methods and SPAR's CLIP were run with. `antialias`:
            `size` with an antialiasing filter (GEM). `bilinear`: CLIP Surgery, CLIPer.

    Returns:
        (rows * columns, C) in the table's dtype; the table itself on its native grid.
    """
    side = math.isqrt(table.shape[0])
    rows, columns = grid_hw
    # The grid decides, not the number of tokens: 7 x 28 is not 14 x 14.
    if rows == side and columns == side:
        return table
    image = table.float().view(1, side, side, -1).permute(0, 3, 1, 2)  # (n * n, C) -> (1, C, n, n)
    if rule == "offset":
        # The scale only sets the sampling points, (i + 0.5) * n / (rows + 0.1), here from -1 to 1 along the table. As
        # points they compile for any grid; interpolate takes a scale as a constant and compiles anew for each size.
        y, x = ((2 * torch.arange(n, device=table.device) + 1) / (n + 0.1) - 1 for n in grid_hw)
        points = torch.stack([x.expand(rows, -1), y[:, None].expand(-1, columns)], dim=-1)  # (h, w, 2), x first
        image = nn.functional.grid_sample(
            image, points[None], mode="bicubic", padding_mode="border", align_corners=False
        )
    else:
        mode = "bilinear" if rule == "bilinear" else "bicubic"
        image = nn.functional.interpolate(
            image, size=(rows, columns), mode=mode, align_corners=False, antialias=rule == "antialias"
        )
    return image.flatten(2).squeeze(0).T.to(table.dtype)  # (1, C, h, w) -> (h * w, C)
