"""The table of formats that results are written in: a new one is a row, and a file of its own."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import coco, geojson, geotiff, png, score_maps, yolo
from .picture import File, PictureResult


@dataclass(frozen=True)
class Format:
    """A row of the table.

    Attributes:
        summary: what it is, for help and documentation.
        files: of a picture's result: what each is -> the file.
        needs: what the pipeline must return for it, `scores` or `top_k`.
        record: of a picture's result: what a file about all pictures says of it, as JSON.
        finish: (folder, labels, records) -> writes the files about all pictures; `records()` gives the records of
            all, ordered by stem.
    """

    summary: str
    files: Callable[[PictureResult], dict[str, File]]
    needs: tuple[str, ...] = ()
    record: Callable[[PictureResult], dict[str, Any]] | None = None
    finish: Callable[[Path, Any, Any], None] | None = None


FORMATS = {
    "png": Format("NAME-overlay.png, tinted by class with a legend, and NAME-labels.png, the label map", png.png),
    "palette": Format("NAME-labels.png alone, in the classes' colours, their names in its metadata", png.label_map),
    "coco": Format(
        "coco-instances.json, run-length masks, and coco-panoptic.json with NAME-panoptic.png",
        coco.coco,
        needs=("scores",),
        record=coco.record,
        finish=coco.write_all,
    ),
    "geojson": Format(
        "NAME.geojson, polygons with class, score and area, in the raster's coordinates",
        geojson.geojson,
        needs=("scores",),
    ),
    "geotiff": Format(
        "NAME-labels.tif, the label map with the raster's georeference, colours, names", geotiff.geotiff
    ),
    "npz": Format(
        "NAME-scores.npz, the likeliest classes of each pixel and their probabilities", score_maps.npz, ("top_k",)
    ),
    "safetensors": Format("NAME-scores.safetensors, the same for safetensors", score_maps.safetensors, ("top_k",)),
    "yolo": Format("labels/NAME.txt, outlines for YOLO, and data.yaml", yolo.yolo, finish=yolo.write_names),
}
