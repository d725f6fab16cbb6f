"""CASS against whole graphs, their eigenvalues and singular values in fp64."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from plain_clip import PlainClip
from plain_vfm import cass
from test_proxyclip import SMALL, dino, imagenet, spread, vit
from transformers import ViTConfig, ViTModel

from spar_hf import build_encoder
from spar_hf.methods import cass as methods_cass
from spar_hf.methods.cass import Encoder, matched


def three_heads(patch_px: int = 8) -> ViTModel:
    own = {**SMALL, "num_attention_heads": 3, "hidden_size": 48, "intermediate_size": 32}
    return spread(ViTModel(ViTConfig(**own, patch_size=patch_px)))


@pytest.mark.parametrize(
    ("size", "patch_px", "settings"),
    [
        ((64, 64), 8, {}),
        ((112, 128), 8, {}),
        ((112, 128), 16, {"stretch": False}),
        ((96, 208), 8, {"transposed": False}),
        ((90, 75), 8, {}),
    ],
)
@torch.no_grad()
def test_equals_its_plain_formulation(size, patch_px, settings, make_clip, make_vision, pixels, monkeypatch):
    images, second = pixels(size, batch=2), three_heads(patch_px)
    encoder = build_encoder(make_vision(num_hidden_layers=3), "cass", networks={"dino": second}, settings=settings)
    chosen = []
    monkeypatch.setattr(methods_cass, "matched", lambda distance: chosen.append(matched(distance)) or chosen[-1])
    output = encoder(images)
    net, side = PlainClip(make_clip(num_hidden_layers=3)), min(size)
    square = images
    if size[0] != size[1]:
        square = torch.nn.functional.interpolate(images, size=(side, side), mode="bicubic", antialias=True)
    fit = side // patch_px * patch_px
    seen = imagenet(square, encoder.config)[:, :, :fit, :fit]
    kept = []
    second.layers[-1].attention.k_proj.register_forward_hook(lambda module, args, out: kept.append(out))
    dino(second, seen)
    keys = kept[0][:, 1:].unflatten(2, (3, -1)).permute(0, 2, 3, 1).unflatten(3, (side // patch_px,) * 2)
    for i in range(2):
        tokens, grid_hw = net.embed(images[i].double().numpy(), "offset")
        inputs = net.inputs(tokens)
        expected = net.project(cass(net, inputs, grid_hw, keys[i].double().numpy(), chosen[i], **settings))
        np.testing.assert_allclose(output.patch_embeds[i].flatten(0, 1).numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(output.image_embeds[i].numpy(), net.project(inputs[-1][:1])[0], atol=2e-5)


@torch.no_grad()
def test_rows_are_the_whole_and_small_or_even_images_run(make_vision, pixels, monkeypatch):
    encoder = Encoder(make_vision(num_hidden_layers=3), {"dino": three_heads()})
    whole = encoder(pixels("larger")).patch_embeds
    monkeypatch.setattr("spar_hf.methods.cass.ROW_NUMBERS", 500)
    torch.testing.assert_close(encoder(pixels("larger")).patch_embeds, whole, atol=2e-5, rtol=0)
    for image in (pixels((16, 16)), pixels((16, 48)), torch.zeros(1, 3, 64, 80)):
        assert encoder(image).patch_embeds.isfinite().all()


def test_the_assignment_is_the_best():
    distance = torch.rand(5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    best = max(sum(distance[i, j] for i, j in enumerate(p)) for p in itertools.permutations(range(5)))
    assert sum(distance[i, j] for i, j in matched(distance)) == best


def test_heads_must_match(make_vision):
    with pytest.raises(
        ValueError, match=r"'cass' matches heads, and the tower has 3 and network 'dino' 2; give a ViT"
    ):
        Encoder(make_vision(num_hidden_layers=3), {"dino": vit()})
