"""ResCLIP's second pass against loops in fp64."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, gaussian, softmax, unit
from plain_refinement import pamr as plain_pamr
from plain_vfm import bilinear

from spar_hf import build_segmenter
from spar_hf.methods.resclip_feedback import belonging
from spar_hf.segmentation_spar import label_map

LABELS = "car; grass, sea; dog"


def plain_belonging(names: np.ndarray) -> np.ndarray:
    """(N, N): rows are patches, columns those that they look at."""
    height, width = names.shape
    places = [(y, x) for y in range(height) for x in range(width)]
    farthest = max(height, width) - 1
    shares = torch.linspace(0, 1, farthest + 1).numpy()
    matrix = np.zeros((len(places), len(places)))
    for i, a in enumerate(places):
        for j, b in enumerate(places):
            if names[a] != names[b]:
                continue
            steps = max(abs(a[0] - b[0]), abs(a[1] - b[1]))
            ways = [a[n] * (np.float32(1) - t) + b[n] * t for t in shares[: steps + 1] for n in (0, 1)]
            way = list(zip(*[iter(np.round(ways).astype(int).tolist())] * 2, strict=True))
            seen = all(names[place] == names[a] for place in way)
            matrix[i, j] = 1 if seen else math.exp(-steps / farthest)
    side = min(len(places), 31)
    side += 1 - side % 2
    kernel = np.exp(-((np.arange(side) - side // 2) ** 2) / 50)
    kernel /= kernel.sum()
    smooth = np.zeros_like(matrix)
    for i in range(len(places)):
        for j in range(len(places)):
            for k in range(side):
                if 0 <= j + k - side // 2 < len(places):
                    smooth[i, j] += kernel[k] * matrix[i, j + k - side // 2]
    smooth /= smooth.sum(axis=1, keepdims=True) + 1e-8
    return smooth / smooth.max()


def plain_second_pass(net, image, text, threshold) -> np.ndarray:
    """Patch features (h, w, D)."""
    tokens, grid_hw = net.embed(image.astype(np.float64), "offset")
    inputs, last = net.inputs(tokens), net.num_layers - 1
    earlier = {12: (5, 6, 7, 8), 6: (2, 3, 3, 4)}[net.num_layers]
    rest = sum(net.maps(block, inputs[block], "q", "k") for block in earlier) / 4
    near = gaussian(grid_hw, 5.0)

    def features(local: np.ndarray) -> np.ndarray:
        out = net.attend(last, inputs[last], 2.0 * (0.7 * local + 0.3 * rest))
        return net.project(out[1:]).reshape(*grid_hw, -1)

    size_hw = (grid_hw[0] * 16, grid_hw[1] * 16)
    first = np.einsum("kd,yxd->kyx", text, unit(features(net.maps(last, inputs[last], "k", "k", near))))
    guide = image[:, : size_hw[0], : size_hw[1]].astype(np.float64)
    logits = plain_pamr(bilinear(first, size_hw), guide)
    shares = softmax(40 * logits.transpose(1, 2, 0))
    names = np.where(shares.max(-1) < threshold, 0, shares.argmax(-1))
    common = np.zeros(grid_hw, dtype=int)
    for y in range(grid_hw[0]):
        for x in range(grid_hw[1]):
            votes = Counter(names[y * 16 : y * 16 + 16, x * 16 : x * 16 + 16].ravel().tolist())
            common[y, x] = min(votes, key=lambda name: (-votes[name], name))
    matrix = np.pad(plain_belonging(common), ((1, 0), (1, 0)))
    scores = [0.7 * matrix * 2.2 + 0.3 * 2.2 * k @ k.T / math.sqrt(k.shape[1]) + near
              for k in net.heads(last, inputs[last], "k")]  # fmt: skip
    return features(np.stack([softmax(score) for score in scores]))


@pytest.mark.parametrize("size", [(64, 64), (64, 80), (32, 96), (56, 41)])
@torch.no_grad()
def test_the_second_pass_equals_its_plain_formulation(size, make_spar, make_clip, spar_processor, pixels):
    """METHODS row "resclip_feedback": features of the second pass, and labels."""
    images = pixels(size, batch=2)
    model = make_spar(num_hidden_layers=6)
    segmenter = build_segmenter(model, spar_processor, "resclip_feedback", settings={"threshold": 0.3})
    encoded = segmenter.encode_labels(LABELS, ["a photo of a {}"])
    found = segmenter(images, encoded)
    (alone,) = segmenter(images[1:], encoded)
    torch.testing.assert_close(alone.grid, found[1].grid, atol=2e-5, rtol=0)
    text = encoded.text_embeds.double().numpy()
    expected = plain_second_pass(PlainClip(make_clip(num_hidden_layers=6)), images[1].numpy(), text, 0.3)
    cosines = np.einsum("kd,yxd->kyx", text, unit(expected))
    np.testing.assert_allclose(found[1].grid.numpy(), cosines, atol=2e-5)
    first = build_segmenter(model, spar_processor, "resclip")(images[1:], encoded)[0]
    assert (first.grid - found[1].grid).abs().max() > 1e-3
    assert label_map(found[1], encoded.class_ids).shape == size


def test_patches_belong_together_where_they_see_each_other():
    names = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 0], [2, 1, 0, 0]])
    np.testing.assert_allclose(belonging(names, 5.0).numpy(), plain_belonging(names.numpy()), atol=1e-6)
    single = belonging(torch.zeros(1, 1, dtype=torch.int64), 5.0)
    torch.testing.assert_close(single, torch.ones(1, 1))
