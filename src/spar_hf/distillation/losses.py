"""How far a student's features are from the teacher's: (B, h, w, D), (B, h, w, D), mean feature (D,) -> (B,).

`distillation_loss` is the whole method.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..encoders.base import DenseEncoder
from .batches import Batch
from .teacher import teacher_features


def mse(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """SPAR, section 3: on features that are not normalised."""
    return (student - teacher).square().mean(dim=(1, 2, 3))


def distance(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Length of the difference, not squared: where the teacher is uncertain its median is learned, not its mean."""
    return (student - teacher).norm(dim=-1).mean(dim=(1, 2))


def cosine(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """One minus the cosine: the length of a feature is free."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean(dim=(1, 2))


def centred_cosine(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """The cosine of what differs from the teacher's mean over the data: the direction all features share is free."""
    return cosine(student - centre, teacher - centre, centre)


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mse": mse,
    "distance": distance,
    "cosine": cosine,
    "centred-cosine": centred_cosine,
}


def distillation_loss(
    student: nn.Module,
    teacher: DenseEncoder | None,
    batch: Batch,
    loss: Callable,
    centre: torch.Tensor,
    head: torch.Tensor | None = None,
) -> torch.Tensor:
    """The whole method: loss(student(x), teacher(x)), one number per image, (B,).

    `head` is the affine map (1 + D, D) that goes between, see `linear_head`.
    """
    x = batch.inputs.to(centre.device, non_blocking=True)
    if not batch.images:  # nothing to learn from, but the processes average their gradients together
        return student(x).sum(dim=(1, 2, 3)) * 0
    if batch.target is not None:
        target = batch.target.to(centre.device)
    elif teacher is not None:
        target = teacher_features(teacher, x)
    else:
        raise ValueError("the batch has no stored target, so a teacher is needed.")
    found = student(x, batch.grid_hw).float()
    if head is not None:
        found = head[0] + found @ head[1:]
    return loss(found, target.float(), centre)
