"""Refined: a segmenter with refinements, one object for the pipeline, the evaluation and the command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..processing_spar import LabelFeatures
from ..prompts_spar import Labels
from ..segmentation_spar import FeatureScores, FullScores, GridScores, ScoreMaps, Segmenter
from ..segmenters import SegmenterWrapper, SlidingScores, sliding_scores
from .clip_internals import ClipInternals, Scene, check_network
from .floss import candidates, encode_templates, expert_embeds, fused, rank_templates, unit_patches
from .table import Refinement, find_refinements


@dataclass(frozen=True, eq=False)
class ExpertFeatures(LabelFeatures):
    """A vocabulary, its text features, and FLOSS's experts.

    Attributes:
        experts: (K, K, D); row e holds all names in the templates of name e.
    """

    experts: Tensor


class Refined(SegmenterWrapper):
    """A segmenter, and refinements of its scores, its full-resolution maps and its label maps, in the table's order.

    Views of the image change the encoder instead: `build_segmenter` puts a `ViewEnsemble` around it.

    Args:
        segmenter: any segmenter.
        names: keys of `REFINEMENTS`, in any order.
        model: a `SparModel`; refinements that look inside ask its vision tower.
        settings: settings of a refinement by its name; those left out are its authors'.
        networks: adapters of the further networks that they need, by name.

    Raises:
        ValueError: there is no such refinement, it asks for what the model's vision tower lacks, or needs a network.
    """

    def __init__(
        self,
        segmenter: Segmenter,
        names: Iterable[str],
        model: Any,
        settings: Mapping[str, Any] | None = None,
        networks: Mapping[str, Any] | None = None,
    ) -> None:
        self.segmenter = segmenter
        self.model = model
        self.further = dict(networks or {})
        self.refinements = find_refinements(names, settings)
        for name, refinement in self.refinements.items():
            if refinement.stage == "views":
                raise ValueError(f"refinement {name!r} changes the encoder; build it with spar_hf.build_segmenter.")
            if refinement.looks_inside:
                check_network(model.vision_model, name)
            for network in refinement.networks:
                if network not in self.further:
                    raise ValueError(f"refinement {name!r} needs a network {network!r}; give --network {network}=ID.")

    @property
    def networks(self) -> tuple[torch.nn.Module, ...]:
        modules = (part for part in self.further.values() if isinstance(part, torch.nn.Module))
        return (*self.segmenter.networks, *modules)

    def __repr__(self) -> str:
        chosen = {name: refinement.settings for name, refinement in self.refinements.items()}
        further = f", {self.further}" if self.further else ""
        return f"Refined({self.segmenter!r}, {chosen}{further})"

    def of(self, *stages: str) -> dict[str, Refinement]:
        """The refinements of some stages."""
        return {name: row for name, row in self.refinements.items() if row.stage in stages}

    def encode_labels(
        self, labels: Any, templates: str | Iterable[str] | None = None, unlabelled: Iterable[Tensor] = ()
    ) -> Any:
        """See `Segmenter`; reads the unlabelled images where a refinement learns from them (floss)."""
        encoded = self.segmenter.encode_labels(labels, templates, unlabelled)
        if texts := self.of("texts"):
            encoded = self._with_texts(texts, encoded, templates)
        if not (learning := self.of("templates")):
            return encoded
        ((name, refinement),) = learning.items()
        processor, labels = self.segmenter.processor, encoded.labels  # type: ignore[attr-defined]
        embeds = encode_templates(self.model, processor, labels, candidates(processor, templates))
        patches = (unit_patches(self._maps(name, image, encoded)) for image in unlabelled)
        chosen = rank_templates(patches, embeds, column_ids(labels), refinement.settings)
        return ExpertFeatures(labels, encoded.text_embeds, expert_embeds(embeds, chosen))

    def _with_texts(self, texts: Mapping[str, Refinement], encoded: Any, templates: Any) -> Any:
        """The encoded words with refined text features."""
        if self.of("templates"):
            raise ValueError(
                f"refinement {next(iter(texts))!r} changes text features, and {next(iter(self.of('templates')))!r} "
                "makes its own; leave one out."
            )
        processor, embeds = self.segmenter.processor, encoded.text_embeds  # type: ignore[attr-defined]
        for row in texts.values():

            def encode(labels: Labels) -> Tensor:
                return processor.encode_labels(self.model, labels, templates).text_embeds

            embeds = row.apply(encode, encoded.labels, embeds, row.settings)
        return replace(encoded, text_embeds=embeds)

    def _maps(self, name: str, pixel_values: Tensor, encoded: Any) -> FeatureScores:
        (maps,) = self.segmenter(pixel_values, encoded)
        return _features_of(name, maps)

    @torch.no_grad()
    def __call__(self, pixel_values: Tensor, encoded: Any) -> list[ScoreMaps]:
        """See `Segmenter`."""
        maps = self.segmenter(pixel_values, encoded)
        images = (ClipInternals(self.model, single) for single in pixel_values.split(1))
        return [self._refined(*pair, encoded) for pair in zip(images, maps, strict=True)]

    def _refined(self, image: ClipInternals, maps: ScoreMaps, encoded: Any) -> ScoreMaps:
        if texts := self.of("texts"):  # which are not of length one
            maps = replace(_features_of(next(iter(texts)), maps), text=encoded.text_embeds.float().to(maps.device))
        if self.of("scores", "templates"):
            maps = self._rescored(image, maps, encoded)
        for refinement in self.of("maps").values():
            maps = _with_guide(maps, refinement, image.pixel_values[0].float())
        votes: list[Any] = []
        for row in self.of("labels").values():
            votes.append(partial(row.apply, image=image, settings=row.settings))
            if row.networks:
                asked = {name: self.further[name] for name in row.networks}
                ids = torch.tensor(encoded.labels.class_ids, device=maps.device)
                votes[-1] = partial(votes[-1], maps=maps, class_ids=ids, **asked)
        return replace(maps, corrections=(*maps.corrections, *votes))

    def _rescored(self, image: ClipInternals, maps: ScoreMaps, encoded: Any) -> ScoreMaps:
        """With the refinements of scores and templates; they act on a grid."""
        name = next(iter(self.of("scores", "templates")))
        if not isinstance(maps, GridScores):
            raise ValueError(f"refinement {name!r} acts on the scores of patches, and this method has none.")
        ids = torch.tensor(column_ids(encoded.labels), device=maps.device)
        scene = Scene(image, F.normalize(encoded.text_embeds.float(), dim=-1), ids, encoded.labels.background)

        def refined(scores: Tensor, text_embeds: Tensor) -> Tensor:
            for refinement in self.of("scores").values():
                scores = refinement.apply(scores, replace(scene, text_embeds=text_embeds), refinement.settings)
            return scores

        fields: dict[str, Any] = {
            "size_hw": maps.size_hw,
            "logit_scale": maps.logit_scale,
            "corrections": maps.corrections,
        }
        if not self.of("templates"):
            return GridScores.of(refined(maps.grid, scene.text_embeds), coverage_hw=maps.coverage_hw, **fields)
        patches = _features_of(name, maps).scores
        tables = [
            refined(torch.einsum("kd,ijd->kij", names, patches), names)
            for names in (*encoded.experts.to(maps.device), scene.text_embeds)
        ]
        ((_, floss),) = self.of("templates").items()
        make = fused(tables, maps.coverage_hw, floss.settings)
        return FullScores(make=make, num_names=maps.num_names, device=maps.device, patches_hw=maps.grid_hw, **fields)


def _features_of(name: str, maps: ScoreMaps) -> FeatureScores:
    if not isinstance(maps, FeatureScores):
        raise ValueError(f"refinement {name!r} changes text features, and this method's scores are none of features.")
    return maps


def _with_guide(maps: ScoreMaps, refinement: Refinement, pixels: Tensor) -> ScoreMaps:
    """The full-resolution maps after a refinement that follows the image, (3, H, W), at the size of the label map."""
    refined: dict[tuple[int, int], Any] = {}  # of the size at hand; what it knows of the image is made once

    def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
        if size_hw not in refined:
            guide = F.interpolate(pixels[None], size=size_hw, mode="bilinear", align_corners=False)[0]
            refined.clear()
            refined[size_hw] = refinement.apply(maps.at(size_hw), guide.to(maps.device), refinement.settings)
        return refined[size_hw](names)

    return FullScores(
        make=make,
        size_hw=maps.size_hw,
        num_names=maps.num_names,
        device=maps.device,
        logit_scale=maps.logit_scale,
        corrections=maps.corrections,
        patches_hw=maps.grid_hw,
    )


def column_ids(labels: Labels) -> list[int]:
    """The class of each name from 0 up, where a name that only competes has a class of its own after the others."""
    others = iter(range(len(labels), len(labels) + len(labels.negatives)))
    return [next(others) if index < 0 else index for index in labels.class_ids]


@sliding_scores.register
def _(segmenter: Refined, window_px: int, stride_px: int) -> Segmenter:
    """Scores and templates are refined in each window, full maps and labels once, as the authors' codes do."""
    settings = {name: row.settings for name, row in segmenter.refinements.items()}
    inside, outside = segmenter.of("texts", "scores", "templates"), segmenter.of("maps", "labels")
    inner: Any = segmenter.segmenter
    if inside:
        inner = SlidingScores(Refined(inner, inside, segmenter.model, settings), window_px, stride_px)
    else:
        inner = sliding_scores(inner, window_px, stride_px)
    return Refined(inner, outside, segmenter.model, settings, segmenter.further) if outside else inner
