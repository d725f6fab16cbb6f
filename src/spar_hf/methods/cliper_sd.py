"""CLIPer's labels refined by Stable Diffusion: its self attention, head after head, on CLIP's maps.

Paper: "CLIPer: Hierarchically Improving Spatial Representation of CLIP for Open-Vocabulary Semantic Segmentation", Sun
et al., ICCV 2025. A label method; cliper_labels.py makes the maps. One pass of the UNet without words:
1. The image, squashed to a square (nearest pixels, as diffusers squashes tensors), becomes a latent under the noise of
   step 101, the 46th of PNDM's fifty.
2. Each head's attention of two layers of the finest grid: divided by each column's maximum, what lies under a cut goes
   to 0, rows brought to 1. The maps come to that grid bilinearly and are multiplied by all heads, the last of
   `up_blocks.3.attentions.0` first, the first of `up_blocks.3.attentions.1` last.
3. A name's score is half the refined map's maximum and half the former one's. The rest is as in cliper_labels.py.
Choices and deviations: the authors draw other noise each time; here a seed decides. They multiply the heads' matrices
with each other, here each with the maps: the product is the same, at a thousandth of the work.
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16, settings chosen for each data set.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..grid_spar import upsample
from ..names_spar import one_of
from ..networks.diffusion import Attention
from . import cliper_labels
from .generative import DiffusionSegmenter

# In the order in which they run, which is that in which they act on the maps.
LAYERS = tuple(f"up_blocks.3.attentions.{number}.transformer_blocks.0.attn1" for number in range(2))
HEADS = ("all", "mean")


@dataclass(frozen=True)
class Settings(cliper_labels.Settings):
    """CLIPer's constants with Stable Diffusion (the authors' configuration for VOC21).

    Attributes:
        side_px: of the square that the diffusion model sees, 512; 0 is the network's own.
        step: of its training, 0 to 999.
        seed: of the noise.
        attention_cut: of a head's attention, as a share of its column's maximum; .2 but for VOC, Cityscapes .35.
        heads: `all`, one after the other; `mean`; or one's number, counted as the authors do, the finer layer first.
    """

    side_px: int = 0
    step: int = 101
    seed: int = 0
    attention_cut: float = 0.1
    heads: str = "all"

    def __post_init__(self) -> None:
        if not self.heads.isdigit():
            one_of("heads", self.heads, HEADS)


class Segmenter(cliper_labels.Segmenter, DiffusionSegmenter):
    """CLIPer's labels with Stable Diffusion; see the head of the file, `cliper_labels.Segmenter` and
    `DiffusionSegmenter`."""

    def layers(self) -> tuple[str, ...]:
        return LAYERS

    def refined(
        self, image: Tensor, values: Tensor, coverage_hw: tuple[float, float]
    ) -> tuple[Tensor, Tensor, tuple[float, float]]:
        """See `cliper_labels.Segmenter`."""
        settings, diffusion = self.settings, self.diffusion
        latent = self.noised(image, settings.step, settings.seed, mode="nearest")
        side = latent.shape[-1]
        maps = Refiner(upsample(values, (side, side), coverage_hw), settings.attention_cut, settings.heads)
        texts = diffusion.encode([diffusion.prompt(())])
        diffusion.look(latent, settings.step, texts, dict.fromkeys(LAYERS, maps))
        found = maps.found()
        highest = (found.amax(dim=(1, 2)) + values.amax(dim=(1, 2))) / 2
        return found, highest, (1.0, 1.0)


class Refiner:
    """Maps that layers act on as they run, coarser block first.

    Args:
        maps: (k, s, s).
        cut: see `Settings.attention_cut`.
        heads: see `Settings.heads`.
    """

    def __init__(self, maps: Tensor, cut: float, heads: str) -> None:
        self.side, self.cut, self.heads = maps.shape[1], cut, heads
        self.rows = maps.flatten(1).T  # (s * s, k)
        self.total = torch.zeros_like(self.rows)  # of all heads, where their mean is asked for
        self.seen: list[int] = []  # heads of the layers so far

    def __call__(self, attention: Attention) -> None:
        count = attention.num_heads
        if self.heads == "all":
            for head in reversed(range(count)):
                self.rows = self.weights(attention, head) @ self.rows
        elif self.heads == "mean":
            for head in range(count):
                self.total += self.weights(attention, head) @ self.rows
        else:
            # The authors count from the layer that runs last: its heads come first.
            before = 0 if attention.name == LAYERS[1] else count
            if before <= int(self.heads) < before + count:
                self.total = self.weights(attention, int(self.heads) - before) @ self.rows
        self.seen.append(count)

    def weights(self, attention: Attention, head: int) -> Tensor:
        """One head's attention without what is small, (N, N)."""
        own = attention.probabilities(head)
        own /= own.amax(dim=0) + 1e-5
        own.masked_fill_(own < self.cut, 0)
        return own.div_(own.sum(dim=1, keepdim=True) + 1e-5)

    def found(self) -> Tensor:
        """The refined maps (k, s, s).

        Raises:
            ValueError: there is no head of that number.
        """
        if self.heads.isdigit() and int(self.heads) >= sum(self.seen):
            raise ValueError(f"heads is {self.heads} and the layers have {sum(self.seen)}; give a number from 0 on.")
        rows = self.rows if self.heads == "all" else self.total
        if self.heads == "mean":
            rows = rows / sum(self.seen)
        return rows.T.unflatten(1, (self.side, self.side))
