"""Refinement: the label options that are on, in one object for the pipeline, the evaluation and the command line."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..encoders.base import DenseEncoder
from ..encoders.sliding_window import Windows
from ..prompts_spar import Labels
from ..segmentation_spar import axis_weights
from .clip_internals import ClipInternals, check_network
from .floss import candidates, encode_templates, expert_embeds, fused, rank_templates, unit_features
from .label_maps import Maps, averaged, best_class, upsampled
from .options import find_options
from .views import ViewEnsemble


class Refinement:
    """Label options, composed in the order of `LABEL_OPTIONS`.

    refinement = Refinement(model, ["pamr", "prompt-denoising"])
    segment("street.jpg", candidate_labels=["road", "car", "sky"], refinement=refinement)

    Args:
        model: A `SparModel`; options that look inside ask its vision tower.
        names: Keys of `LABEL_OPTIONS`, in any order.
        encoder: Any dense encoder; None is the model's vision tower.

    Attributes:
        names: What is on, in the order in which it runs.
        encoder: `encoder`, with the views that are on. Features must come from it, or from a window around it.

    Raises:
        ValueError: There is no such option, or it asks for what the model's vision tower lacks.
    """

    def __init__(self, model: Any, names: Iterable[str], encoder: DenseEncoder | None = None) -> None:
        self.model = model
        self.options = find_options(names)
        self.names = tuple(self.options)
        for name, option in self.options.items():
            if option.looks_inside:
                check_network(model.vision_model, name)
        views = [view for option in self._of("views") for view in option.apply]
        self.encoder: DenseEncoder = model.vision_model if encoder is None else encoder
        if views:
            self.encoder = ViewEnsemble(self.encoder, views)
        self.experts: Tensor | None = None  # (K, K, D), after `fit`

    def _of(self, stage: str) -> list[Any]:
        return [option for option in self.options.values() if option.stage == stage]

    def fit(
        self,
        encoder: DenseEncoder,
        processor: Any,
        labels: Any,
        images: Iterable[Tensor],
        templates: Iterable[str] | None = None,
    ) -> None:
        """Looks at unlabelled images, where an option needs to (floss); the images are not read otherwise.

        Args:
            encoder: What the features will come from.
            processor: Its `encode_labels` embeds the names.
            labels: The vocabulary of the label maps to come.
            images: Pixels (1, 3, H, W) of each.
            templates: To choose from; None is the processor's own.
        """
        if not self._of("templates"):
            return
        embeds = encode_templates(self.model, processor, Labels.parse(labels), candidates(processor, templates))
        features = (unit_features(encoder, pixel_values) for pixel_values in images)
        self.experts = expert_embeds(embeds, rank_templates(features, embeds, Labels.parse(labels).class_ids))

    def label_maps(self, pixel_values: Tensor, windows: Windows | None = None) -> list[Callable[..., Tensor]]:
        """For each image of a batch (B, 3, H, W) what to call in the place of `segmentation_spar.label_map`.

        Args:
            pixel_values: What the encoder saw.
            windows: The encoder, if it keeps windows apart: their score maps are averaged, pixel by pixel. Options on
                scores and templates then run in each window, those on full maps and labels once.
        """
        return [
            partial(self._label_map, ClipInternals(self.model, single), windows) for single in pixel_values.split(1)
        ]

    @torch.no_grad()
    def _label_map(
        self,
        image: ClipInternals,
        windows: Windows | None,
        patch_embeds: Tensor,
        text_embeds: Tensor,
        class_ids: Tensor,
        size_hw: tuple[int, int],
        coverage_hw: tuple[float, float] = (1.0, 1.0),
        logit_scale: float = 40.0,
        background_threshold: float | None = None,
        background_class: int = 0,
        area_threshold: float | None = None,
    ) -> Tensor:
        """As `segmentation_spar.label_map`, with the options; one image at a time."""
        patches, text_embeds = self._unit_patches(patch_embeds), F.normalize(text_embeds.float(), dim=-1)
        names = (text_embeds, class_ids, None if background_threshold is None else background_class)
        if windows is None:
            maps = self._maps(image, patches, *names, size_hw, coverage_hw)
        else:
            image_hw = (image.pixel_values.shape[2], image.pixel_values.shape[3])
            places, window_hw = windows.places(image_hw), windows.window_hw(image_hw)
            crops = (image.crop(*place, *window_hw) for place in places)
            parts = [
                self._maps(crop, single, *names, window_hw, coverage_hw)
                for crop, single in zip(crops, patches, strict=True)
            ]
            maps = averaged(parts, places, window_hw, image_hw, size_hw)
        for option in self._of("maps"):
            pixels = image.pixel_values.float()
            guide = F.interpolate(pixels, size=size_hw, mode="bilinear", align_corners=False)[0]
            maps = option.apply(maps, guide.to(patches.device))
        labels = best_class(
            maps, class_ids, size_hw, logit_scale, background_threshold, background_class, area_threshold
        )
        for option in self._of("labels"):
            labels = option.apply(labels, image)
        return labels

    def _maps(
        self,
        image: ClipInternals,
        patches: Tensor,
        text_embeds: Tensor,
        class_ids: Tensor,
        background: int | None,
        size_hw: tuple[int, int],
        coverage_hw: tuple[float, float],
    ) -> Maps:
        """The score maps of an image or a window at full resolution, with the options on scores and templates."""

        def scores_of(names: Tensor) -> Tensor:
            scores = torch.einsum("kd,ijd->kij", names, patches)
            for option in self._of("scores"):
                scores = option.apply(scores, image, names, class_ids, background)
            return scores

        if self._of("templates"):
            return fused(scores_of, self._check_experts(text_embeds), text_embeds, size_hw, coverage_hw)
        rows, columns = (
            axis_weights(size, grid, covered).to(patches.device)
            for size, grid, covered in zip(size_hw, patches.shape, coverage_hw, strict=False)
        )
        return upsampled(scores_of(text_embeds), rows, columns)

    def _unit_patches(self, patch_embeds: Tensor) -> Tensor:
        """L2-normalised, or as they are where views have been normalised and averaged already."""
        if not self._of("views"):
            return F.normalize(patch_embeds.float(), dim=-1)
        if patch_embeds.float().norm(dim=-1).max() > 1.01:
            raise ValueError(
                f"the features are no mean over views, which {' and '.join(self.names)} need; "
                "take them from the refinement's own encoder (encoder=refinement.encoder)."
            )
        return patch_embeds.float()

    def _check_experts(self, text_embeds: Tensor) -> Tensor:
        if self.experts is None or len(self.experts) != len(text_embeds):
            known = "no vocabulary" if self.experts is None else f"{len(self.experts)} names"
            raise ValueError(
                f"floss has chosen templates for {known} and is asked for {len(text_embeds)} names; call "
                "refinement.fit with these labels and some unlabelled images first."
            )
        return self.experts.to(text_embeds.device)
