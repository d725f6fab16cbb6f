"""GeoTIFF: the label map as a raster, with the georeference of its source, colours, and names of classes."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np

from ..extras import extra_package
from ..visualize import as_written
from .classes import class_text, colour_table
from .picture import File, PictureResult


def raster_profile(size_hw: tuple[int, int], labels: Any, crs: Any, transform: Any) -> dict[str, Any]:
    """What `rasterio.open` is told of a raster of class ids: compressed tiles, no class as the highest value."""
    wide = max(labels.written_ids) > 254
    tiles = {"tiled": True, "blockxsize": 256, "blockysize": 256} if min(size_hw) >= 256 else {}
    return {
        "driver": "GTiff",
        "height": size_hw[0],
        "width": size_hw[1],
        "count": 1,
        "dtype": "uint16" if wide else "uint8",
        "nodata": 65535 if wide else 255,
        "compress": "deflate",
        "crs": crs,
        "transform": transform,
        **tiles,
    }


def describe(raster: Any, labels: Any) -> None:
    """Gives an open raster its colours, and in the tag `classes` their ids, names and colours as JSON."""
    raster.write_colormap(1, colour_table(labels))
    raster.update_tags(1, classes=class_text(labels))


def geotiff(found: PictureResult) -> dict[str, File]:
    """The label map; its values are the ids of the classes."""
    rasterio = extra_package("rasterio", "geo")
    place, labels = found.georeference, found.labels
    crs, transform = (None, None) if place is None else (place.crs, rasterio.Affine(*place.transform))
    profile = raster_profile(found.size_hw, labels, crs, transform)
    values = as_written(found.result["segmentation"], labels).astype(profile["dtype"])  # -1 wraps to the highest

    def save(path: Path) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", rasterio.errors.NotGeoreferencedWarning)
            with rasterio.open(path, "w", **profile) as raster:
                describe(raster, labels)
                raster.write(np.ascontiguousarray(values), 1)

    return {"geotiff": File(f"{found.stem}-labels.tif", save)}
