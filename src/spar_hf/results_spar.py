"""What a segmentation is asked for and what comes of it, whatever runs the network. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import numpy as np

NO_CLASS = -1  # of a pixel that no class is sure enough of, and of names that only compete
SYNONYMS = ("sum", "max")
COSINE_SCALE = 40.0  # factor on cosines before the soft-max (SPAR, SCLIP)
POST_PROCESSING = (
    "logit_scale",
    "background_threshold",
    "background_class",
    "score_threshold",
    "area_threshold",
    "synonyms",
)
BAND_PIXELS = 2**20  # counted at a time


class SegmentationResult(dict[str, Any]):
    """What the pipeline gives for an image, a dictionary; `to_dict` is its JSON form.

    Ids in `segmentation` and `segments` are positions in the vocabulary. What is converted or written has the ids that
    the vocabulary came with, `labels.written_ids`.
    """

    def to_dict(self) -> dict[str, Any]:
        """As JSON: numbers, words and lists; the label map and the scores, which are arrays, stay out."""
        return {
            "segments": [dict(segment) for segment in self["segments"]],
            "labels": list(self["labels"].class_names),
            "size_hw": list(self["segmentation"].shape),
            "input_hw": list(self["size_hw"]),
            "grid_hw": list(self["grid_hw"]),
        }

    def cleaned(self, min_area: int = 0, fill_holes: int = 0) -> SegmentationResult:
        """The result without specks.

        Args:
            min_area: connected components of fewer pixels have no class, or become background.
            fill_holes: holes in a class of at most so many pixels become that class.
        """
        return _outputs("regions").cleaned(self, min_area, fill_holes)

    def to_polygons(self, instances: bool = False) -> list[dict[str, Any]]:
        """The regions' outlines along the edges of their pixels.

        Args:
            instances: a region is a connected component of a class, otherwise all pixels of a class.

        Returns:
            Of each region `id`, `label`, `area` in pixels, `score` (the mean probability; None where the result has
            no scores), `bbox` (left, top, width, height) and `polygons`: of each a list of rings (n, 2), corners
            (x, y) in pixels from the top left, the outline first and then its holes.
        """
        return _outputs("conversions").to_polygons(self, instances)

    def to_coco(self, instances: bool = False, image_id: int = 1, file_name: str = "") -> dict[str, Any]:
        """The regions as a COCO data set of one image, with run-length masks; `pycocotools` reads it."""
        return _outputs("conversions").to_coco(self, instances, image_id, file_name)

    def to_supervision(self, instances: bool = False) -> Any:
        """The regions as `supervision.Detections`: boxes, masks, ids, scores where there are any, and names.

        Raises:
            ValueError: supervision is not installed, or the masks would take too much memory.
        """
        return _outputs("conversions").to_supervision(self, instances)


def _outputs(name: str) -> Any:
    """A module of what writes results. It comes with the package; remote code finds the installed one."""
    package = __package__ if find_spec(f"{__package__}.outputs") is not None else "spar_hf"
    try:
        return import_module(f"{package}.outputs.{name}")
    except ModuleNotFoundError as error:
        if error.name != "spar_hf":
            raise
        raise ValueError("results are converted by the package spar_hf; run: pip install spar-hf") from None


def check_thresholds(
    logit_scale: float | None,
    background_threshold: float | Sequence[float] | None,
    area_threshold: float | None,
) -> None:
    """Raises a `ValueError` that names the value, the rule and the remedy."""
    several = background_threshold if isinstance(background_threshold, Sequence) else [background_threshold]
    for name, threshold in (*(("background_threshold", one) for one in several), ("area_threshold", area_threshold)):
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"{name} is {threshold}; it must be from 0 to 1, or None for no threshold.")
    if logit_scale is not None and not logit_scale > 0:
        raise ValueError(f"logit_scale is {logit_scale}; it must be above 0.")


def check_top_k(count: Any) -> None:
    """Raises a `ValueError` for a number of classes that is none."""
    if count is not None and (isinstance(count, bool) or not isinstance(count, int) or count < 1):
        raise ValueError(f"return_top_k is {count!r}; give how many classes of each pixel, at least 1, or None.")


def segments_of(
    segmentation: np.ndarray, class_names: Sequence[str], scores: np.ndarray | None = None
) -> list[dict[str, Any]]:
    """The classes that occur, largest first, each with its fraction of the image, and its mean score if there are any.

    An id outside the vocabulary is the background's, -1 is no class.
    """
    first, last = int(segmentation.min()), int(segmentation.max())
    counts, sums = np.zeros(last - first + 1), np.zeros(last - first + 1)
    step = max(1, BAND_PIXELS // segmentation.shape[1])  # a whole label map as 64-bit numbers may be a gigabyte
    for top in range(0, len(segmentation), step):
        places = segmentation[top : top + step].ravel() - first
        counts += np.bincount(places, minlength=len(counts))
        if scores is not None:
            sums += np.bincount(places, scores[top : top + step].ravel(), minlength=len(sums))
    segments = []
    occurring = counts.nonzero()[0]
    for place in occurring[np.lexsort((occurring, counts[occurring]))[::-1]]:
        index = first + int(place)
        name = "no class" if index == NO_CLASS else "background"
        segment: dict[str, Any] = {
            "id": index,
            "label": class_names[index] if 0 <= index < len(class_names) else name,
            "area_fraction": float(counts[place] / segmentation.size),
        }
        if scores is not None:
            segment["score"] = float(sums[place] / counts[place])
        segments.append(segment)
    return segments
