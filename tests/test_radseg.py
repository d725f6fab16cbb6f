"""RADSeg and its last block against plain formulations, and the places where RADIO's methods are chosen."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from conftest import SIZES_HW
from distillation_help import SIZES, run, save_pictures
from families import radio_tower, spar_radio
from plain_clip import softmax
from plain_families import Weights, linear, norm, plain_radio_head, plain_radio_tokens, radio_block_end, stretch
from transformers import AutoModel

import spar_hf.methods.encoder
from spar_cli.compare import chosen
from spar_hf import METHODS, SlidingWindow, build_encoder, build_segmenter
from spar_hf.families import make_processor
from spar_hf.methods.radseg import fitted

CLOSE = {"atol": 2e-5, "rtol": 0}
PREFIX, HEADS, LAYERS = 5, 3, 3


@pytest.fixture(scope="module")
def tower():
    return radio_tower()


@pytest.fixture(scope="module")
def weights(tower) -> Weights:
    return {name: weight.double().numpy() for name, weight in tower.state_dict().items()}


def plain_scra(weights: Weights, pixels: np.ndarray, sharpness: float = 10.0) -> tuple[np.ndarray, tuple[int, int]]:
    """The trunk's patches (h * w, C) of an image of whole patches, a self-correlating last block; and (h, w)."""
    x, grid_hw = plain_radio_tokens(weights, pixels, 16, LAYERS - 1, HEADS)
    name = f"encoder.layer.{LAYERS - 1}"
    y = norm(weights, f"{name}.norm1", x, 1e-6)
    q, k, v = (np.split(linear(weights, f"{name}.attention.{part}_proj", y), HEADS, axis=-1) for part in "qkv")
    usual = [softmax(q[h] @ k[h].T / math.sqrt(q[h].shape[-1])) @ v[h] for h in range(HEADS)]
    seen = np.split(linear(weights, f"{name}.attention.o_proj", np.hstack(usual)), HEADS, axis=-1)
    mixed = []
    for h in range(HEADS):
        unit = seen[h] / np.linalg.norm(seen[h], axis=-1, keepdims=True)
        scores = sharpness * unit @ unit.T
        scores[scores < 0] = -np.inf
        mixed.append(softmax(scores) @ v[h])
    out = linear(weights, f"{name}.attention.o_proj", np.hstack(mixed))
    return radio_block_end(weights, name, x, out)[PREFIX:], grid_hw


def plain_radseg(weights: Weights, image: torch.Tensor, window_px: int, stride_px: int) -> np.ndarray:
    """Features (h, w, D): windows one by one, the mean, the aggregation with a whole matrix, the head."""
    sides = image.shape[1:]
    if any(side % stride_px for side in sides):
        longer = math.ceil(max(sides) / stride_px) * stride_px
        sides = [max(math.ceil(int(side * longer / max(sides)) / stride_px) * stride_px, window_px) for side in sides]
        image = torch.nn.functional.interpolate(image[None], size=sides, mode="bilinear", align_corners=False)[0]
    pixels = image.double().numpy()
    rows, columns = (side // 16 for side in sides)
    total, count = np.zeros((rows, columns, 48)), np.zeros((rows, columns, 1))
    starts = []
    for side in sides:
        turns = max(side - window_px + stride_px - 1, 0) // stride_px + 1
        starts.append([max(min(turn * stride_px + window_px, side) - window_px, 0) for turn in range(turns)])
    for y in starts[0]:
        for x in starts[1]:
            patches, (h, w) = plain_scra(weights, pixels[:, y : y + window_px, x : x + window_px])
            place = (slice(y // 16, y // 16 + h), slice(x // 16, x // 16 + w))
            total[place] += patches.reshape(h, w, -1)
            count[place] += 1
    features = (total / count).reshape(rows * columns, -1)
    unit = features / np.linalg.norm(features, axis=-1, keepdims=True)
    similarity = unit @ unit.T
    scores = 10 * (similarity - similarity.mean())
    scores[scores < 0] = -np.inf
    return plain_radio_head(weights, softmax(scores) @ features).reshape(rows, columns, -1)


@pytest.mark.parametrize("size", SIZES_HW)
@torch.no_grad()
def test_the_block_equals_its_plain_formulation(size, tower, weights, pixels):
    images = pixels(size, batch=2)
    encoder = build_encoder(tower, "scra")
    found = encoder(images)
    for i, image in enumerate(images):
        patches, grid_hw = plain_scra(weights, stretch(image.double().numpy(), 16))
        expected = torch.from_numpy(plain_radio_head(weights, patches).reshape(*grid_hw, -1)).float()
        torch.testing.assert_close(found.patch_embeds[i], expected, **CLOSE)
        torch.testing.assert_close(encoder(images[i : i + 1]).patch_embeds[0], expected, **CLOSE)
    assert found.extent_hw == found.image_hw == tuple(images.shape[2:])
    assert (found.patch_embeds - tower(images).patch_embeds).abs().max() > 0.1


@pytest.mark.parametrize("size", SIZES_HW)
@torch.no_grad()
def test_radseg_equals_its_plain_formulation(size, tower, weights, pixels):
    images = pixels(size, batch=2)
    images[1] = 0.3 * images[1] + 1  # another image's statistics
    encoder = build_encoder(tower, "radseg")
    assert (encoder.windows.window_px, encoder.windows.stride_px) == (48, 32)  # 336 and 224 of 512, in whole patches
    found = encoder(images)
    for i, image in enumerate(images):
        expected = torch.from_numpy(plain_radseg(weights, image, 48, 32)).float()
        torch.testing.assert_close(found.patch_embeds[i], expected, **CLOSE)
        torch.testing.assert_close(encoder(images[i : i + 1]).patch_embeds[0], expected, **CLOSE)
    assert found.extent_hw == found.image_hw == tuple(images.shape[2:])


@pytest.mark.parametrize(
    ("image_hw", "size_hw"),
    [
        ((448, 672), (448, 672)),  # multiples already
        ((224, 224), (224, 224)),  # and then even smaller than a window
        ((336, 500), (672, 672)),
        ((500, 336), (672, 672)),
        ((560, 2048), (672, 2240)),
        ((100, 120), (336, 336)),
        ((1024, 2048), (1120, 2240)),
    ],
)
def test_images_are_stretched_as_the_authors_do(image_hw, size_hw):
    assert fitted(image_hw, 224, 336) == size_hw


@pytest.mark.parametrize("name", ["scra", "radseg"])
@torch.no_grad()
def test_it_is_a_dense_encoder_like_any_other(name, tower, pixels, monkeypatch):
    images, before = pixels("off_grid", batch=2), {n: w.clone() for n, w in tower.state_dict().items()}
    encoder = build_encoder(tower, name, reach="window")
    expected = encoder(images).patch_embeds
    assert {id(p) for p in tower.parameters()} <= {id(p) for p in encoder.parameters()}
    assert all(torch.equal(weight, before[key]) for key, weight in tower.state_dict().items())
    monkeypatch.setattr(spar_hf.methods.encoder, "ROW_NUMBERS", 100)  # a row or two at a time
    torch.testing.assert_close(encoder(images).patch_embeds, expected, **CLOSE)
    assert encoder(torch.zeros(1, 3, 64, 96)).patch_embeds.isfinite().all()
    if name == "scra":  # radseg has a grid of its own
        whole = pixels((64, 96))
        torch.testing.assert_close(
            SlidingWindow(encoder, 96, 96)(whole).patch_embeds, encoder(whole).patch_embeds, **CLOSE
        )
    rounded = build_encoder(radio_tower().bfloat16(), name)(images.bfloat16()).patch_embeds
    plain = build_encoder(tower, name)(images).patch_embeds
    assert rounded.dtype == torch.bfloat16 and (rounded.float() - plain).norm() < 0.06 * plain.norm()


def test_it_teaches_the_one_pass(tower, tmp_path):
    tower.save_pretrained(tmp_path / "radio")
    flags = ("--student", tmp_path / "radio", "--images", save_pictures(tmp_path / "pictures", 2), "--output",
             tmp_path / "run", "--teacher-method", "radseg", "--workers", 0, "--tracker", "none", *SIZES,
             "--train", "all", "--learning-rate", "1e-3", "--max-steps", 1)  # fmt: skip
    run("distill.py", *flags)
    student = AutoModel.from_pretrained(tmp_path / "run" / "model")
    assert student.config.teacher["method"] == "radseg" and type(student) is type(tower)
    assert not torch.equal(student.adaptor.fc1.weight, tower.adaptor.fc1.weight)


def test_all_methods_are_those_of_the_models_family(clip_tokenizer, tmp_path):
    spar_radio(clip_tokenizer).save_pretrained(tmp_path)
    assert chosen("all", str(tmp_path)) == ["scra", "radseg"]
    assert chosen("all", "tiny") == [name for name, row in METHODS.items() if row.family == "clip"]


def test_choosing_it(tower, make_vision, clip_tokenizer):
    with pytest.raises(
        ValueError, match=r"method 'radseg' is about RADIO's blocks, and this network is a SparVisionM"
    ):
        build_encoder(make_vision(num_hidden_layers=2), "radseg")
    with pytest.raises(
        ValueError, match=r"method 'naclip' is about CLIP's blocks, and this network is a SparRadioVis"
    ):
        build_encoder(tower, "naclip")
    with pytest.raises(ValueError, match=r"stride_px of method 'radseg' is 24; it must be a multiple of the patch"):
        build_encoder(tower, "radseg", settings={"stride_px": 24})
    assert METHODS["radseg"].window_for(512, 16) == (336, 224) and METHODS["radseg"].kind == "feature"
    model = spar_radio(clip_tokenizer)
    processor = make_processor(model.config, clip_tokenizer)
    segmenter = build_segmenter(model, processor, "radseg", settings={"aggregation": "5"})
    with torch.no_grad():
        (maps,) = segmenter(torch.randn(1, 3, 90, 75), segmenter.encode_labels("road; car; sky", ["a {}."]))
    assert maps(slice(None)).shape == (3, 90, 75) and segmenter.encoder.settings.aggregation == 5.0
