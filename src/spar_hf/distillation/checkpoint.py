"""Checkpoints of a distillation: trained weights, optimiser and counters in one safetensors file, whole or absent.

Nothing random needs saving: order and augmentation are functions of seeds, and the networks have no dropout.
Works for plain, data-parallel (DDP) and sharded (FSDP) networks alike.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from ..files import read_state, write_state
from .cache import differences

KEPT = 2
NAME = re.compile(r"checkpoint-(\d{8})\.safetensors")
OPTIONS = dcp.StateDictOptions(
    full_state_dict=True,
    cpu_offload=True,
    ignore_frozen_params=True,
    strict=False,  # frozen weights are not in the file
)


class OtherRun(ValueError):
    """A checkpoint of a run with other flags."""


def save_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    step: int,
    made_from: dict[str, Any],
) -> None:
    """Writes FOLDER/checkpoint-STEP.safetensors and keeps the last two. All processes call it: it gathers shards.

    Raises:
        OSError: the disk is full; earlier checkpoints are intact.
        ValueError: a weight or moment is NaN or infinite; earlier checkpoints are intact.
    """
    gathered: Any = dcp.get_state_dict(student, optimizer, options=OPTIONS)
    weights, moments = gathered
    if accelerator.is_main_process:
        tensors = {f"model.{name}": weight for name, weight in weights.items()}
        for name, state in moments["state"].items():
            tensors |= {f"optim.{name}.{key}": value for key, value in state.items()}
        record = {
            "step": step,
            "made_from": made_from,
            "param_groups": moments["param_groups"],
            "scheduler": scheduler.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        write_state(folder / f"checkpoint-{step:08d}.safetensors", tensors, record)
        # A file of a later step can only be one that was passed over.
        ours = sorted(path for path in checkpoints(folder) if NAME.fullmatch(path.name) and step_of(path) <= step)
        for old in ours[:-KEPT]:
            old.unlink()
    accelerator.wait_for_everyone()


def checkpoints(folder: Path) -> list[Path]:
    """What lies in a folder under the name of a checkpoint, the last first."""
    return sorted(folder.glob("checkpoint-*"), reverse=True)


def step_of(path: Path) -> int:
    """The step in a checkpoint's name."""
    return int(path.stem.rpartition("-")[2])


def read_checkpoint(path: Path, made_from: dict[str, Any]) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Record and tensors of a checkpoint.

    Raises:
        OtherRun: it is of a run with other flags; says which.
        ValueError: it is broken, no checkpoint, or holds NaN or infinity.
    """
    if not NAME.fullmatch(path.name) or not path.is_file():
        raise ValueError(f"{path.name} is no checkpoint of training/distill.py")
    record, tensors = read_state(path)
    # As JSON, so that tuples and lists compare alike.
    other = list(differences(json.loads(json.dumps(made_from)), record["made_from"]))
    if other:
        raise OtherRun(f"{path.parent} holds a run with other flags: {'; '.join(other)}. Choose another --output.")
    return record, tensors


def load_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    made_from: dict[str, Any],
    say: Callable[[str], None] = print,
) -> int:
    """Loads the last checkpoint of a folder that is whole; returns the number of steps it has behind it, or 0.

    Args:
        folder: of the run.
        accelerator, student, optimizer, scheduler: of the run, as prepared.
        made_from: what the run depends on.
        say: where to report what was passed over.

    Raises:
        OtherRun: the checkpoints are of a run with other flags; says which.
        ValueError: there are checkpoints, and none can be used.
    """
    faults: list[ValueError] = []
    for path in checkpoints(folder):
        try:
            record, tensors = read_checkpoint(path, made_from)
        except ValueError as error:
            faults.append(error)
            continue
        for fault in faults:
            say(f"passed over a checkpoint: {fault}")
        put_back(record, tensors, accelerator, student, optimizer, scheduler)
        return record["step"]
    for fault in faults:
        if isinstance(fault, OtherRun):
            raise fault
    if faults:
        raise ValueError(
            f"no checkpoint in {folder} can be used: {'; '.join(map(str, faults))}. Delete them to begin anew, or "
            "choose another --output."
        )
    return 0


def put_back(
    record: dict[str, Any],
    tensors: dict[str, torch.Tensor],
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
) -> None:
    """Gives a run the state that a checkpoint holds."""
    weights: dict[str, Any] = {}
    state: dict[str, Any] = {}
    for path, tensor in tensors.items():
        kind, _, name = path.partition(".")
        if kind == "model":
            weights[name] = tensor
        else:
            name, _, key = name.rpartition(".")
            state.setdefault(name, {})[key] = tensor
    moments: Any = {"state": state, "param_groups": record["param_groups"]}
    dcp.set_state_dict(student, optimizer, model_state_dict=weights, optim_state_dict=moments, options=OPTIONS)
    scheduler.load_state_dict(record["scheduler"])
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(record["scaler"])
