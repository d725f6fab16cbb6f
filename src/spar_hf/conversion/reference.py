"""The source's own forward pass, in plain functions on the source's own names: what a conversion is checked against.

Nothing here goes through our models, configurations or tables. Written from SPAR's description of its three wrappers
and the public code of open_clip, timm and dinov3.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


class Reference:
    """A source's weights and the few numbers that its forward pass needs beside them.

    Args:
        weights: as `Source.weights`.
        vision, text: the layout's configuration fields.
    """

    def __init__(self, weights: dict[str, Tensor], vision: dict[str, Any], text: dict[str, Any]):
        self.weights = {name: weight.float() for name, weight in weights.items()}
        self.vision, self.text = vision, text

    def trunk(self) -> str:
        """What stands before timm's names."""
        return "visual.trunk." if "visual.trunk.pos_embed" in self.weights else ""

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], eps)

    def patches(self, name: str, pixels: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """(B, h * w, C) and (h, w)."""
        weight = self.weights[f"{name}.weight"]
        x = F.conv2d(pixels, weight, self.weights.get(f"{name}.bias"), stride=weight.shape[-1])
        return x.flatten(2).transpose(1, 2), (x.shape[2], x.shape[3])

    def attend(self, qkv: Tensor, num_heads: int, causal: bool = False, turn: Callable | None = None) -> Tensor:
        """Fused queries, keys and values (B, N, 3 C) -> attended values (B, N, C)."""
        q, k, v = (part.unflatten(-1, (num_heads, -1)).transpose(1, 2) for part in qkv.chunk(3, dim=-1))
        if turn is not None:
            q, k = turn(q), turn(k)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        if causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
        return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)

    def resblock(
        self, name: str, x: Tensor, num_heads: int, act: Callable, eps: float, causal: bool = False
    ) -> Tensor:
        """A block of open_clip's transformer."""
        y = self.norm(f"{name}.ln_1", x, eps)
        qkv = F.linear(y, self.weights[f"{name}.attn.in_proj_weight"], self.weights[f"{name}.attn.in_proj_bias"])
        x = x + self.linear(f"{name}.attn.out_proj", self.attend(qkv, num_heads, causal))
        y = act(self.linear(f"{name}.mlp.c_fc", self.norm(f"{name}.ln_2", x, eps)))
        return x + self.linear(f"{name}.mlp.c_proj", y)

    def open_clip_text(self, ids: Tensor, eps: float, causal: bool) -> tuple[Tensor, str]:
        """Tokens (K, length, C) of open_clip's text transformer after its last norm, and the prefix of its names."""
        prefix = "text." if "text.token_embedding.weight" in self.weights else ""
        x = F.embedding(ids, self.weights[f"{prefix}token_embedding.weight"])
        x = x + self.weights[f"{prefix}positional_embedding"][: ids.shape[1]]
        act = ACTIVATIONS[self.text["hidden_act"]]
        for n in range(self.text["num_hidden_layers"]):
            name = f"{prefix}transformer.resblocks.{n}"
            x = self.resblock(name, x, self.text["num_attention_heads"], act, eps, causal)
        return self.norm(f"{prefix}ln_final", x, eps), prefix

    def image_features(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, h, w, D)."""
        raise NotImplementedError

    def text_features(self, ids: Tensor) -> Tensor:
        """(K, length), each row ended by its highest id -> (K, D)."""
        raise NotImplementedError


class ClipReference(Reference):
    """SPAR's OpenCLIP wrapper: old position rule, values alone in the last block, remainder dropped."""

    def image_features(self, pixels: Tensor) -> Tensor:
        if "visual.conv1.weight" not in self.weights:
            return self.timm_features(pixels)
        x, (rows, columns) = self.patches("visual.conv1", pixels)
        table = self.weights["visual.positional_embedding"]
        side = math.isqrt(len(table) - 1)
        positions = table[1:]
        if (rows, columns) != (side, side):
            grid = positions.T.view(1, -1, side, side)
            scale = ((rows + 0.1) / side, (columns + 0.1) / side)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
            positions = grid.flatten(2)[0].T
        class_token = (self.weights["visual.class_embedding"] + table[0]).expand(len(x), 1, -1)
        x = self.norm("visual.ln_pre", torch.cat([class_token, x + positions], dim=1), 1e-5)
        act, heads = ACTIVATIONS[self.vision["hidden_act"]], self.vision["num_attention_heads"]
        *earlier, last = (f"visual.transformer.resblocks.{n}" for n in range(self.vision["num_hidden_layers"]))
        for name in earlier:
            x = self.resblock(name, x, heads, act, 1e-5)
        weight, bias = self.weights[f"{last}.attn.in_proj_weight"], self.weights[f"{last}.attn.in_proj_bias"]
        values = F.linear(self.norm(f"{last}.ln_1", x, 1e-5), weight, bias).chunk(3, dim=-1)[2]
        x = x + self.linear(f"{last}.attn.out_proj", values)
        x = x + self.linear(
            f"{last}.mlp.c_proj", act(self.linear(f"{last}.mlp.c_fc", self.norm(f"{last}.ln_2", x, 1e-5)))
        )
        x = self.norm("visual.ln_post", x, 1e-5) @ self.weights["visual.proj"]
        return x[:, 1:].unflatten(1, (rows, columns))

    def timm_features(self, pixels: Tensor) -> Tensor:
        """The same of timm's ViT."""
        trunk, heads = self.trunk(), self.vision["num_attention_heads"]
        x, (rows, columns) = self.patches(f"{trunk}patch_embed.proj", pixels)
        table = self.weights[f"{trunk}pos_embed"]
        side = math.isqrt(table.shape[1] - 1)
        positions = table[:, 1:]
        if (rows, columns) != (side, side):
            grid = positions.transpose(1, 2).unflatten(2, (side, side))
            scale = ((rows + 0.1) / side, (columns + 0.1) / side)
            grid = F.interpolate(grid, scale_factor=scale, mode="bicubic", align_corners=False)
            positions = grid.flatten(2).transpose(1, 2)
        class_token = (self.weights[f"{trunk}cls_token"] + table[:, :1]).expand(len(x), -1, -1)
        x = self.norm(f"{trunk}norm_pre", torch.cat([class_token, x + positions], dim=1), 1e-5)
        act, layers = ACTIVATIONS[self.vision["hidden_act"]], self.vision["num_hidden_layers"]
        for n in range(layers):
            name = f"{trunk}blocks.{n}"
            qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x, 1e-5))
            attended = qkv.chunk(3, dim=-1)[2] if n == layers - 1 else self.attend(qkv, heads)
            x = x + self.linear(f"{name}.attn.proj", attended)
            y = act(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, 1e-5)))
            x = x + self.linear(f"{name}.mlp.fc2", y)
        return self.linear(f"{trunk}head", self.norm(f"{trunk}norm", x, 1e-5))[:, 1:].unflatten(1, (rows, columns))

    def text_features(self, ids: Tensor) -> Tensor:
        x, prefix = self.open_clip_text(ids, 1e-5, causal=True)
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.weights[f"{prefix}text_projection"]


class MetaclipReference(ClipReference):
    """MetaCLIP 2: the text's vector is at its first end token."""

    END_TOKEN = 2

    def text_features(self, ids: Tensor) -> Tensor:
        x, prefix = self.open_clip_text(ids, 1e-5, causal=True)
        ends = (ids == self.END_TOKEN).int().argmax(-1)
        return x[torch.arange(len(ids)), ends] @ self.weights[f"{prefix}text_projection"]


class SiglipReference(Reference):
    """SPAR's SigLIP2 wrapper: zero-padding, bicubic positions, the pooling head's values and MLP on each patch."""

    def image_features(self, pixels: Tensor) -> Tensor:
        trunk, patch_px = self.trunk(), self.vision["patch_size"]
        pixels = F.pad(pixels, (0, -pixels.shape[3] % patch_px, 0, -pixels.shape[2] % patch_px))
        x, grid_hw = self.patches(f"{trunk}patch_embed.proj", pixels)
        table = self.weights[f"{trunk}pos_embed"]
        side = math.isqrt(table.shape[1])
        if grid_hw != (side, side):
            grid = table.transpose(1, 2).unflatten(2, (side, side))
            table = F.interpolate(grid, size=grid_hw, mode="bicubic").flatten(2).transpose(1, 2)
        x = x + table
        act = ACTIVATIONS[self.vision["hidden_act"]]
        for n in range(self.vision["num_hidden_layers"]):
            name = f"{trunk}blocks.{n}"
            qkv = self.linear(f"{name}.attn.qkv", self.norm(f"{name}.norm1", x, 1e-6))
            x = x + self.linear(f"{name}.attn.proj", self.attend(qkv, self.vision["num_attention_heads"]))
            y = act(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x, 1e-6)))
            x = x + self.linear(f"{name}.mlp.fc2", y)
        pool = f"{trunk}attn_pool"
        values = self.linear(f"{pool}.kv", self.norm(f"{trunk}norm", x, 1e-6)).chunk(2, dim=-1)[1]
        x = self.linear(f"{pool}.proj", values)
        y = act(self.linear(f"{pool}.mlp.fc1", self.norm(f"{pool}.norm", x, 1e-6)))
        return (x + self.linear(f"{pool}.mlp.fc2", y)).unflatten(1, grid_hw)

    def text_features(self, ids: Tensor) -> Tensor:
        x, prefix = self.open_clip_text(ids, 1e-6, causal=False)
        return self.linear(f"{prefix}text_projection", x[:, -1])


class EvaReference(Reference):
    """timm's Eva at any size: both positions stretched over the grid; pairs of channels side by side turn."""

    def image_features(self, pixels: Tensor) -> Tensor:
        trunk, heads, eps = self.trunk(), self.vision["num_attention_heads"], self.vision.get("layer_norm_eps", 1e-6)
        pools = self.vision["design"] == "pe_core"
        x, (rows, columns) = self.patches(f"{trunk}patch_embed.proj", pixels)
        table = self.weights[f"{trunk}pos_embed"]
        prefix = int(f"{trunk}cls_token" in self.weights)
        side = math.isqrt(table.shape[1] - prefix)
        positions = table[:, prefix:]
        if (rows, columns) != (side, side):
            grid = positions.transpose(1, 2).unflatten(2, (side, side))
            grid = F.interpolate(grid, size=(rows, columns), mode="bicubic", antialias=True)
            positions = grid.flatten(2).transpose(1, 2)
        x = x + positions
        if prefix:
            class_token = self.weights[f"{trunk}cls_token"] + table[:, :1]
            x = torch.cat([class_token.expand(len(x), -1, -1), x], dim=1)
        if pools:
            x = self.norm(f"{trunk}norm_pre", x, eps)
        turn = self.turn(x.shape[-1] // heads, rows, columns, side if pools else 16, prefix, pools)
        layers = self.vision["num_hidden_layers"]
        for n in range(layers):
            name = f"{trunk}blocks.{n}"
            y = self.norm(f"{name}.norm1", x, eps)
            if pools:
                y = self.attend(self.linear(f"{name}.attn.qkv", y), heads, turn=turn)
            elif n == layers - 1:
                y = self.linear(f"{name}.attn.v_proj", y)
            else:
                qkv = torch.cat([self.linear(f"{name}.attn.{part}_proj", y) for part in "qkv"], dim=-1)
                y = self.attend(qkv, heads, turn=turn)
            y = y if pools else self.norm(f"{name}.attn.norm", y, eps)
            x = x + self.linear(f"{name}.attn.proj", y)
            y = self.norm(f"{name}.norm2", x, eps)
            if pools:
                y = F.gelu(self.linear(f"{name}.mlp.fc1", y))
            else:
                y = F.silu(self.linear(f"{name}.mlp.fc1_g", y)) * self.linear(f"{name}.mlp.fc1_x", y)
                y = self.norm(f"{name}.mlp.norm", y, eps)
            x = x + self.linear(f"{name}.mlp.fc2", y)
        x = self.norm(f"{trunk}norm", x, eps)[:, prefix:]
        if pools:
            pool = f"{trunk}attn_pool"
            x = self.linear(f"{pool}.proj", self.linear(f"{pool}.kv", x).chunk(2, dim=-1)[1])
            y = F.gelu(self.linear(f"{pool}.mlp.fc1", self.norm(f"{pool}.norm", x, eps)))
            x = x + self.linear(f"{pool}.mlp.fc2", y)
        return self.linear(f"{trunk}head", x).unflatten(1, (rows, columns))

    @staticmethod
    def turn(width: int, rows: int, columns: int, counted: int, prefix: int, pools: bool) -> Callable:
        """Turns the heads (B, H, prefix + rows * columns, width) by their places, row first unless it `pools`."""
        offset = prefix if pools else 0
        frequencies = 10000.0 ** -(torch.arange(width // 4) * 4 / width)
        y, x = torch.meshgrid(
            (torch.arange(rows) + offset) / rows * counted, (torch.arange(columns) + offset) / columns * counted,
            indexing="ij",
        )  # fmt: skip
        places = torch.stack([x, y] if pools else [y, x], dim=-1).flatten(0, 1)
        angles = (places[:, :, None] * frequencies).flatten(1)

        def apply(heads: Tensor) -> Tensor:
            patches = torch.view_as_complex(heads[:, :, prefix:].unflatten(-1, (-1, 2)).contiguous())
            patches = torch.view_as_real(patches * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
            return torch.cat([heads[:, :, :prefix], patches], dim=2)

        return apply

    def text_features(self, ids: Tensor) -> Tensor:
        x, prefix = self.open_clip_text(ids, 1e-5, causal=True)
        return x[torch.arange(len(ids)), ids.argmax(-1)] @ self.weights[f"{prefix}text_projection"]


class Dinov3Reference(Reference):
    """SPAR's DINOv3.txt wrapper: stretching, rotary positions, the backbone's patches, the text's second half."""

    def image_features(self, pixels: Tensor) -> Tensor:
        name, patch_px = "visual_model.backbone.", self.vision["patch_size"]
        size_hw = [math.ceil(side / patch_px) * patch_px for side in pixels.shape[2:]]
        if size_hw != list(pixels.shape[2:]):
            pixels = F.interpolate(pixels, size=size_hw, mode="bicubic", align_corners=False)
        x, (rows, columns) = self.patches(f"{name}patch_embed.proj", pixels)
        prefix = [self.weights[f"{name}{token}"].expand(len(x), -1, -1) for token in ("cls_token", "storage_tokens")]
        x = torch.cat([*prefix, x], dim=1)
        quarter = x.shape[-1] // self.vision["num_attention_heads"] // 4
        periods = self.weights.get(f"{name}rope_embed.periods", 100.0 ** (torch.arange(quarter) / quarter))
        centres = torch.cartesian_prod(*((torch.arange(n) + 0.5) / n * 2 - 1 for n in (rows, columns)))
        angles = (2 * math.pi * centres[:, :, None] / periods).flatten(1).tile(2)

        def turn(heads: Tensor) -> Tensor:
            patches = heads[:, :, -rows * columns :]
            first, second = patches.chunk(2, dim=-1)
            patches = patches * angles.cos() + torch.cat([-second, first], dim=-1) * angles.sin()
            return torch.cat([heads[:, :, : -rows * columns], patches], dim=2)

        for n in range(self.vision["num_hidden_layers"]):
            x = self.block(f"{name}blocks.{n}", x, turn)
        x = self.norm(f"{name}norm", x, 1e-5)
        return x[:, -rows * columns :].unflatten(1, (rows, columns))

    def block(self, name: str, x: Tensor, turn: Callable) -> Tensor:
        bias = self.weights.get(f"{name}.attn.qkv.bias")
        if bias is not None:
            keys_zero = torch.ones_like(bias).unflatten(0, (3, -1)).mul(torch.tensor([[1.0], [0.0], [1.0]])).flatten()
            bias = bias * self.weights.get(f"{name}.attn.qkv.bias_mask", keys_zero)
        qkv = F.linear(self.norm(f"{name}.norm1", x, 1e-5), self.weights[f"{name}.attn.qkv.weight"], bias)
        y = self.linear(f"{name}.attn.proj", self.attend(qkv, self.vision["num_attention_heads"], turn=turn))
        x = x + y * self.weights[f"{name}.ls1.gamma"]
        y = self.norm(f"{name}.norm2", x, 1e-5)
        if self.vision["use_gated_mlp"]:
            y = self.linear(
                f"{name}.mlp.w3", F.silu(self.linear(f"{name}.mlp.w1", y)) * self.linear(f"{name}.mlp.w2", y)
            )
        else:
            y = self.linear(f"{name}.mlp.fc2", F.gelu(self.linear(f"{name}.mlp.fc1", y)))
        return x + y * self.weights[f"{name}.ls2.gamma"]

    def text_features(self, ids: Tensor) -> Tensor:
        name = "text_model.backbone."
        x = F.embedding(ids, self.weights[f"{name}token_embedding.weight"])
        x = x + self.weights[f"{name}positional_embedding"][: ids.shape[1]]
        for n in range(self.text["num_hidden_layers"]):
            block = f"{name}blocks.{n}"
            qkv = self.linear(f"{block}.attention.qkv", self.norm(f"{block}.attention_norm", x, 1e-5))
            y = self.attend(qkv, self.text["num_attention_heads"], causal=True)
            x = x + self.linear(f"{block}.attention.proj", y)
            y = F.gelu(self.linear(f"{block}.feed_forward.fc1", self.norm(f"{block}.ffn_norm", x, 1e-5)))
            x = x + self.linear(f"{block}.feed_forward.fc2", y)
        x = self.norm(f"{name}ln_final", x, 1e-5)[torch.arange(len(ids)), ids.argmax(-1)]
        return self.linear("text_model.head.linear_projection", x).chunk(2, dim=-1)[1]


REFERENCES: dict[str, type[Reference]] = {
    "clip": ClipReference,
    "metaclip2": MetaclipReference,
    "siglip2": SiglipReference,
    "eva": EvaReference,
    "dinov3": Dinov3Reference,
}
