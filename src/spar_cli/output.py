"""What the commands write: files that appear whole, under names that are safe and distinct, and tables."""

from __future__ import annotations

import argparse
import shlex
import sys
import unicodedata
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

MAX_NAME_BYTES = 120  # of an output file's stem: room for suffixes within the 255 bytes that file systems allow
T = TypeVar("T")


def output_stems(images: Sequence[Path]) -> list[str]:
    """A name for each image's output files: its own without the suffix, made safe, and distinct.

    A name holds no separator, control or other character that some file system refuses, is neither `.` nor `..`, and
    differs from the others in more than case; a repeated one gets `-2`, `-3`, ...
    """
    taken: set[str] = set()
    stems = []
    for image in images:
        stem = _safe_stem(image)
        candidate, number = stem, 1
        while candidate.casefold() in taken:
            number += 1
            candidate = f"{stem}-{number}"
        taken.add(candidate.casefold())
        stems.append(candidate)
    return stems


def _safe_stem(image: Path) -> str:
    raw = image.stem.encode("utf-8", "replace").decode("utf-8")  # bytes that are no text come as lone surrogates
    kept = (
        "_" if char in '/\\:*?"<>|' or unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") else char for char in raw
    )
    stem = "".join(kept).encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore").strip(". ")
    return stem.lstrip("-") or "image"


def check_outputs(args: argparse.Namespace) -> None:
    """Says before the work, not after it, that a result could not be written."""
    output = getattr(args, "output", None)
    if output is not None and output.exists() and not output.is_dir():
        raise ValueError(f"--output is {output}, which is a file; give a folder")
    if args.json is not None and args.json.is_dir():
        raise ValueError(f"--json is {args.json}, which is a folder; give a file")


def command_line(args: argparse.Namespace) -> str:
    """The line that was run, to be kept beside its results."""
    return shlex.join(["spar", *args.argv])


def width_of(text: str) -> int:
    """Columns that `text` takes in a terminal: two for wide characters, none for combining ones."""
    return sum(
        0 if unicodedata.combining(char) else 2 if unicodedata.east_asian_width(char) in "WF" else 1 for char in text
    )


def table(rows: Sequence[Sequence[str]], align: str, indent: str = "") -> str:
    """Rows in columns as wide as their widest cell, two spaces between them; `align` has `<` or `>` for each."""
    widths = [max(width_of(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for cell, width, side in zip(row, widths, align, strict=True):
            space = " " * (width - width_of(cell))
            cells.append(space + cell if side == ">" else cell + space)
        lines.append((indent + "  ".join(cells)).rstrip())
    return "\n".join(lines)


def shorten(text: str, columns: int = 48) -> str:
    """`text` in at most so many columns, with an ellipsis where cut."""
    if width_of(text) <= columns:
        return text
    text = text[: 4 * columns]  # bounds the loop for a text of any length
    while width_of(text) > columns - 1:
        text = text[:-1]
    return text.rstrip() + "…"


def progress(items: Iterable[T], unit: str = "image") -> Iterable[T]:
    """A progress bar on a terminal, where there is more than one item or their number is not known."""
    from tqdm import tqdm

    return tqdm(items, unit=unit, disable=True if isinstance(items, Sized) and len(items) < 2 else None)


class Batch:
    """Several pictures, one after the other: a bad one is named and counted, and the others are done.

    batch = Batch(args.images)
    for path, stem in batch:
        with batch.may_fail(path):
            ...
    return batch.status()
    """

    def __init__(self, images: Sequence[Path]) -> None:
        self.images = list(images)
        self.failed: list[tuple[Path, str]] = []

    def __iter__(self) -> Iterator[tuple[Path, str]]:
        yield from progress(list(zip(self.images, output_stems(self.images), strict=True)))

    @contextmanager
    def may_fail(self, path: Path, count: bool = True) -> Iterator[None]:
        """Counts a picture that cannot be read instead of ending the command; other errors pass."""
        from spar_hf.image_file_spar import InvalidImageError

        try:
            yield
        except InvalidImageError as error:
            if len(self.images) == 1:
                raise
            if count:
                self.failed.append((path, str(error)))
                complain(str(error))

    def status(self) -> int:
        """The exit status, after a summary if pictures failed: 0, or 1 where some could not be done."""
        if not self.failed:
            return 0
        complain(f"{len(self.failed)} of {len(self.images)} pictures could not be done; the others are.")
        return 1

    def as_json(self) -> list[dict[str, str]]:
        """What failed and why, for the JSON output."""
        return [{"image": str(path), "error": reason} for path, reason in self.failed]


def complain(text: str) -> None:
    """An error that does not end the command, on one line of the error stream."""
    from tqdm import tqdm

    from spar_hf.visualize import plain_text

    tqdm.write(f"spar: error: {plain_text(text)}", file=sys.stderr)


def say(text: str) -> None:
    """Prints without tearing a progress bar apart."""
    from tqdm import tqdm

    tqdm.write(text)
