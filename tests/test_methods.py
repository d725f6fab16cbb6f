"""Every row of the table of methods against a plain formulation, at every kind of size, and the identities."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROWS, SIZES_HW
from plain_clip import PLAIN_METHODS, PlainClip, clip_surgery, plain_method
from torch.utils._python_dispatch import TorchDispatchMode

from spar_hf import METHODS, build_encoder
from spar_hf.methods.table import find_method
from spar_hf.methods_spar import Recipe, Term

BARE = {"residual": False, "feed_forward": False}


def run(make_vision, pixel_values, recipe, layers=6, **kwargs):
    """A tower with any recipe, on the same weights and positions as the others here."""
    model = make_vision(recipe=recipe.to_dict(), position_interpolation="size", num_hidden_layers=layers)
    with torch.no_grad():
        return model(pixel_values, **kwargs)


def attended(make_vision, pixel_values, *terms):
    """Sum of attention times values of the last block, before out_proj's bias, (B, N, C)."""
    model = make_vision(num_hidden_layers=6)
    output = run(make_vision, pixel_values, Recipe(terms, **BARE))
    return output.last_hidden_state[:, 1:] - model.encoder.layers[-1].self_attn.out_proj.bias


def test_every_method_has_a_plain_formulation():
    texts = [path.read_text(encoding="utf-8") for path in Path(__file__).parent.glob("test_*.py")]
    for name in set(METHODS) - set(PLAIN_METHODS):  # those with a second network have a file of tests each
        assert any("equals_its_plain_formulation" in text and f'"{name}"' in text for text in texts), name


@pytest.mark.parametrize("layers", [12, 6])
@pytest.mark.parametrize("size", SIZES_HW)
@pytest.mark.parametrize("name", PLAIN_METHODS)
def test_method_equals_its_plain_formulation(name, size, layers, make_clip, make_vision, pixels):
    images = pixels(size, batch=2)
    with torch.no_grad():
        output = build_encoder(make_vision(num_hidden_layers=layers), name)(images)
    for i, pixel_values in enumerate(images):
        patches, image = plain_method(PlainClip(make_clip(num_hidden_layers=layers)), pixel_values.numpy(), name)
        np.testing.assert_allclose(output.patch_embeds[i].numpy(), patches, atol=2e-5)
        np.testing.assert_allclose(output.image_embeds[i].numpy(), image, atol=2e-5)


@torch.no_grad()
def test_several_blocks_are_all_there_are_in_a_shallow_network(make_clip, make_vision, pixels):
    images = pixels("same_count")
    net = PlainClip(make_clip(num_hidden_layers=3))
    tokens, grid_hw = net.embed(images[0].double().numpy(), "bilinear")
    expected = clip_surgery(net, net.inputs(tokens), grid_hw)[1:]
    output = make_vision(method="clip_surgery", num_hidden_layers=3)(images)
    np.testing.assert_allclose(output.last_hidden_state[0, 1:].numpy(), expected, atol=2e-5)


# ------------------------------------------------------------------------------------------ identities


@pytest.mark.parametrize("size", SIZES_HW)
def test_sclip_attends_as_clearclip_does_plus_keys(size, make_vision, pixels):
    images = pixels(size, batch=2)
    both = attended(make_vision, images, *METHODS["sclip"].recipe.terms)
    queries, keys = (attended(make_vision, images, Term(scores)) for scores in ("qq", "kk"))
    torch.testing.assert_close(both, queries + keys, atol=2e-5, rtol=0)
    assert METHODS["clearclip"].recipe == Recipe((Term("qq"),), **BARE)
    assert (queries - keys).abs().max() > 0.1


def test_naclip_with_an_endless_neighbourhood_adds_one_to_every_patch(make_vision, pixels):
    images = pixels("larger", batch=2)
    model = make_vision(num_hidden_layers=6)
    tokens = run(make_vision, images, METHODS["clip"].recipe, output_hidden_states=True).hidden_states[-2]
    layer = model.encoder.layers[-1]
    normed = layer.layer_norm1(tokens)
    key, value = (
        p(normed).unflatten(-1, (3, 16)).transpose(1, 2) for p in (layer.self_attn.k_proj, layer.self_attn.v_proj)
    )
    scores = key @ key.transpose(2, 3) / 4
    scores[..., 1:] += 1  # the class token's column stays as it is
    expected = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2) @ layer.self_attn.out_proj.weight.T
    endless = attended(make_vision, images, Term("kk", sigma_patches=1e6))
    torch.testing.assert_close(endless, expected[:, 1:], atol=2e-5, rtol=0)
    # Without the class token's column a constant would change nothing; with it, it does.
    assert (endless - attended(make_vision, images, Term("kk"))).abs().max() > 1e-3


def test_a_narrow_locality_favours_only_the_patch_itself(make_vision, pixels):
    images = pixels("same_count")
    narrow = run(make_vision, images, Recipe((Term("kk", sigma_patches=1e-3),), **BARE), output_attentions=True)
    plain = run(make_vision, images, Recipe((Term("kk"),), **BARE), output_attentions=True)
    ratio = narrow.attentions[-1][:, :, 1:] / plain.attentions[-1][:, :, 1:]  # e on the diagonal, before normalisation
    own = ratio.diagonal(offset=1, dim1=2, dim2=3)
    torch.testing.assert_close(own, ratio[..., 0] * np.e)


def test_weights_scale_and_split(make_vision, pixels):
    images = pixels("off_grid")
    whole = attended(make_vision, images, Term("kk"))
    split = attended(make_vision, images, Term("kk", weight=0.25), Term("kk", weight=0.75))
    torch.testing.assert_close(split, whole, atol=1e-5, rtol=0)
    torch.testing.assert_close(attended(make_vision, images, Term("kk", weight=-2.0)), -2 * whole, atol=1e-5, rtol=0)


def test_an_earlier_block_that_is_the_last_one_changes_nothing(make_vision, pixels):
    images = pixels("native")
    # Blocks count twelve to a network: 11 and 12 of twelve are both the last of six.
    assert [Term("kk", block=block).index(6) for block in (1, 2, 3, 11, 12)] == [0, 0, 1, 5, 5]
    assert [Term("kk", block=block).index(12) for block in range(1, 13)] == list(range(12))
    assert [Term("kk", block=block).index(24) for block in (1, 6, 12)] == [1, 11, 23]
    last, same = (attended(make_vision, images, Term("kk", block=block)) for block in (12, 11))
    earlier = attended(make_vision, images, Term("kk", block=8))
    torch.testing.assert_close(last, same)
    assert (last - earlier).abs().max() > 0.1


def test_the_usual_scores_make_the_usual_block(make_vision, make_clip, pixels):
    images = pixels("larger")
    with torch.no_grad():
        stock = make_clip(num_hidden_layers=6).vision_model(images, interpolate_pos_encoding=True).last_hidden_state
    for recipe in (Recipe((Term("qk"),)), Recipe((Term("qk", weight=0.5), Term("qk", weight=0.5)))):
        torch.testing.assert_close(run(make_vision, images, recipe).last_hidden_state, stock, atol=2e-5, rtol=0)


# ---------------------------------------------------------------------------------- maps and arithmetic


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_attentions_are_what_was_applied(name, make_vision, make_clip, pixels):
    images = pixels("same_count", batch=2)
    model = make_vision(method=name, num_hidden_layers=6, position_interpolation="size")
    seen = defaultdict(list)
    attention = model.encoder.layers[-1].self_attn
    attention.v_proj.register_forward_hook(lambda _, __, out: seen["values"].append(out))
    attention.out_proj.register_forward_pre_hook(lambda _, args: seen["mixed"].append(args[0]))
    output = model(images, output_attentions=True)
    assert [tuple(weights.shape) for weights in output.attentions] == [(2, 3, 17, 17)] * 6
    values = seen["values"][-1].unflatten(-1, (3, 16)).transpose(1, 2)
    applied = (output.attentions[-1] @ values).transpose(1, 2).flatten(2)
    for mixed in seen["mixed"]:
        rows = applied[:, :1] if mixed.shape[1] == 1 else applied[:, 1:]
        torch.testing.assert_close(mixed, rows, atol=1e-5, rtol=0)
    assert sorted(mixed.shape[1] for mixed in seen["mixed"]) == [1, 16]

    # Asking for the maps changes nothing else, and the earlier blocks and the class token attend as in CLIP.
    torch.testing.assert_close(output.patch_embeds, model(images).patch_embeds, atol=2e-5, rtol=0)
    stock = make_clip(num_hidden_layers=6).vision_model
    stock.set_attn_implementation("eager")
    try:
        expected = stock(images, interpolate_pos_encoding=True, output_attentions=True).attentions
    finally:
        stock.set_attn_implementation("sdpa")
    for ours, theirs in zip(output.attentions[:-1], expected[:-1], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    torch.testing.assert_close(output.attentions[-1][:, :, 0], expected[-1][:, :, 0], atol=1e-5, rtol=0)


class SquareTensors(TorchDispatchMode):
    """Collects the shapes of all results that hold a number for every pair of tokens."""

    def __init__(self, tokens: int):
        super().__init__()
        self.tokens = tokens
        self.shapes: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and tensor.numel() >= (self.tokens - 1) ** 2:
                sides = [side for side in tensor.shape if side >= self.tokens - 1]
                if len(sides) > 1:
                    self.shapes.add(tuple(tensor.shape))
        return result


@pytest.mark.parametrize("name", ROWS)
@torch.no_grad()
def test_no_map_is_kept_unless_asked_for(name, make_vision):
    images = torch.randn(2, 3, 256, 272)  # 272 patches, more than any width of the network
    model = make_vision(method=name, num_hidden_layers=6)
    with SquareTensors(273) as squares:
        model(images)
    # Only the locality bias is a matrix over patches: one for all heads and all images.
    local = any(term.sigma_patches for term in METHODS[name].recipe.terms)
    assert {len(shape) for shape in squares.shapes} <= ({2, 4} if local else set())
    assert all(np.prod(shape) <= 272 * 280 for shape in squares.shapes)
    with SquareTensors(273) as squares:
        model(images, output_attentions=True)
    assert (2, 3, 273, 273) in squares.shapes


# ---------------------------------------------------------------------------------------------- table


def test_the_table_is_complete_and_its_numbers_are_percentages():
    for name, method in METHODS.items():
        assert name == name.lower() and method.title and method.paper
        assert (method.recipe is None) == (method.module is not None)
        assert method.recipe is None or Recipe(**method.recipe.to_dict()) == method.recipe
        assert method.kind in ("feature", "label") and method.branch in ("clip", "vfm", "generative")


def test_an_unknown_method_names_its_neighbour():
    with pytest.raises(
        ValueError, match=r"no method 'na-clip'; choose one of clip, maskclip, .*Did you mean 'naclip'\?"
    ):
        find_method("na-clip")
    with pytest.raises(ValueError, match=r"no method 'zzz'; choose one of [^?]*$"):
        find_method("zzz")


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ROWS])
def test_a_method_that_is_no_last_block_says_how_to_run_it(name, make_vision):
    with pytest.raises(
        ValueError, match=rf"{name}.* is more than a last block.*spar_hf.build_encoder\(vision, '{name}'\)"
    ):
        make_vision(method=name)


@pytest.mark.parametrize(
    ("name", "native_px", "patch_px", "window"),
    [
        ("naclip", 224, 16, (224, 112)),
        ("naclip", 128, 16, (128, 64)),
        ("naclip", 336, 14, (336, 168)),
        ("naclip", 224, 32, (224, 128)),  # 3.5 patches are rounded to whole ones
        ("proxyclip", 224, 16, (336, 112)),
        ("proxyclip", 128, 16, (192, 64)),
        ("maskclip", 512, 16, (512, 24)),  # SPAR's 24 px belong to the patch, not to the window
        ("itaclip", 128, 16, (128, 28)),
        ("maskclip", 16, 16, (16, 16)),
    ],
)
def test_windows_scale_with_the_network(name, native_px, patch_px, window):
    assert METHODS[name].window_for(native_px, patch_px) == window
