"""PAMR: pixel-adaptive mask refinement. Score maps flow between pixels of like colour, at full resolution.

Paper: Araslanov and Roth, CVPR 2020 (arXiv 2005.08104), section 3.2; as NACLIP and most methods after it run it: 10
steps over the 8 neighbours at the distances 8 and 16, on the cosines, before logit scale and soft-max. The weight of a
neighbour is the soft-max over all 16 of -|colour difference| / (1e-8 + 0.1 sigma), mean over the channels, where sigma
is the channel's standard deviation over the 18 places of both 3 x 3 grids. Borders repeat. Choice: colours are the
normalised pixels, resized bilinearly to the label map, as NACLIP's.

Memory: 16 maps of weights and about 5 maps for each name of a chunk (`segmentation_spar.MAP_NUMBERS` sets the chunk),
whatever the vocabulary: 0.13 GB in all for 150 names at 672 x 1008 on a CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..segmentation_spar import ScoreMaps


@dataclass(frozen=True)
class Settings:
    """PAMR's numbers, NACLIP's where the paper leaves them open.

    Attributes:
        steps: how often the maps flow.
        dilations_px: distances of the neighbours.
        sigma_factor: of the standard deviation, in the weight of a neighbour.
    """

    steps: int = 10
    dilations_px: tuple[int, ...] = (8, 16)
    sigma_factor: float = 0.1


NEIGHBOURS = tuple((dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1) if (dy, dx) != (0, 0))


def shifted(maps: Tensor, dilations_px: tuple[int, ...]) -> list[Tensor]:
    """The maps (k, H, W) as seen by each of the neighbours, borders repeated; views of one padded copy a distance."""
    height, width = maps.shape[1:]
    views = []
    for dilation in dilations_px:
        padded = F.pad(maps[None], [dilation] * 4, mode="replicate")[0]
        for dy, dx in NEIGHBOURS:
            top, left = dilation * (1 + dy), dilation * (1 + dx)
            views.append(padded[:, top : top + height, left : left + width])
    return views


def affinity(guide: Tensor, settings: Settings) -> Tensor:
    """How much each pixel takes from each of its n neighbours, (n, H, W), from the colours (3, H, W)."""
    dilations_px = settings.dilations_px
    weights = guide.new_zeros(len(dilations_px) * len(NEIGHBOURS), *guide.shape[1:])
    for channel in guide[:, None]:
        neighbours = shifted(channel, dilations_px)  # n of (1, H, W)
        places = [*neighbours, *[channel] * len(dilations_px)]  # each 3 x 3 grid has the pixel itself in the middle
        mean = sum(places) / len(places)
        variance = sum((place - mean).square() for place in places) / (len(places) - 1)
        scale = -1 / ((1e-8 + settings.sigma_factor * variance.sqrt()) * len(guide))
        for weight, neighbour in zip(weights, neighbours, strict=True):
            weight += ((channel - neighbour).abs() * scale)[0]
    return weights.softmax(0)


def pamr(maps: ScoreMaps, guide: Tensor, settings: Settings) -> Callable[[slice], Tensor]:
    """The full-resolution maps (k, H, W) of some names after all steps; `guide` is the image, (3, H, W)."""
    weights = affinity(guide.float(), settings)

    def refined(names: slice) -> Tensor:
        current = maps(names)
        for _ in range(settings.steps):
            total = torch.zeros_like(current)
            for weight, neighbour in zip(weights, shifted(current, settings.dilations_px), strict=True):
                total.addcmul_(neighbour, weight)
            current = total
        return current

    return refined
