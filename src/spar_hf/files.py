"""Files: drafts that become whole files or nothing, hashes, and a clear word when the disk is full."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

if TYPE_CHECKING:  # PyTorch is imported where there are tensors: what writes files alone starts without it
    import torch
    from torch import nn

DRAFT = re.compile(r"\..+\.(?:(?P<host>[^.]+)-)?(?P<process>\d+)\.tmp")
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
HOST = re.sub(r"[^A-Za-z0-9]+", "-", socket.gethostname())[:40] or "host"
CLEARING_PAUSE = (
    20  # times as long as the last clearing took: a folder of 100,000 files is not listed for each of them
)
_next_clearing: dict[Path, float] = {}
_growing: set[Path] = set()  # this process's drafts; another one with its number is of a process before it


def draft_of(path: Path) -> Path:
    """The hidden name beside a file, or folder, under which it grows; it says which machine and process writes it."""
    draft = path.with_name(f".{path.name}.{HOST}-{os.getpid()}.tmp")
    _growing.add(draft)
    return draft


def clear_drafts(folder: Path) -> list[Path]:
    """Removes the drafts in a folder whose process is gone: killed commands leave them. Returns what was removed.

    Drafts of other machines that share the folder stay.
    """
    removed = []
    for draft in folder.glob(".*.tmp") if folder.is_dir() else ():
        match = DRAFT.fullmatch(draft.name)
        if match is None or match["host"] not in (None, HOST) or _is_growing(draft, int(match["process"])):
            continue
        _remove(draft)
        removed.append(draft)
    return removed


def _is_growing(draft: Path, process: int) -> bool:
    return draft in _growing if process == os.getpid() else is_running(process)


def is_running(process: int) -> bool:
    """Whether there is a process of that number on this machine."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # there, and another user's
        return True
    return True


def _remove(path: Path) -> None:
    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)


@contextmanager
def full_disk_in_words(*paths: Path) -> Iterator[None]:
    """Turns what a full disk, or the limit of a file's size, raises inside into an `OSError` that names the files."""
    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:
        # safetensors has errors of its own, with the number in their text; torch's says no reason at all.
        text = re.search(r"os error (\d+)", str(error))
        number = error.errno if isinstance(error, OSError) else int(text[1]) if text else None
        if "PytorchStreamWriter failed writing" in str(error):
            number = errno.ENOSPC
        if number not in FULL:
            raise
        raise OSError(
            number,
            f"disk full while writing {', '.join(map(str, paths))}. What was written before is intact; free "
            "some space and run the same command again, with --resume where it has one",
        ) from error


@contextmanager
def _drafts(*paths: Path) -> Iterator[list[Path]]:
    """Names of drafts beside `paths`, which vanish when the block ends."""
    for folder in {path.parent for path in paths}:
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file; give a folder to write into")
        folder.mkdir(parents=True, exist_ok=True)
        if (started := time.monotonic()) >= _next_clearing.get(folder, 0):
            clear_drafts(folder)
            _next_clearing[folder] = (now := time.monotonic()) + CLEARING_PAUSE * (now - started)
    drafts = [draft_of(path) for path in paths]
    try:
        yield drafts
    finally:
        for draft in drafts:
            _remove(draft)
        _growing.difference_update(drafts)


def _flush(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


@contextmanager
def whole_files(*paths: Path) -> Iterator[list[Path]]:
    """Drafts beside `paths`: the files take their places when the block ends and vanish if it fails.

    Folders are made where they are missing, and cleared of what killed commands left.

    Raises:
        ValueError: a folder to write into is a file.
        OSError: the disk is full; the message says so, nothing is left behind and other files are as they were.
    """
    with full_disk_in_words(*paths), _drafts(*paths) as drafts:
        yield drafts
        for draft, path in zip(drafts, paths, strict=True):
            _flush(draft)
            os.replace(draft, path)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty draft folder that takes the place of `path`, and of what was there, when the block ends.

    Raises:
        ValueError, OSError: see `whole_files`.
    """
    with full_disk_in_words(path), _drafts(path, path.with_name(f"{path.name}.old")) as (draft, old):
        draft.mkdir()
        yield draft
        for file in draft.rglob("*"):
            if file.is_file():
                _flush(file)
        if path.exists():
            os.replace(path, old)
        os.replace(draft, path)


@contextmanager
def draft_folder(path: Path) -> Iterator[Path]:
    """A folder for work beside `path`, which vanishes when the block ends; the next run clears what a killed one left.

    Raises:
        ValueError, OSError: see `whole_files`.
    """
    with full_disk_in_words(path), _drafts(path) as (draft,):
        draft.mkdir()
        yield draft


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
    import torch

    def parts() -> Iterator[bytes]:
        for module in modules:
            for name, tensor in sorted(module.state_dict().items()):
                yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
                yield tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return digest(parts())


def check_finite(what: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raises a `ValueError` that names the first of some weights with a NaN or an infinity in it."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{what}: {name} holds NaN or infinity. Give whole weights.")


def tensors_digest(record: str, tensors: Mapping[str, torch.Tensor]) -> str:
    """`digest` of a record and of the names, types, shapes and numbers of tensors."""
    import torch

    def parts() -> Iterator[bytes]:
        yield record.encode()
        for name, tensor in sorted(tensors.items()):
            yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
            yield tensor.flatten().view(torch.uint8).numpy().tobytes()

    return digest(parts())


def write_state(
    path: Path, tensors: Mapping[str, torch.Tensor], record: Mapping[str, Any], failed: str = "training has failed"
) -> None:
    """Writes what a run goes on from: tensors and a JSON record in one safetensors file, whole, with a check sum.

    Args:
        path: the file.
        tensors: by name.
        record: beside them.
        failed: what it means when a tensor holds NaN or infinity, for the message.

    Raises:
        OSError: the disk is full; what was there is intact.
        ValueError: a tensor holds NaN or infinity; what was there is intact.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    check_finite(f"{failed}, {path.name} is not written", tensors)
    text = json.dumps(record)
    with whole_files(path) as (draft,):
        save_file(tensors, draft, metadata={"record": text, "digest": tensors_digest(text, tensors)})


def read_state(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Record and tensors of what `write_state` wrote.

    Raises:
        ValueError: the file is broken, another one, or holds NaN or infinity; the message names it.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path.name} is broken ({error})") from error
    if not {"record", "digest"} <= metadata.keys():
        raise ValueError(f"{path.name} is no state of a run")
    check_finite(path.name, tensors)
    if tensors_digest(metadata["record"], tensors) != metadata["digest"]:
        raise ValueError(f"{path.name} is broken (check sum)")
    return json.loads(metadata["record"]), tensors


def write_json(path: Path, content: Any) -> None:
    """`write_atomically` of indented JSON."""
    write_atomically(path, (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode())


def require_disk(
    folder: Path, needed_bytes: int, remedy: str = "or take fewer images (--max-images) or draws (--draws)"
) -> None:
    """Raises an `OSError` when the disk of a folder, which need not be there yet, can't hold so many more bytes."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if needed_bytes > free:
        raise OSError(
            errno.ENOSPC,
            f"{folder} needs {needed_bytes / 1e9:.2f} GB more but its disk has {free / 1e9:.2f} GB free. "
            f"Free some space, choose another folder, {remedy}",
        )


def readable(seconds: float) -> str:
    """42 s, 3 min 20 s, 2 h 05 min."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    if seconds < 3600:
        return f"{seconds // 60} min {seconds % 60} s"
    return f"{seconds // 3600} h {seconds % 3600 // 60:02d} min"
