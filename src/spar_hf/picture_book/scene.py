"""One scene of the picture book: decided by a random generator, drawn at any size or as a close-up.

Places and sizes are in units of the scene's shorter side: at another size it is the same scene, sharper.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from .shapes import BODY, MATERIAL_RGB, SHADE, TINT
from .stuff import STUFF, pack
from .things import THINGS

# The vocabulary: the ids of a mask index it, things first, then stuff; each class with its synonyms.
CLASSES: tuple[tuple[str, ...], ...] = (*THINGS, *STUFF)
NUM_THINGS = len(THINGS)
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (214, 36, 40),
    "orange": (244, 134, 28),
    "yellow": (248, 220, 48),
    "green": (52, 168, 66),
    "blue": (36, 88, 214),
    "purple": (132, 54, 178),
    "pink": (246, 138, 186),
    "brown": (134, 82, 44),
    "white": (240, 240, 240),
}
PATTERNS = ("plain", "striped", "dotted", "checked")
# (class, colour) pairs that only test scenes show: one colour of nine for each thing, spread evenly over the colours.
HELD_OUT = frozenset((thing, (4 * thing + 1) % len(COLOURS)) for thing in range(NUM_THINGS))

_SUPERSAMPLE = 2  # a pixel is the mean of 2 x 2 samples; its class is the one that most of them show
_IDS_PER_THING = 16  # ids on the canvas: 0 is not painted yet, then 16 for each thing, one a material
_FIRST_STUFF_ID = 128  # then one for each class of stuff
COLOUR_NAMES = tuple(COLOURS)
_COLOUR_RGB = np.array(list(COLOURS.values()), dtype=np.float32)
_PARTS = list(THINGS.values())
_CORNERS = [np.concatenate([part.points for part in parts]) for parts in _PARTS]
_BOUNDS = [np.cumsum([0] + [len(part.points) for part in parts]) for parts in _PARTS]
_TEXTURES = list(STUFF.values())


@dataclass(frozen=True)
class Placement:
    """One thing of a scene before it is drawn. Places and sizes are in units of the picture's shorter side."""

    class_id: int
    colour_id: int
    pattern_id: int
    centre_yx: tuple[float, float]
    half_side: float
    angle_rad: float
    flip: bool
    pattern_angle_rad: float

    def to_scene(self) -> np.ndarray:
        """The 2 x 2 matrix from the thing's own (x, y), -1 to 1, to (x, y) in the scene."""
        cos, sin = np.cos(self.angle_rad), np.sin(self.angle_rad)
        return self.half_side * np.array([[cos, -sin], [sin, cos]]) @ np.diag([-1.0 if self.flip else 1.0, 1.0])

    def phrase(self) -> str:
        """Colour, pattern and name: "red striped house"; a plain pattern goes without saying."""
        pattern = "" if self.pattern_id == 0 else PATTERNS[self.pattern_id] + " "
        return f"{pattern}{COLOUR_NAMES[self.colour_id]} {CLASSES[self.class_id][0]}"


@dataclass(frozen=True)
class Drawing:
    """What `Sketch.draw` returns; `owner` holds, for every pixel, 1 + the number of the thing it shows, or 0."""

    image: np.ndarray
    mask: np.ndarray
    owner: np.ndarray


class Sketch:
    """A scene decided but not drawn: things, stuff, light, all from one random generator.

    Args:
        rng: Decides everything.
        extent_hw: Height and width of the scene in units of the shorter side, so that the smaller one is 1.
        held_out_share: Chance that a thing takes the colour that its class never has in training.
    """

    def __init__(self, rng: np.random.Generator, extent_hw: tuple[float, float], held_out_share: float = 0.0) -> None:
        self.extent_hw = extent_hw
        self.placements = self._place_things(rng, held_out_share)
        self.stuff_ids = rng.choice(len(STUFF), size=rng.choice([2, 3, 4], p=[0.4, 0.4, 0.2]), replace=False)
        self._decide_ground(rng)
        self._decide_light(rng)

    def _place_things(self, rng: np.random.Generator, held_out_share: float) -> list[Placement]:
        extent = np.array(self.extent_hw)
        count = int(rng.choice([2, 3, 4, 5], p=[0.35, 0.35, 0.2, 0.1]))
        largest = {2: 0.36, 3: 0.33, 4: 0.29, 5: 0.26}[count]
        half_sides = np.sort(rng.uniform(0.18, largest, count))[::-1]  # the smallest lies on top
        centres: list[np.ndarray] = []
        placements = []
        for class_id, half_side in zip(rng.choice(NUM_THINGS, count, replace=False), half_sides, strict=True):
            # The best of some places: things overlap, but seldom hide one another.
            tries = rng.uniform(0.14, 0.86, (12, 2)) * extent
            if centres:
                gaps = np.linalg.norm(tries[:, None] - np.array(centres)[None], axis=2).min(axis=1)
                tries = tries[np.argsort(np.maximum(0.5 - gaps, 0), kind="stable")]
            centres.append(tries[0])
            colour_id = int(rng.integers(len(COLOURS)))
            unseen = next(colour for thing, colour in HELD_OUT if thing == class_id)
            if rng.random() < held_out_share:
                colour_id = unseen
            elif colour_id == unseen:
                colour_id = (colour_id + int(rng.integers(1, len(COLOURS)))) % len(COLOURS)
            placements.append(
                Placement(
                    class_id=int(class_id),
                    colour_id=colour_id,
                    pattern_id=int(rng.choice(len(PATTERNS), p=[0.4, 0.2, 0.2, 0.2])),
                    centre_yx=(float(tries[0][0]), float(tries[0][1])),
                    half_side=float(half_side),
                    angle_rad=float(rng.normal(0, 0.3)),
                    flip=bool(rng.random() < 0.5),
                    pattern_angle_rad=float(rng.uniform(0, np.pi)),
                )
            )
        return placements

    def _decide_ground(self, rng: np.random.Generator) -> None:
        """Bands with wavy, slanted borders; the last stuff is sometimes a patch instead of a band."""
        count = len(self.stuff_ids)
        self.patch: tuple[float, ...] | None = None
        if rng.random() < (0.35 if count == 2 else 0.6):
            count -= 1
            self.patch = (
                *(rng.uniform(0.15, 0.85, 2) * self.extent_hw),
                *rng.uniform(0.3, 0.5, 2),
                rng.uniform(0.1, 0.4),
                rng.uniform(2, 5),
                rng.uniform(0, 2 * np.pi),
            )
        self.band_angle_rad = rng.normal(0, 0.35) + (np.pi / 2 if rng.random() < 0.3 else 0.0)
        fractions = rng.uniform(0.7, 1.3, count)
        self.band_cuts = np.cumsum(fractions / fractions.sum())[:-1]
        self.wave = (rng.uniform(0, 0.06), rng.uniform(4, 14), rng.uniform(0, 2 * np.pi))
        self.texture_angle_rad = rng.normal(0, 0.15, len(self.stuff_ids))
        self.texture_shift_yx = rng.uniform(0, 20, (len(self.stuff_ids), 2))

    def _decide_light(self, rng: np.random.Generator) -> None:
        self.brightness = rng.uniform(0.75, 1.1)
        self.cast = rng.normal(1, 0.04, 3)
        self.slope_yx = rng.uniform(-0.2, 0.2, 2)
        self.grain = rng.uniform(0, 6)
        self.grain_seed = int(rng.integers(2**31))

    def caption(self, visible: list[int] | None = None) -> str:
        """Names the things (all, or those numbered in `visible`) and the stuff, with the first name of each class."""
        numbers = range(len(self.placements)) if visible is None else visible
        things = " and ".join(f"a {self.placements[number].phrase()}" for number in numbers).replace(
            "a orange", "an orange"
        )
        ground = " and ".join(CLASSES[NUM_THINGS + int(stuff)][0] for stuff in self.stuff_ids)
        return f"{things} on {ground}" if things else ground

    def draw(
        self,
        height_px: int,
        width_px: int,
        origin_yx: tuple[float, float] = (0.0, 0.0),
        px_per_unit: float | None = None,
    ) -> Drawing:
        """Draws the scene, or a part of it as a close-up.

        Args:
            height_px: Height of the picture.
            width_px: Width of the picture.
            origin_yx: The point of the scene at the top left corner, in units of the scene's shorter side.
            px_per_unit: Pixels for the scene's shorter side; the shorter side of the picture when None.
        """
        scale = float(min(height_px, width_px) if px_per_unit is None else px_per_unit)
        rows, columns = height_px * _SUPERSAMPLE, width_px * _SUPERSAMPLE
        y = (np.arange(rows, dtype=np.float32) + 0.5) / (_SUPERSAMPLE * scale) + np.float32(origin_yx[0])
        x = (np.arange(columns, dtype=np.float32) + 0.5) / (_SUPERSAMPLE * scale) + np.float32(origin_yx[1])

        canvas = Image.new("L", (columns, rows))
        pen = ImageDraw.Draw(canvas)
        materials = np.zeros(256, dtype=np.uint32)  # packed colours
        classes = np.zeros(256, dtype=np.uint8)
        owners = np.zeros(256, dtype=np.uint8)  # by class: the things of a scene are of different classes
        classes[_FIRST_STUFF_ID : _FIRST_STUFF_ID + len(STUFF)] = range(NUM_THINGS, len(CLASSES))
        for number, thing in enumerate(self.placements):
            first = 1 + number * _IDS_PER_THING
            materials[first : first + _IDS_PER_THING] = _palette(thing)
            classes[first : first + _IDS_PER_THING] = thing.class_id
            owners[thing.class_id] = number + 1
            corners = _CORNERS[thing.class_id] @ thing.to_scene().T + thing.centre_yx[::-1]
            corners = (corners - origin_yx[::-1]) * (scale * _SUPERSAMPLE)
            bounds = _BOUNDS[thing.class_id]
            for part, begin, end in zip(_PARTS[thing.class_id], bounds[:-1], bounds[1:], strict=True):
                pen.polygon(corners[begin:end].ravel().tolist(), fill=first + part.material)
        ids = np.array(canvas)

        colour = materials[ids]  # (rows, columns)
        for number, thing in enumerate(self.placements):
            self._add_pattern(colour, ids, thing, 1 + number * _IDS_PER_THING, y, x)
        self._paint_ground(colour, ids, y, x)

        rgba = colour.view(np.uint8).reshape(rows, columns, 4)
        image = np.asarray(Image.fromarray(rgba).reduce(_SUPERSAMPLE))[..., :3]
        mask = _majority(classes[ids])
        return Drawing(self._light(image, y[::_SUPERSAMPLE], x[::_SUPERSAMPLE]), mask, owners[mask])

    def _add_pattern(
        self, colour: np.ndarray, ids: np.ndarray, thing: Placement, first: int, y: np.ndarray, x: np.ndarray
    ) -> None:
        """Paints the pattern on the body of a thing, in the thing's own coordinates. Changes `colour` in place."""
        if thing.pattern_id == 0:
            return
        rows, columns = np.nonzero(ids == first + BODY)
        cos, sin = np.cos(thing.pattern_angle_rad), np.sin(thing.pattern_angle_rad)
        to_pattern = np.array([[cos, -sin], [sin, cos]]) @ np.linalg.inv(thing.to_scene())
        (a, b), (c, d) = to_pattern.astype(np.float32)
        px, py = x[columns] - np.float32(thing.centre_yx[1]), y[rows] - np.float32(thing.centre_yx[0])
        u, v = a * px + b * py, c * px + d * py
        if PATTERNS[thing.pattern_id] == "striped":
            marked = (u * 3.2) % 1 < 0.45
        elif PATTERNS[thing.pattern_id] == "dotted":
            marked = ((u * 3.6) % 1 - 0.5) ** 2 + ((v * 3.6) % 1 - 0.5) ** 2 < 0.085
        else:
            marked = ((u * 3.4) % 2 < 1) ^ ((v * 3.4) % 2 < 1)
        colour[rows[marked], columns[marked]] = _second_colour(thing.colour_id)

    def _paint_ground(self, colour: np.ndarray, ids: np.ndarray, y: np.ndarray, x: np.ndarray) -> None:
        """Paints every point that no thing covers and gives it the id of its stuff. Changes both arrays in place."""
        height, width = self.extent_hw
        down, right = (y - np.float32(height / 2))[:, None], (x - np.float32(width / 2))[None]
        cos, sin = float(np.cos(self.band_angle_rad)), float(np.sin(self.band_angle_rad))
        span = height * abs(cos) + width * abs(sin)
        amplitude, frequency, phase = self.wave
        along = (phase - frequency * sin * down) + frequency * cos * right
        share = (0.5 + cos / span * down) + sin / span * right + amplitude * np.sin(along)  # (rows, columns)
        region = np.zeros(ids.shape, dtype=np.uint8)
        for cut in self.band_cuts:
            region += share > float(cut)
        if self.patch is not None:
            centre_y, centre_x, radius_y, radius_x, bump, lobes, phase = map(float, self.patch)
            dy, dx = (y - centre_y)[:, None] / radius_y, (x - centre_x)[None] / radius_x
            bumps = np.sin(lobes * dx + phase) * np.sin(lobes * dy + phase)
            region[dy * dy + dx * dx < 1 + bump * bumps] = len(self.stuff_ids) - 1
        region[ids > 0] = 255
        flat_region, flat_colour, flat_ids = region.ravel(), colour.ravel(), ids.ravel()
        for number, stuff in enumerate(self.stuff_ids):
            inside = np.flatnonzero(flat_region == number)
            angle, (shift_y, shift_x) = (
                self.texture_angle_rad[number],
                self.texture_shift_yx[number].astype(np.float32),
            )
            cos, sin = float(np.cos(angle)), float(np.sin(angle))
            texture_y = ((cos * y)[:, None] + (sin * x + shift_y)[None]).ravel()[inside]
            texture_x = ((-sin * y)[:, None] + (cos * x + shift_x)[None]).ravel()[inside]
            flat_colour[inside] = _TEXTURES[stuff](texture_y, texture_x)
            flat_ids[inside] = _FIRST_STUFF_ID + stuff

    def _light(self, image: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Brightness, colour cast, a slope of light over the scene, and the grain of a film (per pixel)."""
        height, width = self.extent_hw
        slope = 1 + self.slope_yx[0] * (y / height - 0.5)[:, None] + self.slope_yx[1] * (x / width - 0.5)[None]
        lit = image * (slope * self.brightness).astype(np.float32)[..., None] * np.float32(self.cast)
        noise = np.random.default_rng(self.grain_seed).standard_normal(image.shape[:2], dtype=np.float32)
        lit += np.float32(self.grain) * noise[..., None]
        return np.clip(lit, 0, 255).astype(np.uint8)


def _majority(samples: np.ndarray) -> np.ndarray:
    """The value that most of each 2 x 2 samples have: the second smallest of the four. (2 H, 2 W) -> (H, W)."""
    a, b, c, d = samples[::2, ::2], samples[::2, 1::2], samples[1::2, ::2], samples[1::2, 1::2]
    low, high = (np.minimum(a, b), np.minimum(c, d)), (np.maximum(a, b), np.maximum(c, d))
    return np.minimum(np.maximum(*low), np.minimum(*high))


def _second_colour(colour_id: int) -> np.ndarray:
    """The colour of the marks of a pattern: a pale tone, or grey on white."""
    if COLOUR_NAMES[colour_id] == "white":
        return pack((150, 150, 154))
    return pack(0.3 * _COLOUR_RGB[colour_id] + 0.7 * 255)


def _palette(thing: Placement) -> np.ndarray:
    """The packed colour of every material of a thing, shape (16,)."""
    palette = np.zeros((_IDS_PER_THING, 3), dtype=np.float32)
    for material, rgb in MATERIAL_RGB.items():
        palette[material] = rgb
    base = _COLOUR_RGB[thing.colour_id]
    palette[BODY], palette[SHADE], palette[TINT] = base, 0.66 * base, 0.55 * base + 0.45 * 255
    return pack(palette)
