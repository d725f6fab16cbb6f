"""What is asked of results, whatever they are written as."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class ResultOptions:
    """What becomes of results.

    Attributes:
        formats: names of `FORMATS`.
        scores: with `png`, also a picture of the best probability of each pixel.
    """

    formats: tuple[str, ...] = ("png",)
    scores: bool = False
