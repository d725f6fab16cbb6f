"""ClipInternals: what a refinement may ask CLIP itself about one image, whatever encoder made the patch features.

One plain pass of the network over the whole image, made when the first one asks and kept for the others. Blocks are
counted from 1 in a network of twelve, as in `methods_spar.Term`; in one of L blocks, block b is number ceil(b L / 12).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arithmetic_spar import with_fast_products
from ..clip_spar import SparVisionModel
from ..dense_spar import attend, merge_heads, project_heads
from ..grid_spar import coverage, fit_to_patches, whole_patches
from ..methods_spar import block_index


def check_network(network: Any, option: str) -> None:
    """Raises a `ValueError` unless the network is a vision tower of the CLIP family."""
    if not isinstance(network, SparVisionModel):
        raise ValueError(
            f"refinement {option!r} looks into the blocks and the class token of a CLIP vision tower, and the "
            f"model's is a {type(network).__name__}. Leave it out, or take a CLIP checkpoint."
        )


def covered_pixels(pixel_values: Tensor, config: Any) -> Tensor:
    """The pixels that the patch grid covers, whole patches only: (B, 3, H, W) -> (B, 3, h * p, w * p)."""
    patch_px = config.patch_size
    pixels, _ = fit_to_patches(pixel_values, patch_px, config.size_rule)
    return whole_patches(pixels, patch_px)


class ClipInternals:
    """One image, and CLIP's own view of it.

    Args:
        model: A `SparModel`; what looks inside needs one of the CLIP family.
        pixel_values: (1, 3, H, W), normalised.
    """

    def __init__(self, model: Any, pixel_values: Tensor) -> None:
        self.model = model
        self.pixel_values = pixel_values

    def crop(self, top: int, left: int, height: int, width: int) -> ClipInternals:
        """A part of the image as an image of its own; pixels."""
        return ClipInternals(self.model, self.pixel_values[..., top : top + height, left : left + width])

    @property
    def network(self) -> Any:
        return self.model.vision_model

    @property
    def dtype(self) -> torch.dtype:
        return self.network.dtype

    @property
    def device(self) -> torch.device:
        return self.network.device

    @cached_property
    def logit_scale(self) -> float:
        """The model's own factor on the cosine, for the refinements that the authors ran with it."""
        return self.model.logit_scale.exp().item()

    @cached_property
    def _outputs(self) -> Any:
        with torch.no_grad():
            return self.network(self.pixel_values.to(self.device, self.dtype), output_hidden_states=True)

    @property
    def num_blocks(self) -> int:
        return len(self.network.encoder.layers)

    @property
    def grid_hw(self) -> tuple[int, int]:
        return tuple(self._outputs.patch_embeds.shape[1:3])

    @property
    def coverage_hw(self) -> tuple[float, float]:
        """Image size over the pixels that the grid covers, per axis; see `coverage`."""
        return coverage(self._outputs.image_hw, self._outputs.extent_hw)

    @property
    def class_embed(self) -> Tensor:
        """The image in the text space (D), L2-normalised."""
        return F.normalize(self._outputs.image_embeds[0].float(), dim=-1)

    @torch.no_grad()
    @with_fast_products
    def heads(self, block: int, names: str) -> dict[str, Tensor]:
        """The projections that `names` spells of a block, each (1, H, 1 + N, d), class token first."""
        index = block_index(block, self.num_blocks)
        layer = self.network.encoder.layers[index]
        return project_heads(layer.self_attn, layer.layer_norm1(self._outputs.hidden_states[index]), names)

    @torch.no_grad()
    @with_fast_products
    def keys(self) -> Tensor:
        """The last block's keys of the patches, heads side by side, through its output projection: (N, C)."""
        keys = merge_heads(self.heads(12, "k")["k"])
        return self.network.encoder.layers[-1].self_attn.out_proj(keys)[0, 1:].float()

    def self_correlation(self, block: int) -> Tensor:
        """Mean over q, k, v and heads of the cosine between tokens: (1 + N, 1 + N)."""
        heads = self.heads(block, "qkv").values()
        # Unit vectors side by side: their products add up to the sum of the cosines, without a map for each head.
        units = torch.cat([merge_heads(F.normalize(head.float(), dim=-1)) for head in heads], dim=-1)[0]
        return units @ units.T / (3 * self.network.config.num_attention_heads)

    @torch.no_grad()
    @with_fast_products
    def attention(self, index: int) -> Tensor:
        """The mean over heads of a block's own attention between patches, (N, N); `index` counts from 0."""
        layer = self.network.encoder.layers[index]
        heads = project_heads(layer.self_attn, layer.layer_norm1(self._outputs.hidden_states[index]), "qk")
        reach = self.network.reach(self.grid_hw, self.network.device)
        bias = 0.0 if reach is None else reach.bias(*(heads["q"].shape[2],) * 2)
        total = torch.zeros(())
        for query, key in zip(heads["q"][0].float(), heads["k"][0].float(), strict=True):  # one head's map at a time
            scores = (query @ key.T * query.shape[-1] ** -0.5 + bias).softmax(dim=-1)
            total = scores if total.ndim == 0 else total.add_(scores)
        return total[1:, 1:] / len(heads["q"][0])

    @torch.no_grad()
    @with_fast_products
    def class_embed_of(self, crop: Tensor, patch_mask: Tensor) -> Tensor:
        """The image embedding of a crop (D), L2-normalised, whose class token looks at the masked patches only.

        Args:
            crop: (1, 3, H, W), on any device.
            patch_mask: (N) bool. The class token's scores towards the others are lowered by 1000, in every block.
        """
        tokens, grid_hw = self.network.embeddings(crop.to(self.device, self.dtype))
        x = self.network.pre_layrnorm(tokens)
        reach = self.network.reach(grid_hw, x.device)
        bias = x.new_zeros(x.shape[1], x.shape[1])
        bias[0, 1:][~patch_mask] = -1000
        for layer in self.network.encoder.layers:
            heads = project_heads(layer.self_attn, layer.layer_norm1(x), "qkv")
            attended = merge_heads(attend(heads["q"], heads["k"], heads["v"], bias, reach))
            x = layer.feed_forward(x + layer.self_attn.out_proj(attended))
        embed = self.network.visual_projection(self.network.post_layernorm(x[:, 0]))
        return F.normalize(embed[0].float(), dim=-1)


@dataclass(frozen=True, eq=False)
class Scene:
    """What a refinement of scores may know beside the scores.

    Attributes:
        image: CLIP's own view of the image.
        text_embeds: the names in the text space (K, D), L2-normalised.
        class_ids: the class of each name (K), from 0 up; each name that only competes has one of its own, the last.
        background: the class that is the background, if there is one.
    """

    image: ClipInternals
    text_embeds: Tensor
    class_ids: Tensor
    background: int | None
