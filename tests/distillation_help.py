"""For the tests of distillation: a small random network, a folder of pictures, and ways to run the two scripts."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from spar_hf import SparVisionConfig, SparVisionModel

TRAINING = Path(__file__).parents[1] / "training"
SIZES = ["--long-side-px", "64", "--short-side-px", "64", "--scale-range", "0.5", "1", "--min-side-px", "32"]


def save_network(folder: Path, seed: int = 0, **overrides) -> Path:
    """A vision tower of three blocks: patch 8, native 32 px, width 32, output 16."""
    torch.manual_seed(seed)
    config = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    config |= {"image_size": 32, "patch_size": 8, "projection_dim": 16, "initializer_factor": 3.0}
    model = SparVisionModel(SparVisionConfig(**{**config, **overrides}))
    model.save_pretrained(folder)
    return folder


def save_pictures(folder: Path, count: int = 6, seed: int = 0) -> Path:
    """PNGs of random blocks, of different shapes."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        height, width = (80, 80) if number % 2 else (64, 96)
        blocks = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((width, height), Image.Resampling.BILINEAR).save(folder / f"p{number}.png")
    return folder


def run(script: str, *flags) -> None:
    """Runs `main()` of a script in this process."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    PartialState._reset_state()
    AcceleratorState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINING))
        patch.setattr(sys, "argv", [script, *map(str, flags)])
        try:
            importlib.import_module(script.removesuffix(".py")).main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def start(script: str, *flags, processes: int = 1, through: tuple[str, ...] = ()) -> subprocess.Popen:
    """Starts a script as a user does; on several processes through torchrun, perhaps `through` another script."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, *through, str(TRAINING / script), *map(str, flags)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Waits for the end; returns what it printed."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output
    return output


def wait_for(condition, process: subprocess.Popen, seconds: float = 300) -> None:
    """Waits until something is there, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)
