"""Small random stock models of the families beside CLIP, and whole models of ours, for the tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import VISION, randomise
from plain_clip import PlainClip, plain_method
from plain_families import plain_dinov3, plain_eva, plain_radio, plain_siglip, plain_tips
from transformers import (
    CLIPVisionConfig,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    MetaClip2Config,
    MetaClip2Model,
    MetaClip2VisionModel,
    RadioConfig,
    RadioModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2VisionModel,
    SiglipConfig,
    SiglipModel,
    SiglipVisionModel,
    Tipsv2Config,
    Tipsv2Model,
    Tipsv2VisionModel,
)

from spar_hf import (
    SparDinov3Config,
    SparDinov3Model,
    SparEvaConfig,
    SparEvaModel,
    SparRadioConfig,
    SparRadioModel,
    SparRadioVisionConfig,
    SparRadioVisionModel,
    SparSiglipModel,
    load,
)
from spar_hf.families import make_processor

# All widths differ, so that a transposed or mixed-up axis cannot fit by chance.
SIGLIP_VISION = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_attention_heads": 3,
    "num_hidden_layers": 3,
    "image_size": 64,
    "patch_size": 16,
}
NAFLEX_VISION = {**{k: v for k, v in SIGLIP_VISION.items() if k != "image_size"}, "num_patches": 16}
DINOV3_VISION = {**SIGLIP_VISION, "num_register_tokens": 4}
TIPS_VISION = {**{k: v for k, v in SIGLIP_VISION.items() if k != "intermediate_size"}, "mlp_ratio": 2}
METACLIP_VISION = {**VISION, "num_hidden_layers": 3}
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


def ends_of(tokenizer: Any) -> dict[str, int]:
    """What a text configuration says of the tokenizer's special tokens."""
    names = ("bos_token_id", "eos_token_id", "pad_token_id")
    return {"vocab_size": len(tokenizer), **{name: getattr(tokenizer, name) for name in names}}


def stock_siglip(vocab_size: int = 600, hidden_act: str = "gelu_pytorch_tanh", **vision: Any) -> SiglipModel:
    text = {**TEXT, "vocab_size": vocab_size, "projection_size": 48, "bos_token_id": 0, "eos_token_id": 1}
    config = SiglipConfig(text_config=text, vision_config={**SIGLIP_VISION, "hidden_act": hidden_act, **vision})
    model = SiglipModel(config).eval()
    randomise(model, seed=1)
    return model


def stock_naflex(tokenizer: Any) -> Siglip2Model:
    text = {**TEXT, **ends_of(tokenizer), "projection_size": 48}
    text["vocab_size"] += 8  # transformers gives the tokenizer of any siglip2 Gemma's special tokens
    model = Siglip2Model(Siglip2Config(text_config=text, vision_config=NAFLEX_VISION)).eval()
    randomise(model, seed=1)
    return model


def stock_tips(tokenizer: Any) -> Tipsv2Model:
    text = {**TEXT, **ends_of(tokenizer), "hidden_size": 48}
    model = Tipsv2Model(Tipsv2Config(text_config=text, vision_config=TIPS_VISION)).eval()
    randomise(model, seed=4)
    return model


def stock_metaclip(tokenizer: Any, **special: int) -> MetaClip2Model:
    text = {**TEXT, **ends_of(tokenizer), "projection_dim": 24, **special}
    config = MetaClip2Config(text_config=text, vision_config=METACLIP_VISION, projection_dim=24)
    model = MetaClip2Model(config).eval()
    randomise(model, seed=5)
    return model


def stock_dinov3(**vision: Any) -> DINOv3ViTModel:
    model = DINOv3ViTModel(DINOv3ViTConfig(**{**DINOV3_VISION, **vision})).eval()
    randomise(model, seed=2)
    return model


def spar_dinov3(tokenizer: Any) -> SparDinov3Model:
    text = {**TEXT, **ends_of(tokenizer), "projection_dim": 96}
    model = SparDinov3Model(SparDinov3Config(text_config=text, vision_config=DINOV3_VISION)).eval()
    randomise(model, seed=3)
    return model


def spar_eva(tokenizer: Any, design: str, **vision: Any) -> SparEvaModel:
    text = {**TEXT, **ends_of(tokenizer), "projection_dim": 24}
    pools = design == "pe_core"
    more = {"layer_norm_eps": 1e-5, "rope_grid": 4, "rope_offset": 1.0} if pools else {}
    own = {**SIGLIP_VISION, "design": design, "projection_dim": 24, **more, **vision}
    model = SparEvaModel(SparEvaConfig(text_config=text, vision_config=own)).eval()
    randomise(model, seed=6 + pools)
    return model


@dataclass(frozen=True)
class Kind:
    """How a family is tested.

    Attributes:
        save: writes a random checkpoint of the family, as others publish it, into a folder: the vision tower at least.
        plain: (weights, pixels (3, H, W), window) -> patch features (h, w, D), in plain NumPy. The weights are those
            of the tower that was loaded.
        size_rule: what it does with sides that are no multiple of the patch.
        stock_tower: the class of transformers that reads what our tower saves.
        still: weights of the tower that the loss does not reach.
        whole: a whole model of ours, where `save` writes a tower alone.
    """

    save: Callable[[Any, Path], None]
    plain: Callable[[dict[str, np.ndarray], np.ndarray, int | None], np.ndarray]
    size_rule: str
    stock_tower: Any = None
    still: tuple[str, ...] = ()
    whole: Callable[[Any], Any] | None = None


def save_eva(tokenizer: Any, folder: Path, design: str) -> None:
    """As a conversion writes it."""
    model = spar_eva(tokenizer, design)
    model.save_pretrained(folder)
    make_processor(model.config, tokenizer).save_pretrained(folder)


def save_siglip(tokenizer: Any, folder: Path) -> None:
    stock_siglip(vocab_size=len(tokenizer)).save_pretrained(folder)


def plain_metaclip(weights: dict[str, np.ndarray], pixels: np.ndarray, window: int | None) -> np.ndarray:
    net = PlainClip.of_tower(weights, CLIPVisionConfig(**METACLIP_VISION))
    return plain_method(net, pixels, "maskclip", window)[0]


def spar_siglip(tokenizer: Any, folder: Path) -> SparSiglipModel:
    save_siglip(tokenizer, folder)
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
    width = {"siglip": "projection_size", "clip": "projection_dim"}[kind]
    return {**TEXT, **ends_of(tokenizer), "model_type": f"{kind}_text_model", width: 24}


def spar_radio(tokenizer: Any, kind: str = "siglip") -> SparRadioModel:
    model = SparRadioModel(SparRadioConfig(text_config=radio_text(tokenizer, kind), vision_config=RADIO_VISION)).eval()
    randomise(model, seed=7)
    spread_tokens(model.vision_model)
    return model


KINDS: dict[str, Kind] = {
    "siglip": Kind(
        save_siglip,
        lambda weights, image, window: plain_siglip(weights, image, 16, 3, 3, "gelu_pytorch_tanh", window),
        "pad",
        SiglipVisionModel,
        ("head.probe",),
    ),
    "naflex": Kind(
        lambda tokenizer, folder: stock_naflex(tokenizer).save_pretrained(folder),
        lambda weights, image, window: plain_siglip(weights, image, 16, 3, 3, "gelu_pytorch_tanh", window, True),
        "stretch",
        Siglip2VisionModel,
        ("head.probe",),
    ),
    "dinov3": Kind(
        lambda tokenizer, folder: stock_dinov3().save_pretrained(folder),
        lambda weights, image, window: plain_dinov3(weights, image, 16, 3, 3, 4, window),
        "stretch",
        DINOv3ViTModel,
        ("embeddings.mask_token",),
        spar_dinov3,
    ),
    "tips": Kind(
        lambda tokenizer, folder: stock_tips(tokenizer).save_pretrained(folder),
        lambda weights, image, window: plain_tips(weights, image, 16, 3, 3, 1, window),
        "floor",
        Tipsv2VisionModel,
        ("embeddings.mask_token",),
    ),
    "metaclip": Kind(
        lambda tokenizer, folder: stock_metaclip(tokenizer).save_pretrained(folder),
        plain_metaclip,
        "floor",
        MetaClip2VisionModel,
        # The patches take the last block's values alone.
        tuple(f"encoder.layers.2.self_attn.{name}_proj.{kind}" for name in "qk" for kind in ("weight", "bias")),
    ),
    "eva02": Kind(
        partial(save_eva, design="eva02"),
        lambda weights, image, window: plain_eva(weights, image, 16, 3, 3, False, window),
        "floor",
        still=tuple(f"layers.2.self_attn.{name}" for name in ("q_proj.weight", "q_proj.bias", "k_proj.weight")),
    ),
    "pe_core": Kind(
        partial(save_eva, design="pe_core"),
        lambda weights, image, window: plain_eva(weights, image, 16, 3, 3, True, window),
        "floor",
        still=("head.probe",),
    ),
    "radio": Kind(
        lambda tokenizer, folder: radio_tower().save_pretrained(folder),
        lambda weights, image, window: plain_radio(weights, image, 16, 3, 3, 5, window),
        "stretch",
        RadioModel,
        whole=spar_radio,
    ),
}


def whole_model(name: str, tokenizer: Any, folder: Path) -> Any:
    """A whole model of ours of a family, towers for images and words."""
    kind = KINDS[name]
    if kind.whole is not None:
        return kind.whole(tokenizer)
    kind.save(tokenizer, folder)
    tokenizer.save_pretrained(folder)
    return load(folder)[0].eval()


@dataclass(frozen=True)
class Family:
    """A family's checkpoint on disk, its vision tower, and its plain formulation."""

    name: str
    folder: Path
    weights: dict[str, np.ndarray]
    tower: Any

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    def plain(self, images: torch.Tensor, window: int | None = None) -> torch.Tensor:
        features = [self.kind.plain(self.weights, image.double().numpy(), window) for image in images]
        return torch.from_numpy(np.stack(features)).float()
