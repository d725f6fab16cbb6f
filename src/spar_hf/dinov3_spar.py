"""DINOv3.txt: configurations, SparDinov3VisionModel (DINOv3's ViT), SparDinov3Model (and dino.txt's text tower)."""

from __future__ import annotations

import math

import torch
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.models.dinov3_vit.modeling_dinov3_vit import DINOv3ViTAttention, DINOv3ViTLayer
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from .configuration_spar import DenseConfig, DenseVisionConfig
from .encoder_spar import ClipTextSide, DenseVisionModel, self_attention
from .grid_spar import grid_places
from .reach_spar import WindowReach, asking


class SparDinov3VisionConfig(DenseVisionConfig, DINOv3ViTConfig):
    """`DINOv3ViTConfig` and what dense features at any resolution need beside it; see `DenseVisionConfig`.

    The default sizes are those of ViT-L/16, dino.txt's backbone.

    Args:
        image_size: side of the teacher's native window; the network itself has no native size. SPAR's is 384.
        method: `final_norm`: the patch tokens after the final norm are the features.
        position_interpolation: None; rotary positions fit any grid.
        rope_periods: periods of the rotary positions, a quarter of a head's width. Their authors' files hold them
            rounded to bf16, which moves the features by 1e-3; None: powers of `rope_theta`, as in transformers.
        size_rule: `stretch`, SPAR's.
    """

    model_type = "spar_dinov3_vision"
    stock_class = DINOv3ViTConfig
    vision_types = ("dinov3_vit", "spar_dinov3_vision")

    image_size: int = 384
    hidden_size: int = 1024
    intermediate_size: int = 4096
    num_hidden_layers: int = 24
    num_attention_heads: int = 16
    num_register_tokens: int = 4
    rope_periods: list[float] | tuple[float, ...] | None = None
    method: str = "final_norm"
    size_rule: str = "stretch"
    image_mean: list[float] | tuple[float, ...] = tuple(IMAGENET_DEFAULT_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(IMAGENET_DEFAULT_STD)

    @property
    def projection_dim(self) -> int:
        """Width of the text space."""
        return self.hidden_size

    def validate_spar(self) -> None:
        super().validate_spar()
        if self.position_interpolation is not None:
            raise ValueError(
                f"position_interpolation is {self.position_interpolation!r}; DINOv3's positions are rotary and fit "
                "any grid, so there is nothing to interpolate. Leave it out."
            )
        quarter = self.hidden_size // self.num_attention_heads // 4
        if self.rope_periods is not None and len(self.rope_periods) != quarter:
            raise ValueError(
                f"rope_periods has {len(self.rope_periods)} numbers; it must have as many as a quarter of a head's "
                f"width, {quarter}, or be None."
            )

    def rotary_periods(self) -> torch.Tensor:
        """(d / 4) in fp32, d the width of a head."""
        if self.rope_periods is not None:
            return torch.tensor(self.rope_periods, dtype=torch.float32)
        head_dim = self.hidden_size // self.num_attention_heads
        return self.rope_theta ** torch.arange(0, 1, 4 / head_dim, dtype=torch.float32)


class SparDinov3TextConfig(CLIPTextConfig):
    """Text tower of dino.txt: the sizes of `dinov3_vitl16_dinotxt_tet1280d20h24l`.

    Args:
        projection_dim: width of the whole text embedding: one half for the class token, the other for the patches.
    """

    model_type = "spar_dinov3_text"

    hidden_size: int = 1280
    intermediate_size: int = 5120
    num_hidden_layers: int = 24
    num_attention_heads: int = 20
    projection_dim: int = 2048
    hidden_act: str = "gelu"


class SparDinov3Config(DenseConfig):
    """A `SparDinov3VisionConfig` and a `SparDinov3TextConfig`; see `DenseConfig`."""

    model_type = "spar_dinov3"
    vision_class = SparDinov3VisionConfig
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(config_class=SparDinov3VisionConfig),
        "text_config": SubConfigSpec(config_class=SparDinov3TextConfig),
    }

    text_config: dict | SparDinov3TextConfig | None = None
    vision_config: dict | SparDinov3VisionConfig | None = None
    logit_scale_init_value: float = math.log(1 / 0.07)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        whole, half = self.text_config.projection_dim, self.vision_config.projection_dim
        if whole != 2 * half:
            raise ValueError(
                f"the text embedding has {whole} numbers and a patch {half}; the text's second half belongs to the "
                "patches, so it must have twice as many."
            )


# --------------------------------------------------------------------------------------------- vision


def rotary_angles(
    grid_hw: tuple[int, int], periods: torch.Tensor, num_prefix_tokens: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and signed sine of each token's angles, (P + h * w, d) in fp32; prefix tokens do not turn.

    Axial: a quarter of a head's channels turns with the row, a quarter with the column, and again. Coordinates are
    the patch centres from -1 to 1 along each side, whatever the grid. In fp32, as DINOv3's released ViTs have it:
    bf16 moves the features by 5e-3. Computed anew each time: a buffer would be cast with the weights.
    """
    rows, columns = ((2 * places + 1) / n - 1 for places, n in grid_places(grid_hw, periods.device))
    places = torch.stack([rows[:, None].expand(grid_hw), columns[None, :].expand(grid_hw)], dim=-1)  # (h, w, 2)
    return turns((2 * math.pi * places[..., None] / periods).reshape(-1, 2 * len(periods)), num_prefix_tokens)


def turns(angles: torch.Tensor, num_prefix_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(h * w, d / 2) angles of the patches -> cosine and signed sine of each token's, (P + h * w, d)."""
    angles = nn.functional.pad(angles, (0, 0, num_prefix_tokens, 0))
    cosine, sine = angles.cos(), angles.sin()
    return torch.cat([cosine, cosine], dim=-1), torch.cat([-sine, sine], dim=-1)


def rotate(heads: torch.Tensor, cosine: torch.Tensor, signed_sine: torch.Tensor) -> torch.Tensor:
    """Turns each pair of channels (i, i + d / 2) of (B, H, P + N, d) by its token's angle, in fp32."""
    turned = torch.addcmul(heads * cosine, heads.roll(heads.shape[-1] // 2, dims=-1), signed_sine)
    return turned.to(heads.dtype)


class SparDinov3Attention(DINOv3ViTAttention):  # differs in fp32 rotation, arithmetic on the CPU, and shows its map
    def forward(self, hidden_states, positions, need_weights: bool = False, reach: WindowReach | None = None):
        return self_attention(
            self, self.o_proj, hidden_states, need_weights, reach, lambda heads: rotate(heads, *positions)
        )


class SparDinov3Layer(DINOv3ViTLayer):
    def __init__(self, config: SparDinov3VisionConfig):
        super().__init__(config)
        self.attention = SparDinov3Attention(config)

    def forward(self, hidden_states, positions, need_weights: bool = False, reach: WindowReach | None = None):
        attended, weights = self.attention(self.norm1(hidden_states), positions, need_weights, reach)
        hidden_states = asking(hidden_states, reach) + self.layer_scale1(attended)
        return hidden_states + self.layer_scale2(self.mlp(self.norm2(hidden_states))), weights


class SparDinov3VisionModel(DenseVisionModel, DINOv3ViTModel):
    """DINOv3's ViT, run once at any resolution; its normed patch tokens lie in dino.txt's text space.

    Plain DINOv3 ViT checkpoints load straight into it, and what it saves has their layout. dino.txt's two further
    vision blocks are not part of it: SPAR's released code computes them and uses the backbone's patches. Positions are
    never augmented, in training either, so that the student sees the grid that the teacher saw.
    Source: DINOv3 (Siméoni et al., 2025), dino.txt (Jose et al., CVPR 2025), SPAR (Kombol et al., CVPR 2026).
    """

    config: SparDinov3VisionConfig
    config_class = SparDinov3VisionConfig
    weights_needed = "a DINOv3 ViT checkpoint, such as facebook/dinov3-vitl16-pretrain-lvd1689m"
    _no_split_modules = ["DINOv3ViTEmbeddings", "SparDinov3Layer"]
    _keys_to_ignore_on_load_unexpected = [
        r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"rope_embeddings\."
    ]  # fmt: skip

    def __init__(self, config: SparDinov3VisionConfig):
        super().__init__(config)
        del self.rope_embeddings  # `rotary_angles` takes its place
        self.model.layer = nn.ModuleList([SparDinov3Layer(config) for _ in range(config.num_hidden_layers)])
        self.post_init()

    @property
    def num_prefix_tokens(self) -> int:
        return 1 + self.config.num_register_tokens

    @property
    def blocks(self) -> nn.ModuleList:
        return self.model.layer

    def embed(self, pixels):
        patch_px = self.config.patch_size
        return self.embeddings(pixels), (pixels.shape[2] // patch_px, pixels.shape[3] // patch_px)

    def rotary_positions(self, grid_hw, device):
        return rotary_angles(grid_hw, self.config.rotary_periods().to(device), self.num_prefix_tokens)

    def run_block(self, layer, tokens, positions, need_weights, reach):
        return layer(tokens, positions, need_weights, reach)

    def project(self, tokens):
        normed = self.norm(tokens)
        patches = normed[:, self.num_prefix_tokens :]
        return {
            "patch_embeds": patches,
            "image_embeds": patches.mean(dim=1),
            "last_hidden_state": normed,
            "pooler_output": normed[:, 0],
        }


# ----------------------------------------------------------------------------------------------- text


class SparDinov3TextModel(CLIPTextModel):
    """dino.txt's text transformer: CLIP's, whose queries, keys and values have no bias."""

    config: SparDinov3TextConfig
    config_class = SparDinov3TextConfig

    def __init__(self, config: SparDinov3TextConfig):
        super().__init__(config)
        for layer in self.encoder.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                setattr(layer.self_attn, name, nn.Linear(config.hidden_size, config.hidden_size, bias=False))
        self.post_init()


class SparDinov3Model(ClipTextSide):
    """DINOv3.txt for dense features: `vision_model`, `text_model`, `text_projection`, `logit_scale`.

    A text's embedding has two halves, one for the image's class token and one for its patches. Text features here are
    the second half (SPAR's released code): the space of `patch_embeds`.
    """

    config: SparDinov3Config
    config_class = SparDinov3Config
    base_model_prefix = "spar_dinov3"
    weights_needed = "a folder that `spar convert --backbone dinov3` wrote; plain DINOv3 has no text tower"
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", *SparDinov3VisionModel._no_split_modules]

    def __init__(self, config: SparDinov3Config):
        super().__init__(config)
        self.vision_model = SparDinov3VisionModel._from_config(config.vision_config)
        text = config.text_config
        self.add_text_side(SparDinov3TextModel._from_config(text), text.projection_dim)
        self.post_init()

    def project_text(self, pooled):
        return super().project_text(pooled).chunk(2, dim=-1)[1]  # the half that belongs to the patches


# transformers names DINOv3's blocks `layer.N` on disk and `model.layer.N` in the class, by the class's name.
_LAYOUT = [WeightRenaming(r"(?<!model\.)layer\.", r"model.layer.")]
register_checkpoint_conversion_mapping(
    "SparDinov3VisionModel", [PrefixChange(prefix_to_remove="vision_model"), *_LAYOUT], overwrite=True
)
