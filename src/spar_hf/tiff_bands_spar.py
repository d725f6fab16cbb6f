"""TIFFs of any number of bands, 8 to 64 bits deep: all but 8-bit grey and RGB, for which Pillow was made.

Pillow knows every compression that libtiff knows, but only a few kinds of several bands, and keeps the high byte of
16-bit colours. A picture of C bands that are stored pixel by pixel has the same bytes as a grey one that is wider;
stored band after band, each is a picture of its own. So the file gets another directory at its end that says so, and
Pillow decodes it: no decoder of our own, no further dependency, and libtiff's limits hold.
"""

import io
import struct
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from PIL import TiffImagePlugin

from .image_file_spar import TIFF_MAGIC, ImageReader, InvalidImageError, pillow_open, quiet_pillow

WIDTH, HEIGHT, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
STRIP_OFFSETS, ORIENTATION, SAMPLES, ROWS_PER_STRIP, STRIP_BYTES, PLANAR = 273, 274, 277, 278, 279, 284
PREDICTOR, TILE_WIDTH, TILE_HEIGHT, TILE_OFFSETS, TILE_BYTES = 317, 322, 323, 324, 325
EXTRA_SAMPLES, SAMPLE_FORMAT = 338, 339
HORIZONTAL, FLOATING = 2, 3  # predictors
YCBCR = 6  # photometric interpretation
# None, LZW, deflate (two numbers), PackBits, LZMA, Zstandard: those that know nothing of bands.
LOSSLESS = (1, 5, 8, 32946, 32773, 34925, 50000)
WITH_PREDICTOR = (5, 8, 32946, 34925, 50000)
# (bits, sample format) to type.
DTYPES = {
    (8, 1): "u1",
    (16, 1): "u2",
    (32, 1): "u4",
    (8, 2): "i1",
    (16, 2): "i2",
    (32, 2): "i4",
    (32, 3): "f4",
    (64, 3): "f8",
}
MAX_PIECES = 100_000  # strips or tiles


@dataclass(frozen=True)
class TiffBands:
    """How the bands of a TIFF lie in its file. Sizes in pixels; the picture as stored, not turned yet.

    Attributes:
        order: "<" or ">", the byte order of the file.
        dtype: NumPy's type of a sample, without byte order.
        separate: Band after band instead of pixel by pixel.
        tiled: Pieces are tiles instead of strips.
        piece_hw: Height and width of a piece.
        offsets, sizes: In bytes, of each piece.
        alpha: The band that is marked as alpha, from 0, or None.
        orientation: As in EXIF, 1 to 8.
    """

    order: Literal["<", ">"]
    height: int
    width: int
    count: int
    dtype: str
    separate: bool
    compression: int
    predictor: int
    tiled: bool
    piece_hw: tuple[int, int]
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    alpha: int | None
    orientation: int

    @property
    def padded_hw(self) -> tuple[int, int]:
        """Height and width in whole tiles."""
        if not self.tiled:
            return self.height, self.width
        height, width = self.piece_hw
        return -(-self.height // height) * height, -(-self.width // width) * width

    @property
    def decoded_bytes(self) -> int:
        """What is decoded at once."""
        height, width = self.padded_hw
        return height * width * np.dtype(self.dtype).itemsize * (1 if self.separate else self.count)


def find_bands(file: ImageReader) -> TiffBands | None:
    """The layout of a TIFF that is read here; None for one that is left to Pillow, and for other formats.

    Raises:
        InvalidImageError: The directory is broken, or of a kind that is not read.
    """
    header = file.peek(16)[:16]
    if header[:4] not in TIFF_MAGIC:
        return None
    name = file.image_name
    try:
        with quiet_pillow():
            directory = TiffImagePlugin.ImageFileDirectory_v2(header[: 16 if header[2:3] == b"+" else 8])
            file.seek(directory.next)
            directory.load(file)
        bands = _parse(directory, "<" if header[:2] == b"II" else ">", name)
    except InvalidImageError:
        raise
    except Exception as error:  # broken directories make Pillow raise almost anything
        raise InvalidImageError(f"{name} is damaged: its TIFF directory cannot be read. Save it anew.") from error
    file.seek(0)
    return bands


def _parse(directory: Any, order: Literal["<", ">"], name: str) -> TiffBands | None:
    def values(tag: int, default: tuple[int, ...] = ()) -> tuple[int, ...]:
        value = directory.get(tag, default)
        return tuple(int(entry) for entry in (value if isinstance(value, tuple) else (value,)))

    def one(tag: int, default: int) -> int:
        return values(tag, (default,))[0]

    count, bits = one(SAMPLES, 1), values(BITS, (1,))
    tiled = TILE_OFFSETS in directory
    offsets = values(TILE_OFFSETS if tiled else STRIP_OFFSETS)
    if len(offsets) > MAX_PIECES:
        raise InvalidImageError(f"{name} is a TIFF in {len(offsets)} pieces; at most {MAX_PIECES} are read.")
    compression, photometric = one(COMPRESSION, 1), one(PHOTOMETRIC, 1)
    if photometric == YCBCR and compression == 1:  # Pillow takes four bytes a pixel
        raise InvalidImageError(
            f"{name} is a TIFF in YCbCr without compression, which is not read. Save it as RGB, or with LZW."
        )
    kind = (bits[0], one(SAMPLE_FORMAT, 1))
    predictor = one(PREDICTOR, 1) if compression in WITH_PREDICTOR else 1
    if photometric not in (1, 2) or (kind == (8, 1) and count == (1 if photometric == 1 else 3)):
        return None  # what Pillow was made for
    known = compression in LOSSLESS and kind in DTYPES and len(set(bits)) == 1 and one(FILL_ORDER, 1) == 1
    if not known or predictor not in (1, FLOATING if kind[1] == 3 else HORIZONTAL):
        if count <= 4:
            return None  # perhaps Pillow reads it
        raise InvalidImageError(
            f"{name} is a TIFF of {count} bands of {bits[0]} bits, compression {compression}, predictor {predictor}, "
            "which is not read. Save it uncompressed or with deflate or LZW, in 8 or 16-bit integers or floats."
        )
    height, width = one(HEIGHT, 0), one(WIDTH, 0)
    separate = one(PLANAR, 1) == 2
    piece_hw = (
        (one(TILE_HEIGHT, 0), one(TILE_WIDTH, 0)) if tiled else (min(one(ROWS_PER_STRIP, height), height), width)
    )
    sizes = values(TILE_BYTES if tiled else STRIP_BYTES)
    if min(height, width, count, *piece_hw) < 1:
        raise InvalidImageError(f"{name} is damaged: its TIFF directory gives an empty picture. Save it anew.")
    pieces = -(-height // piece_hw[0]) * -(-width // piece_hw[1]) * (count if separate else 1)
    if not len(offsets) == len(sizes) == pieces:
        raise InvalidImageError(f"{name} is damaged: its TIFF directory lists {len(offsets)} of {pieces} pieces.")
    extra = values(EXTRA_SAMPLES)
    alphas = [count - len(extra) + index for index, meaning in enumerate(extra) if meaning in (1, 2)]
    orientation = one(ORIENTATION, 1)
    return TiffBands(
        order,
        height,
        width,
        count,
        DTYPES[kind],
        separate,
        compression,
        predictor,
        tiled,
        piece_hw,
        offsets,
        sizes,
        alphas[0] if alphas and alphas[0] >= 0 else None,
        orientation if 1 <= orientation <= 8 else 1,
    )


def read_bands(file: ImageReader, bands: TiffBands, chosen: tuple[int, ...]) -> np.ndarray:
    """The chosen bands, counted from 0, as stored: (height, width, len(chosen)).

    Raises:
        Exception: Whatever Pillow raises on damaged data.
    """
    file.seek(0)
    content = file.read()
    if not bands.separate:
        everything = _decode(content, bands, bands.count, bands.offsets, bands.sizes)
        return everything[..., list(chosen)]
    pieces = len(bands.offsets) // bands.count
    planes = {
        band: _decode(content, bands, 1, bands.offsets[place], bands.sizes[place])
        for band in sorted(set(chosen))
        for place in [slice(band * pieces, (band + 1) * pieces)]
    }
    return np.concatenate([planes[band] for band in chosen], axis=2)


def _decode(
    content: bytes, bands: TiffBands, interleaved: int, offsets: tuple[int, ...], sizes: tuple[int, ...]
) -> np.ndarray:
    """Pieces that hold so many bands pixel by pixel: (height, width, interleaved)."""
    height, (piece_height, piece_width) = bands.height, bands.piece_hw
    _, width = bands.padded_hw
    # Bytes, not samples: Pillow mistakes the byte order of compressed 32-bit samples.
    pixel_bytes = np.dtype(bands.dtype).itemsize * interleaved
    tags: dict[int, tuple[int, ...]] = {
        WIDTH: (width * pixel_bytes,),
        HEIGHT: (height,),
        BITS: (8,),
        COMPRESSION: (bands.compression,),
        PHOTOMETRIC: (1,),
        SAMPLES: (1,),
        PLANAR: (1,),
    }
    if bands.tiled:
        tags |= {TILE_WIDTH: (piece_width * pixel_bytes,), TILE_HEIGHT: (piece_height,)}
        tags |= {TILE_OFFSETS: offsets, TILE_BYTES: sizes}
    else:
        tags |= {ROWS_PER_STRIP: (piece_height,), STRIP_OFFSETS: offsets, STRIP_BYTES: sizes}
    with pillow_open(io.BytesIO(_with_directory(content, bands.order, tags)), ["TIFF"]) as picture:
        picture.load()
        stored = np.asarray(picture).reshape(height, -1, piece_width * pixel_bytes)  # rows of each piece
    samples = _undo_predictor(stored, bands, interleaved).reshape(height, width, interleaved)
    return samples[:, : bands.width]


def _undo_predictor(stored: np.ndarray, bands: TiffBands, interleaved: int) -> np.ndarray:
    """Bytes (..., bytes of a piece's row) to samples (..., pixels of the row, bands): TIFF's differences added up."""
    dtype = np.dtype(bands.dtype)
    if bands.predictor == FLOATING:  # of bytes, of which all the highest come first, then all the next (Adobe, Note 3)
        differences = stored.reshape(*stored.shape[:-1], -1, interleaved)
        planes = np.cumsum(differences, axis=-2, dtype=np.uint8).reshape(*stored.shape[:-1], dtype.itemsize, -1)
        samples = np.ascontiguousarray(planes.swapaxes(-1, -2)).view(dtype.newbyteorder(">"))[..., 0]
    else:
        samples = stored.view(dtype.newbyteorder(bands.order))
    samples = samples.astype(dtype, copy=False).reshape(*stored.shape[:-1], -1, interleaved)
    return np.cumsum(samples, axis=-2, dtype=dtype) if bands.predictor == HORIZONTAL else samples


def _with_directory(content: bytes, order: str, tags: dict[int, tuple[int, ...]]) -> bytes:
    """The file with another first directory, which its header points to; all that it holds stays in its place."""
    arrays, entries = b"", b""
    start = len(content) + len(content) % 2
    for tag, values in sorted(tags.items()):
        packed = struct.pack(f"{order}{len(values)}I", *values)
        if len(values) > 1:
            place = start + len(arrays)
            arrays += packed
            packed = struct.pack(f"{order}I", place)
        entries += struct.pack(f"{order}HHI", tag, 4, len(values)) + packed  # 4: 32-bit whole numbers
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start + len(arrays))
    directory = struct.pack(f"{order}H", len(tags)) + entries + bytes(4)
    return b"".join((header, content[8:], bytes(len(content) % 2), arrays, directory))
