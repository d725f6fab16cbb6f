"""SCRA: RADIO's last block attends by what its own attention gave (the block of RADSeg), in one pass.

Paper: "RADSeg: Unleashing Parameter and Compute Efficient Zero-Shot Open-Vocabulary Segmentation Using Agglomerative
Models", Alama et al., arXiv 2511.19704. Changes, in the last block in place of its attention: o = proj(softmax(q kᵀ /
√d) v), split into heads again; u = o / |o|; A = softmax(10 u uᵀ) over the tokens with a cosine of at least 0, for each
head; out = proj(A v). Residual and MLP stay, class tokens and registers take part.
No N x N matrix is held. Cosines are fp32.
To reach: no numbers of this step alone; see radseg.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ..dense_spar import attend, merge_heads, project_heads, split_heads
from ..encoder_spar import SparVisionOutput
from .encoder import MethodEncoder, above_mean, attend_by_similarity


@dataclass(frozen=True)
class Settings:
    """The block's constant (the authors' code).

    Attributes:
        sharpness: factor on the cosines before the soft-max.
    """

    sharpness: float = 10.0


class Encoder(MethodEncoder):
    """RADIO with a self-correlating last block; see the head of the file.

    Args:
        vision: the tower.
        settings: the method's constants.
        method: the row's name.
    """

    settings: Any

    def run_to_last(self, x: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        reach = self.vision.reach(grid_hw, x.device)
        for layer in self.vision.blocks[:-1]:
            x, _ = layer(x, reach=reach)
        return x

    def tokens(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int], tuple[int, int]]:
        """(B, 3, H, W) -> the trunk's tokens (B, P + h * w, C), (h, w), and the pixels that the grid covers."""
        x, grid_hw, extent_hw = self.embed(pixel_values)
        return self.self_correlated(self.run_to_last(x, grid_hw), grid_hw), grid_hw, extent_hw

    def self_correlated(self, x: torch.Tensor, grid_hw: tuple[int, int]) -> torch.Tensor:
        """The last block's input (B, P + N, C) -> its output."""
        layer, attention = self.last_layer, self.last_layer.attention
        heads = project_heads(attention, layer.norm1(x), "qkv")
        usual = attend(heads["q"], heads["k"], heads["v"], reach=self.vision.reach(grid_hw, x.device))
        seen = split_heads(attention.o_proj(merge_heads(usual)), attention.head_dim)  # (B, H, P + N, d)
        unit = F.normalize(seen.float(), dim=-1)
        weigh = above_mean(unit.new_zeros(()), self.settings.sharpness)
        mixed = attend_by_similarity(unit.flatten(0, 1), heads["v"].flatten(0, 1), weigh)
        return layer.update(x, attention.o_proj(merge_heads(mixed.unflatten(0, unit.shape[:2]))))

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D)."""
        tokens, grid_hw, extent_hw = self.tokens(pixel_values)
        fields = self.vision.project(tokens)
        return SparVisionOutput(
            patch_embeds=fields.pop("patch_embeds").unflatten(1, grid_hw),
            **fields,
            image_hw=(pixel_values.shape[2], pixel_values.shape[3]),
            extent_hw=extent_hw,
        )
