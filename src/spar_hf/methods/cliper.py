"""CLIPer: the last block attends with the sum of all earlier blocks' attention, balanced and thresholded.

Paper: "CLIPer: Hierarchically Improving Spatial Representation of CLIP for Open-Vocabulary Semantic Segmentation",
Sun et al., ICCV 2025. Changes, each head on its own: A = sum of the attention maps of all blocks but the last, class
token included; columns, then rows of A are divided by their sums; A <- max((A + Aᵀ) / 2 - column means, 0), its rows
divided by their sums; the patches are out_proj(A V) of the last block, without residual and MLP.
As the authors' code: it divides the same tensor again for each of its maps, one a block, so that the last, which gives
the features, has gone through as many rounds of columns and rows as the network has blocks, twelve; their numbers were
made with that. Their labels come from the maps of all blocks (`cliper_labels`), and then the attention of Stable
Diffusion, which is not here.
The maths needs each head's whole N x N matrix: all its columns are divided before a row is known. Here they are held
in fp32, a few heads at a time (67 MB a head at 1024 x 1024 px), beside the queries and keys of all blocks. The rounds
only scale rows and columns, so they run on two vectors (Sinkhorn and Knopp, 1967); the matrix itself stays as it is.
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16 (with the labels of all maps).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from ..dense_spar import attend, attention_map, merge_heads, project_heads
from ..encoder_spar import SparVisionOutput
from ..reach_spar import WindowReach
from .encoder import ROW_NUMBERS, MethodEncoder

# Numbers of the heads' matrices that are held at once, 128 MB in fp32; a single head may take more.
HEAD_NUMBERS = 2**25


@dataclass(frozen=True)
class Settings:
    """CLIPer's constants.

    Attributes:
        rounds: how often columns and rows are divided by their sums; 0 is once for each block, as in the released
            code.
    """

    rounds: int = 0


class Encoder(MethodEncoder):
    """CLIPer around a CLIP vision tower; see the head of the file."""

    settings: Settings

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D)."""
        x, grid_hw, extent_hw = self.embed(pixel_values)
        reach = self.vision.reach(grid_hw, x.device)
        x, pairs, _ = look_through(self, x, reach)
        layer = self.last_layer
        values = project_heads(layer.self_attn, layer.layer_norm1(x), "v")["v"]

        rounds = self.settings.rounds or len(self.vision.blocks)
        mixed = torch.empty_like(values)
        batch, num_heads, count, _ = values.shape
        step = max(HEAD_NUMBERS // (batch * count**2), 1)
        for first in range(0, num_heads, step):
            heads = slice(first, first + step)
            total = sum_of_maps([(query[:, heads], key[:, heads]) for query, key in pairs], reach)
            mixed[:, heads] = (Balanced(total, rounds) @ values[:, heads].float()).to(values.dtype)
        patches = layer.self_attn.out_proj(merge_heads(mixed[:, :, 1:]))
        return self.output(patches, x, grid_hw, extent_hw, pixel_values)


Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def look_through(
    encoder: MethodEncoder, x: torch.Tensor, reach: WindowReach | None, inputs: bool = False
) -> tuple[torch.Tensor, Pairs, list[torch.Tensor]]:
    """The first block's input -> the last one's, (B, 1 + N, C), and what was seen of all blocks on the way but it.

    Returns:
        The last block's input, the queries and keys of each block (B, H, 1 + N, d), and where `inputs` are wanted the
        normalised input of each (B, 1 + N, C).
    """
    pairs: Pairs = []
    normed = []

    def visit(layer: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        heads = project_heads(layer.self_attn, y, "qkv")
        pairs.append((heads["q"], heads["k"]))
        if inputs:
            normed.append(y)
        attended = merge_heads(attend(heads["q"], heads["k"], heads["v"], reach=reach))
        return layer.feed_forward(x + layer.self_attn.out_proj(attended))

    for layer in encoder.vision.blocks[:-1]:
        x = layer(x, inside=visit)
    return x, pairs, normed


def sum_of_maps(pairs: Pairs, reach: WindowReach | None) -> torch.Tensor:
    """Sum of softmax(d^-0.5 query keyᵀ) over blocks, as far as they reach: (B, H, N, N) in fp32."""
    query, key = pairs[0]
    batch, num_heads, count, _ = query.shape
    total = torch.zeros(batch, num_heads, count, count, device=query.device)
    bias = None if reach is None else reach.bias(count, count).to(query.dtype)
    step = max(ROW_NUMBERS // (batch * num_heads * count), 1)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        for query, key in pairs:
            total[:, :, rows] += attention_map(query[:, :, rows], key, None if bias is None else bias[rows])
    return total


class Balanced:
    """A sum of attention maps, balanced and thresholded; its rows are made when asked for.

    Args:
        total: (B, H, N, N), the sum.
        rounds: how often columns and rows are divided by their sums.
    """

    def __init__(self, total: torch.Tensor, rounds: int) -> None:
        self.total = total
        left = torch.ones_like(total[..., :1])  # (B, H, N, 1), factor of each row; `right` that of each column
        for _ in range(rounds):
            right = 1 / (total.transpose(2, 3) @ left)
            left = 1 / (total @ right)
        # Rows add to one now. The symmetric map's column means are its row means.
        self.means = (1 + right * (total.transpose(2, 3) @ left)) / 2 / total.shape[-1]
        self.left, self.right = left, right

    def chunks(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Some rows at a time, and their weights (B, H, n, N)."""
        total = self.total
        step = max(ROW_NUMBERS // (total.shape[0] * total.shape[1] * total.shape[2]), 1)
        for first in range(0, total.shape[2], step):
            rows = slice(first, first + step)
            ours = total[:, :, rows] * self.left[:, :, rows] * self.right.transpose(2, 3)
            theirs = total[..., rows].transpose(2, 3) * self.right[:, :, rows] * self.left.transpose(2, 3)
            weights = ((ours + theirs) / 2 - self.means.transpose(2, 3)).clamp_(min=0)
            yield rows, weights / weights.sum(dim=-1, keepdim=True)

    def __matmul__(self, values: torch.Tensor) -> torch.Tensor:
        """Times values (B, H, N, d)."""
        out = torch.empty_like(values)
        for rows, weights in self.chunks():
            out[:, :, rows] = weights @ values
        return out
