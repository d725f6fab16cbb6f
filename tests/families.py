"""Small random stock models of the families beside CLIP, and whole models of ours, for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import randomise
from plain_families import plain_dinov3, plain_siglip
from transformers import DINOv3ViTConfig, DINOv3ViTModel, SiglipConfig, SiglipModel

from spar_hf import SparDinov3Config, SparDinov3Model, SparSiglipModel

# All widths differ, so that a transposed or mixed-up axis cannot fit by chance.
SIGLIP_VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "image_size": 64,
    "patch_size": 16,
}
DINOV3_VISION = {**SIGLIP_VISION, "num_register_tokens": 4}
TEXT = {"hidden_size": 32, "intermediate_size": 40, "num_attention_heads": 2, "num_hidden_layers": 2}


def stock_siglip(vocab_size: int = 600, hidden_act: str = "gelu_pytorch_tanh", **vision: Any) -> SiglipModel:
    text = {**TEXT, "vocab_size": vocab_size, "projection_size": 48, "bos_token_id": 0, "eos_token_id": 1}
    config = SiglipConfig(text_config=text, vision_config={**SIGLIP_VISION, "hidden_act": hidden_act, **vision})
    model = SiglipModel(config).eval()
    randomise(model, seed=1)
    return model


def stock_dinov3(**vision: Any) -> DINOv3ViTModel:
    model = DINOv3ViTModel(DINOv3ViTConfig(**{**DINOV3_VISION, **vision})).eval()
    randomise(model, seed=2)
    return model


def spar_dinov3(tokenizer: Any) -> SparDinov3Model:
    text = {**TEXT, "vocab_size": len(tokenizer), "projection_dim": 96, "eos_token_id": tokenizer.eos_token_id}
    text |= {"bos_token_id": tokenizer.bos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = SparDinov3Model(SparDinov3Config(text_config=text, vision_config=DINOV3_VISION)).eval()
    randomise(model, seed=3)
    return model


def spar_siglip(tokenizer: Any, folder: Path) -> SparSiglipModel:
    stock_siglip(vocab_size=len(tokenizer)).save_pretrained(folder)
    return SparSiglipModel.from_pretrained(folder)


@dataclass(frozen=True)
class Family:
    """A family's stock vision tower on disk, and its plain formulation."""

    name: str
    folder: Path
    weights: dict[str, np.ndarray]
    tower: Any

    def plain(self, images: torch.Tensor, window: int | None = None) -> torch.Tensor:
        formula, more = {"siglip": (plain_siglip, "gelu_pytorch_tanh"), "dinov3": (plain_dinov3, 4)}[self.name]
        features = [formula(self.weights, image.double().numpy(), 16, 3, 3, more, window) for image in images]
        return torch.from_numpy(np.stack(features)).float()
