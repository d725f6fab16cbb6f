"""What training reads images from: photographs, or the picture book. No labels are read.

A *source* has `names`, `description` (what the record of a run says about it), `size_hw(index)`,
`draw(index, height, width)` and `fingerprint(index)`. Photographs are resized to the size asked for; the picture book
is drawn at it.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np

from ..picture_book.dataset import EDITION, PictureBook


class Source(Protocol):
    """Anything that has images by number."""

    description: dict[str, Any]
    names: list[str]

    def size_hw(self, index: int) -> tuple[int, int]: ...

    def draw(self, index: int, height_px: int, width_px: int) -> np.ndarray: ...

    def fingerprint(self, index: int) -> int: ...


class PictureBookScenes:
    """Training scenes of the picture book, in random shapes up to 2:1, drawn (not resized) at the size asked for."""

    def __init__(self, num_scenes: int, seed: int):
        self.description = {"kind": "picture book", "split": "train", "seed": seed, "edition": EDITION}
        self.names = [f"picture book train {index}" for index in range(num_scenes)]
        self.seed = seed

    def size_hw(self, index: int) -> tuple[int, int]:
        """A shape; the size itself is arbitrary, as drawings have none. Half of the scenes are square."""
        square, ratio = np.random.default_rng([self.seed, index]).uniform(-1, 1, 2)
        ratio = 1.0 if square < 0 else 2.0**ratio
        return round(4096 * min(1, ratio)), round(4096 * min(1, 1 / ratio))

    def draw(self, index: int, height_px: int, width_px: int) -> np.ndarray:
        return PictureBook("train", height_px, width_px, self.seed).scene(index).image

    def fingerprint(self, index: int) -> int:
        """The edition of the book: a scene changes with it alone."""
        return EDITION
