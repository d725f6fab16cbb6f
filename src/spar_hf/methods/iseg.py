"""iSeg: cross attention of all names at once, averaged over clusters and refined by a sharpened self attention.

Paper: "iSeg: An Iterative Refinement-based Framework for Training-free Segmentation", Sun et al., arXiv 2409.03209. A
label method; CLIP gives nothing but its pixels. One pass of the UNet for as many names as a prompt holds:
1. The words are "a photograph of A and B and C" and an ending with words of the background; the encodings of the
   names' tokens count 1.6 times. The image, squashed to a square, becomes a latent under the noise of step 100.
2. Cross attention on a quarter and on half of the latent's grid, some layers and there some heads, in the order in
   which they run: their mean; each token's map divided by its sum; bilinear to the latent's grid; .7 and .3 of them.
3. Its rows, a pixel's attention to all tokens, are clustered by symmetric Kullback-Leibler divergence, from every 11th
   pixel of 64 on, twenty rounds; a pixel takes the mean of its cluster. A name's map is the mean of its tokens'.
4. The mean of two heads' self attention, divided by each column's maximum, plus e log10(2.718 A) where it is not 0, at
   least 0, rows brought to 1. Eight times: multiply, subtract each map's minimum, divide by its sum.
5. Bilinear to the square and brought to 0..1, bilinear to the pixels and so again. The background class has (1 - the
   highest)², or for a threshold above 0 what is below that.
The names given count as present, all of them, as for DiffSegmenter; the authors choose by TagCLIP, `presence` by CLIP.
As released: the ending lacks a comma ("backgroundground, land, ..."), its words stop where their first line does.
Which tokens of a name count stands in lists there, mostly the last; here it is the last word's, or all (`tokens`).
Deviations: divergences in fp32, theirs in fp16 (4 to 8 % of a random network's pixels come to other clusters). Names
that no prompt of 77 tokens holds are split over several, each with a pass of its own; theirs are cut.
To reach: the numbers in `spar_hf.published`, with Stable Diffusion 2.1, settings chosen for each data set.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..grid_spar import upsample
from ..names_spar import one_of
from ..networks.diffusion import Attention, Prompt
from ..segmentation_spar import ScoreMaps
from .generative import DiffusionSegmenter, scores_of_maps, stretched

# The heads of Stable Diffusion 2.1 that the authors keep for VOC, of those of all layers of a grid in a row.
HEADS_QUARTER = (
    76, 1, 43, 17, 81, 6, 44, 27, 2, 8, 22, 20, 60, 78, 12, 83, 94, 47, 88, 96, 3, 33, 46, 52, 77, 93, 51, 58, 0, 13,
    14, 19, 34, 41, 59, 87, 16, 24, 28, 30, 32,
)  # fmt: skip
HEADS_HALF = (22, 5, 21, 13, 8, 27, 28, 6, 25)
ENDING = "and other object and backgroundground, land, grass, tree, building, wall, sky, lake, water"
TOKENS = ("last", "all")
SMALLEST = 1e-5  # added to what a divergence is of


def _layer(block: str, number: int, kind: str) -> str:
    return f"{block}.attentions.{number}.transformer_blocks.0.{kind}"


QUARTER = (
    *(_layer("down_blocks.2", number, "attn2") for number in range(2)),
    *(_layer("up_blocks.1", number, "attn2") for number in range(3)),
)
HALF = (_layer("down_blocks.1", 1, "attn2"), *(_layer("up_blocks.2", number, "attn2") for number in range(2)))
OWN = _layer("up_blocks.3", 1, "attn1")


@dataclass(frozen=True)
class Settings:
    """iSeg's constants (the authors' configuration for VOC).

    Attributes:
        side_px: of the square that the diffusion model sees, 512; 0 is the network's own.
        step: of its training, 0 to 999.
        seed: of the noise.
        prompt: what comes before the names.
        ending: what comes after them; Context "and other object and background".
        tokens: those of a name that count: `last`, its last word's, or `all`.
        enhanced: factor on their encodings.
        heads_quarter, heads_half: of the cross attention on a quarter and half of the grid, by number; empty: all, as
            for Context and COCO-Object.
        quarter_weight: of the former; the latter has the rest.
        clusters: about how many, to begin with.
        cluster_rounds: of clustering; 0 is none.
        own_heads: of the self attention.
        entropy: e; Context .002, COCO-Object .2.
        rounds: of refinement; Context 5, COCO-Object 10.
        nothing: value under which there is background, 0 for (1 - the highest)²; COCO-Object .45.
        presence: share of the range of CLIP's cosines under which a class is not in the picture; 0: all are.
    """

    side_px: int = 0
    step: int = 100
    seed: int = 1101
    prompt: str = "a photograph of"
    ending: str = ENDING
    tokens: str = "last"
    enhanced: float = 1.6
    heads_quarter: tuple[int, ...] = HEADS_QUARTER
    heads_half: tuple[int, ...] = HEADS_HALF
    quarter_weight: float = 0.7
    clusters: int = 32
    cluster_rounds: int = 20
    own_heads: tuple[int, ...] = (1, 2)
    entropy: float = 0.015
    rounds: int = 8
    nothing: float = 0.0
    presence: float = 0.0

    def __post_init__(self) -> None:
        one_of("tokens", self.tokens, TOKENS)


class HeadMean:
    """The mean cross attention of some heads of layers that run one after the other.

    Args:
        heads: by number among those of all layers; empty is all.
    """

    def __init__(self, heads: Sequence[int]) -> None:
        self.heads, self.total, self.seen, self.count = set(heads), torch.zeros(()), 0, 0

    def __call__(self, attention: Attention) -> None:
        for head in range(attention.num_heads):
            if not self.heads or self.seen in self.heads:
                self.total = self.total.to(attention.queries.device) + attention.probabilities(head)
                self.count += 1
            self.seen += 1

    def maps(self) -> Tensor:
        """(L, h, w): of each token, divided by their sums."""
        if self.heads and self.count < len(self.heads):
            raise ValueError(
                f"heads_quarter or heads_half names head {max(self.heads)} and these layers have {self.seen}; the "
                "authors' are Stable Diffusion 2.1's. Leave them empty (--set heads_quarter= --set heads_half=)."
            )
        side = round(len(self.total) ** 0.5)
        maps = self.total.T.unflatten(1, (side, side)) / self.count
        return maps / maps.sum(dim=(1, 2), keepdim=True)


class Segmenter(DiffusionSegmenter):
    """iSeg; see the head of the file, and `DiffusionSegmenter`."""

    def layers(self) -> Sequence[str]:
        return (*QUARTER, *HALF, OWN)

    def prompts(self, names: Sequence[str]) -> list[tuple[list[int], Prompt, list[slice]]]:
        """The names by number, the prompt, and the tokens that count for each, of one prompt after the other."""
        settings, found = self.settings, []
        for numbers in self.diffusion.groups(names, settings.prompt, "and", settings.ending):
            parts, own = [settings.prompt], []
            for number in numbers:
                words = names[number].split()
                first = len(parts) + (0 if settings.tokens == "all" else len(words) - 1)
                parts += words
                own.append(slice(first, len(parts)))
                parts.append("and")
            prompt = self.diffusion.prompt((*parts[:-1], settings.ending))
            places = [slice(prompt.places[of.start].start, prompt.places[of.stop - 1].stop) for of in own]
            found.append((numbers, prompt, places))
        return found

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        settings = self.settings
        present = self.present(image, encoded, settings.presence)
        maps = self.maps(image, [encoded.labels.names[number] for number in present])
        square_hw = (self.side_px, self.side_px)

        def at(row: int, size_hw: tuple[int, int]) -> Tensor:
            return stretched(upsample(stretched(upsample(maps[row], square_hw)), size_hw), 1e-6)

        size_hw = (image.shape[2], image.shape[3])
        nothing = settings.nothing if settings.nothing > 0 else None
        return scores_of_maps(
            at, present, encoded.labels, nothing, size_hw, self.device, (maps.shape[1], maps.shape[2])
        )

    def maps(self, image: Tensor, names: Sequence[str]) -> Tensor:
        """The refined maps (K, s, s) of names in an image (1, 3, H, W), on the grid of the latent."""
        settings, diffusion = self.settings, self.diffusion
        latent = self.noised(image, settings.step, settings.seed)
        side = latent.shape[-1]
        maps = torch.empty(len(names), side, side, device=self.device)
        for numbers, prompt, places in self.prompts(names):
            texts = diffusion.encode([prompt])
            states = texts.states.clone()
            for place in places:
                states[0, place] *= settings.enhanced
            quarter, half = HeadMean(settings.heads_quarter), HeadMean(settings.heads_half)
            kept: list[Tensor] = []
            readers: dict[str, Any] = {**dict.fromkeys(QUARTER, quarter), **dict.fromkeys(HALF, half)}
            readers[OWN] = lambda attention, kept=kept: kept.append(own_attention(attention, settings.own_heads))
            diffusion.look(latent, settings.step, replace(texts, states=states), readers)
            cross = settings.quarter_weight * upsample(quarter.maps(), (side, side))
            cross += (1 - settings.quarter_weight) * upsample(half.maps(), (side, side))
            rows = cluster_means(cross, settings.clusters, settings.cluster_rounds)  # (s * s, L)
            found = torch.stack([rows[:, place].mean(dim=1) for place in places], dim=1)  # (s * s, k)
            found = refined(found, sharpened(kept[0], settings.entropy), settings.rounds)
            maps[numbers] = found.T.unflatten(1, (side, side))
        return maps


def own_attention(attention: Attention, heads: Sequence[int]) -> Tensor:
    """The mean self attention of some heads, (N, N).

    Raises:
        ValueError: the layer has no such head.
    """
    if not heads or max(heads) >= attention.num_heads:
        raise ValueError(
            f"own_heads are {tuple(heads)} and the layer has heads 0 to {attention.num_heads - 1}; give some of these."
        )
    total = attention.probabilities(heads[0])
    for head in heads[1:]:
        total += attention.probabilities(head)
    return total / len(heads)


def cluster_means(maps: Tensor, clusters: int, rounds: int) -> Tensor:
    """Maps (L, s, s) as rows (s * s, L), each the mean over its cluster."""
    side = maps.shape[-1]
    values = maps.flatten(1).T
    if rounds == 0:
        return values
    rows = torch.where(values == 0, 1e-6, values)
    every = torch.arange(0, side, max(int(side // clusters**0.5), 1), device=maps.device)
    centres = rows[(every[:, None] * side + every).flatten()]
    logs = (rows + SMALLEST).log()
    for _ in range(rounds):
        # The difference form: with the products expanded, their rounding is larger than what tells clusters apart.
        apart = [((rows - centre) * (logs - (centre + SMALLEST).log())).sum(dim=1) / 2 for centre in centres]
        place = torch.stack(apart).argmin(dim=0).unique(return_inverse=True)[1]
        centres = means_of(rows, place)
    return means_of(values, place)[place]


def means_of(rows: Tensor, place: Tensor) -> Tensor:
    """The mean of the rows (N, L) of each place (N), numbered from 0 without gaps."""
    counts = place.bincount()
    return rows.new_zeros(len(counts), rows.shape[1]).index_add_(0, place, rows) / counts[:, None]


def sharpened(own: Tensor, entropy: float) -> Tensor:
    """Self attention (N, N) divided by each column's maximum, with little made less, rows brought to 1. In place."""
    own /= own.amax(dim=0)
    log = (own * torch.e).log10_().mul_(entropy)
    own += log.masked_fill_(own == 0, 0)
    own.clamp_(min=0)
    return own.div_(own.sum(dim=1, keepdim=True).clamp(min=torch.finfo(own.dtype).tiny))


def refined(maps: Tensor, own: Tensor, rounds: int) -> Tensor:
    """Maps (N, K) multiplied by self attention (N, N) again and again, from 0 and with a sum of 1 each time."""

    def brought(maps: Tensor) -> Tensor:
        maps = maps - maps.amin(dim=0)
        return maps / maps.sum(dim=0).clamp(min=torch.finfo(maps.dtype).tiny)

    maps = brought(maps)
    for _ in range(rounds):
        maps = brought(own @ maps)
    return maps
