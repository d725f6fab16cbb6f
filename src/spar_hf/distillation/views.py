"""Views: the pieces of images that training sees. SPAR's augmentation, drawn by seed, and batches of equal size."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np

from ..files import digest
from ..names_spar import one_of
from ..sources import BadImage
from .sources import Source

# Of `Augmentation.draw`: counted up when the same settings come to draw other views, so that stored ones are refused.
RULES = 2
SCALE_LAWS = ("uniform", "log-uniform", "equal-pixels")


class View(NamedTuple):
    """A rectangle of a resized, perhaps mirrored image. All in pixels after resizing."""

    resized_hw: tuple[int, int]
    top_left: tuple[int, int]
    size_hw: tuple[int, int]
    flip: bool


@dataclass(frozen=True)
class Augmentation:
    """SPAR's augmentation: random scale, random crop, flip, sides floored to whole patches.

    The image is resized, keeping its shape, to fit into scale * (long_side_px, short_side_px) but with a short side
    of at least min_side_px. With crop_probability each side is cropped to a random part, of at least min_side_px;
    else, and if it had to be enlarged to min_side_px, the whole image is stretched to the floored sides.
    A side longer than long_side_px, which only a very long image has, is always cropped to it.

    Defaults: SPAR (Kombol et al., CVPR 2026), section 4, and the released code, which resizes with OpenCV's bilinear
    filter without antialias where the sources here have a bicubic one with it.

    Attributes:
        long_side_px, short_side_px: size at scale 1.
        scale_range: the scale is drawn from it.
        scale_law: `uniform`, as the paper does; `log-uniform`: as many views from 1 to 2 times as from 2 to 4; or
            `equal-pixels`: as many pixels in all views from 1 to 2 times as in those from 2 to 4, hence many small
            views, which are cheap.
        crop_probability: how often to crop.
        crop_range: part of a side that a crop keeps, drawn uniformly for each side.
        min_side_px: lower bound of both sides.
        flip_probability: how often to mirror left and right.
        multiple_px: sides are floored to a multiple of it: the patch, or more to have fewer sizes to batch.
    """

    long_side_px: int = 2048
    short_side_px: int = 1024
    scale_range: tuple[float, float] = (0.5, 1.0)
    crop_probability: float = 0.5
    crop_range: tuple[float, float] = (0.4, 1.0)
    min_side_px: int = 512
    flip_probability: float = 0.5
    multiple_px: int = 16
    scale_law: str = "uniform"

    def __post_init__(self) -> None:
        one_of("scale_law", self.scale_law, SCALE_LAWS)
        for name in ("scale_range", "crop_range"):
            low, high = getattr(self, name)
            if not 0 < low <= high <= 1:
                raise ValueError(f"{name} is {low} {high}; it must be two numbers, 0 < low <= high <= 1.")
        for name in ("crop_probability", "flip_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be from 0 to 1.")
        if not self.multiple_px <= self.min_side_px <= self.short_side_px <= self.long_side_px:
            raise ValueError(
                f"sizes are multiple_px {self.multiple_px}, min_side_px {self.min_side_px}, short_side_px "
                f"{self.short_side_px}, long_side_px {self.long_side_px}; each must be at least the one before it."
            )

    def draw(self, size_hw: tuple[int, int], rng: np.random.Generator) -> View:
        """A random view of an image of that size."""
        # All random numbers are drawn always, so that one choice does not shift the next.
        scale, crop, part_y, part_x, top, left, flip = rng.random(7)
        low, high = self.scale_range
        if self.scale_law == "uniform":
            scale = low + scale * (high - low)
        elif self.scale_law == "log-uniform":
            scale = low * (high / low) ** scale
        else:  # density of s^-3: views of s^2 pixels, and equal steps of the logarithm
            scale = (low**-2 - scale * (low**-2 - high**-2)) ** -0.5
        long_px, short_px = max(size_hw), min(size_hw)
        factor = min(scale * self.long_side_px / long_px, scale * self.short_side_px / short_px)
        least = self.min_side_px / short_px
        crops = crop < self.crop_probability and factor >= least
        resized, kept, start = [], [], []
        for side, part, place in zip(size_hw, (part_y, part_x), (top, left), strict=True):
            side = whole = max(round(side * max(factor, least)), self.min_side_px)
            if crops:
                low, high = self.crop_range
                side = max(int(side * (low + part * (high - low))), self.min_side_px)
            side = min(side, self.long_side_px) // self.multiple_px * self.multiple_px
            resized.append(whole if crops or whole > self.long_side_px else side)
            kept.append(side)
            start.append(int(place * (resized[-1] - side + 1)))
        return View(
            (resized[0], resized[1]), (start[0], start[1]), (kept[0], kept[1]), bool(flip < self.flip_probability)
        )


# The "extended" variant that SPAR-ALL was also trained with.
EXTENDED = {"long_side_px": 2560, "short_side_px": 2560, "scale_range": (0.2, 1.0)}


class Views:
    """All views of a training run, by number: draw d of image i is number d * images + i.

    A view depends on (seed, draw, image) only: not on the order of training, the number of processes, or a restart.

    Args:
        source: images.
        augmentation: how a view is drawn.
        draws: how many views of each image there are.
        seed: of the augmentation.

    Attributes:
        bad: name -> reason of images whose header cannot be read; they have no views.
    """

    def __init__(self, source: Source, augmentation: Augmentation, draws: int, seed: int):
        self.source, self.augmentation, self.draws, self.seed = source, augmentation, draws, seed
        self.bad: dict[str, str] = {}

        def measure(index: int) -> tuple[int, int] | BadImage:
            try:
                return source.size_hw(index)
            except BadImage as error:
                return error

        with ThreadPoolExecutor(8) as pool:
            sizes = list(pool.map(measure, range(len(source.names))))
        self.images: list[tuple[int, tuple[int, int]]] = []  # (index in the source, its size)
        for index, size in enumerate(sizes):
            if isinstance(size, BadImage):
                self.bad[size.name] = size.reason
            else:
                self.images.append((index, size))

    def __len__(self) -> int:
        return self.draws * len(self.images)

    def name(self, number: int) -> str:
        """Name of the image behind a view."""
        return self.source.names[self.images[number % len(self.images)][0]]

    def plan(self, number: int) -> View:
        """Which piece of its image a view is."""
        draw, image = divmod(number, len(self.images))
        index, size_hw = self.images[image]
        return self.augmentation.draw(size_hw, np.random.default_rng([self.seed, draw, index]))

    def pixels(self, number: int) -> np.ndarray:
        """(H, W, 3) uint8. Raises `BadImage`."""
        view = self.plan(number)
        image = self.source.draw(self.images[number % len(self.images)][0], *view.resized_hw)
        (top, left), (height, width) = view.top_left, view.size_hw
        image = image[top : top + height, left : left + width]
        return np.array(image[:, ::-1] if view.flip else image)

    def fingerprint(self, number: int) -> int:
        """Of the image behind a view, see `Photographs.fingerprint`. Raises `BadImage`."""
        return self.source.fingerprint(self.images[number % len(self.images)][0])

    def of_epoch(self, epoch: int) -> range:
        """Numbers of the views of an epoch: one of each image; after the last draw the first comes again."""
        draw = epoch % self.draws
        return range(draw * len(self.images), (draw + 1) * len(self.images))

    def describe(self) -> dict[str, Any]:
        """What decides the views, as JSON: the images by name and size, the augmentation, the seed."""
        listed = [(self.source.names[index], size) for index, size in self.images]
        return {
            "data": {
                **self.source.description,
                "images": len(self.images),
                "names_and_sizes": digest([repr(listed).encode()]),
            },
            "augmentation": {
                key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.augmentation).items()
            }
            | {"rules": RULES},
            "augmentation_seed": self.seed,
            "draws": self.draws,
        }


def plan_batches(views: Views, numbers: list[int], batch_size: int, rng: np.random.Generator) -> list[list[int]]:
    """Puts views of equal size together and shuffles: random batches, each of one size, every view once.

    Batches are smaller than batch_size where a size has no more views. The plan does not depend on how many processes
    carry it out.
    """
    buckets: dict[tuple[int, int], list[int]] = {}
    for number in rng.permutation(numbers).tolist():
        buckets.setdefault(views.plan(number).size_hw, []).append(number)
    batches = [bucket[i : i + batch_size] for bucket in buckets.values() for i in range(0, len(bucket), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]
