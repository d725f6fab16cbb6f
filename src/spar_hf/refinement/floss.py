"""FLOSS: for each name the few prompt templates that make the surest classifier, chosen without labels.

Paper: FLOSS (Benigmim et al., ICCV 2025, arXiv 2504.10487). On unlabelled images each template alone is a classifier;
among the pixels that it calls a name, the mean entropy of its probabilities says how sure it is of that name. The 4
templates with the lowest entropy make the name's expert, a classifier of all names. An expert is heard where it finds
its own name; where several do, the surest; where none does, the classifier with all templates.

Choices, as the authors' code runs: the soft-max is of 100 times the cosine, on the grid, and is resized afterwards;
templates that never find the name do not count, and a name that no template finds keeps them all. Each name has an
expert, a synonym too. Features of several templates are averaged and normalised, as in their NACLIP; their MaskCLIP
leaves out the second. The unlabelled images are those of the command, where the authors take the training set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..prompts_spar import IMAGENET_TEMPLATES, Labels, check_templates
from ..segmentation_spar import axis_weights
from .label_maps import MAP_NUMBERS, Maps
from .scores import SOFTMAX_SCALE

TEMPLATES_PER_NAME = 4
Features = tuple[Tensor, tuple[int, int], tuple[float, float]]
"""Unit patch features (h, w, D) of an image, the size of its label map, and the image's extent over the grid's."""


def bands(probabilities: Tensor, size_hw: tuple[int, int], covered_hw: tuple[float, float]) -> Iterable[Tensor]:
    """Bilinear maps (K, rows, W) of the probabilities (K, h, w), some rows at a time."""
    rows, columns = (
        axis_weights(size, grid, covered).to(probabilities.device)
        for size, grid, covered in zip(size_hw, probabilities.shape[1:], covered_hw, strict=True)
    )
    numbers = MAP_NUMBERS.get(probabilities.device.type, MAP_NUMBERS["cpu"])
    step = max(1, numbers // (len(probabilities) * size_hw[1]))
    across = probabilities @ columns.T  # (K, h, W)
    for top in range(0, size_hw[0], step):
        yield rows[top : top + step] @ across


def rank_templates(images: Iterable[Features], template_embeds: Tensor) -> list[list[int]]:
    """For each name its templates, surest first, at most four; all that there are for a name that none finds.

    Args:
        images: without labels.
        template_embeds: (T, K, D), L2-normalised: each name in each template.
    """
    num_templates, num_names, _ = template_embeds.shape
    sums = torch.zeros(num_templates, num_names, dtype=torch.float64)
    counts = torch.zeros(num_templates, num_names, dtype=torch.float64)
    for patches, size_hw, covered_hw in images:
        for template, names in enumerate(template_embeds.to(patches.device)):
            probabilities = (SOFTMAX_SCALE * torch.einsum("kd,ijd->kij", names, patches)).softmax(0)
            for band in bands(probabilities, size_hw, covered_hw):
                entropy = -(band * (band + 1e-10).log()).sum(0).flatten().double()
                winner = band.argmax(0).flatten()
                sums[template] += torch.bincount(winner, entropy, minlength=num_names).cpu()
                counts[template] += torch.bincount(winner, minlength=num_names).cpu()
    entropy = torch.where(counts > 0, sums / counts, torch.inf)
    order = entropy.argsort(dim=0, stable=True)  # (T, K)
    chosen = []
    for name in range(num_names):
        found = [index for index in order[:, name].tolist() if counts[index, name] > 0]
        chosen.append(found[:TEMPLATES_PER_NAME] or list(range(num_templates)))
    return chosen


def encode_templates(model: Any, processor: Any, labels: Labels, templates: Sequence[str]) -> Tensor:
    """Each name in each template alone, (T, K, D), L2-normalised."""
    return torch.stack([processor.encode_labels(model, labels, template).text_embeds for template in templates])


def expert_embeds(template_embeds: Tensor, chosen: list[list[int]]) -> Tensor:
    """(K, K, D): row e holds all names in the templates of name e."""
    return torch.stack([F.normalize(template_embeds[indices].mean(0), dim=-1) for indices in chosen])


def fused(
    scores_of: Callable[[Tensor], Tensor],
    experts: Tensor,
    default: Tensor,
    size_hw: tuple[int, int],
    covered_hw: tuple[float, float],
) -> Maps:
    """The probabilities of the expert that is heard at each pixel; K^2 h w numbers are held, 0.24 GB for 150 names.

    Args:
        scores_of: text features (K, D) -> scores (K, h, w).
        experts: (K, K, D), from `expert_embeds`.
        default: (K, D), the classifier where no expert is heard.
        size_hw: size of the label map.
        covered_hw: see `axis_weights`.
    """

    # (K, h, w) of each expert, and last those of the classifier where nobody is heard.
    tables = [(SOFTMAX_SCALE * scores_of(names)).softmax(0) for names in (*experts, default)]
    nobody = len(experts)
    heard = torch.full(size_hw, nobody, device=default.device)
    surest = torch.zeros(size_hw, device=default.device)
    for name, table in enumerate(tables[:nobody]):
        top = 0
        for band in bands(table, size_hw, covered_hw):
            rows = slice(top, top := top + band.shape[1])
            better = (band.argmax(0) == name) & (band[name] > surest[rows])
            heard[rows].masked_fill_(better, name)
            surest[rows] = torch.where(better, band[name], surest[rows])

    def maps(names: slice) -> Tensor:
        total = default.new_zeros(len(default[names]), *size_hw)
        for expert in heard.unique().tolist():
            full = torch.cat(list(bands(tables[expert][names], size_hw, covered_hw)), dim=1)
            total = torch.where(heard == expert, full, total)
        return total

    return maps


def floss_templates(
    model: Any,
    processor: Any,
    labels: Any,
    images: Iterable[Any],
    encoder: Any = None,
    templates: str | Iterable[str] | None = None,
) -> dict[str, list[str]]:
    """For each name its prompt templates, the surest first (FLOSS), from images without labels.

    Args:
        model: A `SparModel`.
        processor: Its `SparProcessor`, which also sets the size.
        labels: A vocabulary; see `Labels.parse`.
        images: In any form that the processor reads.
        encoder: Any dense encoder; None is the model's vision tower.
        templates: To choose from; None is the processor's own.
    """
    labels = Labels.parse(labels)
    templates = candidates(processor, templates)
    encoder = model.vision_model if encoder is None else encoder
    embeds = encode_templates(model, processor, labels, templates)
    inputs = (processor(images=image) for image in images)
    features = (unit_features(encoder, i["pixel_values"], tuple(i["original_sizes"][0].tolist())) for i in inputs)
    chosen = rank_templates(features, embeds)
    return {name: [templates[i] for i in indices] for name, indices in zip(labels.names, chosen, strict=True)}


def candidates(processor: Any, templates: str | Iterable[str] | None) -> tuple[str, ...]:
    """The templates to choose from."""
    return check_templates(templates or processor.templates or IMAGENET_TEMPLATES)


@torch.no_grad()
def unit_features(encoder: Any, pixel_values: Tensor, size_hw: tuple[int, int]) -> Features:
    """One image (1, 3, H, W) through a dense encoder."""
    outputs = encoder(pixel_values.to(encoder.device, encoder.dtype))
    covered_hw = (1.0, 1.0)
    if outputs.extent_hw is not None:
        covered_hw = tuple(image / extent for image, extent in zip(outputs.image_hw, outputs.extent_hw, strict=True))
    return F.normalize(outputs.patch_embeds[0].float(), dim=-1), size_hw, covered_hw
