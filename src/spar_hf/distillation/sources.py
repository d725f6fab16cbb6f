"""Where training images come from: a folder, tars, a Hugging Face data set, the picture book. No labels are read.

A *source* has `names`, `description` (what the record of a run says about it), `size_hw(index)`,
`draw(index, height, width)` and `fingerprint(index)`. Photographs are resized to the size asked for; the picture book
is drawn at it.
"""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..files import write_atomically
from ..image_file_spar import TIFF_MAGIC, InvalidImageError, open_file
from ..image_io_spar import read_header, read_image
from ..image_values_spar import DEFAULTS, ReadOptions
from ..picture_book.dataset import EDITION, PictureBook

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


class Source(Protocol):
    """Anything that has images by number."""

    description: dict[str, Any]
    names: list[str]

    def size_hw(self, index: int) -> tuple[int, int]: ...

    def draw(self, index: int, height_px: int, width_px: int) -> np.ndarray: ...

    def fingerprint(self, index: int) -> int: ...


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
        return Path(example["path"]) if example["bytes"] is None else example["bytes"]


class PictureBookScenes:
    """Training scenes of the picture book, in random shapes up to 2:1, drawn (not resized) at the size asked for."""

    def __init__(self, num_scenes: int, seed: int):
        self.description = {"kind": "picture book", "split": "train", "seed": seed, "edition": EDITION}
        self.names = [f"picture book train {index}" for index in range(num_scenes)]
        self.seed = seed

    def size_hw(self, index: int) -> tuple[int, int]:
        """A shape; the size itself is arbitrary, as drawings have none. Half of the scenes are square."""
        square, ratio = np.random.default_rng([self.seed, index]).uniform(-1, 1, 2)
        ratio = 1.0 if square < 0 else 2.0**ratio
        return round(4096 * min(1, ratio)), round(4096 * min(1, 1 / ratio))

    def draw(self, index: int, height_px: int, width_px: int) -> np.ndarray:
        return PictureBook("train", height_px, width_px, self.seed).scene(index).image

    def fingerprint(self, index: int) -> int:
        """The edition of the book: a scene changes with it alone."""
        return EDITION


def encoded(example: dict[str, Any]) -> bytes:
    """Bytes of an undecoded `datasets.Image` example."""
    return example["bytes"] if example["bytes"] is not None else Path(example["path"]).read_bytes()


def image_folder(folder: str, max_images: int | None = None) -> Photographs:
    """All images in a folder and its sub-folders, in the order of their names."""
    root = Path(folder)
    paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in SUFFIXES)[:max_images]
    if not paths:
        raise ValueError(f"--images {folder}: no image there ({', '.join(SUFFIXES)}); give a folder of images.")
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
        except (tarfile.TarError, OSError) as error:
            raise ValueError(
                f"--tars: {path} cannot be read ({error}); give uncompressed tars or a folder."
            ) from error
    if not names:
        raise ValueError(f"--tars {' '.join(patterns)}: no image in there ({', '.join(SUFFIXES)}).")
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
        data = data[split] if isinstance(data, datasets.DatasetDict) else data
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
