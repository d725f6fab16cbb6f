"""Methods, student and teacher against the numbers that the authors' own codes gave (`golden/README.md`)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from spar_hf import SlidingWindow, SparVisionModel, build_encoder

GOLDEN = Path(__file__).parent / "golden"
TOLERANCE = 2e-5  # of the features' root mean square
METHOD_KEYS = [(method, key) for method in ("sclip", "naclip", "gem", "sc_clip", "cliper") for key in ("1", "3")]


@pytest.fixture(scope="module")
def golden():
    with safe_open(GOLDEN / "golden.safetensors", "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping


@pytest.fixture(scope="module")
def vision():
    return SparVisionModel.from_pretrained(GOLDEN / "model", method="clip").eval()


@pytest.fixture(scope="module")
def spar():
    """SPAR's CLIP. It takes the exact GELU, whatever the checkpoint was trained with."""
    return SparVisionModel.from_pretrained(GOLDEN / "model", method="maskclip", hidden_act="gelu").eval()


def error(features: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the root mean square of what is expected."""
    assert features.shape == expected.shape
    return ((features - expected).abs().max() / expected.square().mean().sqrt()).item()


@pytest.mark.parametrize(("method", "key"), METHOD_KEYS)
@torch.no_grad()
def test_method_equals_the_authors_code(method, key, vision, golden):
    encoder = build_encoder(vision, method)
    assert error(encoder(golden[f"pixel_values/{key}"]).patch_embeds, golden[f"{method}/{key}"]) < TOLERANCE


@pytest.mark.parametrize("key", ["1", "3"])
@torch.no_grad()
def test_student_equals_the_authors_code(key, spar, golden):
    assert error(spar(golden[f"pixel_values/{key}"]).patch_embeds, golden[f"spar_clip/{key}"]) < TOLERANCE


@pytest.mark.parametrize("stride_px", [24, 32])
def test_teacher_equals_the_authors_code(stride_px, spar, golden):
    teacher = SlidingWindow(spar, window_px=224, stride_px=stride_px)
    features = teacher(golden["pixel_values/2a"]).patch_embeds
    assert error(features, golden[f"spar_teacher_stride{stride_px}/2a"]) < TOLERANCE


@torch.no_grad()
def test_a_wrong_rule_shows(vision, spar, golden):
    """The tolerance tells rules apart: positions, activation, method."""
    pixel_values = golden["pixel_values/1"]
    with_other_positions = build_encoder(vision, "naclip", position_interpolation="size")
    assert error(with_other_positions(pixel_values).patch_embeds, golden["naclip/1"]) > 1000 * TOLERANCE
    assert (
        error(build_encoder(vision, "maskclip")(pixel_values).patch_embeds, golden["spar_clip/1"]) > 1000 * TOLERANCE
    )
    assert error(build_encoder(spar, "clearclip")(pixel_values).patch_embeds, golden["spar_clip/1"]) > 1000 * TOLERANCE


def test_every_stored_tensor_is_compared(golden):
    compared = {f"{method}/{key}" for method, key in METHOD_KEYS} | {"spar_clip/1", "spar_clip/3"}
    compared |= {"spar_teacher_stride24/2a", "spar_teacher_stride32/2a"}
    assert compared == {name for name in golden if not name.startswith("pixel_values/")}
