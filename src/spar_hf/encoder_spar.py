"""What the families share: outputs, size rule -> tokens -> blocks -> text space, text features, whole loading."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput
from transformers.utils.generic import can_return_tuple

from .arithmetic_spar import in_fast_arithmetic
from .configuration_spar import DenseConfig, DenseVisionConfig
from .dense_spar import attend, attention_map, merge_heads, project_heads
from .grid_spar import current_part, fit_to_patches
from .reach_spar import PartReach, WindowReach, asking


@dataclass
class SparVisionOutput(ModelOutput):
    """What a dense encoder returns. h, w: rows and columns of patches; D: width of the text space.

    Attributes:
        patch_embeds: (B, h, w, D), in the text space, not normalised.
        image_embeds: (B, D), the whole image in the text space, not normalised: CLIP's class token through its own
            last block, SigLIP's pooled vector, the mean of DINOv3's patches.
        last_hidden_state: (B, P + h * w, C) after the last block, P prefix tokens first; before the final norm for
            CLIP, after it for SigLIP and DINOv3, as the stock classes have it.
        pooler_output: (B, C), as the stock vision model gives it.
        hidden_states: the embeddings and each block's output, where asked for.
        attentions: (B, H, P + N, P + N) for each block, where asked for; in CLIP's last one the patches' rows are the
            map the recipe applied.
        image_hw: (H, W) of the pixels that came.
        extent_hw: (height, width) in those pixels that the patch grid covers; see `fit_to_patches`.
        normalized: True where `patch_embeds` are means of unit vectors, to be compared with words as they are.
    """

    patch_embeds: torch.Tensor | None = None
    image_embeds: torch.Tensor | None = None
    last_hidden_state: torch.Tensor | None = None
    pooler_output: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hw: tuple[int, int] | None = None
    extent_hw: tuple[int, int] | None = None
    normalized: bool | None = None


@dataclass
class SparOutput(SparVisionOutput):
    """`SparVisionOutput` and the text side.

    Attributes:
        text_embeds: (K, D), one per text, not normalised.
        logits_per_image: (B, K), scaled cosine of image and text, with the bias where the family has one.
    """

    text_embeds: torch.Tensor | None = None
    logits_per_image: torch.Tensor | None = None


class OffloadedModel(PreTrainedModel):
    """A model whose `device` is the one it runs on, also where accelerate keeps its weights elsewhere meanwhile."""

    @property
    def device(self) -> torch.device:
        device = next(parameter.device for parameter in self.parameters())
        if device.type == "meta":
            hooks = (getattr(module, "_hf_hook", None) for module in self.modules())
            running = (getattr(hook, "execution_device", None) for hook in hooks)
            device = next((torch.device(where) for where in running if where is not None), device)
        return device


# ------------------------------------------------------------------------------------------ vision towers


class DenseVisionModel(OffloadedModel):
    """Mixed into a family's vision tower: any size in, one vector of the text space per patch out.

    A family says how pixels become tokens (`embed`), how they pass a block (`run_block`) and how they enter the
    text space (`project`). Everything else (sizes, output, loading, training on stored tokens) is written here once.
    """

    config: DenseVisionConfig
    base_model_prefix = "vision_model"
    num_prefix_tokens: int  # tokens before the patches: class token, registers
    blocks: nn.ModuleList
    weights_needed: ClassVar[str]  # which checkpoints hold all of the tower's weights, for the error

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:  # transformers guesses it from the file's text
        return True

    def embed(self, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """(B, 3, H, W) -> tokens (B, P + h * w, C) that enter the first block, and (h, w)."""
        raise NotImplementedError

    def run_blocks(
        self,
        tokens: torch.Tensor,
        grid_hw: tuple[int, int],
        first_block: int = 0,
        need_weights: bool = False,
        stop: int | None = None,
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
        """Runs the blocks from `first_block` (0-based) on, up to the one before `stop`; None is to the end.

        Returns:
            The tokens (B, P + h * w, C) after the last block, the input of each block that ran, and the attention map
            of each (None unless asked for).
        """
        inputs, maps = [], []
        reach, positions = self.reach(grid_hw, tokens.device), self.rotary_positions(grid_hw, tokens.device)
        for layer in self.blocks[first_block:stop]:
            inputs.append(tokens)
            tokens, weights = self.run_block(layer, tokens, positions, need_weights, reach)
            maps.append(weights)
        return tokens, inputs, maps

    def rotary_positions(self, grid_hw: tuple[int, int], device: torch.device) -> Any:
        """What turns queries and keys in every block, where a family has that."""
        return None

    def run_block(
        self, layer: nn.Module, tokens: torch.Tensor, positions: Any, need_weights: bool, reach: WindowReach | None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One block's output and its attention map or None."""
        return layer(tokens, need_weights, reach)

    def reach(self, grid_hw: tuple[int, int], device: torch.device) -> WindowReach | None:
        """How far attention reaches on a grid of patches, by `attention_reach`; None is everywhere."""
        config = self.config
        window = config.image_size // config.patch_size
        if config.attention_reach == "image":
            return None
        part = current_part()
        if part is not None:
            return PartReach(grid_hw, window, device, part)
        if not torch.compiler.is_exporting() and max(grid_hw) <= window:  # an exported graph has one path
            return None
        return WindowReach(grid_hw, window, device)

    def project(self, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        """Tokens after the last block -> `patch_embeds` (B, h * w, D) and the other fields of the output."""
        raise NotImplementedError

    @can_return_tuple
    @in_fast_arithmetic
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        interpolate_pos_encoding: bool = True,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        original_sizes: torch.Tensor | None = None,
    ) -> SparVisionOutput:
        """Dense features of a batch of images.

        Args:
            pixel_values: (B, 3, H, W), normalised with the configuration's mean and std.
            interpolate_pos_encoding: for callers of the stock model; this model interpolates always.
            output_hidden_states: also return the embeddings and each block's output.
            output_attentions: also return each block's attention map; it takes N x N memory.
            original_sizes: what the image processor returns beside the pixels; post-processing needs it, this doesn't.

        Returns:
            `SparVisionOutput`.

        Raises:
            ValueError: pixels that are no normalised (B, 3, H, W) tensor, an image smaller than a patch under `floor`,
                or a model without weights (device "meta").
        """
        config = self.config
        check_pixels(pixel_values, config.num_channels)
        check_values(pixel_values, config)
        if self.device.type == "meta" and pixel_values.device.type != "meta":
            raise ValueError(
                "the model is on the meta device, where weights have no values; load it with from_pretrained on a "
                "device such as 'cpu' or 'cuda'."
            )
        need_weights = config.output_attentions if output_attentions is None else output_attentions
        need_states = config.output_hidden_states if output_hidden_states is None else output_hidden_states

        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        pixels, extent_hw = fit_to_patches(pixel_values, config.patch_size, config.size_rule)
        tokens, grid_hw = self.embed(pixels)
        tokens, inputs, maps = self.run_blocks(tokens, grid_hw, need_weights=need_weights)
        fields = self.project(tokens)
        patch_embeds = fields.pop("patch_embeds").unflatten(1, grid_hw)  # (B, h * w, D) -> (B, h, w, D)
        return SparVisionOutput(
            patch_embeds=patch_embeds,
            **fields,
            hidden_states=(*inputs, tokens) if need_states else None,
            attentions=tuple(maps) if need_weights else None,
            image_hw=image_hw,
            extent_hw=extent_hw,
        )

    @in_fast_arithmetic
    def patches_from(self, tokens: torch.Tensor, grid_hw: tuple[int, int], first_block: int) -> torch.Tensor:
        """Patch features (B, h, w, D) of the tokens (B, P + h * w, C) that enter `first_block`."""
        tokens, _, _ = self.run_blocks(tokens, grid_hw, first_block)
        return self.project(tokens)["patch_embeds"].unflatten(1, grid_hw)

    def trunk_end(self, num_blocks: int) -> int:
        """0-based index of the first of the last `num_blocks` blocks, if the tower can be run from there alone.

        Raises:
            ValueError: it cannot: there is no such block, or a later one looks at blocks before it.
        """
        total = len(self.blocks)
        if not 1 <= num_blocks <= total:
            raise ValueError(f"the trunk ends {num_blocks} blocks before the end; this network has {total} blocks.")
        return total - num_blocks

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        return load_whole(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)


def position_table(embedding: nn.Module, length: int, device: torch.device) -> torch.Tensor:
    """All rows of an embedding, (length, C): asked of the module, not read, so that adapters and offloading work."""
    return embedding(torch.arange(length, device=device))


def embed_patches(convolution: nn.Conv2d, pixels: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
    """(B, 3, H, W) -> (B, h * w, C) and (h, w)."""
    patches = convolution(pixels.to(convolution.weight.dtype))
    return patches.flatten(2).transpose(1, 2), (patches.shape[2], patches.shape[3])


def self_attention(
    attention: nn.Module,
    output: nn.Module,
    hidden_states: torch.Tensor,
    need_weights: bool = False,
    reach: WindowReach | None = None,
    turn: Callable[[torch.Tensor], torch.Tensor] = lambda heads: heads,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A block's attention among the tokens (B, P + N, C), by the block's own projections.

    Args:
        turn: what is done to queries and keys (B, heads, P + N, d) before they meet.

    Returns:
        (B, P + N, C), and the map (B, heads, P + N, P + N) if it is asked for.
    """
    heads = project_heads(attention, hidden_states, "qkv")
    query, key, value = turn(heads["q"]), turn(heads["k"]), heads["v"]
    if not need_weights:
        return output(merge_heads(attend(query, key, value, reach=reach))), None
    weights = attention_map(query, key, reach=reach)
    return output(merge_heads(weights @ value)), weights


class DenseAttention(nn.Module):
    """Mixed into CLIP's and SigLIP's attention: differs in its arithmetic on the CPU, and shows its map."""

    out_proj: nn.Linear

    def forward(
        self,
        hidden_states,
        attention_mask=None,
        need_weights: bool = False,
        reach: WindowReach | None = None,
        **kwargs,
    ):
        if self.config._attn_implementation != "sdpa" and not need_weights and reach is None:
            return super().forward(hidden_states, attention_mask, **kwargs)
        return self_attention(self, self.out_proj, hidden_states, need_weights, reach)


class DenseEncoderLayer(nn.Module):
    """Mixed into the pre-norm block of CLIP and SigLIP: open to a visitor.

    `inside(layer, x, y, *others)` is called with the block's input x and its normalised input y, both (B, P + N, C),
    and what it returns is returned. Whoever needs a block's own weights works through it, so that sharded weights
    (FSDP) are gathered and gradient checkpointing sees the whole computation. The tensors that it needs from other
    blocks go in as `others` and a flat tuple comes out, since reentrant checkpointing follows no other gradients.
    """

    layer_norm1: nn.LayerNorm
    self_attn: Any
    layer_norm2: nn.LayerNorm
    mlp: Any

    def forward(
        self,
        hidden_states,
        *others,
        inside: Callable | None = None,
        reach: WindowReach | None = None,
        **kwargs,
    ):
        normed = self.layer_norm1(hidden_states)
        if inside is not None:
            return inside(self, hidden_states, normed, *others)
        return self.update(hidden_states, normed, reach=reach)[0]

    def update(self, x: torch.Tensor, y: torch.Tensor, need_weights: bool = False, reach: WindowReach | None = None):
        """The block as it is, given its input x and y = ln_1(x); returns its output and its map or None."""
        attended, weights = self.self_attn(y, need_weights=need_weights, reach=reach)
        return self.feed_forward(asking(x, reach) + attended), weights

    def feed_forward(self, x: torch.Tensor) -> torch.Tensor:
        """x + mlp(ln_2(x))."""
        return x + self.mlp(self.layer_norm2(x))


class EncoderWrapper:
    """What is around a dense encoder is as large, as precise and where that one is."""

    encoder: Any

    @property
    def config(self) -> Any:
        return self.encoder.config

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.dtype

    @property
    def device(self) -> torch.device:
        return self.encoder.device


# ------------------------------------------------------------------------------------------- whole models


class DenseModel(OffloadedModel):
    """Mixed into a family's whole model: `vision_model`, a text side with `get_text_features`, `logit_scale`."""

    config: DenseConfig
    main_input_name = "pixel_values"
    weights_needed: ClassVar[str]
    vision_model: DenseVisionModel
    logit_scale: nn.Parameter

    def score(self, cosine: torch.Tensor) -> torch.Tensor:
        """Cosine of image and text -> the family's logit."""
        return self.logit_scale.exp() * cosine

    @in_fast_arithmetic
    def get_text_features(self, *args, **kwargs):
        """The stock model's."""
        return super().get_text_features(*args, **kwargs)  # type: ignore[misc]

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs) -> BaseModelOutputWithPooling:
        """One vector per image: `pooler_output` (B, D), as the stock model's `get_image_features` gives it."""
        outputs = self.vision_model(pixel_values, **kwargs)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=outputs.image_embeds,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @can_return_tuple
    @in_fast_arithmetic
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **vision_kwargs: Any,
    ) -> SparOutput:
        """Patch features, and text features where there is text; see `DenseVisionModel.forward` for the pixels.

        Args:
            pixel_values: (B, 3, H, W).
            input_ids, attention_mask, position_ids: (K, length), one row a text.
            **vision_kwargs: the vision tower's other arguments.
        """
        vision = self.vision_model(pixel_values, **vision_kwargs)
        text_embeds = logits = None
        if input_ids is not None:
            text = self.get_text_features(
                input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids
            )
            text_embeds = text.pooler_output
            image, words = (nn.functional.normalize(e, dim=-1) for e in (vision.image_embeds, text_embeds))
            logits = self.score(image @ words.T)
        return SparOutput(**vision, text_embeds=text_embeds, logits_per_image=logits)

    @classmethod
    def from_stock(cls, model: PreTrainedModel) -> Any:
        """A stock model of the family as `from_pretrained` loads it from a folder, in its type and on its device."""
        config = cls.config_class.from_dict(cls.config_class.from_stock(model.config.to_dict()))
        ours = cls.from_pretrained(None, config=config, state_dict=model.state_dict(), dtype=model.dtype)
        ours.name_or_path = model.name_or_path
        return ours.to(model.device).train(model.training)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        return load_whole(cls, super().from_pretrained, pretrained_model_name_or_path, *args, **kwargs)


class ClipTextSide(DenseModel):
    """Mixed into a whole model whose text side is CLIP's: `text_model`, `text_projection`, `logit_scale`."""

    supports_gradient_checkpointing = True
    _supports_sdpa = True
    text_model: nn.Module
    text_projection: nn.Linear

    def add_text_side(self, text_model: nn.Module, projection_dim: int) -> None:
        """Gives the model its text side, the projection without a bias."""
        self.text_model = text_model
        self.text_projection = nn.Linear(text_model.config.hidden_size, projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(self.config.logit_scale_init_value))

    @torch.no_grad()
    def _init_weights(self, module):
        if isinstance(module, ClipTextSide):
            init.constant_(module.logit_scale, self.config.logit_scale_init_value)
            if hasattr(module, "text_projection"):
                init.normal_(module.text_projection.weight, std=module.text_projection.in_features**-0.5)

    def project_text(self, pooled: torch.Tensor) -> torch.Tensor:
        """(K, C) of the text tower -> (K, D) in the space of `patch_embeds`."""
        return self.text_projection(pooled)

    @can_return_tuple
    @in_fast_arithmetic
    def get_text_features(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPooling:
        """(K, length) -> `pooler_output` (K, D), in the space of `patch_embeds`."""
        text = self.text_model(input_ids, attention_mask, position_ids, **kwargs)
        text.pooler_output = self.project_text(text.pooler_output)
        return text


def check_pixels(pixel_values: torch.Tensor | None, num_channels: int) -> None:
    """Raises a `ValueError` that says what came and what to do, unless the pixels are floats (B, channels, H, W)."""
    if not isinstance(pixel_values, torch.Tensor) or pixel_values.ndim != 4 or pixel_values.shape[1] != num_channels:
        came = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
        raise ValueError(
            f"pixel_values is {came}; it must be a (batch, {num_channels}, height, width) tensor. "
            "Use SparImageProcessor; images of different sizes go in one by one."
        )
    if not pixel_values.is_floating_point():
        raise ValueError(
            f"pixel_values is of type {pixel_values.dtype}; it must hold floats, normalised with the model's mean and "
            "std. Use SparImageProcessor."
        )
    if pixel_values.shape[0] == 0:
        raise ValueError(f"pixel_values is {tuple(pixel_values.shape)}: there is no image in the batch; give one.")


def check_values(pixel_values: torch.Tensor, config: DenseVisionConfig) -> None:
    """Raises a `ValueError` for pixels that can't be normalised ones: NaN, infinity, or as large as 0 to 255 are."""
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or pixel_values.is_meta:
        return  # there are no values to look at
    if pixel_values.is_cuda and torch.cuda.is_current_stream_capturing():
        return
    # Normalised, a picture lies within `largest` of zero; of 0 to 255 it reaches many times as far, upwards only.
    largest = max(max(mean, 1 - mean) / std for mean, std in zip(config.image_mean, config.image_std, strict=True))
    low, high = torch.stack(pixel_values.detach().aminmax()).tolist()
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ValueError("pixel_values hold NaN or infinity; every pixel must be a number.")
    if high > 8 * largest and low > -8 * largest:
        raise ValueError(
            f"pixel_values reach from {low:.3g} to {high:.3g}; normalised with the model's mean and std they lie in "
            f"±{largest:.3g}. Use SparImageProcessor, which takes pixels of 0 to 255."
        )


def load_whole(cls: Any, load: Callable, name, *args, output_loading_info: bool = False, **kwargs):
    """`from_pretrained` that refuses to leave weights random: transformers would only print a report."""
    model, info = load(name, *args, output_loading_info=True, **kwargs)
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ValueError(
            f"{name} lacks {len(missing)} of the weights of {cls.__name__}: {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}. Give {cls.weights_needed}."
        )
    return (model, info) if output_loading_info else model
