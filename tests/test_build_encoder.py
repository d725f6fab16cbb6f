"""build_encoder: any method on one tower's weights, as a dense encoder like any other."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import SIZES_HW
from second_networks import networks_for
from transformers import ViTConfig, ViTModel

import spar_hf.methods.cliper
import spar_hf.methods.encoder
from spar_hf import METHODS, SlidingWindow, SparVisionModel, build_encoder
from spar_hf.distillation.specs import StudentSpec, TeacherSpec
from spar_hf.distillation.teacher import build_teacher, teacher_features

FEATURES = [name for name, method in METHODS.items() if (method.kind, method.family) == ("feature", "clip")]
FILES = [name for name in FEATURES if METHODS[name].recipe is None]


@pytest.fixture(scope="module")
def build(make_vision):
    """`build("naclip")`: the method on a tower of 6 blocks, with small second networks where it needs some."""

    def make(name, layers=6, **fields):
        networks = copy.deepcopy(networks_for(name))
        return build_encoder(make_vision(num_hidden_layers=layers), name, networks=networks, **fields)

    return make


@pytest.mark.parametrize("size", SIZES_HW)
@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_a_batch_gives_what_its_images_give(name, size, build, pixels):
    encoder, images = build(name), pixels(size, batch=3)
    images[1] = 0.3 * images[1] + 1  # another image's statistics
    together = encoder(images)
    p = encoder.config.patch_size
    assert together.image_hw == tuple(images.shape[2:])
    if METHODS[name].whole_image:
        assert together.extent_hw == together.image_hw
    else:
        assert together.patch_embeds.shape == (3, images.shape[2] // p, images.shape[3] // p, 24)
        assert together.extent_hw == (images.shape[2] // p * p, images.shape[3] // p * p)
    for i in range(3):
        torch.testing.assert_close(
            together.patch_embeds[i], encoder(images[i : i + 1]).patch_embeds[0], atol=2e-5, rtol=0
        )


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_weights_are_shared_and_nothing_is_changed(name, make_vision, build, pixels):
    vision = make_vision(num_hidden_layers=6)
    images = pixels("off_grid", batch=2)
    before, config = copy.deepcopy(vision.state_dict()), vision.config.to_dict()
    plain = vision(images).patch_embeds
    encoder = build_encoder(vision, name, networks=networks_for(name))
    kept = images.clone()
    first = encoder(images).patch_embeds
    torch.testing.assert_close(encoder(images).patch_embeds, first, rtol=0, atol=0)
    assert torch.equal(images, kept) and vision.config.to_dict() == config
    for key, value in vision.state_dict().items():
        assert torch.equal(value, before[key])
    torch.testing.assert_close(vision(images).patch_embeds, plain, rtol=0, atol=0)
    assert {id(p) for p in vision.parameters()} <= {id(p) for p in encoder.parameters()}


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_bf16_is_close_to_fp32(name, build, pixels):
    images = pixels("larger", batch=2)
    exact = build(name)(images).patch_embeds
    encoder = copy.deepcopy(build(name)).bfloat16()
    rounded = encoder(images.bfloat16()).patch_embeds
    assert rounded.dtype == torch.bfloat16 and encoder.dtype == torch.bfloat16
    # A similarity near its threshold may fall on the other side: the bulk is close, not each number.
    assert (rounded.float() - exact).norm() < 0.06 * exact.norm()


@pytest.mark.parametrize("name", [name for name in FEATURES if not METHODS[name].whole_image])
@torch.no_grad()
def test_a_window_as_large_as_the_image_is_the_method_itself(name, build, pixels):
    encoder, images = build(name), pixels((64, 96), batch=2)
    window = SlidingWindow(encoder, 96, 96)
    torch.testing.assert_close(window(images).patch_embeds, encoder(images).patch_embeds, atol=2e-5, rtol=0)
    config = encoder.config
    assert SlidingWindow(encoder, config.window_px, config.stride_px)(images).patch_embeds.isfinite().all()


@pytest.mark.parametrize("size_rule", ["floor", "pad", "stretch"])
@pytest.mark.parametrize("name", [name for name in FILES if not METHODS[name].whole_image])
@torch.no_grad()
def test_size_rules(name, size_rule, build, pixels):
    output = build(name, size_rule=size_rule)(pixels((90, 75)))
    p = build(name).config.patch_size
    down = {"floor": (90 // p, 75 // p)}.get(size_rule, (-(-90 // p), -(-75 // p)))
    assert tuple(output.patch_embeds.shape[1:3]) == down
    assert output.extent_hw == ((90, 75) if size_rule == "stretch" else (down[0] * p, down[1] * p))


@pytest.mark.parametrize("name", FILES)
@torch.no_grad()
def test_matrices_by_rows_and_by_heads_are_the_whole_ones(name, build, pixels, monkeypatch):
    images = pixels("larger", batch=2)
    whole = build(name)(images).patch_embeds
    for module in (spar_hf.methods.encoder, METHODS[name].module):
        monkeypatch.setattr(module, "ROW_NUMBERS", 500, raising=False)
    monkeypatch.setattr(spar_hf.methods.cliper, "HEAD_NUMBERS", 1)
    torch.testing.assert_close(build(name)(images).patch_embeds, whole, atol=2e-5, rtol=0)


@pytest.mark.parametrize("layers", [2, 3])
@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_shallow_networks_and_single_patches_run(name, layers, build, pixels):
    encoder = build(name, layers=layers)
    for size in ((64, 64), (16, 16), (16, 80)):
        assert encoder(pixels(size, batch=2)).patch_embeds.isfinite().all()


@pytest.mark.parametrize("name", FEATURES)
@torch.no_grad()
def test_an_even_image_has_features(name, build):
    assert build(name)(torch.zeros(1, 3, 64, 96)).patch_embeds.isfinite().all()


def test_a_row_is_the_tower_loaded_with_it_and_fields_prevail(make_vision, pixels):
    encoder = build_encoder(make_vision(), "naclip", position_interpolation="antialias")
    assert isinstance(encoder, SparVisionModel)
    expected = make_vision(method="naclip", position_interpolation="antialias")
    with torch.no_grad():
        torch.testing.assert_close(
            encoder(pixels("larger")).patch_embeds, expected(pixels("larger")).patch_embeds, rtol=0, atol=0
        )
    assert (encoder.config.window_px, encoder.config.stride_px) == (64, 32)
    assert build_encoder(encoder) is encoder


@pytest.mark.parametrize(
    ("asked", "window", "stride"),
    [
        ({"window": "paper"}, 96, 32),
        ({"window": "native"}, 64, 32),
        ({"window": 48}, 48, 32),
        ({"window": 16}, 16, 16),  # no step is longer than its window
        ({"stride_px": 16}, 96, 16),
        ({"window": "native", "stride_px": 24}, 64, 24),
    ],
)
@torch.no_grad()
def test_windows_by_word_and_number(asked, window, stride, build, pixels):
    encoder = build("proxyclip", **asked)  # 336 px of 224, step 112
    assert (encoder.window_px, encoder.stride_px) == (window, stride)
    expected = SlidingWindow(build("proxyclip"), window, stride)(pixels("larger"))
    torch.testing.assert_close(encoder(pixels("larger")).patch_embeds, expected.patch_embeds, rtol=0, atol=0)


def test_a_wrong_window_says_what_to_do(build):
    with pytest.raises(ValueError, match=r"no window 'papr'; choose one of native, paper.*Did you mean 'paper'"):
        build("naclip", window="papr")


def test_wrong_requests_say_what_to_do(make_vision):
    vision = make_vision(num_hidden_layers=6)
    with pytest.raises(ValueError, match=r"no method 'sc-clip'.*Did you mean 'sc_clip'"):
        build_encoder(vision, "sc-clip")
    with pytest.raises(ValueError, match="'naclip' takes no further network; leave 'dino' out"):
        build_encoder(vision, "naclip", networks={"dino": "facebook/dino-vitb8"})
    with pytest.raises(ValueError, match="'dino' is given without a method; name one that needs it"):
        build_encoder(vision, networks={"dino": "facebook/dino-vitb8"})
    with pytest.raises(ValueError, match=r"'proxyclip': there is no network 'dion'.*Did you mean 'dino'"):
        build_encoder(vision, "proxyclip", networks={"dion": "facebook/dino-vitb8"})
    with pytest.raises(ValueError, match=r"no field 'atention_reach'.*Did you mean 'attention_reach'"):
        build_encoder(vision, "naclip", atention_reach="window")
    with pytest.raises(ValueError, match="1 block; method 'cliper' needs at least 2"):
        build_encoder(make_vision(num_hidden_layers=1), "cliper")


def test_a_teacher_runs_in_its_own_window_on_the_students_grid(tmp_path):
    torch.manual_seed(0)
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8)
    ViTModel(config).save_pretrained(tmp_path)
    images = torch.randint(256, (1, 144, 160, 3), dtype=torch.uint8)
    networks = {"dino": str(tmp_path)}
    for asked, window, stride in (
        (TeacherSpec(methods=("naclip",)), 128, 64),
        (TeacherSpec(methods=("itaclip",), strides_px=(64,)), 128, 64),
        (TeacherSpec(methods=("sc_clip",)), 128, 64),
        (TeacherSpec(methods=("proxyclip",), networks=networks, window_px=128), 128, 64),
        (TeacherSpec(methods=("naclip", "proxyclip"), networks=networks), [128, 192], 64),
    ):
        teacher, described = build_teacher(asked.on(torch.device("cpu")), StudentSpec("tiny"), patch_px=16)
        assert (described["window_px"], described["stride_px"]) == (window, stride)
        assert teacher.config.patch_size == 16
        assert teacher_features(teacher, images).shape == (1, 9, 10, 128)
    assert described["method"] == ["naclip", "proxyclip"] and described["recipe"][1] is None
    with pytest.raises(ValueError, match=r"no method of the teacher takes a further network; leave 'dino' out"):
        TeacherSpec(methods=("naclip",), networks=networks)
    with pytest.raises(ValueError, match=r"there is no network 'dinoo'.*Did you mean 'dino'"):
        TeacherSpec(methods=("naclip", "proxyclip"), networks={"dinoo": "x/y"})
