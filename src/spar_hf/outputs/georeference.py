"""Where a picture lies on the earth, as rasterio reads it from the picture's file."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from PIL import Image

from ..extras import extra_package
from ..image_file_spar import InvalidImageError

GEOTIFF_TAGS = (33550, 33922, 34264, 34735)  # pixel scale, tie points, transformation, keys
ORIENTATION = 0x0112


@dataclass(frozen=True)
class Georeference:
    """From pixels to coordinates.

    Attributes:
        crs: the coordinate reference system, a `rasterio.crs.CRS`; None where it is not known.
        transform: (a, b, c, d, e, f) with x = a * column + b * row + c and y = d * column + e * row + f, rows and
            columns counted from the top left corner.
    """

    crs: Any
    transform: tuple[float, float, float, float, float, float]

    @property
    def pixel_area(self) -> float:
        """Of a pixel, in square units of the coordinates."""
        a, b, _, d, e, _ = self.transform
        return abs(a * e - b * d)


def georeference_of(path: Path, size_hw: tuple[int, int]) -> Georeference | None:
    """The georeference of a picture's file; None where it has none.

    Raises:
        ValueError: it has one, and rasterio is not installed.
        InvalidImageError: it has one that is of no use, as the picture is turned by an EXIF tag.
    """
    if not path.is_file():
        return None
    if find_spec("rasterio") is None and not _has_geotiff_tags(path):
        return None
    rasterio = extra_package("rasterio", "geo")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
        try:
            with rasterio.open(path) as raster:
                crs, transform, shape = raster.crs, raster.transform, raster.shape
        except rasterio.errors.RasterioIOError:  # a format that Pillow reads and GDAL does not
            return None
    if crs is None and transform.is_identity:
        return None
    if shape != size_hw or _orientation(path) != 1:
        raise InvalidImageError(
            f"{path} has a georeference, which is about the picture as it is stored, and an EXIF tag that turns it; "
            "turn the pixels and remove the tag."
        )
    return Georeference(crs, tuple(transform)[:6])


def _has_geotiff_tags(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            return any(tag in getattr(image, "tag_v2", {}) for tag in GEOTIFF_TAGS)
    except OSError:
        return False


def _orientation(path: Path) -> int:
    try:
        with Image.open(path) as image:
            return int(image.getexif().get(ORIENTATION, 1))
    except OSError:
        return 1
