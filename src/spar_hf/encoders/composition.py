"""Dense encoders made of dense encoders: at another size, on another grid, the mean of several. For teachers."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from ..encoder_spar import EncoderWrapper, SparVisionOutput, check_pixels
from ..grid_spar import fit_to_patches
from .base import DenseEncoder


class Resized(EncoderWrapper, nn.Module):
    """Runs a dense encoder on the image resized to a shorter side of its own, and returns to the image's grid.

    A teacher sees best at some size: below it a thing has too few patches, above it a thing outgrows the window.
    Images keep their ratio up to whole patches. Pixels are resized bicubically and features bilinearly, both with
    antialias. No gradients.

    Args:
        encoder: any dense encoder.
        short_side_px: shorter side it sees, a multiple of its patch.

    Raises:
        ValueError: the side is no multiple of the patch.
    """

    def __init__(self, encoder: DenseEncoder, short_side_px: int) -> None:
        super().__init__()
        patch_px: int = encoder.config.patch_size
        if short_side_px < patch_px or short_side_px % patch_px:
            raise ValueError(f"short_side_px is {short_side_px}; it must be a multiple of the patch ({patch_px} px).")
        self.encoder = encoder
        self.short_side_px = short_side_px

    def extra_repr(self) -> str:
        return f"short_side_px={self.short_side_px}"

    def size_hw(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Size in pixels at which the encoder sees an image of this size."""
        factor = self.short_side_px / min(height_px, width_px)
        patch_px = self.config.patch_size
        height, width = (max(round(side * factor / patch_px), 1) * patch_px for side in (height_px, width_px))
        return height, width

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D) on the grid that the encoder itself would have."""
        check_pixels(pixel_values, self.config.num_channels)
        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        patch_px = self.config.patch_size
        pixels, extent_hw = fit_to_patches(pixel_values, patch_px, self.config.size_rule)
        grid_hw = (pixels.shape[2] // patch_px, pixels.shape[3] // patch_px)
        # Both grids have to cover the same rectangle: the remainder that `floor` drops goes first.
        pixels = pixels[:, :, : grid_hw[0] * patch_px, : grid_hw[1] * patch_px].float()
        pixels = nn.functional.interpolate(
            pixels, size=self.size_hw(*pixels.shape[2:]), mode="bicubic", align_corners=False, antialias=True
        )
        outputs = self.encoder(pixels.to(pixel_values.dtype))
        features = outputs.patch_embeds
        features = nn.functional.interpolate(
            features.float().permute(0, 3, 1, 2), size=grid_hw, mode="bilinear", align_corners=False, antialias=True
        )
        return SparVisionOutput(
            patch_embeds=features.permute(0, 2, 3, 1).to(self.dtype),
            image_hw=image_hw,
            extent_hw=extent_hw,
            normalized=outputs.normalized,
        )


def resample(
    features: torch.Tensor,
    extent_hw: tuple[int, int],
    grid_hw: tuple[int, int],
    new_extent_hw: tuple[float, float],
    origin: tuple[float, float] = (0, 0),
) -> torch.Tensor:
    """Bilinear features at the centres of another grid's patches; those beyond the border take the border's.

    Args:
        features: (B, D, h, w).
        extent_hw: height and width in pixels, from the image's top left corner, that the features cover.
        grid_hw: rows and columns wanted.
        new_extent_hw: height and width in pixels that these cover.
        origin: top and left of these, in pixels from the top left corner of the features.

    Returns:
        (B, D, rows, columns).
    """
    # Centres from -1 to 1 over what the features cover.
    down, across = (
        ((2 * torch.arange(n, device=features.device) + 1) / n * new_side + 2 * first) / side - 1
        for n, new_side, side, first in zip(grid_hw, new_extent_hw, extent_hw, origin, strict=True)
    )
    points = torch.stack([across.expand(grid_hw[0], -1), down[:, None].expand(-1, grid_hw[1])], dim=-1)  # x first
    sampled = nn.functional.grid_sample(
        features.float(),
        points.expand(len(features), -1, -1, -1),
        mode="bilinear",
        padding_mode="border",
        align_corners=False,
    )
    return sampled.to(features.dtype)


def to_extent(features: torch.Tensor, extent_hw: tuple[int, int], new_extent_hw: tuple[int, int]) -> torch.Tensor:
    """(B, D, h, w) over an extent in pixels -> the cells of another with the same top left corner.

    Cells beyond it are left out; where it goes on, the border's are repeated.
    """
    for axis, (old, new) in enumerate(zip(extent_hw, new_extent_hw, strict=True), start=2):
        count = features.shape[axis]
        if (wanted := round(count * new / old)) != count:
            places = torch.arange(wanted, device=features.device).clamp_(max=count - 1)
            features = features.index_select(axis, places)
    return features


class Regridded(nn.Module):
    """Gives a dense encoder's features on the grid of another patch size.

    So a teacher whose patches are not the student's can still teach it. Bilinear; where whole smaller patches make up
    one of the grid wanted (those of an upsampler do), their mean, which at two to a side is the same.

    Args:
        encoder: any dense encoder.
        patch_px: side of a patch of the grid wanted.
    """

    def __init__(self, encoder: DenseEncoder, patch_px: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.config: Any = copy.deepcopy(encoder.config)
        self.config.patch_size = patch_px

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D)."""
        check_pixels(pixel_values, self.config.num_channels)
        patch_px = self.config.patch_size
        pixels, extent_hw = fit_to_patches(pixel_values, patch_px, self.config.size_rule)
        grid_hw = (pixels.shape[2] // patch_px, pixels.shape[3] // patch_px)
        output = self.encoder(pixel_values)
        features = output.patch_embeds.permute(0, 3, 1, 2)
        if patch_px > (fine_px := self.encoder.config.patch_size) and patch_px % fine_px == 0:
            features = F.adaptive_avg_pool2d(to_extent(features, output.extent_hw, extent_hw), grid_hw)
        else:
            features = resample(features, output.extent_hw, grid_hw, extent_hw)
        return SparVisionOutput(
            patch_embeds=features.permute(0, 2, 3, 1),
            image_hw=output.image_hw,
            extent_hw=extent_hw,
            normalized=output.normalized,
        )


class Ensemble(nn.Module):
    """The mean of several dense encoders' features. No gradients.

    Args:
        encoders: dense encoders of one patch size, width, normalisation and size rule.
        normalise: divide each feature by its length first, and multiply the mean by the mean length over the
            encoders and the image, so that encoders of different scale count the same.

    Raises:
        ValueError: there is no encoder, or they do not fit together.
    """

    def __init__(self, encoders: Sequence[DenseEncoder], normalise: bool = False) -> None:
        super().__init__()
        if not encoders:
            raise ValueError("there are no encoders to take the mean of; give at least one.")
        for field in ("patch_size", "projection_dim", "size_rule", "image_mean", "image_std"):
            values = [getattr(encoder.config, field) for encoder in encoders]
            if any(value != values[0] for value in values):
                raise ValueError(f"{field} of the encoders is {', '.join(map(str, values))}; it must be the same.")
        self.encoders = nn.ModuleList(encoders)  # type: ignore[arg-type]
        self.normalise = normalise

    @property
    def config(self) -> Any:
        return self.encoders[0].config

    @property
    def dtype(self) -> torch.dtype:
        return self.encoders[0].dtype  # type: ignore[return-value]

    @property
    def device(self) -> torch.device:
        return self.encoders[0].device  # type: ignore[return-value]

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D)."""
        outputs = [encoder(pixel_values) for encoder in self.encoders]
        features = [output.patch_embeds.float() for output in outputs]
        if self.normalise:
            lengths = torch.stack([f.norm(dim=-1).mean(dim=(1, 2)) for f in features]).mean(0)  # (B,)
            features = [nn.functional.normalize(f, dim=-1) * lengths.view(-1, 1, 1, 1) for f in features]
        mean = torch.stack(features).mean(0).to(self.dtype)
        return SparVisionOutput(patch_embeds=mean, image_hw=outputs[0].image_hw, extent_hw=outputs[0].extent_hw)
