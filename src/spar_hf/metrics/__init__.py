"""Streaming scores of semantic segmentation; `mean_iou.MeanIoU` wraps them for the evaluate library."""

from .counts import BOUNDARY_RATIO, ConfusionMatrix, Scores, SegmentationCounts, boundary_region

__all__ = ["BOUNDARY_RATIO", "ConfusionMatrix", "Scores", "SegmentationCounts", "boundary_region"]
