"""The shapes that the things of the picture book are made of: polygons with a material.

Coordinates are (x, y) in the thing's own box, from -1 to 1, x to the right and y down.
"""

from __future__ import annotations

from itertools import pairwise
from typing import NamedTuple

import numpy as np

# What a polygon is made of. BODY takes the thing's colour and pattern, SHADE and TINT are darker and lighter tones of
# the same colour, and the others have a colour of their own.
BODY, SHADE, TINT, INK, WHITE, GLASS, GOLD, WOOD, METAL, LEAF, FLAME = range(11)
MATERIAL_RGB = {
    INK: (28, 26, 32),
    WHITE: (246, 244, 238),
    GLASS: (176, 226, 240),
    GOLD: (250, 206, 60),
    WOOD: (122, 78, 42),
    METAL: (158, 162, 170),
    LEAF: (58, 140, 52),
    FLAME: (246, 118, 30),
}
CONTOUR_WIDTH = 0.06  # width of the ink line around a thing, in units of half its side


class Part(NamedTuple):
    """One polygon: the material and its corners, shape (corners, 2) as (x, y)."""

    material: int
    points: np.ndarray


def polygon(material: int, *corners: tuple[float, float]) -> Part:
    return Part(material, np.array(corners, dtype=np.float64))


def box(material: int, left: float, top: float, right: float, bottom: float) -> Part:
    return polygon(material, (left, top), (right, top), (right, bottom), (left, bottom))


def ellipse(
    material: int, x: float, y: float, rx: float, ry: float, start: float = 0, stop: float = 360, tilt: float = 0
) -> Part:
    """An ellipse, or the part of it between two angles (degrees, clockwise from the right), closed by a chord."""
    angle = np.radians(np.linspace(start, stop, 33 if stop - start >= 180 else 17))
    px, py = rx * np.cos(angle), ry * np.sin(angle)
    cos, sin = np.cos(np.radians(tilt)), np.sin(np.radians(tilt))
    return Part(material, np.stack([x + cos * px - sin * py, y + sin * px + cos * py], axis=1))


def arc(material: int, x: float, y: float, radius: float, width: float, start: float, stop: float) -> Part:
    """A band of constant width along a circle; a whole ring from 0 to 360 degrees."""
    angle = np.radians(np.linspace(start, stop, 25))
    rim = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = np.concatenate([rim * (radius + width / 2), rim[::-1] * (radius - width / 2)])
    return Part(material, points + np.array([x, y]))


def line(material: int, width: float, *corners: tuple[float, float]) -> list[Part]:
    """A line of a given width through the corners, one quadrilateral a stretch."""
    parts = []
    for begin, end in pairwise(corners):
        a, b = np.array(begin), np.array(end)
        along = (b - a) / np.linalg.norm(b - a)
        side = np.array([-along[1], along[0]]) * width / 2
        # Half a width longer at both ends, so that stretches meet without a notch.
        a, b = a - along * width / 2, b + along * width / 2
        parts.append(Part(material, np.stack([a + side, b + side, b - side, a - side])))
    return parts


def _grown(points: np.ndarray, width: float) -> np.ndarray:
    """Moves every corner of a polygon outwards by `width`, along the bisector of its two sides."""
    sides = np.roll(points, -1, axis=0) - points
    points = points[np.linalg.norm(sides, axis=1) > 1e-9]
    sides = np.roll(points, -1, axis=0) - points
    sides /= np.linalg.norm(sides, axis=1, keepdims=True)
    x, y = points.T
    clockwise = np.sum(x * np.roll(y, -1) - np.roll(x, -1) * y) > 0  # y points down
    normals = np.stack([sides[:, 1], -sides[:, 0]], axis=1) * (1 if clockwise else -1)
    bisectors = normals + np.roll(normals, 1, axis=0)
    # The mitre of a sharp corner is cut at 2.5 widths.
    bisectors *= np.minimum(2 / np.maximum((bisectors**2).sum(1), 1e-6), 2.5)[:, None]
    return points + width * bisectors


def with_contour(parts: list[Part]) -> tuple[Part, ...]:
    """Puts an ink copy of each large part, slightly grown, under the whole thing: only its outer rim stays visible."""
    large = [part for part in parts if np.ptp(part.points, axis=0).max() > 0.3]
    return tuple([Part(INK, _grown(part.points, CONTOUR_WIDTH)) for part in large] + parts)


def circle(radius: float, count: int, phase_deg: float = 0, x: float = 0, y: float = 0) -> list[tuple[float, float]]:
    angle = np.radians(np.arange(count) * 360 / count + phase_deg)
    return [(x + radius * float(np.cos(a)), y + radius * float(np.sin(a))) for a in angle]
