"""What `pretrain_tiny.py` goes on from: weights, their average and the optimisers, as tensors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping

import torch
from transformers import CLIPModel


def make_optimizers(model: CLIPModel, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest; biases, norms and the temperature without decay."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    tables = [p for name, p in model.named_parameters() if p.ndim > 1 and not (p.ndim == 2 and ".layers." in name)]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": tables, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
    # With this adjustment one learning rate serves both (Liu et al. 2025, Muon is scalable for LLM training).
    muon = torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(groups, betas=(0.9, 0.98))]


def state_of(model: CLIPModel, average: CLIPModel, optimizers: list) -> dict[str, torch.Tensor]:
    """All that `put_back` needs."""
    tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
    tensors |= {f"average.{name}": value for name, value in average.state_dict().items()}
    for number, optimizer in enumerate(optimizers):
        for row, buffers in optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number} {row} {name}": value for name, value in buffers.items()}
    return tensors


def put_back(tensors: Mapping[str, torch.Tensor], model: CLIPModel, average: CLIPModel, optimizers: list) -> None:
    """Gives a run the state that was written down; the settings of the optimizers are those of this run."""
    parts: dict[str, dict[str, torch.Tensor]] = defaultdict(dict)
    for key, value in tensors.items():
        part, name = key.split(".", 1)
        parts[part][name] = value
    model.load_state_dict(parts["model"])
    average.load_state_dict(parts["average"])
    buffers: list[dict[int, dict[str, torch.Tensor]]] = [defaultdict(dict) for _ in optimizers]
    for key, value in parts["optimizer"].items():
        number, row, name = key.split(" ")
        buffers[int(number)][int(row)][name] = value
    for optimizer, state in zip(optimizers, buffers, strict=True):
        optimizer.load_state_dict({**optimizer.state_dict(), "state": dict(state)})
