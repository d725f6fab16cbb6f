"""Size rules, position rules and recipes: the pure functions, each against a plain formulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from plain_clip import cubic_kernel, plain_positions
from torch import nn

from spar_hf.dense_spar import attend, locality_bias
from spar_hf.grid_spar import POSITION_RULES, SIZE_RULES, fit_to_patches, resize_positions
from spar_hf.methods_spar import Recipe, Term

GRIDS_HW = [(14, 14), (28, 28), (7, 28), (28, 7), (42, 63), (5, 14), (9, 11), (1, 1), (1, 40), (15, 13)]


def table(side: int, channels: int = 5, seed: int = 0) -> torch.Tensor:
    return torch.randn(side * side, channels, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------------ positions


@pytest.mark.parametrize("grid_hw", GRIDS_HW, ids=str)
@pytest.mark.parametrize("rule", POSITION_RULES)
def test_positions_equal_explicit_sampling(rule, grid_hw):
    positions = table(14)
    resized = resize_positions(positions, grid_hw, rule)
    expected = plain_positions(positions.double().numpy(), *grid_hw, rule)
    assert resized.shape == (math.prod(grid_hw), 5)
    np.testing.assert_allclose(resized.numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("rule", POSITION_RULES)
def test_positions_stay_on_the_native_grid_only(rule):
    positions = table(14)
    torch.testing.assert_close(resize_positions(positions, (14, 14), rule), positions, rtol=0, atol=0)
    # As many patches in another grid are other places.
    assert (resize_positions(positions, (7, 28), rule) - positions).abs().max() > 0.5


@pytest.mark.parametrize("grid_hw", GRIDS_HW[1:7], ids=str)
def test_size_rule_is_that_of_transformers(grid_hw):
    from transformers import CLIPVisionConfig
    from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings

    stock = CLIPVisionEmbeddings(CLIPVisionConfig(hidden_size=8, num_attention_heads=1, image_size=224, patch_size=16))
    rows, columns = grid_hw
    expected = stock.interpolate_pos_encoding(torch.zeros(1, 1 + rows * columns, 8), rows * 16, columns * 16)[0, 1:]
    ours = resize_positions(stock.position_embedding.weight[1:], grid_hw, "size")
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("grid_hw", GRIDS_HW[1:], ids=str)
def test_offset_rule_is_the_old_interpolation_with_a_scale(grid_hw):
    """The authors' call; it fails, or gives another grid, where the scale rounds badly, so only its values count."""
    positions = table(14)
    image = positions.view(1, 14, 14, 5).permute(0, 3, 1, 2)
    scale = tuple((n + 0.1) / 14 for n in grid_hw)
    expected = nn.functional.interpolate(image, scale_factor=scale, mode="bicubic", align_corners=False)
    assert expected.shape[2:] == grid_hw
    ours = resize_positions(positions, grid_hw, "offset")
    torch.testing.assert_close(ours, expected[0].flatten(1).T, rtol=0, atol=2e-5)


@pytest.mark.parametrize("grid_hw", [(28, 28), (7, 28), (5, 9), (42, 63)], ids=str)
def test_antialias_rule_is_pillows(grid_hw):
    positions = table(14, channels=1)
    picture = Image.fromarray(positions.view(14, 14).numpy(), mode=None)
    expected = np.asarray(picture.resize((grid_hw[1], grid_hw[0]), Image.Resampling.BICUBIC))
    ours = resize_positions(positions, grid_hw, "antialias").view(grid_hw)
    np.testing.assert_allclose(ours.numpy(), expected, atol=1e-5)


def test_position_rules_differ_as_much_as_the_methods_notice():
    positions = table(14)
    results = [resize_positions(positions, (21, 9), rule) for rule in POSITION_RULES]  # more rows, fewer columns
    for i, one in enumerate(results):
        for other in results[i + 1 :]:
            assert (one - other).abs().mean() > 0.005


def test_positions_keep_their_type_and_gradient():
    positions = table(4).requires_grad_()
    for rule in POSITION_RULES:
        for dtype in (torch.bfloat16, torch.float16):
            resized = resize_positions(positions.to(dtype), (6, 5), rule)
            assert resized.dtype == dtype
            reference = resize_positions(positions.to(dtype).float(), (6, 5), rule)
            torch.testing.assert_close(resized, reference.to(dtype))  # the arithmetic itself is in fp32
        (gradient,) = torch.autograd.grad(resize_positions(positions, (6, 5), rule).sum(), positions)
        assert gradient.abs().sum() > 0


# ---------------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize("size_hw", [(64, 64), (90, 75), (16, 31), (17, 160)], ids=str)
def test_floor_leaves_the_pixels_and_tells_what_is_covered(size_hw):
    pixels = torch.randn(2, 3, *size_hw)
    fitted, extent_hw = fit_to_patches(pixels, 16, "floor")
    assert fitted is pixels
    assert extent_hw == tuple(side - side % 16 for side in size_hw)


@pytest.mark.parametrize("size_hw", [(64, 64), (90, 75), (5, 31), (17, 160)], ids=str)
def test_pad_adds_zeros_at_the_right_and_the_bottom(size_hw):
    pixels = torch.randn(2, 3, *size_hw)
    fitted, extent_hw = fit_to_patches(pixels, 16, "pad")
    expected = np.zeros((2, 3, *(-(-side // 16) * 16 for side in size_hw)), np.float32)
    expected[:, :, : size_hw[0], : size_hw[1]] = pixels
    np.testing.assert_array_equal(fitted.numpy(), expected)
    assert extent_hw == expected.shape[2:]


@pytest.mark.parametrize("size_hw", [(90, 75), (5, 31), (17, 48)], ids=str)
def test_stretch_resizes_bicubically_to_the_next_multiple(size_hw):
    pixels = torch.randn(1, 1, *size_hw)
    fitted, extent_hw = fit_to_patches(pixels, 16, "stretch")
    padded_hw = tuple(-(-side // 16) * 16 for side in size_hw)
    matrices = []
    for n_in, n_out in zip(size_hw, padded_hw, strict=True):
        weights = np.zeros((n_out, n_in))
        for row in range(n_out):
            place = (row + 0.5) * n_in / n_out - 0.5
            for tap in range(math.floor(place) - 1, math.floor(place) + 3):
                weights[row, min(max(tap, 0), n_in - 1)] += cubic_kernel(place - tap, a=-0.75)
        matrices.append(weights)
    expected = matrices[0] @ pixels[0, 0].double().numpy() @ matrices[1].T
    np.testing.assert_allclose(fitted[0, 0].numpy(), expected, atol=2e-5)
    assert extent_hw == size_hw  # the grid covers the image, no more and no less


def test_stretch_leaves_a_fitting_image_alone_and_keeps_the_type():
    pixels = torch.randn(1, 3, 32, 48)
    assert fit_to_patches(pixels, 16, "stretch")[0] is pixels
    for rule in SIZE_RULES:
        assert fit_to_patches(torch.randn(1, 3, 33, 50).bfloat16(), 16, rule)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("size_hw", [(15, 64), (64, 15), (1, 1)], ids=str)
def test_floor_refuses_less_than_a_patch(size_hw):
    with pytest.raises(ValueError, match=rf"image is {size_hw[0]}x{size_hw[1]} px.*at least one patch.*16 px.*Resize"):
        fit_to_patches(torch.zeros(1, 3, *size_hw), 16, "floor")


# -------------------------------------------------------------------------------------------- recipes


@pytest.mark.parametrize("grid_hw", [(3, 5), (4, 4), (1, 6)], ids=str)
def test_locality_is_a_gaussian_of_the_distance(grid_hw):
    bias = locality_bias(grid_hw, 2.5, torch.zeros(1))
    places = [(y, x) for y in range(grid_hw[0]) for x in range(grid_hw[1])]
    assert bias.shape == (len(places), 1 + len(places))
    assert not bias[:, 0].any()
    for i, (y, x) in enumerate(places):
        for j, (v, u) in enumerate(places):
            assert float(bias[i, 1 + j]) == pytest.approx(math.exp(-((y - v) ** 2 + (x - u) ** 2) / 12.5), abs=1e-6)


def test_recipe_survives_its_dictionary():
    recipe = Recipe((Term("kk", 0.5, 5.0), Term("qk", 0.25, block=7)), residual=False, feed_forward=False)
    assert Recipe(**recipe.to_dict()) == recipe
    assert Recipe(**{**recipe.to_dict(), "terms": tuple(recipe.to_dict()["terms"])}) == recipe


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Term("kq"), r"scores is 'kq'; choose one of 'identity', 'qk', 'qq', 'kk', 'vv'"),
        (lambda: Term("kk", sigma_patches=0), r"sigma_patches is 0; it must be positive"),
        (lambda: Term("kk", sigma_patches=math.nan), r"sigma_patches is nan; it must be positive"),
        (lambda: Term("kk", block=0), r"block is 0; it must be 1 to 12"),
        (lambda: Term("kk", block=13), r"block is 13; it must be 1 to 12"),
        (lambda: Recipe(()), r"no terms; give at least one"),
        (lambda: Recipe((Term("kk"),), blocks=0), r"blocks is 0; it must be at least 1"),
        (lambda: Recipe((Term("kk"),), blocks=2), r"takes feed_forward=False"),
        (lambda: Recipe((Term("kk", block=5),), feed_forward=False, blocks=2), r"terms of its own block only"),
    ],
)
def test_impossible_recipes_are_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shape", [(2, 3, 520, 16), (1, 2, 1030, 8)])
def test_bf16_attention_in_rows_is_the_softmax_written_out(shape, biased):
    batch, heads, tokens, width = shape
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(batch, heads, tokens - 1, width, generator=generator).bfloat16()
    key, value = (torch.randn(shape, generator=generator).bfloat16() for _ in "kv")
    bias = torch.rand(tokens - 1, tokens, generator=generator).bfloat16() * 4 if biased else None
    with torch.no_grad():
        got = attend(query, key, value, bias)
    scores = torch.einsum("bhmd,bhnd->bhmn", query.double(), key.double()) / width**0.5
    weights = (scores + (bias.double() if biased else 0)).exp()
    wanted = torch.einsum("bhmn,bhnd->bhmd", weights / weights.sum(-1, keepdim=True), value.double())
    assert got.dtype == torch.bfloat16
    # bf16 keeps eight bits: a score of 8 is off by up to 1/32, and so is its weight, relatively.
    assert (got.double() - wanted).abs().max() < 0.03
    assert (got.double() - wanted).abs().mean() < 0.003


def test_bf16_attention_keeps_gradients():
    query = torch.randn(1, 2, 600, 8).bfloat16().requires_grad_()
    attend(query, query, query).sum().backward()
    assert query.grad.isfinite().all()
