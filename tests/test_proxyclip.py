"""ProxyCLIP against its plain formulation, with the second networks that people have."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from conftest import SIZES_HW
from plain_clip import PlainClip, proxyclip
from safetensors.torch import load_file, save_file
from transformers import (
    Dinov2Backbone,
    Dinov2Config,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    ViTConfig,
    ViTModel,
)

from spar_hf import METHODS, SlidingWindow, build_encoder
from spar_hf.encoders.composition import Regridded, resample
from spar_hf.methods.encoder import above_mean, attend_by_similarity, mean_similarity
from spar_hf.methods.proxyclip import Encoder
from spar_hf.networks.vit import ViT

SMALL = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 64}


def spread(network: torch.nn.Module) -> torch.nn.Module:
    """transformers' initial weights give nearly equal patches; these differ."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) * (weight[0].numel() ** -0.5))
            elif "norm" not in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    return network.eval()


def vit(patch_px: int = 8) -> ViTModel:
    return spread(ViTModel(ViTConfig(**SMALL, intermediate_size=32, patch_size=patch_px)))


def dino(network: ViTModel, pixels: torch.Tensor) -> torch.Tensor:
    """All tokens after the final norm; the position table is resized as in DINO's own code, (n + 0.1) / N."""
    embeddings = network.embeddings
    patches = embeddings.patch_embeddings.projection(pixels)
    table = embeddings.position_embeddings[:, 1:]
    side = math.isqrt(table.shape[1])
    positions = table.unflatten(1, (side, side)).permute(0, 3, 1, 2)
    if patches.shape[2:] != (side, side):
        scale = tuple((n + 0.1) / side for n in patches.shape[2:])
        positions = torch.nn.functional.interpolate(positions, scale_factor=scale, mode="bicubic")
    first = embeddings.cls_token + embeddings.position_embeddings[:, :1]
    x = torch.cat([first.expand(len(pixels), -1, -1), (patches + positions).flatten(2).transpose(1, 2)], dim=1)
    for layer in network.layers:
        x = layer(x)
    return network.layernorm(x)


def imagenet(pixel_values: torch.Tensor, config) -> torch.Tensor:
    """CLIP's pixels with ImageNet's mean and standard deviation instead of CLIP's."""

    def column(values):
        return torch.tensor(values).view(1, 3, 1, 1)

    colours = pixel_values * column(config.image_std) + column(config.image_mean)
    return (colours - column([0.485, 0.456, 0.406])) / column([0.229, 0.224, 0.225])


@pytest.mark.parametrize("patch_px", [8, 16, 14])
@pytest.mark.parametrize("size", SIZES_HW)
@torch.no_grad()
def test_equals_its_plain_formulation(size, patch_px, make_clip, make_vision, pixels):
    images, network = pixels(size, batch=2), vit(patch_px)
    encoder = build_encoder(make_vision(num_hidden_layers=6), "proxyclip", networks={"dino": network})
    output = encoder(images)
    rows, columns = images.shape[2] // patch_px, images.shape[3] // patch_px
    assert output.patch_embeds.shape[1:3] == (rows, columns)
    assert output.extent_hw == (rows * patch_px, columns * patch_px)
    net = PlainClip(make_clip(num_hidden_layers=6))
    seen = imagenet(images, encoder.config)[:, :, : rows * patch_px, : columns * patch_px]
    features = dino(network, seen)[:, 1:].unflatten(1, (rows, columns))
    for i in range(2):
        tokens, grid_hw = net.embed(images[i].double().numpy(), "offset")
        inputs = net.inputs(tokens)
        expected = net.project(proxyclip(net, inputs, grid_hw, features[i].double().numpy(), ratio=16 / patch_px))
        np.testing.assert_allclose(output.patch_embeds[i].flatten(0, 1).numpy(), expected, atol=2e-5)
        np.testing.assert_allclose(output.image_embeds[i].numpy(), net.project(inputs[-1][:1])[0], atol=2e-5)


@torch.no_grad()
def test_registers_and_backbones_give_their_patches(make_vision, pixels, tmp_path):
    vision, images = make_vision(num_hidden_layers=6), pixels((56, 112), batch=2)
    registers = Dinov2WithRegistersConfig(**SMALL, patch_size=14, num_register_tokens=3, mlp_ratio=2)
    network = spread(Dinov2WithRegistersModel(registers))
    encoder = Encoder(vision, {"dino": network})
    seen = encoder.dino(images, encoder.config)
    tokens = network(imagenet(images, vision.config)).last_hidden_state
    assert tokens.shape[1] == 1 + 3 + 4 * 8 and seen.extent_hw == (56, 112)
    torch.testing.assert_close(seen.features.flatten(2).transpose(1, 2), tokens[:, 4:], atol=1e-5, rtol=0)

    backbone = spread(Dinov2Backbone(Dinov2Config(**SMALL, patch_size=14, mlp_ratio=2)))
    backbone.save_pretrained(tmp_path)
    encoder = Encoder(vision, {"dino": str(tmp_path)})  # by folder: AutoBackbone finds it
    assert type(encoder.dino.network) is Dinov2Backbone
    seen = encoder.dino(images, encoder.config)
    expected = backbone(imagenet(images, vision.config)).feature_maps[-1]
    torch.testing.assert_close(seen.features, expected, atol=1e-5, rtol=0)
    assert encoder(images).patch_embeds.shape == (2, 4, 8, 24)


@torch.no_grad()
def test_a_folder_brings_its_mean_and_deviation(make_vision, pixels, tmp_path):
    vision, images = make_vision(num_hidden_layers=6), pixels("larger")
    network = vit()
    network.save_pretrained(tmp_path)
    plain = Encoder(vision, {"dino": str(tmp_path)})(images).patch_embeds
    torch.testing.assert_close(plain, Encoder(vision, {"dino": network})(images).patch_embeds)
    halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "image_processor_type": "ViTImageProcessor"}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(halves))
    saved = Encoder(vision, {"dino": str(tmp_path)})(images).patch_embeds
    given = Encoder(vision, {"dino": ViT(network, (0.5,) * 3, (0.5,) * 3)})(images).patch_embeds
    torch.testing.assert_close(saved, given)
    assert (saved - plain).abs().max() > 1e-3


@torch.no_grad()
def test_the_tower_of_a_vision_language_model_can_be_it(make_vision, make_clip, pixels, tmp_path):
    clip, images = make_clip(), pixels("larger", batch=2)
    clip.save_pretrained(tmp_path)
    encoder = Encoder(make_vision(num_hidden_layers=6), {"dino": str(tmp_path)})
    seen = encoder.dino(images, encoder.config)
    expected = clip.vision_model(imagenet(images, encoder.config), interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(seen.features.flatten(2).mT, expected[:, 1:], atol=1e-5, rtol=0)
    assert seen.extent_hw == tuple(images.shape[2:])
    shipped = Encoder(make_vision(num_hidden_layers=6), {"dino": "tiny"}).dino.network
    assert shipped.config.patch_size == 16 and not hasattr(shipped, "text_model")


def test_patches_all_alike_keep_to_themselves():
    vectors = torch.eye(6) + 5  # cosines of 0.97 and more: 1.2 times their mean is above one
    unit = torch.nn.functional.normalize(vectors, dim=-1)[None]
    values = torch.randn(1, 6, 4, generator=torch.Generator().manual_seed(0))
    mean = mean_similarity(unit)
    torch.testing.assert_close(mean.squeeze(), (unit @ unit.transpose(1, 2)).mean())
    torch.testing.assert_close(attend_by_similarity(unit, values, above_mean(1.2 * mean, 3.0)), values)
    mixed = attend_by_similarity(unit, values, above_mean(mean, 3.0))
    assert (mixed - values).abs().max() < 1e-6  # above the mean there is only the patch itself, too
    mixed = attend_by_similarity(unit, values, above_mean(0.9 * mean, 3.0))
    assert (mixed - values).abs().max() > 0.1


def test_a_network_without_patches_is_refused(make_vision):
    network = torch.nn.Conv2d(3, 3, 3)
    network.config = ViTConfig(patch_size=(8, 16))
    with pytest.raises(ValueError, match=r"is a Conv2d with patch_size .*8, 16.; give a ViT with square patches"):
        Encoder(make_vision(num_hidden_layers=6), {"dino": network})
    assert METHODS["proxyclip"].needs == {"dino": "facebook/dino-vitb8"}


@torch.no_grad()
def test_windows_keep_the_finer_grid_and_another_grid_goes_back(make_vision, pixels):
    encoder = build_encoder(make_vision(num_hidden_layers=6), "proxyclip", networks={"dino": vit()})
    images = pixels((96, 144), batch=2)
    fine = SlidingWindow(encoder, 64, 40)(images)
    assert fine.patch_embeds.shape == (2, 12, 18, 24) and fine.extent_hw == (96, 144)
    coarse = Regridded(SlidingWindow(encoder, 64, 40), 16)(images)
    assert coarse.extent_hw == (96, 144) and coarse.patch_embeds.shape == (2, 6, 9, 24)
    # Twice the side: each patch is the mean of its four.
    expected = fine.patch_embeds.unflatten(1, (6, 2)).unflatten(3, (9, 2)).mean(dim=(2, 4))
    torch.testing.assert_close(coarse.patch_embeds, expected, atol=1e-5, rtol=0)
    assert encoder.config.patch_size == 8


def test_resample_looks_up_by_place():
    ramp = torch.arange(4.0).view(1, 1, 1, 4).expand(1, 1, 3, 4)  # patches of 10 px: value = x / 10 - 0.5
    points = resample(ramp, (30, 40), (2, 5), (24, 35))
    places = (torch.arange(5) + 0.5) * 7
    torch.testing.assert_close(points[0, 0], (places / 10 - 0.5).clamp(0, 3).expand(2, 5))
    beyond = resample(ramp, (30, 40), (1, 6), (30, 60))
    torch.testing.assert_close(beyond[0, 0, 0], torch.tensor([0.0, 1.0, 2.0, 3.0, 3.0, 3.0]))


def test_weights_come_from_safetensors(tmp_path, make_vision):
    network = vit()
    network.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    name = next(name for name in weights if name.endswith("cls_token"))
    save_file({**weights, name: weights[name] + 1}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    encoder = Encoder(make_vision(num_hidden_layers=6), {"dino": str(tmp_path)})
    torch.testing.assert_close(encoder.dino.network.embeddings.cls_token, network.embeddings.cls_token + 1)
