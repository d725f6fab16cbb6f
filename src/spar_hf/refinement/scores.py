"""Options that are one formula on the scores: MaskCLIP's prompt denoising and key smoothing, CLIP Surgery's removal.

Papers: MaskCLIP (Zhou et al., ECCV 2022, arXiv 2112.01071), section 3.3, with the thresholds of its code, 0.5 and 1.
CLIP Surgery (Li et al., Pattern Recognition 2025, arXiv 2304.05653), section 3.3, t = 2.
Each takes the scores (K, h, w), cosines unless a refinement before it changed them, and returns new ones.

Choices: both of MaskCLIP's take the soft-max of 100 times the cosine, whatever the evaluation's logit scale. The keys
have gone through the output projection, as its ViT hands them on, and its code normalises them along the patches, each
channel over the whole image, where the paper's formula has the cosine of two keys; the numbers were made with the
code, which is what runs here. CLIP Surgery's class token is that of CLIP's own path over the whole image; its code
sharpens with the factor 2 before the soft-max, as here.
Deviations: synonyms share a probability, so prompt denoising adds them up and masks out classes; theirs has one name
a class. If it would mask out all, it masks out none; theirs then calls every pixel the first class. CLIP Surgery's
demo divides each channel of the image's features by its length over all tokens, here each token has length one; for a
single name, of which nothing is left once the mean is subtracted, it subtracts the text features of "" instead.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .clip_internals import Scene

MASKED_OUT = -100.0  # below any cosine, and finite, so that it can be interpolated


@dataclass(frozen=True)
class DenoisingSettings:
    """MaskCLIP's prompt denoising: factor on the cosine before the soft-max, and the confidence a class must reach."""

    softmax_scale: float = 100.0
    min_confidence: float = 0.5


@dataclass(frozen=True)
class SmoothingSettings:
    """MaskCLIP's key smoothing: factor on the cosine before the soft-max, and the confidence that is left alone."""

    softmax_scale: float = 100.0
    smooth_below: float = 1.0


@dataclass(frozen=True)
class RedundancySettings:
    """CLIP Surgery's removal: factor on the image's cosines before the soft-max over names."""

    sharpness: float = 2.0


def sum_of_classes(probabilities: Tensor, class_ids: Tensor) -> Tensor:
    """Probabilities of names (K, ...) -> of classes (C, ...): those of a class's names added up."""
    classes = probabilities.new_zeros(int(class_ids.max()) + 1, *probabilities.shape[1:])
    return classes.index_add_(0, class_ids, probabilities)


def prompt_denoising(scores: Tensor, scene: Scene, settings: DenoisingSettings) -> Tensor:
    """masks out the classes that reach a probability of 0.5 at no patch; (K, h, w) -> (K, h, w)."""
    confidence = sum_of_classes((settings.softmax_scale * scores).softmax(0), scene.class_ids).amax((1, 2))  # (C)
    masked_out = (confidence < settings.min_confidence)[scene.class_ids]
    return scores if masked_out.all() else scores.masked_fill(masked_out[:, None, None], MASKED_OUT)


def key_smoothing(scores: Tensor, scene: Scene, settings: SmoothingSettings) -> Tensor:
    """Where no name is certain, the sum of all patches' probabilities, weighted by how alike the keys are.

    The result is votes, not cosines; (K, h, w) -> (K, h, w).
    """
    probabilities = (settings.softmax_scale * scores).softmax(0).flatten(1)  # (K, N)
    keys = F.normalize(scene.image.keys(), dim=0)  # (N, C), each channel over the patches; see the header
    votes = (probabilities @ keys) @ keys.T  # (K, C) first: no N x N matrix
    unsure = probabilities.amax(0) < settings.smooth_below
    return torch.where(unsure, votes, probabilities).unflatten(1, scores.shape[1:])


def redundancy_removal(scores: Tensor, scene: Scene, settings: RedundancySettings) -> Tensor:
    """Weighs each name by the image's own similarity to it, then subtracts the mean over names.

    The paper multiplies features element by element, weighs, subtracts the mean over names and sums over the channels;
    the sum is linear, so scores suffice. (K, h, w) -> (K, h, w).
    """
    likely = (settings.sharpness * (scene.text_embeds @ scene.image.class_embed)).softmax(0)
    weighted = scores * (likely / likely.mean())[:, None, None]
    return weighted - weighted.mean(0)
