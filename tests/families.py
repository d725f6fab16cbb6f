"""Small random stock models of the families beside CLIP, and whole models of ours, for the tests."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import randomise
from plain_families import plain_dinov3, plain_radio, plain_siglip
from transformers import DINOv3ViTConfig, DINOv3ViTModel, RadioConfig, RadioModel, SiglipConfig, SiglipModel

from spar_hf import (
    SparDinov3Config,
    SparDinov3Model,
    SparRadioConfig,
    SparRadioModel,
    SparRadioVisionConfig,
    SparRadioVisionModel,
    SparSiglipModel,
)

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
RADIO_TRUNK = {
    "hidden_size": 48,
    "mlp_ratio": 1.5,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "patch_size": 16,
    "max_img_size": 96,  # a table of 6 x 6: the native grid is not its own
    "num_cls_tokens": 3,
    "num_registers": 2,
    "summary_idxs": [0, 2],
}
RADIO_HEAD = {"projection_dim": 24, "adaptor_hidden_size": 40, "adaptor_num_blocks": 2, "class_token": 2}
RADIO_VISION = {**RADIO_TRUNK, **RADIO_HEAD, "image_size": 64, "adaptor": "siglip2-g"}
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


def stock_radio(**vision: Any) -> RadioModel:
    model = RadioModel(RadioConfig(**{**RADIO_TRUNK, **vision})).eval()
    randomise(model, seed=4)
    spread_tokens(model)
    return model


def radio_tower(**vision: Any) -> SparRadioVisionModel:
    model = SparRadioVisionModel(SparRadioVisionConfig(**{**RADIO_VISION, **vision})).eval()
    randomise(model, seed=5)
    spread_tokens(model)
    return model


def spread_tokens(radio: RadioModel) -> None:
    """Positions and first tokens of about the patches' size."""
    generator = torch.Generator().manual_seed(6)
    with torch.no_grad():
        for weight in (radio.embeddings.position_embedding, radio.embeddings.cls_register_token):
            weight.copy_(0.7 * torch.randn(weight.shape, generator=generator))


def radio_text(tokenizer: Any, kind: str) -> dict[str, Any]:
    """Fields of a teacher's text configuration, `siglip` or `clip`."""
    special = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    width = {"siglip": "projection_size", "clip": "projection_dim"}[kind]
    return {**TEXT, **special, "model_type": f"{kind}_text_model", "vocab_size": len(tokenizer), width: 24}


def spar_radio(tokenizer: Any, kind: str = "siglip") -> SparRadioModel:
    model = SparRadioModel(SparRadioConfig(text_config=radio_text(tokenizer, kind), vision_config=RADIO_VISION)).eval()
    randomise(model, seed=7)
    spread_tokens(model.vision_model)
    return model


@dataclass(frozen=True)
class Family:
    """A family's stock vision tower on disk, and its plain formulation."""

    name: str
    folder: Path
    weights: dict[str, np.ndarray]
    tower: Any

    def plain(self, images: torch.Tensor, window: int | None = None) -> torch.Tensor:
        formula, more = {
            "siglip": (plain_siglip, "gelu_pytorch_tanh"),
            "dinov3": (plain_dinov3, 4),
            "radio": (plain_radio, 5),
        }[self.name]
        features = [formula(self.weights, image.double().numpy(), 16, 3, 3, more, window) for image in images]
        return torch.from_numpy(np.stack(features)).float()
