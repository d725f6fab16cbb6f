"""A grid of vectors on disk, read and written in rectangles: what does not fit in memory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from .source import Rectangle


class GridFile:
    """Vectors (h, w, C) of one type in a file, row by row. Plain reads and writes: mapped pages would count as memory.

    Args:
        path: the file; made where there is none.
        grid_hw: rows and columns.
        width: C.
        dtype: of the numbers.
    """

    def __init__(self, path: Path, grid_hw: tuple[int, int], width: int, dtype: torch.dtype) -> None:
        self.grid_hw, self.width, self.dtype = grid_hw, width, dtype
        self._vector_bytes = width * dtype.itemsize
        self._file = open(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b", buffering=0)  # noqa: SIM115
        self._file.truncate(grid_hw[0] * grid_hw[1] * self._vector_bytes)

    def read(self, rectangle: Rectangle) -> Tensor:
        """(h, w, C) of some rows and columns."""
        rows, columns = rectangle
        out = torch.empty(rows.stop - rows.start, columns.stop - columns.start, self.width, dtype=self.dtype)
        for row, line in zip(range(rows.start, rows.stop), _bytes_of(out), strict=True):
            self._file.seek((row * self.grid_hw[1] + columns.start) * self._vector_bytes)
            if self._file.readinto(line) != len(line):
                raise OSError(f"{self._file.name} is cut off")
        return out

    def write(self, rectangle: Rectangle, vectors: Tensor) -> None:
        """Puts (h, w, C) into some rows and columns."""
        rows, columns = rectangle
        vectors = vectors.detach().to("cpu", self.dtype).contiguous()
        for row, line in zip(range(rows.start, rows.stop), _bytes_of(vectors), strict=True):
            self._file.seek((row * self.grid_hw[1] + columns.start) * self._vector_bytes)
            done = 0
            while done < len(line):  # a nearly full disk takes a part, and raises at the next
                done += self._file.write(line[done:]) or 0

    def flush(self) -> None:
        """Returns when all is on the disk."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


def _bytes_of(vectors: Tensor) -> Iterator[memoryview]:
    """The memory of each row of (h, w, C)."""
    for row in vectors.flatten(1).view(torch.uint8):
        yield memoryview(row.numpy())


@contextmanager
def grid_file(path: Path, grid_hw: tuple[int, int], width: int, dtype: torch.dtype) -> Iterator[GridFile]:
    """A `GridFile` that is closed when the block ends; the file stays."""
    file = GridFile(path, grid_hw, width, dtype)
    try:
        yield file
    finally:
        file.close()


@contextmanager
def work_folder(path: Path) -> Iterator[Path]:
    """A folder for what a run goes on from after a kill, which only one process works in.

    Raises:
        ValueError: another process does, or a file is there.
    """
    if path.exists() and not path.is_dir():
        raise ValueError(f"{path} is a file, and a folder for work of that name is needed; move it away")
    path.mkdir(parents=True, exist_ok=True)
    with open(path / "lock", "w") as lock:
        try:
            import fcntl

            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except ImportError:  # not on Windows
            pass
        except OSError:
            raise ValueError(f"another process is at work in {path}; wait for it, or write elsewhere") from None
        yield path
