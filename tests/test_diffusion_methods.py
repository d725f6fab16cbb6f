"""The methods around Stable Diffusion against plain formulations, on a small random pipeline with stored noise."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, maskclip, unit
from plain_crf import plain_crf
from plain_diffusion import PlainDiffusion, grid, minmax, sure_labels
from plain_vfm import bilinear
from scipy.linalg import eigh
from second_networks import diffusion_pipeline

from spar_hf import build_segmenter
from spar_hf.methods import diffcut, freeseg_diff, maskdiffusion
from spar_hf.networks.diffusion import Diffusion
from spar_hf.prompts_spar import Labels
from spar_hf.refinement.dense_crf import Settings as Field
from spar_hf.segmentation_spar import label_map

# Native, larger, oblong, and off the grids of CLIP and of the UNet.
SIZES = [*(pytest.param(size, marks=pytest.mark.slow) for size in [(64, 64), (112, 128), (64, 150)]), (90, 75)]
NAMES = ["dining table", "car", "automobile", "sky"]
LABELS = Labels((("dining table",), ("car", "automobile"), ("sky",)))
WITH_NOTHING = Labels((("wall", "floor"), ("dining table",), ("car", "automobile"), ("sky",)), background=0)
COLOURED = ("car", "house", "road", "tree", "sky")
SIDE = 64


@cache
def pipeline():
    return diffusion_pipeline()


@cache
def noise() -> torch.Tensor:
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))


@cache
def adapter() -> Diffusion:
    return Diffusion(pipeline(), noise())


@cache
def plain() -> PlainDiffusion:
    return PlainDiffusion(pipeline(), noise())


@pytest.fixture
def build(make_spar, spar_processor):
    """`build("iseg", rounds=2)`: a segmenter around the small pipeline."""

    def make(method, **settings):
        given = {"networks": {"diffusion": adapter()}, "settings": settings}
        return build_segmenter(make_spar(num_hidden_layers=2), spar_processor, method, **given)

    return make


def same(segmenter, images, encoded, maps, atol=1e-5):
    """One picture alone, in a batch and again: the same map, to the last bit for the same call."""
    (alone,) = segmenter(images[1:], encoded)
    count = len(encoded.labels.names)
    torch.testing.assert_close(alone(slice(0, count)), maps[1](slice(0, count)), atol=atol, rtol=0)
    (again,) = segmenter(images[1:], encoded)
    assert torch.equal(again(slice(0, count)), alone(slice(0, count)))
    torch.testing.assert_close(alone(slice(1, 3)), alone(slice(0, count))[1:3], atol=0, rtol=0)


def check_labels(maps, encoded, scores, ids, at_least=0.9):
    expected, sure = sure_labels(scores, ids)
    assert sure.mean() > at_least
    np.testing.assert_array_equal(label_map(maps, encoded.class_ids).numpy()[sure], expected[sure])


# ------------------------------------------------------------------------------------------ DiffSegmenter


def plain_diffsegmenter(image, names, config) -> list[np.ndarray]:
    """The completed map (s, s) of each name."""
    net, found = plain(), []
    latent = net.noised(net.square(image, config, SIDE), 100, sampled=True)
    for name in names:
        text = f"a photograph of {name}"
        states, nothing = net.words(text), net.words("")
        last = len(net.ids(text)) - 2  # the end token comes after
        word = len(net.ids(name.split()[-1])) - 2
        for place in range(last - word + 1, last + 1):
            states[0, place] = nothing[0, place] + 1.21 * (states[0, place] - nothing[0, place])
        kept = net.run(latent, 100, states)
        seed = np.zeros((16, 16))
        for side, weight in {2: 0.3, 4: 0.5, 8: 0.1, 16: 0.1}.items():
            heads = [p for n, o in kept.items() if n.endswith("attn2") and len(o["q"]) == side**2 for p in o["probs"]]
            assert len(heads) == 3 * (1 if side == 2 else 5)
            seed += weight * minmax(bilinear(grid(np.mean(heads, axis=0)[:, last]), (16, 16)))
        own = [p for n, o in kept.items() if n.endswith("attn1") and len(o["q"]) == 256 for p in o["probs"]]
        found.append(grid(np.mean(own, axis=0) @ seed.ravel()))
    return found


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_diffsegmenter_equals_its_plain_formulation(size, build, pixels):
    """METHODS row "diffsegmenter"."""
    segmenter, images = build("diffsegmenter"), pixels(size, batch=2)
    expected = plain_diffsegmenter(images[1].numpy(), NAMES, segmenter.config)
    np.testing.assert_allclose(segmenter.maps(images[1:], NAMES), np.stack(expected), atol=1e-5)
    encoded = segmenter.encode_labels(LABELS)
    maps = segmenter(images, encoded)
    full = [minmax(bilinear(one, size)) for one in expected]
    np.testing.assert_allclose(maps[1](slice(0, 4)), np.stack(full), atol=1e-4)  # the range of a map is small
    check_labels(maps[1], encoded, full, [0, 1, 1, 2])
    same(segmenter, images, encoded, maps)
    encoded = segmenter.encode_labels(WITH_NOTHING)
    (maps,) = segmenter(images[1:], encoded)
    check_labels(maps, encoded, [np.full(size, 0.45), *full], [0, 1, 2, 2, 3])
    larger = (size[0] * 3 // 2, size[1] * 2)
    check_labels(maps.at(larger), encoded, [np.full(larger, 0.45), *(minmax(bilinear(o, larger)) for o in expected)],
                 [0, 1, 2, 2, 3])  # fmt: skip


# --------------------------------------------------------------------------------------------------- iSeg

HEADS = {4: (1, 4, 12), 8: (0, 5)}
ISEG = {"heads_quarter": HEADS[4], "heads_half": HEADS[8], "ending": "and other object", "rounds": 3}
CROSS = {
    4: ["down_blocks.2.attentions.0", "down_blocks.2.attentions.1", "up_blocks.1.attentions.0",
        "up_blocks.1.attentions.1", "up_blocks.1.attentions.2"],
    8: ["down_blocks.1.attentions.1", "up_blocks.2.attentions.0", "up_blocks.2.attentions.1"],
}  # fmt: skip


def plain_iseg(image, names, config, heads, tokens="last", prompts=None) -> np.ndarray:
    """(K, s, s)."""
    net = plain()
    latent = net.noised(net.square(image, config, SIDE), 100)
    found = []
    for some in prompts or [names]:
        text = f"a photograph of {' and '.join(some)} and other object"
        states = net.words(text)
        places = []
        for number, name in enumerate(some):
            before = f"a photograph of {' and '.join([*some[:number], ''])}".strip()
            start = len(net.ids(before)) - 1
            length = len(net.ids(name)) - 2
            first = 0 if tokens == "all" else length - (len(net.ids(name.split()[-1])) - 2)
            places.append(list(range(start + first, start + length)))
        for place in [token for own in places for token in own]:
            states[0, place] *= 1.6
        kept = net.run(latent, 100, states)
        cross = 0
        for side, weight in {4: 0.7, 8: 0.3}.items():
            probs = [p for name in CROSS[side] for p in kept[f"{name}.transformer_blocks.0.attn2"]["probs"]]
            mean = np.mean([probs[h] for h in heads[side] or range(len(probs))], axis=0)  # (N, L)
            cross = cross + weight * np.stack([bilinear(m / m.sum(), (16, 16)) for m in grid(mean)])
        rows = cross.reshape(77, 256).T
        values = np.where(rows == 0, 1e-6, rows)
        every = range(0, 16, int(16 // 32**0.5))
        centres = [values[y * 16 + x] for y in every for x in every]
        for _ in range(20):
            apart = [
                (((values + 1e-5) - (c + 1e-5)) * (np.log(values + 1e-5) - np.log(c + 1e-5))).sum(axis=1) / 2
                for c in centres
            ]
            place = np.argmin(apart, axis=0)
            centres = [values[place == number].mean(axis=0) for number in np.unique(place)]
        rows = np.stack([rows[place == number].mean(axis=0) for number in place])
        y = np.stack([rows[:, own].mean(axis=1) for own in places], axis=1)
        a = kept["up_blocks.3.attentions.1.transformer_blocks.0.attn1"]["probs"][1:3].mean(axis=0)
        a = a / a.max(axis=0, keepdims=True)
        a = np.maximum(np.where(a == 0, 0, a + 0.015 * np.log10(np.e * np.where(a == 0, 1, a))), 0)
        a = a / a.sum(axis=1, keepdims=True)
        for turn in range(4):
            y = a @ y if turn else y
            y = y - y.min(axis=0)
            y = y / y.sum(axis=0)
        found += list(grid(y))
    return np.stack(found)


def iseg_maps(maps, size) -> list[np.ndarray]:
    return [minmax(bilinear(minmax(bilinear(one, (SIDE, SIDE))), size), 1e-6) for one in maps]


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_iseg_equals_its_plain_formulation(size, build, pixels):
    """METHODS row "iseg"."""
    segmenter, images = build("iseg", **ISEG), pixels(size, batch=2)
    expected = plain_iseg(images[1].numpy(), NAMES, segmenter.config, HEADS)
    found = segmenter.maps(images[1:], NAMES).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5)
    full = iseg_maps(expected, size)
    encoded = segmenter.encode_labels(WITH_NOTHING)
    maps = segmenter(images, encoded)
    np.testing.assert_allclose(maps[1](slice(2, 6)), np.stack(full), atol=2e-4)
    nothing = (1 - np.max(full, axis=0)) ** 2
    np.testing.assert_allclose(maps[1](slice(0, 1))[0], nothing, atol=2e-4)
    check_labels(maps[1], encoded, [nothing, *full], [0, 1, 2, 2, 3], at_least=0.8)
    same(segmenter, images, encoded, maps)
    segmenter = build("iseg", **ISEG, nothing=0.45)
    (maps,) = segmenter(images[1:], encoded)
    cut = [np.where(one < 0.45, 0, one) for one in full]
    check_labels(maps, encoded, [np.where(np.max(cut, axis=0) == 0, 1, -1), *cut], [0, 1, 2, 2, 3], at_least=0.8)


@pytest.mark.slow
@torch.no_grad()
def test_iseg_takes_all_heads_and_tokens_and_several_prompts(build, pixels):
    images, all_heads = pixels((90, 75)), {"heads_quarter": (), "heads_half": ()}
    segmenter = build("iseg", **{**ISEG, **all_heads}, tokens="all")
    expected = plain_iseg(images[0].numpy(), NAMES, segmenter.config, {4: (), 8: ()}, tokens="all")
    np.testing.assert_allclose(segmenter.maps(images, NAMES), expected, atol=1e-5)
    many = [f"{a} checked {b} automobile" for a in ("red", "blue", "pink", "green") for b in COLOURED]
    groups = adapter().groups(many, "a photograph of", "and", "and other object")
    assert len(groups) > 1
    prompts = [[many[number] for number in group] for group in groups]
    expected = plain_iseg(images[0].numpy(), many, segmenter.config, HEADS, prompts=prompts)
    np.testing.assert_allclose(build("iseg", **ISEG).maps(images, many), expected, atol=1e-5)


def test_iseg_says_what_is_wrong_with_its_settings(build, pixels):
    with pytest.raises(ValueError, match=r"names head 96 and these layers have 15; .*--set heads_quarter="):
        segmenter = build("iseg", ending="and other object")
        segmenter(pixels((64, 64)), segmenter.encode_labels(LABELS))
    with pytest.raises(ValueError, match=r"own_heads are \(1, 9\) and the layer has heads 0 to 2"):
        segmenter = build("iseg", **ISEG, own_heads=(1, 9))
        segmenter(pixels((64, 64)), segmenter.encode_labels(LABELS))
    with pytest.raises(ValueError, match="tokens is 'some'"):
        build("iseg", tokens="some")


# ------------------------------------------------------------------------------------------ MaskDiffusion


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_maskdiffusion_equals_its_plain_formulation(size, build, pixels, monkeypatch):
    """METHODS row "maskdiffusion"."""
    monkeypatch.setattr(maskdiffusion, "BAND_NUMBERS", 20_000)
    segmenter, images = build("maskdiffusion", rows=40, columns=52), pixels(size, batch=2)
    net, encoded = plain(), segmenter.encode_labels(LABELS)
    square = net.square(images[1].numpy(), segmenter.config, SIDE)
    latent = net.pipe.vae.encode(2 * square - 1).latent_dist.mean * net.pipe.vae.config.scaling_factor
    text = " and ".join(NAMES)
    kept = net.run(latent, 0, net.words(text))
    layers = [o for n, o in kept.items() if n.endswith("attn2") and len(o["q"]) in (16, 4)]
    assert len(layers) == 6
    raw = [np.stack([bilinear(m, (8, 8)) for m in grid(np.exp(h))]) for o in layers for h in o["raw"]]
    mean, place, masks = np.mean(raw, axis=0), 1, []
    for name in NAMES:
        length = len(net.ids(name)) - 2
        masks.append(bilinear(mean[place : place + length].mean(axis=0), (40, 52)))
        place += length + len(net.ids("and")) - 2
    features: list[np.ndarray] = []
    hooks = [
        net.pipe.unet.up_blocks[block]
        .resnets[2]
        .register_forward_pre_hook(lambda module, args: features.append(args[0][0].double().numpy()))
        for block in range(3)
    ]
    net.run(latent, 0, net.words(""))
    for hook in hooks:
        hook.remove()
    f = np.concatenate([bilinear(part, (40, 52)) for part in features])
    f = f / np.linalg.norm(f, axis=0)
    vectors = [(f * m).sum(axis=(1, 2)) / m.sum() for m in masks]
    expected = np.stack([np.einsum("c,chw->hw", v, f) for v in vectors])
    maps = segmenter(images, encoded)
    np.testing.assert_allclose(maps[1].grid, expected, atol=1e-5)
    full = [bilinear(one, size) for one in expected]
    check_labels(maps[1], encoded, full, [0, 1, 1, 2], at_least=0.5)
    same(segmenter, images, encoded, maps)


# ------------------------------------------------------------------------------------------------ DiffCut


def plain_cuts(affinity, tau, drop_zeros) -> list[np.ndarray]:
    """The released recursion over explored nodes, with masks of all nodes."""
    found: list[np.ndarray] = []

    def go(affinity, explored, level) -> None:
        affinity = affinity * (1 - np.outer(explored, explored))
        kept = [i for i in range(len(affinity)) if level == 0 or (affinity[i] != 0).all()]
        if not drop_zeros:
            kept = [i for i in range(len(affinity)) if not explored[i]]
        if len(kept) < 2:
            return
        a = affinity[np.ix_(kept, kept)]
        d = a.sum(axis=1)
        y = eigh(np.diag(d) - a, np.diag(d))[1][:, 1]
        y = y * np.sign(y[np.abs(y).argmax()])
        best, best_cost = None, np.inf
        for t in np.linspace(0.99 * y.min(), 0.99 * y.max(), 100):
            x = y > t
            r = d[x].sum() / d.sum()
            if r == 1:
                continue
            z = np.where(x, 2, -2 * r / (1 - r))
            cost = z @ (np.diag(d) - a) @ z / (z @ np.diag(d) @ z)
            if cost < best_cost:
                best, best_cost = x, cost
        if best_cost < tau:
            side = np.zeros(len(affinity))
            side[np.array(kept)[best]] = 1
            found.append(side)
            go(affinity, np.maximum(explored, 1 - side), level + 1)
            go(affinity, np.maximum(explored, side), level + 1)

    go(affinity, np.zeros(len(affinity)), 0)
    return found


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_diffcut_equals_its_plain_formulation(size, build, make_clip, pixels):
    """METHODS row "diffcut"."""
    drop = size != (90, 75)
    segmenter, images = build("diffcut", drop_zeros=drop, tau=0.8), pixels(size, batch=2)
    net, image = plain(), images[1].numpy()
    kept = net.run(net.noised(net.square(image, segmenter.config, SIDE), 50), 50, net.words(""))
    f = kept["down_blocks.2.attentions.1.transformer_blocks.0.attn1"]["out"]
    f = f / np.linalg.norm(f, axis=1, keepdims=True)
    np.testing.assert_allclose(segmenter.features(images[1:]).numpy(), grid(f), atol=1e-5)
    affinity = minmax(f @ f.T) ** 10
    cuts = plain_cuts(affinity, 0.8, drop)
    assert len(cuts) > 1
    total = np.zeros(16)
    for one in cuts:
        total += one * (total.max() + 1)
    ids = np.unique(total, return_inverse=True)[1]
    np.testing.assert_array_equal(segmenter.segments(segmenter.features(images[1:])).flatten(), ids)
    vectors = np.stack([f[ids == number].mean(axis=0) for number in range(ids.max() + 1)])
    products = np.stack([bilinear(grid(f @ vector), size) for vector in vectors])
    order = np.sort(products, axis=0)
    sure = order[-1] - order[-2] > 1e-4
    place = products.argmax(axis=0)
    clip = PlainClip(make_clip(num_hidden_layers=2))
    tokens, grid_hw = clip.embed(image.astype(float), "offset")
    patches = clip.project(maskclip(clip, clip.inputs(tokens), grid_hw))[1:].T.reshape(-1, *grid_hw)
    encoded = segmenter.encode_labels(LABELS)
    text = encoded.text_embeds.double().numpy()
    maps = segmenter(images, encoded)
    found = maps[1](slice(0, 4)).numpy()
    if size[0] % 16 == size[1] % 16 == 0:
        at_pixels = bilinear(patches, size)
        for number in np.unique(place):
            own = unit(at_pixels[:, place == number].mean(axis=1))
            np.testing.assert_allclose(found[:, sure & (place == number)].mean(axis=1), text @ own, atol=2e-3)
    # Pixels of one segment have one name.
    for number in np.unique(place[sure]):
        assert (np.ptp(found[:, sure & (place == number)], axis=1) < 1e-6).all()
    same(segmenter, images, encoded, maps)


def test_cuts_of_a_graph_of_three_blocks():
    """Two clear blocks and one less so; the least pair is dropped below the first cut."""
    generator = torch.Generator().manual_seed(0)
    own = torch.tensor([0] * 5 + [1] * 6 + [2] * 4)
    affinity = torch.where(own[:, None] == own, 0.9, 0.05) + 0.02 * torch.rand(15, 15, generator=generator)
    affinity = (affinity + affinity.T) / 2
    affinity.fill_diagonal_(1)
    affinity = (affinity - affinity.min()) / (affinity.max() - affinity.min())
    for drop in (False, True):
        cuts = diffcut.cut(affinity, 0.5, 100, drop)
        expected = plain_cuts(affinity.double().numpy(), 0.5, drop)
        assert len(cuts) == len(expected) == 2
        for one, two in zip(cuts, expected, strict=True):
            np.testing.assert_array_equal(one.numpy(), two.astype(bool))
        ids = diffcut.numbered(cuts, 15)
        if not drop:
            assert len({(int(a), int(b)) for a, b in zip(ids, own, strict=True)}) == 3 == len(set(ids.tolist()))
    assert diffcut.numbered([], 4).tolist() == [0] * 4


# ------------------------------------------------------------------------------------------- FreeSeg-Diff


def plain_kmeans(rows, clusters, seed) -> np.ndarray:
    draws = torch.rand(clusters, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).numpy()
    centres = [rows[int(draws[0] * len(rows))]]
    for draw in draws[1:]:
        nearest = np.cumsum([min(((row - c) ** 2).sum() for c in centres) for row in rows])
        centres.append(rows[np.searchsorted(nearest, draw * nearest[-1], side="right")])
    before = None
    while True:
        place = np.array([np.argmin([((row - c) ** 2).sum() for c in centres]) for row in rows])
        if before is not None and (place == before).all():
            return np.unique(place, return_inverse=True)[1]
        before = place
        centres = [rows[place == number].mean(axis=0) for number in np.unique(place)]


@pytest.mark.parametrize("size", SIZES)
@torch.no_grad()
def test_freeseg_diff_equals_its_plain_formulation(size, build, make_clip, pixels):
    """METHODS row "freeseg_diff"."""
    # The field has a test of its own.
    segmenter, images = build("freeseg_diff", clusters=3, crf=Field(steps=0)), pixels(size, batch=2)
    images = torch.nn.functional.avg_pool2d(images, 9, 1, 4)
    net, image, config = plain(), images[1].double().numpy(), segmenter.config
    kept = net.run(net.noised(net.square(image, config, SIDE, "antialias"), 0, sampled=True), 0, net.words(""))
    queries = [o["q"] for n, o in kept.items() if n.endswith("attn2") and len(o["q"]) == 16]
    assert len(queries) == 5
    maps = np.concatenate([bilinear(grid(q), (8, 8)) for q in queries])
    np.testing.assert_allclose(segmenter.queries(images[1:]).numpy(), maps, atol=1e-4)
    clusters = plain_kmeans(maps.reshape(len(maps), -1).T, 3, 0)
    np.testing.assert_array_equal(freeseg_diff.kmeans(torch.from_numpy(maps).flatten(1).T, 3, 0).numpy(), clusters)
    ids = clusters.reshape(8, 8)[np.arange(size[0]) * 8 // size[0]][:, np.arange(size[1]) * 8 // size[1]]
    encoded = segmenter.encode_labels(LABELS)
    text = encoded.text_embeds.double().numpy()
    plain_clip, clip = PlainClip(make_clip(num_hidden_layers=2)), make_clip(num_hidden_layers=2)
    std, mean = (np.array(v)[:, None, None] for v in (config.image_std, config.image_mean))
    colours = np.clip(image * std + mean, 0, 1)
    probabilities = []
    for number in range(ids.max() + 1):
        seen = torch.from_numpy(colours * (ids == number)).float()[None]
        tall, wide = (max(64 * n // min(size), 64) for n in size)
        seen = torch.nn.functional.interpolate(seen, (tall, wide), mode="bicubic", antialias=True)[0].double().numpy()
        top, left = (tall - 64) // 2, (wide - 64) // 2
        seen = (np.clip(seen[:, top : top + 64, left : left + 64], 0, 1) - mean) / std
        whole = unit(plain_clip.project(plain_clip.inputs(plain_clip.embed(seen, "offset")[0])[-1])[0])
        logits = float(clip.logit_scale.exp()) * whole @ text.T
        probabilities.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
    p = np.array(probabilities)
    own = segmenter.probabilities(images[1:], torch.from_numpy(ids), encoded.text_embeds).numpy()
    np.testing.assert_allclose(own, p, atol=1e-4)
    best = np.where(p == p.max(axis=0), p, 0)
    found = np.full(size, -1)
    for number, row in enumerate(best):
        if row.max() > 0:
            found = np.where((found < 0) & (ids == number), row.argmax(), found)
    maps = segmenter(images, encoded)
    labels = label_map(maps[1], encoded.class_ids).numpy()
    named = found >= 0
    assert named.mean() > 0.3
    np.testing.assert_array_equal(labels[named], np.array([0, 1, 1, 2])[found[named]])
    same(segmenter, images, encoded, maps)


@torch.no_grad()
def test_freeseg_diff_draws_masks_anew(build):
    field = Field(steps=2, near_weight=1.0, near_px=3.0, alike_weight=4.0, alike_px=6.0, alike_colour=60.0)
    segmenter, generator = build("freeseg_diff", crf=field), torch.Generator().manual_seed(0)
    colours = torch.zeros(14, 17, 3, dtype=torch.uint8)
    colours[:, 8:] = 200
    mask = (torch.rand(14, 17, generator=generator) < 0.15) ^ (torch.arange(17) < 8)
    inside = np.where(mask, 0.9, 0.1)
    shares = plain_crf(np.stack([1 - inside, inside]), colours.numpy().astype(float), field)
    found = segmenter.field(mask, colours).numpy()
    sure = np.abs(shares[1] - shares[0]) > 1e-3
    np.testing.assert_array_equal(found[sure], (shares[1] > shares[0])[sure])
    assert (found != mask.numpy()).any() and sure.mean() > 0.9
    assert segmenter.field(torch.ones(3, 4, dtype=torch.bool), colours[:3, :4]).all()


def test_each_name_stays_with_one_cluster():
    p = torch.tensor([[0.6, 0.1, 0.3], [0.5, 0.2, 0.3], [0.2, 0.1, 0.7]])
    assert freeseg_diff.names_of(p) == [0, 1, 2]
    assert freeseg_diff.names_of(torch.tensor([[0.6, 0.4], [0.5, 0.5], [0.1, 0.3]])) == [0, 1, -1]
    with pytest.raises(ValueError, match="clusters is 9; it must be from 1 to 4"):
        freeseg_diff.kmeans(torch.rand(4, 2), 9, 0)


# ------------------------------------------------------------------------------------------------- CLIPer


@pytest.mark.parametrize("size", [(64, 64), *SIZES[1:3], pytest.param((90, 75), marks=pytest.mark.slow)])
@pytest.mark.parametrize("heads", ["all", "mean", "4"])
@torch.no_grad()
def test_cliper_sd_equals_its_plain_formulation(size, heads, build, pixels):
    """METHODS row "cliper_sd"; `cliper_labels` has its own test."""
    chosen = {"background": ("sea",), "cut": 0.5, "nothing": 0.3, "presence": 0.0}
    images, labels, net = pixels(size, batch=2), WITH_NOTHING, plain()
    config = build("cliper_sd", **chosen).config
    kept = net.run(net.noised(net.square(images[1].numpy(), config, SIDE, "nearest"), 101), 101, net.words(""))
    shares = []
    for block in (1, 0):
        for a in kept[f"up_blocks.3.attentions.{block}.transformer_blocks.0.attn1"]["probs"]:
            shares.append(a / (a.max(axis=0, keepdims=True) + 1e-5))
    near = np.sort([v for a in shares for v in a[(a > 0.79) & (a < 0.81)]])
    gap = np.diff(near).argmax()
    cut = float(near[gap] + near[gap + 1]) / 2  # no share lies at it
    weights = [np.where(a < cut, 0, a) for a in shares]
    weights = [a / (a.sum(axis=1, keepdims=True) + 1e-5) for a in weights]
    segmenter = build("cliper_sd", **chosen, heads=heads, attention_cut=cut)
    encoded = segmenter.encode_labels(labels)
    values, coverage_hw = segmenter.values(images[1:], encoded, [2, 3, 4, 5])
    covered = [round(side / share) for side, share in zip(size, coverage_hw, strict=True)]
    assert len(weights) == 6
    if heads == "all":
        product = np.eye(256)
        for a in weights:
            product = product @ a
    else:
        product = np.mean(weights, axis=0) if heads == "mean" else weights[4]
    found, highest, now = segmenter.refined(images[1:], values, coverage_hw)
    assert now == (1.0, 1.0)
    if covered == list(size):
        start = np.stack([bilinear(one, (16, 16)) for one in values.double().numpy()])
        expected = (product @ start.reshape(4, 256).T).T.reshape(4, 16, 16)
        np.testing.assert_allclose(found, expected, atol=1e-5)
        best = (expected.max(axis=(1, 2)) + values.amax((1, 2)).numpy()) / 2
        np.testing.assert_allclose(highest, best, atol=1e-5)
        full = []
        for one, score in zip(expected, best, strict=True):
            image = bilinear(one, size)
            image = image / (image.max() + 1e-5) * score
            full.append((image - image.min()) / (image.max() - image.min() + 1e-6))
        maps = segmenter(images, encoded)
        if heads != "all":  # six random heads leave maps without differences, which 0..1 makes of rounding
            check_labels(maps[1], encoded, [np.full(size, 0.3), *full], [0, 1, 2, 2, 3], at_least=0.8)
            same(segmenter, images, encoded, maps, atol=1e-3)
    else:  # CLIP's patches leave a rest of the picture out: the refined maps cover it all
        assert found.shape == (4, 16, 16) and np.isfinite(found.numpy()).all()


# ---------------------------------------------------------------------------------------------- all of them


@torch.no_grad()
def test_classes_that_clip_does_not_see_cost_no_pass_and_come_last(build, pixels):
    images, segmenter = pixels((64, 64)), build("diffsegmenter", presence=0.6)
    encoded = segmenter.encode_labels(LABELS)
    text = torch.nn.functional.normalize(encoded.text_embeds, dim=-1)
    cosines = text @ segmenter.encoder.image_embeds(images)[0]
    best = [float(cosines[0]), float(cosines[1:3].max()), float(cosines[3])]
    limit = min(best) + 0.6 * (max(best) - min(best))
    kept = [number for number, of in enumerate((0, 1, 1, 2)) if best[of] >= limit]
    assert 0 < len(kept) < 4 and segmenter.present(images, encoded, 0.6) == kept
    maps = segmenter(images, encoded)[0](slice(0, 4))
    gone = [number for number in range(4) if number not in kept]
    assert (maps[gone] == -1).all() and (maps[kept] >= 0).all()


@torch.no_grad()
def test_a_picture_goes_through_windows(make_spar, spar_processor, pixels):
    """The mean of what each window's own pass gives, pixel by pixel."""
    model, networks = make_spar(num_hidden_layers=2), {"diffusion": adapter()}
    plain_one = build_segmenter(model, spar_processor, "diffsegmenter", networks=networks)
    windows = build_segmenter(model, spar_processor, "diffsegmenter", networks=networks, window=64, stride_px=48)
    images = pixels((64, 112))
    encoded = windows.encode_labels(LABELS)
    total, count = torch.zeros(4, 64, 112), torch.zeros(112)
    for left in (0, 48):
        total[:, :, left : left + 64] += plain_one(images[..., left : left + 64], encoded)[0](slice(0, 4))
        count[left : left + 64] += 1
    torch.testing.assert_close(windows(images, encoded)[0](slice(0, 4)), total / count, atol=1e-5, rtol=0)


def test_a_name_that_fits_into_no_prompt_is_refused_before_any_pass(build):
    long = "q" + "z" * 90
    for method in ("diffsegmenter", "maskdiffusion"):
        with pytest.raises(ValueError, match=r"tokens and the diffusion model reads 77: .* Give a shorter one"):
            build(method).encode_labels(f"sky; {long}")
    with pytest.raises(ValueError, match=r"has no words for"):
        build("diffsegmenter").encode_labels("sky; <|endoftext|>")
