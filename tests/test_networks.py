"""The adapters of second networks, over small random networks of transformers."""

from __future__ import annotations

import pytest
import torch
from test_proxyclip import SMALL, imagenet, spread
from transformers import (
    AutoModel,
    Dinov2Config,
    Dinov2Model,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    ResNetConfig,
    ResNetModel,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTMAEConfig,
    ViTMAEModel,
    ViTModel,
)

from spar_hf.files import weights_digest
from spar_hf.methods.bank import network_digest
from spar_hf.networks.vit import ViT

WIDE = {**SMALL, "intermediate_size": 32}


def last_inputs(network: torch.nn.Module, layer: torch.nn.Module, norm: str, run) -> torch.Tensor:
    """The normalised input of a block, while `run` runs the network."""
    kept = []
    hook = getattr(layer, norm).register_forward_hook(lambda module, args, out: kept.append(out))
    run()
    hook.remove()
    return kept[0]


@pytest.mark.parametrize("size_hw", [(64, 64), (96, 136)])
@torch.no_grad()
def test_heads_are_the_last_blocks_projections(size_hw, make_vision, pixels):
    config, images = make_vision(num_hidden_layers=2).config, pixels(size_hw, batch=2)
    for network, layers, norm in (
        (spread(ViTModel(ViTConfig(**WIDE, patch_size=8))), "layers", "layernorm_before"),
        (spread(Dinov2Model(Dinov2Config(**SMALL, patch_size=8, mlp_ratio=2))), "encoder.layer", "norm1"),
        (spread(DINOv3ViTModel(DINOv3ViTConfig(**WIDE, patch_size=8, num_register_tokens=3))), "model.layer", "norm1"),
    ):
        adapter = ViT(network)
        seen = adapter(images, config, heads="qkv")
        grid_hw = (size_hw[0] // 8, size_hw[1] // 8)
        assert seen.grid_hw == grid_hw and seen.extent_hw == size_hw
        layer = network.get_submodule(layers)[-1]
        tokens = last_inputs(network, layer, norm, lambda: adapter(images, config))  # noqa: B023
        projections = adapter.last_projections()
        for name in "qkv":
            expected = projections[name](tokens)[:, -grid_hw[0] * grid_hw[1] :]
            torch.testing.assert_close(seen.heads[name].flatten(2).mT, expected, atol=1e-5, rtol=0)
        assert projections["k"].weight.shape == (24, 24) and projections["q"] is not projections["k"]
        assert not adapter(images, config).heads
        assert all(not module._forward_hooks for module in network.modules())


@torch.no_grad()
def test_dinov3_sees_any_size(make_vision, pixels, tmp_path):
    config = DINOv3ViTConfig(**WIDE, patch_size=16, num_register_tokens=2)
    spread(DINOv3ViTModel(config)).save_pretrained(tmp_path)
    vision, images = make_vision(num_hidden_layers=2), pixels((80, 112), batch=2)
    seen = ViT(str(tmp_path))(images, vision.config)
    network = AutoModel.from_pretrained(tmp_path).eval()
    expected = network(imagenet(images, vision.config)).last_hidden_state[:, 3:]
    torch.testing.assert_close(seen.features.flatten(2).mT, expected, atol=1e-5, rtol=0)
    assert seen.grid_hw == (5, 7)


@torch.no_grad()
def test_other_networks_are_told_apart(make_vision, pixels):
    config, images = make_vision(num_hidden_layers=2).config, pixels((64, 64))
    resnet = ResNetModel(ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1]))
    with pytest.raises(ValueError, match="is a ResNetModel with patch_size None; give a ViT with square patches"):
        ViT(resnet)
    swin = ViT(SwinModel(SwinConfig(embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4, image_size=64)))
    with pytest.raises(ValueError, match=r"a SwinModel, gives tokens of shape \(1, 64, 16\) for 16 x 16 patches"):
        swin(images, config)
    masked = ViT(ViTMAEModel(ViTMAEConfig(**WIDE, patch_size=8)))
    with pytest.raises(
        ValueError, match=r"a ViTMAEModel, gives tokens of shape .* give a ViT with one token for each"
    ):
        masked(images, config)
    convolution = torch.nn.Conv2d(3, 3, 3)
    convolution.config = ViTConfig(patch_size=8)
    with pytest.raises(ValueError, match="is a Conv2d, without an attention that projects queries, keys and values"):
        ViT(convolution)(images, config, heads="k")
    with pytest.raises(ValueError, match="there is no model 'dino-vitb8'"):
        ViT("dino-vitb8")


def test_one_adapter_serves_many():
    adapter = ViT(spread(ViTModel(ViTConfig(**WIDE, patch_size=8))), (0.5,) * 3, (0.25,) * 3)
    assert ViT.of(adapter) is adapter
    assert ViT.of(adapter.network).network is adapter.network
    assert "image_mean=(0.5, 0.5, 0.5), image_std=(0.25, 0.25, 0.25)" in repr(adapter)
    assert adapter.grid_hw(65, 31) == (8, 3) and adapter.grid_hw(65, 31, "pad") == (9, 4)


def test_a_checkpoint_without_a_pooler_is_the_same_each_time(tmp_path):
    """As those of DINO are: transformers would make a pooler up."""
    spread(ViTModel(ViTConfig(**WIDE, patch_size=8), add_pooling_layer=False)).save_pretrained(tmp_path)
    first, second = (ViT(str(tmp_path)) for _ in range(2))
    assert weights_digest(first) == weights_digest(second) and network_digest(first) == network_digest(second)
