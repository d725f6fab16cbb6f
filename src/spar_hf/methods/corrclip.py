"""CorrCLIP: which patches may attend to each other is decided by regions, and how much by DINO.

Paper: "CorrCLIP: Reconstructing Patch Correlations in CLIP for Open-Vocabulary Semantic Segmentation", Zhang et al.,
ICCV 2025. Changes, in each window of the image; regions are of the whole image:
1. f = q + k of DINO's last block, at length one. Regions whose mean f are alike become one (DBSCAN with one
   neighbour: connected components).
2. A patch attends within its region; a patch in no region, and any patch to such a one, where their cosine is above
   the mean of all. A = softmax(4 cos(f, f)), one map for all heads, on DINO's grid.
3. The last block's values of the patches, and of the mean output of earlier blocks (6 to 10 of 12), come to DINO's
   grid bilinearly; both through A and out_proj, without residual and MLP.
4. For each region a copy of the class token goes through all blocks and attends to the class token and the region's
   patches alone.
5. Each of the three, for the last a patch's region's, goes through the final norm; their sum with weights 1, 1 and
   0.5 through the projection. Where windows overlap, the mean of their features.
Rows of A are made some at a time. The vote of regions on the label map is a refinement, `mask-vote`.
Deviations: features are averaged where windows overlap, the authors average logits of features of length one; a
patch with no key left keeps itself (theirs is NaN); fewer than five blocks (theirs fails) have the third last for
step 3. As released, the smallest id in a window stands for no region, even where no pixel lies in none.
To reach: the numbers in `spar_hf.published`, with MetaCLIP ViT-B/16, DINO ViT-B/8, SAM 2 Hiera-L and mask-vote;
the shorter side at 336 px (ADE20K 448, Cityscapes 448 with windows of 224 px).
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense_spar import attend, merge_heads, project_heads
from ..encoder_spar import SparVisionOutput, check_pixels
from ..encoders.composition import resample
from ..encoders.sliding_window import window_starts
from ..networks.masks import SamSettings, region_source
from ..networks.vit import ViT
from .encoder import ROW_NUMBERS, MethodEncoder


@dataclass(frozen=True)
class Settings:
    """CorrCLIP's constants (the authors' code).

    Attributes:
        merge_distance: regions whose mean f have a cosine at most this below the highest are one; below 0 none are.
        sharpness: tau, the factor on cosines before the soft-max.
        spatial_weight: alpha, of the features made of earlier blocks.
        semantic_weight: beta, of the regions' class tokens.
        smallest_is_none: the smallest id in a window is no region; else only 0 is none.
        points_per_side, several, min_iou, min_stability: of SAM's masks; see `networks.masks.SamSettings`.
        pad_px: windows are padded to a multiple of it, evenly, the smaller half first; the padding is a region.
        window_batch: windows run at once; bounds the memory.
    """

    merge_distance: float = 0.2
    sharpness: float = 4.0
    spatial_weight: float = 1.0
    semantic_weight: float = 0.5
    smallest_is_none: bool = True
    points_per_side: int = 32
    several: bool = False
    min_iou: float = 0.4
    min_stability: float = 0.4
    pad_px: int = 56
    window_batch: int = 8

    @property
    def masks(self) -> SamSettings:
        return SamSettings(self.points_per_side, self.several, self.min_iou, self.min_stability)


class Encoder(MethodEncoder):
    """CorrCLIP around a CLIP vision tower; see the head of the file.

    Args:
        vision: the tower; its configuration gives window and step.
        networks: "dino", an adapter, a module, or the id or folder to load it from; "regions", a source of regions,
            `slic`, or a SAM likewise.
        settings: the method's constants.
        method: the row's name.

    Raises:
        ValueError: a network is missing or of another kind.
    """

    settings: Settings
    dino: ViT
    regions: Any

    def adapters(self) -> dict[str, Any]:
        return {"dino": ViT.of, "regions": lambda given: region_source(given, self.settings.masks)}

    def prepare(self) -> None:
        self.config.patch_size = self.dino.patch_px

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, regions={self.regions!r}"

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D), a vector for each of DINO's patches, over the whole image."""
        check_pixels(pixel_values, self.config.num_channels)
        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        maps = [self.of_image(image[None]) for image in pixel_values]
        return SparVisionOutput(
            patch_embeds=torch.stack(maps).permute(0, 2, 3, 1), image_hw=image_hw, extent_hw=image_hw
        )

    def of_image(self, image: Tensor, seen: Any = None) -> Tensor:
        """(1, 3, H, W) -> (D, h, w); `seen` is what `whole` gave, where that has been asked before."""
        settings, config = self.settings, self.config
        sides = image.shape[2:]
        ids = self.regions(image, config).map
        window_px, stride_px = config.window_px or config.image_size, config.stride_px
        window_hw = [min(side, window_px) for side in sides]
        pads = [-side % settings.pad_px for side in window_hw]
        around = (pads[1] // 2, pads[1] - pads[1] // 2, pads[0] // 2, pads[0] - pads[0] // 2)
        places = list(product(*(window_starts(side, window_px, stride_px) for side in sides)))

        seen = self.whole(image) if seen is None else seen
        grid = [max(round(side / config.patch_size), 1) for side in sides]
        cells = [side / count for side, count in zip(sides, grid, strict=True)]  # their sides in pixels
        total = count = torch.empty(0)
        for first in range(0, len(places), settings.window_batch):
            chunk = places[first : first + settings.window_batch]
            covered = [(slice(y, y + window_hw[0]), slice(x, x + window_hw[1])) for y, x in chunk]
            pixels = F.pad(torch.stack([image[0, :, rows, columns] for rows, columns in covered]), around)
            regions = F.pad(torch.stack([ids[part] for part in covered]), around, value=int(ids.max()) + 1)
            unit, grid_hw = self.vectors(pixels, chunk, around, seen)
            features = self.of_windows(pixels, regions, unit, grid_hw).float()
            if first == 0:
                total, count = features.new_zeros(features.shape[1], *grid), features.new_zeros(grid)
            for place, single in zip(chunk, features, strict=True):
                # The cells whose centres lie in the window, and where they begin in its padded frame.
                ends = [
                    (round(start / cell), round((start + side) / cell))
                    for start, side, cell in zip(place, window_hw, cells, strict=True)
                ]
                inside = tuple(slice(low, max(high, low + 1)) for low, high in ends)
                origin = [
                    part.start * cell - start + pad // 2
                    for part, cell, start, pad in zip(inside, cells, place, pads, strict=True)
                ]
                size = [part.stop - part.start for part in inside]
                total[(slice(None), *inside)] += resample(
                    single[None],
                    (pixels.shape[2], pixels.shape[3]),
                    (size[0], size[1]),
                    (size[0] * cells[0], size[1] * cells[1]),
                    (origin[0], origin[1]),
                )[0]
                count[inside] += 1
        return (total / count).to(self.dtype)

    def whole(self, image: Tensor) -> Any:
        """What `vectors` wants of the whole image (1, 3, H, W)."""

    def vectors(
        self, pixels: Tensor, places: list[tuple[int, ...]], around: tuple[int, ...], seen: Any
    ) -> tuple[Tensor, tuple[int, int]]:
        """f of padded windows (n, 3, H, W): (n, h * w, F) of length one, and rows and columns.

        Args:
            pixels: the windows.
            places: top and left of each in the image.
            around: their padding, as `torch.nn.functional.pad` takes it.
            seen: what `whole` gave.
        """
        found = self.dino(pixels, self.config, heads="qk")
        both = (found.heads["q"] + found.heads["k"]).flatten(2).transpose(1, 2)
        return F.normalize(both.float(), dim=-1), found.grid_hw

    def of_windows(self, pixels: Tensor, ids: Tensor, unit: Tensor, dense_hw: tuple[int, int]) -> Tensor:
        """Features (n, D, h, w) of windows, on the grid of f.

        Args:
            pixels: (n, 3, H, W), padded.
            ids: (n, H, W), their regions.
            unit: (n, h * w, F), f.
            dense_hw: its rows and columns.
        """
        settings, vision, layer = self.settings, self.vision, self.last_layer
        own = [nearest_floor(single, dense_hw) for single in ids]
        none = [int(single.min()) if settings.smallest_is_none else 0 for single in own]
        own = [
            united(single, vectors, nothing, settings.merge_distance)
            for single, vectors, nothing in zip(own, unit, none, strict=True)
        ]

        tokens, grid_hw, _ = self.embed(pixels)
        small = [nearest_floor(single, grid_hw).flatten() for single in own]
        x, earlier, copies = self.run(tokens, grid_hw, small)

        both = torch.cat([x, earlier])
        values = merge_heads(project_heads(layer.self_attn, layer.layer_norm1(both), "v")["v"])[:, 1:]
        values = values.transpose(1, 2).unflatten(2, grid_hw)
        values = F.interpolate(values, size=dense_hw, mode="bilinear", align_corners=False).flatten(2)
        values = torch.cat(values.transpose(1, 2).chunk(2), dim=-1)  # (n, N, 2 C)
        features = []
        for number, (vectors, single) in enumerate(zip(unit, own, strict=True)):
            mixed = attend_in_regions(vectors, single.flatten(), none[number], values[number], settings.sharpness)
            plain, spatial = layer.self_attn.out_proj(mixed.unflatten(1, (2, -1))).unbind(1)
            numbers = small[number].unique()
            place = nearest_floor(small[number].view(grid_hw), dense_hw).flatten()
            semantic = copies[number][torch.searchsorted(numbers, place)]
            normed = [vision.post_layernorm(part) for part in (plain, spatial, semantic)]
            features.append(normed[0] + settings.spatial_weight * normed[1] + settings.semantic_weight * normed[2])
        return vision.visual_projection(torch.stack(features)).transpose(1, 2).unflatten(2, dense_hw)

    def run(self, x: Tensor, grid_hw: tuple[int, int], ids: list[Tensor]) -> tuple[Tensor, Tensor, list[Tensor]]:
        """The first block's input -> the last block's, the mean output of the blocks before, and class tokens.

        Args:
            x: (n, 1 + N, C).
            grid_hw: rows and columns of patches.
            ids: (N), the regions of each window.

        Returns:
            (n, 1 + N, C) twice, and for each window (R, C): the class token of each id that occurs, in their order,
            after the last block.
        """
        blocks: Any = self.vision.blocks
        reach = self.vision.reach(grid_hw, x.device)
        outside = [F.pad(single != single.unique()[:, None], (1, 0)) for single in ids]  # (R, 1 + N)
        bias = [torch.zeros_like(mask, dtype=x.dtype).masked_fill_(mask, -torch.inf) for mask in outside]
        copies = [single[:1].expand(len(mask), -1) for single, mask in zip(x, outside, strict=True)]
        total, taken = torch.zeros_like(x), spatial_blocks(len(blocks))
        for index, layer in enumerate(blocks):
            heads = project_heads(layer.self_attn, layer.layer_norm1(x), "kv")
            for number, copy in enumerate(copies):
                query = project_heads(layer.self_attn, layer.layer_norm1(copy[None]), "q")["q"]
                key, value = (heads[name][number : number + 1] for name in "kv")
                attended = layer.self_attn.out_proj(merge_heads(attend(query, key, value, bias[number])))
                copies[number] = layer.feed_forward(copy[None] + attended)[0]
            if index < len(blocks) - 1:
                x = layer(x, reach=reach)
            if index in taken:
                total = total + x
        return x, total / len(taken), copies


def spatial_blocks(num_blocks: int) -> range:
    """0-based indices of the blocks whose outputs show where things are."""
    count = {12: 5, 24: 12, 32: 28}.get(num_blocks, num_blocks - 4)
    last = max(num_blocks - 3, 0)
    return range(max(min(num_blocks - 2 - count, last), 0), last + 1)


def nearest_floor(ids: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Ids (H, W) at another size, each cell's from its first pixel, as `interpolate(mode="nearest")`."""
    return F.interpolate(ids[None, None].double(), size=size_hw, mode="nearest")[0, 0].long()


def united(ids: Tensor, unit: Tensor, none: int, distance: float) -> Tensor:
    """Region ids (h, w) with regions that are alike made one; `none` stays.

    Args:
        ids: of the patches.
        unit: (N, F), vectors of the patches.
        none: the id of patches in no region.
        distance: of the cosine of mean vectors to the highest one.
    """
    numbers, place = ids.flatten().unique(return_inverse=True)
    real = numbers != none
    if real.sum() < 2:
        return ids
    sums = unit.new_zeros(len(numbers), unit.shape[1]).index_add_(0, place, unit)
    means = F.normalize(sums / place.bincount()[:, None], dim=-1)[real]
    cosine = means @ means.T
    near = cosine.max() - cosine <= distance
    label, before = torch.arange(len(means), device=ids.device), None
    while before is None or not torch.equal(label, before):
        before = label
        label = torch.where(near, label, len(means)).amin(dim=1).minimum(label)
    names = numbers.clone()
    names[real] = numbers[real][label]
    return names[place].view(ids.shape)


def attend_in_regions(unit: Tensor, ids: Tensor, none: int, values: Tensor, sharpness: float) -> Tensor:
    """softmax(sharpness cos) values over the patches that may be attended to, some rows at a time.

    Args:
        unit: (N, F), vectors of length one.
        ids: (N), regions.
        none: the id of patches in no region.
        values: (N, C).
        sharpness: factor on cosines.
    """
    mean = unit.mean(dim=0).square().sum()  # of all pairs
    free = ids == none
    out = torch.empty_like(values)
    step = max(ROW_NUMBERS // len(unit), 1)
    for first in range(0, len(unit), step):
        rows = slice(first, first + step)
        cosine = unit[rows] @ unit.T
        allowed = (ids[rows, None] == ids) & ~free
        allowed |= (free[rows, None] | free) & (cosine > mean)
        allowed.diagonal(first).fill_(True)
        weights = (sharpness * cosine).masked_fill_(~allowed, -torch.inf).softmax(dim=-1)
        out[rows] = weights.to(values.dtype) @ values
    return out
