"""CLIPer's labels: the maps of all blocks through the last block's projections, as soft-maxes over names.

Paper: "CLIPer: Hierarchically Improving Spatial Representation of CLIP for Open-Vocabulary Semantic Segmentation", Sun
et al., ICCV 2025. A label method; cliper.py has the attention. It is applied to the last block's values of the
normalised inputs of all earlier blocks, and of its own input: as many maps as blocks, of which the k-th sees k rounds
of columns and rows, as in the authors' code. Each is a soft-max of 100 cos over the names, the words of the background
and the mean of the names. The last map, cut at a tenth of each name's maximum, goes through the heads' mean attention
once more, and the mean of all maps is added. A name whose maximum stays under 0.7 is not there; at the size of the
label map each name's values are brought to 0..1, and under 0.6 there is background.
Choices: the names of the vocabulary's background class are words of the background, beside the authors' list without
the vocabulary's names. A class without a background beside it has its best pixels, whatever they are.
Not here: their mean with windows of the same maps (1.4 mean IoU on VOC21). cliper_sd.py goes on with Stable Diffusion.
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16, settings chosen for each data set.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dense_spar import merge_heads, project_heads
from ..grid_spar import coverage, upsample
from ..processing_spar import LabelFeatures
from ..prompts_spar import Labels
from ..results_spar import COSINE_SCALE
from ..segmentation_spar import FullScores, ScoreMaps
from .car import BACKGROUND
from .cliper import HEAD_NUMBERS, Balanced, look_through, sum_of_maps
from .nothing import names_of_background
from .segmenter import MethodSegmenter


@dataclass(frozen=True)
class Settings:
    """CLIPer's constants for labels (the authors' configuration for VOC21).

    Attributes:
        logit_scale: on cosines.
        cut: share of a name's maximum under which the last map is 0; but for VOC 0.2, Cityscapes 0.35.
        presence: maximum under which a name is not there; Context60 .45, Object, Context59, ADE20K .3, Stuff .1,
            VOC20, Cityscapes 0.
        nothing: value under which there is background; likewise, VOC20 .001, Cityscapes .0001.
        stretch: bring each name's values to 0..1; for VOC21 only.
        background: words of what is nothing.
    """

    logit_scale: float = 100.0
    cut: float = 0.1
    presence: float = 0.7
    nothing: float = 0.6
    stretch: bool = True
    background: tuple[str, ...] = BACKGROUND


@dataclass(frozen=True, eq=False)
class CliperTexts(LabelFeatures):
    """A vocabulary and its text features, and those of the background.

    Attributes:
        background: (B, D), L2-normalised.
    """

    background: Tensor


class Segmenter(MethodSegmenter):
    """CLIPer's labels; see the head of the file.

    Args:
        model: has the text tower.
        processor: its `SparProcessor`.
        vision: CLIP's vision tower.
        settings: the method's constants.
        method: the row's name.
    """

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`."""
        if isinstance(labels, CliperTexts):
            return labels
        plain = super().encode_labels(labels, templates)
        taken = {name.casefold() for name in plain.labels.names}
        words = tuple((word,) for word in self.settings.background if word.casefold() not in taken)
        background = plain.text_embeds[names_of_background(plain.labels)]
        if words:
            background = torch.cat([background, super().encode_labels(Labels(words), templates).text_embeds])
        return CliperTexts(plain.labels, plain.text_embeds, background)

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `CliperTexts`."""
        texts: CliperTexts = encoded
        image = image.to(self.dtype)
        background = names_of_background(texts.labels)
        count = len(texts.labels.names)
        names = [number for number in range(count) if number not in background]
        size_hw = (image.shape[2], image.shape[3])
        values, coverage_hw = self.values(image, texts, names)
        values, highest, coverage_hw = self.refined(image, values, coverage_hw)
        rows = {name: row for row, name in enumerate(names)}
        settings = self.settings
        absent = highest <= settings.presence

        def make(wanted: slice, wanted_hw: tuple[int, int]) -> Tensor:
            maps = torch.full((len(range(*wanted.indices(count))), *wanted_hw), settings.nothing, device=self.device)
            for place in range(len(maps)):
                row = rows.get(wanted.start + place)
                if row is None:  # a name of the background
                    continue
                map_ = upsample(values[row], wanted_hw, coverage_hw)
                map_ = map_ / (map_.max() + 1e-5) * highest[row]
                if settings.stretch:
                    map_ = map_ - map_.min()
                    map_ = map_ / (map_.max() + 1e-6)
                maps[place] = map_ - 2.0 * absent[row]  # what is not there comes after all else
            return maps

        return FullScores(
            make=make, size_hw=size_hw, num_names=count, device=self.device, logit_scale=COSINE_SCALE,
            patches_hw=(values.shape[1], values.shape[2]),
        )  # fmt: skip

    def refined(
        self, image: Tensor, values: Tensor, coverage_hw: tuple[float, float]
    ) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """The values (k, h, w) that count, the highest that each name is given, and their `coverage_hw`."""
        return values, values.amax(dim=(1, 2)), coverage_hw

    def values(self, image: Tensor, texts: CliperTexts, names: list[int]) -> tuple[Tensor, tuple[float, float]]:
        """The values of some names on the patches of an image (1, 3, H, W): (k, h, w), and `coverage_hw`."""
        encoder, settings = self.encoder, self.settings
        x, grid_hw, extent_hw = encoder.embed(image)
        reach = encoder.vision.reach(grid_hw, x.device)
        last_input, pairs, normed = look_through(encoder, x, reach, inputs=True)
        layer = encoder.last_layer
        sources = [*normed, last_input]
        heads = [project_heads(layer.self_attn, layer.layer_norm1(source), "v")["v"] for source in sources]
        _, num_heads, count, _ = heads[0].shape
        mean = torch.zeros(count, count, device=x.device)  # the heads' mean attention of the last map
        mixed = [torch.empty_like(value) for value in heads]
        step = max(HEAD_NUMBERS // count**2, 1)
        for first in range(0, num_heads, step):
            some = slice(first, first + step)
            total = sum_of_maps([(query[:, some], key[:, some]) for query, key in pairs], reach)
            for number, value in enumerate(heads):
                balanced = Balanced(total, number + 1)
                mixed[number][:, some] = (balanced @ value[:, some].float()).to(value.dtype)
            for rows, weights in balanced.chunks():
                mean[rows] += weights[0].sum(dim=0) / num_heads
        fg = F.normalize(texts.text_embeds.float(), dim=-1).to(x.device)[names]
        every = torch.cat([fg, texts.background.float().to(x.device), fg.mean(dim=0, keepdim=True)])
        every = F.normalize(every, dim=-1)
        shares = []
        for value in mixed:
            patches = encoder.vision.project(layer.self_attn.out_proj(merge_heads(value)))["patch_embeds"]
            logits = settings.logit_scale * F.normalize(patches[0].float(), dim=-1) @ every.T  # (N, K + B + 1)
            shares.append(logits.softmax(dim=-1)[:, : len(names)].T)  # (K, N)
        last = shares[-1].clone()
        last[last < settings.cut * last.amax(dim=1, keepdim=True)] = 0
        # As theirs, the mean of all maps has the last one after the cut.
        found = last @ mean[1:, 1:] + (sum(shares[:-1]) + last) / len(shares)
        return found.unflatten(1, grid_hw), coverage((image.shape[2], image.shape[3]), extent_hw)
