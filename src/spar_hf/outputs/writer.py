"""The writer of results: a folder, into which each picture's files come whole or not at all."""

from __future__ import annotations

from pathlib import Path
from types import TracebackType
from typing import Any

from ..files import whole_files
from ..prompts_spar import Labels
from .options import ResultOptions
from .picture import PictureResult
from .table import FORMATS


class Writer:
    """Writes results into a folder.

        with Writer(folder, labels, options) as writer:
            record = writer.add(stem, image, result)

    Several processes may write into one folder, each with a number of its own and stems that no other has.

    Args:
        folder: where the files go; made where it is missing.
        labels: the vocabulary.
        options: formats, and what is asked of them.
        process: the number of this process among those that write into the folder.
    """

    def __init__(self, folder: Path, labels: Labels, options: ResultOptions | None = None, process: int = 0) -> None:
        self.folder = folder
        self.labels = labels
        self.options = options or ResultOptions()
        self.process = process

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def add(self, stem: str, image: Any, result: dict[str, Any], source: str | Path | None = None) -> dict[str, Any]:
        """Writes the files of one picture, all of them or none.

        Args:
            stem: what its files are called, without suffixes; another picture has another.
            image: the upright picture, RGB.
            result: the `SegmentationResult` of it.
            source: the picture's own file; None: `stem`.

        Returns:
            What is to know of the result, as JSON: sizes, the area of each class, and `files`, what was written.

        Raises:
            OSError: the disk is full; nothing of this picture is written, what was there is intact.
        """
        found = PictureResult(stem, image, result, str(source or stem), self.options)
        files = {what: file for name in self.options.formats for what, file in FORMATS[name].files(found).items()}
        paths = {what: self.folder / file.name for what, file in files.items()}
        with whole_files(*paths.values()) as drafts:
            for file, draft in zip(files.values(), drafts, strict=True):
                file.save(draft)
        return {**_facts(found), "files": {what: str(path) for what, path in paths.items()}}

    def close(self) -> None:
        """Makes whole what is about all pictures; may be called again, and by each of several processes."""


def _facts(found: PictureResult) -> dict[str, Any]:
    """A result as JSON, with a line for each class of the vocabulary."""
    result = found.result
    areas = {entry["id"]: entry["area_fraction"] for entry in result["segments"]}
    return {
        "image": found.source,
        "size_hw": list(result["segmentation"].shape),
        "input_hw": list(result["size_hw"]),
        "grid_hw": list(result["grid_hw"]),
        "classes": [
            {"id": index, "label": name, "area_fraction": areas.get(index, 0.0)}
            for index, name in enumerate(result["labels"].class_names)
        ],
        "no_class": areas.get(-1, 0.0),
    }
