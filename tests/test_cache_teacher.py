"""Tests of the feature store and its writer: equal to the plain teacher, resumable, refused when not ours."""

from __future__ import annotations

import errno
import json
import shutil
import signal
import zlib
from collections import namedtuple

import numpy as np
import pytest
import torch
from distillation_help import SIZES, finish, run, save_network, save_pictures, start, wait_for
from PIL import Image
from safetensors import safe_open

from spar_cli.training_options import RunStopped
from spar_hf import SlidingWindow, SparVisionModel, files
from spar_hf.distillation.cache import FeatureStore, differences


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A network, six pictures."""
    folder = tmp_path_factory.mktemp("world")
    return save_network(folder / "net"), save_pictures(folder / "pictures")


def flags(world, cache, *more):
    network, pictures = world
    return ("--student", network, "--images", pictures, "--cache", cache, "--stride-px", 12, "--workers", 0,
            "--shard-views", 2, *SIZES, *more)  # fmt: skip


def read(cache):
    """Everything in a store's files: name -> tensor, and the headers."""
    tensors, headers = {}, []
    for path in sorted(cache.glob("shard-*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            headers.append(json.loads(file.metadata()["index"]))
    return tensors, headers


def plain_pixels(pictures, row):
    """The view that an index row describes, made with Pillow alone."""
    (height, width), (top, left), (kept_y, kept_x), flip = row["view"]
    image = Image.open(pictures / row["image"]).resize((width, height), Image.Resampling.BICUBIC)
    image = image.crop((left, top, left + kept_x, top + kept_y))
    return np.ascontiguousarray(np.asarray(image)[:, ::-1] if flip else np.asarray(image))


def test_store_holds_the_teachers_features_and_the_trunk(world, tmp_path):
    run("cache_teacher.py", *flags(world, tmp_path / "c", "--draws", 2, "--trunk-blocks", 2))
    tensors, headers = read(tmp_path / "c")
    rows = {int(view): row for header in headers for view, row in header["views"].items()}
    assert sorted(rows) == list(range(12))
    vision = SparVisionModel.from_pretrained(world[0]).eval()
    teacher = SlidingWindow(vision, 32, 12)
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (vision.config.image_mean, vision.config.image_std))
    for view, row in rows.items():
        pixels = plain_pixels(world[1], row)
        assert zlib.crc32(pixels) == row["pixels_crc32"]
        x = (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - mean) / std
        with torch.no_grad():
            torch.testing.assert_close(
                tensors[f"{view}.features"].float(), teacher(x[None]).patch_embeds[0], rtol=2e-3, atol=2e-3
            )
            hidden = vision(x[None], output_hidden_states=True).hidden_states
        torch.testing.assert_close(tensors[f"{view}.trunk"].float(), hidden[1][0], rtol=2e-3, atol=2e-3)
        assert tensors[f"{view}.features"].dtype == torch.float16
    # Two draws of a picture are two views.
    assert any(rows[n]["view"] != rows[n + 6]["view"] for n in range(6))


@pytest.fixture(scope="module")
def whole(world, tmp_path_factory):
    """A store of 60 shards, written without a disturbance."""
    folder = tmp_path_factory.mktemp("whole") / "c"
    run("cache_teacher.py", *flags(world, folder, "--draws", 20))
    return folder


def test_killed_writer_goes_on_without_a_missing_or_broken_sample(world, whole, tmp_path):
    killed = tmp_path / "killed"
    process = start("cache_teacher.py", *flags(world, killed, "--draws", 20))
    wait_for(lambda: len(list(killed.glob("shard-*.safetensors"))) >= 3, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    before = {path: path.stat().st_mtime_ns for path in killed.glob("shard-*.safetensors")}
    assert 3 <= len(before) < 60
    (killed / "shard-00059.safetensors.7.tmp").write_bytes(b"half a shard")  # what a kill in a write leaves
    with pytest.raises(ValueError, match="unfinished"):
        FeatureStore.open(killed, json.loads((killed / "cache.json").read_text())["made_from"])
    run("cache_teacher.py", *flags(world, killed, "--draws", 20))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert_same_store(killed, whole)


def test_two_processes_share_the_shards(world, whole, tmp_path):
    printed = finish(start("cache_teacher.py", *flags(world, tmp_path / "two", "--draws", 20), processes=2))
    assert "with 2 process(es)" in printed
    assert_same_store(tmp_path / "two", whole)


def assert_same_store(found, wanted):
    assert sorted(path.name for path in found.iterdir()) == sorted(path.name for path in wanted.iterdir())
    for path in wanted.iterdir():
        assert path.read_bytes() == (found / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (("--stride-px", "16"), "teacher.stride_px is 12 there and 16 here"),
        (("--augmentation-seed", "1"), "augmentation_seed is 0 there and 1 here"),
        (("--flip-probability", "0"), "augmentation.flip_probability is 0.5 there and 0.0 here"),
        (("--teacher-method", "naclip"), "teacher.method is 'maskclip' there and 'naclip' here"),
        (("--max-images", "5"), "data.images is 6 there and 5 here"),
    ],
)
def test_store_of_something_else_is_refused_with_the_reason(world, tmp_path, monkeypatch, change, reason):
    run("cache_teacher.py", *flags(world, tmp_path / "c"))
    before = read(tmp_path / "c")[1]
    for script, more in (
        ("cache_teacher.py", ()),
        ("distill.py", ("--output", tmp_path / "run", "--tracker", "none")),
    ):
        asked = list(flags(world, tmp_path / "c", *more))
        if script == "distill.py":
            at = asked.index("--shard-views")
            del asked[at : at + 2]
        with pytest.raises(ValueError, match="made from something else") as error:
            run(script, *asked, *change)
        assert reason in str(error.value)
    assert read(tmp_path / "c")[1] == before


def test_other_weights_and_changed_pixels_are_refused(world, tmp_path, monkeypatch):
    network, pictures = tmp_path / "net", tmp_path / "pictures"
    shutil.copytree(world[0], network)
    shutil.copytree(world[1], pictures)
    run("cache_teacher.py", *flags((network, pictures), tmp_path / "c"))
    distill = ("--student", network, "--images", pictures, "--cache", tmp_path / "c", "--stride-px", 12, *SIZES,
               "--workers", 0, "--tracker", "none")  # fmt: skip
    picture = Image.open(pictures / "p3.png")
    picture.transpose(Image.Transpose.FLIP_TOP_BOTTOM).save(pictures / "p3.png")  # the same name and size
    with pytest.raises(ValueError, match=r"stale: the pixels of p3\.png"):
        run("distill.py", *distill, "--output", tmp_path / "run")
    save_network(network, seed=1)
    with pytest.raises(ValueError, match=r"teacher\.weights"):
        run("distill.py", *distill, "--output", tmp_path / "run2")


def test_broken_bytes_are_found(world, tmp_path, monkeypatch):
    run("cache_teacher.py", *flags(world, tmp_path / "c"))
    made_from = json.loads((tmp_path / "c" / "cache.json").read_text())["made_from"]
    shard = tmp_path / "c" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(bytes(content))
    store = FeatureStore.open(tmp_path / "c", made_from)
    assert store.read(0, "features").isfinite().all()
    with pytest.raises(ValueError, match=r"shard-00001.*corrupt"):
        [store.read(view, "features") for view in (2, 3)]
    shard.write_bytes(bytes(content[: len(content) // 2]))
    with pytest.raises(ValueError, match="1 of 3 shards are missing"):
        FeatureStore.open(tmp_path / "c", made_from)


def test_estimate_is_printed_and_a_full_disk_is_refused_before_the_start(world, tmp_path, monkeypatch, capsys):
    run("cache_teacher.py", *flags(world, tmp_path / "c", "--estimate"))
    printed = capsys.readouterr().out
    assert "6 of 6 views to do in 3 shards" in printed and "GB of disk" in printed and " megapixels " in printed
    assert not list((tmp_path / "c").glob("shard-*"))
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"has 0\.00 GB free"):
        run("cache_teacher.py", *flags(world, tmp_path / "c"))


def test_disk_that_fills_up_leaves_earlier_shards_intact(world, tmp_path, monkeypatch):
    real_fsync, calls = files.os.fsync, []

    def fsync(descriptor):
        calls.append(descriptor)
        if len(calls) == 3:  # cache.json and one shard fit
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match=r"disk full while writing .*shard-00001.* is intact"):
        run("cache_teacher.py", *flags(world, tmp_path / "c"))
    assert sorted(path.name for path in (tmp_path / "c").iterdir()) == ["cache.json", "shard-00000.safetensors"]
    first = (tmp_path / "c" / "shard-00000.safetensors").read_bytes()
    run("cache_teacher.py", *flags(world, tmp_path / "c"))
    assert (tmp_path / "c" / "shard-00000.safetensors").read_bytes() == first
    assert len(read(tmp_path / "c")[0]) == 6


def test_unreadable_pictures_are_named_skipped_and_limited(world, tmp_path, monkeypatch, capsys):
    pictures = save_pictures(tmp_path / "pictures", 5)
    whole = (pictures / "p2.png").read_bytes()
    (pictures / "p2.png").write_bytes(whole[: len(whole) // 2])  # a good header, then nothing
    (pictures / "p4.png").write_bytes(b"no picture")
    run("cache_teacher.py", *flags((world[0], pictures), tmp_path / "c"))
    printed = capsys.readouterr().out
    assert "p2.png" in printed and "p4.png" in printed and "could not be read in this run: 2" in printed
    tensors, headers = read(tmp_path / "c")
    assert sorted(tensors) == ["0.features", "1.features", "3.features"]  # p4 has no view at all
    assert [name for header in headers for name in header["bad"]] == ["p2.png"]
    with pytest.raises(RunStopped, match=r"2 images cannot be read and --max-bad-images is 1; the last is p2\.png"):
        run("cache_teacher.py", *flags((world[0], pictures), tmp_path / "d", "--max-bad-images", 1))  # fmt: skip


def test_trunk_of_a_method_that_looks_further_back_is_refused(tmp_path, world, monkeypatch):
    network = save_network(tmp_path / "net", method="itaclip")
    with pytest.raises(ValueError, match="'itaclip' looks at blocks before the last 2"):
        run("cache_teacher.py", *flags((network, world[1]), tmp_path / "c", "--trunk-blocks", 2))  # fmt: skip


def test_differences_name_the_place():
    found = list(differences({"a": {"b": 1}}, {"a": {"b": 2}, "c": 3}))
    assert found == ["a.b is 2 there and 1 here", "c is 3 there and None here"]
    assert not list(differences({"a": [1, 2]}, {"a": [1, 2]}))
