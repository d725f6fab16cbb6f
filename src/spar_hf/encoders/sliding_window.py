"""SlidingWindow: a dense encoder that runs another one on overlapping windows and averages. SPAR's teacher.

Source: SPAR (Kombol et al., CVPR 2026), section 3: native-size windows, a stride that is no multiple of the patch,
features averaged without normalisation. (`segmenters.SlidingScores` averages scores instead.)
"""

from __future__ import annotations

import math
from itertools import product

import torch
from torch import nn

from ..encoder_spar import EncoderWrapper, SparVisionOutput, check_pixels
from ..grid_spar import fit_to_patches, whole_patches
from .base import DenseEncoder


def window_starts(length_px: int, window_px: int, stride_px: int) -> list[int]:
    """Starts 0, s, 2s, ... and one more at the border when the grid does not end there."""
    last = max(length_px - window_px, 0)
    starts = list(range(0, last + 1, stride_px))
    return starts if starts[-1] == last else [*starts, last]


class SlidingWindow(EncoderWrapper, nn.Module):
    """Runs a dense encoder on every window of an image and averages the features; itself a dense encoder.

    Each window's (h, w, D) map is resized bilinearly by r, the smallest divisor of the patch size p such that the
    stride is a multiple of p / r (stride 24, patch 16: r = 2), and added into a canvas of cells of p / r pixels; the
    canvas is divided by the number of windows over each cell and resized bilinearly to one vector per patch. No
    gradients.

    Differs from SPAR's code where a side is no multiple of the patch, under `floor`: that code puts the border window
    onto the cell that its start lies in, which moves the features at the border by up to a patch. Here windows stay
    within the whole patches, as those of the single pass do, and every one begins with a cell.

    An image smaller than the window in one direction is taken whole in that direction.

    Args:
        encoder: any dense encoder.
        window_px: side of the window; None is the encoder's native size.
        stride_px: step between windows.
        batch_size: windows run at once, across the images of a batch. It bounds the memory.

    Raises:
        ValueError: window or stride out of range.
    """

    def __init__(
        self, encoder: DenseEncoder, window_px: int | None = None, stride_px: int = 24, batch_size: int = 32
    ) -> None:
        super().__init__()
        patch_px: int = encoder.config.patch_size
        native_px: int = encoder.config.image_size
        window_px = native_px if window_px is None else window_px
        if window_px < patch_px or window_px % patch_px:
            raise ValueError(
                f"window_px is {window_px}; it must be a multiple of the patch ({patch_px} px), at least one patch. "
                f"The encoder's native size is {native_px}."
            )
        if not 0 < stride_px <= window_px:
            raise ValueError(f"stride_px is {stride_px}; it must be from 1 to the window's {window_px} px.")
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1.")
        self.encoder = encoder
        self.window_px = window_px
        self.stride_px = stride_px
        self.batch_size = batch_size
        self.cell_px = math.gcd(stride_px, patch_px)

    def extra_repr(self) -> str:
        return f"window_px={self.window_px}, stride_px={self.stride_px}"

    def num_windows(self, height_px: int, width_px: int) -> int:
        """How many forward passes of a window an image of this size costs."""
        image = torch.empty(1, self.config.num_channels, height_px, width_px, device="meta")  # a shape, no pixels
        pixels, _ = fit_to_patches(image, self.config.patch_size, self.config.size_rule)
        sides_px = whole_patches(pixels, self.config.patch_size).shape[2:]
        return math.prod(len(window_starts(side, self.window_px, self.stride_px)) for side in sides_px)

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D) on the grid that the encoder itself would have."""
        check_pixels(pixel_values, self.config.num_channels)
        patch_px, cell_px = self.config.patch_size, self.cell_px
        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        pixels, extent_hw = fit_to_patches(pixel_values, patch_px, self.config.size_rule)
        pixels = whole_patches(pixels, patch_px)
        batch, _, height, width = pixels.shape
        window_hw = (min(height, self.window_px), min(width, self.window_px))
        starts = [window_starts(side, self.window_px, self.stride_px) for side in (height, width)]
        places = list(product(range(batch), *starts))

        # Cells of a window, and of the canvas that all windows together cover.
        cells_hw = tuple(side // patch_px * (patch_px // cell_px) for side in window_hw)
        canvas_hw = tuple(axis[-1] // cell_px + cells for axis, cells in zip(starts, cells_hw, strict=True))
        covers = [  # (number of starts, cells of a window): the canvas rows, then columns, of each window
            torch.tensor(axis, device=pixels.device)[:, None] // cell_px + torch.arange(cells, device=pixels.device)
            for axis, cells in zip(starts, cells_hw, strict=True)
        ]
        # Windows over a cell = windows over its row x windows over its column.
        counts = [torch.bincount(cover.flatten(), minlength=n) for cover, n in zip(covers, canvas_hw, strict=True)]
        count = counts[0][:, None] * counts[1]
        # Flat canvas index of every cell of every window: (B, rows of windows, columns of windows, cells of a window).
        index = covers[0][:, None, :, None] * canvas_hw[1] + covers[1][None, :, None, :]
        index = torch.arange(batch, device=pixels.device).view(-1, 1, 1, 1) * count.numel() + index.flatten(2)
        index = index.flatten(0, 2)  # (windows, cells)

        total = torch.empty(0)
        for first in range(0, len(places), self.batch_size):
            chunk = places[first : first + self.batch_size]
            windows = torch.stack([pixels[b, :, y : y + window_hw[0], x : x + window_hw[1]] for b, y, x in chunk])
            outputs = self.encoder(windows)
            features = outputs.patch_embeds.float().permute(0, 3, 1, 2)  # (n, h, w, D) -> (n, D, h, w)
            features = nn.functional.interpolate(features, size=cells_hw, mode="bilinear", align_corners=False)
            if first == 0:
                total = features.new_zeros(batch * count.numel(), features.shape[1])
            vectors = features.flatten(2).transpose(1, 2).flatten(0, 1)  # (n, D, cells) -> (n * cells, D)
            total.index_add_(0, index[first : first + self.batch_size].flatten(), vectors)

        canvas = (total.view(batch, *canvas_hw, -1) / count.view(1, *canvas_hw, 1)).permute(0, 3, 1, 2)
        grid_hw = (height // patch_px, width // patch_px)
        canvas = nn.functional.interpolate(canvas, size=grid_hw, mode="bilinear", align_corners=False)
        return SparVisionOutput(
            patch_embeds=canvas.permute(0, 2, 3, 1).to(self.dtype),
            image_hw=image_hw,
            extent_hw=extent_hw,
            normalized=outputs.normalized,
        )
