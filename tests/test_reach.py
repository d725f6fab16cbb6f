"""Attention that reaches as far as the mean window: its bias, its tiles, and every network and method run with it."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import NATIVE_PX, PATCH_PX, ROWS, SIZES_HW
from plain_clip import PLAIN_METHODS, PlainClip, mean_window, plain_method
from torch import nn

from spar_hf import SparModel, SparSiglipVisionConfig, SparSiglipVisionModel, SparVisionModel, build_encoder
from spar_hf.reach_spar import WindowReach
from spar_hf.refinement.clip_internals import ClipInternals

WINDOW = NATIVE_PX // PATCH_PX
GRIDS_HW = [(4, 4), (2, 8), (9, 13), (13, 4), (5, 5), (1, 17), (12, 12)]
# Beside the four kinds of the other tests, one of several whole tiles and a rest in both directions.
SIZES = {**SIZES_HW, "much_larger": (288, 160)}


def tokens(count: int, heads: int = 3, width: int = 8, batch: int = 2, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, heads, count, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("others", [0, 1, 5])
@pytest.mark.parametrize("grid_hw", GRIDS_HW, ids=str)
def test_the_bias_counts_the_windows(grid_hw, others):
    count = others + grid_hw[0] * grid_hw[1]
    bias = WindowReach(grid_hw, WINDOW, torch.device("cpu")).bias(count, count)
    np.testing.assert_allclose(bias.exp().numpy(), np.exp(mean_window(grid_hw, WINDOW, others)), atol=1e-6)


@pytest.mark.parametrize("others, key_others", [(0, 0), (1, 1), (5, 5), (0, 1)])
@pytest.mark.parametrize("grid_hw", GRIDS_HW, ids=str)
def test_tiles_are_the_whole_matrix_at_once(grid_hw, others, key_others):
    count = grid_hw[0] * grid_hw[1]
    query, key, value = tokens(others + count), tokens(key_others + count, seed=1), tokens(key_others + count, seed=2)
    scores = query.double() @ key.double().transpose(2, 3) / 8**0.5
    patches = mean_window(grid_hw, WINDOW, others=0)
    scores += torch.from_numpy(np.pad(patches, ((others, 0), (key_others, 0))))
    reach = WindowReach(grid_hw, WINDOW, torch.device("cpu"))
    expected = scores.softmax(dim=-1) @ value.double()
    torch.testing.assert_close(reach.attend(query, key, value), expected.float(), atol=1e-6, rtol=0)


def test_tiles_have_the_gradients_of_the_whole_matrix():
    reach = WindowReach((9, 13), WINDOW, torch.device("cpu"))
    inputs = [tokens(1 + 9 * 13, seed=seed).requires_grad_() for seed in range(3)]
    target = tokens(1 + 9 * 13, seed=3)
    whole = nn.functional.scaled_dot_product_attention(*inputs, attn_mask=reach.bias(118, 118))
    expected = torch.autograd.grad((whole * target).sum(), inputs)
    found = torch.autograd.grad((reach.attend(*inputs) * target).sum(), inputs)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", PLAIN_METHODS)
def test_every_method_equals_its_plain_formulation(name, size, make_clip, make_vision):
    images = torch.randn(2, 3, *SIZES[size], generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        output = build_encoder(make_vision(num_hidden_layers=6), name, attention_reach="window")(images)
    for i, pixel_values in enumerate(images):
        net = PlainClip(make_clip(num_hidden_layers=6))
        patches, image = plain_method(net, pixel_values.numpy(), name, window=WINDOW)
        np.testing.assert_allclose(output.patch_embeds[i].numpy(), patches, atol=2e-5)
        np.testing.assert_allclose(output.image_embeds[i].numpy(), image, atol=2e-5)


@pytest.mark.parametrize("size_hw", [(64, 64), (64, 32), (48, 60)], ids=str)
@pytest.mark.parametrize("name", PLAIN_METHODS)
@torch.no_grad()
def test_up_to_the_native_size_nothing_changes(name, size_hw, make_vision):
    images = torch.randn(2, 3, *size_hw, generator=torch.Generator().manual_seed(0))
    vision = make_vision(num_hidden_layers=6)
    plain, reaching = (build_encoder(vision, name, attention_reach=reach) for reach in ("image", "window"))
    torch.testing.assert_close(reaching(images).patch_embeds, plain(images).patch_embeds, rtol=0, atol=0)


@torch.no_grad()
def test_a_patch_does_not_see_beyond_its_windows():
    """Without a class token, three blocks carry no farther than three times the window less one."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 48, "intermediate_size": 80, "num_attention_heads": 3, "num_hidden_layers": 3}
    config = SparSiglipVisionConfig(**sizes, image_size=64, patch_size=16, attention_reach="window")
    model = SparSiglipVisionModel(config).eval()
    before = torch.randn(1, 3, 64, 20 * 16)
    after = before.clone()
    after[..., -16:] += 1
    changed = (model(after).patch_embeds - model(before).patch_embeds).abs().amax(dim=(0, 1, 3)) > 0
    assert changed.tolist() == [False] * (19 - 3 * (WINDOW - 1)) + [True] * (1 + 3 * (WINDOW - 1))


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_attentions_are_within_reach(name, make_vision, pixels):
    images = pixels("larger")
    output = make_vision(method=name, num_hidden_layers=6, attention_reach="window")(images, output_attentions=True)
    beyond = torch.from_numpy(np.isinf(mean_window((7, 8), WINDOW)))
    for weights in output.attentions:
        assert (weights[..., beyond] == 0).all()
    assert (output.attentions[0][..., ~beyond] > 0).all()
    # What label options see of a block is the same map.
    vision = make_vision(num_hidden_layers=6, attention_reach="window")
    seen = ClipInternals(SimpleNamespace(vision_model=vision), images).attention(2)
    maps = vision(images, output_attentions=True).attentions[2]
    torch.testing.assert_close(seen, maps[0].mean(dim=0)[1:, 1:], atol=1e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@torch.no_grad()
def test_half_precision_is_close(dtype, make_vision, pixels):
    images = pixels("larger")
    model = make_vision(num_hidden_layers=6, attention_reach="window")
    expected = model(images).patch_embeds
    found = model.to(dtype)(images.to(dtype)).patch_embeds.float()
    assert (found - expected).norm() < 0.05 * expected.norm()


@torch.no_grad()
def test_eager_attention_reaches_as_far(make_vision, pixels):
    images = pixels("larger")
    model = make_vision(num_hidden_layers=6, attention_reach="window")
    expected = model(images).patch_embeds
    model.set_attn_implementation("eager")
    torch.testing.assert_close(model(images).patch_embeds, expected, atol=1e-5, rtol=0)


def test_gradient_checkpointing_gives_the_same_gradients(make_vision, pixels):
    def gradient(checkpointing: bool) -> torch.Tensor:
        model = make_vision(num_hidden_layers=6, attention_reach="window").train()
        if checkpointing:
            model.gradient_checkpointing_enable()
        model(pixels("larger")).patch_embeds.square().sum().backward()
        return model.embeddings.patch_embedding.weight.grad

    torch.testing.assert_close(gradient(True), gradient(False), atol=1e-5, rtol=1e-5)


@pytest.mark.slow
def test_compiles_whole_for_any_size(make_vision):
    torch._dynamo.reset()
    model = make_vision(num_hidden_layers=2, attention_reach="window")
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="eager")
    for size_hw in ((96, 112), (90, 75), (64, 64), (128, 64), (160, 96)):
        images = torch.randn(2, 3, *size_hw)
        torch.testing.assert_close(compiled(images).patch_embeds, model(images).patch_embeds, atol=1e-5, rtol=0)


def test_it_is_saved_and_asked_for_at_loading(clip_folder, tmp_path, pixels):
    plain = SparModel.from_pretrained(clip_folder)
    reaching = SparModel.from_pretrained(clip_folder, attention_reach="window")
    assert plain.config.vision_config.attention_reach == "image"
    reaching.save_pretrained(tmp_path)
    again = SparVisionModel.from_pretrained(tmp_path)
    assert again.config.attention_reach == "window"
    with torch.no_grad():
        images = pixels("larger")
        expected = reaching.vision_model(images).patch_embeds
        torch.testing.assert_close(again(images).patch_embeds, expected, rtol=0, atol=0)
        assert (plain.vision_model(images).patch_embeds - expected).abs().max() > 1e-2


def test_an_unknown_reach_is_refused(clip_folder):
    with pytest.raises(ValueError, match="attention_reach is 'far'; choose one of 'image', 'window'"):
        SparVisionModel.from_pretrained(clip_folder, attention_reach="far")
