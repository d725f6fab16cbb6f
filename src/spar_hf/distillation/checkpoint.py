"""Checkpoints of a distillation: trained weights, optimiser and counters in one safetensors file, whole or absent.

Nothing random needs saving: order and augmentation are functions of seeds, and the networks have no dropout.
Works for plain, data-parallel (DDP) and sharded (FSDP) networks alike.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import safe_open
from safetensors.torch import save
from torch import nn
from torch.distributed.checkpoint import state_dict as dcp

from ..files import write_atomically
from .cache import differences

KEPT = 2
OPTIONS = dcp.StateDictOptions(
    full_state_dict=True,
    cpu_offload=True,
    ignore_frozen_params=True,
    strict=False,  # frozen weights are not in the file
)


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
    """
    gathered: Any = dcp.get_state_dict(student, optimizer, options=OPTIONS)
    weights, moments = gathered
    if accelerator.is_main_process:
        tensors = {f"model.{name}": weight.contiguous() for name, weight in weights.items()}
        for name, state in moments["state"].items():
            tensors |= {f"optim.{name}.{key}": value.contiguous() for key, value in state.items()}
        record = {
            "step": step,
            "made_from": made_from,
            "param_groups": moments["param_groups"],
            "scheduler": scheduler.state_dict(),
            "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        }
        content = save(tensors, metadata={"record": json.dumps(record)})
        write_atomically(folder / f"checkpoint-{step:08d}.safetensors", content)
        for old in sorted(folder.glob("checkpoint-*.safetensors"))[:-KEPT]:
            old.unlink()
    accelerator.wait_for_everyone()


def load_checkpoint(
    folder: Path,
    accelerator: Accelerator,
    student: nn.Module,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    made_from: dict[str, Any],
) -> int:
    """Loads the last checkpoint of a folder; returns the number of steps it has behind it, 0 without a checkpoint.

    Raises:
        ValueError: the checkpoint is of a run with other flags; says which.
    """
    found = sorted(folder.glob("checkpoint-*.safetensors"))
    if not found:
        return 0
    with safe_open(found[-1], "pt") as file:
        record = json.loads(file.metadata()["record"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    # As JSON, so that tuples and lists compare alike.
    other = list(differences(json.loads(json.dumps(made_from)), record["made_from"]))
    if other:
        raise ValueError(f"{folder} holds a run with other flags: {'; '.join(other)}. Choose another --output.")
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
    return record["step"]
