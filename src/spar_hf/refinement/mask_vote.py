"""The vote of regions: all pixels of a region take the region's commonest class.

Paper: CorrCLIP's map correction (Zhang et al., ICCV 2025). Regions come to the size of the label map; equal counts go
to the lower class id, first of all to no class. As released, the smallest id stands for no region, even where no pixel
lies in none; pixels in no region keep their class.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..results_spar import NO_CLASS
from ..segmentation_spar import ScoreMaps
from .clip_internals import ClipInternals


@dataclass(frozen=True)
class Settings:
    """Whose regions vote.

    Attributes:
        smallest_is_none: the smallest id is no region; else only 0 is none.
        points_per_side, several, min_iou, min_stability: of SAM's masks; see `networks.masks.SamSettings`.
    """

    smallest_is_none: bool = True
    points_per_side: int = 32
    several: bool = False
    min_iou: float = 0.4
    min_stability: float = 0.4


def mask_vote(
    labels: Tensor, *, image: ClipInternals, settings: Settings, maps: ScoreMaps, class_ids: Tensor, regions: Any
) -> Tensor:
    """The label map (H, W) after the vote.

    Args:
        labels: class ids, `NO_CLASS` where there is none.
        image: the image.
        settings: whose regions.
        maps: the scores that the labels come from; not looked at.
        class_ids: the class of each name (K); not looked at.
        regions: a source of regions, a `networks.masks.RegionSource`.
    """
    found = regions(image.pixel_values, image.network.config).at((labels.shape[0], labels.shape[1]))
    numbers, place = found.map.to(labels.device).unique(return_inverse=True)
    none = numbers[0] if settings.smallest_is_none else 0
    width = int(labels.max()) - NO_CLASS + 1
    counts = torch.bincount((place * width + labels - NO_CLASS).flatten(), minlength=len(numbers) * width)
    winner = counts.view(len(numbers), width).argmax(dim=1) + NO_CLASS
    return torch.where((numbers != none)[place], winner[place].to(labels.dtype), labels)
