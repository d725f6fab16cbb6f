"""LabelTeacher: any segmenter as a teacher, a dense encoder whose features say what its score maps say.

A label method gives no features, and a student learns features. So the network's own features are moved until the
words find in them what the method found: with p the method's probabilities of a patch, averaged over its pixels, and
q(f) = softmax(s cos(f, t)) those of a feature f, each step adds c (p - q(f)) T: minus the gradient of the
cross-entropy with respect to the direction of f, times the confidence c of p. What no word of the vocabulary speaks of
stays as the network had it, and so do patches of which the method is not sure. Beyond SPAR; the plain mean of
text features, p T, is there to compare with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoder_spar import EncoderWrapper, SparVisionOutput, check_pixels
from ..encoders.base import DenseEncoder
from ..grid_spar import fit_to_patches
from ..names_spar import one_of
from ..segmentation_spar import ScoreMaps, Segmenter, class_probabilities

TARGETS = ("moved", "text")


@dataclass(frozen=True)
class Settings:
    """How score maps become features.

    Attributes:
        target: `moved`, the network's features moved towards the words; `text`, the mean of the words' features,
            mixed with the network's own by confidence.
        logit_scale: s, factor on cosines before the soft-max, of features and of score maps that are cosines.
        steps: how often features are moved.
        step_size: of each, in lengths of the feature.
    """

    target: str = "moved"
    logit_scale: float = 40.0
    steps: int = 10
    step_size: float = 0.1

    def __post_init__(self) -> None:
        one_of("target", self.target, TARGETS)
        if not (self.logit_scale > 0 and self.steps >= 1 and self.step_size > 0):
            raise ValueError(f"{self}: all numbers must be above 0.")


class LabelTeacher(EncoderWrapper, nn.Module):
    """A segmenter as a dense encoder. No gradients.

    Args:
        segmenter: any segmenter.
        encoded: the vocabulary, as its `encode_labels` gives it.
        text_embeds: the names' features in the student's text space, (K, D).
        encoder: gives the features that are moved: the student's own starting tower.
        settings: how.

    Raises:
        ValueError: the names and their features don't fit.
    """

    text_embeds: Tensor

    def __init__(
        self,
        segmenter: Segmenter,
        encoded: Any,
        text_embeds: Tensor,
        encoder: DenseEncoder,
        settings: Settings = Settings(),
    ) -> None:
        super().__init__()
        if len(encoded.labels.names) != len(text_embeds):
            raise ValueError(f"there are {len(text_embeds)} text features for {len(encoded.labels.names)} names.")
        self.segmenter = segmenter
        self.encoded = encoded
        self.encoder = encoder
        self.settings = settings
        self.parts = nn.ModuleList(segmenter.networks)  # so that its weights count in hashes
        self.register_buffer("text_embeds", F.normalize(text_embeds.float(), dim=-1), persistent=True)

    def extra_repr(self) -> str:
        return f"{self.segmenter!r}, {len(self.text_embeds)} names, {self.settings}"

    @torch.no_grad()
    def forward(self, pixel_values: Tensor) -> SparVisionOutput:
        """(B, 3, H, W) -> `patch_embeds` (B, h, w, D) on the grid of the student's tower."""
        check_pixels(pixel_values, self.config.num_channels)
        outputs = self.encoder(pixel_values.to(self.device, self.dtype))
        patch_px = self.config.patch_size
        _, extent_hw = fit_to_patches(pixel_values, patch_px, self.config.size_rule)
        maps = self.segmenter(pixel_values, self.encoded)
        own = outputs.patch_embeds.float()
        targets = [
            self.target(single, patch_probabilities(found, single.shape[:2], extent_hw, self.settings.logit_scale))
            for single, found in zip(own, maps, strict=True)
        ]
        return SparVisionOutput(
            patch_embeds=torch.stack(targets).to(self.dtype), image_hw=outputs.image_hw, extent_hw=outputs.extent_hw
        )

    def target(self, own: Tensor, probabilities: Tensor) -> Tensor:
        """Features (h, w, D) that say what probabilities (h, w, K) say, from the network's own (h, w, D)."""
        settings, text = self.settings, self.text_embeds
        probabilities = probabilities.to(own.device)
        entropy = -(probabilities * probabilities.clamp(min=1e-12).log()).sum(-1, keepdim=True)
        confidence = 1 - entropy / math.log(len(text)) if len(text) > 1 else torch.ones_like(entropy)
        length = own.norm(dim=-1, keepdim=True)
        unit = own / length.clamp(min=1e-12)
        if settings.target == "text":
            words = F.normalize(probabilities @ text, dim=-1)
            return length * (confidence * words + (1 - confidence) * unit)
        for _ in range(settings.steps):
            found = (settings.logit_scale * unit @ text.T).softmax(-1)
            unit = F.normalize(unit + settings.step_size * confidence * (probabilities - found) @ text, dim=-1)
        return length * unit


def patch_probabilities(
    maps: ScoreMaps, grid_hw: tuple[int, int], extent_hw: tuple[int, int], logit_scale: float
) -> Tensor:
    """The mean probability of each name over the pixels of each patch, (h, w, K).

    Args:
        maps: the scores, at the size of the image's pixels.
        grid_hw: rows and columns of the patches.
        extent_hw: height and width in pixels that they cover; pixels beyond it count for none.
        logit_scale: factor on scores that are cosines.
    """
    rows, columns = (
        (torch.arange(size, device=maps.device) * grid // extent).clamp(max=grid)  # the last is for none
        for size, grid, extent in zip(maps.size_hw, grid_hw, extent_hw, strict=True)
    )
    names = torch.arange(maps.num_names)
    total = torch.zeros(maps.num_names, grid_hw[0] + 1, grid_hw[1] + 1, device=maps.device)
    for (y, x), tile in class_probabilities(maps, names, logit_scale):
        down = torch.zeros(len(tile), grid_hw[0] + 1, tile.shape[2], device=maps.device).index_add_(1, rows[y], tile)
        total.index_add_(2, columns[x], down)
    total = total[:, : grid_hw[0], : grid_hw[1]]
    return (total / total.sum(0).clamp(min=1e-12)).permute(1, 2, 0)
