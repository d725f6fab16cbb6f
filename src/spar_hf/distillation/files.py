"""Writes that are either whole or absent, and a clear word when the disk is full."""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any


def write_atomically(path: Path, content: bytes) -> None:
    """Writes a file that a reader, or a run that comes after a kill, sees whole or not at all.

    Raises:
        OSError: the disk is full; nothing is left behind and other files are as they were.
    """
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(draft, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    except OSError as error:
        draft.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(
                error.errno,
                f"disk full while writing {path} ({len(content) / 1e6:.1f} MB). What was written before is intact; "
                "free some space and run the same command again with --resume where it has one",
            ) from error
        raise


def write_json(path: Path, content: Any) -> None:
    """`write_atomically` of indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2) + "\n").encode())


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
