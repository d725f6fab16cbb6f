"""What a command has done so far, a line of JSON for each picture, so that it can go on after a kill.

A journal lies in the folder of the results. Each of several processes writes one of its own, and the next run, or the
end of this one, makes one of them. Lines of pictures name the run that made them, and a line before them has the
options of that run. Of two lines about one stem the later counts. Imports no PyTorch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from .files import digest, full_disk_in_words, whole_files


class Journal:
    """The journal of a command in a folder of results.

    Args:
        folder: of the results; made when the first line is written.
        command: what writes them, such as `segment`.
        options: all that decides what the results are, as JSON.
        process: the number of this process.
    """

    def __init__(self, folder: Path, command: str, options: Mapping[str, Any], process: int = 0) -> None:
        self.folder, self.command = folder, command
        self.options = json.loads(json.dumps(options))
        self.run = digest([json.dumps(self.options, sort_keys=True).encode()])
        self.path = self._path(process)
        self._file: Any = None

    def _path(self, process: int) -> Path:
        return self.folder / (f"spar-{self.command}.jsonl" if process == 0 else f"spar-{self.command}-{process}.jsonl")

    def _parts(self) -> list[Path]:
        return sorted(self.folder.glob(f"spar-{self.command}-[0-9]*.jsonl"))

    @staticmethod
    def exists(folder: Path, command: str) -> bool:
        """Whether a folder holds a journal of a command."""
        return any(folder.glob(f"spar-{command}*.jsonl"))

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines of the one journal.

        Raises:
            ValueError: a line is none of a journal.
        """
        path = self._path(0)
        if not path.exists():
            return
        with open(path, "rb") as file:
            for number, raw in enumerate(file, start=1):
                try:
                    line = json.loads(raw)
                    line["run"], line["options" if "options" in line else "stem"]
                except (ValueError, KeyError, TypeError) as error:
                    raise ValueError(
                        f"{path}, line {number}, is no line of a journal. Move the file away, or leave --resume out "
                        "after it, and all pictures are done again."
                    ) from error
                yield line

    def merge(self) -> None:
        """Makes one journal of those that several processes, perhaps killed ones, have left; the main one's work."""
        main, parts = self._path(0), self._parts()
        if not parts and not _is_cut(main):
            return
        with whole_files(main) as (draft,), open(draft, "wb") as file:
            for path in (main, *parts):
                if path.exists():
                    with open(path, "rb") as part:
                        file.writelines(line for line in part if line.endswith(b"\n"))  # a kill may cut the last one
        for path in parts:
            path.unlink()

    def write(self, stem: str, record: Mapping[str, Any]) -> None:
        """Adds a picture whose results are written. Raises an `OSError` when the disk is full."""
        with full_disk_in_words(self.path):
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115
                self._add({"run": self.run, "options": self.options})
            self._add({"run": self.run, "stem": stem, **record})

    def _add(self, content: Mapping[str, Any]) -> None:
        left = memoryview((json.dumps(content) + "\n").encode())
        while left:  # a disk that is nearly full takes a part, and nothing the next time
            left = left[self._file.write(left) :]

    def close(self) -> None:
        """Closes the file; nothing is lost without it."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _is_cut(path: Path) -> bool:
    """Whether the last line of a file is cut."""
    if not path.exists() or path.stat().st_size == 0:
        return False
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"
