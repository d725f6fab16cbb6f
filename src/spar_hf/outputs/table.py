"""The table of formats that results are written in: a new one is a row, and a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .picture import File, PictureResult
from .png import png


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        summary: what it is, for help and documentation.
        files: of a picture's result: what each is -> the file.
    """

    summary: str
    files: Callable[[PictureResult], dict[str, File]]


FORMATS = {
    "png": Format("NAME-overlay.png, tinted by class with a legend, and NAME-labels.png, the label map", png),
}
