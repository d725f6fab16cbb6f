"""The label map of a raster as a GeoTIFF: tiled, compressed, written window by window, whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import zlib
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

from ..files import whole_files
from ..image_file_spar import one_line
from ..outputs.classes import class_text, colour_table
from ..prompts_spar import Labels
from .source import Raster, Rectangle

TILE_PX = 512
SMALLEST_OVERVIEW_PX = 256


def no_class_value(highest_id: int) -> int:
    """What a pixel without a class is in a label map: the highest value of its type, as in `label_map_image`."""
    return 255 if highest_id < 255 else 65535


def checksum(values: np.ndarray) -> int:
    """CRC-32 of an array's values."""
    return zlib.crc32(np.ascontiguousarray(values).tobytes())


class MapWriter:
    """A map that grows in a draft: `write` each window once, then `finish`.

    Args:
        draft: the file to write.
        raster: gives size, place on Earth and projection.
        dtype: of the values.
        nodata: the value of a pixel that is none; None: there is no such value.
        labels: of a label map, for their names and colours.

    Raises:
        OSError: the disk is full.
    """

    def __init__(
        self,
        rasterio: Any,
        draft: Path,
        raster: Raster,
        dtype: str,
        nodata: int | None,
        labels: Labels | None = None,
    ) -> None:
        self._rasterio, self.draft = rasterio, draft
        self._is_read_back = False
        self._sums: dict[tuple[int, int, int, int], int] = {}
        data, (height, width) = raster.dataset, raster.size_hw
        gcps, gcps_crs = data.gcps
        profile = {
            "driver": "GTiff", "height": height, "width": width, "count": 1, "dtype": dtype, "nodata": nodata,
            "tiled": True, "blockxsize": TILE_PX, "blockysize": TILE_PX, "compress": "deflate", "bigtiff": "IF_SAFER",
        }  # fmt: skip
        if raster.is_georeferenced:
            profile |= {"crs": gcps_crs, "gcps": gcps} if gcps else {"crs": data.crs, "transform": data.transform}
            if data.rpcs:
                profile["rpcs"] = data.rpcs
        self._file = self._tried(rasterio.open, draft, "w", **profile)
        if labels is not None:
            self._file.update_tags(CLASS_NAMES=json.dumps(labels.class_names, ensure_ascii=False))
            self._file.update_tags(1, classes=class_text(labels))
            if dtype == "uint8":
                self._file.write_colormap(1, {**colour_table(labels), 255: (0, 0, 0, 0)})  # no class

    def write(self, window: Rectangle, values: np.ndarray) -> None:
        """Puts (h, w) into a window whose corner is a multiple of `TILE_PX`."""
        rows, columns = window
        self._sums[rows.start, rows.stop, columns.start, columns.stop] = checksum(values)
        self._tried(self._file.write, values, 1, window=((rows.start, rows.stop), (columns.start, columns.stop)))

    def finish(self) -> None:
        """Makes the overviews and reads all back: GDAL tells of some failed writes to nobody."""
        height, width = self._file.shape
        factors = [2**n for n in range(1, 30) if max(height, width) / 2 ** (n - 1) > SMALLEST_OVERVIEW_PX]
        if factors:
            mode = self._rasterio.enums.Resampling.mode
            self._tried(self._file.build_overviews, factors, mode)
        self._tried(self._file.close)
        self._is_read_back = True
        with self._tried(self._rasterio.open, self.draft) as written:
            for (top, bottom, left, right), expected in self._sums.items():
                values = self._tried(written.read, 1, window=((top, bottom), (left, right)))
                if checksum(values) != expected:
                    raise self._failure("what was written reads back differently")

    def close(self) -> None:
        """After a failure."""
        try:
            self._file.close()
        except Exception:  # it failed before
            return

    def _tried(self, call: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        except MemoryError:
            raise
        except Exception as error:  # GDAL's errors, by many names
            raise self._failure(one_line(error.__cause__ or error)) from error

    def _failure(self, reason: str) -> OSError:
        """A failed write: of a full disk where GDAL says so, or says nothing and the file does not read back."""
        number = errno.EIO
        full = any(word in reason for word in ("No space", "too large", "rite", "SetSize"))
        if full or self._is_read_back or shutil.disk_usage(self.draft.parent).free < 2**20:
            number = errno.ENOSPC
        return OSError(number, f"{self.draft.name} can't be written ({reason})")


def write_categories(path: Path, labels: Labels) -> None:
    """The class names in the file beside a GeoTIFF where GDAL and QGIS look for them: one for each value from 0."""
    of_id = dict(zip(labels.written_ids, labels.class_names, strict=True))
    every = (of_id.get(number, "") for number in range(max(of_id) + 1))
    names = "".join(f"<Category>{escape(_printable(name))}</Category>" for name in every)
    text = f'<PAMDataset><PAMRasterBand band="1"><CategoryNames>{names}</CategoryNames></PAMRasterBand></PAMDataset>\n'
    with whole_files(path) as (draft,):
        draft.write_text(text, encoding="utf-8")


def _printable(name: str) -> str:
    """Without what XML can't hold."""
    return "".join(char if char.isprintable() else " " for char in name)
