"""CaR, CLIP as RNN: masks proposed by Grad-CAM, judged by CLIP on the image prompted with them, until all names stay.

Paper: "CLIP as RNN: Segment Countless Visual Concepts without Training Endeavor", Sun et al., CVPR 2024. A label
method. A turn, on the whole image:
1. Proposals. p = softmax(scale cos) of the names and the background's words, for the mean of the patches after the
   last block; y = ln_1 of that block's input, g = dp_k / dy through its attention. cam = relu(sum of mean(g) y) over
   channels, brought to 0..1; where it is 0 everywhere, again with p over the names alone. T = mean of the last eight
   blocks' attention over patches, three rounds of columns and rows at sum 1, symmetric, squared. mask = T (box cam),
   brought to 0..1; box holds the bounding boxes of cam's parts above 0.4 of its maximum.
2. Judging. The image is prompted with each mask (`visual_prompts`); a name's score is its own soft-max among all
   names left, over their prompts in fifteen templates, on the image prompted with its mask. Names above 0.6 stay, or
   else the best alone; the next turn has these, until their number stays the same.
DenseCRF (`refinement.dense_crf`) over the masks and 1 - their maximum then decides between names and background.
As the authors' code: positions are rounded to fp16; the last row and column of patches are in no box; the judge's
class token comes from the input of its last block; grey takes red for blue; the first turn proposes with bare names,
later ones with "a clean origami {}."; DenseCRF sees bytes that wrapped around 0 when a mean was subtracted.
Choices: each name of a class is one of its own; the names of the vocabulary's background class are words of the
background, beside the authors' list for VOC without the vocabulary's names. Their two passes over things and stuff
(Context, ADE20K) need to know which is which and are not here.
The authors' judge is CLIP ViT-L/14: `--network judge=openai/clip-vit-large-patch14`; without it the model judges.
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16 and that judge.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from ..encoders.base import rgb
from ..grid_spar import upsample
from ..names_spar import one_of
from ..networks.clip import open_clip
from ..processing_spar import LabelFeatures
from ..prompts_spar import Labels
from ..refinement import dense_crf
from ..segmentation_spar import ScoreMaps
from .car_proposals import Proposals, embed, normalised
from .nothing import names_of_background, scores_with_nothing
from .segmenter import MethodSegmenter
from .visual_prompts import PROMPTS, prompted

PROPOSAL_TEMPLATE = "a clean origami {}."
JUDGE_TEMPLATES = (
    PROPOSAL_TEMPLATE,
    "a photo of a {}.",
    "This is a photo of a {}",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "a photo of a {} in the scene",
    *(f"{start} a {size} {{}}{end}" for start, end in (("a photo of", "."), ("This is a photo of", "."))
      for size in ("small", "medium", "large")),
    *(f"There is a {size} {{}} in the scene." for size in ("small", "medium", "large")),
)  # fmt: skip
BACKGROUND = (
    "ground", "land", "grass", "tree", "building", "wall", "sky", "lake", "water", "river", "sea", "railway",
    "railroad", "helmet", "cloud", "house", "mountain", "ocean", "road", "rock", "street", "valley", "bridge",
)  # fmt: skip
MEAN_RGB = (122.675, 116.669, 104.008)  # what DenseCRF's colours are less
JUDGED_AT_ONCE = 16


@dataclass(frozen=True)
class Settings:
    """CaR's constants (the authors' configuration for VOC).

    Attributes:
        box: share of a map's maximum above which a part has a box; COCO-Object 0.5.
        mask: value above which a pixel is inside a prompt; COCO-Object 0.5, Context 0.6.
        confidence: score above which a name stays; COCO-Object 0.3, Context 0.25.
        prompts: some of `blur`, `grey`, `circle`; COCO-Object blur and grey.
        background: words of what is nothing.
        templates: of the judge's texts.
        blocks: whose attention makes T, the last ones.
        crf: of DenseCRF.
    """

    box: float = 0.4
    mask: float = 0.4
    confidence: float = 0.6
    prompts: tuple[str, ...] = ("blur", "circle")
    background: tuple[str, ...] = BACKGROUND
    templates: tuple[str, ...] = JUDGE_TEMPLATES
    blocks: int = 8
    crf: dense_crf.Settings = field(default_factory=dense_crf.Settings)

    def __post_init__(self) -> None:
        for name in self.prompts:
            one_of("prompts", name, PROMPTS)


@dataclass(frozen=True, eq=False)
class CarTexts(LabelFeatures):
    """A vocabulary, and what CaR wants of it; all L2-normalised.

    Attributes:
        names: (2, K, D), bare and in the proposals' template.
        background: (B, D).
        judged: (T, K, D'), each template on its own, in the judge's space.
    """

    names: Tensor
    background: Tensor
    judged: Tensor


class Segmenter(MethodSegmenter):
    """CaR; see the head of the file.

    Args:
        model: has the text tower.
        processor: its `SparProcessor`.
        vision: CLIP's vision tower.
        networks: "judge": a CLIP, or the id or folder to load it from; without it the model judges.
        settings: the method's constants.
        method: the row's name.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        vision: Any,
        networks: Mapping[str, Any] | None = None,
        settings: Any = None,
        method: str = "",
    ) -> None:
        super().__init__(model, processor, vision, networks, settings, method)
        self.judge, self.judge_processor = model, processor
        if networks:
            self.judge, self.judge_processor = open_clip(networks["judge"], processor)
            self.judge.to(vision.device, vision.dtype)

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return super().networks if self.judge is self.model else (*super().networks, self.judge)

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`; templates are for `text_embeds` alone, CaR has its own."""
        if isinstance(labels, CarTexts):
            return labels
        plain = super().encode_labels(labels, templates)
        labels = plain.labels
        taken = {name.casefold() for name in labels.names}
        background = [labels.names[number] for number in names_of_background(labels)]
        background += [word for word in self.settings.background if word.casefold() not in taken]

        def encoded(names: Iterable[str], template: str, judge: bool = False) -> Tensor:
            model, processor = (self.judge, self.judge_processor) if judge else (self.model, self.processor)
            alone = Labels(tuple((name,) for name in names))
            return processor.encode_labels(model, alone, (template,)).text_embeds

        names = torch.stack([encoded(labels.names, template) for template in ("{}", PROPOSAL_TEMPLATE)])
        return CarTexts(
            labels,
            plain.text_embeds,
            names,
            encoded(background, PROPOSAL_TEMPLATE) if background else names[0, :0],
            torch.stack([encoded(labels.names, template, judge=True) for template in self.settings.templates]),
        )

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `CarTexts`."""
        texts: CarTexts = encoded
        bytes_ = (rgb(image, self.config)[0] * 255).round().clamp(0, 255).byte()
        colours = np.ascontiguousarray(bytes_.permute(1, 2, 0).cpu().numpy())
        size_hw = (colours.shape[0], colours.shape[1])
        background = names_of_background(texts.labels)
        kept, masks = self.turns(colours, [i for i in range(len(texts.labels.names)) if i not in background], texts)
        chosen = torch.zeros(1, *size_hw, device=self.device)
        if kept:
            shares = torch.cat([1 - masks.amax(0, keepdim=True), masks])
            less_mean = np.trunc(colours - np.array(MEAN_RGB)).astype(np.int64) % 256
            chosen = dense_crf.dense_crf(shares, torch.from_numpy(less_mean).to(self.device), self.settings.crf)
        else:
            chosen += 1
        rows = {name: 1 + row for row, name in enumerate(kept)}

        def found(names: slice, wanted_hw: tuple[int, int]) -> Tensor:
            maps = torch.zeros(len(range(*names.indices(len(texts.labels.names)))), *wanted_hw, device=self.device)
            for place in range(len(maps)):
                if names.start + place in rows:
                    maps[place] = upsample(chosen[rows[names.start + place]], wanted_hw)
            return maps

        return scores_with_nothing(
            found, lambda wanted_hw: upsample(chosen[0], wanted_hw), texts.labels, size_hw, self.device
        )

    @torch.no_grad()
    def turns(self, colours: np.ndarray, names: list[int], texts: CarTexts) -> tuple[list[int], Tensor]:
        """The names that stay in the image (H, W, 3), and their masks (k, H, W) from 0 to 1."""
        size_hw, number, turn = (colours.shape[0], colours.shape[1]), 0, 0
        masks = torch.zeros(0, *size_hw, device=self.device)
        if not names:
            return names, masks
        proposals = Proposals(self.encoder.vision, colours, self.model.logit_scale.exp().float(), self.settings)
        while True:
            text = F.normalize(texts.names[min(turn, 1), names].float(), dim=-1).to(self.device)
            proposed = proposals(text, texts.background.float().to(self.device))
            masks = upsample(proposed, size_hw)
            scores = self.judged(colours, masks, texts.judged[:, names])
            staying = (scores > self.settings.confidence).nonzero().flatten().tolist() or [int(scores.argmax())]
            names, masks, turn = [names[i] for i in staying], masks[staying], turn + 1
            if len(names) == number:
                return names, masks
            number = len(names)

    def judged(self, colours: np.ndarray, masks: Tensor, texts: Tensor) -> Tensor:
        """The score (n) of each mask (n, H, W), given the names' texts (T, n, D')."""
        vision, images = self.judge.vision_model, []
        side = vision.config.image_size
        for mask in masks:
            inside = (mask > self.settings.mask).cpu().numpy()
            some = mask.sum() > 1 and inside.any()
            shown = prompted(colours, inside, self.settings.prompts) if some else colours
            images.append(torch.from_numpy(centre_square(shown, side)).permute(2, 0, 1))
        embeds = []
        for chunk in torch.stack(images).split(JUDGED_AT_ONCE):
            x, grid_hw = embed(vision, normalised(chunk.to(vision.device), vision.config))
            reach = vision.reach(grid_hw, x.device)
            for layer in vision.blocks[:-1]:
                x = layer(x, reach=reach)
            embeds.append(vision.project(x[:, :1])["image_embeds"].float())
        seen = F.normalize(torch.cat(embeds), dim=-1)
        cosines = torch.einsum("nd,tkd->tnk", seen, texts.float().to(seen.device))
        scores = (self.judge.logit_scale.exp().float() * cosines).softmax(dim=-1).sum(dim=0)
        return scores.softmax(dim=-1).diagonal()


def centre_square(colours: np.ndarray, side_px: int) -> np.ndarray:
    """The shorter side resized, and the middle of the longer one: CLIP's own preprocessing, (H, W, 3) uint8."""
    height, width = colours.shape[:2]
    short = min(height, width)
    new_hw = (int(side_px * height / short), int(side_px * width / short))
    resized = np.array(Image.fromarray(colours).resize(new_hw[::-1], Image.Resampling.BICUBIC))
    top, left = (round((side - side_px) / 2) for side in new_hw)
    return resized[top : top + side_px, left : left + side_px]
