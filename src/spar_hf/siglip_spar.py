"""SigLIP and SigLIP2, of fixed resolution and NaFlex: configurations, SparSiglipVisionModel and SparSiglipModel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import (
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.models.siglip.modeling_siglip import (
    SiglipAttention,
    SiglipEncoderLayer,
    SiglipMultiheadAttentionPoolingHead,
    SiglipVisionEmbeddings,
)

from .configuration_spar import DenseConfig, DenseVisionConfig
from .encoder_spar import (
    DenseAttention,
    DenseEncoderLayer,
    DenseModel,
    DenseVisionModel,
    embed_patches,
    position_table,
)
from .grid_spar import resize_positions

WEIGHTS_NEEDED = "a SigLIP or SigLIP2 checkpoint, such as google/siglip2-base-patch16-512"
NAFLEX = "siglip2"  # how transformers' model types of NaFlex begin; SigLIP2 of fixed resolution is of type siglip


class SparSiglipVisionConfig(DenseVisionConfig, SiglipVisionConfig):
    """`SiglipVisionConfig` and what dense features at any resolution need beside it; see `DenseVisionConfig`.

    Args:
        hidden_act: of the vision tower. Stock files say `gelu_pytorch_tanh`; some weights of timm were trained with
            the exact `gelu`, SigLIP2 ViT-B/16 and with it SPAR's among them.
        num_patches: NaFlex: the length of the position table, (image_size / patch_size)²; patches are then embedded as
            rows of numbers (y, x, channel). None: fixed resolution, where a convolution embeds them.
        method: `attention_pool`: the attention-pooling head applied to each patch alone.
        position_interpolation: None is `size`, or `bilinear_antialias` for NaFlex; transformers' own rules.
        size_rule: `pad`, SPAR's; a NaFlex checkpoint is read with `stretch`, since its images were resized to whole
            patches.
    """

    model_type = "spar_siglip_vision"
    stock_class = SiglipVisionConfig
    vision_types = ("siglip_vision_model", "spar_siglip_vision", "siglip2_vision_model")

    image_size: int = 224
    patch_size: int = 16
    num_patches: int | None = None
    method: str = "attention_pool"
    size_rule: str = "pad"

    def settle_method(self) -> None:
        super().settle_method()
        if self.position_interpolation is None:
            self.position_interpolation = "size" if self.num_patches is None else "bilinear_antialias"

    @property
    def projection_dim(self) -> int:
        """Width of the text space."""
        return self.hidden_size

    def validate_spar(self) -> None:
        super().validate_spar()
        if not self.vision_use_head:
            raise ValueError(
                "vision_use_head is False; without its attention-pooling head a SigLIP's patches are not in the text "
                f"space. Give {WEIGHTS_NEEDED}."
            )
        whole = (self.image_size // self.patch_size) ** 2
        if self.num_patches not in (None, whole):
            raise ValueError(
                f"num_patches is {self.num_patches}; it must be the patches of a square of image_size "
                f"{self.image_size} px, {whole}, or None for fixed resolution."
            )

    @classmethod
    def from_stock(cls, vision: dict[str, Any], model_type: str | None) -> dict[str, Any]:
        vision = super().from_stock(vision, model_type)
        patch_px, image_px = vision.get("patch_size", cls.patch_size), vision.get("image_size", cls.image_size)
        if str(model_type).startswith(NAFLEX):
            vision = {"num_patches": Siglip2VisionConfig.num_patches, "size_rule": "stretch", **vision}
            return {**vision, "image_size": math.isqrt(vision["num_patches"]) * patch_px}
        # so400m-patch14-384 says 384 px and sees 27 x 27 patches: 378 px.
        return {**vision, "image_size": image_px // patch_px * patch_px}


class SparSiglipConfig(DenseConfig, SiglipConfig):
    """A `SparSiglipVisionConfig` and SigLIP's text configuration; see `DenseConfig`."""

    model_type = "spar_siglip"
    stock_types = ("siglip", "siglip2")
    vision_class = SparSiglipVisionConfig
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=SparSiglipVisionConfig),
        "text_config": SubConfigSpec(config_class=SiglipTextConfig),
    }

    text_config: dict | SiglipTextConfig | None = None
    vision_config: dict | SparSiglipVisionConfig | None = None

    @property
    def text_inputs(self) -> dict[str, Any]:
        """Trained on lower-case texts at full length, padding read along with the words."""
        return {"text_padding": "max_length", "max_length": 64, "lowercase": True}

    @classmethod
    def from_stock(cls, config_dict: dict[str, Any]) -> dict[str, Any]:
        if config_dict.get("model_type") == "siglip2" and "text_config" in config_dict:
            # NaFlex' text tower is SigLIP's by another name.
            text = {**config_dict["text_config"], "model_type": SiglipTextConfig.model_type}
            config_dict = {**config_dict, "text_config": text}
        return super().from_stock(config_dict)


class SparSiglipVisionEmbeddings(SiglipVisionEmbeddings):  # differs in how positions are resized, and reads NaFlex
    def __init__(self, config: SparSiglipVisionConfig):
        super().__init__(config)
        if config.num_patches is not None:
            inputs = config.num_channels * config.patch_size**2
            self.patch_embedding = nn.Linear(inputs, config.hidden_size)  # type: ignore[assignment]

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        if self.config.num_patches is None:
            patches, grid_hw = embed_patches(self.patch_embedding, pixel_values)
        else:
            pixels = pixel_values.to(self.position_embedding.weight.dtype)
            patches, grid_hw = embed_flat_patches(self.patch_embedding, pixels, self.config.patch_size)
        table = position_table(self.position_embedding, self.num_positions, patches.device)
        return patches + resize_positions(table, grid_hw, self.config.position_interpolation), grid_hw


def embed_flat_patches(linear: nn.Linear, pixels: torch.Tensor, patch_px: int) -> tuple[torch.Tensor, tuple[int, int]]:
    """(B, 3, H, W) -> (B, h * w, C) and (h, w), by a layer that takes a patch as a row: y, then x, then channel."""
    grid_hw = (pixels.shape[2] // patch_px, pixels.shape[3] // patch_px)
    pixels = pixels[:, :, : grid_hw[0] * patch_px, : grid_hw[1] * patch_px]
    patches = pixels.unflatten(3, (grid_hw[1], patch_px)).unflatten(2, (grid_hw[0], patch_px))  # (B, 3, h, p, w, p)
    return linear(patches.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)), grid_hw


class SparSiglipAttention(DenseAttention, SiglipAttention):
    pass


class SparSiglipEncoderLayer(DenseEncoderLayer, SiglipEncoderLayer):
    def __init__(self, config: SparSiglipVisionConfig):
        super().__init__(config)
        self.self_attn = SparSiglipAttention(config)


class SparSiglipPooling(nn.MultiheadAttention):
    """The head's attention, for the whole image and for each patch alone; its weights are the stock module's."""

    def forward(self, probe: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Attends from the probe to all patches, and to each patch alone, of which the soft-max is 1.

        Args:
            probe: (1, 1, C).
            tokens: (B, N, C).

        Returns:
            (B, 1 + N, C), the whole image first; and None, where the stock module has its map.
        """
        query_weight, key_weight, value_weight = self.in_proj_weight.split(self.embed_dim)
        query_bias, _, value_bias = self.in_proj_bias.split(self.embed_dim)
        values = nn.functional.linear(tokens, value_weight, value_bias)  # (B, N, C)

        # q·(W x + b) = (Wᵀ q)·x + q·b: folding the key weights into the single query needs no key for any patch, and
        # q·b shifts all scores of a head alike, which the soft-max ignores.
        query = nn.functional.linear(probe[0, 0], query_weight, query_bias).view(-1, self.head_dim)  # (H, d)
        folded = torch.einsum("hd,hdc->hc", query, key_weight.view(-1, self.head_dim, self.embed_dim))
        scores = tokens @ folded.T * self.head_dim**-0.5  # (B, N, H)
        weights = scores.softmax(dim=1, dtype=torch.float32).to(values.dtype)
        pooled = torch.einsum("bnh,bnhd->bhd", weights, values.unflatten(-1, (-1, self.head_dim)))  # (B, H, d)
        return self.out_proj(torch.cat([pooled.flatten(1)[:, None], values], dim=1)), None


class SparSiglipHead(SiglipMultiheadAttentionPoolingHead):
    """SigLIP's attention-pooling head, for the whole image and for each patch alone (SPAR's released code).

    Either is y + mlp(norm(y)) of y, what the probe's attention gives.
    """

    def __init__(self, config: SparSiglipVisionConfig):
        super().__init__(config)
        self.attention = SparSiglipPooling(config.hidden_size, config.num_attention_heads, batch_first=True)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, C) after the final norm -> (B, 1 + N, C) in the text space, the whole image first."""
        pooled, _ = self.attention(self.probe, tokens)
        return pooled + self.mlp(self.layernorm(pooled))


class SparSiglipVisionModel(DenseVisionModel, SiglipVisionModel):
    """SigLIP's vision tower, run once at any resolution, with one text-aligned vector per patch.

    Plain SigLIP and SigLIP2 checkpoints, NaFlex among them, load straight into it, whole or vision tower alone, and
    what it saves has their layout. NaFlex takes each image at its own ratio; here a batch is of one size, so that
    nothing is packed or masked. Any height and width, any batch size, fp32, bf16 and fp16.
    Source: SPAR (Kombol et al., CVPR 2026), section 3, and the behaviour of its released code.
    """

    config: SparSiglipVisionConfig
    config_class = SparSiglipVisionConfig
    num_prefix_tokens = 0
    weights_needed = WEIGHTS_NEEDED
    _no_split_modules = ["SparSiglipVisionEmbeddings", "SparSiglipEncoderLayer", "SparSiglipHead"]
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^logit_scale$", r"^logit_bias$", r"position_ids$"]

    def __init__(self, config: SparSiglipVisionConfig):
        super().__init__(config)
        self.embeddings = SparSiglipVisionEmbeddings(config)
        self.encoder.layers = nn.ModuleList([SparSiglipEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.head = SparSiglipHead(config)
        self.post_init()

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    def embed(self, pixels):
        return self.embeddings(pixels)

    def run_block(self, layer, tokens, positions, need_weights, reach):
        return layer(tokens, inside=lambda layer, x, y: layer.update(x, y, need_weights, reach))

    def project(self, tokens):
        normed = self.post_layernorm(tokens)
        embeds = self.head(normed)  # (B, h * w, C) -> (B, 1 + h * w, C)
        return {
            "patch_embeds": embeds[:, 1:],
            "image_embeds": embeds[:, 0],
            "last_hidden_state": normed,
            "pooler_output": embeds[:, 0],
        }


class SparSiglipModel(DenseModel, SiglipModel):
    """SigLIP with a `SparSiglipVisionModel` for its vision tower: `vision_model`, `text_model`.

    Plain SigLIP and SigLIP2 checkpoints, NaFlex among them, load straight into it; what it saves has their layout.
    Fields of `SparSiglipVisionConfig` can be given to `from_pretrained`.
    """

    config: SparSiglipConfig
    config_class = SparSiglipConfig
    weights_needed = WEIGHTS_NEEDED
    _no_split_modules = ["SiglipTextEmbeddings", "SiglipEncoderLayer", *SparSiglipVisionModel._no_split_modules]
    _keys_to_ignore_on_load_unexpected = [r"position_ids$"]

    def __init__(self, config: SparSiglipConfig):
        super().__init__(config)
        self.vision_model = SparSiglipVisionModel._from_config(config.vision_config)
        self.post_init()

    def score(self, cosine: torch.Tensor) -> torch.Tensor:
        return super().score(cosine) + self.logit_bias


# As for CLIP: without it, a whole checkpoint would leave the weights of the tower alone random.
register_checkpoint_conversion_mapping(
    "SparSiglipVisionModel", [PrefixChange(prefix_to_remove="vision_model")], overwrite=True
)
