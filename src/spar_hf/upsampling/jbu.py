"""Joint bilateral upsampling: a pixel is the mean of the patches near it in place and in colour. Nothing is learned.

Source: Kopf et al., Joint Bilateral Upsampling, SIGGRAPH 2007, section 3; its kernel is the one that FeatUp (Fu et
al., ICLR 2024) learns. sigma_d is .5 patches over 5 x 5 of them and sigma_r .1 of the colours' range, the paper's.
Choices: the patch's colour is its mean; one step to any size, where FeatUp doubles four times.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import upsampling_spar
from .bilateral import BilateralWeights, Kernels, resized


@dataclass(frozen=True)
class Settings:
    """Widths of the two Gaussians, in patches and in colour from 0 to 1, and patches to each side that are seen."""

    sigma_patches: float = 0.5
    sigma_colour: float = 0.1
    radius: int = 2


class Upsampler(upsampling_spar.Upsampler):
    """See the header."""

    def __init__(self, settings: Settings | None = None) -> None:
        super().__init__()
        self.settings = settings or Settings()

    def extra_repr(self) -> str:
        return str(self.settings)

    def weights(self, image: Tensor, features: Tensor, size_hw: tuple[int, int]) -> BilateralWeights:
        """See `Upsampler.weights`; of the features only the grid matters."""
        grid_hw = (features.shape[0], features.shape[1])
        ones = torch.ones(grid_hw, device=image.device)
        down, across = (size / rows for size, rows in zip(size_hw, grid_hw, strict=True))  # pixels a patch
        sigma, radius = self.settings.sigma_patches, self.settings.radius
        kernels = Kernels(
            sigma * across * ones, sigma * down * ones, torch.zeros_like(ones), self.settings.sigma_colour * ones
        )
        return BilateralWeights(resized(image.float(), size_hw), resized(image.float(), grid_hw), kernels, radius)
