"""EVA-02-CLIP and PE-Core: ViTs with learned and rotary positions, of timm's design, and CLIP's text tower.

Dense features, neither of which its authors give:

- EVA-02: in the last block each patch takes its own value alone instead of attending, as in MaskCLIP; then the final
  norm and the head, as for the class token. Kin: CLIPSelf (Wu et al., ICLR 2024), section 3.
- PE-Core: the attention-pooling head on each patch alone, as SPAR does with SigLIP's, then the projection.

Off the native grid both positions are stretched over the grid, as in timm; PE's own code counts rotary positions on
instead. Channels that turn together are i and i + d / 2 in our weights, as in DINOv3's, and 2 i and 2 i + 1 in theirs.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, SiglipVisionConfig
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_spar import DenseConfig, DenseVisionConfig
from .dense_spar import attend, attention_map, class_token_attention, merge_heads, project_heads
from .dinov3_spar import rotate, turns
from .encoder_spar import ClipTextSide, DenseVisionModel, embed_patches
from .grid_spar import grid_places, resize_positions
from .names_spar import one_of
from .reach_spar import WindowReach, asking
from .siglip_spar import SparSiglipHead

DESIGNS = {"eva02": "last_values", "pe_core": "attention_pool"}  # and the method of each


class SparEvaVisionConfig(DenseVisionConfig):
    """The vision tower of EVA-02-CLIP or PE-Core; the default sizes are those of EVA02-B/16. See `DenseVisionConfig`.

    Args:
        design: `eva02`: gated feed-forward, a norm inside it and one behind the attention, no bias of the keys; or
            `pe_core`: plain GELU blocks, a norm before the first one, an attention-pooling head.
        projection_dim: width of the text space.
        class_token: whether there is one; PE-Core G/14 has none.
        rope_grid: patches a side that rotary positions are counted on, whatever the grid.
        rope_offset: position of the first patch.
        rope_theta: base of the rotary frequencies.
        pool_heads: of PE-Core's attention-pooling head.
        method: the design's own, `last_values` or `attention_pool`; empty fills it in.
        position_interpolation: None is `antialias`, timm's rule.
    """

    model_type = "spar_eva_vision"
    vision_types = ("spar_eva_vision",)
    base_config_key = "vision_config"

    design: str = "eva02"
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    projection_dim: int = 512
    layer_norm_eps: float = 1e-6
    class_token: bool = True
    rope_grid: int = 16
    rope_offset: float = 0.0
    rope_theta: float = 10000.0
    pool_heads: int = 8
    initializer_range: float = 0.02
    image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)

    def settle_method(self) -> None:
        one_of("design", self.design, DESIGNS)
        if self.method not in ("", DESIGNS[self.design]):
            raise ValueError(
                f"method is {self.method!r}; the methods are CLIP's, and {type(self).__name__} has one way to dense "
                f"features, {DESIGNS[self.design]!r}. Leave the method out."
            )
        self.method = DESIGNS[self.design]
        if self.position_interpolation is None:
            self.position_interpolation = "antialias"

    def validate_spar(self) -> None:
        super().validate_spar()
        if self.hidden_size % self.num_attention_heads or self.hidden_size // self.num_attention_heads % 4:
            raise ValueError(
                f"hidden_size {self.hidden_size} in {self.num_attention_heads} heads: rotary positions in two "
                "directions need heads whose width is a multiple of 4."
            )
        if self.design == "eva02" and not self.class_token:
            raise ValueError("class_token is False; an EVA-02's image vector is its class token's. Leave it True.")

    def features_depend_on(self) -> dict[str, Any]:
        return {**super().features_depend_on(), "rope_grid": self.rope_grid, "rope_offset": self.rope_offset}

    def pooling_config(self) -> SiglipVisionConfig:
        """PE-Core's head as one of SigLIP's."""
        return SiglipVisionConfig(
            hidden_size=self.hidden_size,
            intermediate_size=4 * self.hidden_size,
            num_attention_heads=self.pool_heads,
            layer_norm_eps=self.layer_norm_eps,
            hidden_act="gelu",
        )


class SparEvaConfig(DenseConfig):
    """A `SparEvaVisionConfig` and CLIP's text configuration; see `DenseConfig`."""

    model_type = "spar_eva"
    vision_class = SparEvaVisionConfig
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=SparEvaVisionConfig),
        "text_config": SubConfigSpec(config_class=CLIPTextConfig),
    }

    text_config: dict | CLIPTextConfig | None = None
    vision_config: dict | SparEvaVisionConfig | None = None
    logit_scale_init_value: float = math.log(1 / 0.07)


# --------------------------------------------------------------------------------------------- vision


def grid_turns(
    config: SparEvaVisionConfig, grid_hw: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """What `rotate` takes: a quarter of a head's channels turns by one axis, a quarter by the other, and again.

    EVA-02 begins with the row, PE-Core with the column. The positions of n patches are (i + offset) / n * rope_grid.
    """
    quarter = config.hidden_size // config.num_attention_heads // 4
    frequencies = config.rope_theta ** -(torch.arange(quarter, dtype=torch.float32, device=device) / quarter)
    rows, columns = (
        (places + config.rope_offset) / n * config.rope_grid for places, n in grid_places(grid_hw, device)
    )
    axes = [rows[:, None].expand(grid_hw), columns[None, :].expand(grid_hw)]
    places = torch.stack(axes if config.design == "eva02" else axes[::-1], dim=-1)  # (h, w, 2)
    angles = (places[..., None] * frequencies).reshape(-1, 2 * quarter)  # (h * w, d / 2)
    return turns(angles, int(config.class_token))


class SparEvaAttention(nn.Module):
    def __init__(self, config: SparEvaVisionConfig):
        super().__init__()
        width = config.hidden_size
        self.head_dim = width // config.num_attention_heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width, bias=config.design == "pe_core")
        self.v_proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, config.layer_norm_eps) if config.design == "eva02" else nn.Identity()
        self.out_proj = nn.Linear(width, width)

    def forward(
        self, y, positions, need_weights: bool = False, reach: WindowReach | None = None, values_alone: bool = False
    ):
        """Attends; with `values_alone` only the class token does, and each patch takes its own value."""
        heads = project_heads(self, y, "kv" if values_alone else "qkv")
        key, value, weights = rotate(heads["k"], *positions), heads["v"], None
        if values_alone:
            attended, weights = class_token_attention(self, y, value, key)
            attended = torch.cat([attended, value[:, :, 1:]], dim=2)
            if need_weights:
                alone = torch.eye(value.shape[2], dtype=weights.dtype, device=weights.device)[1:]
                weights = torch.cat([weights, alone.expand(*weights.shape[:2], -1, -1)], dim=2)
        elif need_weights:
            weights = attention_map(rotate(heads["q"], *positions), key, reach=reach)
            attended = weights @ value
        else:
            attended = attend(rotate(heads["q"], *positions), key, value, reach=reach)
        return self.out_proj(self.norm(merge_heads(attended))), weights


class SparEvaGatedMLP(nn.Module):
    def __init__(self, config: SparEvaVisionConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.norm = nn.LayerNorm(config.intermediate_size, config.layer_norm_eps)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.down_proj(self.norm(nn.functional.silu(self.gate_proj(x)) * self.up_proj(x)))


class SparEvaMLP(nn.Module):
    def __init__(self, config: SparEvaVisionConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN["gelu"]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class SparEvaLayer(GradientCheckpointingLayer):
    def __init__(self, config: SparEvaVisionConfig):
        super().__init__()
        self.norm1 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SparEvaAttention(config)
        self.norm2 = nn.LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SparEvaGatedMLP(config) if config.design == "eva02" else SparEvaMLP(config)

    def forward(self, x, positions, need_weights: bool = False, reach=None, values_alone: bool = False):
        attended, weights = self.self_attn(self.norm1(x), positions, need_weights, reach, values_alone)
        x = asking(x, reach) + attended
        return x + self.mlp(self.norm2(x)), weights if need_weights else None


class SparEvaVisionModel(DenseVisionModel):
    """EVA-02-CLIP's or PE-Core's vision tower, run once at any resolution, with one text-aligned vector per patch.

    Source: EVA-CLIP (Sun et al., 2023), Perception Encoder (Bolya et al., 2025), both as timm and open_clip run them.
    """

    config: SparEvaVisionConfig
    config_class = SparEvaVisionConfig
    main_input_name = "pixel_values"
    weights_needed = "a folder that `spar convert --backbone eva` wrote"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _input_embed_layer = "patch_embedding"
    _no_split_modules = ["SparEvaLayer", "SparSiglipHead"]
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$"]

    def __init__(self, config: SparEvaVisionConfig):
        super().__init__(config)
        width, pools = config.hidden_size, config.design == "pe_core"
        self.patch_embedding = nn.Conv2d(
            config.num_channels, width, config.patch_size, stride=config.patch_size, bias=not pools
        )
        if config.class_token:
            self.class_embedding = nn.Parameter(torch.zeros(width))
        positions = (config.image_size // config.patch_size) ** 2 + self.num_prefix_tokens
        self.position_embedding = nn.Parameter(torch.zeros(positions, width))
        self.pre_norm = nn.LayerNorm(width, config.layer_norm_eps) if pools else nn.Identity()
        self.layers = nn.ModuleList([SparEvaLayer(config) for _ in range(config.num_hidden_layers)])
        self.post_norm = nn.LayerNorm(width, config.layer_norm_eps)
        self.head = SparSiglipHead(config.pooling_config()) if pools else nn.Identity()
        self.visual_projection = nn.Linear(width, config.projection_dim)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, SparEvaVisionModel):
            init.normal_(module.position_embedding, std=std)
            if self.config.class_token:
                init.normal_(module.class_embedding, std=std)
        elif isinstance(module, SparSiglipHead):
            init.normal_(module.probe, std=std)

    @property
    def num_prefix_tokens(self) -> int:
        return int(self.config.class_token)

    @property
    def blocks(self) -> nn.ModuleList:
        return self.layers

    def embed(self, pixels):
        tokens, grid_hw = embed_patches(self.patch_embedding, pixels)
        table, prefix = self.position_embedding, self.num_prefix_tokens
        tokens = tokens + resize_positions(table[prefix:], grid_hw, self.config.position_interpolation)
        if prefix:
            class_token = (self.class_embedding + table[0]).expand(len(tokens), 1, -1)
            tokens = torch.cat([class_token, tokens], dim=1)
        return self.pre_norm(tokens), grid_hw

    def rotary_positions(self, grid_hw, device):
        return grid_turns(self.config, grid_hw, device)

    def run_block(self, layer, tokens, positions, need_weights, reach):
        values_alone = self.config.design == "eva02" and layer is self.blocks[-1]
        return layer(tokens, positions, need_weights, reach, values_alone)

    def project(self, tokens):
        normed = self.post_norm(tokens)
        # EVA-02: a vector of each token, the class token's first. PE-Core: the pooled one before those.
        vectors = self.head(normed)
        embeds = self.visual_projection(vectors)
        return {
            "patch_embeds": embeds[:, embeds.shape[1] - (tokens.shape[1] - self.num_prefix_tokens) :],
            "image_embeds": embeds[:, 0],
            "last_hidden_state": normed,
            "pooler_output": vectors[:, 0],
        }


class SparEvaModel(ClipTextSide):
    """EVA-02-CLIP or PE-Core for dense features: `vision_model`, `text_model`, `text_projection`, `logit_scale`."""

    config: SparEvaConfig
    config_class = SparEvaConfig
    base_model_prefix = "spar_eva"
    weights_needed = SparEvaVisionModel.weights_needed
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", *SparEvaVisionModel._no_split_modules]

    def __init__(self, config: SparEvaConfig):
        super().__init__(config)
        self.vision_model = SparEvaVisionModel._from_config(config.vision_config)
        self.add_text_side(CLIPTextModel._from_config(config.text_config), config.vision_config.projection_dim)
        self.post_init()


# Without it, a whole checkpoint would leave the weights of the tower alone random.
register_checkpoint_conversion_mapping(
    "SparEvaVisionModel", [PrefixChange(prefix_to_remove="vision_model")], overwrite=True
)
