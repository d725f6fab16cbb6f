"""The picture book: scenes drawn by code, with exact masks and captions, at any size.

A scene is things (24 classes in 9 colours and 4 patterns) on stuff (8 procedural textures that share the ground). It
is decided by (seed, split, index) alone; drawing it at another size shows the same scene, sharper. Some colour-thing
pairs never occur outside the test split.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from .scene import CLASSES, COLOUR_NAMES, COLOURS, HELD_OUT, NUM_THINGS, PATTERNS, Sketch

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["CLASSES", "COLOURS", "HELD_OUT", "NUM_THINGS", "PATTERNS", "PictureBook", "Scene", "Thing",
           "picture_book_dataset"]  # fmt: skip

EDITION = 1  # to be raised whenever a change of the drawing code changes a picture
SPLITS = {"train": 100_000_000, "validation": 512, "test": 512}  # scenes; training never runs out in practice


@dataclass(frozen=True)
class Thing:
    """One visible thing of a drawn scene; `box` is (top, left, bottom, right) of its visible pixels."""

    name: str
    class_id: int
    colour: str
    pattern: str
    box: tuple[int, int, int, int]
    held_out: bool


@dataclass(frozen=True)
class Scene:
    """A drawn scene: RGB picture (H, W, 3) uint8, mask of class ids (H, W) uint8, caption, visible things."""

    image: np.ndarray
    mask: np.ndarray
    caption: str
    things: list[Thing]


class PictureBook:
    """The scenes of one split at one size; a scene depends on (seed, split, index) and not on the size.

    Args:
        split: "train", "validation" or "test".
        height_px: Height of the pictures.
        width_px: Width of the pictures.
        seed: Another seed is another book.

    Raises:
        ValueError: If the split is unknown or a side is not positive.
    """

    def __init__(self, split: str, height_px: int, width_px: int, seed: int = 0) -> None:
        if split not in SPLITS:
            raise ValueError(f"split is {split!r}; the picture book has {', '.join(SPLITS)}. Choose one of them.")
        if height_px < 1 or width_px < 1:
            raise ValueError(
                f"size is {height_px} x {width_px} px; both sides must be at least 1. Give a larger size."
            )
        self.split, self.height_px, self.width_px, self.seed = split, height_px, width_px, seed

    def __len__(self) -> int:
        return SPLITS[self.split]

    def sketch(self, index: int) -> Sketch:
        """The scene before it is drawn. Raises IndexError outside 0 .. len - 1."""
        if not 0 <= index < len(self):
            raise IndexError(f"scene {index} of the {self.split} split; it has 0 to {len(self) - 1}.")
        rng = np.random.default_rng([self.seed, list(SPLITS).index(self.split), index])
        short_px = min(self.height_px, self.width_px)
        extent_hw = (self.height_px / short_px, self.width_px / short_px)
        return Sketch(rng, extent_hw, held_out_share=0.3 if self.split == "test" else 0.0)

    def scene(self, index: int) -> Scene:
        """Draws one scene."""
        sketch = self.sketch(index)
        drawing = sketch.draw(self.height_px, self.width_px)
        things, visible = [], []
        for number, placement in enumerate(sketch.placements):
            rows, columns = np.nonzero(drawing.owner == number + 1)
            if len(rows) == 0:
                continue
            visible.append(number)
            things.append(
                Thing(
                    name=CLASSES[placement.class_id][0],
                    class_id=placement.class_id,
                    colour=COLOUR_NAMES[placement.colour_id],
                    pattern=PATTERNS[placement.pattern_id],
                    box=(int(rows.min()), int(columns.min()), int(rows.max()) + 1, int(columns.max()) + 1),
                    held_out=(placement.class_id, placement.colour_id) in HELD_OUT,
                )
            )
        return Scene(drawing.image, drawing.mask, sketch.caption(visible), things)


def picture_book_dataset(
    split: str, size_px: int | tuple[int, int] = 128, num_scenes: int | None = None, seed: int = 0
) -> Dataset:
    """The picture book as a Hugging Face dataset.

    Args:
        split: "train", "validation" or "test".
        size_px: Side of a square picture, or (height, width).
        num_scenes: The first so many scenes; all of the validation or test split when None.
        seed: Another seed is another book.

    Returns:
        A dataset with the features `image`, `mask` (class ids as a grey picture; the names are in `CLASSES`),
        `caption` and `objects` (name, class_id, colour, pattern, box, held_out).

    Raises:
        ValueError: If the split is unknown, or `num_scenes` is missing for the training split or too large.
    """
    from datasets import Dataset, Features, Sequence, Value
    from datasets import Image as ImageFeature

    height_px, width_px = (size_px, size_px) if isinstance(size_px, int) else size_px
    book = PictureBook(split, height_px, width_px, seed)
    if num_scenes is None and split == "train":
        raise ValueError("num_scenes is missing; the training split is endless. Give the number of scenes to draw.")
    count = len(book) if num_scenes is None else num_scenes
    if not 0 < count <= len(book):
        raise ValueError(f"num_scenes is {count}; the {split} split has 1 to {len(book)}. Ask for fewer scenes.")
    features = Features(
        {
            "image": ImageFeature(),
            "mask": ImageFeature(),
            "caption": Value("string"),
            "objects": [
                {
                    "name": Value("string"),
                    "class_id": Value("int32"),
                    "colour": Value("string"),
                    "pattern": Value("string"),
                    "box": Sequence(Value("int32"), length=4),
                    "held_out": Value("bool"),
                }
            ],
        }
    )

    def rows(book: PictureBook, count: int) -> Iterator[dict[str, Any]]:
        for index in range(count):
            scene = book.scene(index)
            yield {
                "image": Image.fromarray(scene.image),
                "mask": Image.fromarray(scene.mask),
                "caption": scene.caption,
                "objects": [vars(thing) for thing in scene.things],
            }

    # Without a fingerprint of its own the cache would be keyed by the code of `rows` alone, and outlive the rest.
    fingerprint = f"picture-book-{EDITION}-{split}-{height_px}x{width_px}-{count}-{seed}"
    return Dataset.from_generator(
        rows, features=features, gen_kwargs={"book": book, "count": count}, fingerprint=fingerprint
    )
