"""The picture book: the same scene at any size, exact masks, honest splits."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter

from spar_hf.picture_book.dataset import (
    CLASSES,
    COLOURS,
    HELD_OUT,
    NUM_THINGS,
    PATTERNS,
    PictureBook,
    picture_book_dataset,
)
from spar_hf.picture_book.scene import Placement, Sketch, _majority
from spar_hf.picture_book.stuff import STUFF, pack
from spar_hf.picture_book.things import THINGS

SPLITS = ("train", "validation", "test")


def plain_sketch(placements: list[Placement]) -> Sketch:
    """A scene with given things, in neutral light and without grain."""
    sketch = Sketch(np.random.default_rng(5), (1.0, 1.0))
    sketch.placements = placements
    sketch.brightness, sketch.grain = 1.0, 0.0
    sketch.cast, sketch.slope_yx = np.ones(3), np.zeros(2)
    return sketch


def placed(class_id: int, **changes: object) -> Placement:
    settings = {
        "class_id": class_id,
        "colour_id": 0,
        "pattern_id": 0,
        "centre_yx": (0.5, 0.5),
        "half_side": 0.4,
        "angle_rad": 0.0,
        "flip": False,
        "pattern_angle_rad": 0.0,
    }
    return Placement(**{**settings, **changes})


def test_vocabulary() -> None:
    assert len(THINGS) == NUM_THINGS >= 24 and len(STUFF) >= 8 and len(COLOURS) == 9
    names = [name for synonyms in CLASSES for name in synonyms]
    assert len(names) == len(set(names))  # no name means two classes
    assert all(len(synonyms) >= 2 for synonyms in CLASSES)
    assert not {word for name in names for word in name.split()} & {*COLOURS, *PATTERNS}


def test_held_out_pairs_leave_every_thing_and_colour() -> None:
    things, colours = zip(*HELD_OUT, strict=True)
    assert sorted(things) == list(range(NUM_THINGS))  # one colour of nine each
    assert set(colours) == set(range(len(COLOURS)))
    assert max(colours.count(colour) for colour in set(colours)) <= 3


def test_held_out_pairs_appear_only_in_test() -> None:
    shown = {
        split: {
            (thing.class_id, thing.colour_id)
            for index in range(400)
            for thing in PictureBook(split, 16, 16).sketch(index).placements
        }
        for split in SPLITS
    }
    assert not shown["train"] & HELD_OUT and not shown["validation"] & HELD_OUT
    assert shown["test"] >= HELD_OUT
    assert len(shown["test"] - HELD_OUT) > 100  # test scenes are not only those
    assert shown["train"] == {(t, c) for t in range(NUM_THINGS) for c in range(len(COLOURS))} - HELD_OUT


@pytest.mark.parametrize("split", SPLITS)
def test_deterministic(split: str) -> None:
    first, second = (PictureBook(split, 48, 64).scene(7) for _ in range(2))
    assert np.array_equal(first.image, second.image) and np.array_equal(first.mask, second.mask)
    assert (first.caption, first.things) == (second.caption, second.things)
    for other in (PictureBook(split, 48, 64).scene(8), PictureBook(split, 48, 64, seed=1).scene(7)):
        assert not np.array_equal(first.image, other.image)


def test_splits_differ() -> None:
    pictures = {PictureBook(split, 32, 32).scene(0).image.tobytes() for split in SPLITS}
    assert len(pictures) == len(SPLITS)


@pytest.mark.parametrize(("height_px", "width_px"), [(64, 64), (48, 96), (90, 60), (1, 1), (17, 31)])
def test_scene_of_any_size(height_px: int, width_px: int) -> None:
    scene = PictureBook("test", height_px, width_px).scene(3)
    assert scene.image.shape == (height_px, width_px, 3) and scene.image.dtype == np.uint8
    assert scene.mask.shape == (height_px, width_px) and scene.mask.dtype == np.uint8
    assert scene.mask.max() < len(CLASSES)
    assert {thing.class_id for thing in scene.things} == {int(c) for c in np.unique(scene.mask) if c < NUM_THINGS}


@pytest.mark.parametrize("times", [2, 5])
@pytest.mark.parametrize("hw", [(64, 64), (48, 80)])
def test_larger_is_the_same_scene_sharper(hw: tuple[int, int], times: int) -> None:
    for index in range(4):
        small = PictureBook("validation", *hw).scene(index)
        large = PictureBook("validation", hw[0] * times, hw[1] * times).scene(index)
        reduced = np.asarray(Image.fromarray(large.image).reduce(times)).astype(float)
        # Grain, rims and the finest textures differ; the next scene differs by more than 50 levels.
        assert np.median(np.abs(reduced - small.image)) < 8 and np.abs(reduced - small.image).mean() < 14
        same = large.mask[times // 2 :: times, times // 2 :: times] == small.mask
        assert same.mean() > 0.96


def test_close_up_is_a_part_of_the_scene() -> None:
    sketch = PictureBook("train", 64, 64).sketch(11)
    whole = sketch.draw(256, 256)
    part = sketch.draw(64, 64, origin_yx=(0.25, 0.5), px_per_unit=256)
    assert (whole.mask[64:128, 128:192] == part.mask).mean() > 0.98
    difference = np.abs(whole.image[64:128, 128:192].astype(float) - part.image)
    assert np.median(difference) < 12  # the grain belongs to the picture, not to the scene


@pytest.mark.parametrize("class_id", range(NUM_THINGS))
def test_mask_is_the_union_of_the_parts(class_id: int) -> None:
    """Against each polygon drawn by itself, much larger, at the place that the placement says."""
    thing = placed(class_id, centre_yx=(0.45, 0.55), half_side=0.35, angle_rad=0.4, flip=True)
    mask = plain_sketch([thing]).draw(96, 96).mask == class_id
    canvas = Image.new("L", (768, 768))
    cos, sin = np.cos(0.4), np.sin(0.4)
    for part in list(THINGS.values())[class_id]:
        corners = [
            ((0.55 + 0.35 * (-x * cos - y * sin)) * 768, (0.45 + 0.35 * (-x * sin + y * cos)) * 768)
            for x, y in part.points
        ]
        ImageDraw.Draw(canvas).polygon(corners, fill=255)
    cover = np.asarray(canvas.reduce(8)) / 255
    near = np.asarray(canvas.reduce(8).filter(ImageFilter.MaxFilter(3))) / 255
    assert mask[cover > 0.95].all() and not mask[near == 0].any()
    assert (mask != (cover > 0.5)).mean() < 0.012  # Pillow paints the rim of a polygon too: a quarter of a pixel
    assert cover.mean() > 0.1  # large enough to be found on a grid of 8 x 8


def test_later_things_hide_earlier_ones() -> None:
    below, above = placed(0, half_side=0.45), placed(6, half_side=0.3)
    drawing = plain_sketch([below, above]).draw(64, 64)
    assert drawing.mask[32, 32] == 6 and drawing.owner[32, 32] == 2
    assert (drawing.mask == 0).any()
    assert np.array_equal(drawing.owner == 1, drawing.mask == 0)


@pytest.mark.parametrize("colour_id", range(len(COLOURS)))
def test_a_plain_body_has_its_colour(colour_id: int) -> None:
    balloon = next(number for number, names in enumerate(THINGS) if names[0] == "balloon")
    image = plain_sketch([placed(balloon, colour_id=colour_id)]).draw(100, 100).image
    assert np.abs(image[50, 40].astype(int) - list(COLOURS.values())[colour_id]).max() <= 1


def test_patterns_are_different_pictures() -> None:
    apple = next(number for number, names in enumerate(THINGS) if names[0] == "apple")
    drawings = [plain_sketch([placed(apple, pattern_id=pattern)]).draw(64, 64) for pattern in range(len(PATTERNS))]
    assert len({drawing.image.tobytes() for drawing in drawings}) == len(PATTERNS)
    assert len({drawing.mask.tobytes() for drawing in drawings}) == 1


def test_stuff_shares_the_ground() -> None:
    shares = []
    for index in range(60):
        mask = PictureBook("train", 48, 48).scene(index).mask
        counts = np.bincount(mask[mask >= NUM_THINGS], minlength=len(CLASSES))
        assert (counts > 0).sum() >= 2 or counts.sum() < 0.6 * mask.size
        shares.append(counts.max() / mask.size)
    assert np.mean(np.array(shares) > 0.75) < 0.02


def test_box_and_caption_say_what_is_visible() -> None:
    for index in range(20):
        scene = PictureBook("test", 64, 96).scene(index)
        for thing in scene.things:
            rows, columns = np.nonzero(scene.mask == thing.class_id)
            assert thing.box == (rows.min(), columns.min(), rows.max() + 1, columns.max() + 1)
            pattern = "" if thing.pattern == "plain" else thing.pattern + " "
            assert f"{pattern}{thing.colour} {thing.name}" in scene.caption
            assert thing.held_out == ((thing.class_id, list(COLOURS).index(thing.colour)) in HELD_OUT)
        assert "a orange" not in scene.caption


def test_majority_of_four_samples() -> None:
    samples = np.random.default_rng(0).choice([3, 7, 40], size=(200, 300)).astype(np.uint8)
    blocks = samples.reshape(100, 2, 150, 2).swapaxes(1, 2).reshape(-1, 4)
    for block, value in zip(blocks, _majority(samples).ravel(), strict=True):
        counts = np.bincount(block)
        assert counts[value] == counts.max() or (counts.max() == 2 and counts[value] >= 1)
        if counts.max() > 2:
            assert value == counts.argmax()


def test_packed_colours() -> None:
    packed = pack(np.array([[1, 2, 3], [250, 128, 0]]))
    assert packed.view(np.uint8).reshape(2, 4).tolist() == [[1, 2, 3, 255], [250, 128, 0, 255]]


def test_dataset(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path)
    rows = picture_book_dataset("test", (32, 48), num_scenes=3)
    assert len(rows) == 3 and set(rows.features) == {"image", "mask", "caption", "objects"}
    for index, row in enumerate(rows):
        scene = PictureBook("test", 32, 48).scene(index)
        assert np.array_equal(np.asarray(row["image"]), scene.image)
        assert np.array_equal(np.asarray(row["mask"]), scene.mask)
        assert row["caption"] == scene.caption
        assert [thing["name"] for thing in row["objects"]] == [thing.name for thing in scene.things]


def test_errors_say_what_is_allowed() -> None:
    with pytest.raises(ValueError, match=r"split is 'dev'; the picture book has train, validation, test"):
        PictureBook("dev", 32, 32)
    with pytest.raises(ValueError, match=r"size is 0 x 32 px; both sides must be at least 1"):
        PictureBook("test", 0, 32)
    with pytest.raises(IndexError, match=r"scene 512 of the test split; it has 0 to 511"):
        PictureBook("test", 32, 32).scene(512)
    with pytest.raises(ValueError, match=r"num_scenes is missing; the training split is endless"):
        picture_book_dataset("train", 32)
    with pytest.raises(ValueError, match=r"num_scenes is 513; the test split has 1 to 512"):
        picture_book_dataset("test", 32, num_scenes=513)
