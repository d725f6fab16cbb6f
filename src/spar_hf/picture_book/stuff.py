"""The stuff of the picture book: procedural textures, functions of the place in the scene and not of the pixel.

A texture gets the coordinates of its points in units of the scene's shorter side, so that it is the same at any
resolution, and returns their colours. Each has structure both at the size of the scene and at a tenth of it, so that a
close-up still shows what it is.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

# A fixed table of uniform numbers, read by cell: one number per cell of a grid, the same at any resolution.
_CELLS = np.random.default_rng(7).random((64, 64), dtype=np.float32)

Texture = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _cell(row: np.ndarray, column: np.ndarray) -> np.ndarray:
    """A number in [0, 1) for every cell of a grid; the pattern repeats after 64 cells."""
    return _CELLS[row.astype(np.int32) & 63, column.astype(np.int32) & 63]


def pack(rgb: np.ndarray | tuple[int, int, int]) -> np.ndarray:
    """RGB colours (..., 3) as one 32-bit number each: red, green, blue, opaque. One number moves faster than three."""
    rgb = np.asarray(rgb).astype(np.uint8)
    return np.concatenate([rgb, np.full_like(rgb[..., :1], 255)], axis=-1).view(np.uint32)[..., 0]


def _mix(first: tuple[int, int, int], second: tuple[int, int, int], share: np.ndarray) -> np.ndarray:
    """Packed colours from `first` (share 0) to `second` (share 1). Shapes: (points,) -> (points,)."""
    ramp = pack(np.linspace(first, second, 256))
    return ramp[(np.clip(share, 0, 1) * 255).astype(np.uint8)]


def _sky(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    cloud = np.sin(7 * x + 1.5 * np.sin(6 * y)) + np.sin(13 * y + 1.2 * np.sin(9 * x)) + 0.3 * np.sin(31 * x + 23 * y)
    return _mix((112, 178, 240), (236, 244, 252), (cloud - 0.5) * 0.9)


def _grass(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    blade = np.sin(95 * x + 5 * np.sin(19 * y)) * np.sin(31 * y + 3 * np.sin(27 * x))
    return _mix((36, 112, 34), (126, 190, 58), 0.5 + 0.55 * blade)


def _sea(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    wave = np.sin(62 * y + 2.4 * np.sin(17 * x))
    colour = _mix((10, 66, 128), (38, 140, 176), 0.5 + 0.5 * wave)
    colour[(wave > 0.86) & (np.sin(23 * x + 11 * y) > 0)] = pack((150, 214, 226))
    return colour


def _sand(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    ripple = np.sin(34 * y + 3 * np.sin(8 * x))
    return _mix((206, 168, 104), (244, 218, 158), 0.45 + 0.2 * ripple + 0.5 * (_cell(72 * y, 72 * x) - 0.5))


def _brick(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    y = y * 14
    row = np.floor(y)
    x = x * 7 + 0.5 * (row % 2)
    column = np.floor(x)
    mortar = (y - row < 0.16) | (x - column < 0.08)
    colour = _mix((138, 48, 36), (196, 88, 58), _cell(row, column))
    colour[mortar] = pack((206, 196, 182))
    return colour


def _wood(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    x = x * 7
    plank = np.floor(x)
    shift = 6 * _cell(plank, plank * 3)
    grain = np.sin(9 * (x - plank) + 2.5 * np.sin(5 * y + 9 * shift) + shift) * np.sin(26 * (x - plank) + 3 * y)
    colour = _mix((126, 74, 34), (188, 126, 68), 0.5 + 0.4 * grain + 0.4 * (_cell(plank * 5, plank) - 0.5))
    colour[x - plank < 0.07] = pack((66, 36, 18))
    return colour


def _road(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    colour = _mix((58, 58, 62), (112, 112, 116), _cell(88 * y, 88 * x))
    dash = (np.abs((x * 2.6) % 1 - 0.5) < 0.07) & ((y * 4) % 1 < 0.6)
    colour[dash] = pack((240, 206, 70))
    return colour


def _snow(y: np.ndarray, x: np.ndarray) -> np.ndarray:
    drift = np.sin(9 * y + 2.5 * np.sin(5 * x)) + 0.5 * np.sin(21 * x + 6 * np.sin(7 * y))
    colour = _mix((206, 216, 236), (250, 252, 255), 0.55 + 0.35 * drift)
    # Flakes: a round spot in one cell of three.
    row, column = np.floor(y * 22), np.floor(x * 22)
    near = (y * 22 - row - 0.5) ** 2 + (x * 22 - column - 0.5) ** 2 < 0.06
    colour[near & (_cell(row, column) < 0.36)] = pack((150, 170, 214))
    return colour


STUFF: dict[tuple[str, ...], Texture] = {
    ("sky", "cloudy sky"): _sky,
    ("grass", "lawn", "meadow"): _grass,
    ("sea", "ocean", "water"): _sea,
    ("sand", "beach", "desert"): _sand,
    ("brick", "brick wall", "bricks"): _brick,
    ("wood", "planks", "wooden floor"): _wood,
    ("road", "asphalt", "street"): _road,
    ("snow", "snowy ground"): _snow,
}
