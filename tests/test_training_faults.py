"""Tests of training's faults: refused in one line before anything is written; killed, stopped and full runs go on."""

from __future__ import annotations

import argparse
import errno
import json
import os
import re
import resource
import shutil
import signal
from functools import partial

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from distillation_help import (
    SIZES,
    Process,
    finish,
    run,
    run_as_command,
    save_network,
    save_pictures,
    script,
    start,
    wait_for,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from spar_cli.training_options import RunStopped
from spar_hf import files
from spar_hf.distillation import specs
from spar_hf.distillation.checkpoint import save_checkpoint
from spar_hf.distillation.specs import TeacherSpec

LEARNING = ("--learning-rate", "1e-3", "--epochs", 2, "--save-every", 3, "--log-every", 1)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A network, six pictures."""
    folder = tmp_path_factory.mktemp("world")
    return save_network(folder / "net"), save_pictures(folder / "pictures")


def flags(world, output, *more):
    network, pictures = world
    return ("--student", network, "--images", pictures, "--output", output, "--stride-px", 12, "--workers", 0,
            "--tracker", "none", *SIZES, *LEARNING, *more)  # fmt: skip


def caching(world, cache, *more):
    network, pictures = world
    return ("--student", network, "--images", pictures, "--cache", cache, "--stride-px", 12, "--workers", 0,
            "--shard-views", 2, *SIZES, *more)  # fmt: skip


def weights(output):
    return load_file(output / "model" / "model.safetensors")


def assert_same(ours, theirs):
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def fails(capsys, name, *words):
    """The one line of a mistake."""
    capsys.readouterr()
    assert run_as_command(name, *words) == 2
    printed, complained = capsys.readouterr()
    (line,) = [line for line in complained.splitlines() if "error" in line]
    assert line.startswith(f"{name}: error: ") and complained.rstrip().endswith(line)
    assert "Traceback" not in printed + complained
    return line


@pytest.fixture(scope="module")
def reference(world, tmp_path_factory):
    """A run of 12 steps without a disturbance; the checkpoints of steps 9 and 12 are kept."""
    output = tmp_path_factory.mktemp("reference") / "run"
    run("distill.py", *flags(world, output))
    return output


# ---- flags

COUNTS = {
    "distill.py": (
        "--save-every", "--log-every", "--batch-size", "--epochs", "--max-steps", "--accumulate", "--draws",
        "--evaluate-limit",
    ),
    "cache_teacher.py": ("--draws", "--shard-views"),
    "both": (
        "--picture-book", "--max-images", "--window-batch", "--stride-px", "--long-side-px", "--short-side-px",
        "--min-side-px", "--multiple-px",
    ),
}  # fmt: skip
COUNTS_OR_0 = {
    "distill.py": ("--warmup-steps", "--seed", "--trunk-blocks"),
    "cache_teacher.py": ("--trunk-blocks",),
    "both": ("--workers", "--max-bad-images", "--augmentation-seed", "--teacher-short-side-px"),
}
WRONG = {
    "distill.py": [
        (("--learning-rate", "nan"), "--learning-rate: it is 'nan'; give a number above 0"),
        (("--learning-rate", "inf"), "give a number above 0"),
        (("--learning-rate", "0"), "give a number above 0"),
        (("--weight-decay=-1e-4",), "give a number, at least 0"),
        (("--clip-norm", "0"), "give a number above 0"),
        (("--evaluate-scales", "4", "nan"), "give a number above 0"),
        (("--evaluate-scales", "0.1"), "less than a patch"),
        (("--evaluate-scales", "1"), "is a vision tower; leave it out"),
        (("--epohcs", "3"), "there is no option '--epohcs'.*Did you mean '--epochs'"),
        (("--epoch", "3"), "there is no option '--epoch'.*Did you mean '--epochs'"),
        (("--schedule", "cosin"), "--schedule: there is no choice 'cosin'.*Did you mean 'cosine'"),
        (("--warmup-steps", "5"), "no part in --schedule constant"),
        (("--loss", "l1"), "choose one of mse, distance"),
        (("--mixed-precision", "bf61"), "Did you mean 'bf16'"),
        (("--learning-rate", "1e38", "--weight-decay", "1e38"), "must be below 1"),
        (("--optimizer", "sgd"), "there is no option '--optimizer'"),
        (("--tracker", "wandb"), "--tracker wandb is not installed"),
        (("--train", "qkv"), "no part 'qkv'"),
        (("--trunk-blocks", "2"), "give the --cache that holds it"),
        (("--push-to-hub", "a/b/c"), "a/b/c"),
        (("--output", ""), "--output: it is '', which is empty"),
        (("--output", __file__), "is a file; give a folder"),
        (("--output", f"{__file__}/run"), "is a file; give a folder"),
    ],
    "cache_teacher.py": [
        (("--cache", ""), "--cache: it is '', which is empty"),
        (("--cache", __file__), "is a file; give a folder"),
        (("--shard-view", "3"), "Did you mean '--shard-views'"),
    ],
    "both": [
        (("--crop-range", "0.9", "0.4"), "--crop-range is 0.9 0.4"),
        (("--scale-range", "nan", "1"), "--scale-range: it is 'nan'; give a number from 0 to 1"),
        (("--scale-range", "0", "1"), "--scale-range is 0.0 1.0"),
        (("--scale-range", "0.5", "inf"), "give a number from 0 to 1"),
        (("--crop-probability", "1.5"), "give a number from 0 to 1"),
        (("--flip-probability", "nan"), "give a number from 0 to 1"),
        (("--multiple-px", "12"), "--multiple-px is 12; it must be a multiple of the patch"),
        (("--min-side-px", "4096"), "--min-side-px 4096"),
        (("--window-px", "33"), "--window-px is 33; it must be a multiple of the patch"),
        (("--window-px", "small"), "give a whole number of pixels, or native, or paper"),
        (("--stride-px", "64"), "--stride-px is 64; it must be from 1 to the window's 32"),
        (("--window-px", "0", "--stride-px", "12"), "leave one of them out"),
        (("--teacher-dtype", "half"), "choose one of auto, float32"),
        (("--teacher-method", "naclpi"), "Did you mean 'naclip'"),
        (("--teacher-network", "facebook/dino"), "write NAME=VALUE"),
        (("--teacher-network", "dino=x/y"), "no method of the teacher takes a further network"),
        (("--student-reach", "windw"), "Did you mean 'window'"),
        (("--image-column", "picture"), "--image-column belongs to --dataset"),
        (("--stream-to", "there"), "--stream-to belongs to --dataset"),
        (("--images", "/no/such/folder"), "no image there"),
        (("--student", "nothing-there"), "there is no model 'nothing-there'"),
    ],
}


def table():
    """Script, flags, message."""
    for name in ("distill.py", "cache_teacher.py"):
        counts, counts_or_0 = ((*which[name], *which["both"]) for which in (COUNTS, COUNTS_OR_0))
        for words, message in (*WRONG[name], *WRONG["both"]):
            yield name, words, message
        for flag, word in (
            *((flag, "0") for flag in counts),
            *((flag, word) for flag in (*counts, *counts_or_0) for word in ("-1", "1.5", "many")),
        ):
            yield name, (flag, word), f"{flag}: it is '{word}'; give a whole number"


TABLE = list(table())


@pytest.mark.parametrize(("name", "words", "message"), TABLE, ids=lambda value: str(value)[:40])
def test_wrong_flags_are_refused_in_one_line_before_anything_is_written(
    world, tmp_path, capsys, monkeypatch, name, words, message
):
    monkeypatch.chdir(tmp_path)
    common = flags(world, "out") if name == "distill.py" else caching(world, "out")
    if words[0] in ("--picture-book", "--images"):
        at = common.index("--images")
        common = common[:at] + common[at + 2 :]
    line = fails(capsys, name, *common, *words)
    assert re.search(message, line), line
    assert list(tmp_path.iterdir()) == []


def test_every_number_among_the_flags_is_in_the_table(monkeypatch):
    """A new flag with a number must be validated, and stand here."""
    tested = {words[0] for _, words, _ in TABLE} | {"--weight-decay"}
    for name in ("distill.py", "cache_teacher.py"):
        with script(name) as module:
            actions = module.parser()._actions
        plain = [a for a in actions if a.type in (int, float)]
        assert plain == [], "int and float accept what no run can use; take a type of spar_cli.parser"
        numbers = [
            a for a in actions if isinstance(a.default, int | float) and not isinstance(a, argparse._HelpAction)
        ]
        left = {a.option_strings[0] for a in numbers if a.nargs != 0} - tested
        assert left == set()


@pytest.mark.parametrize("name", ["distill.py", "cache_teacher.py"])
def test_help_teaches(name, capsys):
    with pytest.raises(SystemExit) as leaving:
        run_as_command(name, "--help")
    printed = capsys.readouterr().out
    assert leaving.value.code == 0
    assert printed.startswith(f"usage: {name} --student NAME") and f"training/{name} --student openai" in printed
    assert "exit status: 0; 2 after a mistake" in printed and "143" in printed


@pytest.mark.slow
def test_a_mistake_in_a_process_of_its_own_is_one_line_and_status_2(world, tmp_path):
    printed = finish(start("distill.py", *flags(world, tmp_path / "run", "--train", "qkv")), status=2)
    assert [line for line in printed.splitlines() if "error" in line] == [printed.splitlines()[-1]]
    assert "Traceback" not in printed and not (tmp_path / "run").exists()


def test_a_model_of_no_run_is_not_replaced(world, tmp_path, capsys):
    (tmp_path / "out" / "model").mkdir(parents=True)
    assert "holds a model that is of no run" in fails(capsys, "distill.py", *flags(world, tmp_path / "out"))


# ---- networks


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused_and_named(world, tmp_path, capsys, value):
    broken = save_network(tmp_path / "net")
    content = load_file(broken / "model.safetensors")
    name = next(name for name in content if name.endswith("layers.0.mlp.fc1.weight"))
    content[name][0, 0] = value
    save_file(content, broken / "model.safetensors", metadata={"format": "pt"})
    for which, words in (
        ("distill.py", flags((broken, world[1]), tmp_path / "out")),
        ("distill.py", flags(world, tmp_path / "out", "--teacher-model", broken)),
        ("cache_teacher.py", caching((broken, world[1]), tmp_path / "out")),
        ("cache_teacher.py", caching(world, tmp_path / "out", "--teacher-model", broken)),
    ):
        line = fails(capsys, which, *words)
        assert str(broken) in line and "encoder.layers.0.mlp.fc1.weight holds NaN or infinity" in line
        assert not (tmp_path / "out").exists()


def test_a_loss_that_is_no_number_stops_with_the_batch_named(world, tmp_path):
    with pytest.raises(RunStopped, match=r"the loss is \[(nan|inf)\] in step \d+: p\d\.png"):
        run(
            "distill.py",
            *flags(world, tmp_path / "run", "--learning-rate", "1e30", "--weight-decay", "0", "--save-every", 50),
        )


def test_weights_that_training_has_broken_are_not_saved(tmp_path):
    network = torch.nn.Linear(3, 3)
    optimizer = torch.optim.AdamW(network.parameters())
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    network.weight.data[1, 1] = torch.nan
    with pytest.raises(
        ValueError, match=r"training has failed, checkpoint-00000007.*model\.weight holds NaN or infinity"
    ):
        save_checkpoint(tmp_path, Accelerator(cpu=True), network, optimizer, scheduler, 7, {})
    assert list(tmp_path.iterdir()) == []


def test_auto_is_the_fastest_type_and_that_of_the_store(world, tmp_path, monkeypatch):
    for dtype in (torch.bfloat16, torch.float32):
        monkeypatch.setattr(specs, "best_dtype", lambda device, dtype=dtype: dtype)
        assert TeacherSpec().on(torch.device("cpu")).dtype == str(dtype).removeprefix("torch.")
    assert TeacherSpec(dtype="float16").on(torch.device("cpu")).dtype == "float16"
    run("cache_teacher.py", *caching(world, tmp_path / "c", "--teacher-dtype", "bfloat16"))
    stored = ("--cache", tmp_path / "c", "--max-steps", 1)
    run("distill.py", *flags(world, tmp_path / "run", *stored, "--teacher-dtype", "auto"))
    assert json.loads((tmp_path / "run" / "run.json").read_text())["made_from"]["teacher"]["dtype"] == "bfloat16"
    with pytest.raises(ValueError, match=r"teacher\.dtype is 'bfloat16' there and 'float32' here"):
        run("distill.py", *flags(world, tmp_path / "x", *stored, "--teacher-dtype", "float32"))


# ---- checkpoints and the log


def tamper(path, change):
    """Writes a checkpoint again with other tensors, its header as it was."""
    with safe_open(path, "pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, metadata=metadata)


def flip_a_bit(path):
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def first_weight(tensors):
    return tensors[next(name for name in tensors if name.startswith("model."))].view(-1)


FAULTS = {
    "empty": (lambda path: path.write_bytes(b""), "is broken"),
    "half": (lambda path: path.write_bytes(path.read_bytes()[:5000]), "is broken"),
    "another file": (lambda path: save_file({"a": torch.ones(2)}, path), "is no state of a run"),
    "text": (lambda path: path.write_text("notes"), "is broken"),
    "a folder": (lambda path: (path.unlink(), path.with_suffix("").mkdir()), "is no checkpoint"),
    "one bit": (flip_a_bit, r"is broken \(check sum\)"),
    "other weights": (lambda path: tamper(path, lambda t: first_weight(t).mul_(2)), r"is broken \(check sum\)"),
    "not a number": (lambda path: tamper(path, lambda t: first_weight(t).fill_(torch.nan)), "holds NaN or infinity"),
    "infinite": (lambda path: tamper(path, lambda t: first_weight(t).fill_(torch.inf)), "holds NaN or infinity"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_checkpoint_is_passed_over_and_the_older_one_used(world, reference, tmp_path, capsys, fault):
    break_it, message = FAULTS[fault]
    output = tmp_path / "run"
    shutil.copytree(reference, output)
    break_it(output / "checkpoint-00000012.safetensors")
    (output / "checkpoint-of-mine").write_text("a file of the user's")
    run("distill.py", *flags(world, output, "--resume"))
    printed = capsys.readouterr().out
    assert "going on after step 9" in printed
    assert "passed over a checkpoint: checkpoint-of-mine is no checkpoint" in printed
    assert re.search(f"passed over a checkpoint: checkpoint-00000012.* {message}", printed), printed
    assert_same(weights(output), weights(reference))


def test_where_no_checkpoint_can_be_used_the_run_is_refused(world, reference, tmp_path, capsys):
    output = tmp_path / "run"
    shutil.copytree(reference, output)
    before = (output / "log.jsonl").read_bytes()
    for path in output.glob("checkpoint-*"):
        path.write_bytes(b"")
    line = fails(capsys, "distill.py", *flags(world, output, "--resume"))
    assert "no checkpoint in" in line and "00000009" in line and "Delete them to begin anew" in line
    assert (output / "log.jsonl").read_bytes() == before
    with pytest.raises(ValueError, match="holds a run; add --resume"):
        run("distill.py", *flags(world, output))


def test_a_run_with_other_flags_is_refused(world, reference, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(reference, output)
    files_before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    with pytest.raises(ValueError, match=r"other flags: learning_rate is 0\.001 there and 0\.5 here"):
        run("distill.py", *flags(world, output, "--resume", "--learning-rate", 0.5))
    # A checkpoint of another run among the run's own is passed over.
    run("distill.py", *flags(world, tmp_path / "other", "--seed", 1))
    shutil.copy(tmp_path / "other" / "checkpoint-00000012.safetensors", output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")}.keys() == files_before.keys()
    run("distill.py", *flags(world, output, "--resume"))
    assert_same(weights(output), weights(reference))


@pytest.mark.parametrize("cut", [True, False], ids=["cut", "broken"])
def test_a_log_that_is_cut_goes_on_and_a_broken_one_is_refused(world, reference, tmp_path, capsys, cut):
    output = tmp_path / "run"
    shutil.copytree(reference, output)
    (output / "checkpoint-00000012.safetensors").unlink()
    log = output / "log.jsonl"
    whole = log.read_bytes()
    log.write_bytes(whole[:-7] if cut else b"\xff{]\n" + whole)
    if not cut:
        line = fails(capsys, "distill.py", *flags(world, output, "--resume"))
        assert "log.jsonl, line 1, is no line of a log" in line
        return
    run("distill.py", *flags(world, output, "--resume"))
    assert "the last line was cut by a kill and is dropped" in capsys.readouterr().out
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    expected = [json.loads(line)["loss"] for line in whole.splitlines()]
    assert [line["loss"] for line in lines] == expected


# ---- drafts, signals, kills, full disks


def leave_drafts(folder):
    """What killed processes leave, and what is not to be touched: of a running process, of another machine."""
    ended = Process("distill.py", "--help")
    ended.finish()
    gone, running = ended.parts[0].pid, os.getppid()
    left = [folder / f".checkpoint-00000500.safetensors.{files.HOST}-{gone}.tmp", folder / f".run.json.{gone}.tmp"]
    model = folder / f".model.{files.HOST}-{gone}.tmp"
    stays = [folder / f".x.{files.HOST}-{running}.tmp", folder / ".x.elsewhere-1.tmp", folder / "notes.tmp"]
    model.mkdir(parents=True)
    (model / "model.safetensors").write_bytes(b"half")
    for path in (*left, *stays):
        path.write_bytes(b"half")
    return {path.name for path in (*left, model)}, {path.name for path in stays}


def test_the_next_run_clears_what_killed_ones_left(world, tmp_path, capsys):
    for folder, name, words in (
        (tmp_path / "run", "distill.py", flags(world, tmp_path / "run", "--max-steps", 1)),
        (tmp_path / "c", "cache_teacher.py", caching(world, tmp_path / "c")),
    ):
        left, stays = leave_drafts(folder)
        assert left
        run(name, *words)
        assert {path.name for path in folder.iterdir() if path.name.endswith(".tmp")} == stays


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_saves_says_so_and_goes_on_with_no_difference(world, tmp_path, number):
    long = ("--epochs", 5, "--save-every", 1000)
    run("distill.py", *flags(world, tmp_path / "whole", *long))
    process = Process("distill.py", *flags(world, tmp_path / "run", *long, "--workers", 1))
    log = tmp_path / "run" / "log.jsonl"
    wait_for(lambda: log.exists() and log.stat().st_size, process)
    process.kill(number)
    said = process.finish(128 + number)
    assert f"stopped by {number.name} after step" in said and "--resume goes on" in said
    assert len(list((tmp_path / "run").glob("checkpoint-*.safetensors"))) == 1
    assert not (tmp_path / "run" / "model").exists()
    run("distill.py", *flags(world, tmp_path / "run", *long, "--resume"))
    assert_same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


def test_a_signal_ends_the_writer_of_features_after_a_view(world, tmp_path):
    draws = ("--draws", 12)
    run("cache_teacher.py", *caching(world, tmp_path / "whole", *draws))
    process = Process("cache_teacher.py", *caching(world, tmp_path / "c", *draws))
    wait_for(lambda: list((tmp_path / "c").glob("shard-*")), process)
    process.kill(signal.SIGTERM)
    assert "stopped by SIGTERM; the same command goes on" in process.finish(143)
    with pytest.raises(ValueError, match="unfinished"):
        run("distill.py", *flags(world, tmp_path / "x", "--cache", tmp_path / "c", *draws))
    run("cache_teacher.py", *caching(world, tmp_path / "c", *draws))
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "c" / path.name).read_bytes(), path.name


def test_killed_and_resumed_ends_with_the_same_weights(world, tmp_path):
    long = ("--epochs", 6, "--log-every", 10)
    run("distill.py", *flags(world, tmp_path / "whole", *long))
    process = Process("distill.py", *flags(world, tmp_path / "killed", *long))
    wait_for(lambda: len(list((tmp_path / "killed").glob("checkpoint-*.safetensors"))) >= 2, process)
    process.kill(signal.SIGKILL)
    process.finish(-signal.SIGKILL)
    assert not (tmp_path / "killed" / "model").exists()
    run("distill.py", *flags(world, tmp_path / "killed", *long, "--resume"))
    assert_same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    steps = [json.loads(line)["step"] for line in (tmp_path / "killed" / "log.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == 36


def test_disk_that_fills_up_leaves_the_last_checkpoint_intact(world, reference, tmp_path, monkeypatch):
    output, real_fsync, full = tmp_path / "run", files.os.fsync, []

    def fsync(descriptor):
        if full or list(output.glob("checkpoint-*.safetensors")):
            full.append(True)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real_fsync(descriptor)

    monkeypatch.setattr(files.os, "fsync", fsync)
    with pytest.raises(OSError, match=r"disk full while writing .*checkpoint-00000006.* is intact"):
        run("distill.py", *flags(world, output))
    assert [path.name for path in output.glob("*checkpoint*")] == ["checkpoint-00000003.safetensors"]
    monkeypatch.undo()
    run("distill.py", *flags(world, output, "--resume"))
    assert_same(weights(output), weights(reference))


def files_up_to(limit_bytes):
    """For `Process`: no file may become larger, as on a disk with so much room."""
    return partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit_bytes, limit_bytes))


def test_full_disks_are_one_line_and_the_run_goes_on(world, reference, tmp_path):
    """The limit stops a checkpoint; then, with none to write, safetensors' own writing of the model."""
    whole = max(path.stat().st_size for path in reference.rglob("*.safetensors"))
    output = tmp_path / "run"
    process = Process("distill.py", *flags(world, output), before=files_up_to(whole // 8))
    said = process.finish(2)
    assert said.splitlines()[-1].startswith("distill.py: error: disk full while writing") and "Traceback" not in said
    assert not [path for path in output.iterdir() if path.name.endswith(".tmp")]

    run("distill.py", *flags(world, output))
    model = (output / "model" / "model.safetensors").stat().st_size
    shutil.rmtree(output / "model")
    process = Process("distill.py", *flags(world, output, "--resume"), before=files_up_to(model // 2))
    said = process.finish(2)
    assert f"error: disk full while writing {output / 'model'}. What was written" in said and "Traceback" not in said
    assert not (output / "model").exists() and not [path for path in output.iterdir() if path.name.endswith(".tmp")]
    run("distill.py", *flags(world, output, "--resume"))
    assert_same(weights(output), weights(reference))

    run("cache_teacher.py", *caching(world, tmp_path / "whole"))
    room = (tmp_path / "whole" / "cache.json").stat().st_size
    assert room < (tmp_path / "whole" / "shard-00000.safetensors").stat().st_size
    process = Process("cache_teacher.py", *caching(world, tmp_path / "c"), before=files_up_to(room))
    said = process.finish(2)
    assert "error: disk full while writing" in said and "shard-00000" in said and "Traceback" not in said
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["cache.json"]
    run("cache_teacher.py", *caching(world, tmp_path / "c"))


@pytest.mark.fuzz
def test_a_hundred_kills(world, tmp_path):
    """Killed at random moments, again and again, both scripts end with what an undisturbed run writes."""
    kills = int(os.environ.get("SPAR_KILLS", "100"))
    rng = np.random.default_rng(int(os.environ.get("SPAR_SEED", "0")))
    run("cache_teacher.py", *caching(world, tmp_path / "whole-c", "--draws", 10))
    learned = ("--epochs", 20, "--draws", 10, "--save-every", 2)
    run("distill.py", *flags(world, tmp_path / "whole", "--cache", tmp_path / "whole-c", *learned))
    done = 0
    while done < kills:
        cache, output = tmp_path / f"c{done}", tmp_path / f"run{done}"
        commands = [
            ("cache_teacher.py", caching(world, cache, "--draws", 10)),
            ("distill.py", flags(world, output, "--cache", cache, *learned, "--resume")),
        ]
        for name, words in commands:
            limit_s = 0.1
            while True:
                process = Process(name, *words)
                process.parts[0].join(rng.uniform(0, limit_s))
                process.kill(signal.SIGKILL)
                process.parts[0].join()
                if process.parts[0].exitcode == 0:
                    break
                assert process.parts[0].exitcode == -signal.SIGKILL, process.printed()
                done += 1
                limit_s *= 1.3  # sooner or later it gets to its end
        assert_same(weights(output), weights(tmp_path / "whole"))
        for path in (tmp_path / "whole-c").iterdir():
            assert path.read_bytes() == (cache / path.name).read_bytes(), path.name
        for folder in (cache, output):
            assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]
        shutil.rmtree(cache), shutil.rmtree(output)
    print(f"{done} kills")
