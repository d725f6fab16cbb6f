"""DenseEncoder: the one call that distillation, segmenters and wrappers see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class DenseEncoder(Protocol):
    """Whatever turns pixels (B, 3, H, W) into an output with `patch_embeds` (B, h, w, D).

    A `SparVisionModel` in one pass, a `SlidingWindow` around any dense encoder, a method with a second network around
    both: those who call one never ask which it is. `config` has patch_size, image_size, num_channels and size_rule.
    """

    @property
    def config(self) -> Any: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def __call__(self, pixel_values: torch.Tensor) -> Any: ...


def rgb(pixel_values: torch.Tensor, config: Any) -> torch.Tensor:
    """Normalised pixels (B, 3, H, W) -> colours from 0 to 1, fp32. `config` has image_mean and image_std."""
    return pixel_values.float() * column(config.image_std, pixel_values) + column(config.image_mean, pixel_values)


def column(values: Sequence[float], like: torch.Tensor) -> torch.Tensor:
    """One number a channel, (1, C, 1, 1), fp32."""
    return torch.tensor(values, dtype=torch.float32, device=like.device).view(1, -1, 1, 1)
