"""An image file, opened but not decoded: a regular file of a raster format, with limits that hold before any work."""

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any

from PIL import Image, UnidentifiedImageError

# Raster formats only: Pillow hands EPS to Ghostscript, which runs programs, and SVG is no raster.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
VECTOR_FORMATS = ("EPS", "EMF", "WMF")

# Of both byte orders, and BigTIFF (+), of which Pillow reads Intel's only.
TIFF_MAGIC = (b"II*\0", b"MM\0*", b"II+\0")

MAX_FILE_BYTES = 512 * 2**20
# Pillow parses headers in Python and reads some of them byte by byte. The longest of real files take some hundred
# reads, and no header is longer than its file but for tables that are read again.
HEADER_READS = 10_000
HEADER_BYTES_AGAIN = 16 * 2**20
BYTES_A_READ = 64  # at least, on average, of what is read to decode

_PILLOW_STATE = threading.Lock()


class InvalidImageError(ValueError):
    """An image cannot be read or is too large; the message names the image, the reason and what to do."""


class ImageReader(io.BufferedReader):
    """A file whose reads are counted, so that a header or a file of crumbs cannot keep Python busy for minutes."""

    def __init__(self, raw: Any, size_bytes: int, name: str) -> None:
        super().__init__(raw)
        self.size_bytes, self.image_name = size_bytes, name
        self._reads_left, self._bytes_left = HEADER_READS, size_bytes + HEADER_BYTES_AGAIN

    def header_is_read(self) -> None:
        """From now on the limits are those of decoding."""
        self._reads_left = HEADER_READS + self.size_bytes // BYTES_A_READ
        self._bytes_left = 16 * (self.size_bytes + HEADER_BYTES_AGAIN)

    def read(self, size: int | None = -1, /) -> bytes:
        content = super().read(size)
        self._reads_left -= 1
        self._bytes_left -= len(content)
        if self._reads_left < 0 or self._bytes_left < 0:
            raise InvalidImageError(
                f"{self.image_name} is mostly comments or other data about the picture, which take too long to read. "
                "Save it anew without them."
            )
        return content


def open_file(source: str | os.PathLike[str] | bytes | bytearray, name: str, max_file_bytes: int) -> ImageReader:
    """Opens a path or encoded bytes.

    Raises:
        InvalidImageError: There is no such file, it is too large, or no regular file: a pipe would be waited for.
    """
    if isinstance(source, (bytes, bytearray)):
        _check_bytes(len(source), name, max_file_bytes)
        return ImageReader(io.BytesIO(source), len(source), name)
    path = os.fspath(source)
    if path.startswith(("http://", "https://", "data:")):
        raise InvalidImageError(f"{name[:80]} is a URL; only files are read. Download it and pass the path.")
    try:
        status = os.stat(path)
        if stat.S_ISDIR(status.st_mode):
            raise InvalidImageError(f"{name} cannot be opened: it is a folder. Pass the files in it.")
        if not stat.S_ISREG(status.st_mode):
            raise InvalidImageError(f"{name} is a pipe, socket or device; only regular files are read.")
        _check_bytes(status.st_size, name, max_file_bytes)
        return ImageReader(io.FileIO(path), status.st_size, name)
    except FileNotFoundError as error:
        raise InvalidImageError(f"{name} does not exist. Check the path.") from error
    except (OSError, ValueError) as error:  # ValueError: a path with a null character
        if isinstance(error, InvalidImageError):
            raise
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidImageError(f"{name} cannot be opened ({reason}).") from error


def _check_bytes(size_bytes: int, name: str, max_file_bytes: int) -> None:
    if size_bytes > max_file_bytes:
        raise InvalidImageError(
            f"{name} has {size_bytes / 2**20:.0f} MB; at most {max_file_bytes / 2**20:.0f} MB are read. Shrink it."
        )


def open_header(file: ImageReader) -> Image.Image:
    """Pillow's image of a file whose header has been read, and no pixel.

    Raises:
        InvalidImageError: The format is not allowed, or the header is broken.
    """
    name = file.image_name
    if _is_heic(file):
        return _open_heic(file)
    Image.init()
    formats = [format for format in FORMATS if format in Image.OPEN]
    try:
        return pillow_open(file, formats)
    except InvalidImageError:
        raise
    except UnidentifiedImageError as error:
        file.seek(0)
        if file.read(4) in TIFF_MAGIC:
            raise InvalidImageError(
                f"{name} is a TIFF that is damaged or of a kind that is not read. Save it anew, uncompressed or with "
                "deflate or LZW, in 8 or 16-bit integers or floats."
            ) from error
        raise InvalidImageError(
            f"{name} is not an image that can be read; allowed formats are {', '.join(formats)}."
        ) from error
    except Exception as error:  # a damaged header makes Pillow's plugins raise almost anything
        raise InvalidImageError(f"{name} cannot be opened ({one_line(error)}). Save it anew.") from error


@contextmanager
def quiet_pillow() -> Iterator[None]:
    """Without Pillow's warnings of metadata that it cannot read. One thread at a time, as warnings are global."""
    with _PILLOW_STATE, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def pillow_open(file: IO[bytes], formats: list[str]) -> Image.Image:
    """`Image.open` without Pillow's limit of pixels and its warnings, which are both global; ours are checked next."""
    with quiet_pillow():
        pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            return Image.open(file, formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = pillow_limit


def _is_heic(file: ImageReader) -> bool:
    start = file.peek(16)[:16]
    return start[4:8] == b"ftyp" and start[8:12] in (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1")


def _open_heic(file: ImageReader) -> Image.Image:
    """A HEIC file, upright already, without adding a format to Pillow for everybody else in the process."""
    name = file.image_name
    try:
        from pillow_heif import HeifImageFile
    except ImportError:
        raise InvalidImageError(
            f"{name} is HEIC, which pillow-heif reads. Install it (pip install 'spar-hf[heif]'), or save the picture "
            "as JPEG."
        ) from None
    try:
        return HeifImageFile(file)
    except InvalidImageError:
        raise
    except Exception as error:
        raise InvalidImageError(f"{name} cannot be opened ({one_line(error)}). Save it anew.") from error


def one_line(error: BaseException) -> str:
    """What an exception says, on one line; its type where it says nothing."""
    return " ".join(str(error).split())[:200] or type(error).__name__
