"""PnP-OVSS against a plain formulation, and the BLIP it asks."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from second_networks import small

from spar_hf import build_segmenter
from spar_hf.methods.pnp_ovss import Settings
from spar_hf.networks.blip import Blip
from spar_hf.prompts_spar import Labels
from spar_hf.refinement import dense_crf

NAMES = ["road", "red car", "sky"]
# Word pieces by hand: the small tokenizer knows "road", and letters.
PIECES = [["road"], ["r", "##e", "##d", "c", "##a", "##r"], ["s", "##k", "##y"]]
SIDE, LAYER, HEAD = 96, 8, 9
DROPPED = 3  # of 36 patches: far fewer than have a value, so that no two that tie are chosen between
START = replace(Settings().crf, steps=0)  # what the field starts from


def plain_cam(network, tokens: torch.Tensor, pixels: torch.Tensor) -> tuple[np.ndarray, float]:
    """Attention times the positive gradient of the match, (L, patches), float64: BERT layer by layer."""
    state = network.state_dict()
    image = network.vision_model(pixel_values=pixels, interpolate_pos_encoding=True).last_hidden_state[0].detach()
    config = network.config.text_config
    heads, width = config.num_attention_heads, config.hidden_size // config.num_attention_heads

    def linear(name, x):
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name, x):
        x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + config.layer_norm_eps).sqrt()
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    def attend(name, x, y, leaf=False):
        out, maps = [], None
        q, k, v = (linear(f"{name}.self.{part}", z) for part, z in (("query", x), ("key", y), ("value", y)))
        for h in range(heads):
            some = slice(h * width, (h + 1) * width)
            weights = (q[:, some] @ k[:, some].T / math.sqrt(width)).softmax(-1)
            if leaf and h == HEAD:
                weights = maps = weights.detach().requires_grad_()
            out.append(weights @ v[:, some])
        return norm(f"{name}.output.LayerNorm", linear(f"{name}.output.dense", torch.cat(out, -1)) + x), maps

    word = "text_encoder.embeddings"
    x = (
        state[f"{word}.word_embeddings.weight"][tokens[0]]
        + state[f"{word}.position_embeddings.weight"][: tokens.shape[1]]
    )
    x, kept = norm(f"{word}.LayerNorm", x), None
    for number in range(config.num_hidden_layers):
        layer = f"text_encoder.encoder.layer.{number}"
        x, _ = attend(f"{layer}.attention", x, x)
        x, found = attend(f"{layer}.crossattention", x, image, leaf=number == LAYER - 1)
        kept = found if found is not None else kept
        inner = torch.nn.functional.gelu(linear(f"{layer}.intermediate.dense", x))
        x = norm(f"{layer}.output.LayerNorm", linear(f"{layer}.output.dense", inner) + x)
    match = linear("itm_head", x[0])[1]
    (gradient,) = torch.autograd.grad(match, kept)
    return (kept * gradient.clamp(min=0)).detach().numpy()[:, 1:], float(match.detach())


def plain_maps(blip: Blip, colours: np.ndarray, rounds: int = 4, dropped: int = DROPPED) -> np.ndarray:
    """(K, h, w), the sum of the rounds."""
    network = copy.deepcopy(blip.network).double()
    vocabulary = blip.tokenizer.get_vocab()
    words = [vocabulary[piece] for name in PIECES for piece in name]
    start = [network.config.text_config.vocab_size - 1, *(vocabulary[w] for w in ("a", "picture", "of"))]
    tokens = torch.tensor([[*start, *words, vocabulary["[SEP]"]]])
    pixels = np.asarray(Image.fromarray(colours).resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255.0
    pixels = (pixels - [0.48145466, 0.4578275, 0.40821073]) / [0.26862954, 0.26130258, 0.27577711]
    side, gone = SIDE // 16, []
    totals = np.zeros((len(NAMES), side, side))
    for number in range(rounds):
        for patch in gone:
            y, x = divmod(patch, side)
            pixels[16 * y : 16 * y + 16, 16 * x : 16 * x + 16] = 0
        cam, _ = plain_cam(network, tokens, torch.from_numpy(pixels).permute(2, 0, 1)[None])
        cam[:, gone] = 0
        place = 4
        for name, pieces in enumerate(PIECES):
            totals[name] += (1 + (number == 0)) * cam[place : place + len(pieces)].mean(0).reshape(side, side)
            place += len(pieces)
        gone += np.argsort(cam[4:-1].sum(0))[-dropped:].tolist()
    return totals


def plain_shares(maps: np.ndarray, size_hw: tuple[int, int], with_nothing: bool) -> np.ndarray:
    """What the DenseCRF starts from, (1 + K or K, H, W)."""
    height, width = size_hw
    large = []
    for one in maps:
        kept = one * ((one - one.min()) / (one.max() - one.min()) >= 0.15)
        lines = []
        for size, n in ((height, one.shape[0]), (width, one.shape[1])):  # corners on corners
            table = np.zeros((size, n))
            for i in range(size):
                at = i * (n - 1) / (size - 1)
                below = min(int(at), n - 2)
                table[i, below : below + 2] = 1 - (at - below), at - below
            lines.append(table)
        large.append(lines[0] @ kept @ lines[1].T)
    if with_nothing:
        large.insert(0, (np.max(large, 0) == 0).astype(float))
    deviation = 0.05 * max(height, width)
    reach = int(4 * deviation + 0.5)
    bell = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    bell /= bell.sum()
    out = []
    for one in large:
        for axis in (0, 1):
            padding = [(reach, reach) if a == axis else (0, 0) for a in (0, 1)]
            padded = np.pad(one, padding, mode="symmetric")
            one = np.apply_along_axis(lambda line: np.convolve(line, bell, "valid"), axis, padded)
        span = one.max() - one.min()
        out.append((one - one.min()) / span if span > 0 else one * 0)
    powers = np.exp(np.stack(out))
    return powers / powers.sum(0)


@pytest.fixture
def spar(make_spar, spar_processor):
    return make_spar(num_hidden_layers=2), spar_processor


def images(size_hw, config, batch=1):
    """Colours (B, H, W, 3) in blocks, uint8, and their pixels normalised for CLIP."""
    noise = np.random.default_rng(size_hw[0] * 1000 + size_hw[1]).integers(0, 256, (batch, 8, 8, 3), dtype=np.uint8)
    colours = np.stack(
        [np.asarray(Image.fromarray(one).resize(size_hw[::-1], Image.Resampling.BICUBIC)) for one in noise]
    )
    pixels = (colours / 255.0 - config.image_mean) / config.image_std
    return colours, torch.from_numpy(pixels).float().permute(0, 3, 1, 2)


def build(spar, **settings):
    return build_segmenter(
        *spar, "pnp_ovss", networks={"blip": small("blip")}, settings={"side_px": SIDE, "dropped": DROPPED, **settings}
    )


@pytest.mark.parametrize("size", [(64, 64), (112, 128), (32, 128), (75, 90)])
def test_pnp_ovss_equals_its_plain_formulation(size, spar):
    segmenter = build(spar, crf=START)
    colours, pixels = images(size, segmenter.config, batch=2)
    encoded = segmenter.encode_labels([*NAMES])
    both, single = segmenter(pixels, encoded), segmenter(pixels[1:], encoded)
    every = slice(0, 3)
    torch.testing.assert_close(both[1](every), single[0](every), atol=2e-5, rtol=0)
    maps = plain_maps(small("blip"), colours[1])
    assert maps.max() > 1e-6  # of the size of the maps, not empty
    ours = segmenter.maps(colours[1], NAMES)
    np.testing.assert_allclose(ours.numpy() / maps.max(), maps / maps.max(), atol=2e-5)
    expected = plain_shares(maps, size, with_nothing=False)
    np.testing.assert_allclose(both[1](every).exp().numpy(), expected, atol=2e-5)
    torch.testing.assert_close(both[1](slice(1, 2)), both[1](every)[1:2])


def test_nothing_has_a_map_where_there_is_a_background_or_fewer_than_three_names(spar):
    size = (48, 64)
    segmenter = build(spar, crf=START)
    colours, pixels = images(size, segmenter.config)
    maps = plain_maps(small("blip"), colours[0])
    expected = plain_shares(maps, size, with_nothing=True)
    labels = Labels((("anything", "else"), *((name,) for name in NAMES)), background=0)
    with_background = segmenter.encode_labels(labels)
    found = segmenter(pixels, with_background)[0](slice(0, 5)).exp().numpy()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4)
    np.testing.assert_allclose(found[2:], expected[1:], atol=1e-4)
    assert found[1].max() < 1e-6  # a second name of the background is as empty as it was
    few = segmenter(pixels, segmenter.encode_labels(NAMES[:2]))[0](slice(0, 2)).exp().sum(0)
    torch.testing.assert_close(few, torch.ones(size), atol=1e-5, rtol=0)


def test_the_field_draws_what_the_maps_begin(spar):
    size = (40, 48)
    crf = dense_crf.Settings(2, 7.0, 3.0, 10.0, 20.0, 40.0)
    begun, drawn = (build(spar, crf=settings) for settings in (START, crf))
    colours, pixels = images(size, begun.config)
    encoded = begun.encode_labels(NAMES)
    shares = begun(pixels, encoded)[0](slice(0, 3)).exp()
    expected = dense_crf.dense_crf(shares, torch.from_numpy(colours[0]), crf)
    found = drawn(pixels, encoded)[0](slice(0, 3)).exp()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert (found - shares).abs().max() > 0.01


def test_dropped_patches_have_no_map_any_more(spar):
    colours, _ = images((64, 64), build(spar).config)
    once, twice = (build(spar, rounds=rounds).maps(colours[0], NAMES) for rounds in (1, 2))
    plain = plain_maps(small("blip"), colours[0], rounds=1)
    np.testing.assert_allclose(once / once.max(), plain / plain.max(), atol=2e-5)
    added = (twice - once).flatten(1)
    gone = np.argsort(sum(one * len(p) for one, p in zip(plain, PIECES, strict=True)).ravel())[-DROPPED:].copy()
    assert added[:, gone].abs().max() == 0 < added.abs().max()


def test_what_blip_must_be(spar, make_clip, tmp_path):
    with pytest.raises(ValueError, match=r"is a BlipForImageTextRetrieval with no tokenizer; give a Blip"):
        Blip(small("blip").network)
    with pytest.raises(ValueError, match=r"is a CLIPModel with no tokenizer; give a BlipForImageTextRetrieval"):
        build_segmenter(*spar, "pnp_ovss", networks={"blip": make_clip(num_hidden_layers=2)})
    with pytest.raises(ValueError, match=r"side_px 90, .* must be a multiple of BLIP's patch \(16 px\)"):
        build(spar, side_px=90)
    segmenter = build(spar, layer=12)
    _, pixels = images((48, 48), segmenter.config)
    with pytest.raises(ValueError, match=r"layer 12 and head 9 .* has layers 1 to 9 and heads 0 to 9\. Give others"):
        segmenter(pixels, segmenter.encode_labels(NAMES))
    with pytest.raises(ValueError, match=r"caption of 209 tokens and BLIP reads 64; give fewer names"):
        small("blip").caption("A picture of", ["abcd"] * 51)
    folder = tmp_path / "blip"
    small("blip").network.save_pretrained(folder)
    small("blip").tokenizer.save_pretrained(folder)
    loaded, colours = Blip(str(folder)), images((48, 48), segmenter.config)[0][0]
    again = build_segmenter(
        *spar, "pnp_ovss", networks={"blip": loaded}, settings={"side_px": SIDE, "dropped": DROPPED}
    )
    torch.testing.assert_close(again.maps(colours, NAMES), build(spar).maps(colours, NAMES))
