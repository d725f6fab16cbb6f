"""What methods around a diffusion model have in common: what it is shown, the names in a picture, scores of maps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..networks.diffusion import Diffusion
from ..prompts_spar import Labels
from ..results_spar import COSINE_SCALE
from ..segmentation_spar import FullScores
from .nothing import names_of_background
from .segmenter import MethodSegmenter

SizeHW = tuple[int, int]


class DiffusionSegmenter(MethodSegmenter):
    """A label method around a diffusion model, its network `diffusion`; see `MethodSegmenter`.

    Its settings have `side_px`, of the square that the diffusion model is shown.

    Raises:
        ValueError: beside what `MethodParts` says, the side doesn't fit, or the UNet lacks a layer that is read.
    """

    diffusion: Diffusion

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        return {"diffusion": Diffusion.of}

    def prepare(self) -> None:
        whose = f"method {self.config.method!r}"
        self.side_px = self.diffusion.check_side(self.settings.side_px, whose)
        self.diffusion.check_layers(self.layers(), whose)

    def layers(self) -> Sequence[str]:
        """The attention layers that are read by name, whatever the network."""
        return ()

    def prompts(self, names: Sequence[str]) -> Any:
        """What the words are put into; raises a `ValueError` where a name fits into none."""

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`; templates are for CLIP, the diffusion model has the method's own."""
        encoded = super().encode_labels(labels, templates)
        self.prompts(encoded.labels.names)
        return encoded

    def noised(self, image: Tensor, step: int, seed: int, sampled: bool = False, mode: str = "bilinear") -> Tensor:
        """The latent of an image (1, 3, H, W) under the noise of a step, the same on every call.

        Args:
            image: see `of_one`.
            step: of the diffusion model's training.
            seed: of the noise.
            sampled: the latent is a sample of the posterior, not its mean; its noise comes first.
            mode: how the image becomes a square.
        """
        square = self.diffusion.square(image, self.config, self.side_px, mode)
        *first, noise = self.diffusion.noise_for(seed, 2 if sampled else 1, self.side_px)
        latent = self.diffusion.latent(square, *first)
        return self.diffusion.noised(latent, step, noise)

    def present(self, image: Tensor, encoded: Any, share: float) -> list[int]:
        """Numbers of the names that count as present in an image, without those of the background.

        The given names are all present for a share of 0. Else a class is where CLIP's cosine of the whole image with
        its best name lies above that share of the range over classes, as iSeg chooses by TagCLIP.
        """
        labels: Labels = encoded.labels
        background = set(names_of_background(labels))
        names = [number for number in range(len(labels.names)) if number not in background]
        if share <= 0 or not names:
            return names
        side = self.config.image_size
        square = F.interpolate(image.float(), size=(side, side), mode="bicubic", align_corners=False)
        text = F.normalize(encoded.text_embeds.float(), dim=-1).to(self.device)
        cosines = text @ self.encoder.image_embeds(square)[0]
        best: dict[int, float] = {}
        for number in names:
            of = labels.class_ids[number]
            best[of] = max(best.get(of, -torch.inf), float(cosines[number]))
        low, high = min(best.values()), max(best.values())
        return [number for number in names if best[labels.class_ids[number]] >= low + share * (high - low)]


def scores_of_maps(
    at: Callable[[int, SizeHW], Tensor],
    present: Sequence[int],
    labels: Labels,
    nothing: float | None,
    size_hw: SizeHW,
    device: torch.device,
    patches_hw: SizeHW | None = None,
) -> FullScores:
    """Scores of maps from 0 to 1, one for each name present.

    Args:
        at: (row among those present, (H, W)) -> the name's map (H, W).
        present: numbers of the names that have a map. The others come after all else.
        labels: the vocabulary; its background class has what is nothing.
        nothing: value of nothing at each pixel; None is (1 - the highest map)².
        size_hw: of the label map to come.
        device: where the maps are made.
        patches_hw: rows and columns of what the maps come from.
    """
    rows = {name: row for row, name in enumerate(present)}
    background = set(names_of_background(labels))
    count = len(labels.names)

    @lru_cache(maxsize=1)
    def none(wanted_hw: SizeHW) -> Tensor:
        if nothing is not None or not rows:
            return torch.full(wanted_hw, 1.0 if nothing is None else nothing, device=device)
        highest = at(0, wanted_hw)
        for row in range(1, len(rows)):
            highest = torch.maximum(highest, at(row, wanted_hw))
        return (1 - highest).square()

    def make(names: slice, wanted_hw: SizeHW) -> Tensor:
        maps = torch.full((len(range(*names.indices(count))), *wanted_hw), -1.0, device=device)
        for place in range(len(maps)):
            name = names.start + place
            if name in background:
                maps[place] = none(wanted_hw)
            elif name in rows:
                maps[place] = at(rows[name], wanted_hw)
        return maps

    return FullScores(
        make=make, size_hw=size_hw, num_names=count, device=device, logit_scale=COSINE_SCALE, patches_hw=patches_hw
    )


def stretched(maps: Tensor, least: float = 0.0) -> Tensor:
    """Each map (..., H, W) brought to 0..1: (x - min) / (max - min + least); one without differences becomes 0."""
    low, high = maps.amin(dim=(-2, -1), keepdim=True), maps.amax(dim=(-2, -1), keepdim=True)
    return (maps - low) / (high - low + least).clamp(min=torch.finfo(maps.dtype).tiny)
