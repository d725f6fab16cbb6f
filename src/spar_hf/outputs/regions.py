"""Regions of a label map: connected components, small ones and holes taken away, and what is to know of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..extras import extra_package
from ..results_spar import NO_CLASS, segments_of
from .polygons import Polygon, polygons

BY_SIDES_AND_CORNERS = np.ones((3, 3), bool)


def components(segmentation: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected components of all classes; pixels hang together by their sides.

    Args:
        segmentation: (H, W) class ids, `NO_CLASS` for none.

    Returns:
        The number of each pixel's component (H, W), int32, -1 where there is no class; and the class of each (R),
        ascending.
    """
    ndimage = extra_package("scipy.ndimage", "results")
    numbers = np.full(segmentation.shape, -1, np.int32)
    classes: list[int] = []
    for index, box in _boxes(segmentation):
        found, count = ndimage.label(segmentation[box] == index)
        inside = found > 0
        numbers[box][inside] = found[inside] - 1 + len(classes)
        classes += [index] * count
    return numbers, np.array(classes, np.int64)


def _boxes(segmentation: np.ndarray) -> Iterator[tuple[int, tuple[slice, slice]]]:
    """Each class that occurs, and the smallest box around its pixels."""
    ndimage = extra_package("scipy.ndimage", "results")
    for index, box in enumerate(ndimage.find_objects(segmentation + 1)):
        if box is not None:
            yield index, box


def clean(
    segmentation: np.ndarray, min_area: int = 0, fill_holes: int = 0, background: int | None = None
) -> np.ndarray:
    """A label map without specks: first small components go, then small holes are filled.

    Args:
        segmentation: (H, W) class ids.
        min_area: components of fewer pixels become background.
        fill_holes: holes of a class of at most so many pixels, whatever is in them, become that class; of holes
            within holes the outermost of these counts.
        background: the class that is the background; None is `NO_CLASS`. It keeps its own specks and holes.

    Returns:
        (H, W), a new array.
    """
    ndimage = extra_package("scipy.ndimage", "results")
    nothing = NO_CLASS if background is None else background
    out = segmentation.copy()
    if min_area > 1:
        numbers, classes = components(segmentation)
        sizes = np.bincount(numbers[numbers >= 0], minlength=len(classes))
        small = np.append((sizes < min_area) & (classes != nothing), False)  # the last is that of number -1
        out[small[numbers]] = nothing
    holes = []
    for index, box in _boxes(out) if fill_holes > 0 else ():
        if index == nothing:
            continue
        # What is not the class hangs together by corners too, where the class does by its sides alone.
        others, _ = ndimage.label(np.pad(out[box] != index, 1, constant_values=True), BY_SIDES_AND_CORNERS)
        sizes = np.bincount(others.ravel())
        enclosed = (sizes <= fill_holes) & (np.arange(len(sizes)) > 1)  # 0 is the class, 1 the frame around it
        others = others[1:-1, 1:-1]
        for number, hole in enumerate(ndimage.find_objects(others), start=1):
            if hole is not None and enclosed[number]:
                y, x = (others[hole] == number).nonzero()
                top, left = box[0].start + hole[0].start, box[1].start + hole[1].start
                holes.append((len(y), index, (y + top, x + left)))
    for _, index, pixels in sorted(holes, key=lambda hole: hole[0]):
        out[pixels] = index
    return out


def cleaned(result: Any, min_area: int = 0, fill_holes: int = 0) -> Any:
    """A `SegmentationResult` with its label map as `clean` makes it; scores stay those of each pixel's best class."""
    if min_area <= 1 and fill_holes <= 0:
        return result
    labels = result["labels"]
    segmentation = clean(result["segmentation"], min_area, fill_holes, labels.background)
    segments = segments_of(segmentation, labels.class_names, result.get("scores"))
    return type(result)({**result, "segmentation": segmentation, "segments": segments})


@dataclass(frozen=True, eq=False)
class Region:
    """The pixels of a class, or one component of them.

    Attributes:
        number: in `Regions.numbers`.
        class_index: its class's position in the vocabulary.
        area: in pixels.
        score: the mean probability over its pixels; None where the result has no scores.
        box: rows and columns of the smallest box around it.
        mask: of the pixels in that box, bool.
    """

    number: int
    class_index: int
    area: int
    score: float | None
    box: tuple[slice, slice]
    mask: np.ndarray

    @property
    def xyxy(self) -> tuple[int, int, int, int]:
        """Left, top, right and bottom edge, in pixels."""
        rows, columns = self.box
        return columns.start, rows.start, columns.stop, rows.stop


class Regions:
    """The regions of a result: its classes, or with `instances` their components.

    Args:
        result: a `SegmentationResult`.
        instances: one region for each component; otherwise one for each class.
    """

    def __init__(self, result: dict[str, Any], instances: bool) -> None:
        self.segmentation: np.ndarray = result["segmentation"]
        self.scores: np.ndarray | None = result.get("scores")
        self.instances = instances

    @cached_property
    def _components(self) -> tuple[np.ndarray, np.ndarray]:
        return components(self.segmentation)

    @cached_property
    def numbers(self) -> np.ndarray:
        """(H, W) int32: the region of each pixel, -1 for none."""
        numbers, classes = self._components
        if self.instances:
            return numbers
        order = np.unique(classes, return_inverse=True)[1]
        return np.append(order, -1).astype(np.int32)[numbers]

    @cached_property
    def classes(self) -> np.ndarray:
        """(R): the class of each region."""
        classes = self._components[1]
        return classes if self.instances else np.unique(classes)

    def __len__(self) -> int:
        return len(self.classes)

    def __iter__(self) -> Iterator[Region]:
        ndimage = extra_package("scipy.ndimage", "results")
        inside = self.numbers >= 0
        areas = np.bincount(self.numbers[inside], minlength=len(self))
        sums = None if self.scores is None else np.bincount(self.numbers[inside], self.scores[inside], len(self))
        boxes = ndimage.find_objects(self.numbers + 1)
        for number, box in enumerate(boxes):
            score = None if sums is None else float(sums[number] / areas[number])
            mask = self.numbers[box] == number
            yield Region(number, int(self.classes[number]), int(areas[number]), score, box, mask)

    @cached_property
    def outlines(self) -> dict[int, list[Polygon]]:
        """The polygons of each region, one for each of its components."""
        numbers, classes = self._components
        traced = polygons(numbers)
        if self.instances:
            return {number: [traced[number]] for number in range(len(classes))}
        of_class: dict[int, list[Polygon]] = {}
        for number, region in enumerate(np.unique(classes, return_inverse=True)[1].tolist()):
            of_class.setdefault(region, []).append(traced[number])
        return of_class
