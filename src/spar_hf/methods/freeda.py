"""FreeDA: names find visual prototypes in a bank of references, and prototypes find superpixels.

Paper: "Training-Free Open-Vocabulary Segmentation with Offline Diffusion-Augmented Prototype Generation", Barsellotti
et al., CVPR 2024. A label method.
Bank: for each picture and noun, the mean of DINOv2's patches where the noun is, and the noun's text. The authors draw
the pictures with Stable Diffusion, and its attention says where the noun is; here they are pictures of one's own, and
their masks say it. `spar prototypes --method freeda` makes it.
1. A name's text (CLIP, the mean of seven templates, at length one) finds the 350 entries whose texts have the largest
   inner products with it; the mean of their features is its prototype.
2. In each window of the image, squashed to a square of 518 px for DINOv2: Felzenszwalb's superpixels, and the mean of
   the patches in each; sigmoid(cosine with the prototype). A superpixel without a patch has the patches' values.
3. A pixel's score is 0.8 of that and 0.2 of the cosine of CLIP's image embedding of the window with the text. Windows
   are averaged.
The superpixels' shares of patches are looked up corner on corner (align_corners), as in the authors' code; no
superpixel's mask is made.
Deviations: a search of all entries, theirs is approximate (HNSW).
To reach: no numbers without the authors' bank, which is built with Stable Diffusion from COCO's captions. Theirs have
CLIP ViT-L/14 and DINOv2 ViT-L/14, the shorter side at 448 px, and settings chosen for each data set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoders.base import rgb
from ..encoders.sliding_window import window_starts
from ..extras import extra_package
from ..networks.vit import ViT
from ..processing_spar import LabelFeatures
from ..prompts_spar import Labels, fill_template
from ..segmentation_spar import FullScores, ScoreMaps
from .bank import Bank, MethodPrototypes, Reference, Rows, region_means
from .segmenter import MethodSegmenter

TEMPLATES = (
    "itap of a {}.", "a bad photo of a {}.", "a origami {}.", "a photo of the large {}.", "a {} in a video game.",
    "art of the {}.", "a photo of the small {}.",
)  # fmt: skip


@dataclass(frozen=True)
class Settings:
    """FreeDA's constants (the authors' configuration for Context59 and ADE20K).

    Attributes:
        neighbours: entries whose mean is a prototype.
        side_px: of the square that the second network sees.
        scale, sigma, min_size: of Felzenszwalb's superpixels; VOC20 100, .7, 20, Stuff 100, 1, 100, Cityscapes 20, .5,
            50.
        image_weight: of the window's image embedding.
        templates: of the names.
    """

    neighbours: int = 350
    side_px: int = 518
    scale: float = 100.0
    sigma: float = 1.0
    min_size: int = 20
    image_weight: float = 0.2
    templates: tuple[str, ...] = TEMPLATES


@dataclass(frozen=True, eq=False)
class FreedaTexts(LabelFeatures):
    """A vocabulary, FreeDA's text features (K, D) in `text_embeds`, and its prototypes.

    Attributes:
        prototypes: (K, F), not normalised.
    """

    prototypes: Tensor


class Segmenter(MethodSegmenter):
    """FreeDA; see the head of the file. Networks: `dino`, any ViT, and `bank`, a file of `spar prototypes`.

    Raises:
        ValueError: beside what `MethodParts` says, the bank has not more entries than are looked up.
    """

    dino: ViT
    bank: Bank

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        return {"dino": ViT.of, "bank": Bank.of}

    def prepare(self) -> None:
        settings = self.settings
        check_side(self.config.method, settings.side_px, self.dino)
        self.bank.check(self.config.method, {"side_px": settings.side_px}, {"dino": self.dino})
        if not 0 < settings.neighbours < len(self.bank):
            raise ValueError(
                f"bank {self.bank.path} has {len(self.bank)} entries and neighbours is {settings.neighbours}: all "
                "names would have one prototype. Give --set neighbours=N, at most as many as a name has entries."
            )

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`; templates are FreeDA's own."""
        if isinstance(labels, FreedaTexts):
            return labels
        labels = Labels.parse(labels.labels if isinstance(labels, LabelFeatures) else labels)
        texts = self.texts(labels.names)
        # Entries of one name are alike to a text, to the last bit; the earlier ones come first.
        likeness = (texts @ self.texts(self.bank.names).T)[:, self.bank.tensors["name"]]  # (K, M)
        found = likeness.argsort(dim=1, descending=True, stable=True)[:, : self.settings.neighbours]
        return FreedaTexts(labels, texts, self.bank.features.float()[found].mean(dim=1))

    @torch.no_grad()
    def texts(self, names: Iterable[str]) -> Tensor:
        """(K, D): the mean of the templates' text features as they are, at length one."""
        names, texts = list(names), []
        for first in range(0, len(names), 32):
            some = names[first : first + 32]
            prompts = [fill_template(template, name) for name in some for template in self.settings.templates]
            inputs = self.processor(text=prompts, return_tensors="pt")
            inputs = {name: value.to(self.device) for name, value in inputs.items()}
            found = self.model.get_text_features(**inputs).pooler_output
            texts.append(found.float().unflatten(0, (len(some), -1)).mean(dim=1).cpu())
        return F.normalize(torch.cat(texts), dim=-1)

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `FreedaTexts`."""
        image_hw, config, settings = (image.shape[2], image.shape[3]), self.config, self.settings
        texts, prototypes = (F.normalize(t.to(self.device), dim=-1) for t in (encoded.text_embeds, encoded.prototypes))
        window_px, stride_px = config.window_px or config.image_size, config.stride_px
        window_hw = (min(image_hw[0], window_px), min(image_hw[1], window_px))
        places = list(product(*(window_starts(side, window_px, stride_px) for side in image_hw)))
        windows = []
        for y, x in places:
            crop = image[:, :, y : y + window_hw[0], x : x + window_hw[1]]
            features = dense_features(self.dino, crop, settings.side_px, config)  # (F, h, w)
            ids = self.superpixels(crop)
            weights = corner_weights(ids, (features.shape[1], features.shape[2]))
            means, has_patches = region_means(features, weights)
            patches = torch.einsum("kf,fhw->khw", prototypes, F.normalize(features, dim=0)).sigmoid()
            values = torch.zeros(len(prototypes), len(weights), device=image.device)
            values[:, has_patches] = (prototypes @ F.normalize(means, dim=-1).T).sigmoid()
            windows.append((values, patches, has_patches, ids, texts @ self.image_embeds(crop)))

        def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
            count = torch.zeros(image_hw, device=image.device)
            total = torch.zeros(len(prototypes[names]), *image_hw, device=image.device)
            for (y, x), (values, patches, has_patches, ids, whole) in zip(places, windows, strict=True):
                found = values[names][:, ids]
                if not has_patches.all():
                    bilinear = F.interpolate(patches[names][None], size=window_hw, mode="bilinear", align_corners=True)
                    found = torch.where(has_patches[ids], found, bilinear[0])
                inside = (..., slice(y, y + window_hw[0]), slice(x, x + window_hw[1]))
                total[inside] += torch.lerp(found, whole[names, None, None].expand_as(found), settings.image_weight)
                count[inside] += 1
            return F.interpolate((total / count)[None], size=size_hw, mode="bilinear", align_corners=False)[0]

        return FullScores(make=make, size_hw=image_hw, num_names=len(texts), device=image.device)

    def superpixels(self, image: Tensor) -> Tensor:
        """Felzenszwalb's superpixels of an image (1, 3, H, W): (H, W) int64, numbered from 0."""
        colours = rgb(image, self.config)[0].permute(1, 2, 0).clamp(0, 1).cpu().numpy()
        settings = self.settings
        felzenszwalb = extra_package("skimage.segmentation", "vfm").felzenszwalb
        ids = felzenszwalb(colours, scale=settings.scale, sigma=settings.sigma, min_size=settings.min_size)
        return torch.from_numpy(ids).to(image.device).unique(return_inverse=True)[1]

    def image_embeds(self, image: Tensor) -> Tensor:
        """CLIP's embedding of an image (1, 3, H, W), squashed to the native square: (D), at length one."""
        side = self.config.image_size
        square = F.interpolate(image.float(), size=(side, side), mode="bicubic", align_corners=False)
        embeds: Tensor = self.encoder.image_embeds(square)[0]
        return embeds


class Prototypes(MethodPrototypes):
    """One entry for each class in each picture: the mean of the patches where its mask says it is."""

    dino: ViT
    kept_settings = ("side_px",)

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        return {"dino": ViT.of}

    def prepare(self) -> None:
        check_side(self.config.method, self.settings.side_px, self.dino)

    @property
    def made_with(self) -> dict[str, nn.Module]:
        return {"dino": self.dino}

    def of_picture(self, reference: Reference) -> Rows:
        """See `MethodPrototypes`."""
        features = dense_features(self.dino, reference.pixels, self.settings.side_px, self.config)
        classes, place = reference.target.unique(return_inverse=True)
        weights = corner_weights(place.to(features.device), (features.shape[1], features.shape[2]))
        means, kept = region_means(features, weights)
        classes = classes[kept.cpu()]
        return {"features": means.cpu()[classes >= 0], "name": classes[classes >= 0]}


def check_side(method: str, side_px: int, dino: ViT) -> None:
    if side_px % dino.patch_px or side_px < dino.patch_px:
        raise ValueError(
            f"side_px of method {method!r} is {side_px}; it must be a multiple of the second network's patch "
            f"({dino.patch_px} px)."
        )


def dense_features(dino: ViT, image: Tensor, side_px: int, config: Any) -> Tensor:
    """The second network's patches of an image (1, 3, H, W) squashed to a square: (F, h, w) fp32."""
    square = F.interpolate(image.float(), size=(side_px, side_px), mode="bilinear", align_corners=False)
    return dino(square.to(dino.dtype), config).features[0].float()


def corner_weights(ids: Tensor, grid_hw: tuple[int, int]) -> Tensor:
    """The mask of each region, bilinear on a grid with corners on corners (`align_corners`), without any mask.

    Args:
        ids: (H, W) int64, from 0.
        grid_hw: rows and columns.

    Returns:
        (R, h * w).
    """
    weights = torch.zeros(int(ids.max()) + 1, grid_hw[0] * grid_hw[1], device=ids.device)
    taps = []
    for side, count in zip(ids.shape, grid_hw, strict=True):
        at = torch.arange(count, device=ids.device, dtype=torch.float64) * ((side - 1) / max(count - 1, 1))
        low = at.long().clamp(max=side - 1)
        high = (low + 1).clamp(max=side - 1)
        taps.append([(low, (1 - (at - low)).float()), (high, (at - low).float())])
    cells = torch.arange(weights.shape[1], device=ids.device)
    for (rows, down), (columns, across) in product(*taps):
        weights.index_put_(
            (ids[rows][:, columns].flatten(), cells), (down[:, None] * across).flatten(), accumulate=True
        )
    return weights
