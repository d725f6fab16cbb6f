"""What `pretrain_tiny.py` learns from: views of scenes, drawn by a process of their own, and words for them."""

from __future__ import annotations

import mmap
import os
import time
from multiprocessing.sharedctypes import Synchronized
from typing import NamedTuple

import numpy as np

from spar_hf.picture_book.dataset import CLASSES, COLOURS, NUM_THINGS, PATTERNS, PictureBook
from spar_hf.prompts_spar import IMAGENET_TEMPLATES

SIDE_PX, PATCH_PX = 128, 16
GRID = SIDE_PX // PATCH_PX
MAX_ZOOM = 6.0
MAX_THINGS, MAX_STUFF, NONE = 5, 4, 255
COLOUR_NAMES = tuple(COLOURS)


class Views(NamedTuple):
    """Arrays over views, shared by the two processes. Things are rows of (class, colour, pattern); 255 is none."""

    images: np.ndarray  # (views, 128, 128, 3) uint8
    shares: np.ndarray  # (views, 64, classes) uint8: how much of a patch shows each class, 255 for all of it
    things: np.ndarray  # (views, 5, 3) uint8, the things of the scene
    visible: np.ndarray  # (views, 5) bool, those of them that cover at least 2 % of the view
    stuff: np.ndarray  # (views, 4) uint8, class ids of the stuff that covers at least 4 % of the view

    @classmethod
    def allocate(cls, views: int) -> Views:
        """Anonymous shared memory: a forked process sees the same arrays."""

        def shared(dtype: type, *shape: int) -> np.ndarray:
            count = int(np.prod(shape))
            return np.frombuffer(mmap.mmap(-1, count), dtype=dtype).reshape(shape)

        return cls(
            shared(np.uint8, views, SIDE_PX, SIDE_PX, 3),
            shared(np.uint8, views, GRID * GRID, len(CLASSES)),
            shared(np.uint8, views, MAX_THINGS, 3),
            shared(np.bool_, views, MAX_THINGS),
            shared(np.uint8, views, MAX_STUFF),
        )

    def write(self, slot: int, book: PictureBook, index: int, zoom: float, at: np.ndarray) -> None:
        """Draws a view of a scene: 1 / zoom of its side, at a place from (0, 0), top left, to (1, 1)."""
        sketch = book.sketch(index)
        drawing = sketch.draw(SIDE_PX, SIDE_PX, tuple(at * (1 - 1 / zoom)), SIDE_PX * zoom)
        patch = np.arange(GRID).repeat(PATCH_PX)
        cells = (patch[:, None] * GRID + patch[None]) * len(CLASSES) + drawing.mask  # (128, 128)
        counts = np.bincount(cells.ravel(), minlength=GRID * GRID * len(CLASSES)).reshape(GRID * GRID, len(CLASSES))
        area = counts.sum(axis=0) / drawing.mask.size
        self.images[slot] = drawing.image
        self.shares[slot] = np.minimum(counts, 255)
        self.things[slot], self.stuff[slot], self.visible[slot] = NONE, NONE, False
        for number, thing in enumerate(sketch.placements):
            self.things[slot, number] = thing.class_id, thing.colour_id, thing.pattern_id
            self.visible[slot, number] = area[thing.class_id] > 0.02
        ground = [class_id for class_id in range(NUM_THINGS, len(CLASSES)) if area[class_id] > 0.04]
        self.stuff[slot, : len(ground)] = ground


def draw_forever(views: Views, drawn: Synchronized, used: Synchronized, seed: int, first_index: int) -> None:
    """The drawing process: keeps ahead of training by 4 000 views and 0.75 views for each one used, in a ring.

    Two views of five are whole scenes; the zoom of the others is log-uniform.
    """
    os.setsid()  # with its own share of the cores, apart from training
    os.nice(5)
    training = os.getppid()
    book = PictureBook("train", SIDE_PX, SIDE_PX, seed)
    index = first_index
    while os.getppid() == training:  # until that process is gone
        if drawn.value > 4_000 + 0.75 * used.value:
            time.sleep(0.05)
            continue
        rng = np.random.default_rng([seed, index])
        zoom = 1.0 if rng.random() < 0.4 else MAX_ZOOM ** rng.random()
        views.write(drawn.value % len(views.images), book, index, zoom, rng.random(2))
        drawn.value += 1
        index += 1


class Words:
    """Turns what a view shows into English, with synonyms and templates at random."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def name(self, class_id: int) -> str:
        return str(self.rng.choice(CLASSES[class_id]))

    def prompt(self, phrase: str) -> str:
        """The bare phrase, or the phrase in one of the 80 templates."""
        return phrase if self.rng.random() < 0.25 else str(self.rng.choice(IMAGENET_TEMPLATES)).format(phrase)

    def phrase(self, class_id: int, colour: int, pattern: int | None) -> str:
        adjectives = [COLOUR_NAMES[colour]]
        if pattern is not None and (pattern > 0 or self.rng.random() < 0.3):
            adjectives.insert(int(self.rng.integers(2)), PATTERNS[pattern])
        return " ".join([*adjectives, self.name(class_id)])

    def caption(self, things: np.ndarray, stuff: np.ndarray) -> str:
        """Such as "a red house and a striped fish on the grass". Shapes: things (n, 3), stuff (m,)."""
        phrases = []
        for class_id, colour, pattern in self.rng.permutation(things)[:4]:
            style = self.rng.random()
            words = self.phrase(class_id, colour, pattern if style < 0.4 else None)
            if 0.4 < style < 0.55:
                words = self.name(class_id)
            elif 0.55 < style < 0.7 and pattern > 0:
                words = f"{PATTERNS[pattern]} {self.name(class_id)}"
            phrases.append(f"{'an' if words[0] in 'aeiou' else 'a'} {words}")
        ground = " and ".join(self.name(class_id) for class_id in self.rng.permutation(stuff)[:3])
        if not phrases:
            return ground
        separator = " and " if self.rng.random() < 0.7 else ", "
        preposition = self.rng.choice([" on the ", " on ", " in front of "])
        return separator.join(phrases) + (f"{preposition}{ground}" if ground else "")
