"""PnP-OVSS: Grad-CAM of BLIP's image-text matching, again and again without the patches that were most salient.

Paper: "Emergent Open-Vocabulary Semantic Segmentation from Off-the-shelf Vision-Language Models", Luo et al., CVPR
2024. A label method; CLIP gives nothing but its pixels.
1. The image, squashed to a square of 336 px, and the caption "A picture of" with all names go through BLIP. The map of
   a token is its cross attention times the positive part of the gradient of the match (text block 8, head 9).
2. Salience dropout: the ten patches most attended to by all names become 0 in the normalised image, and in the maps;
   four rounds. The maps are added up, those of the first round twice, as in the authors' code.
3. A name's map is the mean of its word pieces', without what lies below 0.15 after it was brought to 0..1. It comes to
   the pixels bilinearly, corners on corners; nothing has a pixel where all maps are 0. Each map is blurred, brought to
   0..1, and a DenseCRF over their soft-max decides.
As in the authors' code for objects, nothing is a label of its own where the vocabulary has a background class, and as
in that for scenes, where it has fewer than three names.
Deviations: the authors first choose the names for each image by GPT-4o's answers, which are files of theirs; here all
names are in the caption. Their code takes each word that begins anew for the next name, and does not divide the last
name's pieces; a name of several words is their mean here. A map without any value stays 0, theirs is NaN.
The authors' numbers are with BLIP large and the names so chosen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..encoders.base import column, rgb
from ..extras import extra_package
from ..grid_spar import upsample
from ..networks.blip import Blip
from ..prompts_spar import Labels
from ..refinement import dense_crf
from ..segmentation_spar import ScoreMaps
from .nothing import names_of_background, scores_with_nothing
from .segmenter import MethodSegmenter

CRF = dense_crf.Settings(
    steps=10, near_weight=7.0, near_px=3.0, alike_weight=10.0, alike_px=50.0, alike_colour=5.0
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """PnP-OVSS's constants (the authors' commands).

    Attributes:
        side_px: of the square that BLIP sees, whole patches.
        caption: what comes before the names.
        layer: block of BLIP's text encoder, from 1.
        head: of its cross attention, from 0.
        rounds: passes through BLIP.
        dropped: patches that go after each.
        threshold: values below it go from a map of 0 to 1.
        blur: standard deviation as a share of the image's longer side.
        crf: of the DenseCRF.
    """

    side_px: int = 336
    caption: str = "A picture of"
    layer: int = 8
    head: int = 9
    rounds: int = 4
    dropped: int = 10
    threshold: float = 0.15
    blur: float = 0.05
    crf: dense_crf.Settings = CRF


class Segmenter(MethodSegmenter):
    """PnP-OVSS; see the head of the file.

    Args:
        model: a CLIP; only its pixels are used.
        processor: its `SparProcessor`.
        vision: its vision tower.
        networks: "blip": an adapter, or the id or folder to load it from.
        settings: the method's constants.
        method: the row's name.

    Raises:
        ValueError: the network is missing or another one, or a setting is out of its range.
    """

    blip: Blip

    def adapters(self) -> dict[str, Any]:
        return {"blip": Blip.of}

    def prepare(self) -> None:
        side, patch, rounds = self.settings.side_px, self.blip.patch_px, self.settings.rounds
        if side < patch or side % patch or rounds < 1 or not 0 <= self.settings.dropped <= (side // patch) ** 2:
            raise ValueError(
                f"side_px {side}, rounds {rounds} and dropped {self.settings.dropped} of method "
                f"{self.config.method!r}: the side must be a multiple of BLIP's patch ({patch} px), rounds at "
                "least 1, dropped not above all patches."
            )

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        labels: Labels = encoded.labels
        bytes_ = (rgb(image, self.config)[0] * 255).round().clamp(0, 255).byte()
        colours = bytes_.permute(1, 2, 0).cpu().numpy()
        size_hw = (colours.shape[0], colours.shape[1])
        background = names_of_background(labels)
        kept = [i for i in range(len(labels.names)) if i not in background]
        maps = torch.zeros(0, *size_hw, device=self.device)
        if kept:
            maps = at_pixels(self.maps(colours, [labels.names[i] for i in kept]), size_hw, self.settings.threshold)
        can_be_nothing = bool(background) or len(kept) < 3
        if can_be_nothing:
            maps = torch.cat([(maps == 0).all(dim=0, keepdim=True).float(), maps])
        blurred = scaled(blur(maps, self.settings.blur * max(size_hw)))
        chosen = dense_crf.dense_crf(blurred.softmax(dim=0), bytes_.permute(1, 2, 0), self.settings.crf)
        rows = {name: can_be_nothing + row for row, name in enumerate(kept)}

        def found(names: slice, wanted_hw: tuple[int, int]) -> Tensor:
            numbers = range(*names.indices(len(labels.names)))
            none = torch.zeros(wanted_hw, device=self.device)
            return torch.stack([upsample(chosen[rows[i]], wanted_hw) if i in rows else none for i in numbers])

        def nothing(wanted_hw: tuple[int, int]) -> Tensor:
            return upsample(chosen[0], wanted_hw) if can_be_nothing else torch.zeros(wanted_hw, device=self.device)

        return scores_with_nothing(found, nothing, labels, size_hw, self.device)

    def maps(self, colours: np.ndarray, names: list[str]) -> Tensor:
        """BLIP's map (K, h, w) of each name in an image (H, W, 3) uint8, added up over the rounds."""
        settings, patch = self.settings, self.blip.patch_px
        square = Image.fromarray(colours).resize((settings.side_px,) * 2, Image.Resampling.BICUBIC)
        pixels = torch.from_numpy(np.array(square)).to(self.device).permute(2, 0, 1)[None] / 255
        pixels = (pixels - column(self.blip.image_mean, pixels)) / column(self.blip.image_std, pixels)
        tokens, places = self.blip.caption(settings.caption, names)
        side = settings.side_px // patch
        left = torch.ones(side, side, device=self.device)  # 0 where a patch was dropped
        total = torch.zeros(len(names), side, side, device=self.device)
        for number in range(settings.rounds):
            shown = pixels * left.repeat_interleave(patch, 0).repeat_interleave(patch, 1)
            cam = self.blip.match_cam(shown, tokens, settings.layer, settings.head) * left
            total += torch.stack([cam[place].mean(dim=0) for place in places]) * (2 if number == 0 else 1)
            salience = cam[places[0].start : places[-1].stop].sum(dim=0).flatten()
            left.view(-1)[salience.topk(settings.dropped).indices] = 0
        return total


def scaled(maps: Tensor) -> Tensor:
    """Each map of (K, H, W) brought to 0..1; one without differences becomes 0."""
    low, high = maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0)


def at_pixels(maps: Tensor, size_hw: tuple[int, int], threshold: float) -> Tensor:
    """Maps (K, h, w) without what is below a share of their range, at the pixels (K, H, W)."""
    kept = maps * (scaled(maps) >= threshold)
    return F.interpolate(kept[None], size=size_hw, mode="bilinear", align_corners=True)[0]


def blur(maps: Tensor, deviation_px: float) -> Tensor:
    """Maps (K, H, W) under a Gaussian that ends at four deviations, mirrored at the borders."""
    gaussian = extra_package("scipy.ndimage", "vfm").gaussian_filter
    return torch.from_numpy(np.stack([gaussian(one, deviation_px) for one in maps.cpu().numpy()])).to(maps.device)
