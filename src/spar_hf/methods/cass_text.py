"""CASS with its text side: names pulled towards the image, and the image as a whole in every score.

Paper: "Distilling Spectral Graph for Object-Context Aware Open-Vocabulary Semantic Segmentation", Kim et al., CVPR
2025, section 3.4. A label method around the features of `cass`. Names are clustered once (Ward's linkage of their
cosine distances, cut at a height). In each cluster the name t most similar to the image's class token g becomes
(1 - alpha) t + alpha m at length one, m the direction of the mean of the two patches most similar to t. Scores are
(1 - gamma) patch t + gamma g t, the latter with the name as it was. In windows, patches are the window's and g is of
the whole image; scores are averaged pixel by pixel. On Cityscapes theirs takes the window's g, which is not here.
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16, DINO ViT-B/8 and PAMR.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..extras import extra_package
from ..grid_spar import coverage
from ..processing_spar import LabelFeatures
from ..segmentation_spar import GridScores, ScoreMaps
from ..segmenters import SlidingScores
from . import cass
from .segmenter import MethodSegmenter

ALIKE_PATCHES = 2  # whose mean a name is pulled towards


@dataclass(frozen=True)
class Settings(cass.Settings):
    """CASS's constants beside those of its features (the authors' configuration for VOC21).

    Attributes:
        image_weight: gamma; Context, Object .25, VOC20 .4, Stuff .2, Cityscapes .1, ADE20K .3.
        patch_weight: alpha; Context .04, Object .01, VOC20, Cityscapes .03, Stuff .02, ADE20K .05.
        height: where clusters are cut; Context .09, Object, VOC20 .1, Stuff .02, Cityscapes .14, ADE20K .06.
        windows: in the method's window; the authors do but for VOC21.
    """

    image_weight: float = 0.1
    patch_weight: float = 0.03
    height: float = 0.1
    windows: bool = False


@dataclass(frozen=True, eq=False)
class CassTexts(LabelFeatures):
    """A vocabulary, its text features and their clusters.

    Attributes:
        clusters: the names of each cluster.
    """

    clusters: tuple[tuple[int, ...], ...]


class Segmenter(MethodSegmenter):
    """CASS with its text side; see the head of the file.

    Args:
        model: has the text tower.
        processor: its `SparProcessor`.
        vision: CLIP's vision tower.
        networks: "dino": see `cass.Encoder`.
        settings: the method's constants.
        method: the row's name.
    """

    encoder_class = cass.Encoder

    def __repr__(self) -> str:
        return f"{self.config.method}({self.settings}, {self.encoder.dino!r})"

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`."""
        if isinstance(labels, CassTexts):
            return labels
        plain = super().encode_labels(labels, templates)
        return CassTexts(plain.labels, plain.text_embeds, clusters_of(plain.text_embeds, self.settings.height))

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `CassTexts`."""
        texts: CassTexts = encoded
        image = image.to(self.dtype)
        g = self.encoder.image_embeds(image)[0]

        def scored(crops: Tensor, encoded: CassTexts) -> list[ScoreMaps]:
            return [self.scores(crop, g, encoded) for crop in crops.split(1)]

        if not self.settings.windows:
            return scored(image, texts)[0]
        window_px = self.config.window_px or self.config.image_size
        sliding: Any = SlidingScores(scored, window_px, self.config.stride_px)  # type: ignore[arg-type]
        return sliding(image, texts)[0]

    def scores(self, image: Tensor, g: Tensor, texts: CassTexts) -> GridScores:
        """The scores of an image or a window (1, 3, H, W), given the whole image's class token (D) at length one."""
        settings, outputs = self.settings, self.encoder(image)
        patches = F.normalize(outputs.patch_embeds[0].float(), dim=-1)  # (h, w, D)
        names = F.normalize(texts.text_embeds.float(), dim=-1).to(patches.device)
        of_image, pulled = names @ g, names.clone()
        for cluster in texts.clusters:
            name = cluster[int(of_image[list(cluster)].argmax())]
            flat = patches.flatten(0, 1)
            nearest = (flat @ names[name]).topk(min(ALIKE_PATCHES, len(flat))).indices
            mean = F.normalize(flat[nearest].mean(dim=0), dim=0)
            pulled[name] = F.normalize(torch.lerp(names[name], mean, settings.patch_weight), dim=0)
        found = torch.einsum("kd,ijd->kij", pulled, patches)
        found = torch.lerp(found, of_image[:, None, None].expand_as(found), settings.image_weight)
        covered = coverage(outputs.image_hw, outputs.extent_hw)
        return GridScores.of(found, (image.shape[2], image.shape[3]), coverage_hw=covered)


def clusters_of(text_embeds: Tensor, height: float) -> tuple[tuple[int, ...], ...]:
    """Ward clusters of names (K, D), L2-normalised, by their cosine distances, cut at a height."""
    if len(text_embeds) == 1:
        return ((0,),)
    hierarchy = extra_package("scipy.cluster.hierarchy", "vfm")
    unit = F.normalize(text_embeds.double().cpu(), dim=-1)
    first, second = torch.triu_indices(len(unit), len(unit), offset=1)
    distances = (1 - (unit[first] * unit[second]).sum(dim=1)).clamp(min=0)
    numbers = hierarchy.fcluster(hierarchy.linkage(distances.numpy(), method="ward"), height, criterion="distance")
    return tuple(tuple((numbers == number).nonzero()[0].tolist()) for number in sorted(set(numbers.tolist())))
