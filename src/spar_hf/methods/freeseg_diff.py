"""FreeSeg-Diff: clusters of the UNet's queries, each shown to CLIP alone.

Paper: "FreeSeg-Diff: Training-Free Open-Vocabulary Segmentation with Diffusion Models", Corradini et al., arXiv
2403.20105. A label method.
1. The image, squashed to a square, becomes a latent, a sample of the posterior, at step 0; no words. The queries of
   the cross attention on a quarter of the latent's grid, of all heads and layers, come to half of it bilinearly.
2. k-means makes four clusters of their pixels, which come to the picture by nearest pixels.
3. CLIP sees the picture with all but one cluster black, and says how probable each name is, without a template. A name
   stays with the cluster that it is most probable in; a cluster takes the most probable name that stayed with it, or
   none.
4. A DenseCRF of each such mask against the rest; earlier clusters win. What none has is nothing, the background
   class's where there is one.
Deviations: the authors let only the nouns of BLIP's caption of the picture stay, here all names of the vocabulary do;
names of the background class are found as the others. CLIP is the model's own, theirs is ViT-B/32.
Choices: scikit-learn starts k-means by chance (k-means++); here a seed does, the same rule with one draw for a centre.
The code is a re-implementation by one of the authors; no number is printed with it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.base import column, rgb
from ..grid_spar import upsample
from ..networks.diffusion import Attention
from ..refinement import dense_crf
from ..segmentation_spar import ScoreMaps
from .generative import DiffusionSegmenter
from .nothing import scores_with_nothing

COARSER = 4  # than the latent's grid
CRF = dense_crf.Settings(steps=10, near_weight=5.0, near_px=20.0, alike_weight=100.0, alike_px=20.0, alike_colour=20.0)
SURE = 0.9  # how probable a pixel's own side of a mask is to the field
MAX_ROUNDS = 300  # of k-means


@dataclass(frozen=True)
class Settings:
    """FreeSeg-Diff's constants (the code's configuration).

    Attributes:
        side_px: of the square that the diffusion model sees, 512; 0 is the network's own.
        step: of its training, 0 to 999.
        seed: of the noise and of k-means.
        clusters: of the picture.
        crf: of the DenseCRF.
    """

    side_px: int = 0
    step: int = 0
    seed: int = 0
    clusters: int = 4
    crf: dense_crf.Settings = CRF


class Segmenter(DiffusionSegmenter):
    """FreeSeg-Diff; see the head of the file, and `DiffusionSegmenter`."""

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`; names stand alone where no templates are given."""
        return super().encode_labels(labels, templates or ("{}",), unlabelled)

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        image_hw = (image.shape[2], image.shape[3])
        clusters = kmeans(self.queries(image).flatten(1).T, self.settings.clusters, self.settings.seed)
        side = round(len(clusters) ** 0.5)
        ids = F.interpolate(clusters.view(1, 1, side, side).float(), size=image_hw, mode="nearest")[0, 0].long()
        chosen = names_of(self.probabilities(image, ids, encoded.text_embeds))
        colours = (rgb(image, self.config)[0] * 255).round().clamp(0, 255).byte().permute(1, 2, 0)
        count = len(encoded.labels.names)
        found = torch.full(image_hw, -1, device=self.device)  # the name of each pixel
        for cluster, name in enumerate(chosen):
            if name >= 0:
                mask = self.field(ids == cluster, colours)
                found = torch.where((found < 0) & mask, name, found)

        def masks(names: slice, size_hw: tuple[int, int]) -> Tensor:
            numbers = torch.arange(*names.indices(count), device=self.device)
            return upsample((found == numbers[:, None, None]).float(), size_hw)

        def nothing(size_hw: tuple[int, int]) -> Tensor:
            return upsample((found < 0).float(), size_hw)

        return scores_with_nothing(masks, nothing, encoded.labels, image_hw, self.device)

    def queries(self, image: Tensor) -> Tensor:
        """The queries (C, s / 2, s / 2) of an image (1, 3, H, W)."""
        settings, diffusion = self.settings, self.diffusion
        latent = self.noised(image, settings.step, settings.seed, sampled=True, mode="antialias")
        side = latent.shape[-1] // 2
        kept: list[Tensor] = []

        def keep(attention: Attention) -> None:
            maps = attention.queries.float().transpose(1, 2).flatten(0, 1)  # (heads, N, d) -> (heads * d, N)
            kept.append(upsample(maps.unflatten(1, (attention.side, attention.side)), (side, side)))

        layers = [name for name, coarser in diffusion.layers("attn2").items() if coarser == COARSER]
        diffusion.look(latent, settings.step, diffusion.encode([diffusion.prompt(())]), dict.fromkeys(layers, keep))
        return torch.cat(kept)

    def probabilities(self, image: Tensor, ids: Tensor, text_embeds: Tensor) -> Tensor:
        """How probable each name is to CLIP in each cluster alone, (R, K).

        Args:
            image: (1, 3, H, W).
            ids: (H, W), the cluster of each pixel.
            text_embeds: (K, D).
        """
        config, side = self.config, self.config.image_size
        colours = rgb(image, config).clamp(0, 1)
        short = min(image.shape[2:])
        size_hw = [max(side * length // short, side) for length in image.shape[2:]]
        top, left = ((length - side) // 2 for length in size_hw)
        text, rows = F.normalize(text_embeds.float(), dim=-1).to(self.device), []
        for cluster in range(int(ids.max()) + 1):
            seen = F.interpolate(colours * (ids == cluster), size=size_hw, mode="bicubic", antialias=True).clamp(0, 1)
            seen = seen[:, :, top : top + side, left : left + side]
            pixels = (seen - column(config.image_mean, seen)) / column(config.image_std, seen)
            rows.append(self.encoder.image_embeds(pixels)[0] @ text.T)
        return (torch.stack(rows) * self.model.logit_scale.float().exp()).softmax(dim=1)

    def field(self, mask: Tensor, colours: Tensor) -> Tensor:
        """A mask (H, W) bool after a DenseCRF over colours (H, W, 3)."""
        if mask.all() or not mask.any():
            return mask
        sides = torch.stack([~mask, mask]).float() * (2 * SURE - 1) + (1 - SURE)
        chosen = dense_crf.dense_crf(sides, colours, self.settings.crf)
        return chosen[1] > chosen[0]


def names_of(probabilities: Tensor) -> list[int]:
    """The name of each cluster, -1 for none, of probabilities (R, K)."""
    kept = torch.where(probabilities == probabilities.amax(dim=0), probabilities, 0)
    best = kept.max(dim=1)
    return torch.where(best.values > 0, best.indices, -1).tolist()


def kmeans(rows: Tensor, clusters: int, seed: int) -> Tensor:
    """The cluster of each row (N, C), numbered from 0 without gaps, by k-means with the start of k-means++.

    A centre is drawn in proportion to its squared distance to the nearest centre before it, the first one evenly.

    Raises:
        ValueError: fewer rows than clusters.
    """
    if not 0 < clusters <= len(rows):
        raise ValueError(f"clusters is {clusters}; it must be from 1 to {len(rows)}, the pixels that are clustered.")
    draws = torch.rand(clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    centres = rows[[int(draws[0] * len(rows))]]
    for draw in draws[1:]:
        nearest = squared_distances(rows, centres).amin(dim=1).double().cumsum(dim=0)
        drawn = int(torch.searchsorted(nearest, draw * nearest[-1], right=True))
        centres = torch.cat([centres, rows[[min(drawn, len(rows) - 1)]]])
    place = squared_distances(rows, centres).argmin(dim=1)
    for _ in range(MAX_ROUNDS):
        place = place.unique(return_inverse=True)[1]
        counts = place.bincount()
        centres = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, place, rows) / counts[:, None]
        nearer = squared_distances(rows, centres).argmin(dim=1)
        if torch.equal(nearer, place):
            break
        place = nearer
    return place.unique(return_inverse=True)[1]


def squared_distances(rows: Tensor, centres: Tensor) -> Tensor:
    """(N, C) and (R, C) -> (N, R), in the difference form."""
    return torch.stack([(rows - centre).square().sum(dim=1) for centre in centres], dim=1)
