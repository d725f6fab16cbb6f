"""A raster file, read window by window as 8-bit RGB: bands, values, masks and orientation by the rules of pictures."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..extras import extra_package
from ..image_file_spar import InvalidImageError, one_line
from ..image_values_spar import (
    BLOCK_PIXELS,
    DARK,
    ReadOptions,
    black_and_white,
    chosen_bands,
    compose_over_white,
    say_once,
    say_that_alpha_is_ignored,
    scaled_values,
)

KEPT_BYTES = 600_000_000  # of whole rows, of files that are decoded row by row
CACHE_MB = 128  # of decoded blocks that GDAL keeps; its own default is a share of the machine's memory
GLANCE_PX = 512  # side at which a raster is looked at as a whole, to tell a notice
# How a stored picture is turned upright, by EXIF's orientation: transposed, then rows and columns reversed.
TURNS = {
    2: (False, False, True),
    3: (False, True, True),
    4: (False, True, False),
    5: (True, False, False),
    6: (True, False, True),
    7: (True, True, True),
    8: (True, True, False),
}
Rectangle = tuple[slice, slice]  # rows and columns


@contextmanager
def quiet_gdal() -> Iterator[Any]:
    """rasterio, with a small cache and without its log: what matters of it comes as an exception."""
    rasterio = extra_package("rasterio", "geo")
    log = logging.getLogger("rasterio")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with rasterio.Env(GDAL_CACHEMAX=CACHE_MB, CPL_DEBUG=False), warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            yield rasterio
    finally:
        log.setLevel(level)


class Raster:
    """An open raster: `rgb` and `valid` of any window of it, upright.

    Args:
        dataset: a dataset of rasterio, open to be read.
        options: which bands, what becomes black and white, what alpha is; the limits of pixels do not count here.
        name: what messages call it.

    Attributes:
        size_hw: height and width in pixels.

    Raises:
        InvalidImageError: it lacks a band that is asked for, or its values are of a kind or range that is refused.
    """

    def __init__(self, dataset: Any, options: ReadOptions, name: str) -> None:
        self.dataset, self.options, self.name = dataset, options, name
        interpretations = [meaning.name for meaning in dataset.colorinterp]
        self._alpha = interpretations.index("alpha") + 1 if "alpha" in interpretations else None
        marked = None if self._alpha is None else self._alpha - 1
        self._bands = [band + 1 for band in chosen_bands(dataset.count, marked, options, name)]
        is_tiff = dataset.driver in ("GTiff", "COG")
        self._composes = self._alpha is not None and (
            options.alpha == "compose" or (options.alpha == "auto" and not is_tiff)
        )
        self._colours = None
        if len(self._bands) == 1 and interpretations[self._bands[0] - 1] == "palette":
            table = dataset.colormap(self._bands[0])
            self._colours = np.array([table.get(index, (0, 0, 0))[:3] for index in range(65536)], dtype=np.uint8)
        flags = {flag.name for band in self._bands for flag in dataset.mask_flag_enums[band - 1]}
        self._masked = flags != {"all_valid"} and "alpha" not in flags
        self._turn = self._orientation()
        height, width = dataset.height, dataset.width
        self.size_hw = (width, height) if self._turn[0] else (height, width)
        self._whole_rows = dataset.block_shapes[0][1] == width and not self._turn[0]
        self._kept: tuple[slice, np.ndarray] | None = None
        self._range = (0.0, 255.0)
        if self._colours is None:
            self._range = self._black_and_white()
        if self._alpha is not None and not self._composes and options.alpha == "auto":
            glance = self._read([self._alpha], (slice(0, height), slice(0, width)), shape=self._glance_hw)
            say_that_alpha_is_ignored(bool((glance == glance.max()).all()), name)

    @property
    def is_georeferenced(self) -> bool:
        """Whether it says where on Earth it lies."""
        data = self.dataset
        return data.crs is not None or not data.transform.is_identity or bool(data.gcps[0]) or bool(data.rpcs)

    def _orientation(self) -> tuple[bool, bool, bool]:
        """How it is turned upright; what lies on Earth is upright."""
        number = str(self.dataset.tags().get("EXIF_Orientation", "1")).strip()
        turn = TURNS.get(int(number)) if number.isdigit() else None
        return (False, False, False) if turn is None or self.is_georeferenced else turn

    # ------------------------------------------------------------------------------------------------- windows

    def rgb(self, window: Rectangle) -> np.ndarray:
        """The window as (h, w, 3) uint8; pixels that the raster says are none are black."""
        return self._in_whole_rows(window)[..., :3]

    def shrunk(self, size_hw: tuple[int, int]) -> np.ndarray:
        """The whole as (h, w, 3) uint8 of another, smaller size: every so many pixels."""
        whole = (slice(0, self.dataset.height), slice(0, self.dataset.width))
        out = self._rgba(whole, size_hw[::-1] if self._turn[0] else size_hw)
        return self._turned(out)[..., :3]

    def valid(self, window: Rectangle) -> np.ndarray:
        """Which pixels (h, w) of the window are any: not of the nodata value, masked, NaN or wholly transparent."""
        if not (self._masked or self._composes or self._holds_floats):
            return np.ones([axis.stop - axis.start for axis in window], dtype=bool)
        return self._in_whole_rows(window)[..., 3] > 0

    @property
    def _holds_floats(self) -> bool:
        return np.dtype(self.dataset.dtypes[self._bands[0] - 1]).kind == "f"

    def _in_whole_rows(self, window: Rectangle) -> np.ndarray:
        """(h, w, 4). Files without tiles are decoded row by row, so whole rows are kept for the next window."""
        rows, columns = window
        if not self._whole_rows or (rows.stop - rows.start) * self.size_hw[1] * 4 > KEPT_BYTES:
            return self._upright(window)
        if self._kept is None or self._kept[0] != rows:
            self._kept = None  # frees it first
            self._kept = (rows, self._upright((rows, slice(0, self.size_hw[1]))))
        return self._kept[1][:, columns]

    def _upright(self, window: Rectangle) -> np.ndarray:
        transposed, *reversed_axes = self._turn
        axes = [
            slice(length - axis.stop, length - axis.start) if back else axis
            for axis, length, back in zip(window, self.size_hw, reversed_axes, strict=True)
        ]
        rows, columns = reversed(axes) if transposed else axes
        height, width = rows.stop - rows.start, columns.stop - columns.start
        out = np.empty((height, width, 4), dtype=np.uint8)
        step = max(1, BLOCK_PIXELS // width)
        for top in range(0, height, step):
            part = slice(top, min(top + step, height))
            out[part] = self._rgba((slice(rows.start + part.start, rows.start + part.stop), columns))
        return self._turned(out)

    def _turned(self, stored: np.ndarray) -> np.ndarray:
        transposed, *reversed_axes = self._turn
        upright = stored.swapaxes(0, 1) if transposed else stored
        return upright[:: -1 if reversed_axes[0] else 1, :: -1 if reversed_axes[1] else 1]

    def _rgba(self, stored: Rectangle, shape: tuple[int, int] | None = None) -> np.ndarray:
        """A window of the stored pixels as (h, w, 4): colours, and 255 where the pixel is one, else 0."""
        values, valid = self._values(stored, shape)
        if self._colours is not None:
            colours = self._colours[values[0]]
        else:
            colours = scaled_values(values.transpose(1, 2, 0), *self._range)
        if self._composes:
            alpha = self._read([self._alpha], stored, shape)[0]
            opaque = black_and_white(alpha.dtype, 0, 1, ReadOptions(), self.name)[1]
            alpha = scaled_values(alpha, 0, opaque)
            rgba = np.dstack([np.broadcast_to(colours, (*alpha.shape, 3)), alpha])
            colours, valid = np.asarray(compose_over_white(Image.fromarray(rgba))), valid & (alpha > 0)
        out = np.empty((*valid.shape, 4), dtype=np.uint8)
        out[..., :3] = colours  # one band of grey becomes three
        out[..., 3] = 255
        out[~valid] = 0
        return out

    def _values(self, stored: Rectangle, shape: tuple[int, int] | None = None) -> tuple[np.ndarray, np.ndarray]:
        """The chosen bands (C, h, w), 0 where they are none; and the pixels (h, w) that are some in any band."""
        values = self._read(self._bands, stored, shape)
        if values.dtype.kind not in "iuf":
            raise InvalidImageError(
                f"{self.name} holds {values.dtype} values; allowed are 8 and 16-bit integers and floats."
            )
        given = np.ones(values.shape, dtype=bool)
        if self._masked:
            given = self._read(self._bands, stored, shape, masks=True) > 0
        valid = np.asarray(given.any(axis=0))
        if values.dtype.kind == "f":
            finite = np.isfinite(values)
            valid, given = valid & (finite | ~given).all(axis=0), given & finite
        if not given.all():
            values[~given] = 0
        return values, valid

    @property
    def _glance_hw(self) -> tuple[int, int]:
        return min(self.dataset.height, GLANCE_PX), min(self.dataset.width, GLANCE_PX)

    def _read(
        self, bands: list[Any], stored: Rectangle, shape: tuple[int, int] | None = None, masks: bool = False
    ) -> np.ndarray:
        """Bands, or their masks, (C, h, w) of a window of the stored pixels; every so many if `shape` is smaller."""
        rows, columns = stored
        window = ((rows.start, rows.stop), (columns.start, columns.stop))
        shape = shape or (rows.stop - rows.start, columns.stop - columns.start)
        read = self.dataset.read_masks if masks else self.dataset.read
        try:
            return read(bands, window=window, out_shape=(len(bands), *shape))
        except Exception as error:  # a damaged file makes GDAL raise almost anything
            raise InvalidImageError(
                f"{self.name} cannot be read to its end ({one_line(error.__cause__ or error)}). It is cut off or "
                "damaged; copy or download it again."
            ) from error

    # -------------------------------------------------------------------------------------------------- values

    def _black_and_white(self) -> tuple[float, float]:
        """The values that become 0 and 255. Where the type does not say, the whole raster is read once for it."""
        dtype = np.dtype(self.dataset.dtypes[self._bands[0] - 1])
        asked = self.options.value_range
        low, high = 0.0, 0.0
        if asked == "auto" or (asked is None and not (dtype.kind == "u" and dtype.itemsize <= 2)):
            low, high = self._extremes()
        black, white = black_and_white(dtype, low, high, self.options, self.name)
        if asked == "auto":
            held = f"{self.name} holds values from {low:g} to {high:g}"
            say_once(f"{held}; {black:g} becomes black and {white:g} white.")
        elif asked is None and dtype.itemsize > 1:
            whole = (slice(0, self.dataset.height), slice(0, self.dataset.width))
            glance = self._read(self._bands, whole, shape=self._glance_hw).astype(np.float64)
            bright = np.nan_to_num(glance, nan=0.0) >= black + (white - black) * DARK / 255
            if glance.max(initial=0) > 0 and bright.mean() < 0.01:
                say_once(
                    f"{self.name} is read as {black:g} to {white:g}, so it is nearly black; value_range='auto' scales "
                    "it by its own."
                )
        return float(black), float(white)

    def _extremes(self) -> tuple[float, float]:
        height, width = self.dataset.height, self.dataset.width
        step = max(1, BLOCK_PIXELS // width)
        low, high = np.inf, -np.inf
        for top in range(0, height, step):
            values, valid = self._values((slice(top, min(top + step, height)), slice(0, width)))
            if valid.any():
                low, high = min(low, float(values[:, valid].min())), max(high, float(values[:, valid].max()))
        return (low, high) if low <= high else (0.0, 0.0)


@contextmanager
def open_raster(path: str | os.PathLike[str], options: ReadOptions) -> Iterator[Raster]:
    """A raster file of any format that GDAL reads, open inside the block.

    Raises:
        InvalidImageError: it can't be opened, or see `Raster`.
        ValueError: rasterio is not installed.
    """
    with quiet_gdal() as rasterio:
        try:
            dataset = rasterio.open(Path(path))
        except rasterio.errors.RasterioIOError as error:
            reason = one_line(error)
            raise InvalidImageError(f"{path} is no raster that can be opened ({reason}). Save it anew.") from error
        with dataset:
            if dataset.count == 0:
                raise InvalidImageError(f"{path} holds several pictures and none of its own; name one of them.")
            yield Raster(dataset, options, str(path))
