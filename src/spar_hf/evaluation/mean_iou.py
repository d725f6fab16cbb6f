"""Mean IoU as an `evaluate.Metric` that keeps counts instead of pixels.

`evaluate` stores every pixel until the end, as int64: 17 GB for the validation images of Cityscapes. This metric
counts in `add_batch`, so that nothing grows. It needs no Hub:

    from spar_hf.metrics.mean_iou import MeanIoU
    metric = MeanIoU(num_labels=19)
    metric.add_batch(predictions=[label_map], references=[target])
    metric.compute()["mean_iou"]

or, through the library, `evaluate.load("<folder of this file>/mean_iou.py", num_labels=19)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike

# Absolute, because evaluate.load copies this file elsewhere before it imports it.
from .counts import BOUNDARY_RATIO, Scores, SegmentationCounts

_DESCRIPTION = """Mean intersection over union of semantic segmentation, with per-class IoU, accuracies, boundary IoU.
A class in neither the predictions nor the references is nan and left out of the means."""
_INPUTS = """
Args:
    predictions: label maps (H, W) of class ids; the sizes may differ from image to image
    references: label maps (H, W) of class ids or the ignore index, of the predictions' sizes
"""
_CITATION = """@inproceedings{cheng2021boundary,
  title={Boundary {IoU}: Improving Object-Centric Image Segmentation Evaluation},
  author={Bowen Cheng and Ross Girshick and Piotr Doll{\\'a}r and Alexander C. Berg and Alexander Kirillov},
  booktitle={CVPR}, year={2021}}"""


class MeanIoU(evaluate.Metric):
    """Streaming mean IoU; the scores are those of `SegmentationCounts.scores`.

    Args:
        num_labels: Number of classes K; class ids are 0 to K - 1.
        ignore_index: References with this label are not counted.
        boundary_ratio: Distance from a contour, as a fraction of the image's diagonal, for the boundary IoU.
        **kwargs: Passed to `evaluate.Metric`.

    Raises:
        ValueError: If `num_process` is not 1: the counts of processes are added with `SegmentationCounts`.
    """

    def __init__(
        self, num_labels: int, ignore_index: int = 255, boundary_ratio: float = BOUNDARY_RATIO, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        if self.num_process != 1:
            raise ValueError(
                f"num_process is {self.num_process}; this metric counts in one process. Give each process its own "
                "SegmentationCounts and add them with +=."
            )
        self._settings = (num_labels, ignore_index, boundary_ratio)
        self.counts = SegmentationCounts(*self._settings)

    def _info(self) -> evaluate.MetricInfo:
        label_map = datasets.Sequence(datasets.Sequence(datasets.Value("int64")))
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation=_CITATION,
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": label_map, "references": label_map}),
            reference_urls=["https://arxiv.org/abs/2103.16562"],
        )

    def __len__(self) -> int:
        """Number of images counted since the last `compute`."""
        return self.counts.num_images

    def add(self, *, prediction: ArrayLike, reference: ArrayLike) -> None:  # type: ignore[override, unused-ignore]
        """Counts one image."""
        self.counts.update(_label_map(prediction), _label_map(reference))

    def add_batch(self, *, predictions: Sequence[ArrayLike], references: Sequence[ArrayLike]) -> None:
        """Counts a batch: a list of (H, W) maps, or one (B, H, W) array or tensor."""
        if len(predictions) != len(references):
            raise ValueError(
                f"{len(predictions)} predictions came with {len(references)} references; each needs its own. "
                "Pass as many of one as of the other."
            )
        for prediction, reference in zip(predictions, references, strict=True):
            self.add(prediction=prediction, reference=reference)

    def compute(
        self, *, predictions: Sequence[ArrayLike] | None = None, references: Sequence[ArrayLike] | None = None
    ) -> Scores:
        """Counts the batch, if one is given, and returns all scores; the next image starts a new count."""
        if predictions is not None or references is not None:
            self.add_batch(
                predictions=() if predictions is None else predictions,
                references=() if references is None else references,
            )
        if len(self) == 0:
            raise ValueError("no image was counted; a score needs at least one. Call add or add_batch first.")
        scores = self.counts.scores()
        self.counts = SegmentationCounts(*self._settings)
        return scores


def _label_map(labels: ArrayLike) -> np.ndarray:
    """An integer array (H, W) of what came."""
    array = np.asarray(labels)
    if array.ndim != 2 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(
            f"a label map of shape {array.shape} and type {array.dtype} came; it must be (H, W) and of integers. "
            "Take the arg-max over the classes first."
        )
    return array
