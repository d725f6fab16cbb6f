"""Dense encoders made of dense encoders, against plain formulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from plain_clip import sampling_matrix
from test_sliding_window import PatchEncoder
from torch import nn

from spar_hf import SlidingWindow
from spar_hf.distillation.teacher import pixels_seen
from spar_hf.encoders.composition import Ensemble, Resized

SIZES = {"native": (64, 64), "larger": (192, 160), "wide": (64, 176), "off_grid": (100, 131), "small": (40, 70)}


def new_encoder(size_rule: str = "floor", seed: int = 0, **fields) -> PatchEncoder:
    torch.manual_seed(seed)
    encoder = PatchEncoder(size_rule)
    normalisation = {"image_mean": (0.5,) * 3, "image_std": (0.5,) * 3}
    vars(encoder.config).update({**normalisation, **fields})
    return encoder.requires_grad_(False)


def triangle_matrix(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): bilinear with antialias, a triangle of the wider of both spacings around each output."""
    width, centres = max(n_in / n_out, 1.0), (np.arange(n_out) + 0.5) * n_in / n_out
    weights = np.clip(1 - np.abs(np.arange(n_in) + 0.5 - centres[:, None]) / width, 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


def plain_resized(encoder: PatchEncoder, image: np.ndarray, short_side_px: int) -> np.ndarray:
    """(3, H, W) -> (h, w, D), with matrices."""
    patch, (_, height, width) = 16, image.shape
    rows, columns = height // patch, width // patch
    if encoder.config.size_rule == "pad":
        rows, columns = math.ceil(height / patch), math.ceil(width / patch)
        image = np.pad(image, ((0, 0), (0, rows * patch - height), (0, columns * patch - width)))
    image = image[:, : rows * patch, : columns * patch]
    factor = short_side_px / min(image.shape[1:])
    seen = [max(round(side * factor / patch), 1) * patch for side in image.shape[1:]]
    down, across = (sampling_matrix(old, new, "antialias") for old, new in zip(image.shape[1:], seen, strict=True))
    pixels = down @ image @ across.T
    features = encoder(torch.tensor(pixels[None], dtype=torch.float32)).patch_embeds[0].numpy()
    down, across = triangle_matrix(features.shape[0], rows), triangle_matrix(features.shape[1], columns)
    return np.einsum("yi,ijd,xj->yxd", down, features, across, optimize=True)


@pytest.mark.parametrize("size_hw", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("short_side_px", [48, 64, 128])
@pytest.mark.parametrize("rule", ["floor", "pad"])
def test_resized(size_hw, short_side_px, rule):
    encoder, images = new_encoder(rule), torch.randn(2, 3, *size_hw)
    output = Resized(encoder, short_side_px)(images)
    for image, features in zip(images, output.patch_embeds, strict=True):
        expected = plain_resized(encoder, image.numpy(), short_side_px)
        np.testing.assert_allclose(features.numpy(), expected, atol=1e-4)
    single = encoder(images)
    assert output.image_hw == size_hw and output.patch_embeds.dtype == single.patch_embeds.dtype


def test_resized_to_its_own_size_is_the_encoder():
    encoder, images = new_encoder("stretch"), torch.randn(2, 3, 64, 96)
    given = Resized(encoder, 64)(images).patch_embeds
    torch.testing.assert_close(given, encoder(images).patch_embeds, atol=1e-5, rtol=0)


def test_resized_keeps_the_extent_of_its_size_rule():
    images = torch.randn(1, 3, 50, 75)
    for rule, extent_hw in (("floor", (48, 64)), ("pad", (64, 80)), ("stretch", (50, 75))):
        output = Resized(new_encoder(rule), 96)(images)
        assert tuple(output.extent_hw) == extent_hw
        assert output.patch_embeds.shape[1:3] == ((3, 4) if rule == "floor" else (4, 5))


@pytest.mark.parametrize("side", [8, 40, 0])
def test_a_side_that_is_no_multiple_of_the_patch_is_refused(side):
    with pytest.raises(ValueError, match=f"short_side_px is {side}; it must be a multiple of the patch"):
        Resized(new_encoder(), side)


@pytest.mark.parametrize("normalise", [False, True])
def test_mean_of_three(normalise):
    encoders, images = [new_encoder(seed=seed) for seed in range(3)], torch.randn(2, 3, 80, 112)
    given = Ensemble(encoders, normalise)(images).patch_embeds
    for index, image in enumerate(images):
        features = [encoder(image[None]).patch_embeds[0].numpy() for encoder in encoders]
        if normalise:
            lengths = [np.sqrt((f**2).sum(-1, keepdims=True)) for f in features]
            scale = np.mean([length.mean() for length in lengths])
            features = [scale * f / length for f, length in zip(features, lengths, strict=True)]
        np.testing.assert_allclose(given[index].numpy(), sum(features) / 3, atol=1e-5)


def test_encoders_that_do_not_fit_have_no_mean():
    with pytest.raises(ValueError, match="no encoders to take the mean of"):
        Ensemble([])
    with pytest.raises(ValueError, match="size_rule of the encoders is floor, pad; it must be the same"):
        Ensemble([new_encoder(), new_encoder("pad")])


def test_they_compose_and_say_what_they_cost():
    encoder, images = new_encoder(), torch.randn(1, 3, 96, 192)
    window = SlidingWindow(encoder, stride_px=24)
    teacher = Ensemble([Resized(window, 64), Resized(window, 128), window])
    parts = [Resized(window, 64)(images), Resized(window, 128)(images), window(images)]
    expected = torch.stack([part.patch_embeds for part in parts]).mean(0)
    torch.testing.assert_close(teacher(images).patch_embeds, expected)
    encoder.calls.clear()
    teacher(images)
    assert pixels_seen(teacher, (96, 192)) == sum(n * h * w for n, _, h, w in encoder.calls)
    assert isinstance(teacher, nn.Module) and (teacher.dtype, teacher.device) == (window.dtype, window.device)
