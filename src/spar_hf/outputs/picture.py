"""One picture's result on its way into files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from ..prompts_spar import Labels
from .georeference import Georeference, georeference_of
from .regions import Regions


@dataclass(frozen=True, eq=False)
class PictureResult:
    """A picture and what was found in it.

    Attributes:
        stem: what its files are called, without suffixes.
        image: the upright picture, RGB.
        result: the `SegmentationResult`. A `georeference` in it is taken; else that of the source counts.
        source: the picture's own file, by the name that it was given with.
        instances: regions are connected components; otherwise classes.
        with_scores: a picture of the scores is asked for.
    """

    stem: str
    image: Any
    result: dict[str, Any]
    source: str
    instances: bool = False
    with_scores: bool = False

    @property
    def labels(self) -> Labels:
        labels: Labels = self.result["labels"]
        return labels

    @property
    def size_hw(self) -> tuple[int, int]:
        height, width = self.result["segmentation"].shape
        return height, width

    @cached_property
    def regions(self) -> Regions:
        """Its classes or, where these are asked for, instances."""
        return Regions(self.result, self.instances)

    @cached_property
    def georeference(self) -> Georeference | None:
        """Where it lies on the earth, if that is known."""
        given: Georeference | None = self.result.get("georeference")
        return given or georeference_of(Path(self.source), self.size_hw)


class File(NamedTuple):
    """A file of a picture's result.

    Attributes:
        name: within the output folder.
        save: writes it under a name that is given.
    """

    name: str
    save: Callable[[Path], Any]
