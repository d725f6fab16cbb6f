"""From full-resolution score maps, made for some names at a time, to a label map."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..segmentation_spar import foreground_left

Maps = Callable[[slice], Tensor]
"""Some names (a slice of all) -> their maps at the label map's size, (k, H, W) fp32."""

# Numbers (names x pixels) of the maps made at a time: 4 MB of fp32 stay near a CPU's cache, 512 MB fill a GPU.
MAP_NUMBERS = {"cpu": 2**20, "cuda": 2**27}


def upsampled(scores: Tensor, rows: Tensor, columns: Tensor) -> Maps:
    """Bilinear maps of the scores (K, h, w); `rows` (H, h) and `columns` (W, w) are from `axis_weights`."""
    return lambda names: rows @ (scores[names] @ columns.T)


def averaged(
    windows: Sequence[Maps],
    places: Sequence[tuple[int, int]],
    window_hw: tuple[int, int],
    image_hw: tuple[int, int],
    size_hw: tuple[int, int],
) -> Maps:
    """The mean of the maps of windows, pixel by pixel of the image, then resized bilinearly.

    Args:
        windows: each window's maps, at its own size.
        places: its top and left in the image.
        window_hw, image_hw: sizes in the encoder's pixels.
        size_hw: of the label map.
    """

    def maps(names: slice) -> Tensor:
        total = count = torch.zeros(())
        for (top, left), window in zip(places, windows, strict=True):
            single = window(names)
            if count.ndim == 0:
                total, count = single.new_zeros(len(single), *image_hw), single.new_zeros(image_hw)
            inside = (..., slice(top, top + window_hw[0]), slice(left, left + window_hw[1]))
            total[inside] += single
            count[inside] += 1
        return F.interpolate((total / count)[None], size=size_hw, mode="bilinear", align_corners=False)[0]

    return maps


def chunks(num_names: int, size_hw: tuple[int, int], device: torch.device) -> Iterator[slice]:
    """The names in runs whose maps stay small."""
    step = max(1, MAP_NUMBERS.get(device.type, MAP_NUMBERS["cpu"]) // (size_hw[0] * size_hw[1]))
    for start in range(0, num_names, step):
        yield slice(start, start + step)


def best_class(
    maps: Maps,
    class_ids: Tensor,
    size_hw: tuple[int, int],
    logit_scale: float,
    background_threshold: float | None,
    background_class: int,
    area_threshold: float | None,
) -> Tensor:
    """What `segmentation_spar.label_map` computes from features, from maps: class ids (H, W), int32."""
    running = torch.ones_like(class_ids, dtype=torch.bool)
    if area_threshold is not None:
        labels = class_ids[_best_name(maps, running, size_hw, logit_scale)[1]].int()
        running = foreground_left(labels, class_ids, background_class, area_threshold)
        if not running.any():
            return torch.full_like(labels, background_class)
    best, winner, total = _best_name(maps, running, size_hw, logit_scale)
    labels = class_ids[winner].int()
    if background_threshold is None:
        return labels
    return labels.masked_fill_((best - total).exp() < background_threshold, background_class)


def _best_name(
    maps: Maps, running: Tensor, size_hw: tuple[int, int], logit_scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The highest logit of the running names, the name that has it, and the log-sum-exp over all names."""
    best = torch.full(size_hw, -torch.inf, device=running.device)
    winner = torch.zeros(size_hw, dtype=torch.int64, device=running.device)
    total = best.clone()
    for names in chunks(len(running), size_hw, running.device):
        logits = maps(names).mul_(logit_scale)
        total = torch.logaddexp(total, logits.logsumexp(0))
        if not running[names].any():
            continue
        top, index = logits.masked_fill_(~running[names, None, None], -torch.inf).max(0)
        better = top > best
        best = torch.where(better, top, best)
        winner = torch.where(better, index + names.start, winner)
    return best, winner, total
