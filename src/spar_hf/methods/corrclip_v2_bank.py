"""CorrCLIP v2 with its memory bank: regions take over the CLIP features of regions that look alike elsewhere.

Authors' code: github.com/zdk258/CorrCLIP, the journal extension of CorrCLIP; corrclip_v2.py is the part without the
bank. A label method.
Bank, `spar prototypes --method corrclip_v2_bank`, of pictures without labels: for each region, the mean over its
pixels of the second network's dense features, each of length one; and the mean, at length one, of CLIP's features as
CorrCLIP makes them with q + k of DINO ViT-B/8 (network `bank_dino`), without united regions.
1. A region of the image, what lies in no region being one too, finds the 20 entries nearest to its own mean of dense
   features by inner product. The mean of their CLIP features, at length one, times the names is its support.
2. The scores are half those of CorrCLIP v2 and half the support of the pixel's region.
Left out: the second CLIP (DFN ViT-B/16), whose support the authors average with this one.
Deviations: those of corrclip.py and corrclip_v2.py; the search is exact, theirs approximate (IVFPQ).
To reach: the numbers in `spar_hf.published`, with MetaCLIP ViT-B/16, DFN ViT-B/16, C-RADIOv3-L, regions of all
COCO pictures and mask-vote; the pictures of the bank at a shorter side of 448 px.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..grid_spar import upsample
from ..segmentation_spar import FullScores, ScoreMaps
from . import corrclip, corrclip_v2
from .bank import Bank, MethodPrototypes, Reference, Rows, nearest, pixel_means
from .segmenter import MethodSegmenter


@dataclass(frozen=True)
class Settings(corrclip_v2.Settings):
    """CorrCLIP v2's constants (the authors' code).

    Attributes:
        neighbours: entries that a region looks up.
        support: their weight in the scores.
    """

    neighbours: int = 20
    support: float = 0.5


class Segmenter(MethodSegmenter):
    """CorrCLIP v2 with its memory bank; see the head of the file. Networks: `dino` and `regions` as `corrclip_v2`, and
    `bank`, a file of `spar prototypes`."""

    encoder_class = corrclip_v2.Encoder
    bank: Bank

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        return {"bank": Bank.of}

    def prepare(self) -> None:
        networks = {"dino": self.encoder.dino, "clip": self.model.vision_model}
        self.bank.check(self.config.method, {}, networks)
        self.entries: dict[str, Tensor] = {}  # the bank's, at length one, where they were last wanted

    def __repr__(self) -> str:
        return f"{self.config.method}({self.encoder!r}, {self.bank!r})"

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        encoder, settings = self.encoder, self.settings
        image, image_hw = image.to(self.dtype), (image.shape[2], image.shape[3])
        text = F.normalize(encoded.text_embeds.float(), dim=-1).to(self.device)
        seen = encoder.whole(image)
        ids = encoder.regions(image, self.config).map
        own = torch.einsum("kd,dhw->khw", text, F.normalize(encoder.of_image(image, seen).float(), dim=0))
        _, means = pixel_means(seen[0], ids, unit=True)
        entries = self.normalised_entries()
        _, found = nearest(F.normalize(means, dim=-1), entries["features"], settings.neighbours)
        support = text @ F.normalize(entries["clip"][found].mean(dim=1), dim=-1).T  # (K, R)
        place = ids.unique(return_inverse=True)[1]

        def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
            maps = torch.lerp(upsample(own[names], image_hw), support[names][:, place], settings.support)
            return upsample(maps, size_hw)

        return FullScores(
            make=make, size_hw=image_hw, num_names=len(text), device=image.device,
            patches_hw=(own.shape[1], own.shape[2]),
        )  # fmt: skip

    def normalised_entries(self) -> dict[str, Tensor]:
        """The bank's features and CLIP features at length one, where the tower is; made once."""
        if not self.entries or self.entries["clip"].device != self.device:
            self.entries = {
                name: F.normalize(self.bank.tensors[name].to(self.device).float(), dim=-1)
                for name in ("features", "clip")
            }
        return self.entries


class Prototypes(MethodPrototypes):
    """One entry for each region of each picture. Networks: `dino` and `regions` as `corrclip_v2`; `bank_dino`."""

    encoder_class = corrclip_v2.Encoder

    def __init__(self, model: Any, processor: Any, vision: Any, networks: Any, *rest: Any, **settings: Any) -> None:
        super().__init__(model, processor, vision, networks, *rest, **settings)
        own = {field.name: getattr(self.settings, field.name) for field in fields(corrclip.Settings)}
        second = {"dino": networks["bank_dino"], "regions": self.encoder.regions}
        self.clip_features = corrclip.Encoder(vision, second, corrclip.Settings(**own), self.config.method)

    @property
    def made_with(self) -> dict[str, nn.Module]:
        return {"dino": self.encoder.dino, "clip": self.model.vision_model}

    def of_picture(self, reference: Reference) -> Rows:
        """See `MethodPrototypes`."""
        image = reference.pixels.to(self.dtype)
        ids = self.encoder.regions(image, self.config).map
        numbers, means = pixel_means(self.encoder.whole(image)[0], ids, unit=True)
        _, clip = pixel_means(self.clip_features.of_image(image).float(), ids)
        real = numbers != 0
        return {"features": means[real].cpu(), "clip": F.normalize(clip[real], dim=-1).cpu()}
