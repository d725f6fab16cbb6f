"""DiffCut: segments by recursive normalised cuts of the UNet's features, named by CLIP.

Paper: "DiffCut: Catalyzing Zero-Shot Semantic Segmentation with Diffusion Features and Recursive Normalized Cut",
Couairon et al., NeurIPS 2024. A label method.
1. The image, squashed to a square, becomes a latent under the noise of step 50; no words. F is what the last self
   attention of the way down gives, before its residual, at length one: 32 x 32 pixels at 1024 px.
2. Affinities F F', brought to 0..1 over all pairs, to the power of ten. A set of pixels is cut in two by the second
   eigenvector y of the normalised Laplacian, at the best of a hundred thresholds; where the cost of the cut is below
   tau, both sides are cut again. See `cut`.
3. A segment's vector is the mean of its F; F comes to the pixels bilinearly and each takes the segment with the
   largest product.
4. A segment takes the name whose text (the mean of fourteen templates) has the largest cosine with its mean CLIP
   feature. The background is a class as others are.
As released: below the first cut, pixels whose row of affinities holds any zero are left out, which is meant for what
was done before, but is also the pair of the least affinity of all (`drop_zeros`).
Deviations: the authors name segments by OpenCLIP's ConvNeXt-L, the mean of its last stage in the mask and then its
head; here it is the mean over the segment's pixels of the features of the model's own CLIP (MaskCLIP's last block),
bilinear. Their PAMR is a refinement (`--refine pamr`), and acts on the names' scores.
No published number is with ViT-B/16.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid_spar import coverage, upsample
from ..networks.diffusion import Diffusion
from ..segmentation_spar import FullScores, ScoreMaps
from .bank import pixel_means
from .generative import DiffusionSegmenter

# ViLD's, as in the authors' code.
TEMPLATES = (
    "a photo of a {}.", "This is a photo of a {}", "There is a {} in the scene", "There is the {} in the scene",
    "a photo of a {} in the scene", "a photo of a small {}.", "a photo of a medium {}.", "a photo of a large {}.",
    "This is a photo of a small {}.", "This is a photo of a medium {}.", "This is a photo of a large {}.",
    "There is a small {} in the scene.", "There is a medium {} in the scene.", "There is a large {} in the scene.",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """DiffCut's constants (the authors' defaults).

    Attributes:
        side_px: of the square that the diffusion model sees, 1024; 0 is the network's own.
        step: of its training, 0 to 999.
        seed: of the noise.
        power: alpha, of the affinities.
        tau: cost of a cut above which a set stays whole.
        thresholds: that are tried for each cut.
        drop_zeros: as released, see the head of the file.
        templates: of the names.
    """

    side_px: int = 0
    step: int = 50
    seed: int = 42
    power: float = 10.0
    tau: float = 0.5
    thresholds: int = 100
    drop_zeros: bool = True
    templates: tuple[str, ...] = TEMPLATES


class Segmenter(DiffusionSegmenter):
    """DiffCut; see the head of the file, and `DiffusionSegmenter`."""

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`; the templates are ViLD's where none are given."""
        return super().encode_labels(labels, templates or self.settings.templates, unlabelled)

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        features = self.features(image)
        scores = segment_scores(features, self.segments(features))  # (R, h, w)
        image_hw = (image.shape[2], image.shape[3])
        ids = upsample(scores, image_hw).argmax(dim=0)
        tokens, grid_hw, extent_hw = self.encoder.embed(image.to(self.dtype))
        clip = self.encoder.maskclip(self.encoder.run_to_last(tokens, grid_hw))[0].float().T.unflatten(1, grid_hw)
        numbers, means = pixel_means(clip, ids, coverage(image_hw, extent_hw))
        text = F.normalize(encoded.text_embeds.float(), dim=-1).to(self.device)
        # A segment that has no pixel of the picture has none at a finer size but by rounding: it gets no name.
        cosines = torch.full((len(text), len(scores)), -1.0, device=self.device)
        cosines[:, numbers] = text @ F.normalize(means, dim=-1).T

        def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
            place = ids if size_hw == image_hw else upsample(scores, size_hw).argmax(dim=0)
            return cosines[names][:, place]

        grid_hw = (scores.shape[1], scores.shape[2])
        return FullScores(make=make, size_hw=image_hw, num_names=len(text), device=self.device, patches_hw=grid_hw)

    def features(self, image: Tensor) -> Tensor:
        """F (C, h, w) of an image (1, 3, H, W), at length one."""
        latent = self.noised(image, self.settings.step, self.settings.seed)
        return own_features(self.diffusion, latent, self.settings.step)

    def segments(self, features: Tensor) -> Tensor:
        """The segment of each pixel of features (C, h, w) at length one: (h, w) int64, numbered from 0."""
        settings = self.settings
        unit = features.flatten(1)
        affinity = unit.T @ unit
        low, high = affinity.aminmax()
        if low == high:  # all pixels are alike
            return torch.zeros(features.shape[1:], dtype=torch.int64)
        affinity = ((affinity - low) / (high - low)) ** settings.power
        found = cut(affinity, settings.tau, settings.thresholds, settings.drop_zeros)
        return numbered(found, len(affinity)).view(features.shape[1:])


def own_features(diffusion: Diffusion, noised: Tensor, step: int) -> Tensor:
    """What the last self attention of the way down gives without words, (C, h, w) fp32 at length one."""
    down = [name for name in diffusion.layers("attn1") if name.startswith("down_blocks.")]
    kept: list[Tensor] = []
    texts = diffusion.encode([diffusion.prompt(())])
    diffusion.look(noised, step, texts, {down[-1]: lambda attention: kept.append(attention.output.float())})
    side = round(len(kept[0]) ** 0.5)
    return F.normalize(kept[0], dim=-1).T.unflatten(1, (side, side))


def cut(affinity: Tensor, tau: float, thresholds: int, drop_zeros: bool) -> list[Tensor]:
    """Recursive normalised cuts of a graph.

    Args:
        affinity: (N, N), from 0 to 1, symmetric.
        tau: cost of a cut from which on a set stays whole.
        thresholds: that are tried for each cut.
        drop_zeros: leave out nodes whose row holds a zero, but for the first cut.

    Returns:
        One side of each cut, (N) bool, in the order of the cuts: a cut, those of that side, those of the other.
    """
    every = torch.ones(len(affinity), dtype=torch.bool, device=affinity.device)
    whole = (affinity != 0).all(dim=1) if drop_zeros else every
    found: list[Tensor] = []
    left = [every]  # sets to cut, the next one last: the recursion may be as deep as there are nodes
    while left:
        nodes = left.pop().nonzero()[:, 0]
        if len(nodes) < 2:
            continue
        side, cost = best_cut(affinity[nodes][:, nodes], thresholds)
        if cost < tau:
            one = torch.zeros_like(every)
            one[nodes[side]] = True
            rest = torch.zeros_like(every)
            rest[nodes[~side]] = True
            found.append(one)
            left += [rest & whole, one & whole]
    return found


def best_cut(affinity: Tensor, thresholds: int) -> tuple[Tensor, float]:
    """The cut of a graph (n, n) by its second eigenvector: one side (n) bool, and the cost."""
    degree = affinity.sum(dim=1)
    scale = degree.rsqrt()
    laplacian = torch.diag(degree) - affinity
    vectors = torch.linalg.eigh(scale[:, None] * laplacian * scale).eigenvectors
    second = scale * vectors[:, 1]
    second = second * second[second.abs().argmax()].sign()
    steps = torch.linspace(0, 1, thresholds, device=affinity.device)
    low, high = 0.99 * second.min(), 0.99 * second.max()
    sides = second > (low + (high - low) * steps)[:, None]  # (thresholds, n)
    share = sides.to(degree.dtype) @ degree / degree.sum()
    z = torch.where(sides, 2.0, -2.0 * (share / (1 - share))[:, None])
    costs = (z @ laplacian * z).sum(dim=1) / (z.square() @ degree)
    costs = costs.nan_to_num(nan=torch.inf)  # all on one side
    best = int(costs.argmin())
    return sides[best], float(costs[best])


def numbered(cuts: list[Tensor], count: int) -> Tensor:
    """The segment of each of `count` nodes after cuts in their order, numbered from 0 without gaps."""
    if not cuts:
        return torch.zeros(count, dtype=torch.int64)
    ids = torch.zeros(count, dtype=torch.int64, device=cuts[0].device)
    for one in cuts:  # sets that were ever apart stay so: the numbers above grow with each cut
        ids = ids + one * (int(ids.max()) + 1)
        ids = ids.unique(return_inverse=True)[1]
    return ids


def segment_scores(features: Tensor, segments: Tensor) -> Tensor:
    """Products of each segment's mean feature with features (C, h, w), at length one: (R, h, w)."""
    ids = segments.to(features.device).flatten()
    rows = features.flatten(1).T
    counts = ids.bincount()
    means = rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, ids, rows) / counts[:, None]
    return torch.einsum("rc,chw->rhw", means, features)
