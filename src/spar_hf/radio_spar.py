"""C-RADIO with a text teacher's head: configurations, SparRadioVisionModel and SparRadioModel."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, CLIPTextConfig, CLIPTextModel, RadioConfig, RadioModel, SiglipTextModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.core_model_loading import PrefixChange
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.radio.modeling_radio import RadioAttention, RadioLayer, RadioPatchEmbeddings

from .configuration_spar import DenseConfig, DenseVisionConfig
from .encoder_spar import ClipTextSide, DenseVisionModel, self_attention
from .grid_spar import resize_positions, whole_patches
from .reach_spar import WindowReach, asking

# The text tower of google/siglip2-giant-opt-patch16-384, the teacher called siglip2-g.
SIGLIP2_GIANT = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "num_attention_heads": 16,
    "vocab_size": 256000,
    "projection_size": 1536,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}


class SparRadioVisionConfig(DenseVisionConfig, RadioConfig):
    """`RadioConfig`, the head of one teacher, and what dense features at any resolution need; see `DenseVisionConfig`.

    The default sizes of the trunk are those of C-RADIOv4-H.

    Args:
        image_size: side of the teacher's native window; 512 is the size its authors prefer.
        projection_dim: width of the text space; 0 is the trunk alone, whose tokens are in no text space.
        adaptor: the teacher's name in NVIDIA's file, such as `siglip2-g`.
        adaptor_hidden_size: width inside the head.
        adaptor_num_blocks: residual blocks in the head.
        class_token: which of the class tokens is this teacher's.
        method: `summary_head`: the head made for the teacher's class token, applied to each patch (RADSeg, NARadio).
        position_interpolation: None is `square`, RADIO's own rule.
        size_rule: `stretch`; RADIO takes whole patches only.
        image_mean, image_std: CLIP's, as the trunk normalises them itself elsewhere; `norm_mean`, `norm_std` follow.
    """

    model_type = "spar_radio_vision"
    stock_class = RadioConfig
    vision_types = ("radio", "spar_radio_vision")

    image_size: int = 512
    projection_dim: int = 0
    adaptor: str | None = None
    adaptor_hidden_size: int = 0
    adaptor_num_blocks: int = 0
    class_token: int = 0
    method: str = "summary_head"
    size_rule: str = "stretch"
    image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)

    def settle_method(self) -> None:
        super().settle_method()
        if self.position_interpolation is None:
            self.position_interpolation = "square"
        self.norm_mean, self.norm_std = list(self.image_mean), list(self.image_std)

    def validate_spar(self) -> None:
        super().validate_spar()
        if self.projection_dim < 0 or (self.projection_dim and self.adaptor_hidden_size < 1):
            raise ValueError(
                f"projection_dim is {self.projection_dim} and adaptor_hidden_size {self.adaptor_hidden_size}; a head "
                "has two positive widths, and projection_dim=0 is a trunk without one."
            )
        if not 0 <= self.class_token < self.num_cls_tokens:
            raise ValueError(
                f"class_token is {self.class_token}; there are {self.num_cls_tokens} class tokens, counted from 0."
            )
        if self.video_temporal_patch_size is not None:
            raise ValueError(
                f"video_temporal_patch_size is {self.video_temporal_patch_size}: this is a trunk for videos. Give an "
                "image checkpoint, such as nvidia/C-RADIOv4-H."
            )

    @classmethod
    def from_stock(cls, vision: dict[str, Any], model_type: str | None) -> dict[str, Any]:
        # The stock image_size is a field of any ViT; RADIO's code reads it nowhere.
        ours = {"image_size": cls.image_size}
        for name in ("mean", "std"):
            ours[f"image_{name}"] = vision.get(f"norm_{name}", getattr(cls, f"image_{name}"))
        return {**super().from_stock(vision, model_type), **ours}


class SparRadioConfig(DenseConfig):
    """A `SparRadioVisionConfig` and the text configuration of its teacher, SigLIP's or CLIP's; see `DenseConfig`."""

    model_type = "spar_radio"
    vision_class = SparRadioVisionConfig
    sub_configs_defaults = {
        "vision_config": SubConfigSpec(
            config_class=SparRadioVisionConfig,
            init_kwargs={"projection_dim": SIGLIP2_GIANT["projection_size"], "adaptor_hidden_size": 2560},
        ),
        "text_config": SubConfigSpec(
            config_class=AutoConfig, model_type="siglip_text_model", init_kwargs=SIGLIP2_GIANT
        ),
    }

    text_config: dict | Any | None = None
    vision_config: dict | SparRadioVisionConfig | None = None
    logit_scale_init_value: float = math.log(100)

    def __post_init__(self, **kwargs):
        super().__post_init__(**kwargs)
        text_type = self.text_config.model_type
        if text_type not in TEXT_MODELS:
            raise ValueError(
                f"the text tower is of type {text_type!r:.80}; it must be one of {', '.join(TEXT_MODELS)}."
            )
        words, patches = self.text_width, self.vision_config.projection_dim
        if words != patches:
            raise ValueError(
                f"the text embedding has {words} numbers and a patch {patches}; the text tower must be that of the "
                f"head's own teacher ({self.vision_config.adaptor or 'not named'})."
            )

    @property
    def text_width(self) -> int:
        text = self.text_config
        return int(text.projection_dim if isinstance(text, CLIPTextConfig) else text.projection_size)

    @property
    def text_inputs(self) -> dict[str, Any]:
        """CLIP's tokenizer does all itself. SigLIP2's words came to RADIO in big_vision's canonical form."""
        if isinstance(self.text_config, CLIPTextConfig):
            return {}
        return {"text_padding": "max_length", "max_length": 64, "lowercase": True, "strip_punctuation": True}


# --------------------------------------------------------------------------------------------- vision


class SparRadioPatchEmbeddings(RadioPatchEmbeddings):  # differs in the positions' rule, and drops a remainder
    def __init__(self, config: SparRadioVisionConfig):
        super().__init__(config)
        self.config = config

    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        pixels = whole_patches(pixel_values, self.patch_size).to(self.cls_register_token.dtype)
        grid_hw = (pixels.shape[2] // self.patch_size, pixels.shape[3] // self.patch_size)
        patches = self.patch_projection(self._image_to_patches(pixels))
        positions = resize_positions(self.position_embedding[0], grid_hw, self.config.position_interpolation)
        prefix = self.cls_register_token.expand(len(patches), -1, -1)
        return torch.cat([prefix, patches + positions], dim=1), grid_hw


class SparRadioAttention(RadioAttention):  # differs in its arithmetic on the CPU, and shows its map
    def forward(self, hidden_states, need_weights: bool = False, reach: WindowReach | None = None):
        return self_attention(self, self.o_proj, hidden_states, need_weights, reach)


class SparRadioLayer(RadioLayer):
    def __init__(self, config: SparRadioVisionConfig):
        super().__init__(config)
        self.attention = SparRadioAttention(config)

    def forward(self, hidden_states, need_weights: bool = False, reach: WindowReach | None = None):
        attended, weights = self.attention(self.norm1(hidden_states), need_weights, reach)
        return self.update(asking(hidden_states, reach), attended), weights

    def update(self, x: torch.Tensor, attended: torch.Tensor) -> torch.Tensor:
        """The block's output, given its input and what its attention gave, both (B, P + N, C)."""
        x = x + self.drop_path(self.layer_scale1(attended))
        return x + self.drop_path(self.layer_scale2(self.mlp(self.norm2(x))))


class NormedLinear(nn.Module):
    """W gelu(norm(x)) + b."""

    def __init__(self, width: int, out_width: int):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, out_width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(nn.functional.gelu(self.norm(x)))


class SparRadioAdaptor(nn.Module):
    """The head that brings the trunk's tokens into a teacher's space; NVIDIA's `MLP2`."""

    def __init__(self, config: SparRadioVisionConfig):
        super().__init__()
        width = config.adaptor_hidden_size
        self.fc1 = nn.Linear(config.hidden_size, width)
        self.blocks = nn.ModuleList([NormedLinear(width, width) for _ in range(config.adaptor_num_blocks)])
        self.final = NormedLinear(width, config.projection_dim)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """(B, N, C) -> (B, N, D)."""
        x = self.fc1(tokens)
        for block in self.blocks:
            x = x + block(x)
        return self.final(x)


class SparRadioVisionModel(DenseVisionModel, RadioModel):
    """C-RADIO's trunk and one teacher's head, run once at any resolution, with one text-aligned vector per patch.

    `RadioModel`'s checkpoints load straight into it as a trunk without a head (`projection_dim` 0), and what it saves
    has their layout, the head beside it. Pixels come normalised, so the stock model's input conditioner is not used.
    Source: RADIO (Ranzinger et al., CVPR 2024), C-RADIOv4 (arXiv 2601.17237), RADSeg for the head on each patch.
    """

    config: SparRadioVisionConfig
    config_class = SparRadioVisionConfig
    weights_needed = (
        "a folder that `spar convert --backbone radio` wrote, or a checkpoint of RadioModel and projection_dim=0 for "
        "the trunk's own features"
    )
    _input_embed_layer = "patch_projection"
    _no_split_modules = ["SparRadioPatchEmbeddings", "SparRadioLayer", "SparRadioAdaptor"]
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"^logit_bias$"]

    def __init__(self, config: SparRadioVisionConfig):
        super().__init__(config)
        self.embeddings = SparRadioPatchEmbeddings(config)
        self.encoder.layer = nn.ModuleList([SparRadioLayer(config) for _ in range(config.num_hidden_layers)])
        self.adaptor = SparRadioAdaptor(config) if config.projection_dim else nn.Identity()
        self.post_init()

    @property
    def num_prefix_tokens(self) -> int:
        return self.config.num_cls_tokens + self.config.num_registers

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layer

    def embed(self, pixels):
        return self.embeddings(pixels)

    def project(self, tokens):
        own = tokens[:, self.config.class_token, None]
        patches = tokens[:, self.num_prefix_tokens :]
        embeds = self.adaptor(torch.cat([own, patches], dim=1))  # (B, 1 + h * w, C) -> (B, 1 + h * w, D)
        return {
            "patch_embeds": embeds[:, 1:],
            "image_embeds": embeds[:, 0],
            "last_hidden_state": tokens,
            "pooler_output": tokens[:, self.summary_idxs].flatten(1),  # the stock model's `summary`
        }


# ----------------------------------------------------------------------------------------------- text

TEXT_MODELS: dict[str, Any] = {"siglip_text_model": SiglipTextModel, "clip_text_model": CLIPTextModel}


class SparRadioModel(ClipTextSide):
    """C-RADIO for dense features: `vision_model`, and `text_model` with scale and bias of the head's teacher.

    The text tower is the teacher's own, SigLIP2's or CLIP's; RADIO's head learned to give that teacher's vectors.
    """

    config: SparRadioConfig
    config_class = SparRadioConfig
    base_model_prefix = "spar_radio"
    weights_needed = "a folder that `spar convert --backbone radio` wrote; NVIDIA's files have no text tower"
    _no_split_modules = [
        "CLIPTextEmbeddings",
        "CLIPEncoderLayer",
        "SiglipTextEmbeddings",
        "SiglipEncoderLayer",
        *SparRadioVisionModel._no_split_modules,
    ]
    _keys_to_ignore_on_load_unexpected = [r"position_ids$"]

    def __init__(self, config: SparRadioConfig):
        super().__init__(config)
        text = config.text_config
        self.vision_model = SparRadioVisionModel._from_config(config.vision_config)
        text_model = TEXT_MODELS[text.model_type]._from_config(text)
        if isinstance(text, CLIPTextConfig):
            self.add_text_side(text_model, text.projection_dim)
        else:
            self.text_model = text_model
            self.logit_scale = nn.Parameter(torch.tensor(config.logit_scale_init_value))
            self.logit_bias = nn.Parameter(torch.zeros(()))
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SparRadioModel) and hasattr(module, "logit_bias"):
            init.zeros_(module.logit_bias)

    def score(self, cosine: torch.Tensor) -> torch.Tensor:
        scaled = super().score(cosine)
        return scaled if isinstance(self.config.text_config, CLIPTextConfig) else scaled + self.logit_bias

    def project_text(self, pooled):
        return super().project_text(pooled) if isinstance(self.config.text_config, CLIPTextConfig) else pooled


# RADIO's files have NVIDIA's names. By model type, not class, so that `RadioModel` reads what is saved here too.
register_checkpoint_conversion_mapping(
    SparRadioVisionConfig.model_type,
    [PrefixChange(prefix_to_remove="vision_model"), *get_checkpoint_conversion_mapping("radio")],
    overwrite=True,
)
