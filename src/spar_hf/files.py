"""Files: drafts that become whole files or nothing, hashes, and a clear word when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

DRAFT = re.compile(r"\..+\.(\d+)\.tmp")


def draft_of(path: Path) -> Path:
    """The hidden name beside a file, or folder, under which it grows; it holds the process that writes it."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def clear_drafts(folder: Path) -> list[Path]:
    """Removes the drafts in a folder whose process is gone: killed commands leave them. Returns what was removed."""
    removed = []
    for draft in folder.glob(".*.tmp") if folder.is_dir() else ():
        match = DRAFT.fullmatch(draft.name)
        if match is None or _is_running(int(match[1])):
            continue
        shutil.rmtree(draft, ignore_errors=True) if draft.is_dir() else draft.unlink(missing_ok=True)
        removed.append(draft)
    return removed


def _is_running(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there, and another user's
        return True
    return True


@contextmanager
def whole_files(*paths: Path) -> Iterator[list[Path]]:
    """Drafts beside `paths`: the files take their places when the block ends and vanish if it fails.

    Folders are made where they are missing, and cleared of what killed commands left.

    Raises:
        ValueError: a folder to write into is a file.
        OSError: the disk is full; the message says so, nothing is left behind and other files are as they were.
    """
    drafts = [draft_of(path) for path in paths]
    with _disk_in_words(*paths):
        for folder in {path.parent for path in paths}:
            if folder.exists() and not folder.is_dir():
                raise ValueError(f"{folder} is a file; give a folder to write into")
            folder.mkdir(parents=True, exist_ok=True)
            clear_drafts(folder)
        try:
            yield drafts
            for source, target in zip(drafts, paths, strict=True):
                with open(source, "rb") as file:
                    os.fsync(file.fileno())
                os.replace(source, target)
        finally:
            for source in drafts:
                source.unlink(missing_ok=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """`whole_files` for a folder, which must be new or empty: a draft beside it, that takes its place in the end."""
    with draft_folder(path) as draft:
        yield draft
        if path.exists():
            path.rmdir()
        os.replace(draft, path)


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A folder for work, which vanishes when the block ends; the next run clears what a killed one left.

    Raises:
        OSError: the disk is full; the message says so.
    """
    draft = draft_of(path)
    with _disk_in_words(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        clear_drafts(path.parent)
        draft.mkdir()
        try:
            yield draft
        finally:
            shutil.rmtree(draft, ignore_errors=True)


@contextmanager
def _disk_in_words(*paths: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        raise OSError(
            errno.ENOSPC,
            f"disk full while writing {', '.join(map(str, paths))}. What was written before is intact; free "
            "some space and run the same command again, with --resume where it has one",
        ) from error


def _is_disk_full(error: Exception) -> bool:
    """Also as the writer of safetensors says it, in a class of its own, and torch's, which says no reason at all."""
    codes = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    if isinstance(error, OSError):
        return error.errno in codes
    return any(f"os error {code}" in str(error) for code in codes) or "PytorchStreamWriter failed writing" in str(
        error
    )


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that a reader, or a run that comes after a kill, sees whole or not at all; see `whole_files`."""
    with whole_files(path) as (draft,):
        draft.write_bytes(content)


def digest(parts: Iterable[bytes]) -> str:
    """SHA-256 of the parts in a row, its first 16 hexadecimal digits."""
    sha = hashlib.sha256()
    for part in parts:
        sha.update(part)
    return sha.hexdigest()[:16]


def weights_digest(*modules: nn.Module) -> str:
    """`digest` of the names, types, shapes and numbers of all weights."""

    def parts() -> Iterator[bytes]:
        for module in modules:
            for name, tensor in sorted(module.state_dict().items()):
                yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
                yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return digest(parts())


def write_json(path: Path, content: Any) -> None:
    """`write_atomically` of indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def require_disk(folder: Path, needed_bytes: int) -> None:
    """Raises an `OSError` when the disk of a folder cannot hold so many more bytes."""
    free = shutil.disk_usage(folder).free
    if needed_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {needed_bytes / 1e9:.2f} GB more but its disk has {free / 1e9:.2f} GB free. "
            "Free some space, choose another folder, or take fewer images (--max-images) or draws (--draws)",
        )


def readable(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
