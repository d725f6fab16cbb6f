"""CLIP-DIY against a plain formulation, and the saliency that it asks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from plain_clip import PlainClip, unit
from plain_vfm import bilinear
from safetensors.torch import save_file
from second_networks import small
from test_proxyclip import dino, imagenet, vit

from spar_hf import Labels, build_segmenter
from spar_hf.networks.saliency import Foreground, Found, open_saliency
from spar_hf.networks.vit import ViT
from spar_hf.segmentation_spar import label_map

CHOSEN = {"side_px": 64, "crops_px": (64, 32)}


@pytest.fixture
def found_file(tmp_path):
    """FOUND's file as its authors' code writes it."""
    generator = torch.Generator().manual_seed(3)
    state = {"weight": torch.randn(1, 24, 1, 1, generator=generator), "bias": torch.tensor([0.3])}
    torch.save({"decoder": state}, tmp_path / "decoder_weights.pt")
    return tmp_path / "decoder_weights.pt", state


def plain_keys(network, pixels: torch.Tensor) -> torch.Tensor:
    """Keys (N, C) of the last block, of ImageNet pixels (1, 3, H, W)."""
    kept = []
    hook = network.layers[-1].attention.k_proj.register_forward_hook(lambda m, a, out: kept.append(out))
    dino(network, pixels)
    hook.remove()
    return kept[0][0, 1:]


def plain_found(network, state, image: np.ndarray, config) -> np.ndarray:
    """(H, W) of pixels (3, H, W): zeros around what ImageNet normalises, a convolution, bilinear."""
    height, width = image.shape[1:]
    seen = imagenet(torch.from_numpy(image).float()[None], config)
    padded = torch.zeros(1, 3, -(-height // 8) * 8, -(-width // 8) * 8)
    padded[:, :, :height, :width] = seen
    grid = (padded.shape[2] // 8, padded.shape[3] // 8)
    logits = plain_keys(network, padded).double().numpy() @ state["weight"].double().numpy().reshape(-1) + 0.3
    whole = bilinear(logits.reshape(grid), (grid[0] * 8, grid[1] * 8))
    return 1 / (1 + np.exp(-whole[:height, :width]))


@pytest.mark.parametrize("size", [(64, 64), (112, 128), (48, 144), (90, 75)])
@torch.no_grad()
def test_clip_diy_equals_its_plain_formulation(size, found_file, make_spar, make_clip, spar_processor, pixels):
    """METHODS row "clip_diy": crops, saliency, scores and labels."""
    model, network, (path, state) = make_spar(num_hidden_layers=2), vit(8), found_file
    networks = {"saliency": str(path), "dino": network}
    segmenter = build_segmenter(model, spar_processor, "clip_diy", networks=networks, settings=CHOSEN)
    labels = Labels.parse("nothing, ground; car, automobile; sky")
    labels = type(labels)(labels.classes, background=0)
    encoded = segmenter.encode_labels(labels)
    names = ["nothing", "ground", "car", "automobile", "sky"]
    text = spar_processor.encode_labels(model, [[name] for name in names], "a photo of a {}").text_embeds
    torch.testing.assert_close(encoded.text_embeds, text)
    text, config = text.double().numpy(), segmenter.config
    images = pixels(size, batch=2)
    maps = segmenter(images, encoded)

    net = PlainClip(make_clip(num_hidden_layers=2))
    square = torch.nn.functional.interpolate(
        images[1:], size=(64, 64), mode="bilinear", align_corners=False, antialias=True
    )[0]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.image_mean, config.image_std))
    colours = ((square * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()
    total = np.zeros((5, 64, 64))
    for side in (64, 32):
        count = (64 - side) // (side // 2) + 1
        grid = np.zeros((5, count, count))
        for i in range(count):
            for j in range(count):
                y, x = i * side // 2, j * side // 2
                crop = Image.fromarray(colours[y : y + side, x : x + side]).resize((64, 64), Image.Resampling.BICUBIC)
                shown = (np.asarray(crop) / 255 - mean.view(3).numpy()) / std.view(3).numpy()
                tokens, _ = net.embed(shown.transpose(2, 0, 1), "offset")
                grid[:, i, j] = text @ unit(net.project(net.inputs(tokens)[-1])[0])
        total += bilinear(grid, (64, 64)) / 2
    saliency = plain_found(network, state, square.double().numpy(), config)
    total[:2] *= 1 - saliency
    total[2:] *= saliency
    expected = bilinear(total, size)
    np.testing.assert_allclose(maps[1](slice(0, 5)).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(maps[1](slice(1, 3)).numpy(), expected[1:3], atol=2e-5)
    (single,) = segmenter(images[:1], encoded)
    torch.testing.assert_close(single(slice(0, 5)), maps[0](slice(0, 5)), atol=2e-5, rtol=0)
    classes = np.stack([expected[:2].max(axis=0), expected[2:4].max(axis=0), expected[4]])
    best = np.sort(classes, axis=0)
    sure = best[-1] - best[-2] > 1e-4
    assert sure.mean() > 0.9
    np.testing.assert_array_equal(label_map(maps[1], encoded.class_ids).numpy()[sure], classes.argmax(axis=0)[sure])


@torch.no_grad()
def test_saliency_of_any_size_and_from_any_network(found_file, make_vision, pixels, tmp_path):
    path, state = found_file
    config, network = make_vision(num_hidden_layers=2).config, vit(8)
    save_file(state, tmp_path / "found.safetensors")
    for size in ((64, 64), (50, 83), (16, 120)):
        images = pixels(size, batch=2)
        saliency = open_saliency(path, network)(images, config)
        assert saliency.shape == (2, *size)
        expected = plain_found(network, state, images[1].double().numpy(), config)
        np.testing.assert_allclose(saliency[1].numpy(), expected, atol=2e-5)
        torch.testing.assert_close(open_saliency(tmp_path / "found.safetensors", network)(images, config), saliency)
        small("saliency").save_pretrained(tmp_path / "net")
        foreground = open_saliency(str(tmp_path / "net"))
        assert isinstance(foreground, Foreground) and open_saliency(foreground) is foreground
        logits = small("saliency")(imagenet(images, config)).logits
        shares = torch.nn.functional.interpolate(logits, size=size, mode="bilinear").sigmoid()
        torch.testing.assert_close(foreground(images, config), shares[:, 0], atol=1e-5, rtol=0)


def test_another_network_or_file_is_refused(found_file, tmp_path, make_spar, spar_processor):
    path, state = found_file
    with pytest.raises(ValueError, match=r"shapes \(1, 24, 1, 1\) and \(1,\), and network 'dino' has 48 channels"):
        from transformers import ViTConfig, ViTModel

        wide = ViTConfig(hidden_size=48, num_hidden_layers=1, num_attention_heads=2, image_size=64, patch_size=8)
        Found(ViT(ViTModel(wide)), state["weight"], state["bias"])
    with pytest.raises(
        ValueError, match=r"is a ViTModel of .* labels; give FOUND's weights \(.pt, .pth, .safetensors"
    ):
        open_saliency(vit(8))
    with pytest.raises(ValueError, match=r"there is no file .*nowhere\.pt; give FOUND's decoder_weights\.pt"):
        open_saliency(tmp_path / "nowhere.pt")
    (tmp_path / "broken.pt").write_bytes(path.read_bytes()[:200])
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    torch.save({"decoder": [1, 2]}, tmp_path / "other.pt")
    for name in ("broken.pt", "broken.safetensors", "other.pt"):
        with pytest.raises(ValueError, match=rf"{name} holds no weights of FOUND"):
            open_saliency(tmp_path / name)
    model = make_spar(num_hidden_layers=2)
    with pytest.raises(ValueError, match="method 'clip_diy' needs a network 'saliency' and got none; give --network"):
        build_segmenter(model, spar_processor, "clip_diy")
    for crops in ((), (300,), (1,)):
        with pytest.raises(ValueError, match=r"crops_px is .*; sides are from 2 px to side_px, 256"):
            networks = {"saliency": small("saliency")}
            build_segmenter(model, spar_processor, "clip_diy", networks=networks, settings={"crops_px": crops})
