"""What the commands write: files that appear whole, under names that are safe and distinct, and tables."""

from __future__ import annotations

import argparse
import shlex
import sys
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

MAX_NAME_BYTES = 120  # of an output file's stem: room for suffixes within the 255 bytes that file systems allow


def output_stems(
    called: Sequence[str], names: Sequence[str] = (), before: Mapping[str, str] | None = None
) -> list[str]:
    """A name for each picture's output files: its relative path without the suffix, made safe, and distinct.

    No part of it holds a separator, control or other character that some file system refuses, or is `.` or `..`; it
    differs from the others in more than case; a repeated one gets `-2`, `-3`, ...

    Args:
        called: what each picture is called, a relative path.
        names: the name of each picture, by which it is known again.
        before: what an earlier run has called its outputs: stem -> name of the picture. Its pictures keep their stems,
            and others get none of them.
    """
    before = before or {}
    taken = {stem.casefold() for stem in before}
    kept: dict[str, list[str]] = {}
    for stem, name in before.items():
        kept.setdefault(name, []).append(stem)
    counts: dict[str, int] = {}  # how far the numbers of each stem have come
    stems = []
    for number, path in enumerate(called):
        earlier = kept.get(names[number]) if kept else None
        if earlier:
            stems.append(earlier.pop(0))
            continue
        *folders, last = PurePosixPath(path).parts or ("",)
        stem = "/".join([*(_safe(folder) for folder in folders), _safe(PurePosixPath(last).stem)])
        candidate, count = stem, counts.get(stem.casefold(), 1)
        while candidate.casefold() in taken:
            count += 1
            candidate = f"{stem}-{count}"
        counts[stem.casefold()] = count
        taken.add(candidate.casefold())
        stems.append(candidate)
    return stems


def _safe(name: str) -> str:
    raw = name.encode("utf-8", "replace").decode("utf-8")  # bytes that are no text come as lone surrogates
    kept = (
        "_" if char in '/\\:*?"<>|' or unicodedata.category(char) in ("Cc", "Cf", "Zl", "Zp") else char for char in raw
    )
    safe = "".join(kept).encode()[:MAX_NAME_BYTES].decode("utf-8", "ignore").strip(". ")
    return safe.lstrip("-") or "image"


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


def one_by_one(
    files: Sequence[Path],
    do: Callable[[Path, str], dict[str, Any]],
    report: Callable[[dict[str, Any]], str],
    args: argparse.Namespace,
    facts: Mapping[str, Any],
    what: str,
) -> int:
    """Does files that each take long, in their order: a bad one is named and counted, and the others are done.

    Args:
        files: of which each has results of its own.
        do: a file and the name of its outputs -> what is to know of it.
        report: the text about it.
        args: of the command; with `json`, what is known goes there.
        facts: what runs and how, for that.
        what: the files are called, in the plural.

    Returns:
        The exit status: 0, or 1 where some could not be done.

    Raises:
        InvalidImageError: the only file cannot be done.
    """
    from spar_hf.files import write_json
    from spar_hf.image_file_spar import InvalidImageError

    records, failed = [], []
    for path, stem in zip(files, output_stems([path.name for path in files]), strict=True):
        try:
            records.append(do(path, stem))
            say(report(records[-1]))
        except InvalidImageError as error:
            if len(files) == 1:
                raise
            failed.append({"image": str(path), "error": str(error)})
            complain(str(error))
    if args.json is not None:
        write_json(args.json, {"command": command_line(args), **facts, "images": records, "failed": failed})
    if failed:
        complain(f"{len(failed)} of {len(files)} {what} could not be done; the others are.")
    return 1 if failed else 0


def complain(text: str) -> None:
    """An error that does not end the command, on one line of the error stream."""
    from tqdm import tqdm

    from spar_hf.visualize import plain_text

    tqdm.write(f"spar: error: {plain_text(text)}", file=sys.stderr)


def say(text: str) -> None:
    """Prints without tearing a progress bar apart."""
    from tqdm import tqdm

    tqdm.write(text)
