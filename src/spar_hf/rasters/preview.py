"""A raster and its label map at a size for the eye."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from ..image_values_spar import ReadOptions
from ..prompts_spar import Labels
from .source import open_raster, quiet_gdal


def preview(
    path: Path, options: ReadOptions, label_map: Path, labels: Labels, side_px: int
) -> tuple[Image.Image, np.ndarray]:
    """The picture and the positions of its classes (H, W), -1 for none, with a longer side of at most `side_px`."""
    with open_raster(path, options) as raster:
        shrink = min(1.0, side_px / max(raster.size_hw))
        height, width = (max(1, round(side * shrink)) for side in raster.size_hw)
        image = Image.fromarray(raster.shrunk((height, width)))
    with quiet_gdal() as rasterio, rasterio.open(label_map) as written:
        ids = written.read(1, out_shape=(height, width))
    positions = np.full(65536, -1, np.int32)
    positions[list(labels.written_ids)] = np.arange(len(labels))
    return image, positions[ids]
