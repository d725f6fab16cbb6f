"""A result as the objects of other libraries; see the methods of `SegmentationResult`."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..extras import extra_package
from . import coco
from .regions import Regions

MAX_MASK_PIXELS = 2 * 10**9  # of all masks together, a byte each


def to_polygons(result: dict[str, Any], instances: bool) -> list[dict[str, Any]]:
    """See `SegmentationResult.to_polygons`."""
    labels, regions = result["labels"], Regions(result, instances)
    found = []
    for region in regions:
        left, top, right, bottom = region.xyxy
        found.append(
            {
                "id": labels.written_ids[region.class_index],
                "label": labels.class_names[region.class_index],
                "score": region.score,
                "area": region.area,
                "bbox": [left, top, right - left, bottom - top],
                "polygons": regions.outlines[region.number],
            }
        )
    return found


def to_coco(result: dict[str, Any], instances: bool, image_id: int, file_name: str) -> dict[str, Any]:
    """See `SegmentationResult.to_coco`."""
    labels, (height, width) = result["labels"], result["segmentation"].shape
    return {
        "images": [{"id": image_id, "file_name": file_name, "height": height, "width": width}],
        "categories": coco.categories(labels, instances),
        "annotations": [
            {"id": number, "image_id": image_id, **coco.annotation(region, labels, (height, width))}
            for number, region in enumerate(Regions(result, instances), start=1)
        ],
    }


def to_supervision(result: dict[str, Any], instances: bool) -> Any:
    """See `SegmentationResult.to_supervision`."""
    supervision = extra_package("supervision", "supervision")
    labels, regions = result["labels"], list(Regions(result, instances))
    shape = (len(regions), *result["segmentation"].shape)
    if np.prod(shape, dtype=np.int64) > MAX_MASK_PIXELS:
        raise ValueError(
            f"{shape[0]} masks of {shape[1]} x {shape[2]} pixels take {np.prod(shape, dtype=np.int64) / 1e9:.1f} GB; "
            "take fewer: instances=False, or cleaned(min_area=...)."
        )
    if not regions:
        return supervision.Detections.empty()
    masks = np.zeros(shape, bool)
    for mask, region in zip(masks, regions, strict=True):
        mask[region.box] = region.mask
    scores = None if regions[0].score is None else np.array([region.score for region in regions], np.float32)
    indices = [region.class_index for region in regions]
    return supervision.Detections(
        xyxy=np.array([region.xyxy for region in regions], np.float32),
        mask=masks,
        confidence=scores,
        class_id=np.array([labels.written_ids[index] for index in indices]),
        data={"class_name": np.array([labels.class_names[index] for index in indices])},
    )
