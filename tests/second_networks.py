"""Small random second networks for any row of the table, by the name that the row gives them."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from transformers import SamVisionConfig, SamVisionModel, ViTConfig, ViTModel

from spar_hf import METHODS


@cache
def small(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "dino":  # three heads, as conftest's CLIP has
        own = {"hidden_size": 24, "intermediate_size": 32, "num_attention_heads": 3, "image_size": 64, "patch_size": 8}
        return ViTModel(ViTConfig(num_hidden_layers=2, **own)).eval()
    if name == "sam":
        own = {"hidden_size": 24, "mlp_dim": 32, "num_attention_heads": 2, "image_size": 128, "patch_size": 16}
        own |= {"num_hidden_layers": 2, "output_channels": 8, "window_size": 3, "global_attn_indexes": [1]}
        return SamVisionModel(SamVisionConfig(**own)).eval()
    raise KeyError(f"tests/second_networks.py makes no network {name!r}; add one")


def networks_for(method: str) -> dict[str, Any]:
    """Networks for `build_encoder` and `build_segmenter`: all that the method needs."""
    return {name: small(name) for name in METHODS[method].needs}
