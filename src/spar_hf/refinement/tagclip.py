"""TagCLIP's class re-identification: which classes are in the image at all; the others are masked out.

Paper: TagCLIP (Lin et al., AAAI 2024, arXiv 2312.12828): patch probabilities, refined with the attention of the blocks
9 to 11 where at least 4 blocks agree ("dual-masking attention refinement"), give a first score for each class; a crop
around each likely class is looked at again by CLIP ("class-wise re-identification") and the two scores are averaged.

Choices, as the authors' code runs: the soft-max is over all names, with the model's own logit scale; thresholds are
half of the way from the lowest to the highest score, first of the refined map, at the end of the classes; boxes stop
one short of the last row and column; if one class's box is empty the crops after it are left out. Names of the
background are columns of their own in the maps, and no classes: they have no crops and are never masked out.
The second mask is the union of the bounding boxes (8-connected) of what lies above the map's mean, in 256 steps.
Deviations: patch probabilities come from the encoder at hand and not from MaskCLIP; positions and sides that are no
multiple of the patch follow the network's own rules (theirs stretches the image); the probabilities of synonyms are
added up; the classes that fail are masked out of the label map, while the authors stop at the tags; of their settings
there is the one for objects. In a network of another depth a third of the blocks must agree, and the maps are those of
the blocks after two thirds of the depth but for the last.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .clip_internals import ClipInternals, Scene, covered_pixels
from .scores import MASKED_OUT, sum_of_classes


@dataclass(frozen=True)
class Settings:
    """TagCLIP's numbers.

    Attributes:
        threshold: how far from the lowest to the highest score a class must be: of the refined map, of the map that
            gives a class its box, and of the classes at the end.
    """

    threshold: float = 0.5


def reidentification(scores: Tensor, scene: Scene, settings: Settings) -> Tensor:
    """masks out the names of classes that are not in the image; (K, h, w) -> (K, h, w)."""
    columns, num_classes = columns_of(scene.class_ids, scene.background)
    if num_classes == 0:
        return scores
    tags = class_scores(scores, scene, columns, num_classes, settings.threshold)
    found = torch.ones(int(columns.max()) + 1, dtype=torch.bool, device=tags.device)  # the background's stay
    found[:num_classes] = tags > tags.min() + settings.threshold * (tags.max() - tags.min())
    found[tags.argmax()] = True
    return scores.masked_fill(~found[columns][:, None, None], MASKED_OUT)


def columns_of(class_ids: Tensor, background: int | None) -> tuple[Tensor, int]:
    """The column of each name, (K), and the number C of classes: columns 0 to C - 1, shared by the names of a class.

    Each name of the background has one of its own after them.
    """
    is_background = (
        class_ids == background if background is not None else torch.zeros_like(class_ids, dtype=torch.bool)
    )
    classes, columns = class_ids[~is_background].unique(return_inverse=True)
    result = torch.empty_like(class_ids)
    result[~is_background] = columns
    result[is_background] = len(classes) + torch.arange(int(is_background.sum()), device=class_ids.device)
    return result, len(classes)


def class_scores(scores: Tensor, scene: Scene, columns: Tensor, num_classes: int, fraction: float) -> Tensor:
    """How much each class is in the image, (C), from 0 to about 1; `columns` as `columns_of` gives them."""
    grid_hw, image = (scores.shape[1], scores.shape[2]), scene.image
    coarse = sum_of_classes((image.logit_scale * scores).softmax(0), columns).flatten(1).T  # (N, C + background names)
    attention = voted_attention(image)
    refined = attention @ coarse
    boxes = component_boxes(quantised_masks(refined.T.unflatten(1, grid_hw)))
    # (attention * box) @ coarse, box by box, is attention @ (box * coarse): no N x N matrix for each class.
    refined = attention @ (boxes.flatten(1).T * coarse)

    tags = refined.amax(0)[:num_classes]
    threshold = refined.min() + fraction * (refined.max() - refined.min())
    for label in (tags > threshold).nonzero().flatten().tolist():
        box = box_of((rescaled(refined[:, label]) > fraction).unflatten(0, grid_hw))
        if box is None:
            break
        seen = sum_of_classes(crop_probability(image, *box, scene.text_embeds), columns)
        tags[label] = (tags[label] + seen[label]) / 2
    return tags


def voted_attention(image: ClipInternals) -> Tensor:
    """Mean attention of the blocks 9 to 11, (N, N), zero where fewer than 4 blocks are above their own mean."""
    last = max(image.num_blocks - 1, 1)
    first = min(math.ceil(8 * image.num_blocks / 12), last - 1)  # counted from 0; 8, 9 and 10 of 12
    votes = mean = torch.zeros(())
    for index in range(image.num_blocks):
        attention = image.attention(index)
        votes = votes + (attention > attention.mean())
        if first <= index < last:
            mean = mean + attention / (last - first)
    return mean * (votes >= math.ceil(image.num_blocks / 3))


def rescaled(values: Tensor) -> Tensor:
    """The last axis from 0 to 1: its minimum subtracted, then divided by its maximum."""
    shifted = values - values.amin(-1, keepdim=True)
    return shifted / shifted.amax(-1, keepdim=True)


def quantised_masks(maps: Tensor) -> Tensor:
    """Where each map (K, h, w), cut to 256 steps, lies above its mean; bool."""
    values = rescaled(maps.flatten(1))
    steps = (values * 255).nan_to_num().floor()  # a constant map is 0 / 0, and has no box
    threshold = (values.mean(1).nan_to_num() * steps.amax(1)).floor()
    return (steps > threshold[:, None]).view(maps.shape)


def component_boxes(masks: Tensor) -> Tensor:
    """The union of the bounding boxes of each mask's 8-connected components, (K, h, w) -> (K, h, w) bool."""
    num_maps, height, width = masks.shape
    number = torch.arange(1, masks.numel() + 1, dtype=torch.float64, device=masks.device).view(masks.shape)
    labels = number * masks
    while True:  # the largest number of a component spreads over it
        spread = F.max_pool2d(labels[:, None], 3, stride=1, padding=1)[:, 0] * masks
        if torch.equal(spread, labels):
            break
        labels = spread
    which, y, x = masks.nonzero(as_tuple=True)
    _, component = labels[masks].unique(return_inverse=True)
    count = int(component.max()) + 1 if len(component) else 0

    def extreme(values: Tensor, reduce: str) -> Tensor:
        return values.new_zeros(count).scatter_reduce_(0, component, values, reduce, include_self=False)

    # Ends are exclusive and, in the authors' code, at most the last row and column themselves.
    top, left, owner = extreme(y, "amin"), extreme(x, "amin"), extreme(which, "amin")
    bottom, right = (extreme(y, "amax") + 1).clamp(max=height - 1), (extreme(x, "amax") + 1).clamp(max=width - 1)
    # A box as four corners of which the running sums along both axes make its area.
    corners = torch.zeros(num_maps, height + 1, width + 1, dtype=torch.int64, device=masks.device)
    for rows, columns, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        box_not_empty = (bottom > top) & (right > left)
        corners.index_put_((owner, rows, columns), sign * box_not_empty.long(), accumulate=True)
    return corners.cumsum(1).cumsum(2)[:, :height, :width] > 0


def box_of(mask: Tensor) -> tuple[int, int, int, int, Tensor] | None:
    """Top, bottom, left, right of a mask, ends exclusive and one short of the border, and the mask in it, if any."""
    rows, columns = mask.any(1).nonzero().flatten().tolist(), mask.any(0).nonzero().flatten().tolist()
    if not rows:
        return None
    top, bottom = rows[0], min(rows[-1] + 1, mask.shape[0] - 1)
    left, right = columns[0], min(columns[-1] + 1, mask.shape[1] - 1)
    if top == bottom or left == right:
        return None
    return top, bottom, left, right, mask[top:bottom, left:right]


def crop_probability(
    image: ClipInternals, top: int, bottom: int, left: int, right: int, mask: Tensor, text_embeds: Tensor
) -> Tensor:
    """Probability of each name (K) for the crop, at the network's native size, its class token kept to the mask."""
    patch_px, native_px = image.network.config.patch_size, image.network.config.image_size
    pixels = covered_pixels(image.pixel_values, image.network.config)
    crop = pixels[..., top * patch_px : bottom * patch_px, left * patch_px : right * patch_px]
    crop = F.interpolate(crop.float(), size=(native_px, native_px), mode="bilinear", align_corners=False)
    side = native_px // patch_px
    patches = F.interpolate(mask[None, None].float(), size=(side, side), mode="nearest").flatten().bool()
    embed = image.class_embed_of(crop, patches.to(image.network.device))
    return (image.logit_scale * (text_embeds @ embed)).softmax(0)
