"""The CLIP family: configurations, and models with positions of any resolution and text-aligned patch features."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, CLIPVisionModel
from transformers import initialization as init
from transformers.configuration_utils import SubConfigSpec
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.core_model_loading import PrefixChange, WeightRenaming
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.clip.modeling_clip import CLIPAttention, CLIPEncoderLayer, CLIPVisionEmbeddings

from .configuration_spar import DenseConfig, DenseVisionConfig
from .dense_spar import class_token_attention, mean_length, merge_heads, mix_maps, mix_patches, project_heads
from .encoder_spar import (
    DenseAttention,
    DenseEncoderLayer,
    DenseModel,
    DenseVisionModel,
    embed_patches,
    position_table,
)
from .grid_spar import resize_positions
from .methods_spar import Recipe, find_recipe
from .reach_spar import WindowReach


class SparVisionConfig(DenseVisionConfig, CLIPVisionConfig):
    """`CLIPVisionConfig` and what dense features at any resolution need beside it; see `DenseVisionConfig`.

    Args:
        method: row of the table of methods; gives `recipe` and `position_interpolation` where these are not given.
        recipe: the last block, `spar_hf.methods_spar.Recipe` as a dictionary. A saved model keeps it written out, so
            it does not depend on a later version of the table.
    """

    model_type = "spar_vision"
    stock_class = CLIPVisionConfig
    vision_types = ("clip_vision_model", "metaclip_2_vision_model", "spar_vision")

    image_size: int = 224
    patch_size: int = 16
    method: str = "maskclip"
    recipe: dict[str, Any] | None = None
    image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN)
    image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD)

    def settle_method(self) -> None:
        if self.recipe is None:
            self.recipe = find_recipe(self.method).recipe.to_dict()
        if self.position_interpolation is None:
            self.position_interpolation = find_recipe(self.method).position_interpolation

    def features_depend_on(self) -> dict[str, Any]:
        return {**super().features_depend_on(), "recipe": Recipe(**self.recipe).to_dict()}

    def validate_spar(self) -> None:
        Recipe(**self.recipe)
        super().validate_spar()


class SparConfig(DenseConfig, CLIPConfig):
    """A `SparVisionConfig` and CLIP's text configuration; see `DenseConfig`."""

    model_type = "spar"
    stock_types = ("clip",)
    vision_class = SparVisionConfig
    sub_configs_defaults = {  # the long form: transformers 5.20, the last for Python 3.10, reads no other
        "vision_config": SubConfigSpec(config_class=SparVisionConfig),
        "text_config": SubConfigSpec(config_class=CLIPTextConfig),
    }

    text_config: dict | CLIPTextConfig | None = None
    vision_config: dict | SparVisionConfig | None = None


WEIGHTS_NEEDED = (
    "a CLIP checkpoint with its projection (CLIPModel or CLIPVisionModelWithProjection), or projection_dim=0 for "
    "features before the projection"
)


class SparVisionEmbeddings(CLIPVisionEmbeddings):  # differs from CLIP only in how positions are resized
    def forward(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        patches, grid_hw = embed_patches(self.patch_embedding, pixel_values)
        table = position_table(self.position_embedding, self.num_positions, patches.device)
        positions = resize_positions(table[1:], grid_hw, self.config.position_interpolation)
        class_token = (self.class_embedding + table[0]).expand(patches.shape[0], 1, -1)
        return torch.cat([class_token, patches + positions], dim=1), grid_hw


class SparAttention(DenseAttention, CLIPAttention):
    pass


class SparEncoderLayer(DenseEncoderLayer, CLIPEncoderLayer):
    def __init__(self, config: SparVisionConfig):
        super().__init__(config)
        self.self_attn = SparAttention(config)


def run_recipe(
    layers: nn.ModuleList,
    x: torch.Tensor,
    recipe: Recipe,
    grid_hw: tuple[int, int],
    need_weights: bool = False,
    reach: WindowReach | None = None,
) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
    """Runs the blocks, with the recipe for the patches in the last one (or the last `recipe.blocks`).

    The class token takes CLIP's own path to the end. In the last block it costs one query.

    Args:
        layers: the network's blocks, `SparEncoderLayer`.
        x: (B, 1 + N, C), embedded tokens.
        recipe: the last block.
        grid_hw: rows and columns of patches.
        need_weights: also return the attention maps.
        reach: how far the patches' attention reaches, in every block; None is everywhere.

    Returns:
        The tokens (B, 1 + N, C) after the last block, the input of each block, and the attention map of each block
        (None unless asked for).
    """
    last, first = len(layers) - 1, max(len(layers) - recipe.blocks, 0)
    iterates = any(term.iterations for term in recipe.terms)
    tapped: dict[int, dict[str, torch.Tensor]] = {}  # projections that the last block takes from earlier ones
    inputs, maps = [], []
    path = None  # the patches on the recipe's own path, (B, N, C)

    def source(term, index: int) -> int:
        """The block whose projections make the term's map in block `index`."""
        return index if recipe.blocks > 1 and index >= first else term.index(len(layers))

    def names(index: int) -> list[str]:
        """The projections that the recipe takes of block `index`; "length" where their temperature needs it."""
        asked = [t.scores for t in recipe.terms if t.scores != "identity" and source(t, index) == index]
        letters = sorted(set("".join(asked) + "v" * (index >= first)))
        return [*letters, "length"] if letters and iterates else letters

    def projections(layer, y, index: int) -> dict[str, torch.Tensor]:
        wanted = names(index)
        heads = project_heads(layer.self_attn, y, "".join(wanted).removesuffix("length"))
        return {**heads, "length": mean_length(y)} if "length" in wanted else heads

    def visit(layer, x, y, path, *others, index):
        heads = projections(layer, y, index)
        if index >= first:
            earlier = iter(others)
            by_block = {block: {name: next(earlier) for name in names(block)} for block in tapped} if others else {}
            term_heads = [by_block.get(source(term, index), heads) for term in recipe.terms]
            mixed = mix_patches(recipe.terms, term_heads, heads["v"], grid_hw, reach)
            path = path + layer.self_attn.out_proj(merge_heads(mixed))
        if index < last:
            x, weights = layer.update(x, y, need_weights, reach)
            return x, path, weights, *heads.values()
        attended, weights = class_token_attention(layer.self_attn, y, heads["v"], heads.get("k"))
        class_token = layer.feed_forward(x[:, :1] + layer.self_attn.out_proj(merge_heads(attended)))
        if recipe.feed_forward:
            path = layer.feed_forward(path)
        if need_weights:
            patch_maps = mix_maps(recipe.terms, term_heads, heads["v"], grid_hw, reach)
            weights = torch.cat([weights, patch_maps], dim=2)
        return torch.cat([class_token, path], dim=1), path, weights if need_weights else None

    for index, layer in enumerate(layers):
        inputs.append(x)
        if index == first:
            path = x[:, 1:] if recipe.residual else torch.zeros_like(x[:, 1:])
        others = [head for heads in tapped.values() for head in heads.values()] if index == last else []
        x, path, weights, *heads = layer(x, path, *others, inside=partial(visit, index=index))
        maps.append(weights)
        if heads and index < first:
            tapped[index] = dict(zip(names(index), heads, strict=True))
    return x, inputs, maps


class SparVisionModel(DenseVisionModel, CLIPVisionModel):
    """CLIP's vision tower, run once at any resolution, with one text-aligned vector per patch.

    Plain CLIP checkpoints load straight into it, whole or vision tower with projection; that is the training-free
    baseline. `method` picks the last block: `SparVisionModel.from_pretrained(folder, method="naclip")`; so does any
    other field of `SparVisionConfig`.

    Any height and width of at least one patch, any batch size, fp32, bf16 and fp16.
    Source: SPAR (Kombol et al., CVPR 2026), section 3.
    """

    config: SparVisionConfig
    config_class = SparVisionConfig
    num_prefix_tokens = 1
    weights_needed = WEIGHTS_NEEDED
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

    @property
    def blocks(self) -> nn.ModuleList:
        return self.encoder.layers

    @property
    def recipe(self) -> Recipe:
        return Recipe(**self.config.recipe)

    def embed(self, pixels):
        tokens, grid_hw = self.embeddings(pixels)
        return self.pre_layrnorm(tokens), grid_hw

    def run_blocks(self, tokens, grid_hw, first_block=0, need_weights=False, stop=None):
        if stop is not None and stop < len(self.blocks):  # the recipe is the last block's
            return super().run_blocks(tokens, grid_hw, first_block, need_weights, stop)
        reach = self.reach(grid_hw, tokens.device)
        return run_recipe(self.blocks[first_block:], tokens, self.recipe, grid_hw, need_weights, reach)

    def run_block(self, layer, tokens, positions, need_weights, reach):
        return layer(tokens, inside=lambda layer, x, y: layer.update(x, y, need_weights, reach))

    def project(self, tokens):
        normed = self.post_layernorm(tokens)
        embeds = self.visual_projection(normed)  # (B, 1 + h * w, C) -> (B, 1 + h * w, D)
        return {
            "patch_embeds": embeds[:, 1:],
            "image_embeds": embeds[:, 0],
            "last_hidden_state": tokens,
            "pooler_output": normed[:, 0],
        }

    def trunk_end(self, num_blocks: int) -> int:
        first_block = super().trunk_end(num_blocks)
        if self.recipe.blocks > num_blocks or any(term.block != 12 for term in self.recipe.terms):
            raise ValueError(
                f"method {self.config.method!r} looks at blocks before the last {num_blocks}; cache without the trunk."
            )
        return first_block


class SparModel(DenseModel, CLIPModel):
    """CLIP with a `SparVisionModel` for its vision tower: `vision_model`, `text_model`, `text_projection`.

    Plain CLIP checkpoints load straight into it; what it saves has their layout. Fields of `SparVisionConfig` can be
    given to `from_pretrained`.
    """

    config: SparConfig
    config_class = SparConfig
    weights_needed = WEIGHTS_NEEDED
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


# transformers renames the keys of a checkpoint by the name of the class that loads it; a new class has to say the same
# or its weights stay random. Saving applies the reverse, so files keep CLIP's layout.
register_checkpoint_conversion_mapping(
    "SparVisionModel", [PrefixChange(prefix_to_remove="vision_model")], overwrite=True
)
register_checkpoint_conversion_mapping(
    "SparModel", [WeightRenaming(r"^visual_projection", "vision_model.visual_projection")], overwrite=True
)
