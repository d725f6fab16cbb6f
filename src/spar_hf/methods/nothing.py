"""Score maps of methods that may find nothing at a pixel.

Such a method says of each pixel how probable each name is, and how probable it is that there is none of them. The
vocabulary's background class takes that share, where there is one. Else it counts evenly for all names, so that nobody
is sure there, and pixels where it is larger than the best name have no class.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..prompts_spar import Labels
from ..segmentation_spar import MAP_NUMBERS, NO_CLASS, FullScores

LOWEST = 1e-12  # of a probability, before its logarithm
SizeHW = tuple[int, int]


def names_of_background(labels: Labels) -> list[int]:
    """Numbers of the names of the background class."""
    return [] if labels.background is None else [i for i, c in enumerate(labels.class_ids) if c == labels.background]


def scores_with_nothing(
    found: Callable[[slice, SizeHW], Tensor],
    nothing: Callable[[SizeHW], Tensor],
    labels: Labels,
    size_hw: SizeHW,
    device: torch.device,
) -> FullScores:
    """Log-probabilities of one image.

    Args:
        found: (names, (H, W)) -> probabilities of some names (k, H, W); 0 for those of the background class.
        nothing: (H, W) -> the probability of no name.
        labels: the vocabulary.
        size_hw: of the label map to come.
        device: where the maps are made.
    """
    count = len(labels.names)
    background = names_of_background(labels)

    def make(names: slice, wanted_hw: SizeHW) -> Tensor:
        maps = found(names, wanted_hw)
        if not background:
            maps = maps + nothing(wanted_hw) / count
        elif names.start <= background[0] < names.stop:
            maps[background[0] - names.start] += nothing(wanted_hw)
        return maps.clamp(min=LOWEST).log()

    def without_class(labels_found: Tensor) -> Tensor:
        wanted_hw = (labels_found.shape[0], labels_found.shape[1])
        best = torch.zeros(wanted_hw, device=device)
        step = max(1, MAP_NUMBERS.get(device.type, MAP_NUMBERS["cpu"]) // (wanted_hw[0] * wanted_hw[1]))
        for first in range(0, count, step):
            best = torch.maximum(best, found(slice(first, min(first + step, count)), wanted_hw).amax(0))
        return labels_found.masked_fill(nothing(wanted_hw) >= best, NO_CLASS)

    return FullScores(
        make=make,
        size_hw=size_hw,
        num_names=count,
        device=device,
        logit_scale=1.0,
        corrections=() if background else (without_class,),
    )
