"""kNN-CLIP: regions are named by their neighbours in a bank of labelled regions, where these are sure enough.

Paper: "kNN-CLIP: Retrieval Enables Training-Free Segmentation on Continually Expanding Large Vocabularies", Gui et
al., TMLR 2024. A label method. The authors' code is not public; what is built here is what the paper's text says:
1. Bank: for each labelled region of one's own pictures, the mean of DINOv2's patches in it, and its name.
   `spar prototypes --method knn_clip` makes it.
2. P_ret of a region: among the k entries with the largest cosine, the share of each name.
3. P = weight P_ret + (1 - weight) P_base where the largest share is at least a threshold; else P_base.
Not established, so that there are no defaults: the size of DINOv2, k, the threshold and the weight (`--set`). Not
established and decided here: shares count each neighbour once; the threshold is on P_ret. The authors' base is
FC-CLIP, which is trained; here it is any recipe of CLIP's last block, its probabilities averaged in the region, and
regions are not FC-CLIP's masks but any (`networks.masks`). Pixels in no region have the base's scores. Entries whose
name is not in the vocabulary don't vote.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..grid_spar import coverage, upsample
from ..methods_spar import find_recipe
from ..networks.masks import SamSettings, region_source
from ..networks.vit import ViT
from ..processing_spar import LabelFeatures
from ..results_spar import COSINE_SCALE
from ..segmentation_spar import FullScores, ScoreMaps
from .bank import Bank, MethodPrototypes, Reference, Rows, nearest, pixel_means
from .nothing import LOWEST
from .segmenter import MethodSegmenter


@dataclass(frozen=True)
class Settings:
    """kNN-CLIP's numbers. The first three have no default, since the paper's are not established.

    Attributes:
        neighbours: k.
        threshold: the least share of the commonest name, 0 to 1.
        weight: of the neighbours, 0 to 1.
        base: the recipe of CLIP's last block that makes the base's scores.
        logit_scale: factor on the base's cosines.
    """

    neighbours: int = 0
    threshold: float = -1.0
    weight: float = -1.0
    base: str = "sclip"
    logit_scale: float = COSINE_SCALE


@dataclass(frozen=True, eq=False)
class KnnTexts(LabelFeatures):
    """A vocabulary, its text features, and the entries that may vote.

    Attributes:
        features: (M, F), at length one.
        votes: (M), the number of the name that each votes for.
    """

    features: Tensor
    votes: Tensor


class Segmenter(MethodSegmenter):
    """kNN-CLIP; see the head of the file. Networks: `dino`, any ViT; `regions`; `bank`, a file of `spar prototypes`.

    Raises:
        ValueError: beside what `MethodParts` says, a number is missing or out of range.
    """

    dino: ViT
    regions: Any
    bank: Bank

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        return {"dino": ViT.of, "regions": lambda given: region_source(given, SamSettings()), "bank": Bank.of}

    def prepare(self) -> None:
        settings = self.settings
        if settings.neighbours < 1 or not 0 <= settings.threshold <= 1 or not 0 <= settings.weight <= 1:
            raise ValueError(
                f"method {self.config.method!r} needs neighbours (at least 1), threshold and weight (0 to 1), which "
                "its paper leaves open; give --set neighbours=N --set threshold=T --set weight=W."
            )
        find_recipe(settings.base)
        self.bank.check(self.config.method, {}, {"dino": self.dino})

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`.

        Raises:
            ValueError: the bank has none of the names.
        """
        if isinstance(labels, KnnTexts):
            return labels
        plain = super().encode_labels(labels, templates)
        places = self.bank.places(plain.labels)
        if not places:
            raise ValueError(self.bank.missing(plain.labels.names))
        votes = torch.full((len(self.bank.names),), -1)
        votes[list(places.values())] = torch.tensor(list(places))
        votes = votes[self.bank.tensors["name"]]
        features = F.normalize(self.bank.features[votes >= 0].float(), dim=-1)
        return KnnTexts(plain.labels, plain.text_embeds, features, votes[votes >= 0])

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `KnnTexts`."""
        image_hw, encoder, settings = (image.shape[2], image.shape[3]), self.encoder, self.settings
        tokens, grid_hw, extent_hw = encoder.embed(image.to(self.dtype))
        patches = encoder.by_recipe(settings.base, encoder.run_to_last(tokens, grid_hw), grid_hw)[0].float()
        text = F.normalize(encoded.text_embeds.float(), dim=-1).to(self.device)
        base = (settings.logit_scale * F.normalize(patches, dim=-1) @ text.T).softmax(dim=-1)
        base = base.T.unflatten(1, grid_hw)  # (K, h, w)
        covered = coverage(image_hw, extent_hw)

        ids = self.regions(image.to(self.dtype), self.config).map  # (H, W), 0 is none
        _, found = pixel_means(base, ids, covered)  # (R, K)
        place = ids.unique(return_inverse=True)[1]
        own = self.of_neighbours(dino_means(self.dino, image, ids, self.config), encoded)
        sure = own.amax(dim=1, keepdim=True) >= settings.threshold
        found = torch.where(sure, torch.lerp(found, own, settings.weight), found)
        outside = ids == 0

        def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
            plain = upsample(base[names], image_hw, covered)
            maps = torch.where(outside, plain, found[:, names].T[:, place])
            return upsample(maps, size_hw).clamp(min=LOWEST).log()

        return FullScores(
            make=make, size_hw=image_hw, num_names=len(text), device=image.device, logit_scale=1.0, patches_hw=grid_hw
        )

    def of_neighbours(self, regions: Tensor, texts: KnnTexts) -> Tensor:
        """The share of each name (R, K) among the entries nearest to regions (R, F)."""
        entries, votes = texts.features.to(regions.device), texts.votes.to(regions.device)
        _, found = nearest(F.normalize(regions, dim=-1), entries, self.settings.neighbours)
        return F.one_hot(votes[found], len(texts.labels.names)).float().mean(dim=1)


class Prototypes(MethodPrototypes):
    """One entry for each class in each picture: the mean of the patches where its mask says it is."""

    dino: ViT

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        return {"dino": ViT.of}

    @property
    def made_with(self) -> dict[str, nn.Module]:
        return {"dino": self.dino}

    def of_picture(self, reference: Reference) -> Rows:
        """See `MethodPrototypes`."""
        ids = reference.target.to(reference.pixels.device)
        means = dino_means(self.dino, reference.pixels, ids, self.config)
        classes = ids.unique()
        return {"features": means[classes >= 0].cpu(), "name": classes[classes >= 0].cpu()}


def dino_means(dino: ViT, image: Tensor, ids: Tensor, config: Any) -> Tensor:
    """The mean (R, F) over the pixels of each region (H, W) of the second network's patches of an image."""
    seen = dino(image.to(dino.dtype), config)
    covered = coverage((image.shape[2], image.shape[3]), seen.extent_hw)
    return pixel_means(seen.features[0].float(), ids, covered)[1]
