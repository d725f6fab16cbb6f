"""Pictures shared among two real processes of gloo that `torchrun` starts, one of them killed on the way."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image

from spar_cli.main import main

pytestmark = pytest.mark.slow
LABELS = "road; car, automobile; sky"
ROOT = Path(__file__).resolve().parents[1]


def launch(*words: object, processes: int = 2) -> subprocess.Popen:
    # `accelerate launch` starts several processes on GPUs alone; without MPI it runs one on a CPU.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "spar_hf"]
    environment = {
        **os.environ,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]),
    }
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*command, *map(str, words)], env=environment, **pipes)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    printed, _ = process.communicate(timeout=900)
    assert process.returncode == status, printed
    return printed


@pytest.fixture
def photos(tmp_path, monkeypatch) -> Path:
    """A working folder with forty pictures of two sizes, one of which is broken."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for number in range(40):
        shape = (12, 10 + number % 2, 3)
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8).repeat(8, 0).repeat(8, 1)).save(
            tmp_path / "photos" / f"{number:02d}.png"
        )
    broken = tmp_path / "photos" / "13.png"
    broken.write_bytes(broken.read_bytes()[:100])
    return tmp_path / "photos"


def maps_in(folder: str) -> dict[str, np.ndarray]:
    return {path.name: np.asarray(Image.open(path)) for path in Path(folder).rglob("*-labels.png")}


def done_in(folder: str) -> list[str]:
    lines = [json.loads(line) for file in Path(folder).glob("*.jsonl") for line in file.read_text().splitlines()]
    return [line["stem"] for line in lines if "stem" in line]


def test_two_processes_do_what_one_does_and_go_on_after_a_kill(photos, model_folder, capsys):
    words = ["segment", "photos", "--labels", LABELS, "--model", model_folder, "--batch-size", "1", "--format", "png"]
    words += ["--format", "coco", "--workers", "1"]
    assert main([*words, "--output", "one", "--json", "one.json"]) == 1
    one = maps_in("one")
    assert len(one) == 39

    process = launch(*words, "--output", "two", "--json", "two.json")
    end = time.monotonic() + 600
    while len(list(Path("two").glob("*.jsonl"))) < 2:  # both have done something
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.01)
    workers = [child for child in psutil.Process(process.pid).children(recursive=True) if "spar_hf" in child.cmdline()]
    rank_1 = [child for child in workers if child.environ().get("RANK") == "1"]
    os.kill(rank_1[0].pid, signal.SIGKILL)
    process.communicate(timeout=900)
    assert process.returncode != 0
    done = done_in("two")
    assert 0 < len(done) < 39 and len(set(done)) == len(done)
    kept = {path: path.stat().st_mtime_ns for path in Path("two").glob("*-labels.png") if path.name[:2] in done}

    printed = finish(launch(*words, "--output", "two", "--json", "two.json", "--resume"), status=1)
    assert f"{39 - len(done)} of 40 pictures" in printed and f"{len(done)} were done before" in printed
    assert printed.count("1 of 40 pictures could not be done; the others are.") == 1
    assert [path for path, time in kept.items() if path.stat().st_mtime_ns != time] == []
    two = maps_in("two")
    assert two.keys() == one.keys() and all(np.array_equal(two[name], one[name]) for name in one)
    assert [path.name for path in Path("two").glob("*.jsonl")] == ["spar-segment.jsonl"]
    ours, theirs = (json.loads(Path(f"{name}.json").read_text()) for name in ("two", "one"))
    assert [entry["image"] for entry in ours["images"]] == [entry["image"] for entry in theirs["images"]]
    assert [entry["image"] for entry in ours["failed"]] == ["photos/13.png"]
    coco = [json.loads(Path(name, "coco-instances.json").read_text()) for name in ("one", "two")]
    assert coco[0] == coco[1] and len(coco[0]["images"]) == 39
    capsys.readouterr()
    assert main([*words, "--output", "two", "--resume"]) == 1  # one process takes up what two have done
    assert "0 of 40 pictures" in capsys.readouterr().out


def test_features_are_shared(photos, model_folder):
    (photos / "13.png").unlink()
    printed = finish(launch("features", "photos", "--model", model_folder, "--output", "out", "--workers", "0"))
    assert "39 of 39 pictures" in printed
    assert len(list(Path("out").glob("*.safetensors"))) == 39


def test_an_evaluation_by_two_is_that_of_one_to_the_last_pixel(tmp_path, monkeypatch, model_folder):
    from safetensors.numpy import load_file

    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(0)
    for folder in ("images", "masks"):
        Path(folder).mkdir()
    for number in range(9):
        blocks = rng.integers(0, 256, (8, 9, 3), dtype=np.uint8)
        Image.fromarray(blocks.repeat(8, 0).repeat(8, 1)).save(f"images/{number}.png")
        Image.fromarray(rng.integers(0, 3, (64, 72), dtype=np.uint8)).save(f"masks/{number}.png")
    Path("classes.txt").write_text("road\ncar, automobile\nsky\n")
    words = ["evaluate", "--images", "images", "--masks", "masks", "--classes", "classes.txt", "--model", model_folder]
    words += ["--protocol", "spar", "--short-side", "64"]
    assert main([*words, "--json", "one.json", "--state", "one.safetensors"]) == 0
    finish(launch(*words, "--json", "two.json", "--state", "two.safetensors"))
    one, two = (json.loads(Path(f"{name}.json").read_text()) for name in ("one", "two"))
    measured = ("seconds_per_image", "seconds_per_image_mean", "peak_memory_mb", "command")
    for result in (one, two):
        for name in measured:
            del result[name]
    assert one == two and one["num_images"] == 9
    for kind in ("pixels", "boundary"):
        assert np.array_equal(*(load_file(f"{name}.safetensors")[kind] for name in ("one", "two")))
    # The same state, by one process after two.
    assert main([*words, "--json", "three.json", "--state", "two.safetensors"]) == 0
    assert json.loads(Path("three.json").read_text())["mean_iou"] == one["mean_iou"]
