"""One reader of pictures, for inference, training and evaluation: any source to upright 8-bit RGB."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from PIL import Image, ImageFile

from .image_file_spar import (
    VECTOR_FORMATS,
    ImageReader,
    InvalidImageError,
    one_line,
    open_file,
    open_header,
    quiet_pillow,
)
from .image_values_spar import (
    DEFAULTS,
    ReadOptions,
    chosen_bands,
    compose_over_white,
    say_that_alpha_is_ignored,
    values_to_rgb,
)
from .tiff_bands_spar import ORIENTATION, TiffBands, find_bands, read_bands

MAX_DECODED_BYTES_A_PIXEL = 4  # times the limit of pixels: the bands of a TIFF, which are decoded together
JPEG2000_BYTES = 4  # that OpenJPEG takes where others take one
MAX_PYTHON_PIXELS = 4_000_000  # of what Pillow decodes in Python, some seconds: PNM with odd maxima, BMP in RLE

# What undoes each EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def read_image(
    source: Any, options: ReadOptions = DEFAULTS, name: str = "", input_data_format: str | None = None
) -> Image.Image:
    """A picture from any source as 8-bit RGB, upright and at its own size.

    EXIF and XMP orientation are applied; alpha is composed over white; 16-bit values are divided by 257; floats are
    read as 0 to 1, or as 0 to 255 where one exceeds 1; of an animation the first frame counts. JPEG's draft mode,
    which decodes at a fraction of the size, is not used: it changes the pixels.

    Args:
        source: A path, encoded bytes, a `PIL.Image`, a NumPy array or tensor (H, W), (H, W, C) or (C, H, W) with 1 to
            4 channels, or any number of them where `options.bands` chooses.
        options: What is read, and what is refused.
        name: What messages call the picture.
        input_data_format: `"channels_first"` or `"channels_last"`, where an array's shape does not tell.

    Raises:
        InvalidImageError: It cannot be read, is over a limit or holds values outside the range of a picture.
    """
    name = name or name_of(source)
    if isinstance(source, np.ndarray) or _is_tensor(source):
        return _array_to_rgb(source, options, name, input_data_format)
    with _opened(source, options, name) as stored:
        return _guarded(stored.to_rgb, name)


@dataclass(frozen=True)
class Header:
    """What a file says of its picture.

    Attributes:
        stored_hw: Height and width of the pixels as stored.
        orientation: How they lie, EXIF's 1 to 8; 1 is upright.
    """

    stored_hw: tuple[int, int]
    orientation: int

    @property
    def size_hw(self) -> tuple[int, int]:
        """Height and width of the upright picture."""
        return self.stored_hw[::-1] if self.orientation >= 5 else self.stored_hw


def read_header(source: Any, options: ReadOptions = DEFAULTS, name: str = "") -> Header:
    """The header of a path, encoded bytes or a `PIL.Image`; decodes nothing.

    Raises:
        InvalidImageError: The header cannot be read, or the picture is over a limit.
    """
    with _opened(source, options, name or name_of(source)) as stored:
        return stored.header


@dataclass(frozen=True)
class StoredPixels:
    """Pixels as their file stores them.

    Attributes:
        values: (H, W) or (H, W, C). A palette picture gives its indices, not its colours.
        orientation: How they lie, EXIF's 1 to 8; 1 is upright.
    """

    values: np.ndarray
    orientation: int


def read_stored(source: Any, options: ReadOptions = DEFAULTS, name: str = "") -> StoredPixels:
    """The pixels of a label map: neither converted nor turned.

    Raises:
        InvalidImageError: It cannot be read, or is over a limit.
    """
    name = name or name_of(source)
    with _opened(source, options, name) as stored:
        return _guarded(stored.pixels, name)


def turn(values: np.ndarray, orientation: int) -> np.ndarray:
    """An array (H, W) or (H, W, C) that is stored in an EXIF orientation, upright."""
    if orientation >= 5:
        values = values.swapaxes(0, 1)
    # Rows and columns that run backwards, once rows are rows.
    flip_y, flip_x = orientation in (3, 4, 7, 8), orientation in (2, 3, 6, 7)
    return values[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def name_of(source: Any, otherwise: str = "the image") -> str:
    """What messages call a source."""
    if isinstance(source, (str, os.PathLike)):
        return f"image '{os.fspath(source)}'"
    return f"image '{source.filename}'" if getattr(source, "filename", "") else otherwise


@dataclass(frozen=True)
class _Stored:
    """A picture that is opened and within the limits, and not decoded yet.

    Attributes:
        header: What is known of it.
        to_rgb: Decodes it as 8-bit RGB, upright.
        pixels: Decodes it as it is.
    """

    header: Header
    to_rgb: Callable[[], Image.Image]
    pixels: Callable[[], StoredPixels]


def _upright(image: Image.Image, orientation: int) -> Image.Image:
    return image.transpose(TURNS[orientation]) if orientation in TURNS else image


def _guarded(decode: Callable[[], Any], name: str) -> Any:
    """The result of decoding; damaged files make Pillow's decoders raise almost anything."""
    try:
        return decode()
    except InvalidImageError:
        raise
    except Exception as error:
        raise InvalidImageError(
            f"{name} is damaged and cannot be decoded ({one_line(error)}). Save it anew."
        ) from error


@contextmanager
def _opened(source: Any, options: ReadOptions, name: str) -> Iterator[_Stored]:
    """Opens a path, encoded bytes or a `PIL.Image`, and checks it."""
    if isinstance(source, Image.Image):
        if source.format in VECTOR_FORMATS and getattr(source, "tile", None):
            raise InvalidImageError(f"{name} is {source.format}, no raster of pixels. Save it as PNG.")
        yield _stored_by_pillow(source, None, options, name)
        return
    if not isinstance(source, (str, os.PathLike, bytes, bytearray)):
        raise InvalidImageError(
            f"{name} is a {type(source).__name__}; allowed are a path, bytes, PIL.Image, NumPy array or tensor."
        )
    with open_file(source, name, options.max_file_bytes) as file:
        bands = find_bands(file)
        if bands is not None:
            file.header_is_read()
            yield _stored_bands(file, bands, options, name)
            return
        with open_header(file) as image:
            file.header_is_read()
            yield _stored_by_pillow(image, file, options, name)


def _check_size(height: int, width: int, options: ReadOptions, name: str) -> None:
    if height * width == 0:
        raise InvalidImageError(f"{name} is empty ({height}x{width} pixels, height x width).")
    if height * width > options.max_pixels:
        raise InvalidImageError(
            f"{name} has {height}x{width} pixels ({height * width / 1e6:.4g} million); at most "
            f"{options.max_pixels / 1e6:.4g} million are read. Shrink it, or raise max_image_pixels."
        )
    if max(height, width) > options.max_ratio * min(height, width):
        raise InvalidImageError(
            f"{name} has {height}x{width} pixels; one side may be {options.max_ratio:,} times the other at most. "
            "Cut it into pieces."
        )


# Files and pictures that Pillow reads


def _stored_by_pillow(image: Image.Image, file: ImageReader | None, options: ReadOptions, name: str) -> _Stored:
    limit = options.max_pixels // JPEG2000_BYTES if image.format == "JPEG2000" else options.max_pixels
    _check_size(image.height, image.width, replace(options, max_pixels=limit), name)
    tiles = getattr(image, "tile", None) or []
    if image.width * image.height > MAX_PYTHON_PIXELS and any(tile[0] in Image.DECODERS for tile in tiles):
        raise InvalidImageError(
            f"{name} has {image.height}x{image.width} pixels in a kind of {image.format} that is slow to decode; at "
            f"most {MAX_PYTHON_PIXELS / 1e6:.4g} million are read. Save it as PNG."
        )

    header = Header((image.height, image.width), _orientation(image))
    turned = image.format == "TIFF"  # in decoding, by Pillow, which gives the upright size from the start
    if turned and header.orientation >= 5:
        header = Header(header.size_hw, header.orientation)

    def to_rgb() -> Image.Image:
        low_bytes = _low_bytes(image, file)
        image.load()
        rgb = _upright(_pil_to_rgb(image, low_bytes, options, name), 1 if turned else header.orientation)
        rgb = rgb.copy() if rgb is image else rgb
        rgb.info.clear()  # its orientation, say, which would be applied again by whoever reads the picture next
        return rgb

    def pixels() -> StoredPixels:
        image.load()
        return StoredPixels(np.asarray(image), 1 if turned else header.orientation)

    return _Stored(header, to_rgb, pixels)


def _orientation(image: Image.Image) -> int:
    """That of EXIF or XMP before the pixels, as browsers see it; broken metadata turns nothing."""
    try:
        if image.format == "TIFF":
            orientation = image.tag_v2.get(ORIENTATION, 1)  # type: ignore[attr-defined]
        else:
            with quiet_pillow():
                # The base class's: PNG's own decodes the picture, to find what stands behind the pixels.
                orientation = Image.Image.getexif(image).get(ORIENTATION, 1)
    except Exception:  # broken metadata raises almost anything
        return 1
    return orientation if orientation in TURNS else 1


def _low_bytes(image: Image.Image, file: ImageReader | None) -> Image.Image | None:
    """The low bytes of a 16-bit colour PNG, of which Pillow keeps the high ones, by reading it in the other order."""
    tiles = getattr(image, "tile", None)
    if file is None or image.format != "PNG" or not tiles or tiles[0][3] not in ("RGB;16B", "RGBA;16B"):
        return None
    file.seek(0)
    other = open_header(file)
    assert isinstance(other, ImageFile.ImageFile)
    other.tile = [tile._replace(args=tile.args.replace("16B", "16L")) for tile in other.tile]  # type: ignore[union-attr]
    other.load()
    file.seek(0)
    return other


def _pil_to_rgb(image: Image.Image, low_bytes: Image.Image | None, options: ReadOptions, name: str) -> Image.Image:
    if image.mode == "RGB" and image.format is None and "transparency" not in image.info:
        return image  # made, not opened: nothing is left to choose, and options applied twice would be wrong
    has_alpha = image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info
    composes = has_alpha and options.alpha == ("compose" if image.format == "TIFF" else options.alpha) != "ignore"
    composes = composes and (options.bands is None or options.alpha == "compose")
    deep = image.mode.startswith("I") or image.mode == "F" or low_bytes is not None
    if deep or options.bands is not None or options.value_range is not None:
        return _pil_values_to_rgb(image, low_bytes, composes, options, name)
    if has_alpha and not composes and image.format == "TIFF" and options.alpha == "auto":
        say_that_alpha_is_ignored("A" in image.getbands() and image.getchannel("A").getextrema() == (255, 255), name)
    if composes:
        return compose_over_white(image)
    return image if image.mode == "RGB" else image.convert("RGB")


def _pil_values_to_rgb(
    image: Image.Image, low_bytes: Image.Image | None, composes: bool, options: ReadOptions, name: str
) -> Image.Image:
    """Where values are chosen or scaled: bands, a range, more than 8 bits."""
    if image.mode not in ("L", "LA", "RGB", "RGBA", "F") and not image.mode.startswith("I"):
        image = image.convert("RGBA" if composes or "transparency" in image.info else "RGB")
    count = len(image.getbands())
    marked = count - 1 if image.mode in ("LA", "RGBA") else None
    chosen = chosen_bands(count, marked, options, name)
    wanted = [*chosen, *([marked] if composes and marked is not None else [])]
    # Pillow's 32-bit "I" holds 16-bit files; reading it as 16 bits gives both of Pillow's modes one meaning.
    low, high = np.ravel(image.getextrema())[:2] if image.mode == "I" else (-1, 0)
    narrow = low >= 0 and high <= 65535

    def block(top: int, bottom: int) -> np.ndarray:
        box = (0, top, image.width, bottom)
        values = np.asarray(image.crop(box)).reshape(bottom - top, image.width, count)
        if low_bytes is not None:
            values = values.astype(np.uint16) << 8 | np.asarray(low_bytes.crop(box)).reshape(values.shape)
        return (values.astype(np.uint16) if narrow else values)[..., wanted]

    return values_to_rgb(block, image.size, chosen, len(wanted) > len(chosen), options, name)


# TIFFs of several bands


def _stored_bands(file: ImageReader, bands: TiffBands, options: ReadOptions, name: str) -> _Stored:
    _check_size(bands.height, bands.width, options, name)
    limit = MAX_DECODED_BYTES_A_PIXEL * options.max_pixels
    if bands.decoded_bytes > limit:
        bits = 8 * np.dtype(bands.dtype).itemsize
        raise InvalidImageError(
            f"{name} has {bands.height}x{bands.width} pixels in {bands.count} bands of {bits} bits, "
            f"{bands.decoded_bytes / 1e6:.0f} MB; at most {limit / 1e6:.0f} MB are decoded. "
            "Shrink it, save fewer bands, or raise max_image_pixels."
        )

    def to_rgb() -> Image.Image:
        chosen = chosen_bands(bands.count, bands.alpha, options, name)
        composes = options.alpha == "compose" and bands.alpha is not None
        marked = bands.alpha if composes or (options.alpha == "auto" and options.bands is None) else None
        wanted = (*chosen, *([marked] if marked is not None else []))
        values = read_bands(file, bands, wanted)
        if marked is not None and not composes:
            opaque = np.iinfo(values.dtype).max if values.dtype.kind in "iu" else 1
            say_that_alpha_is_ignored(bool((values[..., -1] == opaque).all()), name)
            values = values[..., :-1]
        size = (bands.width, bands.height)
        rgb = values_to_rgb(lambda top, bottom: values[top:bottom], size, chosen, composes, options, name)
        return _upright(rgb, bands.orientation)

    def pixels() -> StoredPixels:
        values = read_bands(file, bands, tuple(range(bands.count)))
        return StoredPixels(values[..., 0] if bands.count == 1 else values, bands.orientation)

    return _Stored(Header((bands.height, bands.width), bands.orientation), to_rgb, pixels)


# Arrays


def _is_tensor(source: Any) -> bool:
    """Whether it is PyTorch's, which nobody who has one has yet to import: reading files takes no PyTorch."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(source, torch.Tensor)


def _array_to_rgb(array: Any, options: ReadOptions, name: str, input_data_format: str | None) -> Image.Image:
    height, width, channels_first = _layout(array, options, name, input_data_format)
    _check_size(height, width, options, name)
    if _is_tensor(array):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
    if channels_first:
        array = array.transpose(1, 2, 0)
    values = array.reshape(height, width, -1)
    count = values.shape[2]
    if values.dtype == bool:
        values = values.astype(np.uint8) * 255
    marked = count - 1 if count in (2, 4) else None
    chosen = chosen_bands(count, marked, options, name)
    composes = (
        marked is not None and options.alpha != "ignore" and (options.bands is None or options.alpha == "compose")
    )
    wanted = [*chosen, *([marked] if composes and marked is not None else [])]
    size = (width, height)
    return values_to_rgb(lambda top, bottom: values[top:bottom][..., wanted], size, chosen, composes, options, name)


def _layout(array: Any, options: ReadOptions, name: str, input_data_format: str | None) -> tuple[int, int, bool]:
    """Height, width, and whether the channels come first; where both could be, only a tensor's do."""
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f"input_data_format is {input_data_format!r}; allowed are 'channels_first' and 'channels_last'."
        )
    shape = tuple(array.shape)
    if len(shape) == 2:
        return shape[0], shape[1], False
    most = 4 if options.bands is None else 256
    first = len(shape) == 3 and 1 <= shape[0] <= most and input_data_format != "channels_last"
    last = len(shape) == 3 and 1 <= shape[-1] <= most and input_data_format != "channels_first"
    if not (first or last):
        raise InvalidImageError(
            f"{name} has shape {shape}; allowed are (H, W), (H, W, C) and (C, H, W) with 1 to 4 channels, or more of "
            "which bands chooses."
        )
    if first and (not last or _is_tensor(array)):
        return shape[1], shape[2], True
    return shape[0], shape[1], False
