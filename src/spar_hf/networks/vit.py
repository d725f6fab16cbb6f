"""ViT: a vision transformer of transformers as a second network, whatever method asks.

Any of `AutoModel` (DINO, DINOv2 with or without registers, DINOv3, the vision tower of a CLIP or SigLIP) and any
`AutoBackbone` with one grid of square patches. It sees the pixels with its own mean and standard deviation, as its
preprocessor_config.json gives them, or else ImageNet's. A `ViTModel`'s position table, DINO's, is resized with DINO's
own scale, (rows + 0.1) / n, where transformers' `size` rule moves features by 0.3 and more; another network's by its
transformers class.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import ViTModel

from ..arithmetic_spar import with_fast_products
from ..grid_spar import fit_to_patches, resize_positions
from .loading import SecondNetwork

# What transformers' classes call an attention's three projections.
PROJECTIONS = ({"q": "q_proj", "k": "k_proj", "v": "v_proj"}, {"q": "query", "k": "key", "v": "value"})


@dataclass(frozen=True)
class Patches:
    """What a network says of the patches of a batch of images.

    Attributes:
        features: (B, F, h, w), after the final norm.
        heads: projections of the last block by name, "q", "k" or "v", each (B, C, h, w) with the heads side by side.
        extent_hw: height and width in pixels, of the image given, that the patches cover.
    """

    features: Tensor
    extent_hw: tuple[int, int]
    heads: dict[str, Tensor] = field(default_factory=dict)

    @property
    def grid_hw(self) -> tuple[int, int]:
        return self.features.shape[2], self.features.shape[3]


class ViT(SecondNetwork):
    """A vision transformer as a second network; see `SecondNetwork`.

    Raises:
        ValueError: it is no network with square patches.
    """

    def __init__(self, network: str | nn.Module, *normalisation: Sequence[float] | None) -> None:
        by_name = isinstance(network, str)
        super().__init__(network, *normalisation)
        self.network = getattr(self.network, "vision_model", self.network)  # of a whole CLIP
        if by_name and isinstance(self.network, ViTModel):
            # DINO's checkpoints lack it, so that it would be random, and no two loads would have one digest.
            self.network.pooler = None
        patch_px = getattr(getattr(self.network, "config", None), "patch_size", None)
        sides_px = {patch_px} if isinstance(patch_px, int) else set(patch_px or ())
        if len(sides_px) != 1:
            raise ValueError(
                f"the second network is a {type(self.network).__name__} with patch_size {patch_px}; give a ViT with "
                "square patches, such as facebook/dino-vitb8."
            )
        self.patch_px: int = sides_px.pop()

    @property
    def num_heads(self) -> int:
        return self.network.config.num_attention_heads

    def grid_hw(self, height_px: int, width_px: int, size_rule: str = "floor") -> tuple[int, int]:
        """Rows and columns of patches of an image of this size."""
        image = torch.empty(1, 1, height_px, width_px, device="meta")
        pixels, _ = fit_to_patches(image, self.patch_px, size_rule)
        return pixels.shape[2] // self.patch_px, pixels.shape[3] // self.patch_px

    @torch.no_grad()
    @with_fast_products
    def forward(self, pixel_values: Tensor, config: Any, heads: str = "") -> Patches:
        """Patches of images of any size.

        Args:
            pixel_values: (B, 3, H, W), normalised by `config`.
            config: image_mean and image_std of the pixels, and size_rule for sides that are no multiple of a patch.
            heads: the last block's projections to keep, of "qkv"; as they are projected, before any rotary position.

        Raises:
            ValueError: the network has no such projections, or not one token for each patch.
        """
        pixels = self.renormalised(pixel_values, config)
        pixels, extent_hw = fit_to_patches(pixels, self.patch_px, config.size_rule)
        grid_hw = (pixels.shape[2] // self.patch_px, pixels.shape[3] // self.patch_px)
        pixels = pixels[:, :, : grid_hw[0] * self.patch_px, : grid_hw[1] * self.patch_px]
        pixels = pixels.to(self.dtype)
        # ViT refuses other sizes unless told; the others have no such argument.
        takes = "interpolate_pos_encoding" in inspect.signature(self.network.forward).parameters
        with dino_positions(self.network, grid_hw), self.taps(heads) as kept:
            output = self.network(pixels, **({"interpolate_pos_encoding": True} if takes else {}))
        if output.get("feature_maps") is not None:
            features = output.feature_maps[-1]
            if tuple(features.shape[2:]) != grid_hw:
                raise ValueError(self._unlike(f"a map of {tuple(features.shape[2:])}", grid_hw))
        else:
            features = self._patches(output.last_hidden_state, grid_hw)
        return Patches(features, extent_hw, {name: self._patches(tokens, grid_hw) for name, tokens in kept.items()})

    def _patches(self, tokens: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """(B, P + h * w, C) -> (B, C, h, w): the class token and registers come first."""
        count = grid_hw[0] * grid_hw[1]
        if tokens.ndim != 3 or tokens.shape[1] < count:
            raise ValueError(self._unlike(f"tokens of shape {tuple(tokens.shape)}", grid_hw))
        return tokens[:, tokens.shape[1] - count :].transpose(1, 2).unflatten(2, grid_hw)

    def _unlike(self, came: str, grid_hw: tuple[int, int]) -> str:
        return (
            f"the second network, a {type(self.network).__name__}, gives {came} for {grid_hw[0]} x {grid_hw[1]} "
            "patches; give a ViT with one token for each patch, such as facebook/dino-vitb8."
        )

    @contextmanager
    def taps(self, heads: str) -> Iterator[dict[str, Tensor]]:
        """While it holds, the last block's projections are kept in the dictionary it gives."""
        kept: dict[str, Tensor] = {}
        if not heads:
            yield kept
            return
        projections = self.last_projections()
        hooks = [
            projections[name].register_forward_hook(lambda module, args, out, name=name: kept.update({name: out}))
            for name in sorted(set(heads))
        ]
        try:
            yield kept
        finally:
            for hook in hooks:
                hook.remove()

    def last_projections(self) -> dict[str, nn.Module]:
        """The modules that make queries, keys and values in the last block."""
        for module in reversed(list(self.network.modules())):
            for names in PROJECTIONS:
                if all(isinstance(getattr(module, child, None), nn.Module) for child in names.values()):
                    return {name: getattr(module, child) for name, child in names.items()}
        raise ValueError(
            f"the second network is a {type(self.network).__name__}, without an attention that projects queries, keys "
            "and values apart; give a ViT such as facebook/dino-vitb16."
        )


def dino_positions(network: nn.Module, grid_hw: tuple[int, int]) -> AbstractContextManager:
    """While it holds, a `ViTModel` adds the positions of DINO's own code; any other network is left alone."""
    if not isinstance(network, ViTModel):
        return nullcontext()
    table = network.embeddings.position_embeddings[0, 1:]
    change = resize_positions(table, grid_hw, "offset") - resize_positions(table, grid_hw, "size")
    change = nn.functional.pad(change, (0, 0, 1, 0))  # the class token's stays
    return network.embeddings.register_forward_hook(lambda module, args, tokens: tokens + change)
