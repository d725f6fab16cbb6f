"""Tests of the scripts that make what ships: flags, signals, states that are broken."""

from __future__ import annotations

import json
import os
import re
import signal

import pytest
import torch
from distillation_help import run, run_as_command, script
from safetensors.torch import load_file

from spar_hf.files import read_state, write_state

SMALL = {
    "train_anyup.py": ("--steps", 2, "--batch-size", 1, "--hidden-size", 8, "--encoders", "tiny", "--save-every", 1),
    "pretrain_tiny.py": ("--steps", 2, "--batch-size", 4, "--pool-views", 16, "--test-scenes", 2, "--threads", 1),
    "pretrain_vit.py": ("--steps", 2, "--batch-size", 2, "--pool-scenes", 4, "--prototypes", 4, "--threads", 1),
}
COUNTS = {
    "train_anyup.py": ("--steps", "--batch-size", "--hidden-size", "--save-every"),
    "pretrain_tiny.py": ("--steps", "--batch-size", "--pool-views", "--test-scenes", "--threads"),
    "pretrain_vit.py": ("--steps", "--batch-size", "--pool-scenes", "--prototypes", "--threads"),
}
WRONG = [
    *((name, (flag, word)) for name, flags in COUNTS.items() for flag in flags for word in ("0", "-1", "many")),
    *((name, ("--learning-rate", word)) for name in COUNTS for word in ("0", "nan", "inf")),
    ("train_anyup.py", ("--encoders", "tini")),
    ("pretrain_tiny.py", ("--minutes", "nan")),
    ("pretrain_tiny.py", ("--save-minutes", "0")),
    ("pretrain_tiny.py", ("--ema-decay", "2")),
    ("pretrain_tiny.py", ("--weight-decay", "inf")),
    ("pretrain_tiny.py", ("--device", "tpu9")),
    ("pretrain_tiny.py", ("--losses", "names")),
    ("pretrain_tiny.py", ("--width", "100")),
    ("pretrain_tiny.py", ("--batch-size", "32", "--pool-views", "16")),
    ("pretrain_tiny.py", ("--evaluate-only",)),
    ("pretrain_tiny.py", ("--minutes", "3", "--steps", "2")),
    ("pretrain_vit.py", ("--save-minutes", "0")),
    ("pretrain_vit.py", ("--batch-size", "32", "--pool-scenes", "16")),
    ("package_checkpoint.py", ("folder", "tini")),
    ("package_checkpoint.py", ("no-such-folder", "tiny")),
]


@pytest.mark.parametrize(("name", "words"), WRONG)
def test_wrong_flags_are_one_line_and_nothing_is_written(tmp_path, monkeypatch, capsys, name, words):
    monkeypatch.chdir(tmp_path)
    output = () if name == "package_checkpoint.py" else ("--output", "out")
    assert run_as_command(name, *output, *words) == 2
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert line.startswith(f"{name}: error: ") and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["train_anyup.py", "pretrain_tiny.py", "pretrain_vit.py", "package_checkpoint.py"])
def test_help_teaches(name, capsys):
    with pytest.raises(SystemExit) as leaving:
        run_as_command(name, "--help")
    assert leaving.value.code == 0 and f"examples:\n  python training/{name} " in capsys.readouterr().out


def stopping(monkeypatch, name, function):
    """SIGTERM comes in the first step."""
    with script(name) as module:
        real = getattr(module, function)

        def send(*args, **kwargs):
            os.kill(os.getpid(), signal.SIGTERM)
            return real(*args, **kwargs)

        monkeypatch.setattr(module, function, send)


def test_anyup_stops_by_a_signal_and_goes_on_with_no_difference(tmp_path, monkeypatch, capsys):
    words, name = SMALL["train_anyup.py"], "train_anyup.py"
    assert run(name, *words, "--output", tmp_path / "whole") == 0
    stopping(monkeypatch, name, "step_loss")
    assert run(name, *words, "--output", tmp_path / "run") == 143
    monkeypatch.undo()
    assert run_as_command(name, *words, "--output", tmp_path / "run") == 2
    assert "holds a run; add --resume" in capsys.readouterr().err
    assert run(name, *words, "--output", tmp_path / "run", "--resume") == 0
    ours, theirs = (load_file(tmp_path / which / "model" / "model.safetensors") for which in ("run", "whole"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    (tmp_path / "run" / "state.safetensors").write_bytes(b"half")
    assert run_as_command(name, *words, "--output", tmp_path / "run", "--resume") == 2
    assert "state.safetensors is broken" in capsys.readouterr().err


@pytest.mark.slow
def test_captions_alone_train_a_deeper_tower(tmp_path):
    words = ("--losses", "contrast", "--blocks", 7, "--width", 64)
    assert run("pretrain_tiny.py", *SMALL["pretrain_tiny.py"], "--output", tmp_path / "run", *words) == 0
    config = json.loads((tmp_path / "run" / "model" / "config.json").read_text())["vision_config"]
    assert (config["num_hidden_layers"], config["hidden_size"], config["num_attention_heads"]) == (7, 64, 2)


@pytest.mark.slow
def test_tiny_stops_by_a_signal_and_goes_on(tmp_path, monkeypatch):
    words, name = (*SMALL["pretrain_tiny.py"], "--output", tmp_path / "run"), "pretrain_tiny.py"
    stopping(monkeypatch, name, "training_losses")
    assert run(name, *words) == 143
    monkeypatch.undo()
    counts, _ = read_state(tmp_path / "run" / "state.safetensors")
    assert counts["step"] == 1 and not (tmp_path / "run" / "model").exists()
    with pytest.raises(ValueError, match="holds a run; add --resume"):
        run(name, *words)
    with pytest.raises(ValueError, match="a network of another size"):
        run(name, *words, "--resume", "--blocks", 7)
    assert run(name, *words, "--resume") == 0
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "model", "native_evaluation.json", "state.safetensors", "train.log",
    }  # fmt: skip


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_state_with_no_numbers_is_neither_written_nor_read(tmp_path, value):
    path = tmp_path / "state.safetensors"
    write_state(path, {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.arange(3)}, {"step": 1})
    record, tensors = read_state(path)
    assert record == {"step": 1} and torch.equal(tensors["b"], torch.arange(3))
    before = path.read_bytes()
    with pytest.raises(ValueError, match=re.escape("state.safetensors is not written: a holds NaN or infinity")):
        write_state(path, {"a": torch.tensor([1.0, value])}, {"step": 2})
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
