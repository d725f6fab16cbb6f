"""How far a student's features are from the teacher's: (B, h, w, D), (B, h, w, D), mean feature (D,) -> (B,)."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F


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
