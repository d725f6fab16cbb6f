"""LPOSS and LPOSS+ against dense matrices in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, maskclip, unit
from plain_vfm import bilinear, starts
from test_proxyclip import dino, imagenet, vit

from spar_hf import build_segmenter
from spar_hf.methods import lposs, propagation
from spar_hf.prompts_spar import Labels
from spar_hf.segmentation_spar import label_map

LABELS = "car; grass, sea, sky; dog; house, tree"
DINO = {8: vit(8), 16: vit(16)}


def conjugate(matrix: np.ndarray, right: np.ndarray, steps: int = 10) -> np.ndarray:
    """Ten steps for one right side, as in any textbook."""
    x, r = np.zeros_like(right), right.copy()
    p, limit = r.copy(), 1e-6 * np.linalg.norm(right)
    for _ in range(steps):
        q = matrix @ p
        a = (r @ r) / (p @ q)
        x, new = x + a * p, r - a * q
        if np.linalg.norm(new) <= limit:
            return x
        p, r = new + (new @ new) / (r @ r) * p, new
    return x


def propagated(weights: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """(N, N) symmetric, (N, K) -> (N, K)."""
    weights = weights - np.diag(np.diag(weights))
    degree = weights.sum(axis=1)
    degree[degree == 0] = 1
    matrix = np.eye(len(weights)) - 0.95 * weights / np.sqrt(np.outer(degree, degree))
    return np.stack([conjugate(matrix, column) for column in scores.T], axis=1)


def black(pixels: np.ndarray, patch: int, config) -> np.ndarray:
    """(3, H, W) up to whole patches."""
    colour = -np.array(config.image_mean) / np.array(config.image_std)
    down, across = (-side % patch for side in pixels.shape[1:])
    return np.stack(
        [np.pad(p, ((0, down), (0, across)), constant_values=c) for p, c in zip(pixels, colour, strict=True)]
    )


# Windows of the native side, 64, and half of it, as 224 and 112 of 224.
def plain_lposs(net, second, image, text, config, neighbours=400) -> np.ndarray:
    """(K, H, W) at the pixels of one image (3, H, W)."""
    height, width = image.shape[1:]
    pixels, patch = image.double().numpy(), second.config.patch_size
    side = (min(height, 64), min(width, 64))
    places = [(y, x) for y in starts(height, 64, 32) for x in starts(width, 64, 32)]
    nodes, features, scores = [], [], []
    for y, x in places:
        window = pixels[:, y : y + side[0], x : x + side[1]]
        tokens, clip_grid = net.embed(black(window, net.patch_px, config), "size")
        clip = unit(net.project(maskclip(net, net.inputs(tokens), clip_grid)[1:]))
        seen = imagenet(torch.from_numpy(black(window, patch, config)).float()[None], config)
        kept = []
        hook = second.layers[-1].attention.v_proj.register_forward_hook(lambda m, a, out: kept.append(out))  # noqa: B023
        dino(second, seen)
        hook.remove()
        grid = (seen.shape[2] // patch, seen.shape[3] // patch)
        clip = bilinear(clip.T.reshape(-1, *clip_grid), grid).reshape(clip.shape[1], -1).T
        scores.append(unit(clip) @ text.T)
        features.append(unit(kept[0][0, 1:].double().numpy()))
        nodes += [
            (y + patch // 2 + patch * i, x + patch // 2 + patch * j) for i in range(grid[0]) for j in range(grid[1])
        ]
    v, where = np.concatenate(features), np.array(nodes, dtype=float)
    cosine = v @ v.T
    weights = np.zeros_like(cosine)
    for i, row in enumerate(cosine):
        for j in np.argsort(-row)[:neighbours]:
            weights[i, j] = max(row[j], 0) ** 3 * np.exp(-0.01 * np.linalg.norm(where[i] - where[j]))
    solved = propagated(weights + weights.T, np.concatenate(scores))
    total, count = np.zeros((len(text), height, width)), np.zeros((height, width))
    for (y, x), own in zip(places, np.split(solved, len(places)), strict=True):
        total[:, y : y + side[0], x : x + side[1]] += bilinear(own.T.reshape(-1, *grid), side)
        count[y : y + side[0], x : x + side[1]] += 1
    return total / count


def plain_plus(image: torch.Tensor, maps: np.ndarray, config) -> np.ndarray:
    """The pixel graph as a whole matrix, from scikit-image's idea of Lab."""
    from skimage.color import rgb2lab

    mean, std = (np.array(v)[:, None, None] for v in (config.image_mean, config.image_std))
    lab = rgb2lab((image.double().numpy() * std + mean).transpose(1, 2, 0)) / (100, 128, 128)
    height, width = maps.shape[1:]
    where = np.array([(y, x) for y in range(height) for x in range(width)])
    near = (np.abs(where[:, None] - where[None]) <= 6).all(axis=-1)
    colour = lab.reshape(-1, 3)
    weights = np.exp(-np.linalg.norm(colour[:, None] - colour[None], axis=-1) / 0.01) * near
    return propagated(weights, maps.reshape(len(maps), -1).T).T.reshape(maps.shape)


@pytest.fixture(scope="module")
def spar(make_spar, spar_processor):
    return make_spar(num_hidden_layers=2), spar_processor


@pytest.mark.parametrize(
    ("size", "patch_px", "neighbours"),
    [((64, 64), 16, 400), ((112, 128), 16, 40), ((64, 96), 8, 100), ((90, 75), 16, 30), ((48, 100), 8, 50)],
)
@torch.no_grad()
def test_lposs_equals_its_plain_formulation(size, patch_px, neighbours, spar, make_clip, pixels):
    images = pixels(size, batch=2)
    chosen = {"settings": {"neighbours": neighbours}, "networks": {"dino": DINO[patch_px]}}
    segmenter = build_segmenter(*spar, "lposs", **chosen)
    encoded = segmenter.encode_labels(LABELS, ["a photo of a {}"])
    found = segmenter(images, encoded)
    text = encoded.text_embeds.double().numpy()
    net = PlainClip(make_clip(num_hidden_layers=2))
    expected = plain_lposs(net, DINO[patch_px], images[1], text, segmenter.config, neighbours)
    np.testing.assert_allclose(found[1](slice(0, 7)).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(found[1](slice(2, 4)).numpy(), expected[2:4], atol=2e-5)
    assert found[1].size_hw == size and found[1].num_names == 7
    (single,) = segmenter(images[:1], encoded)
    torch.testing.assert_close(single(slice(0, 7)), found[0](slice(0, 7)), atol=2e-5, rtol=0)

    # The label map of another size: the best name of a class first, then the resizing.
    larger = (size[0] * 3 // 2, size[1] * 2)
    classes = [expected[:1], expected[1:4].max(0, keepdims=True), expected[4:5], expected[5:].max(0, keepdims=True)]
    classes = bilinear(np.concatenate(classes), larger)
    best = np.sort(classes, axis=0)
    sure = best[-1] - best[-2] > 1e-4
    labels = label_map(found[1].at(larger), encoded.class_ids).numpy()
    assert sure.mean() > 0.95
    np.testing.assert_array_equal(labels[sure], classes.argmax(0)[sure])


@pytest.mark.parametrize("size", [(40, 52), (64, 32)])
@torch.no_grad()
def test_lposs_plus_equals_its_plain_formulation(size, spar, make_clip, pixels):
    images = pixels(size, batch=2)
    images = images.cumsum(2).cumsum(3)  # smooth enough for pixels to be alike
    images = (images - images.amin((2, 3), True)) / (images.amax((2, 3), True) - images.amin((2, 3), True)) * 0.3
    segmenter = build_segmenter(*spar, "lposs_plus", networks={"dino": DINO[16]})
    encoded = segmenter.encode_labels("car; grass; dog", ["a photo of a {}"])
    found = segmenter(images, encoded)
    net, text = PlainClip(make_clip(num_hidden_layers=2)), encoded.text_embeds.double().numpy()
    before = plain_lposs(net, DINO[16], images[1], text, segmenter.config)
    expected = plain_plus(images[1], before, segmenter.config)
    assert np.abs(expected - before).max() > 0.1
    np.testing.assert_allclose(found[1](slice(0, 3)).numpy(), expected, rtol=2e-4, atol=2e-4)
    labels = label_map(found[1], encoded.class_ids).numpy()
    best = np.sort(expected, axis=0)
    sure = best[-1] - best[-2] > 1e-3
    np.testing.assert_array_equal(labels[sure], expected.argmax(0)[sure])


def test_a_graph_is_its_dense_matrix_and_names_go_in_chunks(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    unit_ = torch.nn.functional.normalize(torch.randn(30, 5, generator=generator), dim=1)
    places = torch.randint(0, 100, (30, 2), generator=generator)
    graph = propagation.nearest_neighbours(unit_, places, 7, 3.0, 0.01)
    assert graph.half.nnz == 30 * 7
    scores = torch.randn(30, 5, generator=generator)
    whole = graph.propagate(scores, 0.95, 10, 1e-6)
    dense = (graph.half + graph.half.T).toarray()
    np.testing.assert_allclose(whole.numpy(), propagated(dense, scores.double().numpy()), atol=1e-5)
    monkeypatch.setattr(propagation, "SOLVER_NUMBERS", 60)
    monkeypatch.setattr(propagation, "ROW_NUMBERS", 100)
    again = propagation.nearest_neighbours(unit_, places, 7, 3.0, 0.01)
    assert abs(again.half - graph.half).max() < 1e-7
    torch.testing.assert_close(graph.propagate(scores, 0.95, 10, 1e-6), whole, atol=1e-6, rtol=0)


def test_solving_stops_column_by_column():
    right = np.array([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
    matrix = np.array([[2.0, 0.5], [0.5, 1.0]])
    solved = propagation.conjugate_gradients(lambda x: matrix @ x, right, steps=10, tolerance=1e-6)
    np.testing.assert_allclose(solved, np.linalg.solve(matrix, right), atol=1e-6)


def test_one_class_one_patch_and_equal_colours(spar):
    segmenter = build_segmenter(*spar, "lposs_plus", networks={"dino": DINO[16]})
    encoded = segmenter.encode_labels("car")
    for size in ((16, 16), (10, 33)):
        (maps,) = segmenter(torch.zeros(1, 3, *size), encoded)
        labels = label_map(maps, encoded.class_ids)
        assert maps(slice(0, 1)).isfinite().all() and labels.shape == size
    assert lposs.runs(Labels.parse("a, b; c; d, e").class_ids) == [(0, 2), (3, 5)]


def test_without_scipy_one_line_names_the_extra(spar, pixels, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "scipy.sparse", None)
    segmenter = build_segmenter(*spar, "lposs", networks={"dino": DINO[16]})
    with pytest.raises(ValueError, match=r'scipy is needed and not installed; run: pip install "spar-hf\[vfm\]"'):
        segmenter(pixels("native"), segmenter.encode_labels("car; dog"))
