"""DiffSegmenter: where Stable Diffusion looks for a word, completed by which pixels look at each other.

Paper: "Diffusion Model is Secretly a Training-free Open Vocabulary Semantic Segmenter", Wang et al., IEEE Transactions
on Image Processing 2025. A label method; CLIP gives nothing but its pixels. A name a pass of the UNet:
1. The image, squashed to a square, becomes a latent, a sample of the posterior, under the noise of step 100; the words
   are "a photograph of NAME", the encoding of the name's last word moved 1.21 times as far from that of no words at
   all as it is (compel's `++`).
2. C_r is the mean of the cross attention to the name's last token over all heads and layers of a grid, of 64, 32, 16
   and 8 pixels a side at 512 px. Each comes to the finest grid bilinearly, is brought to 0..1, and the seed is .1 C_64
   + .1 C_32 + .5 C_16 + .3 C_8.
3. The mean self attention S of all heads and layers of the finest grid completes it: S seed, once. It comes to the
   pixels bilinearly and is brought to 0..1. The highest map has the pixel, and the background class one where all are
   below a threshold.
The names given count as present, all of them: each has a map that reaches 1. The authors read the names in each
picture from lists that CLIP and BLIP made; `presence` chooses by CLIP, as iSeg does by TagCLIP.
Choices: the threshold is .45, the middle of what the authors try; they report the best of .30 to .74. The prompt goes
on as BLIP describes the picture in their code; here it ends with the name.
No numbers are printed with the code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..grid_spar import upsample
from ..networks.diffusion import Attention, Prompt, Texts
from ..segmentation_spar import ScoreMaps
from .generative import DiffusionSegmenter, scores_of_maps, stretched


@dataclass(frozen=True)
class Settings:
    """DiffSegmenter's constants (the authors' script for VOC).

    Attributes:
        side_px: of the square that the diffusion model sees, 512; 0 is the network's own.
        step: of its training, 0 to 999.
        seed: of the noise.
        prompt: what comes before the name.
        emphasis: how far from no words the name's last word lies.
        weights: of the cross attention on the finest grid, and on grids of a half, a quarter and an eighth of it.
        nothing: value under which there is background.
        presence: share of the range of CLIP's cosines under which a class is not in the picture; 0: all are.
    """

    side_px: int = 0
    step: int = 100
    seed: int = 0
    prompt: str = "a photograph of"
    emphasis: float = 1.21
    weights: tuple[float, ...] = (0.1, 0.1, 0.5, 0.3)
    nothing: float = 0.45
    presence: float = 0.0


class Sums:
    """What the layers of one pass add up to.

    Args:
        token: whose cross attention is kept.
    """

    def __init__(self, token: int) -> None:
        self.token = token
        self.cross: dict[int, Tensor] = {}  # by how much coarser the grid is
        self.count: dict[int, int] = {}
        self.own: Tensor | None = None  # self attention on the finest grid
        self.heads = 0

    def add_cross(self, attention: Attention, coarser: int) -> None:
        total = sum(attention.probabilities(head)[:, self.token] for head in range(attention.num_heads))
        assert isinstance(total, Tensor)
        self.cross[coarser] = self.cross.get(coarser, 0) + total.view(attention.side, attention.side)
        self.count[coarser] = self.count.get(coarser, 0) + attention.num_heads

    def add_own(self, attention: Attention) -> None:
        for head in range(attention.num_heads):
            found = attention.probabilities(head)
            self.own = found if self.own is None else self.own.add_(found)
        self.heads += attention.num_heads


class Segmenter(DiffusionSegmenter):
    """DiffSegmenter; see the head of the file, and `DiffusionSegmenter`."""

    def prepare(self) -> None:
        super().prepare()
        found = set(self.diffusion.layers("attn2").values())
        if found != {2**level for level in range(len(self.settings.weights))}:
            raise ValueError(
                f"weights of method {self.config.method!r} are {len(self.settings.weights)} and the diffusion model "
                f"attends to words on grids {', '.join(f'1/{c}' for c in sorted(found))} of the latent's; give one "
                "weight for each, from 1/1 on."
            )

    def prompts(self, names: Sequence[str]) -> list[Prompt]:
        return [self.diffusion.prompt((self.settings.prompt, *name.split())) for name in names]

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        present = self.present(image, encoded, self.settings.presence)
        maps = self.maps(image, [encoded.labels.names[number] for number in present])

        def at(row: int, size_hw: tuple[int, int]) -> Tensor:
            return stretched(upsample(maps[row], size_hw))

        size_hw = (image.shape[2], image.shape[3])
        grid_hw = (maps.shape[1], maps.shape[2])
        return scores_of_maps(at, present, encoded.labels, self.settings.nothing, size_hw, self.device, grid_hw)

    def maps(self, image: Tensor, names: Sequence[str]) -> Tensor:
        """The completed maps (K, s, s) of names in an image (1, 3, H, W), on the grid of the latent."""
        settings, diffusion = self.settings, self.diffusion
        latent = self.noised(image, settings.step, settings.seed, sampled=True)
        prompts = self.prompts(names)
        side = latent.shape[-1]
        maps = torch.empty(len(names), side, side, device=self.device)
        (nothing,) = diffusion.encode([diffusion.prompt(())]).states
        cross, own = diffusion.layers("attn2"), diffusion.layers("attn1")
        for row, prompt in enumerate(prompts):
            place = prompt.places[-1]
            sums = Sums(place.stop - 1)
            readers: dict[str, Any] = {
                name: lambda attention, coarser=coarser, sums=sums: sums.add_cross(attention, coarser)
                for name, coarser in cross.items()
            }
            readers |= {name: sums.add_own for name, coarser in own.items() if coarser == 1}
            diffusion.look(latent, settings.step, self.emphasised(prompt, nothing), readers)
            seed = torch.zeros(side, side, device=self.device)
            for level, weight in enumerate(settings.weights):
                seed += weight * stretched(upsample(sums.cross[2**level] / sums.count[2**level], (side, side)))
            assert sums.own is not None
            maps[row] = (sums.own @ seed.flatten() / sums.heads).view(side, side)
        return maps

    def emphasised(self, prompt: Prompt, nothing: Tensor) -> Texts:
        """A prompt's encoding with its last word's moved away from that of no words (L, C)."""
        texts = self.diffusion.encode([prompt])
        states, place = texts.states.clone(), prompt.places[-1]
        states[0, place] = nothing[place] + self.settings.emphasis * (states[0, place] - nothing[place])
        return replace(texts, states=states)
