"""Archives from their official addresses: downloaded with resumption and check sums, unpacked whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tarfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import IO, Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from tqdm.auto import tqdm

from ..files import full_disk_in_words, require_disk, whole_folder, write_json

BLOCK = 1 << 20
ATTEMPTS, WAIT_S = 5, 2.0  # without a byte of progress
PATIENCE_S = 60  # for an answer
RECORDS = "checksums.json"
GO_ON = "run the same command again, which goes on where this one stopped"
REMEDY = "or give another --root"


class Problem(OSError):
    """Something that is needed cannot be had; the message says how it can."""


@dataclass(frozen=True)
class Archive:
    """A file to download and what is taken out of it.

    Attributes:
        url: its official address; where one has to log in, the page that leads to it.
        name: of the file.
        gigabytes: about its size.
        members: folders inside it -> where their files go, below the data folder.
        checksum: `md5:...` or `sha1:...` as others have published it; "" where none is known.
        source: who published the check sum.
        login: what has to be done by hand before it can be downloaded; "" where nothing has.
    """

    url: str
    name: str
    gigabytes: float
    members: tuple[tuple[str, str], ...]
    checksum: str = ""
    source: str = ""
    login: str = ""


# ------------------------------------------------------------------------------------------------ download


def download(archive: Archive, folder: Path, progress: bool = True) -> Path:
    """The archive as a file in `folder`, downloaded if it is not there, its check sum compared.

    An interrupted download goes on where it stopped, if the server lets it and the file there is still the same. The
    first download of a file without a known check sum records its SHA-256 in `checksums.json`; later ones must agree.

    Raises:
        Problem: it can't be downloaded, a check sum differs, or one has to log in; the message says what to do.
        OSError: the disk is too small or full.
    """
    path = folder / archive.name
    if not path.is_file():
        if archive.login:
            raise Problem(
                f"{archive.name} cannot be downloaded without an account: {archive.login}, and put it into {folder} "
                f"as {archive.name}"
            )
        folder.mkdir(parents=True, exist_ok=True)
        require_disk(folder, _left(archive, folder), REMEDY)
        part = _fetch(archive, folder, progress)
        _check(archive, part, path)
        os.replace(part, path)
        _state(part).unlink(missing_ok=True)
    elif archive.name not in read_records(folder):
        _check(archive, path, path)
    return path


def _left(archive: Archive, folder: Path) -> int:
    part = _part(archive, folder)
    return max(int(archive.gigabytes * 1e9) - (part.stat().st_size if part.exists() else 0), 0)


def _part(archive: Archive, folder: Path) -> Path:
    return folder / f"{archive.name}.part"


def _state(part: Path) -> Path:
    """What says which version of the file a draft is of."""
    return part.with_name(f"{part.name}.json")


def _fetch(archive: Archive, folder: Path, progress: bool) -> Path:
    """The whole file under its draft name."""
    part, failures = _part(archive, folder), 0
    with tqdm(desc=archive.name, unit="B", unit_scale=True, disable=not progress) as bar:
        while True:
            had = part.stat().st_size if part.exists() else 0
            try:
                _continue(archive, part, bar)
                return part
            except HTTPError as error:
                if error.code < 500 and error.code not in (408, 429):
                    raise Problem(
                        f"{archive.url} answers {error.code} {error.reason}; see the page of the data set for where "
                        f"it is now, and put it into {folder} as {archive.name}"
                    ) from error
                reason = f"{error.code} {error.reason}"
            except (URLError, HTTPException, TimeoutError, ConnectionError, _Short) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            grown = part.exists() and part.stat().st_size > had
            failures = 1 if grown else failures + 1
            if failures >= ATTEMPTS:
                raise Problem(f"{archive.url} cannot be downloaded: {reason}; {GO_ON}")
            time.sleep(WAIT_S * failures)


class _Short(Exception):
    """The connection ended before the file did."""


def _continue(archive: Archive, part: Path, bar: Any) -> None:
    """One request for what is not there yet; returns when the file is whole."""
    state = _state(part)
    version = json.loads(state.read_text(encoding="utf-8")) if state.exists() and part.exists() else {}
    have = part.stat().st_size if version.get("tag") else 0  # without a tag nothing says that it is the same file
    headers = {"User-Agent": "spar-hf", "Accept-Encoding": "identity"}
    if have:
        headers |= {"Range": f"bytes={have}-", "If-Range": version["tag"]}
    try:
        answer = urlopen(Request(archive.url, headers=headers), timeout=PATIENCE_S)
    except HTTPError as error:
        if error.code == 416 and have == version.get("bytes"):
            return
        if error.code == 416:
            part.unlink()
            raise _Short("the file has changed on the server") from error
        raise
    with answer:
        if answer.status == 206:
            ranges = re.fullmatch(r"bytes (\d+)-\d+/(\d+)", answer.headers.get("Content-Range", ""))
            if ranges is None or int(ranges[1]) != have:
                part.unlink()
                raise _Short("the server sent another part than was asked for")
            total: int | None = int(ranges[2])
        else:
            have, length = 0, answer.headers.get("Content-Length")
            total = None if length is None else int(length)
            tag = answer.headers.get("ETag") or answer.headers.get("Last-Modified") or ""
            if tag.startswith("W/"):  # two files may share it
                tag = answer.headers.get("Last-Modified") or ""
            write_json(state, {"url": archive.url, "tag": tag, "bytes": total})
            if total is not None:
                require_disk(part.parent, total, REMEDY)
        bar.total, bar.n = total, have
        with full_disk_in_words(part), open(part, "ab" if have else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                bar.update(len(block))
    if total is not None and part.stat().st_size != total:
        raise _Short(f"the connection ended after {part.stat().st_size} of {total} bytes")


# ------------------------------------------------------------------------------------------------ check sums


def read_records(folder: Path) -> dict[str, dict[str, Any]]:
    """What is known of the files that were downloaded: name -> sha256, bytes, url, and what it was compared with."""
    path = folder / RECORDS
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def _check(archive: Archive, file: Path, path: Path) -> None:
    """Compares check sums, and records them.

    Raises:
        Problem: one differs; the file is moved aside.
    """
    kind, _, expected = archive.checksum.partition(":")
    found = checksums(file, ("sha256", kind) if kind else ("sha256",))
    records = read_records(path.parent)
    recorded = records.get(archive.name, {}).get("sha256")
    if not kind and recorded is not None:
        kind, expected = "sha256", recorded
    if kind and found[kind] != expected:
        aside = path.with_name(f"{path.name}.wrong")
        os.replace(file, aside)
        _state(file).unlink(missing_ok=True)
        whose = f"that {archive.source or 'its publisher'} gives" if archive.checksum else "of its first download here"
        raise Problem(
            f"{archive.name} has the {kind} {found[kind]} and not {expected}, {whose}; it was moved to {aside}. Run "
            "the same command again to download it anew; if it has changed at its source, say so to this project"
        )
    compared = f"{archive.checksum}, as published by {archive.source}" if archive.checksum else ""
    records[archive.name] = {
        "url": archive.url, "bytes": file.stat().st_size, "sha256": found["sha256"], "compared_with": compared
    }  # fmt: skip
    write_json(path.parent / RECORDS, records)


def checksums(path: Path, kinds: tuple[str, ...]) -> dict[str, str]:
    """Check sums of a file in hexadecimal digits, in one reading."""
    sums = {kind: hashlib.new(kind, usedforsecurity=False) for kind in kinds}
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            for running in sums.values():
                running.update(block)
    return {kind: running.hexdigest() for kind, running in sums.items()}


# ------------------------------------------------------------------------------------------------ unpack


def unpack(path: Path, members: tuple[tuple[str, str], ...], data: Path, progress: bool = True) -> None:
    """Takes folders out of an archive; each appears whole. Those that are there already stay as they are.

    Links and names that lead out of a folder are never followed.

    Args:
        path: a .zip or .tar, however compressed.
        members: folder inside -> folder below `data`.

    Raises:
        Problem: the archive is damaged, or lacks a folder.
        OSError: the disk is too small or full.
    """
    for inside, target in members:
        if (data / target).exists():
            continue
        prefix = inside.rstrip("/") + "/"
        try:
            with _opened(path) as (sizes, read):
                wanted = {name: size for name, size in sizes.items() if name.startswith(prefix)}
                if not wanted:
                    raise Problem(f"{path} holds no {inside}; it is another archive than was expected. Get it again")
                require_disk(data, sum(wanted.values()), REMEDY)
                with whole_folder(data / target) as draft:
                    for name in tqdm(wanted, desc=f"{path.name}: {inside}", disable=not progress):
                        place = draft / PurePosixPath(name).relative_to(prefix)
                        place.parent.mkdir(parents=True, exist_ok=True)
                        with read(name) as source, open(place, "wb") as file:
                            while block := source.read(BLOCK):
                                file.write(block)
        except (tarfile.TarError, zipfile.BadZipFile, EOFError) as error:
            raise Problem(f"{path} is damaged ({error}); delete it and {GO_ON}") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[dict[str, int], Callable[[str], IO[bytes]]]]:
    """The sizes of the ordinary files of an archive by name, and what opens one."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            sizes = {info.filename: info.file_size for info in archive.infolist() if not info.is_dir()}
            yield {name: size for name, size in sizes.items() if _stays(name)}, archive.open
        return
    with tarfile.open(path) as tar:
        found = {member.name: member for member in tar.getmembers() if member.isfile()}

        def read(name: str) -> IO[bytes]:
            opened = tar.extractfile(found[name])
            assert opened is not None  # an ordinary file
            return opened

        yield {name: member.size for name, member in found.items() if _stays(name)}, read


def _stays(name: str) -> bool:
    """Whether a name stays below the folder that it is unpacked into."""
    parts = PurePosixPath(name)
    return not parts.is_absolute() and ".." not in parts.parts and "\\" not in name
