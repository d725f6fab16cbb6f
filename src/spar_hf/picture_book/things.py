"""The things of the picture book: each a list of polygons with a material, in a box from -1 to 1 (x right, y down).

Every thing has its own silhouette and its own inner details, so that a close-up that shows a third of it still tells
what it is. The details are vector shapes like the silhouette: they grow with it and stay sharp.
"""

from __future__ import annotations

import numpy as np

from .shapes import (
    BODY,
    FLAME,
    GLASS,
    GOLD,
    INK,
    LEAF,
    METAL,
    SHADE,
    TINT,
    WHITE,
    WOOD,
    Part,
    arc,
    box,
    circle,
    ellipse,
    line,
    polygon,
    with_contour,
)


def _house() -> list[Part]:
    return [
        box(SHADE, 0.35, -0.95, 0.6, -0.4),
        box(BODY, -0.78, -0.2, 0.78, 0.92),
        polygon(SHADE, (-0.98, -0.15), (0, -0.95), (0.98, -0.15)),
        *line(TINT, 0.05, (-0.5, -0.42), (0.5, -0.42)),
        *line(TINT, 0.05, (-0.2, -0.66), (0.2, -0.66)),
        box(WOOD, -0.2, 0.3, 0.2, 0.92),
        ellipse(GOLD, 0.12, 0.62, 0.05, 0.05),
        *[
            part
            for x in (-0.48, 0.48)
            for part in (
                box(WHITE, x - 0.22, 0.02, x + 0.22, 0.46),
                box(GLASS, x - 0.17, 0.07, x + 0.17, 0.41),
                *line(WHITE, 0.05, (x, 0.05), (x, 0.43)),
                *line(WHITE, 0.05, (x - 0.19, 0.24), (x + 0.19, 0.24)),
            )
        ],
    ]


def _tree() -> list[Part]:
    leaves = [(-0.5, -0.1), (-0.2, -0.6), (0.25, -0.55), (0.5, 0.0), (0.0, -0.15), (-0.3, 0.18), (0.28, 0.22)]
    return [
        polygon(WOOD, (-0.15, 0.2), (0.15, 0.2), (0.28, 0.98), (-0.28, 0.98)),
        *line(INK, 0.04, (-0.02, 0.5), (-0.06, 0.9)),
        ellipse(BODY, -0.45, -0.05, 0.48, 0.45),
        ellipse(BODY, 0.45, 0.0, 0.48, 0.42),
        ellipse(BODY, 0.0, -0.45, 0.55, 0.5),
        ellipse(BODY, 0.0, 0.1, 0.5, 0.32),
        *[ellipse(LEAF, x, y, 0.15, 0.07, tilt=40) for x, y in leaves],
        *[ellipse(TINT, x + 0.2, y + 0.04, 0.11, 0.05, tilt=-40) for x, y in leaves[:5]],
    ]


def _car() -> list[Part]:
    wheels = [
        part
        for x in (-0.5, 0.5)
        for part in (
            ellipse(INK, x, 0.45, 0.27, 0.27),
            ellipse(METAL, x, 0.45, 0.14, 0.14),
            ellipse(INK, x, 0.45, 0.05, 0.05),
        )
    ]
    return [
        polygon(BODY, (-0.98, 0.42), (-0.95, 0.0), (-0.6, -0.08), (-0.38, -0.52), (0.36, -0.52), (0.62, -0.08),
                (0.95, 0.04), (0.98, 0.42)),
        polygon(GLASS, (-0.46, -0.06), (-0.3, -0.4), (-0.04, -0.4), (-0.04, -0.06)),
        polygon(GLASS, (0.06, -0.06), (0.06, -0.4), (0.28, -0.4), (0.46, -0.06)),
        *line(SHADE, 0.05, (0.01, 0.0), (0.01, 0.36)),
        *line(INK, 0.05, (0.1, 0.1), (0.24, 0.1)),
        ellipse(GOLD, 0.88, 0.16, 0.08, 0.1),
        ellipse(FLAME, -0.9, 0.14, 0.06, 0.1),
        *wheels,
    ]  # fmt: skip


def _boat() -> list[Part]:
    return [
        *line(WOOD, 0.09, (0.0, -0.92), (0.0, 0.3)),
        polygon(WHITE, (0.08, -0.88), (0.08, 0.22), (0.82, 0.22)),
        polygon(TINT, (-0.08, -0.7), (-0.08, 0.22), (-0.6, 0.22)),
        *line(METAL, 0.04, (0.1, -0.35), (0.4, -0.35)),
        *line(METAL, 0.04, (0.1, -0.05), (0.6, -0.05)),
        polygon(BODY, (-0.98, 0.32), (0.98, 0.32), (0.66, 0.9), (-0.66, 0.9)),
        polygon(SHADE, (-0.98, 0.32), (0.98, 0.32), (0.91, 0.44), (-0.91, 0.44)),
        *[
            part
            for x in (-0.42, 0, 0.42)
            for part in (ellipse(WHITE, x, 0.64, 0.12, 0.12), ellipse(INK, x, 0.64, 0.07, 0.07))
        ],
    ]


def _fish() -> list[Part]:
    return [
        polygon(SHADE, (-0.5, 0.0), (-0.98, -0.5), (-0.84, 0.0), (-0.98, 0.5)),
        polygon(SHADE, (-0.25, -0.4), (0.1, -0.78), (0.35, -0.4)),
        polygon(SHADE, (-0.1, 0.4), (0.0, 0.72), (0.25, 0.4)),
        ellipse(BODY, 0.14, 0.0, 0.8, 0.5),
        *[arc(TINT, x, y, 0.14, 0.05, 90, 270) for x in (-0.34, -0.1, 0.14) for y in (-0.22, 0.02, 0.26)],
        arc(INK, 0.08, 0.0, 0.4, 0.05, -45, 45),
        ellipse(WHITE, 0.7, -0.12, 0.12, 0.12),
        ellipse(INK, 0.73, -0.12, 0.06, 0.06),
        *line(INK, 0.05, (0.72, 0.2), (0.86, 0.14)),
    ]


def _flower() -> list[Part]:
    petals = circle(0.44, 6, 30, y=-0.3)
    return [
        *line(LEAF, 0.1, (0.0, 0.1), (0.0, 0.95)),
        ellipse(LEAF, -0.28, 0.6, 0.3, 0.13, tilt=30),
        ellipse(LEAF, 0.28, 0.74, 0.3, 0.13, tilt=-30),
        *[ellipse(BODY, x, y, 0.3, 0.21, tilt=30 + 60 * k) for k, (x, y) in enumerate(petals)],
        *[
            part
            for k in range(6)
            for part in line(SHADE, 0.04, circle(0.28, 6, 30, y=-0.3)[k], circle(0.58, 6, 30, y=-0.3)[k])
        ],
        ellipse(GOLD, 0.0, -0.3, 0.24, 0.24),
        *[ellipse(WOOD, x, y, 0.04, 0.04) for x, y in circle(0.13, 6, y=-0.3)],
    ]


def _star() -> list[Part]:
    tips, notches = circle(0.98, 5, -90), circle(0.44, 5, -54)
    outline = [corner for pair in zip(tips, notches, strict=True) for corner in pair]
    return [
        polygon(BODY, *outline),
        # One side of every ray in shade, as if folded.
        *[polygon(SHADE, (0, 0), tips[k], notches[k]) for k in range(5)],
        *[part for k in range(5) for part in line(TINT, 0.04, (0, 0), tips[k])],
    ]


def _balloon() -> list[Part]:
    return [
        *line(INK, 0.05, (0, 0.5), (0.12, 0.64), (-0.1, 0.8), (0.06, 0.96)),
        polygon(SHADE, (0, 0.36), (0.14, 0.54), (-0.14, 0.54)),
        ellipse(BODY, 0, -0.25, 0.64, 0.7),
        arc(WHITE, -0.02, -0.28, 0.46, 0.11, 190, 260),
        ellipse(WHITE, -0.45, -0.14, 0.07, 0.09),
        arc(SHADE, 0, -0.25, 0.5, 0.07, 0, 90),
        arc(SHADE, 0, -0.25, 0.34, 0.06, 10, 80),
    ]


def _moon() -> list[Part]:
    outer = np.radians(np.linspace(50, 310, 33))
    inner = np.radians(np.linspace(292, 68, 25))
    crescent = np.concatenate(
        [
            np.stack([0.9 * np.cos(outer) + 0.1, 0.95 * np.sin(outer)], axis=1),
            np.stack([0.72 * np.cos(inner) + 0.5, 0.78 * np.sin(inner)], axis=1),
        ]
    )
    craters = [(-0.5, -0.12, 0.14), (-0.28, 0.5, 0.12), (-0.12, -0.66, 0.11), (-0.62, 0.28, 0.08), (0.2, 0.76, 0.08)]
    return [
        Part(BODY, crescent),
        *[part for x, y, r in craters for part in (ellipse(SHADE, x, y, r, r), arc(TINT, x, y, r, 0.05, 30, 150))],
        ellipse(SHADE, -0.36, -0.44, 0.07, 0.07),
        ellipse(SHADE, 0.24, -0.76, 0.05, 0.05),
    ]


def _butterfly() -> list[Part]:
    wings = [
        part
        for side in (-1, 1)
        for part in (
            ellipse(BODY, side * 0.5, -0.32, 0.5, 0.42, tilt=side * -30),
            ellipse(SHADE, side * 0.4, 0.42, 0.38, 0.36, tilt=side * 30),
            ellipse(INK, side * 0.62, -0.4, 0.17, 0.17),
            ellipse(WHITE, side * 0.62, -0.4, 0.1, 0.1),
            ellipse(GOLD, side * 0.44, 0.46, 0.14, 0.14),
            ellipse(INK, side * 0.44, 0.46, 0.06, 0.06),
            ellipse(WHITE, side * 0.86, -0.14, 0.05, 0.05),
            *line(INK, 0.04, (side * 0.04, -0.4), (side * 0.2, -0.86)),
            ellipse(INK, side * 0.22, -0.88, 0.06, 0.06),
        )
    ]
    return [
        *wings,
        ellipse(INK, 0, 0.02, 0.1, 0.62),
        *[box(FLAME, -0.09, y, 0.09, y + 0.07) for y in (-0.1, 0.1, 0.3)],
    ]


def _mushroom() -> list[Part]:
    return [
        polygon(WHITE, (-0.26, 0.1), (0.26, 0.1), (0.34, 0.92), (-0.34, 0.92)),
        *[part for x in (-0.1, 0.1) for part in line(METAL, 0.04, (x, 0.4), (x * 1.3, 0.84))],
        ellipse(SHADE, 0, 0.12, 0.94, 0.2),
        *[part for x in (-0.6, -0.36, 0.36, 0.6) for part in line(INK, 0.03, (x * 0.7, 0.14), (x, 0.24))],
        ellipse(BODY, 0, 0.12, 0.96, 1.0, 180, 360),
        *[
            ellipse(WHITE, x, y, r, r * 0.85)
            for x, y, r in ((-0.48, -0.22, 0.17), (0.06, -0.52, 0.19), (0.52, -0.2, 0.16), (-0.04, -0.06, 0.11))
        ],
    ]


def _umbrella() -> list[Part]:
    return [
        *line(METAL, 0.08, (0, -0.95), (0, 0.75)),
        arc(WOOD, 0.17, 0.72, 0.17, 0.11, 0, 180),
        # The edge hangs down in four bows, one a panel.
        *[ellipse(m, x, -0.02, 0.24, 0.14) for x, m in ((-0.72, BODY), (-0.24, SHADE), (0.24, BODY), (0.72, SHADE))],
        ellipse(BODY, 0, 0, 0.96, 0.86, 180, 360),
        polygon(SHADE, (0, -0.86), (-0.3, -0.5), (-0.48, 0), (0, 0)),
        Part(SHADE, np.concatenate([[(0.48, 0), (0.3, -0.5)], ellipse(SHADE, 0, 0, 0.96, 0.86, 270, 360).points])),
        *[part for s in (-1, 1) for part in line(INK, 0.035, (0, -0.84), (s * 0.3, -0.5), (s * 0.48, 0.02))],
        *line(INK, 0.035, (0, -0.84), (0, 0.02)),
    ]


def _apple() -> list[Part]:
    angle = np.radians(np.linspace(0, 360, 41))
    radius = 0.78 * (1 - 0.22 * np.exp(-(((angle - np.radians(270)) / 0.35) ** 2)))
    return [
        *line(WOOD, 0.1, (0.0, -0.45), (0.1, -0.9)),
        Part(BODY, np.stack([radius * np.cos(angle) * 1.05, 0.15 + radius * np.sin(angle)], axis=1)),
        ellipse(LEAF, 0.4, -0.74, 0.3, 0.14, tilt=-25),
        *line(WHITE, 0.03, (0.2, -0.66), (0.58, -0.82)),
        ellipse(WHITE, -0.42, -0.08, 0.1, 0.2, tilt=25),
        arc(SHADE, 0, 0.15, 0.58, 0.1, 10, 100),
        ellipse(SHADE, 0.0, -0.38, 0.24, 0.08),
        *[ellipse(GOLD, x, y, 0.035, 0.05)
          for x, y in ((0.0, 0.2), (0.22, 0.0), (-0.18, 0.44), (0.14, 0.52), (0.4, 0.24))],
    ]  # fmt: skip


def _cat() -> list[Part]:
    return [
        polygon(BODY, (-0.84, -0.1), (-0.82, -0.95), (-0.2, -0.5)),
        polygon(BODY, (0.84, -0.1), (0.82, -0.95), (0.2, -0.5)),
        ellipse(BODY, 0, 0.12, 0.9, 0.76),
        polygon(FLAME, (-0.7, -0.4), (-0.7, -0.76), (-0.42, -0.52)),
        polygon(FLAME, (0.7, -0.4), (0.7, -0.76), (0.42, -0.52)),
        *[part for x in (-0.14, 0, 0.14) for part in line(INK, 0.05, (x, -0.54), (x, -0.34))],
        *[
            part
            for x in (-0.36, 0.36)
            for part in (ellipse(GOLD, x, -0.04, 0.18, 0.16), ellipse(INK, x, -0.04, 0.05, 0.14))
        ],
        ellipse(WHITE, -0.16, 0.44, 0.2, 0.17),
        ellipse(WHITE, 0.16, 0.44, 0.2, 0.17),
        polygon(INK, (-0.1, 0.24), (0.1, 0.24), (0, 0.36)),
        *[part for s in (-1, 1) for y in (0.3, 0.44, 0.58)
          for part in line(INK, 0.035, (s * 0.3, 0.42), (s * 0.84, y - 0.04))],
    ]  # fmt: skip


def _bird() -> list[Part]:
    return [
        *line(FLAME, 0.06, (-0.1, 0.5), (-0.14, 0.92), (0.04, 0.92)),
        *line(FLAME, 0.06, (0.14, 0.5), (0.12, 0.92), (0.3, 0.92)),
        polygon(SHADE, (-0.4, 0.0), (-0.98, -0.28), (-0.98, 0.1), (-0.4, 0.35)),
        ellipse(BODY, -0.02, 0.16, 0.62, 0.46),
        ellipse(BODY, 0.46, -0.38, 0.36, 0.36),
        polygon(GOLD, (0.74, -0.5), (0.99, -0.36), (0.74, -0.24)),
        ellipse(WHITE, 0.54, -0.44, 0.11, 0.11),
        ellipse(INK, 0.57, -0.44, 0.06, 0.06),
        ellipse(WHITE, 0.26, 0.3, 0.22, 0.24),
        ellipse(SHADE, -0.16, 0.1, 0.4, 0.24, tilt=15),
        *[arc(TINT, x, 0.1, 0.13, 0.05, 20, 160) for x in (-0.4, -0.16, 0.08)],
    ]


def _clock() -> list[Part]:
    ticks, inner = circle(0.54, 12, y=0.08), circle(0.44, 12, y=0.08)
    return [
        ellipse(SHADE, -0.52, -0.66, 0.3, 0.22, tilt=-40),
        ellipse(SHADE, 0.52, -0.66, 0.3, 0.22, tilt=40),
        *line(METAL, 0.12, (-0.5, 0.7), (-0.66, 0.94)),
        *line(METAL, 0.12, (0.5, 0.7), (0.66, 0.94)),
        ellipse(BODY, 0, 0.08, 0.84, 0.84),
        ellipse(WHITE, 0, 0.08, 0.62, 0.62),
        *[part for a, b in zip(ticks, inner, strict=True) for part in line(INK, 0.05, a, b)],
        *line(INK, 0.08, (0, 0.08), (0, -0.28)),
        *line(FLAME, 0.07, (0, 0.08), (0.26, 0.2)),
        ellipse(INK, 0, 0.08, 0.07, 0.07),
    ]


def _cup() -> list[Part]:
    return [
        arc(SHADE, 0.6, 0.1, 0.26, 0.14, -90, 90),
        ellipse(TINT, -0.05, 0.84, 0.92, 0.14),
        polygon(BODY, (-0.72, -0.4), (0.62, -0.4), (0.44, 0.8), (-0.54, 0.8)),
        polygon(SHADE, (-0.7, -0.28), (0.6, -0.28), (0.57, -0.14), (-0.68, -0.14)),
        ellipse(TINT, -0.05, -0.4, 0.67, 0.16),
        ellipse(WOOD, -0.05, -0.39, 0.56, 0.1),
        # A heart on its side, and steam.
        ellipse(WHITE, -0.15, 0.2, 0.12, 0.12),
        ellipse(WHITE, 0.07, 0.2, 0.12, 0.12),
        polygon(WHITE, (-0.26, 0.24), (0.18, 0.24), (-0.04, 0.52)),
        *line(METAL, 0.06, (-0.28, -0.62), (-0.2, -0.74), (-0.3, -0.94)),
        *line(METAL, 0.06, (0.08, -0.62), (0.16, -0.74), (0.06, -0.94)),
    ]


def _kite() -> list[Part]:
    return [
        *line(INK, 0.04, (0, 0.5), (0.14, 0.66), (-0.08, 0.8), (0.1, 0.96)),
        *[part for x, y in ((0.12, 0.66), (-0.06, 0.82))
          for part in (polygon(FLAME, (x, y), (x - 0.2, y - 0.09), (x - 0.2, y + 0.09)),
                       polygon(FLAME, (x, y), (x + 0.2, y - 0.09), (x + 0.2, y + 0.09)))],
        polygon(BODY, (0, -0.98), (-0.76, -0.3), (0, 0.54), (0.76, -0.3)),
        polygon(SHADE, (0, -0.98), (0.76, -0.3), (0, -0.3)),
        polygon(SHADE, (0, 0.54), (-0.76, -0.3), (0, -0.3)),
        *line(WOOD, 0.06, (0, -0.94), (0, 0.5)),
        *line(WOOD, 0.06, (-0.72, -0.3), (0.72, -0.3)),
        *line(GOLD, 0.04, (-0.4, -0.42), (0, -0.78), (0.4, -0.42)),
        *line(GOLD, 0.04, (-0.38, -0.16), (0, 0.26), (0.38, -0.16)),
    ]  # fmt: skip


def _rocket() -> list[Part]:
    return [
        polygon(FLAME, (-0.26, 0.6), (0.26, 0.6), (0.12, 0.8), (0, 0.99), (-0.12, 0.8)),
        polygon(GOLD, (-0.12, 0.6), (0.12, 0.6), (0, 0.84)),
        polygon(SHADE, (-0.3, 0.1), (-0.74, 0.52), (-0.74, 0.84), (-0.3, 0.58)),
        polygon(SHADE, (0.3, 0.1), (0.74, 0.52), (0.74, 0.84), (0.3, 0.58)),
        polygon(BODY, (0, -0.98), (0.2, -0.74), (0.36, -0.4), (0.4, 0.1), (0.34, 0.64), (-0.34, 0.64), (-0.4, 0.1),
                (-0.36, -0.4), (-0.2, -0.74)),
        polygon(SHADE, (0, -0.98), (0.2, -0.74), (0.3, -0.54), (-0.3, -0.54), (-0.2, -0.74)),
        ellipse(METAL, 0, -0.18, 0.22, 0.22),
        ellipse(GLASS, 0, -0.18, 0.15, 0.15),
        *line(WHITE, 0.04, (-0.06, -0.2), (0.02, -0.28)),
        *[ellipse(INK, x, 0.3, 0.035, 0.035) for x in (-0.26, -0.13, 0, 0.13, 0.26)],
        *line(SHADE, 0.07, (-0.34, 0.46), (0.34, 0.46)),
    ]  # fmt: skip


def _cake() -> list[Part]:
    return [
        ellipse(METAL, 0, 0.84, 0.98, 0.12),
        box(BODY, -0.84, 0.18, 0.84, 0.82),
        box(BODY, -0.54, -0.34, 0.54, 0.18),
        # Icing that runs down in drops.
        box(WHITE, -0.84, 0.18, 0.84, 0.3),
        *[ellipse(WHITE, x, 0.3, 0.12, 0.13) for x in (-0.72, -0.36, 0.0, 0.36, 0.72)],
        box(WHITE, -0.54, -0.34, 0.54, -0.24),
        *[ellipse(WHITE, x, -0.24, 0.1, 0.12) for x in (-0.42, -0.14, 0.14, 0.42)],
        *[part for x in (-0.32, 0, 0.32) for part in (
            box(TINT, x - 0.05, -0.7, x + 0.05, -0.34), ellipse(FLAME, x, -0.8, 0.07, 0.12),
            ellipse(GOLD, x, -0.77, 0.03, 0.06))],
        *line(SHADE, 0.08, (-0.8, 0.66), (0.8, 0.66)),
        *[ellipse(FLAME, x, 0.66, 0.06, 0.06) for x in (-0.6, -0.2, 0.2, 0.6)],
    ]  # fmt: skip


def _crown() -> list[Part]:
    jewels = [(-0.5, GLASS), (0.0, FLAME), (0.5, GLASS)]
    return [
        polygon(BODY, (-0.8, 0.75), (-0.95, -0.45), (-0.45, 0.05), (0, -0.72), (0.45, 0.05), (0.95, -0.45),
                (0.8, 0.75)),
        *[ellipse(GOLD, x, y, 0.12, 0.12) for x, y in ((-0.93, -0.52), (0, -0.78), (0.93, -0.52))],
        polygon(SHADE, (-0.82, 0.4), (0.82, 0.4), (0.8, 0.75), (-0.8, 0.75)),
        *line(GOLD, 0.06, (-0.8, 0.4), (0.8, 0.4)),
        *line(GOLD, 0.06, (-0.78, 0.74), (0.78, 0.74)),
        *[polygon(m, (x, 0.44), (x + 0.12, 0.57), (x, 0.7), (x - 0.12, 0.57)) for x, m in jewels],
        *[polygon(TINT, (x, y - 0.16), (x + 0.09, y), (x, y + 0.16), (x - 0.09, y))
          for x, y in ((-0.62, 0.14), (0, -0.12), (0.62, 0.14))],
    ]  # fmt: skip


def _snail() -> list[Part]:
    return [
        polygon(WOOD, (-0.95, 0.82), (-0.5, 0.5), (0.45, 0.5), (0.55, -0.1), (0.9, -0.14), (0.96, 0.2), (0.8, 0.82)),
        *line(WOOD, 0.07, (0.64, -0.1), (0.54, -0.52)),
        *line(WOOD, 0.07, (0.82, -0.1), (0.92, -0.5)),
        ellipse(INK, 0.53, -0.56, 0.09, 0.09),
        ellipse(INK, 0.93, -0.54, 0.09, 0.09),
        ellipse(INK, 0.8, 0.06, 0.05, 0.05),
        ellipse(BODY, -0.18, 0.0, 0.66, 0.64),
        # The spiral: half circles that shrink.
        arc(SHADE, -0.18, 0.0, 0.5, 0.1, 180, 360),
        arc(SHADE, -0.1, 0.0, 0.42, 0.1, 0, 180),
        arc(SHADE, -0.18, 0.0, 0.34, 0.1, 180, 360),
        arc(SHADE, -0.1, 0.0, 0.26, 0.1, 0, 180),
        arc(SHADE, -0.17, 0.0, 0.19, 0.1, 180, 360),
        ellipse(TINT, -0.13, 0.02, 0.1, 0.1),
    ]


def _turtle() -> list[Part]:
    hexagon = circle(0.24, 6, 0, y=0.0)
    rim = circle(0.58, 6, 0, y=0.0)
    return [
        *[ellipse(LEAF, x * 0.56, y * 0.5, 0.26, 0.17, tilt=t)
          for x, y, t in ((-1, -1, 45), (1, -1, -45), (-1, 1, -45), (1, 1, 45))],
        ellipse(LEAF, 0.78, 0.0, 0.22, 0.18),
        polygon(LEAF, (-0.6, -0.08), (-0.94, 0.0), (-0.6, 0.08)),
        ellipse(INK, 0.88, -0.07, 0.04, 0.04),
        ellipse(INK, 0.88, 0.07, 0.04, 0.04),
        ellipse(BODY, 0, 0, 0.68, 0.6),
        polygon(TINT, *hexagon),
        *[part for a, b in zip(hexagon, [*hexagon[1:], hexagon[0]], strict=True) for part in line(SHADE, 0.06, a, b)],
        *[part for a, (x, y) in zip(hexagon, rim, strict=True) for part in line(SHADE, 0.06, a, (x, y * 0.9))],
    ]  # fmt: skip


def _robot() -> list[Part]:
    return [
        *line(METAL, 0.06, (0, -0.7), (0, -0.9)),
        ellipse(FLAME, 0, -0.92, 0.08, 0.08),
        box(METAL, -0.95, -0.02, -0.6, 0.14),
        box(METAL, 0.6, -0.02, 0.95, 0.14),
        box(METAL, -0.42, 0.6, -0.14, 0.96),
        box(METAL, 0.14, 0.6, 0.42, 0.96),
        box(BODY, -0.62, -0.04, 0.62, 0.7),
        box(BODY, -0.5, -0.74, 0.5, -0.1),
        *[part for x in (-0.22, 0.22)
          for part in (box(WHITE, x - 0.15, -0.62, x + 0.15, -0.38), box(INK, x - 0.06, -0.57, x + 0.06, -0.43))],
        box(INK, -0.28, -0.3, 0.28, -0.18),
        *[box(WHITE, x, -0.28, x + 0.07, -0.2) for x in (-0.24, -0.1, 0.04, 0.18)],
        box(SHADE, -0.42, 0.1, 0.42, 0.54),
        *[ellipse(m, x, 0.24, 0.08, 0.08) for x, m in ((-0.26, FLAME), (0.0, GOLD), (0.26, GLASS))],
        *line(TINT, 0.06, (-0.3, 0.44), (0.3, 0.44)),
    ]  # fmt: skip


# The first name of a class is the one that captions of the test scenes use; all are valid labels.
THINGS: dict[tuple[str, ...], tuple[Part, ...]] = {
    names: with_contour(draw())
    for names, draw in (
        (("house", "home", "cottage"), _house),
        (("tree", "oak tree", "leafy tree"), _tree),
        (("car", "automobile", "motor car"), _car),
        (("boat", "sailing boat", "ship"), _boat),
        (("fish", "swimming fish"), _fish),
        (("flower", "blossom", "bloom"), _flower),
        (("star", "five-pointed star"), _star),
        (("balloon", "party balloon"), _balloon),
        (("moon", "crescent", "half moon"), _moon),
        (("butterfly", "moth"), _butterfly),
        (("mushroom", "toadstool"), _mushroom),
        (("umbrella", "parasol"), _umbrella),
        (("apple", "fruit"), _apple),
        (("cat", "kitten", "kitty"), _cat),
        (("bird", "songbird"), _bird),
        (("clock", "alarm clock"), _clock),
        (("cup", "mug", "teacup"), _cup),
        (("kite", "toy kite"), _kite),
        (("rocket", "spaceship"), _rocket),
        (("cake", "birthday cake"), _cake),
        (("crown", "royal crown"), _crown),
        (("snail", "garden snail"), _snail),
        (("turtle", "tortoise"), _turtle),
        (("robot", "android"), _robot),
    )
}
