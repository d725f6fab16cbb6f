"""Visual prompts: an image changed so that CLIP looks at a region: blur or grey outside it, a red ellipse around it.

As OpenCV draws them for CaR (its `GaussianBlur`, `cvtColor` and `ellipse`), on bytes.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np

PROMPTS = ("blur", "grey", "circle")  # always applied in this order
BLUR_SIDE_PX = 15
RED = (255, 0, 0)


def prompted(image: np.ndarray, mask: np.ndarray, prompts: tuple[str, ...]) -> np.ndarray:
    """A copy of the image with prompts, some of `PROMPTS`.

    Args:
        image: (H, W, 3) uint8.
        mask: (H, W) bool; not empty.
        prompts: which.
    """
    image = image.copy()
    if "blur" in prompts:
        image = np.where(mask[..., None], image, blurred(image))
    if "grey" in prompts:
        # As theirs, which takes red for blue.
        grey = np.rint(image @ np.array([0.114, 0.587, 0.299])).astype(np.uint8)
        image = np.where(mask[..., None], image, grey[..., None])
    if "circle" in prompts:
        draw_ellipse(image, mask)
    return image


def blurred(image: np.ndarray) -> np.ndarray:
    """Gaussian blur of 15 x 15 pixels; its standard deviation is OpenCV's for that side, 2.6; borders mirrored.

    Weights are whole 256ths, what rounding leaves going to the next one, as OpenCV has them for bytes.
    """
    reach = BLUR_SIDE_PX // 2
    sigma = 0.3 * ((BLUR_SIDE_PX - 1) * 0.5 - 1) + 0.8
    exact = np.exp(-(np.arange(-reach, reach + 1) ** 2) / (2 * sigma**2))
    weights, left = [], 0.0
    for weight in 256 * exact[:reach] / exact.sum():
        weights.append(round(weight + left))
        left += weight - weights[-1]
    values = image.astype(np.int64)
    for axis in (0, 1):
        side = values.shape[axis]
        period = max(2 * (side - 1), 1)
        total = np.zeros_like(values)
        for shift in range(-reach, reach + 1):
            place = np.abs(np.arange(side) + shift) % period
            weight = 256 - 2 * sum(weights) if shift == 0 else weights[reach - abs(shift)]
            total += weight * values.take(np.minimum(place, period - place), axis=axis)
        values = total
    return ((values + 2**15) >> 16).astype(np.uint8)


def draw_ellipse(image: np.ndarray, mask: np.ndarray) -> None:
    """A red ellipse, one pixel wide, around the mean of a mask's pixels, half as wide and high as it, in place."""
    rows, columns = np.nonzero(mask)
    centre = (int(columns.mean()), int(rows.mean()))
    axes = ((np.ptp(columns) + 1) // 2, (np.ptp(rows) + 1) // 2)
    longest = max(axes)
    step = 90 if longest < 3 else 30 if longest < 10 else 18 if longest < 15 else 5  # degrees
    angles = [math.radians(min(angle, 360)) for angle in range(0, 360 + step, step)]
    points = [tuple(c + r * f(a) for c, r, f in zip(centre, axes, (math.cos, math.sin), strict=True)) for a in angles]
    height, width = mask.shape
    for start, end in pairwise(points):
        for x, y in line(start, end):
            if 0 <= x < width and 0 <= y < height:
                image[y, x] = RED


def line(start: tuple[float, ...], end: tuple[float, ...]) -> list[tuple[int, int]]:
    """The pixels (x, y) of a line: one for each step along its longer side."""
    (x0, y0), (x1, y1) = start, end
    if abs(x1 - x0) <= abs(y1 - y0):
        return [(x, y) for y, x in _along((y0, x0), (y1, x1))]
    return _along(start, end)


def _along(start: tuple[float, ...], end: tuple[float, ...]) -> list[tuple[int, int]]:
    (a0, b0), (a1, b1) = sorted((start, end))
    slope = (b1 - b0) / (a1 - a0) if a1 > a0 else 0.0
    first, count = math.floor(a0 + 0.5), int(a1 - a0) + 1
    steps = [(first + i, math.floor(b0 + 0.5 + i * slope)) for i in range(count)]
    return [*steps, (math.floor(a1 + 0.5), math.floor(b1 + 0.5))]
