"""MaskDiffusion: cross attention makes a vector of each name from the UNet's features, and features find names.

Paper: "MaskDiffusion: Exploiting Pre-trained Diffusion Models for Semantic Segmentation", Kawano and Aoki, IEEE Access
2024. A label method; CLIP gives nothing but its pixels. One pass of the UNet for as many names as a prompt holds, and
one for the features:
1. The words are the names with "and" between them. The image, squashed to a square, becomes a latent without noise, at
   step 0: the authors' single step of inversion leaves it as it is.
2. M = exp of the raw cross attention, no soft-max, in fp32: layers on a quarter and an eighth of the latent's grid, to
   half of it bilinearly, the mean over heads and layers; then bilinear to 256 x 352, what the authors score. Theirs
   has a token for each name; here a name's tokens are averaged. (Their division by the maximum falls out in the next
   step.)
3. F at each of these pixels at length one. A name's vector is the mean of F weighted with M, not normalised again; a
   pixel takes the name with the largest product. There is no background but the vocabulary's names for it.
Deviation: the released features are not the UNet's own, but go through layers and a captioner of ODISE that were
trained on COCO's masks (NVIDIA, not for commerce), so that they are not training-free. Those layers read what enters
the last residual block of `up_blocks` 0, 1 and 2, skip connections included. Here that is F itself: bilinear to the
grid, one after the other. Nothing of ODISE is here, and no number of theirs is to be reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid_spar import axis_positions, resample_axis, upsample
from ..networks.diffusion import Attention, Prompt
from ..results_spar import COSINE_SCALE
from ..segmentation_spar import GridScores, ScoreMaps
from .generative import DiffusionSegmenter

FEATURES = tuple(f"up_blocks.{block}.resnets.2" for block in range(3))
COARSER = (4, 8)  # than the latent's: the grids of 16 and 8 pixels a side at 512 px
BAND_NUMBERS = 2**24  # of features that are held at once, 64 MB


@dataclass(frozen=True)
class Settings:
    """MaskDiffusion's constants (the authors' code).

    Attributes:
        side_px: of the square that the diffusion model sees, 512; 0 is the network's own.
        between: what stands between two names.
        rows, columns: of the grid that names are found on.
    """

    side_px: int = 0
    between: str = "and"
    rows: int = 256
    columns: int = 352


class RawMean:
    """The mean over heads and layers of exp(raw cross attention), bilinear to one grid.

    Args:
        side: of that grid.
    """

    def __init__(self, side: int) -> None:
        self.side, self.total, self.count = side, torch.zeros(()), 0

    def __call__(self, attention: Attention) -> None:
        own = attention.side
        heads = sum(attention.scores(head).exp() for head in range(attention.num_heads))
        assert isinstance(heads, Tensor)
        maps = upsample(heads.T.unflatten(1, (own, own)), (self.side, self.side))  # (L, side, side)
        self.total = self.total.to(maps.device) + maps
        self.count += attention.num_heads

    def maps(self, places: Sequence[slice]) -> Tensor:
        """(K, side, side): the mean of each place's tokens."""
        return torch.stack([self.total[place].mean(dim=0) for place in places]) / self.count


class Segmenter(DiffusionSegmenter):
    """MaskDiffusion; see the head of the file, and `DiffusionSegmenter`."""

    def prompts(self, names: Sequence[str]) -> list[tuple[Prompt, list[slice]]]:
        """Prompts that hold the names in their order, and the place of each name in its prompt."""
        found = []
        for numbers in self.diffusion.groups(names, "", self.settings.between, ""):
            parts = [part for number in numbers for part in (names[number], self.settings.between)]
            prompt = self.diffusion.prompt(parts[:-1])
            found.append((prompt, list(prompt.places[::2])))
        return found

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        square = self.diffusion.square(image, self.config, self.side_px)
        latent = self.diffusion.latent(square)
        masks = self.masks(latent, encoded.labels.names)
        with self.diffusion.inputs(FEATURES) as kept:
            self.diffusion.look(latent, 0, self.diffusion.encode([self.diffusion.prompt(())]), {})
        features = [kept[name][0].float() for name in FEATURES]
        scores = self.scores(features, masks)
        return GridScores.of(scores, (image.shape[2], image.shape[3]), logit_scale=COSINE_SCALE)

    def masks(self, latent: Tensor, names: Sequence[str]) -> Tensor:
        """M (K, s / 2, s / 2) of names in a latent (1, C, s, s)."""
        layers = self.diffusion.layers("attn2")
        masks = []
        for prompt, places in self.prompts(names):
            mean = RawMean(latent.shape[-1] // 2)
            readers = dict.fromkeys([name for name, coarser in layers.items() if coarser in COARSER], mean)
            self.diffusion.look(latent, 0, self.diffusion.encode([prompt]), readers)
            masks.append(mean.maps(places))
        return torch.cat(masks)

    def scores(self, features: Sequence[Tensor], masks: Tensor) -> Tensor:
        """Products of features (C, h, w) with the names' vectors, (K, rows, columns); never all features are held."""
        size_hw = (self.settings.rows, self.settings.columns)
        width = sum(len(part) for part in features)
        total = torch.zeros(len(masks), width, device=masks.device)
        weight = torch.zeros(len(masks), device=masks.device)
        for rows, unit in bands(features, size_hw):
            (some,) = band_of([masks], rows, size_hw)
            total += torch.einsum("khw,chw->kc", some, unit)
            weight += some.sum(dim=(1, 2))
        vectors = total / weight[:, None]
        scores = torch.empty(len(masks), *size_hw, device=masks.device)
        for rows, unit in bands(features, size_hw):
            scores[:, rows] = torch.einsum("kc,chw->khw", vectors, unit)
        return scores


def band_of(maps: Sequence[Tensor], rows: slice, size_hw: tuple[int, int]) -> list[Tensor]:
    """Some rows of maps (C, h, w) that come to a size bilinearly, each (C, rows, W)."""
    found = []
    for part in maps:
        down = axis_positions(rows, size_hw[0], part.shape[1], 1.0, part.device)
        across = axis_positions(slice(0, size_hw[1]), size_hw[1], part.shape[2], 1.0, part.device)
        found.append(resample_axis(resample_axis(part, -2, down), -1, across))
    return found


def bands(features: Sequence[Tensor], size_hw: tuple[int, int]) -> Iterator[tuple[slice, Tensor]]:
    """All features side by side at a size, at length one: some rows, and (C, rows, W)."""
    step = max(BAND_NUMBERS // (sum(len(part) for part in features) * size_hw[1]), 1)
    for first in range(0, size_hw[0], step):
        rows = slice(first, min(first + step, size_hw[0]))
        yield rows, F.normalize(torch.cat(band_of(features, rows, size_hw)), dim=0, eps=1e-10)
