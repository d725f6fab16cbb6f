"""CorrCLIP against loops over regions, patches and windows in NumPy, float64; and the vote of regions."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, softmax, unit
from plain_vfm import bilinear, line_weights, starts
from second_networks import networks_for, sam2_model
from test_proxyclip import dino, imagenet, spread, vit
from test_textregion import Drawn, drawn

from spar_hf import METHODS, build_encoder, build_segmenter
from spar_hf.methods.corrclip import Encoder, Settings, spatial_blocks, united
from spar_hf.networks.masks import Regions, SamRegions, Superpixels
from spar_hf.refinement.mask_vote import Settings as VoteSettings
from spar_hf.refinement.mask_vote import mask_vote
from spar_hf.segmentation_spar import label_map


def first_pixels(ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    rows, columns = (np.arange(n) * side // n for n, side in zip(size, ids.shape, strict=True))
    return ids[rows][:, columns]


def one_id(ids: np.ndarray, vectors: np.ndarray, none: int, distance: float) -> np.ndarray:
    """Regions whose mean vectors are alike, and those alike to these, get one id."""
    numbers = [n for n in np.unique(ids) if n != none]
    if len(numbers) < 2:
        return ids
    means = unit(np.stack([vectors[ids == n].mean(axis=0) for n in numbers]))
    cosine, ids, waiting = means @ means.T, ids.copy(), set(range(len(numbers)))
    while waiting:
        group = [min(waiting)]
        for member in group:
            group += [j for j in waiting if j not in group and cosine.max() - cosine[member, j] <= distance]
        for member in group:
            ids[ids == numbers[member]] = numbers[group[0]]
            waiting.discard(member)
    return ids


def plain_vectors(second, pixels, config) -> tuple[np.ndarray, tuple[int, int]]:
    """q + k of a window's patches, of length one."""
    seen = imagenet(torch.from_numpy(pixels).float()[None], config)
    grid = tuple(side // second.config.patch_size for side in pixels.shape[1:])
    seen = seen[..., : grid[0] * second.config.patch_size, : grid[1] * second.config.patch_size]
    kept = []
    attention = second.layers[-1].attention
    hooks = [p.register_forward_hook(lambda m, a, out: kept.append(out)) for p in (attention.q_proj, attention.k_proj)]
    dino(second, seen)
    for hook in hooks:
        hook.remove()
    return unit((kept[0] + kept[1])[0, 1:].double().numpy()), grid


def plain_window(net, f, grid, pixels, ids, settings) -> np.ndarray:
    """(h, w, D) of one padded window (3, H, W) on the grid of f (h * w, F); `ids` (H, W)."""
    own = first_pixels(ids, grid)
    none = own.min() if settings.smallest_is_none else 0
    own = one_id(own, f.reshape(*grid, -1), none, settings.merge_distance)

    tokens, clip_grid = net.embed(pixels, "offset")
    inputs = net.inputs(tokens)
    last = net.num_layers - 1
    earlier = np.mean([inputs[b + 1] for b in spatial_blocks(net.num_layers)], axis=0)
    flat = own.reshape(-1)
    cosine = f @ f.T
    weights = np.zeros_like(cosine)
    for i in range(len(f)):
        ok = [
            j
            for j in range(len(f))
            if (flat[i] == flat[j] != none) or (none in (flat[i], flat[j]) and cosine[i, j] > cosine.mean())
        ]
        weights[i, ok] = softmax(settings.sharpness * cosine[i, ok])
    name = f"vision_model.encoder.layers.{last}.self_attn.out_proj"

    def mixed(x: np.ndarray) -> np.ndarray:
        values = np.concatenate(net.heads(last, x, "v"), axis=-1)[1:]
        values = bilinear(values.T.reshape(-1, *clip_grid), grid).reshape(values.shape[1], -1).T
        return net.norm("vision_model.post_layernorm", net.linear(name, weights @ values))

    small = first_pixels(own, clip_grid)
    semantic = {}
    for number in np.unique(small):
        sees = [0, *(1 + np.flatnonzero(small.reshape(-1) == number))]
        token = tokens[:1]
        for block in range(net.num_layers):
            heads = [
                softmax(q @ k[sees].T / np.sqrt(q.shape[1])) @ v[sees]
                for q, k, v in zip(
                    net.heads(block, token, "q"),
                    net.heads(block, inputs[block], "k"),
                    net.heads(block, inputs[block], "v"),
                    strict=True,
                )
            ]
            out = f"vision_model.encoder.layers.{block}.self_attn.out_proj"
            token = net.feed_forward(block, token + net.linear(out, np.concatenate(heads, axis=-1)))
        semantic[number] = net.norm("vision_model.post_layernorm", token)[0]
    places = first_pixels(small, grid).reshape(-1)
    total = mixed(inputs[-2]) + settings.spatial_weight * mixed(earlier)
    total = total + settings.semantic_weight * np.stack([semantic[number] for number in places])
    return net.linear("visual_projection", total).reshape(*grid, -1)


def dense_features(second, image, config) -> np.ndarray:
    """(F, H, W) of all pixels of an image (3, H, W), of length one."""
    patch = second.config.patch_size
    size = tuple(max(round(side / patch), 1) * patch for side in image.shape[1:])
    seen = imagenet(torch.from_numpy(bilinear(image, size)).float()[None], config)
    features = dino(second, seen)[0, 1:].double().numpy().T.reshape(-1, *(side // patch for side in size))
    return unit(bilinear(features, image.shape[1:]).transpose(1, 2, 0)).transpose(2, 0, 1)


def plain_corrclip(net, second, image, ids, config, settings, window, stride, dense=False) -> np.ndarray:
    """(h, w, D) of one image (3, H, W)."""
    sides, patch = image.shape[1:], net.patch_px // 2 if dense else second.config.patch_size
    everywhere = dense_features(second, image, config) if dense else None
    window_hw = [min(side, window) for side in sides]
    pads = [-side % 56 for side in window_hw]
    around = [(pad // 2, pad - pad // 2) for pad in pads]
    grid = [max(round(side / patch), 1) for side in sides]
    total, count = np.zeros((*grid, 24)), np.zeros((*grid, 1))
    for y in starts(sides[0], window, stride):
        for x in starts(sides[1], window, stride):
            part = (slice(y, y + window_hw[0]), slice(x, x + window_hw[1]))
            pixels = np.pad(image[(slice(None), *part)], [(0, 0), *around])
            own = np.pad(ids[part], around, constant_values=10000)
            if everywhere is None:
                f, cells = plain_vectors(second, pixels, config)
            else:
                f = np.pad(everywhere[(slice(None), *part)], [(0, 0), *around], mode="edge")
                cells = tuple(side // net.patch_px * 2 for side in pixels.shape[1:])
                f = unit(bilinear(f, cells).reshape(len(f), -1).T)
            features = plain_window(net, f, cells, pixels, own, settings)
            tables, inside = [], []
            for axis, start in enumerate((y, x)):
                cell = sides[axis] / grid[axis]
                there = [i for i in range(grid[axis]) if start <= (i + 0.5) * cell < start + window_hw[axis]]
                size = pads[axis] + window_hw[axis]
                step = features.shape[axis] / size  # patches to a pixel of the padded window
                origin = (there[0] * cell - start + around[axis][0]) * step
                tables.append(line_weights(features.shape[axis], len(there), cell * step, origin))
                inside.append(slice(there[0], there[-1] + 1))
            total[tuple(inside)] += np.einsum("yv,vud,xu->yxd", tables[0], features, tables[1], optimize=True)
            count[tuple(inside)] += 1
    return total / count


@pytest.mark.parametrize(
    ("size", "patch_px", "kind", "settings"),
    [
        ((64, 64), 8, "ids", {}),  # smaller than a window, and padded
        ((112, 128), 16, "hard", {}),
        ((48, 144), 8, "ids", {}),
        ((90, 75), 8, "hard", {"sharpness": 9.0}),  # off the grid
        ((112, 112), 8, "ids", {"window_px": 112, "semantic_weight": 2.0}),
        ((101, 131), 16, "ids", {"smallest_is_none": False, "merge_distance": 0.5}),
    ],
)
@torch.no_grad()
def test_equals_its_plain_formulation(size, patch_px, kind, settings, make_clip, make_vision, pixels):
    window_px = settings.pop("window_px", 96)
    settings = Settings(**settings)
    images, second, sources = pixels(size, batch=2), vit(patch_px), [drawn(kind, size), drawn(kind, size, seed=1)]
    vision = make_vision(
        num_hidden_layers=6, position_interpolation="offset", window_px=window_px, stride_px=min(32, window_px)
    )
    encoder = Encoder(vision, {"dino": second, "regions": Drawn(*sources)}, settings)
    output = encoder(images)
    net, ids = PlainClip(make_clip(num_hidden_layers=6)), sources[1].map.numpy()
    assert len(np.unique(ids)) > 3
    expected = plain_corrclip(
        net, second, images[1].double().numpy(), ids, encoder.config, settings, window_px, encoder.config.stride_px
    )
    np.testing.assert_allclose(output.patch_embeds[1].numpy(), expected, atol=2e-5)
    torch.testing.assert_close(encoder(images[:1]).patch_embeds, output.patch_embeds[:1], atol=2e-5, rtol=0)
    assert output.extent_hw == output.image_hw == size


@pytest.mark.parametrize(("size", "patch_px"), [((64, 64), 14), ((112, 128), 16), ((48, 144), 8), ((90, 75), 14)])
@torch.no_grad()
def test_v2_equals_its_plain_formulation(size, patch_px, make_clip, make_vision, pixels):
    images, second, sources = pixels(size, batch=2), vit(patch_px), [drawn("ids", size), drawn("ids", size, seed=1)]
    networks = {"dino": second, "regions": Drawn(*sources)}
    encoder = build_encoder(make_vision(num_hidden_layers=6), "corrclip_v2", networks=networks)
    output = encoder(images)
    assert encoder.settings.merge_distance < 0 and encoder.config.patch_size == 8
    net, ids = PlainClip(make_clip(num_hidden_layers=6)), sources[1].map.numpy()
    expected = plain_corrclip(
        net, second, images[1].double().numpy(), ids, encoder.config, encoder.settings, 96, 32, dense=True
    )
    np.testing.assert_allclose(output.patch_embeds[1].numpy(), expected, atol=2e-5)
    torch.testing.assert_close(encoder(images[:1]).patch_embeds, output.patch_embeds[:1], atol=2e-5, rtol=0)


@torch.no_grad()
def test_few_and_many_regions(make_clip, make_vision, pixels):
    """No region, one, one and the rest, and more than there are patches."""
    size, image, second = (64, 80), pixels((64, 80)), vit(8)
    vision = make_vision(num_hidden_layers=6, position_interpolation="offset", window_px=96, stride_px=32)
    net = PlainClip(make_clip(num_hidden_layers=6))
    half = torch.ones(size, dtype=torch.int64)
    half[:, :30] = 0
    many = torch.arange(32 * 40).reshape(32, 40).repeat_interleave(2, 0).repeat_interleave(2, 1)
    for regions in (
        Regions(drawn=torch.zeros(0, *size, dtype=torch.bool)),
        Regions(ids=torch.ones_like(half)),
        Regions(ids=half),
        Regions(ids=many),
    ):
        encoder = Encoder(vision, {"dino": second, "regions": Drawn(regions)})
        expected = plain_corrclip(
            net, second, image[0].double().numpy(), regions.map.numpy(), encoder.config, encoder.settings, 96, 32
        )
        np.testing.assert_allclose(encoder(image).patch_embeds[0].numpy(), expected, atol=2e-5)


def test_blocks_and_regions_that_are_one():
    ranges = {12: (5, 10), 24: (10, 22), 32: (2, 30), 6: (2, 4), 5: (2, 3), 4: (1, 2), 3: (0, 1), 2: (0, 1)}
    for num_blocks, bounds in ranges.items():
        assert spatial_blocks(num_blocks) == range(*bounds)
    angles = torch.tensor([0.0, 0.5, 1.0, 2.5])  # a chain of three and one apart
    vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
    ids = torch.tensor([[3, 5], [9, 20]])
    assert united(ids, vectors, 0, 0.2).tolist() == [[3, 3], [3, 20]]
    assert united(ids, vectors, 3, 0.2).tolist() == [[3, 5], [5, 20]]
    assert united(ids, vectors, 0, 0.05).tolist() == ids.tolist()


@torch.no_grad()
def test_the_row_builds_it_and_regions_are_drawn_once(make_spar, spar_processor, make_vision, pixels, monkeypatch):
    assert METHODS["corrclip"].window_for(224, 16) == (336, 112) and METHODS["corrclip"].kind == "feature"
    encoder = build_encoder(make_vision(num_hidden_layers=2), "corrclip", networks=networks_for("corrclip"))
    assert isinstance(encoder.regions, Superpixels) and "merge_distance=0.2" in repr(encoder)
    assert (encoder.config.window_px, encoder.config.stride_px, encoder.config.patch_size) == (96, 32, 8)

    model, network = make_spar(num_hidden_layers=2), spread(sam2_model())
    chosen = {"points_per_side": 2, "min_iou": -10.0, "min_stability": 0.0}
    chosen |= {f"mask-vote.{name}": value for name, value in chosen.items()}
    networks = {"dino": vit(8), "regions": network}
    segmenter = build_segmenter(
        model, spar_processor, "corrclip", networks=networks, settings=chosen, refine=["mask-vote"]
    )
    (vote,) = (part for part in segmenter.networks if isinstance(part, SamRegions))
    assert vote.sam is segmenter.segmenter.encoder.regions.sam
    drawings = []
    draw = SamRegions.drawn
    monkeypatch.setattr(SamRegions, "drawn", lambda *args: drawings.append(1) or draw(*args))
    encoded = segmenter.encode_labels("car; sky; grass")
    (maps,) = segmenter(pixels((64, 96)), encoded)
    labels = label_map(maps.at((80, 120)), torch.tensor(encoded.labels.class_ids))
    assert labels.shape == (80, 120) and len(drawings) == 1


def test_each_region_takes_its_commonest_class():
    ids = torch.tensor([[0, 0, 4, 4], [0, 0, 4, 4], [9, 9, 9, 7]])
    labels = torch.tensor([[2, 1, 1, 0], [0, 2, 1, 0], [-1, 2, 2, 5]], dtype=torch.int32)

    def vote(ids: torch.Tensor, **settings) -> list:
        image = SimpleNamespace(pixel_values=torch.zeros(1, 3, 3, 4), network=SimpleNamespace(config=None))
        chosen = {"maps": None, "class_ids": None, "regions": Drawn(Regions(ids=ids))}
        found = mask_vote(labels, image=image, settings=VoteSettings(**settings), **chosen)
        assert found.dtype == labels.dtype
        return found.tolist()

    assert vote(ids) == [[2, 1, 0, 0], [0, 2, 0, 0], [2, 2, 2, 5]]
    assert vote(ids + 3) == [[2, 1, 0, 0], [0, 2, 0, 0], [2, 2, 2, 5]]  # the smallest id is none
    assert vote(ids + 3, smallest_is_none=False) == [[2, 2, 0, 0], [2, 2, 0, 0], [2, 2, 2, 5]]
    assert vote(torch.zeros_like(ids)) == labels.tolist()
    twice = torch.where(ids == 9, 4, ids)
    assert vote(twice) == [[2, 1, 0, 0], [0, 2, 0, 0], [0, 0, 0, 5]]  # two of each of three classes


@torch.no_grad()
def test_regions_resized_twice_are_resized_once(pixels):
    regions = Regions(ids=torch.arange(90).view(9, 10))
    assert regions.at((3, 3)).at((9, 10)) is regions
    assert torch.equal(regions.at((3, 3)).at((18, 20)).ids, regions.at((18, 20)).ids)
    assert copy.copy(regions).to(torch.device("cpu")).at((3, 3)).original is not None
