"""LPOSS+: LPOSS, refined by propagation over a graph of pixels of like colour.

Paper and first part: see lposs.py. The scores at the image's own pixels go through (I - 0.95 W) Z = Y once more, with
the same steps and normalisation; a pixel is tied to the others in the 13 x 13 around it with exp(-d / 0.01), d the
difference of their Lab colours, whose channels are divided by (100, 128, 128).
The graph has 84 ties a pixel, half of them all: about 1 kB a pixel. It is made once an image; names are solved some at
a time, whenever their maps are asked for.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np
from torch import Tensor

from ..encoders.base import rgb
from . import lposs
from .propagation import Graph, lab_colours, pixel_graph


@dataclass(frozen=True)
class Settings(lposs.Settings):
    """LPOSS+'s constants (section 3.3 and the authors' configuration) beside LPOSS's.

    Attributes:
        colour_scale: tau, the difference at which a tie has fallen to 1/e.
        reach_px: ties go to the (2 reach + 1)² pixels around each.
    """

    colour_scale: float = 0.01
    reach_px: int = 6


class Segmenter(lposs.Segmenter):
    """LPOSS+; see the head of the file, and `lposs.Segmenter` for the arguments."""

    def maps(self, image: Tensor, text: Tensor) -> lposs.Make:
        """What makes the maps of an image (1, 3, H, W)."""
        settings = self.settings
        over_patches = super().maps(image, text)

        @cache
        def graph() -> Graph:
            colours = lab_colours(rgb(image, self.config)[0]) / np.array([100, 128, 128], dtype=np.float32)
            return pixel_graph(colours, settings.reach_px, settings.colour_scale)

        def make(names: slice) -> Tensor:
            maps = over_patches(names)
            solved = graph().propagate(maps.flatten(1).T, settings.alpha, settings.steps, settings.tolerance)
            return solved.T.reshape(maps.shape)

        return make
