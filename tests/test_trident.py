"""Trident against its plain formulation, over small random networks of transformers' own classes."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, unit
from plain_vfm import bilinear, line_weights, proxy_map, sam_average, starts
from test_proxyclip import dino, imagenet, spread, vit
from transformers import SamConfig, SamModel, SamVisionConfig, SamVisionModel

from spar_hf import METHODS, build_encoder
from spar_hf.methods.trident import Encoder, Settings
from spar_hf.networks.sam import Sam

SAM_PX = 128  # 8 x 8 patches
WINDOW = {"window_px": 96, "stride_px": 64}  # of a native side of 64, as 336 and 224 of 224


def sam_config(**fields) -> SamVisionConfig:
    small = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 3, "mlp_dim": 32, "output_channels": 8}
    own = {"image_size": SAM_PX, "patch_size": 16, "window_size": 3, "global_attn_indexes": [1], "num_pos_feats": 4}
    return SamVisionConfig(**{**small, **own, **fields})


def sam(**fields) -> SamVisionModel:
    return spread(SamVisionModel(sam_config(**fields)))


def sam_last(network: SamVisionModel, seen: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Attention (H, n, n, n, n) and values (H, n, n, d) of the last block, from transformers' eager class."""
    eager = SamVisionModel._from_config(network.config, attn_implementation="eager").eval()
    eager.load_state_dict(network.state_dict())
    kept = []
    attention = eager.vision_encoder.layers[-1].attn
    attention.register_forward_hook(lambda module, args, out: kept.append(out[1]))
    attention.qkv.register_forward_hook(lambda module, args, out: kept.append(out))
    eager(seen)
    qkv, maps = kept
    side, heads = qkv.shape[1], network.config.num_attention_heads
    values = qkv[0, ..., 2 * qkv.shape[-1] // 3 :].unflatten(-1, (heads, -1)).permute(2, 0, 1, 3)
    return maps.view(heads, side, side, side, side).double().numpy(), values.double().numpy()


def plain_trident(net, second, sam_network, image, config, window, stride, settings) -> np.ndarray:
    """(h, w, D) of one image (1, 3, H, W)."""
    patch, dino_patch = net.patch_px, second.config.patch_size
    height, width = image.shape[2:]
    pixels = image[0].double().numpy()
    if height % patch or width % patch:
        longer = max(height, width)
        wanted = -(-longer // patch) * patch
        size = [max(-(-int(s * wanted / longer) // patch) * patch, window) for s in (height, width)]
        pixels = bilinear(pixels, tuple(size))
    height, width = pixels.shape[1:]
    side_hw = (min(window, height), min(window, width))
    pad = [-s % 56 if s < window else 0 for s in side_hw]
    top, left = pad[0] // 2, pad[1] // 2
    places = [(y, x) for y in starts(height, window, stride) for x in starts(width, window, stride)]
    crops = [pixels[:, y : y + side_hw[0], x : x + side_hw[1]] for y, x in places]
    crops = [np.pad(c, ((0, 0), (top, pad[0] - top), (left, pad[1] - left))) for c in crops]
    seen = imagenet(torch.from_numpy(np.stack(crops)).float(), config)
    grid = (seen.shape[2] // dino_patch, seen.shape[3] // dino_patch)
    seen = seen[:, :, : grid[0] * dino_patch, : grid[1] * dino_patch]
    features = dino(second, seen)[:, 1:].unflatten(1, grid).double().numpy()
    vectors = [unit(f.reshape(-1, f.shape[-1])) for f in features]
    mean = np.mean([(v @ v.T).mean() for v in vectors])

    clip_grid = (crops[0].shape[1] // patch, crops[0].shape[2] // patch)
    ratio = round(grid[0] / clip_grid[0])
    cells = (side_hw[0] // patch * ratio, side_hw[1] // patch * ratio)
    canvas = np.zeros(
        (net.weights["visual_projection.weight"].shape[1], height // patch * ratio, width // patch * ratio)
    )
    count = np.zeros(canvas.shape[1:])
    for (y, x), crop, f in zip(places, crops, features, strict=True):
        y, x = y // patch * ratio, x // patch * ratio
        part = proxy_map(net, crop, f, mean).T.reshape(-1, *grid)
        part = bilinear(part, (clip_grid[0] * ratio, clip_grid[1] * ratio))
        cell = patch / ratio
        down = line_weights(part.shape[1], cells[0], 1.0, top / cell)
        across = line_weights(part.shape[2], cells[1], 1.0, left / cell)
        canvas[:, y : y + cells[0], x : x + cells[1]] += np.einsum("yv,cvu,xu->cyx", down, part, across)
        count[y : y + cells[0], x : x + cells[1]] += 1
    canvas /= count

    whole = [-(-s // patch) * patch for s in image.shape[2:]]
    whole = torch.from_numpy(bilinear(image[0].double().numpy(), tuple(whole))).float()[None]
    parts = []
    half, cells = whole.shape[3] // settings.columns, canvas.shape[2] // settings.columns
    pieces = [(whole, canvas)]
    if settings.columns == 2:
        pieces = [(whole[..., :half], canvas[..., :cells]), (whole[..., half:], canvas[..., cells:])]
    for piece, part in pieces:
        scale = SAM_PX / max(piece.shape[2:])
        resized = [int(s * scale + 0.5) for s in piece.shape[2:]]
        small = torch.nn.functional.interpolate(piece, size=resized, mode="bilinear", antialias=True)
        small = imagenet(small, config)
        small = torch.nn.functional.pad(small, (0, SAM_PX - resized[1], 0, SAM_PX - resized[0]))
        attention, values = sam_last(sam_network, small)
        h, w = resized[0] // 16, resized[1] // 16
        attention, values = attention[:, :h, :w, :h, :w], values[:, :h, :w]
        mixed = sam_average(part, attention, values, settings.reach, settings.negative_threshold)
        parts.append(net.project(mixed).reshape(h, w, -1))
    return np.concatenate(parts, axis=1)


@pytest.mark.parametrize(
    ("size", "patch_px", "settings"),
    [
        ((64, 64), 16, {}),  # smaller than a window
        ((112, 128), 16, {}),
        ((144, 96), 8, {}),
        ((90, 75), 16, {}),  # off the grid
        ((96, 160), 14, {"negative_threshold": 0.6, "reach": 3.0}),
        ((96, 176), 16, {"columns": 2, "reach": 0.0}),
        ((48, 160), 8, {}),
    ],
)
@torch.no_grad()
def test_equals_its_plain_formulation(size, patch_px, settings, make_clip, make_vision, pixels):
    settings = Settings(**settings)
    images, second, network = pixels(size, batch=2), vit(patch_px), sam()
    networks = {"dino": second, "sam": network}
    vision = make_vision(num_hidden_layers=2, position_interpolation="offset", **WINDOW)
    encoder = Encoder(vision, networks, settings)
    output = encoder(images)
    net = PlainClip(make_clip(num_hidden_layers=2))
    expected = plain_trident(net, second, network, images[1:], encoder.config, 96, 64, settings)
    np.testing.assert_allclose(output.patch_embeds[1].numpy(), expected, atol=2e-5)
    torch.testing.assert_close(encoder(images[:1]).patch_embeds, output.patch_embeds[:1], atol=2e-5, rtol=0)
    assert output.extent_hw == output.image_hw == size


@torch.no_grad()
def test_the_row_builds_it_with_its_window(make_vision, pixels, tmp_path):
    sam().save_pretrained(tmp_path / "sam")
    vit(16).save_pretrained(tmp_path / "dino")
    vision = make_vision(num_hidden_layers=2, **WINDOW)
    by_folder = Encoder(vision, {name: str(tmp_path / name) for name in ("dino", "sam")})
    by_module = Encoder(vision, {"dino": by_folder.dino, "sam": Sam(by_folder.sam.network)})
    assert by_module.dino is by_folder.dino
    torch.testing.assert_close(by_folder(pixels("larger")).patch_embeds, by_module(pixels("larger")).patch_embeds)
    assert METHODS["trident"].needs == {"dino": "facebook/dino-vitb16", "sam": "facebook/sam-vit-base"}
    assert METHODS["trident"].window_for(224, 16) == (336, 224)
    built = build_encoder(make_vision(num_hidden_layers=2), "trident", networks={"dino": vit(16), "sam": sam()})
    assert (built.window_px, built.stride_px) == (96, 64)
    assert "window 96/64 px, stride_px=0" in repr(built)
    assert "reach=1.2" in repr(by_folder) and "sharpness=3.0" in repr(by_folder)


@torch.no_grad()
def test_rows_of_attention_are_the_whole_map(make_vision, pixels, monkeypatch):
    for fields in ({}, {"use_rel_pos": False}):
        network, config = sam(**fields), make_vision(num_hidden_layers=2).config
        adapter = Sam(network)
        for image in (pixels((128, 128)), pixels((60, 128)), pixels((200, 100))):
            found = adapter.last_attention(image, config)[0]
            attention, values = sam_last(network, adapter.prepare(image, config)[0])
            h, w = found.valid_hw
            count = h * w
            expected = attention[:, :h, :w, :h, :w].reshape(3, count, count)
            np.testing.assert_allclose(found.rows(0, count).numpy(), expected, atol=1e-6)
            np.testing.assert_allclose(found.rows(3, 7).numpy(), expected[:, 3:7], atol=1e-6)
            np.testing.assert_allclose(found.valid_values.numpy(), values[:, :h, :w].reshape(3, count, -1), atol=1e-6)
    vision, images = make_vision(num_hidden_layers=2, **WINDOW), pixels((112, 128))
    encoder = Encoder(vision, {"dino": vit(16), "sam": network})
    whole = encoder(images).patch_embeds
    monkeypatch.setattr("spar_hf.methods.trident.ROW_NUMBERS", 500)
    torch.testing.assert_close(encoder(images).patch_embeds, whole, atol=2e-5, rtol=0)
    one = dataclasses.replace(encoder.settings, window_batch=1)
    torch.testing.assert_close(
        Encoder(vision, {"dino": encoder.dino, "sam": network}, one)(images).patch_embeds, whole, atol=2e-5, rtol=0
    )


@torch.no_grad()
def test_wrong_networks_are_told_apart(make_vision, pixels):
    vision = make_vision(num_hidden_layers=2, **WINDOW)
    with pytest.raises(ValueError, match=r"'trident' needs a network 'sam' and got dino; give --network sam=ID"):
        Encoder(vision, {"dino": vit(16)})
    with pytest.raises(ValueError, match="is a ViTModel; give a SAM or SAM 2"):
        Encoder(vision, {"dino": vit(16), "sam": vit(16)})
    windowed = Encoder(vision, {"dino": vit(16), "sam": sam(global_attn_indexes=[0])})
    with pytest.raises(ValueError, match="whose last block does not attend over the whole image"):
        windowed(pixels("native"))
    with pytest.raises(ValueError, match="stride_px of method 'trident' is 24; it must be a multiple of the patch"):
        Encoder(make_vision(num_hidden_layers=2), {"dino": vit(16), "sam": sam()})
    whole = SamConfig(vision_config=sam_config().to_dict())
    assert isinstance(Sam(SamModel(whole)).network, SamModel)
    with pytest.raises(ValueError, match=r"image is 64x1200 px .* of which SAM sees less than one patch"):
        Encoder(vision, {"dino": vit(16), "sam": sam()})(pixels((64, 1200)))
    with pytest.raises(ValueError, match=r"there is no network 'clip'; choose one of dino, sam"):
        build_encoder(vision, "trident", networks={"clip": vit(16)})
