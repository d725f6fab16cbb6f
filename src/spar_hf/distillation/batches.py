"""What a training step reads: planned batches of views, as pixels or as stored tokens, with stored targets."""

from __future__ import annotations

import signal
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..sources import BadImage
from .cache import FeatureStore
from .views import Views, plan_batches


class Batch(NamedTuple):
    """Views of one size. Empty (one blank patch, no names) where a process has nothing to do.

    Attributes:
        images: names.
        inputs: pixels (B, H, W, 3) uint8, or tokens (B, P + h * w, C) fp16.
        grid_hw: (h, w), with tokens.
        target: (B, h, w, D) fp16 from the store, or None.
        bad: name -> reason of images that could not be read and are left out.
    """

    images: list[str]
    inputs: torch.Tensor
    grid_hw: tuple[int, int] | None
    target: torch.Tensor | None
    bad: dict[str, str]


class Batches(Dataset):
    """Reads the batches of a plan.

    Args:
        plan: batch -> numbers of its views.
        views: where pixels come from.
        store: where targets come from; None leaves them to the teacher.
        on_trunk: take stored tokens for input, not pixels.
    """

    def __init__(self, plan: list[list[int]], views: Views, store: FeatureStore | None, on_trunk: bool):
        self.plan, self.views, self.store, self.on_trunk = plan, views, store, on_trunk

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, i: int) -> Batch:
        images, inputs, targets = [], [], []
        bad: dict[str, str] = {}
        for number in self.plan[i]:
            try:
                inputs.append(self.read_input(number))
            except BadImage as error:
                bad[error.name] = error.reason
                continue
            images.append(self.views.name(number))
            if self.store is not None:
                targets.append(self.store.read(number, "features"))
        if not images:
            side = self.views.augmentation.multiple_px
            return Batch([], torch.zeros(1, side, side, 3, dtype=torch.uint8), None, None, bad)
        target = torch.stack(targets) if targets else None
        grid_hw = (target.shape[1], target.shape[2]) if self.on_trunk and target is not None else None
        return Batch(images, torch.stack(inputs), grid_hw, target, bad)

    def read_input(self, number: int) -> torch.Tensor:
        """Input of a view, after a check that stored targets belong to its pixels."""
        if self.on_trunk and self.store is not None:
            return self.store.read(number, "trunk")
        pixels = self.views.pixels(number)
        if self.store is not None:
            self.store.check_pixels(number, pixels)
        return torch.from_numpy(pixels)

    def loader(self, workers: int, pin_memory: bool) -> DataLoader:
        """Reads ahead in `workers` processes, in the order of the plan."""
        return DataLoader(
            self,
            batch_size=None,
            num_workers=workers,
            collate_fn=as_it_is,
            worker_init_fn=ignore_signals,
            pin_memory=pin_memory,
        )


def as_it_is(example: Any) -> Any:
    """For a loader whose data set makes whole batches."""
    return example


def ignore_signals(worker: int) -> None:
    """In a reading process: Ctrl-C and SIGTERM are the training process's to handle."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)


def plan_steps(
    views: Views,
    store: FeatureStore | None,
    epochs: int,
    batch_size: int,
    batches_per_step: int,
    seed: int,
    max_steps: int | None = None,
) -> list[list[list[int]]]:
    """All steps of a run: step -> its batches -> numbers of their views. Each epoch has each of its views once.

    The last step of an epoch may have fewer batches; a run with `max_steps` ends with that one.
    """
    steps: list[list[list[int]]] = []
    for epoch in range(epochs):
        if max_steps is not None and len(steps) >= max_steps:
            break
        numbers = [number for number in views.of_epoch(epoch) if store is None or number in store.index]
        batches = plan_batches(views, numbers, batch_size, np.random.default_rng([seed, epoch]))
        steps += [batches[i : i + batches_per_step] for i in range(0, len(batches), batches_per_step)]
    return steps[:max_steps]


def share_of(steps: list[list[list[int]]], rank: int, processes: int, accumulate: int) -> list[list[int]]:
    """The batches of one process, `accumulate` for each step; empty ones where a step has too few."""
    share = []
    for step in steps:
        mine = step[rank::processes]
        share += mine + [[] for _ in range(accumulate - len(mine))]
    return share
