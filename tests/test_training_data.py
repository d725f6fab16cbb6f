"""Tests of what distillation trains on: sources of pictures, the augmentation, views, how batches share them out."""

from __future__ import annotations

import io
import tarfile

import numpy as np
import pytest
from distillation_help import save_pictures
from PIL import Image

from spar_hf.distillation.batches import plan_steps, share_of
from spar_hf.distillation.sources import PictureBookScenes
from spar_hf.distillation.views import EXTENDED, Augmentation, Views, plan_batches
from spar_hf.sources import BadImage, hub_dataset, image_folder, tar_files

SMALL = Augmentation(long_side_px=64, short_side_px=64, min_side_px=32, multiple_px=8)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    """A folder of six."""
    return save_pictures(tmp_path_factory.mktemp("world") / "pictures")


@pytest.mark.parametrize("size_hw", [(1500, 2250), (2250, 1500), (600, 800), (300, 3000), (1000, 2300)])
def test_augmentation_keeps_the_papers_bounds(size_hw):
    augmentation = Augmentation()
    rng = np.random.default_rng(0)
    views = [augmentation.draw(size_hw, rng) for _ in range(400)]
    sizes = np.array([view.size_hw for view in views])
    assert (sizes % 16 == 0).all() and sizes.min() >= 512 and sizes.max() <= 2048
    ratio, whole = size_hw[0] / size_hw[1], np.array([view.resized_hw == view.size_hw for view in views])
    for view, stretched in zip(views, whole, strict=True):
        (height, width), (top, left) = view.resized_hw, view.top_left
        # Whole images are stretched to whole patches: up to 15 px less.
        error = 16 / 512 if stretched else 0.003
        assert min(height, width) >= 512 and abs(height / width / ratio - 1) < error
        assert 0 <= top <= height - view.size_hw[0] and 0 <= left <= width - view.size_hw[1]
    if size_hw == (1500, 2250):
        # (2048, 1024) x [0.5, 1] with the ratio kept: the short side decides, 512 to 1024.
        assert {round(min(view.resized_hw)) for view in views} <= set(range(512, 1025))
        assert np.mean([min(view.resized_hw) for view in views]) == pytest.approx(768, abs=20)
        assert np.mean(whole) == pytest.approx(0.5, abs=0.08)
        assert np.mean([view.flip for view in views]) == pytest.approx(0.5, abs=0.08)
    if size_hw == (1000, 2300):
        # The long side decides; under a scale of 512 * 2.3 / 2048 = 0.575 the image is enlarged, and never cropped.
        enlarged = np.array([min(view.resized_hw) == 512 for view in views])
        assert enlarged.mean() == pytest.approx(0.15, abs=0.06) and whole[enlarged].mean() > 0.97  # 512.3 is 512, too
        assert whole[~enlarged].mean() == pytest.approx(0.5, abs=0.08)
    if size_hw == (300, 3000):
        # Enlarged always, but longer than 2048: cropped along that side.
        assert (
            set(sizes[:, 0]) == {512} and set(sizes[:, 1]) == {2048} and {v.resized_hw for v in views} == {(512, 5120)}
        )
    extended = Augmentation(**EXTENDED)
    sizes = np.array([extended.draw(size_hw, rng).size_hw for _ in range(400)])
    assert sizes.min() >= 512 and 2048 < sizes.max() <= 2560


@pytest.mark.parametrize(
    ("law", "weigh"),
    [
        ("uniform", lambda side: 1 / side),
        ("log-uniform", lambda side: np.ones_like(side)),
        ("equal-pixels", lambda side: side**2),
    ],
)
def test_scale_laws_share_out_what_they_say(law, weigh):
    """Of what a law gives each octave the same of, views from 1 to 2 times have as much as those from 2 to 4."""
    sizes = {"long_side_px": 4096, "short_side_px": 4096, "min_side_px": 1024, "multiple_px": 1}
    augmentation = Augmentation(**sizes, scale_range=(0.25, 1.0), crop_probability=0, scale_law=law)
    rng = np.random.default_rng(0)
    sides = np.array([augmentation.draw((500, 500), rng).size_hw[0] for _ in range(20_000)], dtype=float)
    assert 1024 <= sides.min() < 1030 and 4090 < sides.max() <= 4096
    small, large = (weigh(part).sum() for part in (sides[sides < 2048], sides[sides >= 2048]))
    assert small == pytest.approx(large, rel=0.05)


def test_views_depend_on_seed_draw_and_image_only(pictures):
    source = image_folder(pictures)
    views = Views(source, SMALL, draws=3, seed=0)
    again = Views(source, SMALL, draws=9, seed=0)
    assert [views.plan(n) for n in range(18)] == [again.plan(n) for n in range(18)]
    assert [views.plan(n) for n in range(6)] != [views.plan(n) for n in range(6, 12)]
    assert [views.plan(n) for n in range(6)] != [Views(source, SMALL, 1, seed=1).plan(n) for n in range(6)]
    assert list(views.of_epoch(4)) == list(views.of_epoch(1)) == list(range(6, 12))


def test_sources_give_the_same_pictures(pictures, tmp_path):
    """A folder, a tar in SA-1B's layout, a data set on disk and its stream hold the same pixels."""
    import datasets

    folder = image_folder(pictures)
    with tarfile.open(tmp_path / "sa_000.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, arcname=path.name)
            note = tarfile.TarInfo(f"{path.stem}.json")
            note.size = 2
            tar.addfile(note, io.BytesIO(b"{}"))
    data = datasets.Dataset.from_dict({"label": list(range(6)), "image": [str(p) for p in sorted(pictures.iterdir())]})
    data.cast_column("image", datasets.Image()).save_to_disk(tmp_path / "set")
    stream = str(tmp_path / "stream")
    sources = [
        tar_files([str(tmp_path / "sa_000.tar")]),
        tar_files([str(tmp_path)]),
        hub_dataset(str(tmp_path / "set"), "train", None, None, None),
        hub_dataset(str(tmp_path / "set"), "train", "image", 4, stream),
        hub_dataset(str(tmp_path / "set"), "train", "image", 6, stream),  # fetches the two that it lacks
        hub_dataset(str(pictures), "train", None, None, None),  # a folder that load_dataset reads
    ]
    assert [len(source.names) for source in sources] == [6, 6, 6, 4, 6, 6]
    for source in sources:
        for index in range(len(source.names)):
            assert source.size_hw(index) == folder.size_hw(index)
            assert np.array_equal(source.draw(index, 40, 48), folder.draw(index, 40, 48))
    with pytest.raises(ValueError, match=r"'label' is no image column; image columns: \['image'\]"):
        hub_dataset(str(tmp_path / "set"), "train", "label", None, None)


def test_photographs_turn_by_exif_and_name_what_is_broken(tmp_path):
    pixels = np.zeros((20, 30, 3), np.uint8)
    pixels[:, :15] = 255  # the left half is white
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: what was left is on top
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff")
    source = image_folder(tmp_path)
    assert source.names == ["broken.jpg", "turned.png"] and source.size_hw(1) == (30, 20)
    drawn = source.draw(1, 30, 20)
    assert drawn[:14].min() == 255 and drawn[16:].max() == 0
    with pytest.raises(BadImage, match=r"broken\.jpg: "):
        source.size_hw(0)


def test_picture_book_is_drawn_at_every_size():
    source = PictureBookScenes(50, seed=0)
    shapes = [source.size_hw(index) for index in range(50)]
    ratios = [height / width for height, width in shapes]
    assert min(ratios) >= 0.49 and max(ratios) <= 2.05 and ratios.count(1) > 10
    assert source.draw(3, 48, 64).shape == (48, 64, 3)


def test_uneven_processes_cover_every_view_once(pictures):
    views = Views(image_folder(pictures), SMALL, draws=1, seed=0)
    steps = plan_steps(views, None, epochs=1, batch_size=2, batches_per_step=4, seed=0)
    shares = [share_of(steps, rank, processes=2, accumulate=2) for rank in range(2)]
    assert len(shares[0]) == len(shares[1]) == 2 * len(steps)
    assert sorted(number for share in shares for batch in share for number in batch) == list(range(6))


def test_batches_have_one_size_and_each_view_once(pictures):
    views = Views(image_folder(pictures), Augmentation(64, 64, (0.5, 1.0), min_side_px=32, multiple_px=32), 5, seed=1)
    batches = plan_batches(views, list(range(len(views))), 4, np.random.default_rng(0))
    assert sorted(number for batch in batches for number in batch) == list(range(30))
    assert all(len({views.plan(number).size_hw for number in batch}) == 1 for batch in batches)
    assert max(map(len, batches)) == 4
    assert batches != plan_batches(views, list(range(len(views))), 4, np.random.default_rng(1))
