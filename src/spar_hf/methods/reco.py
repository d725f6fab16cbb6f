"""ReCo: each name retrieves pictures, what they have in common is its prototype, and the prototype finds it again.

Paper: "ReCo: Retrieve and Co-segment for Zero-shot Transfer", Shin et al., NeurIPS 2022. A label method.
Bank, `spar prototypes --method reco`: for each name,
1. CLIP retrieves the 50 pictures whose image embeddings are nearest to its text. Each is a square of 384 px.
2. x = the second network's patches of them all; the weight of a patch is sigmoid(10 cos(dense CLIP, text)), times
   1 - sigmoid(cos(x, c)) for each context vector c: those of tree, sky, building, road and person, each found likewise
   with those before it as context. A name that is one of them has its vector.
3. G = cos(x, x) times the weight of the column; a patch's value is the mean over pictures of its largest G in each. A
   picture's seed is its patch of largest value. The prototype is the mean of the seeds, at length one.
Then the score of a pixel is sigmoid(cos(x, prototype)) sigmoid(10 cos(dense CLIP, text)), both bilinear.
As the authors' code (`released`): a picture's block of columns ends at its own end plus its beginning, so that it runs
into the next ones; prototypes move by 0.1 to 0.3. False takes the picture's own columns. G is made picture by picture.
Deviations: the pictures are one's own, theirs ImageNet's; dense CLIP is MaskCLIP's last block of the model, theirs an
RN50x16; the second network is any ViT, theirs a DeiT-S/16 trained on stylised images; neither has a class in
transformers. Their rule that "vegetation" is "tree" is not here. Where the pictures lie in folders of their class, a
name looks in its own.
To reach: no numbers without their networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoders.base import rgb
from ..grid_spar import coverage, upsample
from ..networks.clip import open_clip
from ..networks.vit import ViT
from ..processing_spar import LabelFeatures
from ..prompts_spar import Labels
from ..segmentation_spar import FullScores, ScoreMaps
from .bank import Bank, MethodPrototypes, Reference, Rows, Steps, joined
from .car import centre_square
from .segmenter import MethodParts, MethodSegmenter

TEXT_SHARPNESS = 10.0  # of the sigmoid of CLIP's cosines
KEPT = 64  # pictures whose patches are at hand for the next name, about 2 MB each


@dataclass(frozen=True)
class Settings:
    """ReCo's constants (section 3 and the authors' code).

    Attributes:
        pictures: that a name retrieves.
        side_px: of the squares they are.
        context: names that are no part of others.
        released: the columns of a picture as the authors' code has them.
    """

    pictures: int = 50
    side_px: int = 384
    context: tuple[str, ...] = ("tree", "sky", "building", "road", "person")
    released: bool = True


@dataclass(frozen=True, eq=False)
class RecoTexts(LabelFeatures):
    """A vocabulary, its text features and its prototypes.

    Attributes:
        prototypes: (K, F), at length one.
    """

    prototypes: Tensor


class DenseClip:
    """The model's dense CLIP on an image (1, 3, H, W)."""

    def __init__(self, parts: MethodParts, image: Tensor) -> None:
        encoder = parts.encoder
        tokens, self.grid_hw, extent_hw = encoder.embed(image.to(parts.dtype))
        patches = encoder.maskclip(encoder.run_to_last(tokens, self.grid_hw))[0].float()
        self.unit = F.normalize(patches, dim=-1)  # (N, D)
        self.coverage_hw = coverage((image.shape[2], image.shape[3]), extent_hw)

    def weights(self, text: Tensor) -> Tensor:
        """sigmoid(10 cos) with texts (K, D) at length one: (K, h, w)."""
        return (TEXT_SHARPNESS * text.to(self.unit.device) @ self.unit.T).sigmoid().unflatten(1, self.grid_hw)


class Segmenter(MethodSegmenter):
    """ReCo; see the head of the file. Networks: `dino`, any ViT, and `bank`, a file of `spar prototypes`."""

    dino: ViT
    bank: Bank

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        return {"dino": ViT.of, "bank": Bank.of}

    def prepare(self) -> None:
        self.bank.check(self.config.method, {}, {"dino": self.dino})

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`.

        Raises:
            ValueError: the bank lacks a name.
        """
        if isinstance(labels, RecoTexts):
            return labels
        plain = super().encode_labels(labels, templates)
        places = self.bank.places(plain.labels)
        missing = [name for number, name in enumerate(plain.labels.names) if number not in places]
        if missing:
            raise ValueError(self.bank.missing(missing))
        prototypes = self.bank.features[[places[number] for number in range(len(places))]].float()
        return RecoTexts(plain.labels, plain.text_embeds, prototypes)

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `RecoTexts`."""
        image_hw = (image.shape[2], image.shape[3])
        text = F.normalize(encoded.text_embeds.float(), dim=-1)
        clip = DenseClip(self, image)
        of_text = clip.weights(text)
        seen = self.dino(image.to(self.dtype), self.config)
        unit = F.normalize(seen.features[0].float(), dim=0)
        alike = torch.einsum("kf,fhw->khw", encoded.prototypes.to(unit.device), unit).sigmoid()
        covered = coverage(image_hw, seen.extent_hw)

        def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
            product = upsample(alike[names], image_hw, covered) * upsample(of_text[names], image_hw, clip.coverage_hw)
            return upsample(product.log(), size_hw)

        return FullScores(
            make=make, size_hw=image_hw, num_names=len(text), device=image.device, logit_scale=1.0,
            patches_hw=clip.grid_hw,
        )  # fmt: skip


class Prototypes(MethodPrototypes):
    """Retrieval and co-segmentation. Networks: `dino`; `retriever`, a whole CLIP, or else the model."""

    dino: ViT

    def __init__(self, model: Any, processor: Any, vision: Any, networks: Any, *rest: Any, **settings: Any) -> None:
        super().__init__(model, processor, vision, networks, *rest, **settings)
        self.kept: dict[int, tuple[Tensor, DenseClip]] = {}
        self.retriever, self.reader = model, processor
        if "retriever" in networks:
            self.retriever, self.reader = open_clip(networks["retriever"], processor)
            self.retriever.to(vision.device, vision.dtype)

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        return {"dino": ViT.of}

    def prepare(self) -> None:
        settings = self.settings
        if settings.pictures < 1 or settings.side_px < self.dino.patch_px:
            raise ValueError(
                f"method {self.config.method!r} takes pictures {settings.pictures}, side_px {settings.side_px}; there "
                f"must be 1 picture and a patch ({self.dino.patch_px} px) at least."
            )

    @property
    def made_with(self) -> dict[str, nn.Module]:
        return {"dino": self.dino}

    def square(self, reference: Reference, side_px: int) -> np.ndarray:
        """The middle of a picture as a square, (S, S, 3) uint8."""
        colours = (rgb(reference.pixels, self.config)[0] * 255).round().clamp(0, 255).byte()
        return centre_square(np.ascontiguousarray(colours.permute(1, 2, 0).cpu().numpy()), side_px)

    def normalised(self, square: np.ndarray, config: Any) -> Tensor:
        """(S, S, 3) uint8 -> pixels (1, 3, S, S)."""
        mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (config.image_mean, config.image_std))
        pixels = torch.from_numpy(np.ascontiguousarray(square)).permute(2, 0, 1)[None] / 255
        return ((pixels - mean) / std).to(self.device)

    def of_picture(self, reference: Reference) -> Rows:
        """The picture's image embedding for the retrieval, and the class of its folder."""
        vision = self.retriever.vision_model
        pixels = self.normalised(self.square(reference, vision.config.image_size), vision.config)
        embeds = vision(pixels.to(vision.dtype)).image_embeds.float()
        classes = reference.target.unique()
        return {
            "embeds": F.normalize(embeds, dim=-1).cpu(),
            "class": classes if len(classes) == 1 else torch.tensor([-1]),
        }

    def gathered(
        self, rows: list[Rows], read: Callable[[int], Reference], labels: Labels | None, steps: Steps
    ) -> tuple[Rows, list[str]]:
        """See `MethodPrototypes`."""
        if labels is None:
            raise ValueError(f"method {self.config.method!r} makes a prototype for each name; give --labels.")
        context, every = list(self.settings.context), joined(rows)
        names = list(dict.fromkeys(labels.names))
        ids = dict(zip(labels.names, labels.class_ids, strict=True))  # negative: a name of no class
        texts = self.texts([*context, *names])

        def of_context(number: int, before: list[Rows]) -> Rows:
            return self.of_name(texts[number], None, before, every, read)

        found = steps("context", len(context), of_context)
        known = {name.casefold(): row for name, row in zip(context, found, strict=True)}

        def work(number: int, before: list[Rows]) -> Rows:
            name = names[number]
            class_id = ids[name] if ids[name] >= 0 else None
            return known.get(name.casefold()) or self.of_name(
                texts[len(context) + number], class_id, found, every, read
            )

        made = joined(steps("names", len(names), work))
        return {**made, "name": torch.arange(len(names))}, names

    def seen(self, number: int, read: Callable[[int], Reference]) -> tuple[Tensor, DenseClip]:
        """The second network's patches (F, h, w) of a picture's square, and CLIP's; the last pictures' are kept."""
        if number not in self.kept:
            pixels = self.normalised(self.square(read(number), self.settings.side_px), self.config)
            features = self.dino(pixels.to(self.dtype), self.config).features[0].float()
            if len(self.kept) == KEPT:
                del self.kept[next(iter(self.kept))]
            self.kept[number] = features, DenseClip(self, pixels)
        return self.kept[number]

    def texts(self, names: list[str]) -> list[tuple[Tensor, Tensor]]:
        """The texts of each name: the retriever's (D), and the model's (1, D')."""
        alone = Labels(tuple((name,) for name in names))
        ours = self.processor.encode_labels(self.model, alone).text_embeds
        own = self.retriever is self.model
        theirs = ours if own else self.reader.encode_labels(self.retriever, alone).text_embeds
        return list(zip(theirs.cpu(), ours[:, None], strict=True))

    def of_name(
        self,
        texts: tuple[Tensor, Tensor],
        class_id: int | None,
        context: list[Rows],
        pictures: Rows,
        read: Callable[[int], Reference],
    ) -> Rows:
        """The prototype of a name, `features` (1, F), given its texts and the vectors of the context."""
        wanted, text = texts
        some = torch.arange(len(pictures["class"]))
        if class_id is not None and (pictures["class"] == class_id).any():
            some = some[pictures["class"] == class_id]
        order = (pictures["embeds"][some] @ wanted).argsort(descending=True, stable=True)
        chosen = some[order[: self.settings.pictures]].tolist()
        known = torch.cat([row["features"] for row in context]).to(self.device) if context else None
        maps, weights = [], []
        for number in chosen:
            features, clip = self.seen(number, read)
            weight = upsample(clip.weights(text), (features.shape[1], features.shape[2]), clip.coverage_hw)[0]
            if known is not None:
                cosine = torch.einsum("cf,fhw->chw", known, F.normalize(features, dim=0))
                weight = weight * (1 - cosine.sigmoid()).prod(dim=0)
            maps.append(features.flatten(1).T)
            weights.append(weight.flatten())
        return {"features": common(torch.stack(maps), torch.stack(weights), self.settings.released)[None].cpu()}


def common(features: Tensor, weights: Tensor, released: bool) -> Tensor:
    """What pictures have in common, at length one, (F).

    Args:
        features: (n, N, F), patches of the pictures.
        weights: (n, N), of the patches as columns.
        released: see `Settings`.
    """
    count, patches, _ = features.shape
    unit = F.normalize(features, dim=-1)
    columns, column_weights = unit.flatten(0, 1), weights.flatten()
    seeds = []
    for number in range(count):
        similar = unit[number] @ columns.T * column_weights  # (N, n * N)
        # Column block of picture j: its own N, or as released from its start to start + end.
        ends = [(2 * j + 1 if released else j + 1) * patches for j in range(count)]
        best = torch.stack([similar[:, j * patches : end].amax(dim=1) for j, end in enumerate(ends)])
        seeds.append(features[number, best.mean(dim=0).argmax()])
    return F.normalize(torch.stack(seeds).mean(dim=0), dim=0)
