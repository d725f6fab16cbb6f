"""Where photographs come from, for training and use: files, folders, patterns, lists, tars, Hugging Face data sets.

Imports no PyTorch.
"""

from __future__ import annotations

import glob
import io
import os
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from PIL import Image

from .files import write_atomically
from .image_file_spar import TIFF_MAGIC, InvalidImageError, open_file
from .image_io_spar import read_header, read_image
from .image_values_spar import DEFAULTS, ReadOptions

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
HEADER_BYTES = 65536  # enough for the header of nearly every file; the rest is read only where it is not
STREAM_TAR_IMAGES = 256


class BadImage(Exception):
    """An image that cannot be read. `str()` names it and says why."""

    def __init__(self, name: str, reason: str):
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


class Photographs:
    """Encoded images, each a piece of a file: a whole file, or a member of a tar.

    Args:
        description: for the record.
        names: one per image.
        places: (file, offset in bytes, size in bytes; -1 is the whole file) of each.
        reading: what is read of a picture, and what is refused.
    """

    def __init__(
        self,
        description: dict[str, Any],
        names: list[str],
        places: list[tuple[Path, int, int]],
        reading: ReadOptions = DEFAULTS,
    ):
        self.description, self.names, self.places, self.reading = description, names, places, reading

    def encoded(self, index: int, limit: int = -1) -> Path | bytes:
        """The encoded image: its file where it has one to itself, else its bytes, or the first `limit` of them."""
        path, offset, size = self.places[index]
        if size < 0:
            return path
        if size > self.reading.max_file_bytes:
            raise InvalidImageError(f"the image has {size / 2**20:.0f} MB, more than are read. Shrink it.")
        with open(path, "rb") as file:
            file.seek(offset)
            return file.read(size if limit < 0 else min(limit, size))

    def size_hw(self, index: int) -> tuple[int, int]:
        """Height and width of the upright image; reads the header only. Raises `BadImage`."""
        with self._named(index):
            start = self.encoded(index, HEADER_BYTES)
            if isinstance(start, bytes) and start.startswith(TIFF_MAGIC):  # a directory may stand at the end
                start = self.encoded(index)
            try:
                return read_header(start, self.reading, "the image").size_hw
            except InvalidImageError:  # perhaps a long header: the whole file decides
                if isinstance(start, Path) or len(start) < HEADER_BYTES:
                    raise
                return read_header(self.encoded(index), self.reading, "the image").size_hw

    def draw(self, index: int, height_px: int, width_px: int) -> np.ndarray:
        """The image at that size, bicubic with antialias as `SparImageProcessor`: (height, width, 3) uint8."""
        with self._named(index):
            image = read_image(self.encoded(index), self.reading, "the image")
            return np.asarray(image.resize((width_px, height_px), Image.Resampling.BICUBIC))

    def picture(self, index: int) -> Image.Image:
        """The picture at its own size: upright, RGB.

        Raises:
            InvalidImageError: it cannot be read; the message names it.
        """
        name = f"image '{self.names[index]}'"
        try:
            encoded = self.encoded(index)
        except OSError as error:
            raise InvalidImageError(f"{name} cannot be opened ({error.strerror or error}).") from error
        return read_image(encoded, self.reading, name)

    def fingerprint(self, index: int) -> int:
        """CRC-32 of the encoded image, by which a later run knows that it has not changed. Raises `BadImage`."""
        with self._named(index):
            source, limit = self.encoded(index), self.reading.max_file_bytes
            with open_file(source, "the image", limit) as file:
                return zlib.crc32(file.read())

    def read_with(self, **options: Any) -> None:
        """Sets options of reading, fields of `ReadOptions`; they enter the record of the run."""
        self.reading = replace(self.reading, **options)
        self.description |= {name: list(v) if isinstance(v, tuple) else v for name, v in options.items()}

    @contextmanager
    def _named(self, index: int) -> Iterator[None]:
        try:
            yield
        except (InvalidImageError, OSError) as error:
            raise BadImage(self.names[index], str(error)) from error


class DatasetPhotographs(Photographs):
    """The image column of a Hugging Face data set, undecoded."""

    def __init__(self, description: dict[str, Any], names: list[str], column: Any):
        super().__init__(description, names, [])
        self.column = column

    def encoded(self, index: int, limit: int = -1) -> Path | bytes:
        example = self.column[index]
        if example is None:
            raise InvalidImageError(f"row {index} of the data set holds no picture.")
        return Path(example["path"]) if example["bytes"] is None else example["bytes"]


def encoded(example: dict[str, Any]) -> bytes:
    """Bytes of an undecoded `datasets.Image` example."""
    return example["bytes"] if example["bytes"] is not None else Path(example["path"]).read_bytes()


def images_in(folder: Path) -> list[Path]:
    """The files in a folder and its sub-folders that are called like images, in the order of their names."""
    return sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)


def image_folder(folder: str, max_images: int | None = None) -> Photographs:
    """All images in a folder and its sub-folders, in the order of their names."""
    root = Path(folder)
    paths = images_in(root)[:max_images]
    if not paths:
        raise ValueError(f"{folder}: no image there ({', '.join(SUFFIXES)}); give a folder of images.")
    names = [path.relative_to(root).as_posix() for path in paths]
    return Photographs({"kind": "folder", "name": root.name}, names, [(path, 0, -1) for path in paths])


def tar_files(patterns: list[str], max_images: int | None = None) -> Photographs:
    """Images in uncompressed tars: WebDataset and SA-1B layouts (x.jpg beside x.json, which is not read).

    Args:
        patterns: tars, or folders of tars.
        max_images: take the first so many.
    """
    paths = [p for pattern in patterns for p in (sorted(Path(pattern).glob("*.tar")) or [Path(pattern)])]
    names: list[str] = []
    places: list[tuple[Path, int, int]] = []
    for path in paths:
        if max_images is not None and len(names) >= max_images:
            break
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if member.isfile() and member.name.lower().endswith(SUFFIXES):
                        names.append(f"{path.name}/{member.name}")
                        places.append((path, member.offset_data, member.size))
                end = tar.offset
            with open(path, "rb") as file:  # tarfile takes a cut between two members for the end
                file.seek(end)
                if len(file.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
                    raise tarfile.ReadError("unexpected end of data")
        except (tarfile.TarError, OSError) as error:
            raise ValueError(f"{path} cannot be read as a tar ({error}); give whole, uncompressed tars.") from error
    if not names:
        raise ValueError(f"{' '.join(patterns)}: no image in there ({', '.join(SUFFIXES)}); give tars of pictures.")
    return Photographs({"kind": "tars", "name": paths[0].name}, names[:max_images], places[:max_images])


def hub_dataset(
    name: str, split: str, column: str | None, max_images: int | None, stream_folder: str | None
) -> Photographs:
    """The images of a Hugging Face data set: a Hub id, or a folder that `datasets` reads.

    Args:
        name: Hub id, folder of `save_to_disk`, or folder that `load_dataset` reads.
        split: split.
        column: image column; the first one when None.
        max_images: take the first so many.
        stream_folder: do not download the data set: stream the first `max_images` images into this folder once,
            undecoded, as tars, and read them from there in every epoch.
    """
    import datasets

    if (Path(name) / "state.json").is_file() or (Path(name) / "dataset_dict.json").is_file():
        data = datasets.load_from_disk(name)
        if isinstance(data, datasets.DatasetDict):
            if split not in data:
                raise ValueError(f"--dataset {name} has no split {split!r}; its splits: {', '.join(data)}.")
            data = data[split]
        if stream_folder:
            data = data.to_iterable_dataset()
    else:
        data = datasets.load_dataset(name, split=split, streaming=stream_folder is not None)
    columns = [key for key, kind in (data.features or {}).items() if isinstance(kind, datasets.Image)]
    column = column or (columns[0] if columns else None)
    if column not in columns:
        raise ValueError(f"--dataset {name}: {column!r} is no image column; image columns: {columns or 'none'}.")
    data = data.cast_column(column, datasets.Image(decode=False))
    if stream_folder is not None:
        if max_images is None:
            raise ValueError("--stream-to needs --max-images: how many images of the stream to take.")
        fetch(data, column, max_images, Path(stream_folder))
        photographs = tar_files([stream_folder], max_images)
        photographs.description = {"kind": "dataset", "name": name, "split": split}
        return photographs
    if max_images is not None:
        data = data.select(range(min(max_images, len(data))))
    names = [f"{name} {split} {index}" for index in range(len(data))]
    return DatasetPhotographs({"kind": "dataset", "name": name, "split": split}, names, data[column])


def fetch(stream: Any, column: Any, max_images: int, folder: Path) -> None:
    """Copies the first images of a stream into tars, each written whole; goes on where an earlier call stopped."""
    folder.mkdir(parents=True, exist_ok=True)
    have = len(tar_files([str(folder)]).names) if any(folder.glob("*.tar")) else 0
    pending: list[bytes] = []

    def flush(first: int) -> None:
        buffer = io.BytesIO()
        with tarfile.open(fileobj=buffer, mode="w") as tar:
            for number, content in enumerate(pending, start=first):
                # The suffix marks it as an image; Pillow looks at the bytes, not at the name.
                member = tarfile.TarInfo(f"{number:09d}.jpg")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
        write_atomically(folder / f"{first:09d}.tar", buffer.getvalue())
        pending.clear()

    if have >= max_images:
        return
    number = have
    for number, example in enumerate(stream.skip(have).take(max_images - have), start=have + 1):
        pending.append(encoded(example[column]))
        if len(pending) == STREAM_TAR_IMAGES:
            flush(number - len(pending))
    if pending:
        flush(number - len(pending))


def pictures(words: Sequence[Path], leave_out: Path | None = None) -> tuple[Photographs, list[str]]:
    """The pictures that words of a command line name, in their order.

    Args:
        words: each a picture file; a folder, with its sub-folders; a pattern with `*`, `?`, `[` or `**`; a tar of
            pictures, WebDataset's; or `@FILE`, a list of picture files, one a line.
        leave_out: a folder that is not looked into, such as the one that results go to.

    Returns:
        The pictures; and for each a relative path, by which its results may be called: the one within the folder, the
        fixed part of the pattern, the folder that all files of a list are in, or the tar.

    Raises:
        ValueError: a word names nothing, or no file that can be read to its end.
    """
    names: list[str] = []
    places: list[tuple[Path, int, int]] = []
    called: list[str] = []
    for word in words:
        for found, place, within in _named_by(word):
            if leave_out is None or not place[0].absolute().is_relative_to(leave_out.absolute()):
                names.append(found)
                places.append(place)
                called.append(within)
    if not names:
        raise ValueError(f"every picture there is in {leave_out}, where results go; give another --output.")
    return Photographs({"kind": "files"}, names, places), called


def _named_by(word: Path) -> Iterator[tuple[str, tuple[Path, int, int], str]]:
    """Name, place and relative path of each picture that a word names."""
    if str(word).startswith("@") and not word.exists():
        yield from _listed(Path(str(word)[1:]))
    elif word.is_dir():
        tars = sorted(word.rglob("*.tar"))
        yield from _in_tars(tars)
        for path in images_in(word) if tars else [path for path, _, _ in image_folder(str(word)).places]:
            yield str(path), (path, 0, -1), path.relative_to(word).as_posix()
    elif not word.exists() and glob.has_magic(str(word)):
        paths = [Path(path) for path in sorted(glob.glob(str(word), recursive=True))]
        paths = [path for path in paths if path.is_file()]
        if not paths:
            raise ValueError(f"no file is called like {word}; give another pattern, or a folder")
        fixed = next(part for part in (word, *word.parents) if not glob.has_magic(str(part)))
        for path in paths:
            if path.suffix.lower() == ".tar":
                yield from _in_tars([path])
            else:
                yield str(path), (path, 0, -1), path.relative_to(fixed).as_posix()
    else:
        if not word.exists():
            raise ValueError(f"there is no file {word}")
        if not word.is_file():
            raise ValueError(f"{word} is a pipe, socket or device; name files")
        if word.suffix.lower() == ".tar":
            yield from _in_tars([word])
        else:
            yield str(word), (word, 0, -1), word.name


def _in_tars(tars: list[Path]) -> Iterator[tuple[str, tuple[Path, int, int], str]]:
    for tar in tars:
        source = tar_files([str(tar)])
        for name, place in zip(source.names, source.places, strict=True):
            member = name.partition("/")[2]
            yield f"{tar}/{member}", place, f"{tar.stem}/{member}"


def _listed(file: Path) -> Iterator[tuple[str, tuple[Path, int, int], str]]:
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ValueError(f"{file} is no text; give a list of picture files, one a line") from None
    paths = [Path(line.strip()) for line in lines if line.strip()]
    if not paths:
        raise ValueError(f"{file} is empty; give a list of picture files, one a line")
    common = Path(os.path.commonpath([path.absolute().parent for path in paths]))
    for path in paths:
        yield str(path), (path, 0, -1), PurePath(path.absolute()).relative_to(common).as_posix()
