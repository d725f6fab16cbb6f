"""Score maps of methods that may find nothing at a pixel.

Such a method says of each pixel how probable each name is, and how probable it is that there is none of them. The
vocabulary's background class takes that share, where there is one. Else it counts evenly for all names: the best name
has the pixel all the same, but it is not sure of it, and a background threshold takes it away.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..prompts_spar import Labels
from ..segmentation_spar import FullScores

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

    return FullScores(
        make=make,
        size_hw=size_hw,
        num_names=count,
        device=device,
        logit_scale=1.0,
    )
