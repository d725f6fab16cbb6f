"""TIPSv2: configurations, SparTipsVisionModel (DINOv2's ViT with registers) and SparTipsModel (and its text tower)."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import Tipsv2Config, Tipsv2Model, Tipsv2TextConfig, Tipsv2VisionConfig, Tipsv2VisionModel
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.models.tipsv2.modeling_tipsv2 import Tipsv2VisionAttention, Tipsv2VisionEmbeddings, Tipsv2VisionLayer

from .configuration_spar import DenseConfig, DenseVisionConfig
from .encoder_spar import DenseModel, DenseVisionModel, embed_patches, self_attention
from .grid_spar import resize_positions
from .reach_spar import WindowReach, asking


class SparTipsVisionConfig(DenseVisionConfig, Tipsv2VisionConfig):
    """`Tipsv2VisionConfig` and what dense features at any resolution need beside it; see `DenseVisionConfig`.

    Args:
        method: `final_norm`: the patch tokens after the final norm are the features.
        position_interpolation: None is `bilinear_antialias`, TIPSv2's own rule.
        size_rule: `floor`, as the stock class has it.
        image_mean, image_std: 0 and 1; TIPSv2 takes pixels of 0 to 1 as they are.
    """

    model_type = "spar_tips_vision"
    stock_class = Tipsv2VisionConfig
    vision_types = ("tipsv2_vision_model", "spar_tips_vision")

    image_size: int = 448
    patch_size: int = 14
    method: str = "final_norm"
    image_mean: list[float] | tuple[float, ...] = (0.0, 0.0, 0.0)
    image_std: list[float] | tuple[float, ...] = (1.0, 1.0, 1.0)

    def settle_method(self) -> None:
        super().settle_method()
        if self.position_interpolation is None:
            self.position_interpolation = "bilinear_antialias"

    @property
    def projection_dim(self) -> int:
        """Width of the text space."""
        return self.hidden_size


class SparTipsConfig(DenseConfig, Tipsv2Config):
    """A `SparTipsVisionConfig` and TIPSv2's text configuration; see `DenseConfig`."""

    model_type = "spar_tips"
    stock_types = ("tipsv2",)
    vision_class = SparTipsVisionConfig
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=SparTipsVisionConfig),
        "text_config": SubConfigSpec(config_class=Tipsv2TextConfig),
    }

    text_config: dict | Tipsv2TextConfig | None = None
    vision_config: dict | SparTipsVisionConfig | None = None

    @property
    def text_inputs(self) -> dict[str, Any]:
        """The tower averages over the words by their mask, so padding changes nothing."""
        return {"max_length": 64, "lowercase": True}


class SparTipsEmbeddings(Tipsv2VisionEmbeddings):  # differs from TIPSv2 only in how positions are resized
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        patches, grid_hw = embed_patches(self.patch_embeddings.projection, pixel_values)
        table = self.position_embeddings[0]
        positions = resize_positions(table[1:], grid_hw, self.config.position_interpolation)
        prefix = torch.cat([self.cls_token + table[0], self.register_tokens], dim=1).expand(len(patches), -1, -1)
        return torch.cat([prefix, patches + positions], dim=1), grid_hw


class SparTipsAttention(Tipsv2VisionAttention):  # differs in its arithmetic on the CPU, and shows its map
    def forward(self, hidden_states, need_weights: bool = False, reach: WindowReach | None = None):
        return self_attention(self, self.o_proj, hidden_states, need_weights, reach)


class SparTipsLayer(Tipsv2VisionLayer):
    def __init__(self, config: SparTipsVisionConfig):
        super().__init__(config)
        self.attention = SparTipsAttention(config)

    def forward(self, hidden_states, need_weights: bool = False, reach: WindowReach | None = None):
        attended, weights = self.attention(self.norm1(hidden_states), need_weights, reach)
        hidden_states = asking(hidden_states, reach) + self.drop_path(self.layer_scale1(attended))
        return hidden_states + self.drop_path(self.layer_scale2(self.mlp(self.norm2(hidden_states)))), weights


class SparTipsVisionModel(DenseVisionModel, Tipsv2VisionModel):
    """TIPSv2's ViT, run once at any resolution; its normed patch tokens lie in the text space.

    Plain TIPSv2 checkpoints load straight into it, whole or vision tower alone, and what it saves has their layout.
    Source: TIPSv2 as transformers has it; the first of its class tokens is the image's vector there and here.
    """

    config: SparTipsVisionConfig
    config_class = SparTipsVisionConfig
    weights_needed = "a TIPSv2 checkpoint, such as google/tipsv2-b14"
    _no_split_modules = ["SparTipsEmbeddings", "SparTipsLayer"]
    _keys_to_ignore_on_load_unexpected = {r"^text_(model|encoder)\.", r"^temperature$"}

    def __init__(self, config: SparTipsVisionConfig):
        super().__init__(config)
        self.embeddings = SparTipsEmbeddings(config)
        self.encoder.layer = nn.ModuleList([SparTipsLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.config.num_register_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layer

    def embed(self, pixels):
        return self.embeddings(pixels)

    def project(self, tokens):
        normed = self.layernorm(tokens)
        return {
            "patch_embeds": normed[:, self.num_prefix_tokens :],
            "image_embeds": normed[:, 0],
            "last_hidden_state": normed,
            "pooler_output": normed[:, 0],
        }


class SparTipsModel(DenseModel, Tipsv2Model):
    """TIPSv2 with a `SparTipsVisionModel` for its vision tower: `vision_model`, `text_model`, `temperature`.

    Plain TIPSv2 checkpoints load straight into it; what it saves has their layout. Published ones hold no temperature:
    it is then the configuration's, as in the stock class.
    """

    config: SparTipsConfig
    config_class = SparTipsConfig
    weights_needed = SparTipsVisionModel.weights_needed
    _no_split_modules = ["Tipsv2TextEmbeddings", "Tipsv2TextEncoderLayer", *SparTipsVisionModel._no_split_modules]

    def __init__(self, config: SparTipsConfig):
        super().__init__(config)
        self.vision_model = SparTipsVisionModel._from_config(config.vision_config)
        self.post_init()

    def score(self, cosine: torch.Tensor) -> torch.Tensor:
        return cosine / self.temperature


# transformers renames a checkpoint's keys, Google's own names among them, by the class that loads it.
for _ours, _stock in (("SparTipsVisionModel", "Tipsv2VisionModel"), ("spar_tips", "tipsv2")):
    register_checkpoint_conversion_mapping(_ours, get_checkpoint_conversion_mapping(_stock), overwrite=True)
