"""Counts behind the segmentation scores: a confusion matrix of pixels, and one of boundary pixels.

Both have a fixed size, so an evaluation needs the same memory for one image and for a million. Counts of two parts of
a data set add up to the counts of the whole.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import TypedDict

import numpy as np

BOUNDARY_RATIO = 0.02  # of the image's diagonal; Cheng et al., "Boundary IoU", CVPR 2021, section 4


class ConfusionMatrix:
    """Pixels counted by true class (row) and predicted class (column).

    A class that is neither in the target nor in the predictions has no score: it is nan and left out of the means, as
    in MMSegmentation. A class that was predicted but never true has an IoU of 0 and counts in the mean.

    Args:
        num_classes: K; class ids are 0 to K - 1.
        ignore_index: Pixels with this true label are not counted.
    """

    def __init__(self, num_classes: int, ignore_index: int = 255) -> None:
        if num_classes < 1:
            raise ValueError(f"num_classes is {num_classes}; it must be at least 1. Pass the size of the vocabulary.")
        if 0 <= ignore_index < num_classes:
            raise ValueError(
                f"ignore_index {ignore_index} is one of the {num_classes} classes; it must not be. "
                "Use a label outside the vocabulary, such as -1."
            )
        self.num_classes = num_classes
        self.ignore_index = ignore_index
        self.matrix = np.zeros((num_classes, num_classes), dtype=np.int64)

    def update(self, prediction: np.ndarray, target: np.ndarray) -> None:
        """Counts one image.

        Args:
            prediction: Class ids, (H, W), integers.
            target: Class ids or `ignore_index`, (H, W), integers.

        Raises:
            ValueError: If the sizes differ or a label is outside the vocabulary.
        """
        if prediction.shape != target.shape:
            raise ValueError(
                f"the prediction is {prediction.shape} and the target {target.shape}; both must have one size. "
                "Pass the target's size as target_sizes in the post-processing."
            )
        counted = target != self.ignore_index
        prediction, target = prediction[counted], target[counted]
        for what, labels in (("prediction", prediction), ("target", target)):
            if labels.size and (labels.min() < 0 or labels.max() >= self.num_classes):
                raise ValueError(
                    f"the {what} has labels from {labels.min()} to {labels.max()}; the vocabulary has "
                    f"{self.num_classes} classes, 0 to {self.num_classes - 1}. Check vocabulary and label shift."
                )
        pairs = target.astype(np.int64) * self.num_classes + prediction
        self.matrix += np.bincount(pairs, minlength=self.num_classes**2).reshape(self.matrix.shape)

    def iou(self) -> np.ndarray:
        """Intersection over union of each class, (K,); nan where a class is in neither map."""
        hits = np.diag(self.matrix)
        return _ratio(hits, self.matrix.sum(0) + self.matrix.sum(1) - hits)

    def class_accuracy(self) -> np.ndarray:
        """Fraction of each class's true pixels that were predicted right, (K,); nan where a class is never true."""
        return _ratio(np.diag(self.matrix), self.matrix.sum(1))

    def pixel_accuracy(self) -> float:
        """Fraction of all counted pixels that were predicted right; nan when none was counted."""
        return float(_ratio(np.trace(self.matrix), self.matrix.sum()))


class Scores(TypedDict):
    """Scores from 0 to 1 under the names of the Hub's `mean_iou` metric; nan for a class in neither map."""

    mean_iou: float
    mean_accuracy: float
    overall_accuracy: float
    boundary_iou: float
    per_category_iou: list[float]
    per_category_accuracy: list[float]
    per_category_boundary_iou: list[float]
    num_images: int


@dataclass
class SegmentationCounts:
    """What an evaluation accumulates: the counts of all pixels and of the pixels near a boundary.

    Boundary IoU (Cheng et al., CVPR 2021) is the IoU of what lies within a distance of each class's contour, taken
    separately in prediction and target. Here it is the IoU of two label maps in which every pixel farther away belongs
    to one more class, "interior", that is not scored. Counts run over the data set, as for the mean IoU. Ignored
    pixels are removed from both maps first, so that their rim is a contour in both.

    Args:
        num_classes: K; class ids are 0 to K - 1.
        ignore_index: Pixels with this true label are not counted.
        boundary_ratio: Distance from the contour as a fraction of the image's diagonal.
    """

    num_classes: int
    ignore_index: int = 255
    boundary_ratio: float = BOUNDARY_RATIO
    num_images: int = 0
    pixels: ConfusionMatrix = field(init=False)
    boundary: ConfusionMatrix = field(init=False)

    def __post_init__(self) -> None:
        if not 0 < self.boundary_ratio < 1:
            raise ValueError(
                f"boundary_ratio is {self.boundary_ratio}; it must lie between 0 and 1. The paper has 0.02."
            )
        self.pixels = ConfusionMatrix(self.num_classes, self.ignore_index)
        # Ignored pixels are -1 here: the caller's own index may be K, which is the class "interior".
        self.boundary = ConfusionMatrix(self.num_classes + 1, ignore_index=-1)

    def update(self, prediction: np.ndarray, target: np.ndarray) -> None:
        """Counts one image: class ids (H, W) against class ids or `ignore_index` (H, W)."""
        self.pixels.update(prediction, target)
        ignored = target == self.ignore_index
        distance_px = max(1, round(self.boundary_ratio * float(np.hypot(*target.shape))))
        maps = [np.where(ignored, -1, labels) for labels in (prediction, target)]
        for labels in maps:
            labels[~boundary_region(labels, distance_px) & ~ignored] = self.num_classes
        self.boundary.update(*maps)
        self.num_images += 1

    def scores(self) -> Scores:
        """All scores of what was counted so far."""
        iou, boundary_iou = self.pixels.iou(), self.boundary.iou()[: self.num_classes]
        class_accuracy = self.pixels.class_accuracy()
        return {
            "mean_iou": _mean_of_present(iou),
            "mean_accuracy": _mean_of_present(class_accuracy),
            "overall_accuracy": self.pixels.pixel_accuracy(),
            "boundary_iou": _mean_of_present(boundary_iou),
            "per_category_iou": iou.tolist(),
            "per_category_accuracy": class_accuracy.tolist(),
            "per_category_boundary_iou": boundary_iou.tolist(),
            "num_images": self.num_images,
        }

    def __add__(self, other: SegmentationCounts) -> SegmentationCounts:
        """The counts of both parts of a data set."""
        both = deepcopy(self)
        both += other
        return both

    def __iadd__(self, other: SegmentationCounts) -> SegmentationCounts:
        """Adds the counts of another part of the data set, for example from another process."""
        settings = ("num_classes", "ignore_index", "boundary_ratio")
        if any(getattr(self, name) != getattr(other, name) for name in settings):
            raise ValueError(
                f"counts with different settings were added: {self} and {other}; {', '.join(settings)} must agree."
            )
        self.pixels.matrix += other.pixels.matrix
        self.boundary.matrix += other.boundary.matrix
        self.num_images += other.num_images
        return self


def boundary_region(label_map: np.ndarray, distance_px: int) -> np.ndarray:
    """Marks the pixels within `distance_px` (chessboard) of another label or of the outside of the image.

    For each class this is the mask minus its erosion by a 3 x 3 square, `distance_px` times, with zeros around the
    image, as in the paper; found for all classes at once, in a time that does not depend on the distance: a square
    window holds one label exactly when each of its rows does and its middle column does.

    Args:
        label_map: Integers, (H, W).
        distance_px: At least 1.

    Returns:
        Booleans, (H, W).
    """
    around = 2 * distance_px
    padded = np.pad(label_map.astype(np.int64), distance_px, constant_values=np.iinfo(np.int64).min)
    changes_along_rows = padded[:, 1:] != padded[:, :-1]  # (H + 2 d, W + 2 d - 1)
    row_is_mixed = _any_in_window(changes_along_rows, around, axis=1)  # (H + 2 d, W)
    middle_columns = padded[:, distance_px:-distance_px]  # (H + 2 d, W)
    column_is_mixed = _any_in_window(middle_columns[1:] != middle_columns[:-1], around, axis=0)  # (H, W)
    return column_is_mixed | _any_in_window(row_is_mixed, around + 1, axis=0)


def _any_in_window(flags: np.ndarray, length: int, axis: int) -> np.ndarray:
    """Whether any of `length` neighbours along `axis` is set, for each full window."""
    widths = [(0, 0), (0, 0)]
    widths[axis] = (1, 0)
    running = np.pad(np.cumsum(flags, axis=axis, dtype=np.int32), widths)
    if axis == 0:
        return running[length:] != running[:-length]
    return running[:, length:] != running[:, :-length]


def _ratio(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """part / whole, nan where whole is 0."""
    return np.divide(part, whole, out=np.full(np.shape(whole), np.nan), where=np.asarray(whole) > 0)


def _mean_of_present(scores: np.ndarray) -> float:
    """Mean of the scores that are not nan; nan when none is left."""
    present = scores[~np.isnan(scores)]
    return float(present.mean()) if present.size else float("nan")
