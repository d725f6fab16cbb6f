"""Many pictures: where they come from, batches, processes beside the network, and going on after a stop."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import load_file

from spar_cli.flow import Buckets, Picture, Room
from spar_cli.main import main
from spar_cli.output import output_stems
from spar_hf.journal import Journal
from spar_hf.processes import Processes
from spar_hf.sources import pictures
from spar_hf.workers import Workers

LABELS = "road; car, automobile; sky"
SIZES = ((64, 80), (80, 64), (64, 80), (70, 91), (64, 80), (80, 64))  # height, width
NAMES = ("a.png", "b.jpg", "deep/a.png", "deep/a.jpg", "deep/er/c.png", "d.png")


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A working folder with six pictures of three sizes in `photos`, in sub-folders and with names that meet."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for name, (height, width) in zip(NAMES, SIZES, strict=True):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        blocks = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)[:height, :width]).save(path, quality=95)
    return tmp_path / "photos"


@pytest.fixture
def segment(model_folder):
    """`segment("photos", "--output", "out")`: the command's exit status."""

    def run(*words: object) -> int:
        return main(["segment", *map(str, words), "--labels", LABELS, "--model", model_folder])

    return run


def label_maps(folder: str | Path) -> dict[str, np.ndarray]:
    """The label map of each picture, by the name of its outputs."""
    found = {
        path.relative_to(folder).as_posix().removesuffix("-labels.png"): np.asarray(Image.open(path))
        for path in Path(folder).rglob("*-labels.png")
    }
    return dict(sorted(found.items()))


def assert_same(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray], but: float = 0.0) -> None:
    """The same names and label maps, but for a fraction of the pixels."""
    assert ours.keys() == theirs.keys()
    for name, label_map in ours.items():
        assert label_map.shape == theirs[name].shape
        assert (label_map != theirs[name]).mean() <= but, name


def journal_of(folder: str) -> list[dict]:
    return [json.loads(line) for line in Path(folder, "spar-segment.jsonl").read_text().splitlines()]


# --- sources ---------------------------------------------------------------------------------------------------


def write_tar(path: Path, photos: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for file in sorted(photos.rglob("*.*")):
            tar.add(file, arcname=file.relative_to(photos).as_posix())
            note = tarfile.TarInfo(file.relative_to(photos).with_suffix(".json").as_posix())
            note.size = 2
            tar.addfile(note, io.BytesIO(b"{}"))


def test_every_source_gives_the_same_results(photos, segment, capsys):
    import datasets

    files = sorted(photos.rglob("*.*"))
    Path("list.txt").write_text("\n".join(f"{file}\n" for file in files))
    write_tar(Path("shard.tar"), photos)
    data = datasets.Dataset.from_dict({"photo": [str(file) for file in files], "note": list(range(6))})
    data.cast_column("photo", datasets.Image()).save_to_disk("set")

    assert segment("photos", "--output", "by-folder", "--workers", "0", "--batch-size", "1") == 0
    whole = label_maps("by-folder")
    assert list(whole) == ["a", "b", "d", "deep/a", "deep/a-2", "deep/er/c"]
    assert re.search(r"^6 of 6 pictures in .* images/s, the network \d+ % .*by-folder$", capsys.readouterr().out)
    for words in (["photos/**/*.*"], ["@list.txt"]):
        assert segment(*words, "--output", "again", "--workers", "0") == 0
        assert_same(label_maps("again"), whole)
    assert segment("shard.tar", "--output", "by-tar", "--workers", "0") == 0
    assert_same(label_maps("by-tar/shard"), whole)
    assert segment("--dataset", "set", "--image-column", "photo", "--output", "by-set", "--workers", "0") == 0
    numbered = label_maps("by-set")
    assert list(numbered) == ["0", "1", "2", "3", "4", "5"]
    stems = {line["image"]: line["stem"] for line in journal_of("by-folder") if "stem" in line}
    for number, file in enumerate(files):
        assert np.array_equal(numbered[str(number)], whole[stems[str(file.relative_to(Path.cwd()))]])


def test_the_network_sees_batches_of_one_size_and_finds_the_same(photos, segment, monkeypatch):
    from spar_hf.segmentation_spar import FromFeatures

    seen = []
    forward = FromFeatures.__call__

    def watched(self, pixel_values, encoded):
        seen.append(tuple(pixel_values.shape))
        return forward(self, pixel_values, encoded)

    monkeypatch.setattr(FromFeatures, "__call__", watched)
    assert segment("photos", "--output", "one", "--batch-size", "1", "--workers", "0") == 0
    assert len(seen) == 6 and {shape[0] for shape in seen} == {1}
    seen.clear()
    assert segment("photos", "--output", "many", "--batch-size", "2", "--workers", "2") == 0
    assert sorted(shape[0] for shape in seen) == [1, 1, 2, 2] and len({shape[2:] for shape in seen}) == 3
    assert_same(label_maps("many"), label_maps("one"), but=0.001)  # sums in another order: ties may fall otherwise
    overlays = [sorted(Path(folder).rglob("*-overlay.png")) for folder in ("one", "many")]
    assert len(overlays[0]) == len(overlays[1]) == 6


def test_features_of_many_are_those_of_one(photos, model_folder):
    words = ["--model", model_folder, "--workers"]
    assert (
        main(["features", "photos", "--output", "many", "--batch-size", "3", *words, "2", "--dtype", "bfloat16"]) == 0
    )
    assert main(["features", "photos/a.png", "--output", "one", *words, "0", "--dtype", "bfloat16"]) == 0
    one, many = (load_file(f"{folder}/a.safetensors")["patch_embeds"] for folder in ("one", "many"))
    assert one.dtype == many.dtype and one.shape == many.shape
    assert (one - many).abs().max() < 0.05 * one.abs().max()
    assert len(list(Path("many").rglob("*.safetensors"))) == 6
    before = Path("many/d.safetensors").stat().st_mtime_ns
    assert main(["features", "photos", "--output", "many", "--resume", *words, "0", "--dtype", "bfloat16"]) == 0
    assert Path("many/d.safetensors").stat().st_mtime_ns == before


def test_stems_mirror_paths_stay_and_never_meet():
    called = ["a/x.png", "a/x.jpg", "A/X.tif", "../x.png", "a/../x.png", "b/x.png"]
    stems = output_stems(called, called)
    assert stems == ["a/x", "a/x-2", "A/X-3", "image/x", "a/image/x", "b/x"]
    # One more picture, that comes first, takes no name from those that have one.
    again = output_stems(["a/x.bmp", *called], ["a/x.bmp", *called], dict(zip(stems, called, strict=True)))
    assert again == ["a/x-4", *stems]
    assert len(set(output_stems(["frame.jpg"] * 5000))) == 5000


def test_results_are_no_pictures(photos, segment, capsys):
    assert segment("photos", "--output", "photos/out", "--workers", "0") == 0
    assert segment("photos", "--output", "photos/out", "--workers", "0") == 0
    assert "6 of 6 pictures" in capsys.readouterr().out
    assert segment("photos", "--output", "photos") == 2
    assert "results would go among the pictures in photos; give another --output" in capsys.readouterr().err


# --- going on --------------------------------------------------------------------------------------------------


def test_resume_does_what_is_missing_and_nothing_else(photos, segment, capsys):
    words = ("photos", "--output", "out", "--workers", "0", "--json", "all.json")
    assert segment(*words) == 0
    whole, kept = label_maps("out"), {path: path.stat().st_mtime_ns for path in Path("out").rglob("*.png")}
    assert len(kept) == 12
    Path("out/deep/a-2-overlay.png").unlink()  # a result of which a part is missing is none
    journal = Path("out/spar-segment.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:-1]) + lines[-1][:20])  # a kill has cut the last line
    capsys.readouterr()
    assert segment(*words, "--resume") == 0
    assert re.match(r"2 of 6 pictures .*, 4 were done before; results in out", capsys.readouterr().out)
    changed = {path.name for path, time in kept.items() if path.stat().st_mtime_ns != time}
    assert {name.rpartition("-")[0] for name in changed} == {"a-2", json.loads(lines[-1])["stem"].split("/")[-1]}
    assert_same(label_maps("out"), whole)
    in_json = [entry["image"] for entry in json.loads(Path("all.json").read_text())["images"]]
    assert in_json == pictures([Path("photos")])[0].names

    assert segment(*words, "--resume", "--score-threshold", "0.9") == 2
    line = capsys.readouterr().err
    assert line.count("\n") == 1
    assert "--resume: out holds results of other options, --score-threshold; give the same ones or another" in line
    assert segment(*words, "--resume", "--batch-size", "2", "--max-bad-images", "3") == 0  # these change no result
    assert "0 of 6 pictures" in capsys.readouterr().out


def test_a_picture_that_comes_later_takes_no_other_s_name(photos, segment):
    words = ("photos", "--output", "out", "--workers", "0")
    assert segment(*words) == 0
    whole = label_maps("out")
    Image.new("RGB", (64, 64), "red").save(photos / "deep/a.bmp")  # comes before the others of that name
    assert segment(*words, "--resume") == 0
    now = label_maps("out")
    assert set(now) - set(whole) == {"deep/a-3"}
    assert_same({name: now[name] for name in whole}, whole)


def test_weights_that_are_others_are_refused(photos, segment, model_folder, capsys, tmp_path):
    import shutil

    import spar_hf

    other = tmp_path / "model"
    shutil.copytree(model_folder, other)
    words = ["segment", "photos", "--output", "out", "--workers", "0", "--labels", LABELS, "--model", str(other)]
    assert main(words) == 0
    model, _ = spar_hf.load(str(other))
    model.vision_model.visual_projection.weight.data += 0.1
    model.save_pretrained(other)
    assert main([*words, "--resume"]) == 2
    assert "holds results of other options, --model;" in capsys.readouterr().err


def test_bad_pictures_are_named_counted_and_limited(photos, segment, capsys):
    for name in ("bad1.png", "bad2.png"):
        (photos / name).write_bytes((photos / "a.png").read_bytes()[:60])
    Path("list.txt").write_text("photos/a.png\nphotos/missing.png\n")
    assert segment("photos", "--output", "out", "--workers", "1", "--json", "r.json") == 1
    err = capsys.readouterr().err
    assert "image 'photos/bad1.png'" in err and "2 of 8 pictures could not be done; the others are." in err
    assert [entry["image"] for entry in json.loads(Path("r.json").read_text())["failed"]] == [
        "photos/bad1.png", "photos/bad2.png"
    ]  # fmt: skip
    assert len(label_maps("out")) == 6
    assert segment("photos", "--output", "few", "--workers", "0", "--max-bad-images", "1") == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert "2 pictures cannot be read and --max-bad-images is 1; the last is photos/bad2.png. What is done" in last
    done = len(label_maps("few"))
    assert 0 < done < 6
    (photos / "bad1.png").unlink()
    assert segment("photos", "--output", "few", "--workers", "0", "--max-bad-images", "1", "--resume") == 1
    assert f"{done} were done before" in capsys.readouterr().out and len(label_maps("few")) == 6
    assert segment("@list.txt", "--output", "listed", "--workers", "0") == 1
    assert "photos/missing.png' does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("workers", ["0", "1"])
def test_a_full_disk_is_one_line_and_what_was_written_counts(photos, segment, monkeypatch, capsys, workers):
    save, left = Image.Image.save, [5]

    def until_full(self, *arguments, **options):
        left[0] -= 1
        if left[0] < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, *arguments, **options)

    words = ("photos", "--output", "out", "--workers", workers)
    with monkeypatch.context() as patched:
        patched.setattr(Image.Image, "save", until_full)
        assert segment(*words) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "disk full while writing out/" in err and "--resume" in err
    done = [line["stem"] for line in journal_of("out") if "stem" in line]
    assert len(done) == 2 == len(label_maps("out")) == len(list(Path("out").rglob("*-overlay.png")))
    assert not list(Path("out").rglob(".*.tmp"))
    assert segment(*words, "--resume") == 0
    assert "2 were done before" in capsys.readouterr().out and len(label_maps("out")) == 6


def test_files_about_all_pictures_go_on_too(photos, segment):
    words = ("photos", "--output", "out", "--format", "coco", "--workers", "1")
    assert segment(*words) == 0
    whole = json.loads(Path("out/coco-instances.json").read_text())
    assert len(whole["images"]) == 6
    journal = Path("out/spar-segment.jsonl")
    lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(lines[:3]))
    assert segment(*words, "--resume") == 0
    assert json.loads(Path("out/coco-instances.json").read_text()) == whole


# --- mistakes --------------------------------------------------------------------------------------------------


def test_sources_that_are_none(photos, segment, capsys):
    import datasets

    write_tar(Path("whole.tar"), photos)
    with tarfile.open("whole.tar") as tar:
        second = tar.getmembers()[1]
    for name, cut in (
        ("cut", second.offset_data + 1),
        ("cut-in-header", second.offset + 99),
        ("no-end", second.offset),
    ):
        Path(f"{name}.tar").write_bytes(Path("whole.tar").read_bytes()[:cut])
    Path("empty").mkdir()
    Path("empty.txt").touch()
    data = datasets.Dataset.from_dict({"photo": ["photos/a.png"], "note": [1]})
    datasets.DatasetDict(train=data.cast_column("photo", datasets.Image())).save_to_disk("set")
    capsys.readouterr()
    cases = [
        (["cut.tar"], "cut.tar cannot be read as a tar (unexpected end of data); give whole, uncompressed tars"),
        (["photos", "cut-in-header.tar"], "cut-in-header.tar cannot be read as a tar (unexpected end of data)"),
        (["no-end.tar"], "no-end.tar cannot be read as a tar (unexpected end of data)"),
        (["empty"], "empty: no image there (.jpg, .jpeg"),
        (["photos/*.gif"], "no file is called like photos/*.gif; give another pattern, or a folder"),
        (["@empty.txt"], "empty.txt is empty; give a list of picture files, one a line"),
        (["@no.txt"], "no.txt: No such file"),
        (["@photos/a.png"], "photos/a.png is no text; give a list"),
        (
            ["--dataset", "set", "--image-column", "foto"],
            "--dataset set: 'foto' is no image column; image columns: ['photo']",
        ),
        (["--dataset", "set", "--dataset-split", "test"], "--dataset set has no split 'test'; its splits: train"),
        (["photos", "--dataset", "set"], "pictures are to come from photos and from --dataset; give one of them"),
        (["photos", "--image-column", "x"], "--image-column belongs to --dataset, which is not given; leave it out"),
    ]
    for words, message in cases:
        assert segment(*words) == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1, err
    assert not Path("spar-output").exists()


def test_a_journal_that_is_none_is_refused(photos, segment, capsys):
    Path("out").mkdir()
    Path("out/spar-segment.jsonl").write_text("[]\n")
    assert segment("photos", "--output", "out", "--resume") == 2
    assert "spar-segment.jsonl, line 1, is no line of a journal. Move the file away" in capsys.readouterr().err


# --- parts -----------------------------------------------------------------------------------------------------


class Echo:
    """A tool that says who it is."""

    def begin(self, number):
        self.number = number

    def who(self, item):
        return item, self.number, os.getpid()

    def fail(self, item):
        raise ValueError(f"no {item}")

    def die(self, item):
        os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("count", [0, 2])
def test_workers_keep_order_and_pass_errors_on(count):
    with Workers(Echo(), count) as workers:
        found = [(item, workers.result(future)) for item, future in workers.ahead("who", range(20), lambda: 4)]
        assert [item for item, _ in found] == [answer[0] for _, answer in found] == list(range(20))
        pids = {answer[2] for _, answer in found}
        assert pids == {os.getpid()} if count == 0 else os.getpid() not in pids
        assert {answer[1] for _, answer in found} <= set(range(max(count, 1)))
        with pytest.raises(ValueError, match="no 3"):
            workers.result(workers.submit("fail", 3))


def test_a_worker_that_dies_is_one_line():
    with Workers(Echo(), 1) as workers, pytest.raises(OSError, match=r"has died.*--resume, and fewer --workers"):
        workers.result(workers.submit("die", 0))
    with Workers(Echo(), 1) as workers:
        workers.submit("die", 0).exception()
        with pytest.raises(OSError, match="has died"):
            workers.submit("who", 1)


def test_journals_of_several_processes_become_one(tmp_path):
    for process in range(3):
        journal = Journal(tmp_path, "segment", {"labels": "a"}, process)
        journal.write(f"picture-{process}", {"image": f"{process}.png"})
        journal.close()
    assert len(list(tmp_path.iterdir())) == 3
    main_journal = Journal(tmp_path, "segment", {"labels": "a"})
    main_journal.merge()
    assert [path.name for path in tmp_path.iterdir()] == ["spar-segment.jsonl"]
    lines = list(main_journal.lines())
    assert [line["stem"] for line in lines if "stem" in line] == ["picture-0", "picture-1", "picture-2"]
    assert {line["run"] for line in lines} == {main_journal.run}
    assert Journal(tmp_path, "segment", {"labels": "b"}).run != main_journal.run


def test_shares_are_the_whole_once():
    items = list(range(11))
    shares = [Processes(index, 3).share(items) for index in range(3)]
    assert sorted(item for share in shares for item in share) == items and {len(share) for share in shares} == {3, 4}


def test_large_pictures_wait_in_smaller_numbers(monkeypatch):
    monkeypatch.setattr("spar_cli.flow.MEMORY_BYTES", 100_000)
    room = Room(32)
    assert room() == 32
    buckets = Buckets(8, room)
    full = []
    for number in range(10):
        image = Image.new("RGB", (100, 50))  # 15,000 bytes, and 6,000 of pixels of its own size
        room.see(picture := Picture(number, str(number), image, np.zeros((3, 1, 500 + number % 2), np.float32)))
        full.append([waiting.number for waiting in buckets.add(picture)])
    assert room() == 4
    assert full == [[], [], [], [0, 2], [], [1, 3, 5], [], [], [4, 6, 8], []]
    assert [[picture.number for picture in rest] for rest in buckets.rest()] == [[7, 9]]
