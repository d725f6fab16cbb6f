"""CLIP-DIY: CLIP's image embeddings of crops at three sizes, and a saliency that tells things from background.

Paper: "CLIP-DIY: CLIP Dense Inference Yields Open-Vocabulary Semantic Segmentation For-Free", Wysoczańska et al., WACV
2024. A label method.
1. The image is squashed to a square of 256 px. Crops of 256, 128 and 64 px, at steps of half their side, go through
   CLIP as images of their own; the cosines of their embeddings with the names ("a photo of a {}") are bilinear between
   the crops; the mean of the three sizes.
2. The background class gets 1 - s of its scores, the others s of theirs, s the saliency of the image at that size.
The saliency is FOUND's, or any of `networks.saliency`. Without a background class all names are multiplied by s, which
decides nothing but the thresholds.
As the authors' code: "an" is never written. Scores are multiplied as they are; negative cosines would turn round.
Deviations: the saliency is of the squashed pixels, as CLIP sees them; theirs of the file's, squashed afterwards.
To reach: the authors' numbers, at a label map of 448 px with OpenCLIP ViT-B/32 of LAION-2B, were not at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..encoders.base import column, rgb
from ..grid_spar import upsample
from ..networks.saliency import open_saliency
from ..segmentation_spar import FullScores, ScoreMaps
from .nothing import names_of_background
from .segmenter import MethodSegmenter

TEMPLATE = "a photo of a {}"


@dataclass(frozen=True)
class Settings:
    """CLIP-DIY's constants (the authors' configuration).

    Attributes:
        side_px: of the square.
        crops_px: sides of the crops; each step is half of it.
        crop_batch: crops run at once; bounds the memory.
    """

    side_px: int = 256
    crops_px: tuple[int, ...] = (256, 128, 64)
    crop_batch: int = 64

    def __post_init__(self) -> None:
        if not self.crops_px or any(not 2 <= side <= self.side_px for side in self.crops_px):
            raise ValueError(f"crops_px is {self.crops_px}; sides are from 2 px to side_px, {self.side_px}.")


class Segmenter(MethodSegmenter):
    """CLIP-DIY; see the head of the file. Networks: `saliency`, see `networks.saliency`; `dino`, for FOUND."""

    saliency: Any

    def __init__(
        self,
        model: Any,
        processor: Any,
        vision: Any,
        networks: Mapping[str, Any] | None = None,
        settings: Any = None,
        method: str = "",
    ) -> None:
        self.dino = (networks or {}).get("dino")
        super().__init__(model, processor, vision, networks, settings, method)

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        return {"saliency": lambda given: open_saliency(given, self.dino)}

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`; without templates given, the authors' one."""
        return super().encode_labels(labels, (TEMPLATE,) if templates is None else templates)

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        image_hw, side = (image.shape[2], image.shape[3]), self.settings.side_px
        square = F.interpolate(image.float(), size=(side, side), mode="bilinear", align_corners=False, antialias=True)
        text = F.normalize(encoded.text_embeds.float(), dim=-1).to(self.device)
        colours = (rgb(square, self.config)[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0).cpu().numpy()
        grids = [text @ self.embeds(colours, crop_px).flatten(1) for crop_px in self.settings.crops_px]
        saliency = self.saliency(square.to(self.dtype), self.config)[0]
        background = names_of_background(encoded.labels)

        def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
            sides = [int(grid.shape[1] ** 0.5) for grid in grids]
            maps = [
                upsample(grid[names].unflatten(1, (n, n)), (side, side)) for grid, n in zip(grids, sides, strict=True)
            ]
            mean = torch.stack(maps).mean(dim=0)
            numbers = range(*names.indices(len(text)))
            share = torch.stack([1 - saliency if number in background else saliency for number in numbers])
            return upsample(mean * share, size_hw)

        return FullScores(make=make, size_hw=image_hw, num_names=len(text), device=image.device)

    def embeds(self, colours: np.ndarray, crop_px: int) -> Tensor:
        """CLIP's embeddings (D, n, n) at length one of the crops of a square (S, S, 3) uint8."""
        config = self.config
        starts = range(0, len(colours) - crop_px + 1, crop_px // 2)
        native = (config.image_size, config.image_size)
        crops = [
            np.array(
                Image.fromarray(colours[y : y + crop_px, x : x + crop_px]).resize(native, Image.Resampling.BICUBIC)
            )
            for y in starts
            for x in starts
        ]
        found = []
        for first in range(0, len(crops), self.settings.crop_batch):
            pixels = (
                torch.from_numpy(np.stack(crops[first : first + self.settings.crop_batch])).permute(0, 3, 1, 2) / 255
            )
            pixels = (pixels - column(config.image_mean, pixels)) / column(config.image_std, pixels)
            found.append(self.encoder.image_embeds(pixels.to(self.device)))
        return torch.cat(found).T.unflatten(1, (len(starts), len(starts)))
