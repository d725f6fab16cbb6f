"""For the tests of distillation: a small random network, a folder of pictures, and ways to run the two scripts."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, PartialState
from PIL import Image

from spar_cli.training_options import run_script
from spar_hf import SparVisionConfig, SparVisionModel

TRAINING = Path(__file__).parents[1] / "training"
SIZES = ["--long-side-px", "64", "--short-side-px", "64", "--scale-range", "0.5", "1", "--min-side-px", "32"]
SIZES += ["--teacher-dtype", "float32"]  # auto would be another on another CPU


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


@contextmanager
def script(name: str) -> Iterator[Any]:
    """A script of training/ as a module, ready to run once more in this process."""
    PartialState._reset_state()
    AcceleratorState._reset_state()
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(TRAINING))
        patch.setattr(sys, "argv", [name])
        yield importlib.import_module(name.removesuffix(".py"))


def run(name: str, *flags) -> int:
    """Runs `main` of a script in this process; what goes wrong is raised."""
    with script(name) as module:
        sys.argv += map(str, flags)
        return module.main(module.parser().parse_args())


def run_as_command(name: str, *flags) -> int:
    """Runs a script in this process as the command line does; returns the exit status."""
    with script(name) as module:
        sys.argv += map(str, flags)
        return run_script(module.parser(), module.main)


# ---- processes of their own


SERVER = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """A process that has imported the scripts and forks a new one for each run, so that a start takes no time."""
    folders = [str(Path(__file__).parent), str(TRAINING), os.environ.get("PYTHONPATH", "")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, folders)))
        SERVER.set_forkserver_preload(["distillation_help", "distill", "cache_teacher"])
        forkserver.ensure_running()


class Process:
    """A script that runs on its own, by default on one process; several find each other as torchrun's do.

    Args:
        name: of the script.
        flags: its command line.
        processes: how many.
        before: called in each before the script, say to set a limit.
    """

    def __init__(self, name: str, *flags, processes: int = 1, before: Callable[[], None] | None = None):
        start_server()
        self.folder = tempfile.TemporaryDirectory()
        environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
        if processes > 1:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            environment |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes)}
        self.parts = []
        for rank in range(processes):
            own = {**environment, **({"RANK": str(rank), "LOCAL_RANK": str(rank)} if processes > 1 else {})}
            command = name, list(map(str, flags)), own, Path(self.folder.name) / str(rank), before
            self.parts.append(SERVER.Process(target=_run_alone, args=command))
            self.parts[-1].start()

    def running(self) -> bool:
        return all(part.is_alive() for part in self.parts)

    def kill(self, number: int) -> None:
        """Sends a signal to all."""
        for part in self.parts:
            with suppress(ProcessLookupError):
                os.kill(part.pid, number)

    def printed(self) -> str:
        return "".join(path.read_text() for path in sorted(Path(self.folder.name).iterdir()))

    def finish(self, status: int = 0) -> str:
        """Waits for the end; returns what was printed."""
        for part in self.parts:
            part.join(300)
        assert [part.exitcode for part in self.parts] == [status] * len(self.parts), self.printed()
        return self.printed()


def _run_alone(name, flags, environment, output, before):
    with open(output, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= environment
    multiprocessing.set_start_method("fork", force=True)  # for its workers; the server's would import all again
    torch.set_num_threads(1)
    if before is not None:
        before()
    status = run_as_command(name, *flags)
    sys.stdout.flush()
    sys.stderr.flush()
    # gloo's threads may still hold tensors: an interpreter that shuts down would abort (pytorch/pytorch#179291).
    os._exit(status)


def start(name: str, *flags, processes: int = 1, through: tuple[str, ...] = ()) -> subprocess.Popen:
    """Starts a script as a user does; on several processes through torchrun, perhaps `through` another script."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [*launcher, *through, str(TRAINING / name), *map(str, flags)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process: subprocess.Popen, status: int = 0) -> str:
    """Waits for the end; returns what it printed."""
    output, _ = process.communicate(timeout=600)
    assert process.returncode == status, output
    return output


def wait_for(condition: Callable[[], Any], process: Process, seconds: float = 300) -> None:
    """Waits until something is there, while the process runs."""
    end = time.monotonic() + seconds
    while not condition():
        assert process.running(), process.printed()
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.002)
