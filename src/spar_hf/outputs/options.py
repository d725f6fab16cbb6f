"""What is asked of results, whatever they are written as."""

from __future__ import annotations

from dataclasses import dataclass

from ..names_spar import unknown
from .table import FORMATS


@dataclass(frozen=True)
class ResultOptions:
    """What becomes of results.

    Attributes:
        formats: names of `FORMATS`.
        instances: formats of regions have one for each connected component; otherwise one for each class.
        min_area, fill_holes: of the label map, in pixels; see `regions.clean`.
        top_k: classes of each pixel in score maps.
        scores: with `png`, also a picture of the best probability of each pixel.

    Raises:
        ValueError: no such format, or a number out of range.
    """

    formats: tuple[str, ...] = ("png",)
    instances: bool = False
    min_area: int = 0
    fill_holes: int = 0
    top_k: int = 5
    scores: bool = False

    def __post_init__(self) -> None:
        for name in self.formats:
            if name not in FORMATS:
                raise ValueError(unknown("format", name, FORMATS))
        for field, least in (("min_area", 0), ("fill_holes", 0), ("top_k", 1)):
            if getattr(self, field) < least:
                raise ValueError(f"{field} is {getattr(self, field)}; it must be a whole number, at least {least}.")

    def of_pipeline(self) -> dict[str, object]:
        """What the pipeline must be asked for, as its arguments."""
        needs = {need for name in self.formats for need in FORMATS[name].needs}
        asked: dict[str, object] = {"return_scores": True} if "scores" in needs or self.scores else {}
        return {**asked, "return_top_k": self.top_k} if "top_k" in needs else asked
