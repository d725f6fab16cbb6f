"""What every result of a benchmark says of itself: the command, the machine, the versions."""

from __future__ import annotations

import ctypes
import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from spar_hf.arithmetic_spar import cpu_capability

INSTRUCTION_LIMITS = (
    "ATEN_CPU_CAPABILITY",
    "ONEDNN_MAX_CPU_ISA",
    "MKL_ENABLE_INSTRUCTIONS",
)  # of torch, oneDNN, MKL


class PeakMemory:
    """The peak resident memory of this process within the block, over what it held before (Linux).

    The peak of `getrusage` is that since the process began, so a model whose loading takes more than its passes
    seems to need nothing.

    Attributes:
        mb: megabytes (10^6 bytes), after the block.
    """

    def __enter__(self) -> PeakMemory:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed before shall not be at hand
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        self._before_kb, self.mb = status_kb("VmRSS"), 0.0
        return self

    def __exit__(self, *_: object) -> None:
        self.mb = (status_kb("VmHWM") - self._before_kb) * 1024 / 1e6


def status_kb(field: str) -> int:
    """A field of this process's status, such as VmRSS, its resident memory, or the peak of that, VmHWM."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def command_line() -> str:
    """The command that runs, to be pasted into a shell, with what limits the CPU's instructions."""
    limits = [f"{name}={os.environ[name]} " for name in INSTRUCTION_LIMITS if name in os.environ]
    return "".join(limits) + shlex.join(["python", *sys.argv])


def origin(*packages: str, threads: int | None = None) -> dict[str, Any]:
    """The head of a result, as JSON.

    The capability is PyTorch's name for the vector instructions that it uses, and the types that it is fast at
    (`AVX2`, `AVX512, fast bfloat16`): no figure of speed means anything without it.

    Args:
        packages: those whose versions count, beside ours, torch and transformers.
        threads: of each process that measures; None is this one's.
    """
    return {
        "command": command_line(),
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "capability": cpu_capability(),
            "threads": threads or torch.get_num_threads(),
        },
        "versions": {name: version(name) for name in ("spar-hf", "torch", "transformers", *packages)},
    }
