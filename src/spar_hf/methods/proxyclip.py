"""ProxyCLIP: the patches of a vision foundation model say which values of CLIP's last block belong together.

Paper: "ProxyCLIP: Proxy Attention Improves CLIP for Open-Vocabulary Segmentation", Lan et al., ECCV 2024.
Changes: F = the second network's patch features after its final norm; S = cos(F, F);
A = softmax(3 (S - 1.2 mean S)) over the keys with S >= 1.2 mean S, one map for all heads; the last block's values of
the patches go to the second network's grid bilinearly; the patches are out_proj(A V), without residual and MLP. They
lie on the second network's grid: with DINO ViT-B/8 there are four times as many. No N x N matrix is held.
The second network is any that `networks.vit.ViT` takes; the authors took DINO ViT-B/8, DINOv2 ViT-B/14 with
registers, SAM and MAE.
Deviations: rows and columns are kept apart (theirs takes the rows twice); sides that are no multiple of a patch follow
the size rule in each network by its own patch, and values are looked up by their place in the image (theirs pads to a
multiple of 56 px, resizes the image to 1024 px for SAM and to 336 px for MAE); a patch with no key left keeps itself
(theirs is NaN). Similarities are fp32.
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16 and DINO ViT-B/8, windows of 336 px, step 112.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..dense_spar import merge_heads, project_heads
from ..encoder_spar import SparVisionOutput
from ..encoders.composition import resample
from ..networks.vit import ViT
from .encoder import MethodEncoder, above_mean, attend_by_similarity, mean_similarity


@dataclass(frozen=True)
class Settings:
    """ProxyCLIP's constants (section 3.3 and the authors' code).

    Attributes:
        shift: beta; similarities under this multiple of their mean get no weight.
        sharpness: gamma, the factor on similarities before the soft-max.
    """

    shift: float = 1.2
    sharpness: float = 3.0


class Encoder(MethodEncoder):
    """ProxyCLIP around a CLIP vision tower; see the head of the file.

    Args:
        vision: the tower.
        networks: the second network under "dino", as an adapter, a module, or the id or folder to load it from.
        settings: the method's constants.
        method: the row's name.

    Raises:
        ValueError: the second network is missing, or no ViT with square patches.
    """

    settings: Settings
    dino: ViT

    def adapters(self) -> dict[str, Any]:
        return {"dino": ViT.of}

    def prepare(self) -> None:
        self.config.patch_size = self.dino.patch_px

    @torch.no_grad()
    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D) on the second network's grid."""
        x, clip_grid_hw, clip_extent_hw = self.embed(pixel_values)
        x = self.run_to_last(x, clip_grid_hw)
        layer = self.last_layer
        values = merge_heads(project_heads(layer.self_attn, layer.layer_norm1(x), "v")["v"])[:, 1:]

        seen = self.dino(pixel_values, self.config)
        unit = nn.functional.normalize(seen.features.flatten(2).transpose(1, 2).float(), dim=-1)
        image = values.transpose(1, 2).unflatten(2, clip_grid_hw)  # (B, N, C) -> (B, C, rows, columns)
        image = resample(image, clip_extent_hw, seen.grid_hw, seen.extent_hw)
        weigh = above_mean(self.settings.shift * mean_similarity(unit), self.settings.sharpness)
        mixed = attend_by_similarity(unit, image.flatten(2).transpose(1, 2), weigh)
        return self.output(layer.self_attn.out_proj(mixed), x, seen.grid_hw, seen.extent_hw, pixel_values)
