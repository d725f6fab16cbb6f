"""Trident: windows spliced into one map by DINO's similarity, then aggregated over the whole image by SAM's attention.

Paper: "Harnessing Vision Foundation Models for High-Performance, Training-Free Open Vocabulary Segmentation", Shi et
al., ICCV 2025. Changes:
1. Sides that are no multiple of a patch are stretched bilinearly, to at least a window. In each window ProxyCLIP's
   step (its file) with DINO's patches, with the mean similarity of all windows of the image; what it gives is added
   into one canvas of the image's patches and divided by the number of windows.
2. SAM sees the image, stretched to whole patches. Of its last block, which attends over the whole image, a patch's
   attention is kept towards the patches whose values have a cosine above a threshold, the mean times `reach`, at most
   0.9, each head with its own cosines; the mean over heads, each row divided by its sum, averages the canvas, which
   comes to SAM's grid bilinearly. Then CLIP's final norm and projection.
The features lie on SAM's grid, at most 64 patches a side, over the whole image. SAM's attention is N x N for each
head; rows are made some at a time, and none is held.
The method makes its own windows. It may run in a sliding window all the same; then it is global to each.
Deviations: SAM sees the pixels that CLIP sees, not the file's; rows and columns of windows are kept apart (theirs
mixes them on windows that are not square); where an image is smaller than a window, the window is padded to a multiple
of 56 px as theirs is, and its map loses the padding again (theirs crashes); a patch with no key left keeps itself
(theirs is NaN).
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16, DINO ViT-B/16 and SAM ViT-B, with the
refinement by SAM.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense_spar import merge_heads, project_heads
from ..encoder_spar import SparVisionOutput, check_pixels
from ..encoders.composition import resample
from ..encoders.sliding_window import window_starts
from ..networks.sam import GlobalAttention, Sam
from ..networks.vit import ViT
from .encoder import ROW_NUMBERS, MethodEncoder, above_mean, attend_by_similarity, mean_similarity


@dataclass(frozen=True)
class Settings:
    """Trident's constants (section 3 and the authors' configurations).

    Attributes:
        stride_px: of the windows; 0 is the row's, scaled to the network. VOC20: 112.
        shift: beta; similarities under this multiple of their mean get no weight.
        sharpness: gamma, the factor on similarities before the soft-max.
        reach: factor on the mean cosine that makes the threshold; VOC20 0, Cityscapes 3.
        highest_threshold: the threshold is at most this.
        negative_threshold: what a threshold below zero becomes first: 0.6 for ADE20K and Cityscapes, else None.
        pad_px: windows of an image smaller than a window are padded to a multiple of it.
        columns: in how many pieces, side by side, SAM sees the image; Cityscapes 2.
        window_batch: windows run at once; bounds the memory.
    """

    stride_px: int = 0
    shift: float = 1.2
    sharpness: float = 3.0
    reach: float = 1.2
    highest_threshold: float = 0.9
    negative_threshold: float | None = None
    pad_px: int = 56
    columns: int = 1
    window_batch: int = 16


class Encoder(MethodEncoder):
    """Trident around a CLIP vision tower; see the head of the file.

    Args:
        vision: the tower; its configuration gives window and step.
        networks: "dino" and "sam", each an adapter, a module, or the id or folder to load it from.
        settings: the method's constants.
        method: the row's name.

    Raises:
        ValueError: a network is missing or of another kind, or window and stride are no whole patches.
    """

    settings: Settings
    dino: ViT
    sam: Sam

    def adapters(self) -> dict[str, Any]:
        return {"dino": ViT.of, "sam": Sam.of}

    def prepare(self) -> None:
        self.window_px, self.stride_px = self.whole_window(self.settings.stride_px)

    def extra_repr(self) -> str:
        return f"window {self.window_px}/{self.stride_px} px, {super().extra_repr()}"

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D) on SAM's grid, over the whole image."""
        check_pixels(pixel_values, self.config.num_channels)
        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        attentions = self.sam_attention(pixel_values)
        maps = [
            self.aggregate(self.spliced(image[None]), pieces)
            for image, pieces in zip(pixel_values, attentions, strict=True)
        ]
        normed = self.vision.post_layernorm(torch.stack(maps).permute(0, 2, 3, 1))  # (B, C, h, w) -> (B, h, w, C)
        return SparVisionOutput(
            patch_embeds=self.vision.visual_projection(normed), image_hw=image_hw, extent_hw=image_hw
        )

    def spliced(self, image: Tensor) -> Tensor:
        """The canvas of all windows of an image (1, 3, H, W): (C, rows, columns)."""
        patch_px = self.config.patch_size
        pixels = stretched(image, patch_px, self.window_px)
        height, width = pixels.shape[2:]
        starts = [window_starts(side, self.window_px, self.stride_px) for side in (height, width)]
        window_hw = (min(height, self.window_px), min(width, self.window_px))
        places = list(product(*starts))
        # Only of an image smaller than a window; evenly, the smaller half first.
        pads = [-side % self.settings.pad_px if side < self.window_px else 0 for side in window_hw]
        top, left = (pad // 2 for pad in pads)
        crops = [pixels[0, :, y : y + window_hw[0], x : x + window_hw[1]] for y, x in places]
        windows = F.pad(torch.stack(crops), (left, pads[1] - left, top, pads[0] - top))

        units, values = [], []
        for chunk in windows.split(self.settings.window_batch):
            tokens, clip_grid_hw, clip_extent_hw = self.embed(chunk)
            attention = self.last_layer.self_attn
            normed = self.last_layer.layer_norm1(self.run_to_last(tokens, clip_grid_hw))
            values.append(merge_heads(project_heads(attention, normed, "v")["v"])[:, 1:])
            seen = self.dino(chunk, self.config)
            units.append(F.normalize(seen.features.flatten(2).transpose(1, 2).float(), dim=-1))
        shift = self.settings.shift * torch.cat([mean_similarity(unit) for unit in units]).mean()
        weigh = above_mean(shift, self.settings.sharpness)

        maps = []
        for unit, value in zip(units, values, strict=True):
            grid = value.transpose(1, 2).unflatten(2, clip_grid_hw)  # (n, N, C) -> (n, C, rows, columns)
            grid = F.interpolate(grid, size=seen.grid_hw, mode="bilinear", align_corners=False)
            mixed = attend_by_similarity(unit, grid.flatten(2).transpose(1, 2), weigh)
            mixed = self.last_layer.self_attn.out_proj(mixed).transpose(1, 2).unflatten(2, seen.grid_hw)
            maps.append(mixed)
        ratio = max(round(seen.grid_hw[0] / clip_grid_hw[0]), 1)  # cells of the canvas along a patch
        if seen.grid_hw != tuple(side * ratio for side in clip_grid_hw):
            size = (clip_grid_hw[0] * ratio, clip_grid_hw[1] * ratio)
            maps = [F.interpolate(each, size=size, mode="bilinear", align_corners=False) for each in maps]
        all_maps = torch.cat(maps)
        if any(pads):
            cells_hw = (window_hw[0] // patch_px * ratio, window_hw[1] // patch_px * ratio)
            all_maps = resample(all_maps, clip_extent_hw, cells_hw, window_hw, origin=(top, left))

        canvas = all_maps.new_zeros(all_maps.shape[1], height // patch_px * ratio, width // patch_px * ratio)
        count = canvas.new_zeros(canvas.shape[1:])
        for each, (y, x) in zip(all_maps, places, strict=True):
            y, x = y // patch_px * ratio, x // patch_px * ratio
            inside = (..., slice(y, y + each.shape[1]), slice(x, x + each.shape[2]))
            canvas[inside] += each
            count[inside] += 1
        return canvas / count

    def sam_attention(self, pixel_values: Tensor) -> list[list[GlobalAttention]]:
        """For each image, SAM's attention in each of the pieces that it sees."""
        patch_px = self.config.patch_size
        size = [-(-side // patch_px) * patch_px for side in pixel_values.shape[2:]]
        pixels = F.interpolate(pixel_values.float(), size=size, mode="bilinear", align_corners=False)
        bounds = [size[1] * i // self.settings.columns for i in range(self.settings.columns + 1)]
        return [
            [
                self.sam.last_attention(image[None, :, :, left:right], self.config)[0]
                for left, right in pairwise(bounds)
            ]
            for image in pixels
        ]

    def aggregate(self, canvas: Tensor, pieces: list[GlobalAttention]) -> Tensor:
        """The canvas (C, rows, columns) averaged by SAM's attention: (C, h, w)."""
        bounds = [canvas.shape[2] * i // len(pieces) for i in range(len(pieces) + 1)]
        parts = []
        for piece, (left, right) in zip(pieces, pairwise(bounds), strict=True):
            part = canvas[None, :, :, left:right]
            part = F.interpolate(part, size=piece.valid_hw, mode="bilinear", align_corners=False)
            mixed = self.averaged(piece, part[0].flatten(1).T)  # (N, C)
            parts.append(mixed.T.unflatten(1, piece.valid_hw))
        return torch.cat(parts, dim=2)

    def averaged(self, attention: GlobalAttention, values: Tensor) -> Tensor:
        """Values (N, C) averaged by the attention between patches whose own values are alike: (N, C)."""
        settings = self.settings
        unit = F.normalize(attention.valid_values.float(), dim=-1)  # (H, N, d)
        # The mean over keys and heads of the cosines, without them.
        threshold = settings.reach * torch.einsum("hnd,hd->hn", unit, unit.mean(dim=1)).mean(dim=0)  # (N)
        if settings.negative_threshold is not None:
            threshold = threshold.masked_fill(threshold < 0, settings.negative_threshold)
        threshold = threshold.clamp(max=settings.highest_threshold)
        out = torch.empty_like(values)
        num_heads, count, _ = unit.shape
        step = max(ROW_NUMBERS // (num_heads * attention.key.shape[1] ** 2), 1)
        for first in range(0, count, step):
            rows = slice(first, min(first + step, count))
            alike = unit[:, rows] @ unit.transpose(1, 2) > threshold[rows, None]
            weights = attention.rows(rows.start, rows.stop).masked_fill(~alike, 0).float().mean(dim=0)
            weights.diagonal(rows.start).add_(torch.finfo(torch.float32).tiny)  # a patch with none left keeps itself
            out[rows] = (weights / weights.sum(dim=-1, keepdim=True)).to(values.dtype) @ values
        return out


def stretched(pixels: Tensor, patch_px: int, window_px: int) -> Tensor:
    """Sides of (B, 3, H, W) up to whole patches and a window, bilinear; left alone where they are whole patches."""
    height, width = pixels.shape[2:]
    if height % patch_px == 0 and width % patch_px == 0:
        return pixels
    longer = max(height, width)
    wanted = -(-longer // patch_px) * patch_px
    size = [max(-(-(side * wanted // longer) // patch_px) * patch_px, window_px) for side in (height, width)]
    return F.interpolate(pixels.float(), size=size, mode="bilinear", align_corners=False).to(pixels.dtype)
