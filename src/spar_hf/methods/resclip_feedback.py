"""ResCLIP with semantic feedback: its first label map says which patches belong together, and the last block reruns.

Paper: "ResCLIP: Residual Attention for Training-free Dense Vision-language Inference", Yang et al., CVPR 2025,
section 3.3. A label method: the second pass depends on the words. A label map of the first pass, which is the row
`resclip`, is made of PAMR's cosines; pixels whose probability is under a threshold take the first name, and a patch
the commonest name of its pixels. M_ij = 1 where the patches i and j have one name, else 0; where the line of sight
from i to j meets another name, it is multiplied by exp(-s / S), s the larger of the rows and the columns between them
and S the largest s. Rows of M are smoothed, brought to sum 1, and M to maximum 1. Then the last block's local term is
softmax(tau ((1 - lambda) d^-0.5 K Kᵀ + lambda M) + NACLIP's Gaussian); the rest is as in the first pass.
As the authors' code: a row of M is smoothed along the patches' flat index, across the ends of lines; of a line of
sight only the first s / S is looked at, so that M is not symmetric. Unlike it, M is not rounded to fp16.
Memory: M is a matrix of patches by patches; in windows of the native size it is small.
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16, thresholds and weights chosen by data set.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..arithmetic_spar import with_fast_products
from ..dense_spar import attend, locality_bias, merge_heads, project_heads
from ..encoder_spar import SparVisionOutput, check_pixels
from ..grid_spar import fit_to_patches, whole_patches
from ..methods_spar import block_index
from ..refinement import pamr
from ..results_spar import COSINE_SCALE
from ..segmentation_spar import MAP_NUMBERS, ScoreMaps, feature_scores
from .encoder import ROW_NUMBERS, MethodEncoder
from .segmenter import MethodSegmenter


@dataclass(frozen=True)
class Settings:
    """ResCLIP's constants (the authors' configuration for VOC21).

    Attributes:
        threshold: of the first label map's probabilities; VOC20, Cityscapes .1, Context .3 (59 classes .25), Object,
            Stuff .11, ADE20K .25.
        tau, weight: of the scores, and lambda of M; Context, Object, Stuff 1.8 and .7, VOC20, Cityscapes 2.1 and .6,
            ADE20K 2.1 and .7.
        earlier_tau, earlier_weight: of both terms, and of the earlier blocks' attention; VOC20 .6, Object, Stuff,
            Context59 .4, Cityscapes .2.
        blocks: whose attention it is, of twelve.
        sigma_patches: of NACLIP's Gaussian.
        smoothing: standard deviation along the rows of M, patches.
        pamr: of the first label map.
    """

    threshold: float = 0.5
    tau: float = 2.2
    weight: float = 0.7
    earlier_tau: float = 2.0
    earlier_weight: float = 0.3
    blocks: tuple[int, ...] = (6, 7, 8, 9)
    sigma_patches: float = 5.0
    smoothing: float = 5.0
    pamr: pamr.Settings = field(default_factory=pamr.Settings)


class Segmenter(MethodSegmenter):
    """ResCLIP with semantic feedback; see the head of the file.

    Args:
        model: has the text tower.
        processor: its `SparProcessor`.
        vision: CLIP's vision tower.
        settings: the method's constants.
        method: the row's name.
    """

    @torch.no_grad()
    @with_fast_products
    def __call__(self, pixel_values: Tensor, encoded: Any) -> list[ScoreMaps]:
        """See `Segmenter`; `encoded` are `LabelFeatures`."""
        check_pixels(pixel_values, self.config.num_channels)
        pixels = pixel_values.to(self.device, self.dtype)
        x, grid_hw, extent_hw = self.encoder.embed(pixels)
        last = LastBlock(self.encoder, x, grid_hw, self.settings)
        fitted, _ = fit_to_patches(pixels, self.config.patch_size, self.config.size_rule)
        guides = whole_patches(fitted, self.config.patch_size).float()
        text = F.normalize(encoded.text_embeds.float(), dim=-1).to(self.device)
        first = self.output(last(None), last, extent_hw, pixels)
        named = [
            self.names_of_patches(maps, guide, grid_hw)
            for maps, guide in zip(
                feature_scores(first, text, (guides.shape[2], guides.shape[3])), guides, strict=True
            )
        ]
        together = [belonging(names, self.settings.smoothing) for names in named]
        second = self.output(last(together), last, extent_hw, pixels)
        return feature_scores(second, text, (pixel_values.shape[2], pixel_values.shape[3]))

    def output(self, patches: Tensor, last: LastBlock, extent_hw: tuple[int, int], pixels: Tensor) -> SparVisionOutput:
        return self.encoder.output(patches, last.x, last.grid_hw, extent_hw, pixels)

    def names_of_patches(self, maps: Any, guide: Tensor, grid_hw: tuple[int, int]) -> Tensor:
        """The number of the name of each patch, (h, w)."""
        size_hw = (guide.shape[1], guide.shape[2])  # the patches' own pixels: none are left over
        whole = type(maps)(**{**vars(maps), "size_hw": size_hw, "coverage_hw": (1.0, 1.0)})
        refined = pamr.pamr(whole, guide, self.settings.pamr)
        step = max(1, MAP_NUMBERS.get(guide.device.type, MAP_NUMBERS["cpu"]) // (size_hw[0] * size_hw[1]))
        best = torch.full(size_hw, -torch.inf, device=guide.device)
        total, winner = best.clone(), torch.zeros(size_hw, dtype=torch.int64, device=guide.device)
        for start in range(0, maps.num_names, step):
            logits = COSINE_SCALE * refined(slice(start, min(start + step, maps.num_names)))
            total = torch.logaddexp(total, logits.logsumexp(0))
            top, index = logits.max(0)
            winner = torch.where(top > best, index + start, winner)
            best = torch.maximum(top, best)
        winner[(best - total).exp() < self.settings.threshold] = 0
        patch_px = size_hw[0] // grid_hw[0]
        return winner.unfold(0, patch_px, patch_px).unfold(1, patch_px, patch_px).flatten(2).mode(dim=-1).values


class LastBlock:
    """The last block of a batch of images, ready to run with or without M.

    Args:
        encoder: the tower.
        x: the first block's input, (B, 1 + N, C).
        grid_hw: rows and columns of patches.
        settings: the method's constants.
    """

    def __init__(self, encoder: MethodEncoder, x: Tensor, grid_hw: tuple[int, int], settings: Settings) -> None:
        self.encoder, self.grid_hw, self.settings = encoder, grid_hw, settings
        blocks: Any = encoder.vision.blocks
        self.reach = encoder.vision.reach(grid_hw, x.device)
        last: Any = encoder.last_layer
        wanted = [block_index(block, len(blocks)) for block in settings.blocks]
        seen = {}
        for number, layer in enumerate(blocks[:-1]):
            if number in wanted:
                seen[number] = project_heads(layer.self_attn, layer.layer_norm1(x), "qk")
            x = layer(x, reach=self.reach)
        self.x = x
        own = project_heads(last.self_attn, last.layer_norm1(x), "qkv")
        seen[len(blocks) - 1] = own
        self.keys, self.values = own["k"], own["v"]
        self.earlier = torch.zeros_like(self.values[:, :, 1:])
        for number in wanted:
            query, key = seen[number]["q"][:, :, 1:], seen[number]["k"]
            self.earlier += attend(query, key, self.values, reach=self.reach) / len(wanted)

    def __call__(self, together: list[Tensor] | None) -> Tensor:
        """The patches (B, N, C), given M (N, N) of each image or none."""
        settings, query = self.settings, self.keys[:, :, 1:]
        near = locality_bias(self.grid_hw, settings.sigma_patches, query)  # (N, 1 + N)
        if together is None:
            local = attend(query, self.keys, self.values, near, self.reach)
        else:
            query = settings.tau * (1 - settings.weight) * query
            parts = []
            for number, matrix in enumerate(together):
                bias = near + F.pad(settings.tau * settings.weight * matrix, (1, 0)).to(near)
                one = slice(number, number + 1)
                parts.append(attend(query[one], self.keys[one], self.values[one], bias, self.reach))
            local = torch.cat(parts)
        share = settings.earlier_weight
        mixed = settings.earlier_tau * ((1 - share) * local + share * self.earlier)
        return self.encoder.last_layer.self_attn.out_proj(merge_heads(mixed))


def belonging(names: Tensor, smoothing: float) -> Tensor:
    """M of a map of names (h, w): (N, N), fp32."""
    height, width = names.shape
    count, farthest = height * width, max(height, width) - 1
    places = torch.cartesian_prod(torch.arange(height), torch.arange(width)).to(names.device)  # (N, 2)
    share = torch.linspace(0, 1, farthest + 1, device=names.device)
    flat = names.flatten()
    kernel_side = min(count, int(6 * smoothing + 1))
    kernel_side += 1 - kernel_side % 2
    offset = torch.arange(kernel_side, device=names.device) - kernel_side // 2
    kernel = torch.exp(-(offset**2) / (2 * smoothing**2))
    kernel = (kernel / kernel.sum()).view(1, 1, -1)
    out = torch.empty(count, count, device=names.device)
    step = max(ROW_NUMBERS // (count * (farthest + 1)), 1)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        distance = (places[rows, None] - places).abs().amax(dim=-1)  # (n, N)
        # Points on the way, all at the same shares of it, in fp32 and rounded to even, which decides ties.
        way = places[rows, None, None] * (1 - share[:, None]) + places[None, :, None] * share[:, None]
        way = way.round().long()  # (n, N, S + 1, 2)
        own = flat[rows, None]
        clear = names[way[..., 0], way[..., 1]] == own[..., None]
        counts = torch.arange(farthest + 1, device=names.device) <= distance[..., None]
        sight = (clear | ~counts).all(dim=-1)
        fading = torch.exp(-distance / max(farthest, 1))
        matrix = (own == flat) * torch.where(sight, 1.0, fading)
        out[rows] = F.conv1d(matrix[:, None], kernel, padding=kernel_side // 2)[:, 0, :count]
    out = out.clamp_(min=0) / (out.sum(dim=1, keepdim=True) + 1e-8)
    return out / out.max()
