"""FLOSS: for each name the few prompt templates that make the surest classifier, chosen without labels.

Paper: FLOSS (Benigmim et al., ICCV 2025, arXiv 2504.10487). On unlabelled images each template alone is a classifier;
among the pixels that it calls a name, the mean entropy of its probabilities says how sure it is of that name. The 4
templates with the lowest entropy make the name's expert, a classifier of all names. An expert is heard where it finds
its own name; where several do, the surest; where none does, the classifier with all templates.

Choices, as the authors' code runs: the soft-max is of 100 times the cosine, on the grid as in their MaskCLIP, and
experts are compared when it is resized; templates that never find the name do not count. The names of a class are
ranked together and share its templates. Features of several templates are averaged and normalised, as in their NACLIP;
their MaskCLIP leaves out the second.
Deviations: entropies are taken at the patches; theirs, at the pixels between them, choose other templates where maps
are noisy (two thirds of them were the same on random maps). A name that no template finds keeps them all; theirs stops
with an error. The unlabelled images are those of the command, theirs the training set.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid_spar import axis_positions, resample_axis
from ..prompts_spar import IMAGENET_TEMPLATES, Labels, check_templates
from ..segmentation_spar import MAP_NUMBERS, FeatureScores
from .scores import sum_of_classes


@dataclass(frozen=True)
class Settings:
    """FLOSS's numbers: how many templates make an expert, and the factor on the cosine before the soft-max."""

    templates: int = 4
    softmax_scale: float = 100.0


def rank_templates(
    images: Iterable[Tensor], template_embeds: Tensor, class_ids: Sequence[int], settings: Settings
) -> list[list[int]]:
    """For each name its class's templates, surest first, the first few; all that there are if none finds the class.

    Args:
        images: L2-normalised patch features (..., D) of each, without labels.
        template_embeds: (T, K, D), L2-normalised: each name in each template.
        class_ids: The class of each name (K), from 0 up.
        settings: How many templates, and the soft-max.

    Raises:
        ValueError: There are no images.
    """
    num_templates, num_names, _ = template_embeds.shape
    sums = torch.zeros(num_templates, num_names, dtype=torch.float64)
    counts = torch.zeros(num_templates, num_names, dtype=torch.float64)
    for patches in images:
        for template, names in enumerate(template_embeds.to(patches.device)):
            probabilities = (settings.softmax_scale * patches.flatten(0, -2) @ names.T).softmax(-1)  # (N, K)
            entropy = -(probabilities * (probabilities + 1e-10).log()).sum(-1).double()
            winner = probabilities.argmax(-1)
            sums[template] += torch.bincount(winner, entropy, minlength=num_names).cpu()
            counts[template] += torch.bincount(winner, minlength=num_names).cpu()
    if not counts.any():
        raise ValueError("floss chooses templates by unlabelled images, and there are none; pass unlabelled=...")
    classes = torch.tensor(class_ids)
    sums, counts = (sum_of_classes(numbers.T, classes).T for numbers in (sums, counts))  # (T, C)
    order = torch.where(counts > 0, sums / counts, torch.inf).argsort(dim=0, stable=True)
    chosen = []
    for label in class_ids:
        found = [index for index in order[:, label].tolist() if counts[index, label] > 0]
        chosen.append(found[: settings.templates] or list(range(num_templates)))
    return chosen


def encode_templates(model: Any, processor: Any, labels: Labels, templates: Sequence[str]) -> Tensor:
    """Each name in each template alone, (T, K, D), L2-normalised."""
    return torch.stack([processor.encode_labels(model, labels, template).text_embeds for template in templates])


def expert_embeds(template_embeds: Tensor, chosen: list[list[int]]) -> Tensor:
    """(K, K, D): row e holds all names in the templates of name e."""
    return torch.stack([F.normalize(template_embeds[indices].mean(0), dim=-1) for indices in chosen])


def fused(
    scores: Sequence[Tensor], coverage_hw: tuple[float, float], settings: Settings
) -> Callable[[slice, tuple[int, int]], Tensor]:
    """The probabilities of the expert that is heard at each pixel; K^2 h w numbers are held, 0.24 GB for 150 names.

    Args:
        scores: (K, h, w) of each of the K experts, and last those of the classifier where no expert is heard.
        coverage_hw: see `coverage`.
        settings: the soft-max.

    Returns:
        What makes the maps (k, H, W) of some names at a size.
    """
    # (K + 1, h, w, K)
    tables = torch.stack([(settings.softmax_scale * single).softmax(0).movedim(0, -1) for single in scores])
    heard_at: dict[tuple[int, int], Tensor] = {}  # of the size at hand

    def maps_of(names: slice, size_hw: tuple[int, int]) -> Tensor:
        y, x = (
            axis_positions(slice(0, size), size, grid, covered, tables.device)
            for size, grid, covered in zip(size_hw, tables.shape[1:3], coverage_hw, strict=True)
        )
        if size_hw not in heard_at:
            heard_at.clear()
            heard_at[size_hw] = loudest(tables, y, x)
        heard = heard_at[size_hw]
        total = tables.new_zeros(*size_hw, tables[0, 0, 0, names].numel())
        for rows, row_weight in corners(y, tables.shape[1]):  # the two patches around each pixel, along each axis
            for columns, column_weight in corners(x, tables.shape[2]):
                weight = row_weight[:, None] * column_weight
                total += weight[..., None] * tables[..., names][heard, rows[:, None], columns]
        return total.movedim(-1, 0)

    return maps_of


def corners(positions: Tensor, grid: int) -> list[tuple[Tensor, Tensor]]:
    """The patches before and after each position of an axis, and their weights."""
    before = positions.long()
    weight = (positions - before).float()
    return [(before, 1 - weight), ((before + 1).clamp(max=grid - 1), weight)]


def loudest(tables: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """The expert that is heard at each pixel (H, W): the surest of those that find their own name; the last, if none.

    Args:
        tables: probabilities (K + 1, h, w, K) of each expert.
        y, x: where the pixels lie on the grid; see `axis_positions`.
    """
    nobody = len(tables) - 1
    heard = torch.full((len(y), len(x)), nobody, device=tables.device)
    surest = torch.zeros(heard.shape, device=tables.device)
    step = max(1, MAP_NUMBERS.get(tables.device.type, MAP_NUMBERS["cpu"]) // (nobody * len(x)))
    for name in range(nobody):
        table = tables[name].movedim(-1, 0)  # (K, h, w)
        windows = may_win(table, name)
        rows, columns = pixels_over(windows.any(1), y), pixels_over(windows.any(0), x)
        resized = resample_axis(table, -1, x[columns])  # (K, h, columns)
        for top in range(rows.start, rows.stop, step):
            band = slice(top, min(top + step, rows.stop))
            maps = resample_axis(resized, -2, y[band])
            sure = surest[band, columns]  # a view
            better = (maps[name] == maps.amax(0)) & (maps[name] > sure)
            heard[band, columns].masked_fill_(better, name)
            sure.copy_(torch.where(better, maps[name], sure))
    return heard


def may_win(table: Tensor, name: int) -> Tensor:
    """Between which four patches the name can be highest: not where another is above it at all four.

    (K, h, w) -> (h - 1, w - 1) bool; an axis of one patch keeps it.
    """
    above = (table > table[name]).float()
    always_above = -F.max_pool2d(-above, (min(2, table.shape[1]), min(2, table.shape[2])), stride=1)
    return always_above.amax(0) == 0


def pixels_over(windows: Tensor, positions: Tensor) -> slice:
    """The run of pixels that lie between the patches of the windows marked along an axis; may be empty.

    Args:
        windows: (patches - 1) bool, window i reaches from patch i to the next.
        positions: of the pixels (n), ascending; see `axis_positions`.
    """
    marked = windows.nonzero().flatten().tolist()
    if not marked:
        return slice(0, 0)
    inside = (positions >= marked[0] - 1e-4) & (positions <= marked[-1] + 1 + 1e-4)
    pixels = inside.nonzero().flatten().tolist()
    return slice(pixels[0], pixels[-1] + 1) if pixels else slice(0, 0)


def floss_templates(
    segmenter: Any,
    labels: Any,
    images: Iterable[Any],
    templates: str | Iterable[str] | None = None,
    settings: Settings = Settings(),
) -> dict[str, list[str]]:
    """For each name its prompt templates, the surest first (FLOSS), from images without labels.

    Args:
        segmenter: The segmenter of a dense encoder, `FromFeatures`; its processor also sets the size.
        labels: A vocabulary; see `Labels.parse`.
        images: In any form that the processor reads.
        templates: To choose from; None is the processor's own.
        settings: How many templates, and the soft-max.
    """
    processor = segmenter.processor
    encoded = segmenter.encode_labels(labels, templates)
    templates = candidates(processor, templates)
    embeds = encode_templates(segmenter.model, processor, encoded.labels, templates)
    features = (unit_patches(segmenter(processor(images=image)["pixel_values"], encoded)[0]) for image in images)
    chosen = rank_templates(features, embeds, encoded.labels.class_ids, settings)
    return {name: [templates[i] for i in best] for name, best in zip(encoded.labels.names, chosen, strict=True)}


def candidates(processor: Any, templates: str | Iterable[str] | None) -> tuple[str, ...]:
    """The templates to choose from."""
    return check_templates(templates or processor.templates or IMAGENET_TEMPLATES)


def unit_patches(maps: FeatureScores) -> Tensor:
    """L2-normalised patch features (h, w, D) of one image."""
    return F.normalize(maps.scores, dim=-1)
