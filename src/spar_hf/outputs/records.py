"""What is known of each picture of a folder, in one file of lines for each process that writes there.

A killed process leaves at most its last line broken, which the next one cuts off.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import full_disk_in_words

FOLDER = ".spar-results"  # hidden in the output folder


class Records:
    """The records of one format in an output folder, those of other processes and of earlier runs included.

    Args:
        folder: the output folder.
        format_name: of the format.
        classes: the class table. All records of a folder are about the same classes.
        process: the number of this process among those that write.

    Raises:
        ValueError: what is there is about other classes.
    """

    def __init__(self, folder: Path, format_name: str, classes: list[dict[str, Any]], process: int) -> None:
        self.folder = folder / FOLDER
        self.format_name = format_name
        self.own = self.folder / f"{format_name}-{process:05d}.jsonl"
        self._head = json.dumps({"classes": classes}, ensure_ascii=False).encode() + b"\n"
        self._lock = threading.Lock()
        for path in self._all():
            with open(path, "rb") as file:
                head = file.readline()
            if head.endswith(b"\n") and head != self._head:
                raise ValueError(
                    f"{folder} holds results in {format_name} of other classes, and one file has one list of classes; "
                    "give another --output, or remove that folder."
                )

    def _all(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self.format_name}-*.jsonl"))

    def add(self, stem: str, record: dict[str, Any]) -> None:
        """Notes the record of a picture; a later one of the same stem takes its place.

        Raises:
            OSError: the disk is full; the records before it are intact.
        """
        line = json.dumps({"stem": stem, "time": time.time_ns(), "record": record}, ensure_ascii=False) + "\n"
        with self._lock, full_disk_in_words(self.own):
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(self.own, "ab+") as file:
                whole = _cut_broken_line(file)
                try:
                    file.write(line.encode() if whole else self._head + line.encode())
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.own, whole)
                    raise

    def stems(self) -> set[str]:
        """The pictures that there are records of."""
        return set(self._places())

    def __call__(self) -> Iterator[dict[str, Any]]:
        """The record of each picture, ordered by stem."""
        places = self._places()
        for stem in sorted(places):
            path, start, _ = places[stem]
            with open(path, "rb") as file:
                file.seek(start)
                yield json.loads(file.readline())["record"]

    def _places(self) -> dict[str, tuple[Path, int, int]]:
        """Of each stem the file, place and time of its last record."""
        places: dict[str, tuple[Path, int, int]] = {}
        for path in self._all():
            with open(path, "rb") as file:
                file.readline()
                start = file.tell()
                while (line := file.readline()).endswith(b"\n"):
                    entry = json.loads(line)
                    before = places.get(entry["stem"])
                    if before is None or before[2] <= entry["time"]:
                        places[entry["stem"]] = (path, start, entry["time"])
                    start = file.tell()
        return places


def _cut_broken_line(file: Any) -> int:
    """Cuts off what a killed process left of a line at the end of a file; returns the size."""
    size = file.seek(0, os.SEEK_END)
    end = size
    while end:
        start = max(0, end - 2**16)
        file.seek(start)
        place = file.read(end - start).rfind(b"\n")
        if place >= 0:
            end = start + place + 1
            break
        end = start
    if end < size:
        file.truncate(end)
    return int(end)
