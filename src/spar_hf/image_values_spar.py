"""Values of any type, range and number of bands to 8-bit RGB."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image

from .image_file_spar import MAX_FILE_BYTES, InvalidImageError

logger = logging.getLogger(__name__)

MAX_IMAGE_PIXELS = 100_000_000  # 300 MB as RGB
MAX_RATIO = 10_000  # of the longer to the shorter side; a line of 65,535 pixels is no picture
BLOCK_PIXELS = 2**21  # converted at once
DARK = 32  # of 255: deep pixels that come out below it nearly all over were scaled by too much

ALPHAS = ("auto", "compose", "ignore")


@dataclass(frozen=True)
class ReadOptions:
    """What is read of a picture, and what is refused.

    Bands and range are of files and arrays; a `PIL.Image` of 8-bit RGB that was made, not opened, is taken as it is.

    Attributes:
        bands: Those that become red, green and blue, counted from 1, or a single one for grey; None takes the first
            three, or the first of two.
        alpha: "auto" composes transparent pixels over white, but for the extra band of a TIFF: writers mark a fourth
            band as alpha that holds near infrared. "compose" takes that for opacity too, "ignore" none.
        value_range: The values that become black and white; "auto" takes the picture's own, from its lowest value (0
            where that is below a tenth of the highest) to its highest; None takes the whole range of the type.
        max_pixels: Larger pictures are refused before they are decoded.
        max_ratio: Longer ones, too.
        max_file_bytes: Larger files are refused before they are opened.

    Raises:
        ValueError: An option is out of its range.
    """

    bands: tuple[int, ...] | None = None
    alpha: str = "auto"
    value_range: str | tuple[float, float] | None = None
    max_pixels: int = MAX_IMAGE_PIXELS
    max_ratio: int = MAX_RATIO
    max_file_bytes: int = MAX_FILE_BYTES

    def __post_init__(self) -> None:
        if self.bands is not None:
            bands = tuple(self.bands)
            if len(bands) not in (1, 3) or not all(isinstance(band, int) and band >= 1 for band in bands):
                raise ValueError(f"bands is {self.bands}; give one or three band numbers, counted from 1: 3, 2, 1.")
            object.__setattr__(self, "bands", bands)
        if self.alpha not in ALPHAS:
            raise ValueError(f"alpha is {self.alpha!r}; allowed are {', '.join(ALPHAS)}.")
        if self.value_range is not None and self.value_range != "auto":
            try:
                low, high = (float(value) for value in self.value_range)
            except (TypeError, ValueError):
                low = high = 0.0
            if not -np.inf < low < high < np.inf:
                raise ValueError(
                    f"value_range is {self.value_range!r}; give 'auto', or two numbers, the values of black and white."
                )
            object.__setattr__(self, "value_range", (low, high))


DEFAULTS = ReadOptions()


def chosen_bands(count: int, marked: int | None, options: ReadOptions, name: str) -> tuple[int, ...]:
    """The bands that become red, green and blue, or grey, from 0; `marked` is the one marked as alpha."""
    if options.bands is not None:
        if max(options.bands) > count:
            raise InvalidImageError(
                f"{name} has {count} band{'s' * (count > 1)}; bands is {', '.join(map(str, options.bands))}."
            )
        return tuple(band - 1 for band in options.bands)
    chosen = (0, 1, 2) if count >= 3 else (0,)
    unused = [band for band in range(count) if band not in chosen and band != marked]
    if unused:
        meaning = "red, green and blue" if len(chosen) == 3 else "grey"
        say_once(
            f"{name} has {count} bands, of which {_numbers(chosen)} {'are' if len(chosen) > 1 else 'is'} read as "
            f"{meaning}; {'bands=(3, 2, 1)' if len(chosen) == 3 else 'bands=(2,)'} chooses others."
        )
    return chosen


def _numbers(bands: tuple[int, ...]) -> str:
    return ", ".join(str(band + 1) for band in bands)


def say_that_alpha_is_ignored(opaque: bool, name: str) -> None:
    if not opaque:
        say_once(
            f"{name} has a band marked as alpha, which in a TIFF may hold anything and is left out; "
            "alpha='compose' takes it for opacity."
        )


def compose_over_white(image: Image.Image) -> Image.Image:
    composed = Image.new("RGB", image.size)
    for top, bottom in _rows(*image.size):
        block = image.crop((0, top, image.width, bottom)).convert("RGBA")
        white = Image.new("RGBA", block.size, "white")
        composed.paste(Image.alpha_composite(white, block).convert("RGB"), (0, top))
    return composed


def _rows(width: int, height: int) -> Iterator[tuple[int, int]]:
    """Blocks of rows, so that what is computed in between stays small."""
    step = max(1, BLOCK_PIXELS // width)
    return ((top, min(top + step, height)) for top in range(0, height, step))


def values_to_rgb(
    block: Callable[[int, int], np.ndarray],
    size: tuple[int, int],
    chosen: tuple[int, ...],
    composes: bool,
    options: ReadOptions,
    name: str,
) -> Image.Image:
    """Rows of values (h, W, C) to 8-bit RGB: C is 1 or 3 chosen bands, and 1 more for alpha where it composes.

    Alpha is scaled by the range of its type, whatever that of the colours.
    """
    colours = slice(len(chosen))
    extremes = [_extremes(block(top, bottom), len(chosen), name) for top, bottom in _rows(*size)]
    lows, highs, opaques = zip(*extremes, strict=True)
    low, high, dtype = min(lows), max(highs), block(0, 1).dtype
    black, white = black_and_white(dtype, low, high, options, name)
    opaque = black_and_white(dtype, 0, max(opaques), DEFAULTS, name)[1]
    rgb, bright = Image.new("RGB", size), 0
    for top, bottom in _rows(*size):
        values = block(top, bottom)
        colour = scaled_values(values[..., colours], black, white)
        bright += int(np.count_nonzero(colour >= DARK))
        if composes:
            colour = np.concatenate([colour, scaled_values(values[..., -1:], 0, opaque)], axis=2)
        image = Image.fromarray(colour[..., 0] if colour.shape[2] == 1 else colour)
        rgb.paste(compose_over_white(image) if composes else image.convert("RGB"), (0, top))
    dim = bright < size[0] * size[1] * len(chosen) / 100
    held = f"{name} holds values from {low:g} to {high:g} in band{'s' * (len(chosen) > 1)} {_numbers(chosen)}"
    if options.value_range == "auto":
        say_once(f"{held}; {black:g} becomes black and {white:g} white.")
    elif options.value_range is None and dtype.itemsize > 1 and high > 0 and dim:
        say_once(
            f"{held}, read as {black:g} to {white:g}, so it is nearly black; value_range='auto' scales it by its own."
        )
    return rgb


def _extremes(values: np.ndarray, colours: int, name: str) -> tuple[float, float, float]:
    """The lowest and highest value of the first bands, and the highest of the others."""
    if values.dtype.kind not in "iuf":
        raise InvalidImageError(f"{name} holds {values.dtype} values; allowed are 8 and 16-bit integers and floats.")
    low, high = float(values[..., :colours].min()), float(values[..., :colours].max())
    opaque = float(values[..., colours:].max(initial=0))
    if not np.isfinite([low, high, opaque]).all():  # NaN spreads to both
        raise InvalidImageError(f"{name} holds NaN or infinite pixels. Replace them, for example by np.nan_to_num.")
    return low, high, opaque


def black_and_white(dtype: np.dtype, low: float, high: float, options: ReadOptions, name: str) -> tuple[float, float]:
    """The values that become 0 and 255."""
    if options.value_range == "auto":
        black = 0.0 if 0 <= low < high / 10 else low
        return black, high if high > black else black + 1
    if options.value_range is not None:
        return options.value_range  # type: ignore[return-value]
    if dtype.kind == "u" and dtype.itemsize <= 2:
        return 0, 255 if dtype.itemsize == 1 else 65535
    if low < 0 or high > 255:
        raise InvalidImageError(
            f"{name} holds values from {low:g} to {high:g}; allowed are 0 to 255 (or 0 to 1 as floats). "
            "Pass pixels that are not normalised yet, or value_range='auto' to scale them by their own range."
        )
    if dtype.kind == "f" and 1 < high < 2:  # what bicubic resizing makes of 0 to 1; as 0 to 255 it would be black
        raise InvalidImageError(
            f"{name} holds floats up to {high:g}, neither 0 to 1 nor 0 to 255. Clip them to 0 to 1, or pass 8 bits."
        )
    return 0, 1 if dtype.kind == "f" and high <= 1 else 255


def scaled_values(values: np.ndarray, black: float, white: float) -> np.ndarray:
    if values.dtype == np.uint8 and (black, white) == (0, 255):
        return values
    scaled = (values.astype(np.float64) - black) * (255 / (white - black))
    return np.rint(np.clip(scaled, 0, 255)).astype(np.uint8)


# Messages


@lru_cache(1024)
def say_once(message: str) -> None:
    """A notice, once: a picture may be read again and again."""
    logger.warning(message)
