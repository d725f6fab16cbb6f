"""TextRegion against loops over regions and patches in NumPy, float64."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, sclip, unit
from plain_vfm import bilinear
from second_networks import sam2_model, small
from test_masks import overlap
from test_proxyclip import spread

from spar_hf import METHODS, build_segmenter
from spar_hf.networks.masks import Regions, SamRegions, SamSettings, Superpixels, boxes_of, merged
from spar_hf.prompts_spar import Labels
from spar_hf.segmentation_spar import label_map

LABELS = "car; grass, sea, sky; dog; house, tree"


class Drawn:
    """A source of regions that are known; of each image as it comes, in turn."""

    def __init__(self, *regions: Regions) -> None:
        self.regions = list(regions)

    def __repr__(self) -> str:
        return "Drawn()"

    def __call__(self, pixel_values, config) -> Regions:
        regions = self.regions.pop(0)
        self.regions.append(regions)
        return regions.at((pixel_values.shape[2], pixel_values.shape[3]))


def drawn(kind: str, size: tuple[int, int], seed: int = 0) -> Regions:
    """Rectangles, some of them overlapping, one empty and one of half a pixel's worth; the right edge lies in none."""
    generator = torch.Generator().manual_seed(seed)
    masks = torch.zeros(6, *size)
    for mask in masks[:4]:
        top, left = (int(torch.randint(0, side // 2, (), generator=generator)) for side in size)
        mask[top : top + size[0] // 2, left : left + size[1] // 2] = 1
        mask *= 3 * torch.rand(size, generator=generator)
    masks[5, :3, :1] = 1
    masks[:, :, -size[1] // 4 :] = 0
    if kind == "soft":
        return Regions(drawn=masks)
    if kind == "hard":
        return Regions(drawn=masks > 0.5)
    ids = torch.zeros(size, dtype=torch.int64)
    for number, mask in enumerate(masks):
        ids[mask > 0.2] = 10 + 7 * number
    return Regions(ids=ids)


def cubic(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(..., H, W) -> (..., h, w) by Keys's cubic with a = -0.5, widened where it shrinks."""

    def kernel(x: float) -> float:
        x = abs(x)
        if x < 1:
            return 1.5 * x**3 - 2.5 * x**2 + 1
        return -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2 if x < 2 else 0.0

    def weights(n_in: int, n_out: int) -> np.ndarray:
        scale = n_in / n_out
        wide = max(scale, 1.0)
        table = np.array([[kernel((j + 0.5 - (i + 0.5) * scale) / wide) for j in range(n_in)] for i in range(n_out)])
        return table / table.sum(axis=1, keepdims=True)

    return weights(image.shape[-2], size_hw[0]) @ image @ weights(image.shape[-1], size_hw[1]).T


def plain_textregion(net, pixels, masks, text, window, columns=1, threshold=0.07):
    """(K, H, W) of one image (3, H, W) and the patches that are no region's own."""
    height, width = pixels.shape[1:]
    grid, last = window // net.patch_px, net.num_layers - 1
    down, across = max(height // window, 1), max(width // window, 1)
    size = (math.ceil(height / down), math.ceil(width / across))

    def seen(piece: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        tokens, grid_hw = net.embed(cubic(piece, (window, window)), "offset")
        inputs = net.inputs(tokens)
        values = np.concatenate(net.heads(last, inputs[-2], "v"), axis=-1)[1:]
        features = unit(net.project(sclip(net, inputs, grid_hw)[1:]))
        return tuple(part.T.reshape(-1, grid, grid) for part in (values, features))

    bounds = [width * i // columns for i in range(columns + 1)]
    wholes = [seen(pixels[:, :, left:right]) for left, right in pairwise(bounds)]
    cells = [grid * across * i // columns for i in range(columns + 1)]
    maps = [
        np.concatenate(
            [bilinear(w[which], (grid * down, b - a)) for w, (a, b) in zip(wholes, pairwise(cells), strict=True)],
            axis=2,
        )
        for which in (0, 1)
    ]
    for row in range(down):
        for column in range(across):
            bottom, right = min((row + 1) * size[0], height), min((column + 1) * size[1], width)
            crop = seen(pixels[:, max(bottom - size[0], 0) : bottom, max(right - size[1], 0) : right])
            for whole, part in zip(maps, crop, strict=True):
                whole[:, row * grid : (row + 1) * grid, column * grid : (column + 1) * grid] += part
    values = maps[0].reshape(len(maps[0]), -1).T
    count = len(values)
    weights = np.minimum(bilinear(masks, (grid * down, grid * across)).reshape(len(masks), count), 1)
    regions = [r for r in range(len(masks)) if weights[r].sum() > 0]
    cosine = unit(values) @ unit(values).T
    foreign = []
    for n in range(count):
        mean = {r: cosine[n, weights[r] > 0].mean() for r in regions}
        ins = [mean[r] for r in regions if weights[r, n] > 0]
        outs = [mean[r] for r in regions if weights[r, n] == 0]
        if (np.mean(ins) if ins else 0) - (np.mean(outs) if outs else 0) < threshold:
            foreign.append(n)
    weights[:, foreign] = 0
    scores, covered = np.zeros((len(text), height, width)), np.zeros((height, width))
    for r in regions:
        if weights[r].sum() > 0:
            summed = sum(weights[r, n] * values[n] for n in range(count))
            token = net.linear(f"vision_model.encoder.layers.{last}.self_attn.out_proj", summed[None])
            vector = unit(net.project(token))[0]
            soft = np.minimum(masks[r], 1)
            scores += (text @ vector)[:, None, None] * soft
            covered += soft
    others = bilinear(np.einsum("kd,dij->kij", text, maps[1]), (height, width))
    return np.where(covered == 0, others, scores), foreign


@pytest.fixture(scope="module")
def spar(make_spar, spar_processor):
    return make_spar(num_hidden_layers=2), spar_processor


@pytest.mark.parametrize(
    ("size", "kind", "columns"),
    [
        ((64, 64), "soft", 1),  # smaller than a window
        ((112, 128), "ids", 1),
        ((96, 200), "soft", 2),
        ((200, 100), "hard", 1),
        ((90, 75), "soft", 1),  # off the grid
        ((195, 301), "ids", 2),
    ],
)
@torch.no_grad()
def test_textregion_equals_its_plain_formulation(size, kind, columns, spar, make_clip, pixels):
    images, sources = pixels(size, batch=2), [drawn(kind, size), drawn(kind, size, seed=1)]
    networks = {"regions": Drawn(*sources)}
    segmenter = build_segmenter(*spar, "textregion", networks=networks, settings={"columns": columns})
    encoded = segmenter.encode_labels(LABELS, ["a photo of a {}"])
    found = segmenter(images, encoded)
    net, text = PlainClip(make_clip(num_hidden_layers=2)), encoded.text_embeds.double().numpy()
    masks = sources[1].masks.double().numpy()
    expected, foreign = plain_textregion(net, images[1].double().numpy(), masks, text, 96, columns)
    grid = found[1].grid_hw[0] * found[1].grid_hw[1]
    assert 0 < len(foreign) < grid
    np.testing.assert_allclose(found[1](slice(0, 7)).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(found[1](slice(2, 4)).numpy(), expected[2:4], atol=2e-5)
    assert found[1].size_hw == size and found[1].logit_scale == 50.0
    (single,) = segmenter(images[:1], encoded)
    torch.testing.assert_close(single(slice(0, 7)), found[0](slice(0, 7)), atol=2e-5, rtol=0)

    larger = (size[0] * 3 // 2, size[1] * 2)
    probabilities = torch.from_numpy(bilinear(expected, larger)).mul(50).softmax(0)
    ids = torch.tensor(Labels.parse(LABELS).class_ids)
    classes = torch.stack([probabilities[ids == index].amax(0) for index in range(4)])
    top = classes.topk(2, dim=0)
    decided = top.values[0] - top.values[1] > 1e-3
    labels = label_map(found[1].at(larger), ids, synonyms="max").long()
    assert decided.float().mean() > 0.5 and torch.equal(labels[decided], top.indices[0][decided])


@torch.no_grad()
def test_few_and_many_regions(spar, make_clip, pixels):
    """No region, one, and more than there are patches."""
    size, image = (96, 112), pixels((96, 112))
    net = PlainClip(make_clip(num_hidden_layers=2))
    many = torch.arange(24 * 28).reshape(24, 28).repeat_interleave(4, 0).repeat_interleave(4, 1) + 1
    for regions in (
        Regions(drawn=torch.zeros(0, *size, dtype=torch.bool)),
        Regions(ids=torch.zeros(size, dtype=torch.int64)),
        Regions(ids=torch.ones(size, dtype=torch.int64)),
        Regions(ids=many),
    ):
        segmenter = build_segmenter(*spar, "textregion", networks={"regions": Drawn(regions)})
        for labels in ("car", LABELS):
            encoded = segmenter.encode_labels(labels, ["a photo of a {}"])
            (found,) = segmenter(image, encoded)
            text = encoded.text_embeds.double().numpy()
            expected, _ = plain_textregion(net, image[0].double().numpy(), regions.masks.double().numpy(), text, 96)
            np.testing.assert_allclose(found(slice(0, len(text))).numpy(), expected, atol=2e-5)


@torch.no_grad()
def test_regions_of_any_source(spar, pixels, tmp_path):
    images = pixels((80, 96))
    folder = tmp_path / "sam2"
    network = spread(sam2_model())
    network.save_pretrained(folder)
    for given in (str(folder), network):
        segmenter = build_segmenter(*spar, "textregion", networks={"regions": given})
        assert isinstance(segmenter.regions, SamRegions) and segmenter.regions in segmenter.networks
        assert "points_per_side=16" in repr(segmenter) and "max_shared=0.8" in repr(segmenter)
    segmenter = build_segmenter(*spar, "textregion", networks={"regions": "slic"})
    assert isinstance(segmenter.regions, Superpixels) and "SlicSettings" in repr(segmenter)
    encoded = segmenter.encode_labels(LABELS)
    (maps,) = segmenter(images, encoded)
    assert label_map(maps, torch.tensor(encoded.labels.class_ids)).shape == (80, 96)
    easy = SamRegions(network, SamSettings(points_per_side=3, min_iou=-10.0, min_stability=0.0, soft=True))
    segmenter = build_segmenter(*spar, "textregion", networks={"regions": easy})
    assert segmenter.regions is easy
    (maps,) = segmenter(images, encoded)
    assert maps(slice(0, 7)).isfinite().all()
    assert METHODS["textregion"].needs == {"regions": "facebook/sam2.1-hiera-large"}
    assert METHODS["textregion"].window_for(224, 16) == (336, 336)
    with pytest.raises(ValueError, match=r"'textregion': there is no network 'sam'"):
        build_segmenter(*spar, "textregion", networks={"sam": network})
    with pytest.raises(ValueError, match=r"is a SamVisionModel|image encoder alone"):
        build_segmenter(*spar, "textregion", networks={"regions": small("sam_vision")})(images, encoded)


def test_masks_that_share_much_become_one():
    masks = torch.zeros(5, 12, 12)
    masks[0, :6, :6] = 1.0
    masks[1, 1:6, 1:6] = 1.2  # inside the first, but higher: shares 25 of 30
    masks[2, :6, 2:12] = 1.0  # shares 24 of 60 and of 36 pixels with the first
    masks[3, 8:, 8:] = 3.0
    masks[4, 0:1, 0:1] = 3.0  # inside the first, but the boxes hardly overlap
    united = merged(masks, boxes_of(masks > 0), 0.8)
    assert torch.equal(united, torch.stack([torch.maximum(masks[0], masks[1]), masks[2], masks[3], masks[4]]))
    assert torch.equal(merged(masks, boxes_of(masks > 0), 0.6)[0], masks[[0, 1, 2]].amax(0))
    assert torch.equal(merged(masks > 0, boxes_of(masks > 0), 0.8), united > 0)
    assert merged(masks[:0], boxes_of(masks[:0] > 0), 0.8).shape == (0, 12, 12)


@torch.no_grad()
def test_large_masks_of_a_point_go_first(make_vision, pixels):
    """The whole, the part and the part of a part of a point, each by expected IoU; no speck among them."""
    config, images = make_vision(num_hidden_layers=2).config, pixels((64, 96))
    network = spread(sam2_model())
    easy = {"points_per_side": 3, "min_iou": -10.0, "min_stability": 0.0, "max_box_iou": 1.0, "soft": True}
    source = SamRegions(network, SamSettings(**easy, min_area=0.2, max_shared=0.7))
    found = source(images, config).masks
    candidates = []
    for logits, scores in source.sam.grid_masks(source.sam.encode(images, config), 3):
        for number, (logit, score) in enumerate(zip(logits.clamp(0, 3), scores.tolist(), strict=True)):
            candidates.append((2 - number % 3, -score, logit))
    assert len(candidates) == 27
    waiting = [mask for *_, mask in sorted(candidates, key=lambda c: c[:2]) if (mask > 0).float().mean() > 0.2]
    assert 3 < len(waiting) < 27
    expected = []
    while waiting:
        first, *waiting = waiting
        group, rest = [first], []
        for mask in waiting:
            boxes = [boxes_of(m[None] > 0)[0].numpy().astype(float) for m in (first, mask)]
            shared = torch.minimum(first, mask).sum() / min(first.sum(), mask.sum())
            (group if overlap(*boxes) > 0.2 and shared > 0.7 else rest).append(mask)
        expected.append(torch.stack(group).amax(0))
        waiting = rest
    assert len(expected) < 27
    torch.testing.assert_close(found, torch.stack(expected))
