"""SAM asked for a mask of each region of the label map, and the regions drawn anew by its answers.

Paper: Trident, Shi et al., ICCV 2025, section 3.4. At half size, pixels whose best class is less probable than
`coarse` are left out; of each class, connected regions (8 neighbours) of 225 pixels and more are prompts: their box,
their most probable pixel, and as mask input the class's probability, 0 up to `coarse`, times 0.005. Masks that SAM
expects to have an IoU above 0.8 count. A class's score at a pixel is the largest of sigmoid(mask logit) times its
probability over its masks, inside their union; the best class has the pixel; where none has a score the label stays.
As the authors' code: regions whose mask fails keep their label only where no other class has a score.
Deviation: SAM sees the pixels that CLIP sees, not the file's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..extras import extra_package
from ..grid_spar import upsample
from ..results_spar import NO_CLASS
from ..segmentation_spar import ScoreMaps, scale_of
from .clip_internals import ClipInternals

# Numbers of the masks that are at full size at a time, 64 MB in fp32; and of the score maps.
MASK_NUMBERS = 2**24


@dataclass(frozen=True)
class Settings:
    """Constants of the prompts (the authors' configurations).

    Attributes:
        coarse: probability from which on pixels count; VOC21 and VOC20 0.2, Context .15, Object .25, Cityscapes .1,
            Stuff and ADE20K .05.
        min_pixels: of a region, at half size.
        mask_factor: of the probabilities in the mask input.
        min_iou: masks of a lower expected IoU are dropped.
    """

    coarse: float = 0.2
    min_pixels: int = 225
    mask_factor: float = 0.005
    min_iou: float = 0.8


def redrawn(
    labels: Tensor, *, image: ClipInternals, settings: Settings, maps: ScoreMaps, class_ids: Tensor, sam: Any
) -> Tensor:
    """The label map (H, W) after SAM.

    Args:
        labels: class ids.
        image: the image.
        settings: of the prompts.
        maps: the scores that the labels come from.
        class_ids: the class of each name (K).
        sam: the network, a `networks.sam.Sam`.
    """
    size_hw = (labels.shape[0], labels.shape[1])
    probability = _Probabilities(maps.at(size_hw), class_ids)
    half_hw = (max(size_hw[0] // 2, 1), max(size_hw[1] // 2, 1))
    small = labels[_floored(size_hw[0], half_hw[0])][:, _floored(size_hw[1], half_hw[1])].clone()
    sure = torch.zeros(half_hw, device=labels.device)
    for class_id in probability.classes:
        sure = torch.maximum(sure, upsample(probability(class_id), half_hw))
    small[sure < settings.coarse] = NO_CLASS

    seen, patch_px = None, 16
    best, winner = torch.zeros(size_hw, device=labels.device), labels.clone()
    for class_id in probability.classes:
        if not (small == class_id).any():
            continue
        own = probability(class_id)
        coarse = upsample(own, half_hw)
        boxes, points = regions(small == class_id, coarse, settings)
        if not len(boxes):
            continue
        if seen is None:
            pixels = image.pixel_values.float()
            whole = [-(-side // patch_px) * patch_px for side in pixels.shape[2:]]
            pixels = F.interpolate(pixels, size=whole, mode="bilinear", align_corners=False)
            seen = sam.encode(pixels, image.network.config)
        prompt = sam.mask_prompt(coarse, size_hw)
        prompt = torch.where(prompt > settings.coarse, settings.mask_factor * prompt, 0.0)
        logits, expected = sam.prompted(seen, points=points[:, None], boxes=boxes, mask=prompt, frame_hw=half_hw)
        good = logits[expected[:, 0] > settings.min_iou]
        if not len(good):
            continue
        score = torch.zeros(size_hw, device=labels.device)
        inside = torch.zeros(size_hw, dtype=torch.bool, device=labels.device)
        for chunk in good.split(max(MASK_NUMBERS // (size_hw[0] * size_hw[1]), 1)):
            full = upsample(sam.at_image_size(chunk, seen)[:, 0], size_hw)
            score = torch.maximum(score, full.sigmoid().amax(0) * own)
            inside |= (full > 0).any(dim=0)
        score = score * inside
        better = score > best
        best = torch.where(better, score, best)
        winner[better] = class_id
    return winner


def regions(mask: Tensor, scores: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """Boxes (N, 4) and best pixels (N, 2), x first, of a mask's (H, W) connected regions that are large."""
    ndimage = extra_package("scipy.ndimage", "vfm")
    numbers, _ = ndimage.label(mask.cpu().numpy(), structure=torch.ones(3, 3).numpy())
    boxes, points = [], []
    for number, (rows, columns) in enumerate(ndimage.find_objects(numbers), start=1):
        inside = torch.from_numpy(numbers[rows, columns] == number).to(scores.device)
        if inside.sum() < settings.min_pixels:
            continue
        boxes.append([columns.start, rows.start, columns.stop - 1, rows.stop - 1])
        best = int((scores[rows, columns] * inside).argmax())
        y, x = divmod(best, columns.stop - columns.start)
        points.append([columns.start + x, rows.start + y])
    return (
        torch.tensor(boxes, dtype=torch.float32, device=scores.device).view(-1, 4),
        torch.tensor(points, dtype=torch.float32, device=scores.device).view(-1, 2),
    )


class _Probabilities:
    """The probability of one class at a time, (H, W): its best name's share of the soft-max over all names."""

    def __init__(self, maps: ScoreMaps, class_ids: Tensor) -> None:
        self.maps = maps
        self.scale = scale_of(maps, None)
        self.names = {
            class_id: torch.nonzero(class_ids == class_id).flatten().tolist()
            for class_id in class_ids.unique().tolist()
            if class_id != NO_CLASS
        }
        step = max(MASK_NUMBERS // (maps.size_hw[0] * maps.size_hw[1]), 1)
        self.total = torch.full(maps.size_hw, -torch.inf, device=maps.device)
        for first in range(0, maps.num_names, step):
            logits = maps(slice(first, min(first + step, maps.num_names))) * self.scale
            self.total = torch.logaddexp(self.total, logits.logsumexp(0))

    @property
    def classes(self) -> list[int]:
        return sorted(self.names)

    def __call__(self, class_id: int) -> Tensor:
        best = torch.full_like(self.total, -torch.inf)
        for name in self.names[class_id]:
            best = torch.maximum(best, self.maps(slice(name, name + 1))[0])
        return (best * self.scale - self.total).exp()


def _floored(size: int, wanted: int) -> Tensor:
    """The pixels that `interpolate(mode="nearest")` takes along one axis."""
    return (torch.arange(wanted) * (size / wanted)).long().clamp(max=size - 1)
