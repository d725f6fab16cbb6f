"""What the methods that need a file have in common: CLIP run up to its last block, the output, products by rows."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from ..arithmetic_spar import in_fast_arithmetic
from ..clip_spar import run_recipe
from ..dense_spar import class_token_attention, merge_heads, project_heads
from ..encoder_spar import DenseVisionModel, SparVisionOutput, check_pixels
from ..grid_spar import fit_to_patches
from ..methods_spar import find_recipe

# Numbers of a similarity matrix that are held at once, 16 MB in fp32; a window's whole matrix is far smaller.
ROW_NUMBERS = 2**22


class MethodEncoder(nn.Module):
    """A dense encoder around a vision tower, mostly CLIP's; its `forward` is the method.

    It computes no gradients: a method is a teacher or a baseline. The tower's weights are shared, never changed. The
    class in a method's file says in `adapters` what its further networks are and has each by its name.

    Args:
        vision: the tower. Of its configuration only the position and size rules matter, not the recipe.
        networks: the further networks by name, each an adapter, a module, or the id or folder to load it from.
        settings: the method's constants, a frozen dataclass; they show in `repr`. None is the file's `Settings()`.
        method: the row's name, for `config`; that of the file where it is left out.

    Raises:
        ValueError: the tower has a single block, a network is missing or of another kind, or does not fit.
    """

    def __init__(
        self,
        vision: DenseVisionModel,
        networks: Mapping[str, Any] | None = None,
        settings: Any = None,
        method: str = "",
    ) -> None:
        super().__init__()
        self.settings, method = settings_and_name(self, settings, method)
        if len(vision.blocks) < 2:
            raise ValueError(f"the network has 1 block; method {method!r} needs at least 2. Take a row of the table.")
        self.vision: Any = vision
        self.config: Any = copy.deepcopy(vision.config)
        self.config.method = method
        for name, network in opened(self.adapters(), networks, self.vision, method).items():
            setattr(self, name, network)
        self.prepare()

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        """What makes an adapter of each further network that is given, by name."""
        return {}

    def prepare(self) -> None:
        """What is to be checked and set once the networks are there."""

    def whole_window(self, stride_px: int = 0) -> tuple[int, int]:
        """Side and step in pixels of the method's window; the step is the configuration's where none is given.

        Raises:
            ValueError: they are no whole patches.
        """
        config = self.config
        window_px, stride_px = config.window_px or config.image_size, stride_px or config.stride_px
        for name, length in (("window_px", window_px), ("stride_px", stride_px)):
            if length % config.patch_size or not 0 < length <= window_px:
                raise ValueError(
                    f"{name} of method {config.method!r} is {length}; it must be a multiple of the patch "
                    f"({config.patch_size} px), up to the window's {window_px} px."
                )
        return window_px, stride_px

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in asdict(self.settings).items())

    __call__ = in_fast_arithmetic(nn.Module.__call__)

    @property
    def dtype(self) -> torch.dtype:
        return self.vision.dtype

    @property
    def device(self) -> torch.device:
        return self.vision.device

    @property
    def last_layer(self) -> Any:
        return self.vision.blocks[-1]

    def embed(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
        """(B, 3, H, W) -> the first block's input (B, 1 + N, C), rows and columns of patches, and the height and width
        in pixels that they cover."""
        vision = self.vision
        check_pixels(pixel_values, vision.config.num_channels)
        pixels, extent_hw = fit_to_patches(pixel_values, vision.config.patch_size, vision.config.size_rule)
        return *vision.embed(pixels), extent_hw

    def run_to_last(self, x: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """The first block's input -> the last block's, (B, 1 + N, C)."""
        reach = self.vision.reach(grid_hw, x.device)
        for layer in self.vision.blocks[:-1]:
            x = layer(x, reach=reach)
        return x

    def maskclip(self, x: torch.Tensor) -> torch.Tensor:
        """The last block's input (B, 1 + N, C) -> MaskCLIP's patches in the text space (B, N, D)."""
        layer = self.last_layer
        values = merge_heads(project_heads(layer.self_attn, layer.layer_norm1(x), "v")["v"])
        return self.vision.project(layer.feed_forward(x + layer.self_attn.out_proj(values)))["patch_embeds"]

    def by_recipe(self, name: str, x: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """The last block's input (B, 1 + N, C) -> patches in the text space (B, N, D), by a recipe of that block."""
        reach = self.vision.reach(grid_hw, x.device)
        tokens, _, _ = run_recipe(self.vision.blocks[-1:], x, find_recipe(name).recipe, grid_hw, reach=reach)
        return self.vision.project(tokens)["patch_embeds"]

    def output(
        self,
        patches: torch.Tensor,
        last_input: torch.Tensor,
        grid_hw: tuple[int, int],
        extent_hw: tuple[int, int],
        pixel_values: torch.Tensor,
    ) -> SparVisionOutput:
        """Final norm and projection.

        Args:
            patches: (B, h * w, C), the method's.
            last_input: (B, 1 + N, C), what enters the last block; the class token goes through it as in CLIP.
            grid_hw: rows and columns of the patches.
            extent_hw: height and width in pixels that they cover.
            pixel_values: (B, 3, H, W) as they came.
        """
        fields = self.vision.project(torch.cat([self.class_token(last_input), patches], dim=1))
        return SparVisionOutput(
            patch_embeds=fields.pop("patch_embeds").unflatten(1, grid_hw),  # (B, h * w, D) -> (B, h, w, D)
            **fields,
            image_hw=(pixel_values.shape[2], pixel_values.shape[3]),
            extent_hw=extent_hw,
        )

    def image_embeds(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """CLIP's own image embeddings (B, D), at length one, fp32."""
        tokens, grid_hw, _ = self.embed(pixel_values.to(self.dtype))
        token = self.class_token(self.run_to_last(tokens, grid_hw))
        return nn.functional.normalize(self.vision.project(token)["image_embeds"].float(), dim=-1)

    def class_token(self, x: torch.Tensor) -> torch.Tensor:
        """CLIP's own class token (B, 1, C) after the last block, given that block's input."""
        layer = self.last_layer
        y = layer.layer_norm1(x)
        values = project_heads(layer.self_attn, y, "v")["v"]
        attended, _ = class_token_attention(layer.self_attn, y, values)
        return layer.feed_forward(x[:, :1] + layer.self_attn.out_proj(merge_heads(attended)))


def settings_and_name(part: Any, settings: Any, method: str) -> tuple[Any, str]:
    """A method's constants and name as given, or else those of the file that the class of `part` is in."""
    file: Any = sys.modules[type(part).__module__]
    return file.Settings() if settings is None else settings, method or file.__name__.rpartition(".")[2]


def opened(
    adapters: Mapping[str, Callable[[Any], Any]], networks: Mapping[str, Any] | None, vision: Any, method: str
) -> dict[str, Any]:
    """A method's further networks by name, each through its adapter, where the tower is and as precise.

    Raises:
        ValueError: one is missing or of another kind.
    """
    found = {name: adapter(needed(networks or {}, name, method)) for name, adapter in adapters.items()}
    for network in found.values():
        if isinstance(network, nn.Module):  # a source of regions need not be one
            network.to(vision.device, vision.dtype)
    return found


def needed(networks: Mapping[str, Any], name: str, method: str) -> Any:
    """A method's further network by name.

    Raises:
        ValueError: it is not there.
    """
    if name not in networks:
        given = ", ".join(networks) or "none"
        place = "FILE, which spar prototypes makes" if name == "bank" else "ID"
        raise ValueError(f"method {method!r} needs a network {name!r} and got {given}; give --network {name}={place}.")
    return networks[name]


def mean_similarity(unit: torch.Tensor) -> torch.Tensor:
    """Mean cosine of all pairs of an image's vectors, (B, N, F) of length one -> (B, 1, 1), without the pairs."""
    return unit.mean(dim=1).square().sum(dim=-1).view(-1, 1, 1)


def attend_by_similarity(
    unit: torch.Tensor, values: torch.Tensor, weigh: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """weigh(unit unitᵀ) values, some rows at a time: no N x N matrix is held.

    Args:
        unit: (B, N, F), vectors of length one, fp32.
        values: (B, N, C).
        weigh: turns rows of cosines (B, n, N) into weights; it may write into them.

    Returns:
        (B, N, C) in the type of the values.
    """
    out = torch.empty_like(values)
    batch, count, _ = unit.shape
    step = max(ROW_NUMBERS // (batch * count), 1)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        weights = weigh(unit[:, rows] @ unit.transpose(1, 2))
        out[:, rows] = weights.to(values.dtype) @ values
    return out


def above_mean(mean: torch.Tensor, factor: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """softmax(factor (S - mean)) over the keys whose similarity is at least the mean; the others get no weight.

    Where no key is (the patches are nearly all alike), the most similar one takes all: the patch itself.
    """

    def weigh(cosines: torch.Tensor) -> torch.Tensor:
        scores = cosines.sub_(mean).mul_(factor)
        lowest = scores.amax(dim=-1, keepdim=True).clamp_(max=0)
        return scores.masked_fill_(scores < lowest, -torch.inf).softmax(dim=-1)

    return weigh
