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
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..prompts_spar import IMAGENET_TEMPLATES, Labels, check_templates
from ..segmentation_spar import axis_weights
from .label_maps import MAP_NUMBERS, Maps
from .scores import SOFTMAX_SCALE, sum_of_classes

TEMPLATES_PER_NAME = 4


def rank_templates(images: Iterable[Tensor], template_embeds: Tensor, class_ids: Sequence[int]) -> list[list[int]]:
    """For each name its class's templates, surest first, at most four; all that there are if none finds the class.

    Args:
        images: L2-normalised patch features (..., D) of each, without labels.
        template_embeds: (T, K, D), L2-normalised: each name in each template.
        class_ids: The class of each name (K).
    """
    num_templates, num_names, _ = template_embeds.shape
    sums = torch.zeros(num_templates, num_names, dtype=torch.float64)
    counts = torch.zeros(num_templates, num_names, dtype=torch.float64)
    for patches in images:
        for template, names in enumerate(template_embeds.to(patches.device)):
            probabilities = (SOFTMAX_SCALE * patches.flatten(0, -2) @ names.T).softmax(-1)  # (N, K)
            entropy = -(probabilities * (probabilities + 1e-10).log()).sum(-1).double()
            winner = probabilities.argmax(-1)
            sums[template] += torch.bincount(winner, entropy, minlength=num_names).cpu()
            counts[template] += torch.bincount(winner, minlength=num_names).cpu()
    classes = torch.tensor(class_ids)
    sums, counts = (sum_of_classes(numbers.T, classes).T for numbers in (sums, counts))  # (T, C)
    order = torch.where(counts > 0, sums / counts, torch.inf).argsort(dim=0, stable=True)
    chosen = []
    for label in class_ids:
        found = [index for index in order[:, label].tolist() if counts[index, label] > 0]
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
    coverage_hw: tuple[float, float],
) -> Maps:
    """The probabilities of the expert that is heard at each pixel; K^2 h w numbers are held, 0.24 GB for 150 names.

    Args:
        scores_of: text features (K, D) -> scores (K, h, w).
        experts: (K, K, D), from `expert_embeds`.
        default: (K, D), the classifier where no expert is heard.
        size_hw: size of the label map.
        coverage_hw: see `axis_weights`.
    """

    # (K + 1, h, w, K): of each expert, and last of the classifier where nobody is heard.
    tables = torch.stack(
        [(SOFTMAX_SCALE * scores_of(names)).softmax(0).movedim(0, -1) for names in (*experts, default)]
    )
    down, across = (
        axis_weights(size, grid, covered).to(default.device)
        for size, grid, covered in zip(size_hw, tables.shape[1:3], coverage_hw, strict=True)
    )
    nobody = len(experts)
    heard = torch.full(size_hw, nobody, device=default.device)
    surest = torch.zeros(size_hw, device=default.device)
    step = max(1, MAP_NUMBERS.get(default.device.type, MAP_NUMBERS["cpu"]) // (nobody * size_hw[1]))
    for name in range(nobody):
        table = tables[name].movedim(-1, 0)  # (K, h, w)
        windows = may_win(table, name)
        rows, columns = pixels_over(windows.any(1), down), pixels_over(windows.any(0), across)
        resized = table @ across[columns].T  # (K, h, columns)
        for top in range(rows.start, rows.stop, step):
            band = slice(top, min(top + step, rows.stop))
            maps = down[band] @ resized
            sure = surest[band, columns]  # a view
            better = (maps[name] == maps.amax(0)) & (maps[name] > sure)
            heard[band, columns].masked_fill_(better, name)
            sure.copy_(torch.where(better, maps[name], sure))

    (y, rows_around), (x, columns_around) = (weights.topk(min(2, weights.shape[1])) for weights in (down, across))

    def maps_of(names: slice) -> Tensor:
        total = default.new_zeros(*size_hw, len(default[names]))
        for row in range(y.shape[1]):  # of the two patches around each pixel, along each axis
            for column in range(x.shape[1]):
                weight = y[:, None, row] * x[:, column]
                corner = tables[..., names][heard, rows_around[:, None, row], columns_around[:, column]]
                total += weight[..., None] * corner
        return total.movedim(-1, 0)

    return maps_of


def may_win(table: Tensor, name: int) -> Tensor:
    """Between which four patches the name can be highest: not where another is above it at all four.

    (K, h, w) -> (h - 1, w - 1) bool; an axis of one patch keeps it.
    """
    above = (table > table[name]).float()
    always_above = -F.max_pool2d(-above, (min(2, table.shape[1]), min(2, table.shape[2])), stride=1)
    return always_above.amax(0) == 0


def pixels_over(windows: Tensor, weights: Tensor) -> slice:
    """The run of pixels that lie between the patches of the windows marked along an axis; may be empty.

    Args:
        windows: (patches - 1) bool, window i reaches from patch i to the next.
        weights: (pixels, patches), from `axis_weights`.
    """
    marked = windows.nonzero().flatten().tolist()
    if not marked:
        return slice(0, 0)
    inside = weights[:, marked[0] : marked[-1] + 2].sum(1) > 1 - 1e-4
    pixels = inside.nonzero().flatten().tolist()
    return slice(pixels[0], pixels[-1] + 1) if pixels else slice(0, 0)


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
    features = (unit_features(encoder, processor(images=image)["pixel_values"]) for image in images)
    chosen = rank_templates(features, embeds, labels.class_ids)
    return {name: [templates[i] for i in indices] for name, indices in zip(labels.names, chosen, strict=True)}


def candidates(processor: Any, templates: str | Iterable[str] | None) -> tuple[str, ...]:
    """The templates to choose from."""
    return check_templates(templates or processor.templates or IMAGENET_TEMPLATES)


@torch.no_grad()
def unit_features(encoder: Any, pixel_values: Tensor) -> Tensor:
    """L2-normalised patch features (h, w, D) of one image (1, 3, H, W)."""
    outputs = encoder(pixel_values.to(encoder.device, encoder.dtype))
    return F.normalize(outputs.patch_embeds[0].float(), dim=-1)
