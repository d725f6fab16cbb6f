"""log.jsonl: one line of numbers every few steps of a training run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..files import full_disk_in_words, write_atomically


def read_log(path: Path, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """The lines of a log; none where there is no file. A last line that a kill has cut is left out, and reported.

    Raises:
        ValueError: another line is broken.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    if lines.pop():
        say(f"{path}: the last line was cut by a kill and is dropped.")
    read = []
    for number, line in enumerate(lines, start=1):
        try:
            content = json.loads(line)
            content["step"] + 0
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}, is no line of a log. Move the file away and go on.") from error
        read.append(content)
    return read


class Log:
    """Writes log.jsonl.

    Args:
        path: of the file.
        kept: the lines that it begins with.
    """

    def __init__(self, path: Path, kept: list[dict[str, Any]]):
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.path = path
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, line: dict[str, Any]) -> None:
        """Adds a line. Raises an `OSError` when the disk is full."""
        with full_disk_in_words(self.path):
            self.file.write(json.dumps(line) + "\n")
            self.file.flush()
