"""The writer of results: a folder, into which each picture's files come whole or not at all."""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock

from ..files import full_disk_in_words, whole_files
from ..prompts_spar import Labels
from .classes import class_table
from .options import ResultOptions
from .picture import PictureResult
from .records import FOLDER, Records
from .regions import cleaned
from .table import FORMATS


class Writer:
    """Writes results into a folder.

        with Writer(folder, labels, options) as writer:
            facts = writer.add(stem, image, result)

    Several processes may write into one folder, each with a number of its own and stems that no other has. What is
    about all pictures is made by `close`, of all that any process has added by then.

    Args:
        folder: where the files go; made where it is missing. Results that are there already stay, and files about
            all pictures go on being about them.
        labels: the vocabulary.
        options: formats, and what is asked of them.
        process: the number of this process among those that write into the folder.

    Raises:
        ValueError: the folder is a file, or holds results about other classes.
    """

    def __init__(self, folder: Path, labels: Labels, options: ResultOptions | None = None, process: int = 0) -> None:
        self.folder = Path(folder)
        self.labels = labels
        self.options = options or ResultOptions()
        self.formats = {name: FORMATS[name] for name in self.options.formats}
        classes = class_table(labels)
        self._records = {
            name: Records(self.folder, name, classes, process) for name, row in self.formats.items() if row.record
        }

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
            result: the `SegmentationResult` of it, with what `options.of_pipeline` asks for.
            source: the picture's own file; None: `stem`.

        Returns:
            What is to know of the result, as JSON: sizes, the area of each class, and `files`, what was written.

        Raises:
            OSError: the disk is full; nothing of this picture is written, what was there is intact.
        """
        result = cleaned(result, self.options.min_area, self.options.fill_holes)
        found = PictureResult(stem, image, result, str(source or stem), self.options.instances, self.options.scores)
        files = {what: file for row in self.formats.values() for what, file in row.files(found).items()}
        paths = {what: self.folder / file.name for what, file in files.items()}
        with whole_files(*paths.values()) as drafts:
            for file, draft in zip(files.values(), drafts, strict=True):
                file.save(draft)
        for name, records in self._records.items():
            records.add(stem, self.formats[name].record(found))  # type: ignore[misc]
        return {**_facts(found), "files": {what: str(path) for what, path in paths.items()}}

    @cached_property
    def _known(self) -> list[set[str]]:
        """The stems that there are records of, by format, when first asked."""
        return [records.stems() for records in self._records.values()]

    def recorded(self, stem: str) -> bool:
        """Whether an earlier run noted for files about all pictures the one of that stem; True where none is made."""
        return all(stem in stems for stems in self._known)

    def close(self) -> None:
        """Makes the files about all pictures; may be called again, and by each of several processes.

        Raises:
            OSError: the disk is full; the files are as they were before.
        """
        finishing = {name: row.finish for name, row in self.formats.items() if row.finish}
        if not finishing or not self.folder.is_dir():
            return
        place = self.folder / FOLDER
        with full_disk_in_words(place):
            place.mkdir(parents=True, exist_ok=True)
        # One process at a time: the last one has seen what all the others added.
        with FileLock(place / "lock"):
            for name, finish in finishing.items():
                finish(self.folder, self.labels, self._records.get(name))


def _facts(found: PictureResult) -> dict[str, Any]:
    """A result as JSON, with a line for each class of the vocabulary."""
    result, labels = found.result, found.labels
    areas = {entry["id"]: entry["area_fraction"] for entry in result["segments"]}
    return {
        "image": found.source,
        "size_hw": list(found.size_hw),
        "input_hw": list(result["size_hw"]),
        "grid_hw": list(result["grid_hw"]),
        "classes": [
            {"id": number, "label": name, "area_fraction": areas.get(index, 0.0)}
            for index, (number, name) in enumerate(zip(labels.written_ids, labels.class_names, strict=True))
        ],
        "no_class": areas.get(-1, 0.0),
    }
