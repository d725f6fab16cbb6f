"""Tests of the feature store and its writer: equal to the plain teacher, resumable, refused when not ours."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import tarfile
import zlib
from collections import namedtuple

import numpy as np
import pytest
import torch
from distillation_help import SIZES, Process, run, run_as_command, save_network, save_pictures, wait_for
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from spar_cli.training_options import RunStopped
from spar_hf import SlidingWindow, SparVisionModel, files
from spar_hf.distillation.cache import FeatureStore, checksum, differences


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
    process = Process("cache_teacher.py", *flags(world, killed, "--draws", 20))
    wait_for(lambda: len(list(killed.glob("shard-*.safetensors"))) >= 3, process)
    process.kill(signal.SIGKILL)
    process.finish(-signal.SIGKILL)
    before = {path: path.stat().st_mtime_ns for path in killed.glob("shard-*.safetensors")}
    assert 3 <= len(before) < 60
    left = files.draft_of(killed / "shard-00059.safetensors")
    left = left.with_name(left.name.replace(str(os.getpid()), str(process.parts[0].pid)))
    left.write_bytes(b"half a shard")  # what a kill in a write leaves
    with pytest.raises(ValueError, match="unfinished"):
        FeatureStore.open(killed, json.loads((killed / "cache.json").read_text())["made_from"])
    run("cache_teacher.py", *flags(world, killed, "--draws", 20))
    assert all(path.stat().st_mtime_ns == stamp for path, stamp in before.items())
    assert_same_store(killed, whole)


def test_two_processes_share_the_shards(world, whole, tmp_path):
    printed = Process("cache_teacher.py", *flags(world, tmp_path / "two", "--draws", 20), processes=2).finish()
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


@pytest.fixture(scope="module")
def stored(world, tmp_path_factory):
    """A store of three shards with a trunk, and that of other pictures."""
    folder = tmp_path_factory.mktemp("stored")
    run("cache_teacher.py", *flags(world, folder / "c", "--trunk-blocks", 2))
    run("cache_teacher.py", *flags(world, folder / "other", "--trunk-blocks", 2, "--augmentation-seed", 1))
    return folder


def distilling(world, cache, output, *more):
    return ("--student", world[0], "--images", world[1], "--cache", cache, "--output", output, "--stride-px", 12,
            *SIZES, "--workers", 0, "--tracker", "none", "--max-steps", 1, *more)  # fmt: skip


def test_other_weights_are_refused(world, stored, tmp_path):
    with pytest.raises(ValueError, match=r"teacher\.weights"):
        run(
            "distill.py",
            *distilling((save_network(tmp_path / "net", seed=1), world[1]), stored / "c", tmp_path / "run"),
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("trunk", [(), ("--trunk-blocks", 2)], ids=["features", "trunk"])
@pytest.mark.parametrize("in_tar", [False, True], ids=["folder", "tar"])
def test_a_changed_picture_is_refused_and_named(world, tmp_path, trunk, in_tar):
    """Of the same name, size in pixels, size in bytes and date."""
    pictures = tmp_path / "pictures"
    shutil.copytree(world[1], pictures)
    for path in pictures.iterdir():
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    changed, where = pictures / "p3.bmp", ("--images", pictures)
    if in_tar:
        changed, where = tmp_path / "all.tar", ("--tars", tmp_path / "all.tar")
        with tarfile.open(changed, "w") as tar:
            for path in sorted(pictures.iterdir()):
                tar.add(path, path.name)
    run("cache_teacher.py", *without_images(flags(world, tmp_path / "c", "--trunk-blocks", 2)), *where)
    words = *without_images(distilling(world, tmp_path / "c", tmp_path / "run", *trunk)), *where
    content, date = changed.read_bytes(), changed.stat().st_mtime_ns
    at = content.index((pictures / "p3.bmp").read_bytes()) + 2000
    changed.write_bytes(content[:at] + bytes([content[at] ^ 128]) + content[at + 1 :])
    os.utime(changed, ns=(date, date))
    with pytest.raises(ValueError, match=r"stale: (all\.tar/)?p3\.bmp changed since its features were stored"):
        run("distill.py", *words)
    assert not (tmp_path / "run").exists()
    changed.write_bytes(content)
    run("distill.py", *words)


def without_images(words):
    at = words.index("--images")
    return words[:at] + words[at + 2 :]


def test_another_edition_of_the_picture_book_is_refused(world, tmp_path, monkeypatch):
    scenes = "--picture-book", 4
    run("cache_teacher.py", *without_images(flags(world, tmp_path / "c", "--trunk-blocks", 2)), *scenes)
    monkeypatch.setattr("spar_hf.distillation.sources.EDITION", 99)
    with pytest.raises(ValueError, match=r"data\.edition is \d+ there and 99 here"):
        run("distill.py", *without_images(distilling(world, tmp_path / "c", tmp_path / "run")), *scenes)


def copy_over(source, target):
    def change(cache):
        shutil.copy(cache / source, cache / target)

    return change


def rewritten(change):
    """Changes the tensors of the second shard, and its check sums with them: a whole file, but another one."""

    def rewrite(cache):
        path = cache / "shard-00001.safetensors"
        with safe_open(path, "pt") as file:
            header = json.loads(file.metadata()["index"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        for tensor in tensors.values():
            change(tensor)
        header["sums"] = {name: checksum(tensor) for name, tensor in tensors.items()}
        save_file(tensors, path, metadata={"index": json.dumps(header)})

    return rewrite


def cut(cache):
    path = cache / "shard-00001.safetensors"
    path.write_bytes(path.read_bytes()[:3000])


SHARD_FAULTS = {
    "missing": (lambda cache: (cache / "shard-00001.safetensors").unlink(), "shard-00001.safetensors is missing"),
    "another of the store": (copy_over("shard-00000.safetensors", "shard-00001.safetensors"), "is a copy of shard 0"),
    "of another store": (copy_over("../other/shard-00001.safetensors", "shard-00001.safetensors"), "of another store"),
    "other numbers": (rewritten(lambda tensor: tensor.mul_(2)), "is not the shard that the store was finished with"),
    "not a number": (
        rewritten(lambda tensor: tensor.fill_(torch.nan)),
        "is not the shard that the store was finished",
    ),
    "empty": (lambda cache: (cache / "shard-00001.safetensors").write_bytes(b""), "shard-00001.safetensors is broken"),
    "cut": (cut, "shard-00001.safetensors is broken"),
    "a folder": (
        lambda cache: ((cache / "shard-00001.safetensors").unlink(), (cache / "shard-00001.safetensors").mkdir()),
        "shard-00001.safetensors is missing",
    ),
    "another file": (
        lambda cache: save_file({"a": torch.ones(1)}, cache / "shard-00001.safetensors"),
        "shard-00001.safetensors is broken",
    ),
}


@pytest.mark.parametrize("fault", SHARD_FAULTS)
def test_a_shard_that_does_not_belong_is_refused_and_made_again(world, stored, tmp_path, fault):
    shutil.copytree(stored, tmp_path / "stored")
    cache, (change, reason) = tmp_path / "stored" / "c", SHARD_FAULTS[fault]
    change(cache)
    with pytest.raises(ValueError, match=f"1 of 3 shards can't be used; .*{re.escape(reason)}"):
        run("distill.py", *distilling(world, cache, tmp_path / "run", "--trunk-blocks", 2))
    assert not (tmp_path / "run").exists()
    if fault != "a folder":
        run("cache_teacher.py", *flags(world, cache, "--trunk-blocks", 2))
        assert_same_store(cache, stored / "c")


def test_one_bit_of_a_stored_tensor_is_found(world, stored, tmp_path):
    shutil.copytree(stored / "c", tmp_path / "c")
    shard = tmp_path / "c" / "shard-00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(bytes(content))
    store = FeatureStore.open(tmp_path / "c", json.loads((tmp_path / "c" / "cache.json").read_text())["made_from"])
    assert store.read(0, "features").isfinite().all()
    with pytest.raises(ValueError, match=r"shard-00001.*corrupt"):
        [store.read(view, kind) for view in (2, 3) for kind in ("features", "trunk")]


def without(field):
    return lambda content: json.dumps({key: value for key, value in json.loads(content).items() if key != field})


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda content: "", r"cache\.json is broken; delete the folder"),
        (lambda content: content[: len(content) // 2], r"cache\.json is broken; delete the folder"),
        (lambda content: "[1, 2]", r"cache\.json is broken; delete the folder"),
        (lambda content: "\udcff", r"cache\.json is broken; delete the folder"),
        (without("format"), "has the format None; this version reads"),
        (without("made_from"), "its 'made_from' is missing"),
        (without("num_views"), "its 'num_views' is missing"),
        (without("shards"), "its 'shards' is missing"),
        (lambda content: json.dumps({**json.loads(content), "shard_views": 0}), "its numbers don't fit"),
        (lambda content: json.dumps({**json.loads(content), "shards": ["a"]}), "its numbers don't fit"),
    ],
)
def test_a_broken_record_of_the_store_is_one_line(world, stored, tmp_path, capsys, change, reason):
    shutil.copytree(stored / "c", tmp_path / "c")
    path = tmp_path / "c" / "cache.json"
    path.write_text(change(path.read_text()), errors="surrogateescape")
    for name, words in (
        ("distill.py", distilling(world, tmp_path / "c", tmp_path / "run")),
        ("cache_teacher.py", flags(world, tmp_path / "c", "--trunk-blocks", 2)),
    ):
        assert run_as_command(name, *words) == 2
        complaint = capsys.readouterr().err.splitlines()[-1]
        assert complaint.startswith(f"{name}: error: ") and re.search(reason, complaint), complaint


def test_estimate_is_printed_and_a_full_disk_is_refused_before_the_start(world, tmp_path, monkeypatch, capsys):
    run("cache_teacher.py", *flags(world, tmp_path / "c", "--estimate"))
    printed = capsys.readouterr().out
    assert "6 of 6 views to do in 3 shards" in printed and "GB of disk" in printed and " megapixels " in printed
    assert not (tmp_path / "c").exists()
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: usage(10**9, 10**9, 1000))
    with pytest.raises(OSError, match=r"has 0\.00 GB free"):
        run("cache_teacher.py", *flags(world, tmp_path / "c"))
    assert not (tmp_path / "c").exists()


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
