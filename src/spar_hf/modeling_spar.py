"""SparVisionModel and SparModel: CLIP with any-resolution positions and dense, text-aligned patch features."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import CLIPModel, CLIPVisionModel
from transformers import initialization as init
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, CLIPVisionEmbeddings
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .configuration_spar import SparConfig, SparVisionConfig
from .dense_spar import (
    Recipe,
    attend,
    attention_map,
    class_token_attention,
    fit_to_patches,
    merge_heads,
    mix_maps,
    mix_patches,
    project_heads,
    resize_positions,
)


@dataclass
class SparVisionOutput(ModelOutput):
    """What a dense encoder returns. h, w: rows and columns of patches; D: width of the text space.

    Attributes:
        patch_embeds: (B, h, w, D), in the text space, not normalised.
        image_embeds: (B, D), the class token through CLIP's own last block, not normalised.
        last_hidden_state: (B, 1 + h * w, C) after the last block, before the final norm: the class token of CLIP's
            own last block, the patches of the recipe.
        pooler_output: (B, C), the normed class token, as `CLIPVisionModel` gives it.
        hidden_states: the embeddings and each block's output, where asked for.
        attentions: (B, H, 1 + N, 1 + N) for each block, where asked for; in the last one the patches' rows are the
            map the recipe applied.
        image_hw: (H, W) of the pixels that came.
        extent_hw: (height, width) in those pixels that the patch grid covers; see `fit_to_patches`.
    """

    patch_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hw: tuple[int, int] | None = None
    extent_hw: tuple[int, int] | None = None


@dataclass
class SparOutput(SparVisionOutput):
    """`SparVisionOutput` and the text side.

    Attributes:
        text_embeds: (K, D), one per text, not normalised.
        logits_per_image: (B, K), scaled cosine of image and text.
    """

    text_embeds: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None


class SparVisionEmbeddings(CLIPVisionEmbeddings):  # differs from CLIP only in how positions are resized
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        patches = self.patch_embedding(pixel_values.to(self.patch_embedding.weight.dtype))
        grid_hw = (patches.shape[2], patches.shape[3])
        patches = patches.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, h * w, C)
        table = self.position_embedding.weight
        positions = resize_positions(table[1:], grid_hw, self.config.position_interpolation)
        class_token = (self.class_embedding + table[0]).expand(len(patches), 1, -1)
        return torch.cat([class_token, patches + positions], dim=1), grid_hw


class SparAttention(CLIPAttention):  # differs from CLIP in its arithmetic on the CPU, and in that it shows its map
    def forward(self, hidden_states, attention_mask=None, need_weights: bool = False, **kwargs):
        if self.config._attn_implementation != "sdpa" and not need_weights:
            return super().forward(hidden_states, attention_mask, **kwargs)
        heads = project_heads(self, hidden_states, "qkv")
        if not need_weights:
            return self.out_proj(merge_heads(attend(heads["q"], heads["k"], heads["v"]))), None
        weights = attention_map(heads["q"], heads["k"])
        return self.out_proj(merge_heads(weights @ heads["v"])), weights


class SparEncoderLayer(CLIPEncoderLayer):
    """CLIP's block, open to a visitor.

    `inside(layer, x, y)` is called with the block's input x and its normalised input y, both (B, 1 + N, C), and what
    it returns is returned. Whoever needs a block's own weights works through it, so that sharded weights (FSDP) are
    gathered and gradient checkpointing sees the whole computation.
    """

    def __init__(self, config: SparVisionConfig):
        super().__init__(config)
        self.self_attn = SparAttention(config)

    def forward(self, hidden_states, attention_mask=None, inside: Callable | None = None, **kwargs):
        normed = self.layer_norm1(hidden_states)
        if inside is not None:
            return inside(self, hidden_states, normed)
        return self.update(hidden_states, normed)[0]

    def update(self, x: torch.Tensor, y: torch.Tensor, need_weights: bool = False):
        """The block as CLIP runs it, given its input x and y = ln_1(x); returns its output and its map or None."""
        attended, weights = self.self_attn(y, need_weights=need_weights)
        return self.feed_forward(x + attended), weights

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """x + mlp(ln_2(x))."""
        return x + self.mlp(self.layer_norm2(x))


def run_recipe(
    layers: nn.ModuleList, x: torch.Tensor, recipe: Recipe, grid_hw: tuple[int, int], need_weights: bool = False
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """Runs the blocks, with the recipe for the patches in the last one (or the last `recipe.blocks`).

    The class token takes CLIP's own path to the end. In the last block it costs one query.

    Args:
        layers: the network's blocks, `SparEncoderLayer`.
        x: (B, 1 + N, C), embedded tokens.
        recipe: the last block.
        grid_hw: rows and columns of patches.
        need_weights: also return the attention maps.

    Returns:
        The tokens (B, 1 + N, C) after the last block, the input of each block, and the attention map of each block
        (None unless asked for).
    """
    last, first = len(layers) - 1, max(len(layers) - recipe.blocks, 0)
    tapped: dict[int, dict[str, torch.Tensor]] = {}  # projections that the last block takes from earlier ones
    inputs, maps = [], []
    path = None  # the patches on the recipe's own path, (B, N, C)

    def source(term, index: int) -> int:
        """The block whose projections make the term's map in block `index`."""
        return index if recipe.blocks > 1 and index >= first else term.index(len(layers))

    def visit(layer, x, y, index, path):
        asked = [t.scores for t in recipe.terms if t.scores != "identity" and source(t, index) == index]
        heads = project_heads(layer.self_attn, y, "".join(asked) + "v" * (index >= first))
        if index >= first:
            term_heads = [tapped.get(source(term, index), heads) for term in recipe.terms]
            mixed = mix_patches(recipe.terms, term_heads, heads["v"], grid_hw)
            path = path + layer.self_attn.out_proj(merge_heads(mixed))
        if index < last:
            x, weights = layer.update(x, y, need_weights)
            return x, path, heads, weights
        attended, weights = class_token_attention(layer.self_attn, y, heads["v"])
        class_token = layer.feed_forward(x[:, :1] + layer.self_attn.out_proj(merge_heads(attended)))
        if recipe.feed_forward:
            path = layer.feed_forward(path)
        if need_weights:
            weights = torch.cat([weights, mix_maps(recipe.terms, term_heads, heads["v"], grid_hw)], dim=2)
        return torch.cat([class_token, path], dim=1), path, heads, weights if need_weights else None

    for index, layer in enumerate(layers):
        inputs.append(x)
        if index == first:
            path = x[:, 1:] if recipe.residual else torch.zeros_like(x[:, 1:])
        x, path, heads, weights = layer(x, inside=partial(visit, index=index, path=path))
        maps.append(weights)
        if heads and index < first:
            tapped[index] = heads
    return x, inputs, maps


class SparVisionModel(CLIPVisionModel):
    """CLIP's vision tower, run once at any resolution, with one text-aligned vector per patch.

    Plain CLIP checkpoints load straight into it, whole or vision tower with projection; that is the training-free
    baseline. `method` picks the last block: `SparVisionModel.from_pretrained(folder, method="naclip")`; so does any
    other field of `SparVisionConfig`.

    Any height and width of at least one patch, any batch size, fp32, bf16 and fp16.
    Source: SPAR (Kombol et al., CVPR 2026), section 3.
    """

    config: SparVisionConfig
    config_class = SparVisionConfig
    base_model_prefix = "vision_model"
    _no_split_modules = ["SparVisionEmbeddings", "SparEncoderLayer"]
    # A whole CLIP checkpoint holds more than this tower, and old ones hold an index that is no weight.
    _keys_to_ignore_on_load_unexpected = [r"^text_model\.", r"^text_projection\.", r"^logit_scale$", r"position_ids$"]

    def __init__(self, config: SparVisionConfig):
        super().__init__(config)
        self.embeddings = SparVisionEmbeddings(config)
        self.encoder.layers = nn.ModuleList([SparEncoderLayer(config) for _ in range(config.num_hidden_layers)])
        self.visual_projection = (
            nn.Linear(config.hidden_size, config.projection_dim, bias=False)
            if config.projection_dim
            else nn.Identity()
        )
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, SparVisionModel) and module.config.projection_dim:
            std = module.config.hidden_size**-0.5 * module.config.initializer_factor
            init.normal_(module.visual_projection.weight, std=std)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
    ) -> SparVisionOutput:
        """Dense features of a batch of images.

        Args:
            pixel_values: (B, 3, H, W), normalised with the configuration's mean and std.
            interpolate_pos_encoding: for callers of `CLIPVisionModel`; this model interpolates always.
            output_hidden_states: also return the embeddings and each block's output.
            output_attentions: also return each block's attention map; it takes N x N memory.

        Returns:
            `SparVisionOutput`.

        Raises:
            ValueError: pixels that are no (B, 3, H, W) tensor, or an image smaller than a patch.
        """
        config = self.config
        check_pixels(pixel_values, config.num_channels)
        recipe = Recipe(**config.recipe)
        need_weights = config.output_attentions if output_attentions is None else output_attentions
        need_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states

        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        pixels, extent_hw = fit_to_patches(pixel_values, config.patch_size, config.size_rule)
        tokens, grid_hw = self.embeddings(pixels)
        tokens = self.pre_layrnorm(tokens)
        tokens, inputs, maps = run_recipe(self.encoder.layers, tokens, recipe, grid_hw, need_weights)
        normed = self.post_layernorm(tokens)
        embeds = self.visual_projection(normed)  # (B, 1 + h * w, C) -> (B, 1 + h * w, D)
        return SparVisionOutput(
            patch_embeds=embeds[:, 1:].unflatten(1, grid_hw),
            image_embeds=embeds[:, 0],
            last_hidden_state=tokens,
            pooler_output=normed[:, 0],
            hidden_states=(*inputs, tokens) if need_states else None,
            attentions=tuple(maps) if need_weights else None,
            image_hw=image_hw,
            extent_hw=extent_hw,
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        return load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)


class SparModel(CLIPModel):
    """CLIP with a `SparVisionModel` for its vision tower: `vision_model`, `text_model`, `text_projection`.

    Plain CLIP checkpoints load straight into it; what it saves has their layout. Fields of `SparVisionConfig` can be
    given to `from_pretrained`.
    """

    config: SparConfig
    config_class = SparConfig
    _no_split_modules = ["CLIPTextEmbeddings", "CLIPEncoderLayer", *SparVisionModel._no_split_modules]
    _keys_to_ignore_on_load_unexpected = [r"position_ids$"]

    def __init__(self, config: SparConfig):
        super().__init__(config)
        del self.visual_projection  # one projection, in the tower that needs it for every patch
        self.vision_model = SparVisionModel._from_config(config.vision_config)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, SparModel):
            init.normal_(
                module.text_projection.weight, std=module.text_embed_dim**-0.5 * self.config.initializer_factor
            )
        else:
            super()._init_weights(module)

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """One vector per image: `pooler_output` (B, D), as `CLIPModel.get_image_features` gives it."""
        outputs = self.vision_model(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.image_embeds,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **vision_kwargs: Any,
    ) -> SparOutput:
        """Patch features, and text features where there is text; see `SparVisionModel.forward` for the pixels.

        Args:
            pixel_values: (B, 3, H, W).
            input_ids, attention_mask, position_ids: (K, length), one row a text.
        """
        vision = self.vision_model(pixel_values, **vision_kwargs)
        text_embeds = logits = None
        if input_ids is not None:
            text = self.get_text_features(input_ids, attention_mask, position_ids)
            text_embeds = text.pooler_output
            image, words = (nn.functional.normalize(e, dim=-1) for e in (vision.image_embeds, text_embeds))
            logits = self.logit_scale.exp() * image @ words.T
        return SparOutput(**vision, text_embeds=text_embeds, logits_per_image=logits)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        return load_whole(super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)


def check_pixels(pixel_values: torch.Tensor | None, num_channels: int) -> None:
    """Raises a `ValueError` that says what came and what to do, unless the pixels are (B, channels, H, W)."""
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        came = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise ValueError(
            f"pixel_values is {came}; it must be a (batch, {num_channels}, height, width) tensor. "
            "Use SparImageProcessor; images of different sizes go in one by one."
        )


def load_whole(load: Callable, name, *args, output_loading_info: bool = False, **kwargs):
    """`from_pretrained` that refuses to leave weights random: transformers would only print a report."""
    model, info = load(name, *args, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name} lacks {len(missing)} of the weights of {type(model).__name__}: {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}. Give a CLIP checkpoint with its projection (CLIPModel or "
            "CLIPVisionModelWithProjection), or projection_dim=0 for features before the projection."
        )
    return (model, info) if output_loading_info else model


# transformers renames the keys of a checkpoint by the name of the class that loads it; a new class has to say the same
# or its weights stay random. Saving applies the reverse, so files keep CLIP's layout.
register_checkpoint_conversion_mapping(
    "SparVisionModel", [PrefixChange(prefix_to_remove="vision_model")], overwrite=True
)
register_checkpoint_conversion_mapping(
    "SparModel", [WeightRenaming(r"^visual_projection", "vision_model.visual_projection")], overwrite=True
)
