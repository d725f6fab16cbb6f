"""LPOSS: MaskCLIP's scores of all windows, propagated over one graph of patches that are alike to DINO and near.

Paper: "LPOSS: Label Propagation Over Patches and Pixels for Open-vocabulary Semantic Segmentation", Stojnić et al.,
CVPR 2025. A label method: it changes scores, and gives no features.
1. Each window of the image goes through CLIP (MaskCLIP's last block, cosines Y with the names) and DINO (the last
   block's values v). All windows' patches are the nodes of one graph; a patch lies where its window does.
2. A patch is tied to the 400 whose v are most similar, with max(cos, 0)³ exp(-0.01 distance in pixels).
3. (I - 0.95 W) Z = Y for each name, ten steps of conjugate gradients in fp64 from zero (see `propagation`); it has not
   converged then, so the number of steps is part of the method.
4. Each window's Z goes to its pixels bilinearly; where windows overlap, their mean.
`lposs_plus` refines that on a graph of pixels. The graph is sparse (400 a patch); similarities go by rows.
The scores of a class with several names are the highest of them at the image's own pixels, before the label map is
resized. The authors take the arg-max; a probability comes from 40 (1 - 0.95) Z, as if Z were a cosine.
Deviations: fewer patches than 400 have fewer neighbours (theirs fails on a single window).
To reach: the numbers in `spar_hf.published`, with OpenCLIP ViT-B/16 of LAION-2B and DINO ViT-B/16, the
shorter side at 448 px.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby, product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.sliding_window import window_starts
from ..networks.vit import ViT
from ..results_spar import COSINE_SCALE, NO_CLASS
from ..segmentation_spar import FullScores, ScoreMaps
from .propagation import nearest_neighbours
from .segmenter import MethodSegmenter


@dataclass(frozen=True)
class Settings:
    """LPOSS's constants (section 3.2 and the authors' configuration).

    Attributes:
        neighbours: k, of each patch.
        power: gamma, of the cosines.
        falloff: sigma, of the weights with the distance in pixels.
        alpha: how much of a score comes from the neighbours.
        steps: of conjugate gradients.
        tolerance: a name stops earlier at this relative residual.
        window_batch: windows run at once; bounds the memory.
    """

    neighbours: int = 400
    power: float = 3.0
    falloff: float = 0.01
    alpha: float = 0.95
    steps: int = 10
    tolerance: float = 1e-6
    window_batch: int = 32


Make = Callable[[slice], Tensor]  # some names -> their maps (k, H, W) at the size of the image


class Segmenter(MethodSegmenter):
    """LPOSS; see the head of the file.

    Args:
        model: has the text tower.
        processor: its `SparProcessor`.
        vision: CLIP's vision tower; its configuration gives window and step.
        networks: "dino": an adapter, a module, or the id or folder to load it from.
        settings: the method's constants.
        method: the row's name.
    """

    dino: ViT

    def adapters(self) -> dict[str, Any]:
        return {"dino": ViT.of}

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        text = F.normalize(encoded.text_embeds.float(), dim=-1).to(self.device)
        several = runs(encoded.labels.class_ids)
        image_hw = (image.shape[2], image.shape[3])
        at_pixels = self.maps(image.to(self.dtype), text)

        @lru_cache(maxsize=1)  # a class's names follow each other
        def best_first(first: int, last: int, size_hw: tuple[int, int]) -> Tensor:
            """What a class's names lack to be the best of them, found at the image's pixels, in maps of a size."""
            own = at_pixels(slice(first, last))
            return resize(own.amax(0, keepdim=True), size_hw) - resize(own, size_hw).amax(0)

        def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
            maps = resize(at_pixels(names), size_hw)
            for first, last in several if size_hw != image_hw else ():
                inside = slice(max(first - names.start, 0), max(last - names.start, 0))
                if len(maps[inside]):
                    maps[inside] += best_first(first, last, size_hw)
            return maps

        return FullScores(
            make=make,
            size_hw=image_hw,
            num_names=len(text),
            device=text.device,
            logit_scale=COSINE_SCALE * (1 - self.settings.alpha),
        )

    def maps(self, image: Tensor, text: Tensor) -> Make:
        """What makes the maps of an image (1, 3, H, W)."""
        settings, config = self.settings, self.config
        image_hw = (image.shape[2], image.shape[3])
        window_px, stride_px = config.window_px or config.image_size, config.stride_px
        window_hw = (min(image_hw[0], window_px), min(image_hw[1], window_px))
        places = list(product(*(window_starts(side, window_px, stride_px) for side in image_hw)))
        crops = torch.stack([image[0, :, y : y + window_hw[0], x : x + window_hw[1]] for y, x in places])
        features, scores = [], []
        for chunk in crops.split(settings.window_batch):
            seen = self.dino(padded(chunk, self.dino.patch_px, config), config, heads="v").heads["v"].float()
            tokens, grid_hw, _ = self.encoder.embed(padded(chunk, config.patch_size, config))
            clip = self.encoder.maskclip(self.encoder.run_to_last(tokens, grid_hw)).float()
            clip = F.normalize(clip, dim=-1).transpose(1, 2).unflatten(2, grid_hw)  # (n, D, h, w)
            clip = resize(clip, (seen.shape[2], seen.shape[3]))
            scores.append(F.normalize(clip, dim=1).flatten(2).transpose(1, 2) @ text.T)  # (n, h * w, K)
            features.append(F.normalize(seen, dim=1).flatten(2).transpose(1, 2))
        patch_px, grid_hw = self.dino.patch_px, (seen.shape[2], seen.shape[3])
        inside = torch.cartesian_prod(*(torch.arange(side) * patch_px + patch_px // 2 for side in grid_hw))
        places_px = (torch.tensor(places)[:, None] + inside).flatten(0, 1).to(text.device)
        graph = nearest_neighbours(
            torch.cat(features).flatten(0, 1), places_px, settings.neighbours, settings.power, settings.falloff
        )
        solved = graph.propagate(torch.cat(scores).flatten(0, 1), settings.alpha, settings.steps, settings.tolerance)
        windows = solved.view(len(places), *grid_hw, -1).permute(0, 3, 1, 2)  # (windows, K, h, w)

        def make(names: slice) -> Tensor:
            count = torch.zeros(image_hw, device=text.device)
            total = torch.zeros(len(range(*names.indices(len(text)))), *image_hw, device=text.device)
            for (y, x), window in zip(places, windows, strict=True):
                covered = (..., slice(y, y + window_hw[0]), slice(x, x + window_hw[1]))
                total[covered] += resize(window[names], window_hw)
                count[covered] += 1
            return total / count

        return make


def runs(class_ids: Iterable[int]) -> list[tuple[int, int]]:
    """First and one past the last name of each class that has several."""
    found, place = [], 0
    for class_id, names in groupby(class_ids):
        first, place = place, place + len(list(names))
        if class_id != NO_CLASS and place - first > 1:
            found.append((first, place))
    return found


def resize(maps: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """(..., h, w) -> (..., H, W), bilinear."""
    if tuple(maps.shape[-2:]) == size_hw:
        return maps
    batch = maps if maps.ndim == 4 else maps[None]
    return F.interpolate(batch, size=size_hw, mode="bilinear", align_corners=False).view(*maps.shape[:-2], *size_hw)


def padded(pixels: Tensor, patch_px: int, config: Any) -> Tensor:
    """Pixels (B, 3, H, W) up to whole patches, black at the right and the bottom."""
    down, across = (-side % patch_px for side in pixels.shape[2:])
    if not down and not across:
        return pixels
    mean, std = (torch.tensor(v).to(pixels).view(1, 3, 1, 1) for v in (config.image_mean, config.image_std))
    # Black is (0 - mean) / std: around it the padding is zeros.
    return F.pad(pixels + mean / std, (0, across, 0, down)) - mean / std
