"""TextRegion: the values of CLIP's last block, summed over each region of the image, are the region's own feature.

Paper: "TextRegion: Text-Aligned Region Tokens from Frozen Image-Text Models", Xiao et al., TMLR 2025. A label method:
it scores regions, and pixels by the regions they lie in.
1. The image is cut into crops of about a window, side by side; each and the whole image, resized to the window, go
   through CLIP. A patch's value is its crop's plus that of the whole image at its place.
2. Masks come to that grid bilinearly, at most 1. A patch is like a region by its mean cosine with the region's
   patches; one that is not more like its own regions than the others, by a threshold, is global and leaves them.
3. A region's feature is out_proj of the sum of its values by mask, final norm and projection; no residual, no MLP.
4. A pixel's score is the sum of its regions' cosines, by mask; outside of all masks the sum of SCLIP's two cosines.
A mean cosine with many patches is the cosine with their mean vector: no N x N matrix is made.
Regions: SAM 2.1's automatic masks, soft, those of one thing united; or any other (`networks.masks`).
Deviations: masks have the size of the pixels that CLIP sees, the authors' that of the file; theirs are chosen and
united in the decoder's frame of 256 px. Without autocast the authors' code divides the values themselves by their
lengths, in place; their evaluation, in half precision, does not, nor does this.
The authors publish numbers for larger networks than CLIP ViT-B/16 only; they resize the shorter side to 672 px.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense_spar import merge_heads, project_heads
from ..networks.masks import Regions, SamSettings, region_source
from ..segmentation_spar import FullScores, ScoreMaps
from .lposs import resize
from .segmenter import MethodSegmenter

MASKS = SamSettings(
    points_per_side=16,
    min_iou=0.6,
    min_stability=0.6,
    max_box_iou=0.9,
    soft=True,
    min_area=100 / 256**2,
    max_shared=0.8,
)
LOGIT_SCALE = 50.0


@dataclass(frozen=True)
class Settings:
    """TextRegion's constants (section 3 and the authors' configurations).

    Attributes:
        threshold: patches whose likeness to their own regions is less above that to the others are global.
        columns: in how many pieces, side by side, the whole image is seen; Cityscapes 2.
        window_batch: crops run at once; bounds the memory.
    """

    threshold: float = 0.07
    columns: int = 1
    window_batch: int = 16


class Segmenter(MethodSegmenter):
    """TextRegion; see the head of the file.

    Args:
        model: has the text tower.
        processor: its `SparProcessor`.
        vision: CLIP's vision tower; its configuration gives the window.
        networks: "regions": a source of regions, `slic`, or a SAM by adapter, module, id or folder.
        settings: the method's constants.
        method: the row's name.

    Raises:
        ValueError: there is no source of regions.
    """

    regions: Any

    def adapters(self) -> dict[str, Any]:
        return {"regions": lambda given: region_source(given, MASKS)}

    def prepare(self) -> None:
        self.window_px = self.config.window_px or self.config.image_size

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        text = F.normalize(encoded.text_embeds.float(), dim=-1).to(self.device)
        image = image.to(self.dtype)
        values, rest = self.patches(image)
        drawn, regions = self.region_features(values, self.regions(image, self.config))
        outside = drawn.spread(text.new_ones(1, len(regions)))[0] == 0

        def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
            scores = drawn.spread(text[names] @ regions.T)  # (k, H, W)
            others = resize(torch.einsum("kd,dij->kij", text[names], rest), drawn.size_hw)
            return resize(torch.where(outside, others, scores), size_hw)

        return FullScores(
            make=make,
            size_hw=drawn.size_hw,
            num_names=len(text),
            device=text.device,
            logit_scale=LOGIT_SCALE,
            patches_hw=(values.shape[1], values.shape[2]),
        )

    def patches(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Of an image (1, 3, H, W), crops and whole added up: the last block's values (C, h, w), and SCLIP's patches,
        of length one before they are added, (D, h, w)."""
        crops, across = crops_of(image, self.window_px)
        bounds = [image.shape[3] * i // self.settings.columns for i in range(self.settings.columns + 1)]
        pieces = [*(image[..., left:right] for left, right in pairwise(bounds)), *crops]
        size = (self.window_px, self.window_px)
        windows = torch.cat(
            [
                F.interpolate(piece.float(), size=size, mode="bicubic", align_corners=False, antialias=True)
                for piece in pieces
            ]
        ).to(self.dtype)
        found: list[tuple[Tensor, Tensor]] = []
        for chunk in windows.split(self.settings.window_batch):
            tokens, grid_hw, _ = self.encoder.embed(chunk)
            x = self.encoder.run_to_last(tokens, grid_hw)
            layer = self.encoder.last_layer
            values = merge_heads(project_heads(layer.self_attn, layer.layer_norm1(x), "v")["v"])[:, 1:]
            sclip = F.normalize(self.encoder.by_recipe("sclip", x, grid_hw).float(), dim=-1)
            found.append((values.float(), sclip))
        columns = self.settings.columns
        return tuple(  # type: ignore[return-value]
            added(torch.cat(parts).transpose(1, 2).unflatten(2, grid_hw), columns, across)
            for parts in zip(*found, strict=True)
        )

    def region_features(self, values: Tensor, regions: Regions) -> tuple[Regions, Tensor]:
        """The regions that have patches of their own, and their features in the text space (R, D), of length one."""
        patches = values.flatten(1).T  # (N, C)
        weights = regions.on_grid((values.shape[1], values.shape[2]))  # (R, N)
        kept = weights.sum(dim=1) > 0
        weights = weights[kept]
        weights *= own_patches(patches, weights > 0, self.settings.threshold)
        left = weights.sum(dim=1) > 0
        kept[kept.clone()] = left
        vision = self.encoder.vision
        summed = self.encoder.last_layer.self_attn.out_proj((weights[left] @ patches).to(self.dtype))
        embeds = vision.visual_projection(vision.post_layernorm(summed))
        return regions.some(kept), F.normalize(embeds.float(), dim=-1)


def own_patches(patches: Tensor, inside: Tensor, threshold: float) -> Tensor:
    """Which patches (N, C) are more like their own regions than like the others, by a threshold: (N) bool.

    Args:
        patches: any vectors.
        inside: (R, N) bool, the patches of each region, at least one; a patch may be in several or none.
        threshold: of the difference of the mean cosines.
    """
    unit = F.normalize(patches, dim=-1)
    inside = inside.to(unit.dtype)
    likeness = (inside @ unit / inside.sum(dim=1, keepdim=True)) @ unit.T  # (R, N), the mean of cosines

    def mean(chosen: Tensor) -> Tensor:
        return (likeness * chosen).sum(dim=0) / chosen.sum(dim=0).clamp(min=1)

    return mean(inside) - mean(1 - inside) >= threshold


def crops_of(image: Tensor, window_px: int) -> tuple[list[Tensor], int]:
    """Crops of about a window, row by row, of an image (1, 3, H, W), and how many lie side by side.

    All have one size; the last ones are shifted back to end with the image.
    """
    starts, sizes = [], []
    for side in image.shape[2:]:
        count = max(side // window_px, 1)
        size = math.ceil(side / count)
        starts.append([min(number * size, side - size) for number in range(count)])
        sizes.append(size)
    return [image[..., y : y + sizes[0], x : x + sizes[1]] for y, x in product(*starts)], len(starts[1])


def added(maps: Tensor, columns: int, across: int) -> Tensor:
    """Maps (n, C, h, w), first of the whole image's pieces side by side, then of its crops, as one: (C, H, W)."""
    whole, crops = maps[:columns], maps[columns:]
    down = len(crops) // across
    rows, cells = maps.shape[2:]
    tiled = crops.unflatten(0, (down, across)).permute(2, 0, 3, 1, 4).reshape(-1, down * rows, across * cells)
    bounds = [tiled.shape[2] * i // columns for i in range(columns + 1)]
    return tiled + torch.cat(
        [
            resize(piece, (down * rows, right - left))
            for piece, (left, right) in zip(whole, pairwise(bounds), strict=True)
        ],
        dim=2,
    )
