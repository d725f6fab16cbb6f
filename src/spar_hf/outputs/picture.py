"""One picture's result on its way into files."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from .options import ResultOptions


@dataclass(frozen=True, eq=False)
class PictureResult:
    """A picture and what was found in it.

    Attributes:
        stem: what its files are called, without suffixes.
        image: the upright picture, RGB.
        result: the `SegmentationResult`.
        source: the picture's own file, by the name that it was given with.
        options: what is asked of results.
    """

    stem: str
    image: Any
    result: dict[str, Any]
    source: str
    options: ResultOptions


class File(NamedTuple):
    """A file of a picture's result.

    Attributes:
        name: within the output folder.
        save: writes it under a name that is given.
    """

    name: str
    save: Callable[[Path], Any]
