"""Pictures of results: the overlay, the label map and the best probabilities."""

from __future__ import annotations

import zlib
from functools import partial
from typing import Any

from PIL.PngImagePlugin import PngInfo

from ..visualize import label_map_image, overlay, scores_image
from .classes import class_text
from .picture import File, PictureResult

# Of an overlay: as small as by zlib's own choice, in a quarter of the time.
QUICK = {"compress_level": 1, "compress_type": zlib.Z_RLE}


def png(found: PictureResult) -> dict[str, File]:
    """The overlay with its legend, the label map, and the scores where they are asked for."""
    result = found.result
    tinted = overlay(found.image, result["segmentation"], result["labels"])
    files = {"overlay": _file(found, "overlay", tinted, **QUICK), **label_map(found)}
    if found.with_scores:
        files["scores"] = _file(found, "scores", scores_image(result["scores"]))
    return files


def label_map(found: PictureResult) -> dict[str, File]:
    """The label map in the classes' colours, with their ids, names and colours as JSON in the text `classes`."""
    text = PngInfo()
    text.add_itxt("classes", class_text(found.labels))
    picture = label_map_image(found.result["segmentation"], found.labels)
    return {"label_map": _file(found, "labels", picture, pnginfo=text)}


def _file(found: PictureResult, suffix: str, picture: Any, **more: Any) -> File:
    return File(f"{found.stem}-{suffix}.png", partial(picture.save, format="PNG", **more))
