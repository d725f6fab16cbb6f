"""Upsampled: a dense encoder with a finer grid around any dense encoder, and score maps of it without its channels."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoder_spar import SparVisionOutput, check_pixels
from ..grid_spar import fit_to_patches, upsample
from ..segmentation_spar import FromFeatures, GridScores, ScoreMaps, feature_scores
from ..upsampling_spar import LocalWeights, Upsampler
from .base import DenseEncoder, rgb


class Upsampled(nn.Module):
    """Runs a dense encoder and upsamples its features; itself a dense encoder, of smaller patches.

    No gradients. As a segmenter, `FromUpsampled` gives the same scores without holding the features.

    Args:
        encoder: any dense encoder.
        upsampler: (image, features, output size) -> features; see `Upsampler`.
        factor: rows and columns of the finer grid for each of the encoder's. None: one for each pixel of a patch.

    Raises:
        ValueError: the factor does not divide the patch.
    """

    def __init__(self, encoder: DenseEncoder, upsampler: Upsampler, factor: int | None = None) -> None:
        super().__init__()
        patch_px: int = encoder.config.patch_size
        factor = patch_px if factor is None else factor
        if factor < 1 or patch_px % factor:
            raise ValueError(f"the factor is {factor}; it must divide the patch, {patch_px} px.")
        self.encoder = encoder
        self.upsampler = upsampler
        self.factor = factor
        self.config: Any = copy.deepcopy(encoder.config)
        self.config.patch_size = patch_px // factor

    def extra_repr(self) -> str:
        return f"factor={self.factor}"

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device

    def guide(self, pixel_values: Tensor, extent_hw: tuple[int, int]) -> Tensor:
        """The image as the upsampler sees it: RGB from 0 to 1, exactly what the patches cover."""
        (height, width), (rows, columns) = pixel_values.shape[2:], extent_hw
        return rgb(F.pad(pixel_values, (0, columns - width, 0, rows - height)), self.config)

    def upsampled_hw(self, extent_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns that the upsampler makes of what the patches cover."""
        rows, columns = (-(-side // self.config.patch_size) for side in extent_hw)
        return rows, columns

    def grid(self, image_hw: tuple[int, int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Rows and columns of the finer grid that the size rule gives an image, and the pixels that they cover."""
        patch_px = self.config.patch_size
        image = torch.empty(1, 1, *image_hw, device="meta")  # a shape, no pixels
        fitted, extent_hw = fit_to_patches(image, patch_px, self.config.size_rule)
        return (fitted.shape[2] // patch_px, fitted.shape[3] // patch_px), extent_hw

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, factor * h, factor * w, D), or as many as the size rule gives."""
        check_pixels(pixel_values, self.config.num_channels)
        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        outputs = self.encoder(pixel_values)
        covered_hw = outputs.extent_hw
        made = self.upsampler(
            self.guide(pixel_values, covered_hw), outputs.patch_embeds, self.upsampled_hw(covered_hw)
        )
        grid_hw, extent_hw = self.grid(image_hw)
        return SparVisionOutput(
            patch_embeds=fit_grid(made, grid_hw),
            image_embeds=outputs.image_embeds,
            image_hw=image_hw,
            extent_hw=extent_hw,
            normalized=outputs.normalized,
        )


def fit_grid(features: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """(B, h, w, D) on a grid of other rows and columns: those too many go, those beyond the border take the border's.

    `floor` lets the finer grid reach into a remainder that the coarse one dropped, `pad` lets it end before.
    """
    for axis, wanted in enumerate(grid_hw, start=1):
        have = features.shape[axis]
        if have > wanted:
            features = features.narrow(axis, 0, wanted)
        elif have < wanted:
            last = features.narrow(axis, have - 1, 1)
            repeats = [wanted - have if other == axis else 1 for other in range(features.ndim)]
            features = torch.cat([features, last.repeat(repeats)], dim=axis)
    return features


# ------------------------------------------------------------------------------------------- score maps


@dataclass(frozen=True, eq=False, kw_only=True)
class UpsampledScores(GridScores):
    """Scores on the finer grid, made some rows at a time from the coarse features; see `LocalWeights.scores`.

    Attributes:
        scores: the coarse features (h, w, D), as the encoder gives them.
        text: text features (K, D), L2-normalised.
        weights: gives what each cell of the finer grid takes of each patch.
        fine_hw: rows and columns of the finer grid.
        cosine: divide by the length of the upsampled features.
    """

    text: Tensor
    weights: Any
    fine_hw: tuple[int, int]
    cosine: bool

    @property
    def grid(self) -> Tensor:
        return self.rows(slice(0, self.fine_hw[0]))

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.fine_hw

    def rows(self, rows: slice) -> Tensor:
        return self._rows(rows, self.text)

    def __call__(self, names: slice) -> Tensor:
        scores = self._rows(slice(0, self.fine_hw[0]), self.text[names])
        return upsample(scores, self.size_hw, self.coverage_hw)

    def _rows(self, rows: slice, text: Tensor) -> Tensor:
        weights: LocalWeights = self.weights()
        last = weights.size_hw[0] - 1
        made = weights.scores(self.scores, text, slice(min(rows.start, last), min(rows.stop, last + 1)), self.cosine)
        return fit_grid(made, (rows.stop - rows.start, self.fine_hw[1]))


class FromUpsampled(FromFeatures):
    """The segmenter of an `Upsampled` encoder: what `FromFeatures` gives, without upsampled features.

    The upsampler's weights do not depend on the words, and what is upsampled is the smaller of the names' scores and
    the features.

    Args:
        encoder: an `Upsampled`.
        model, processor: see `FromFeatures`.
    """

    encoder: Upsampled

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, encoded: Any) -> list[ScoreMaps]:
        """See `Segmenter`; `encoded` are `LabelFeatures`."""
        pixel_values = pixel_values.to(self.device, self.dtype)
        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        encoder = self.encoder
        outputs = encoder.encoder(pixel_values)
        guides = encoder.guide(pixel_values, outputs.extent_hw)
        fine_hw, extent_hw = encoder.grid(image_hw)
        plans: dict[int, LocalWeights] = {}  # of the image at hand: the weights' queries are as large as the image

        @torch.no_grad()
        def weights(index: int) -> LocalWeights:
            if index not in plans:
                plans.clear()
                features = outputs.patch_embeds[index]
                plans[index] = encoder.upsampler.weights(
                    guides[index], features, encoder.upsampled_hw(outputs.extent_hw)
                )
            return plans[index]

        coarse_maps: Any = feature_scores(outputs, encoded.text_embeds, image_hw)
        return [
            UpsampledScores(
                scores=outputs.patch_embeds[index].float(),
                text=coarse.text,
                weights=partial(weights, index),
                fine_hw=fine_hw,
                cosine=not outputs.normalized,
                size_hw=image_hw,
                num_names=coarse.num_names,
                device=coarse.device,
                coverage_hw=(image_hw[0] / extent_hw[0], image_hw[1] / extent_hw[1]),
            )
            for index, coarse in enumerate(coarse_maps)
        ]
