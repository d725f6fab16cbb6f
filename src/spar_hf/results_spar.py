"""What a segmentation is asked for and what comes of it, whatever runs the network. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Sequence
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
    """What the pipeline gives for an image, a dictionary; `to_dict` is its JSON form."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON: numbers, words and lists; the label map and the scores, which are arrays, stay out."""
        return {
            "segments": [dict(segment) for segment in self["segments"]],
            "labels": list(self["labels"].class_names),
            "size_hw": list(self["segmentation"].shape),
            "input_hw": list(self["size_hw"]),
            "grid_hw": list(self["grid_hw"]),
        }


def check_thresholds(
    logit_scale: float | None, background_threshold: float | None, area_threshold: float | None
) -> None:
    """Raises a `ValueError` that names the value, the rule and the remedy."""
    for name, threshold in (("background_threshold", background_threshold), ("area_threshold", area_threshold)):
        if threshold is not None and not 0 <= threshold <= 1:
            raise ValueError(f"{name} is {threshold}; it must be from 0 to 1, or None for no threshold.")
    if logit_scale is not None and not logit_scale > 0:
        raise ValueError(f"logit_scale is {logit_scale}; it must be above 0.")


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
