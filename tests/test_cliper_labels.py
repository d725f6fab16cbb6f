"""CLIPer's labels against loops in fp64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, softmax, unit
from plain_vfm import bilinear

from spar_hf import build_segmenter
from spar_hf.methods import cliper, encoder
from spar_hf.prompts_spar import Labels
from spar_hf.segmentation_spar import label_map

LABELS = Labels((("wall", "floor"), ("car",), ("grass", "sea"), ("dog",)), background=0)
CUT, NOTHING = 0.8, 0.4


def plain_values(net, image, names, background) -> np.ndarray:
    """(K, h, w)."""
    tokens, grid_hw = net.embed(image.astype(np.float64), "bilinear")
    inputs, last = net.inputs(tokens), net.num_layers - 1
    maps = sum(net.maps(block, inputs[block], "q", "k") for block in range(last))
    normed = [net.norm(f"vision_model.encoder.layers.{b}.layer_norm1", inputs[b]) for b in range(last)]
    texts = unit(np.concatenate([names, background, names.mean(0, keepdims=True)]))
    shares = []
    for source in [*normed, inputs[last]]:
        maps = maps / maps.sum(axis=-2, keepdims=True)  # one more round for each source
        maps = maps / maps.sum(axis=-1, keepdims=True)
        even = (maps + maps.transpose(0, 2, 1)) / 2
        even = np.maximum(even - even.mean(axis=-2, keepdims=True), 0)
        even = even / even.sum(axis=-1, keepdims=True)
        patches = unit(net.project(net.attend(last, source, even))[1:])
        shares.append(softmax(100 * patches @ texts.T)[:, : len(names)].T)
    for row in shares[-1]:
        row[row < CUT * row.max()] = 0
    found = shares[-1] @ even.mean(axis=0)[1:, 1:] + sum(shares) / len(shares)
    return found.reshape(-1, *grid_hw)


def plain_ids(values, size_hw, ids, stretch, presence) -> tuple[np.ndarray, np.ndarray]:
    """Class ids (H, W), 0 for the background, and where no second one is near."""
    scores = [np.full(size_hw, NOTHING)]
    for value in values:
        image = bilinear(value, size_hw)
        image = image / (image.max() + 1e-5) * value.max()
        if stretch:
            image = (image - image.min()) / (image.max() - image.min() + 1e-6)
        scores.append(image * (value.max() > presence))
    order = np.sort(scores, axis=0)
    return np.array([0, *ids])[np.argmax(scores, axis=0)], order[-1] - order[-2] > 1e-4


@pytest.mark.parametrize("size", [(64, 64), (80, 112), (32, 128), (90, 75)])
@pytest.mark.parametrize("layers", [3, 6])
@torch.no_grad()
def test_labels_equal_their_plain_formulation(size, layers, make_spar, make_clip, spar_processor, pixels, monkeypatch):
    """METHODS row "cliper_labels": equals_its_plain_formulation in values and in labels."""
    monkeypatch.setattr(cliper, "HEAD_NUMBERS", 1)  # a head at a time
    monkeypatch.setattr(encoder, "ROW_NUMBERS", 500)
    images, model = pixels(size, batch=2), make_spar(num_hidden_layers=layers)
    stretch = layers == 3
    settings = {"background": ("sky", "sea"), "cut": CUT, "nothing": NOTHING, "stretch": stretch}
    segmenter = build_segmenter(model, spar_processor, "cliper_labels", settings=settings)
    encoded = segmenter.encode_labels(LABELS, ["a photo of a {}"])
    highest = segmenter.values(images[1:], encoded, [2, 3, 4, 5])[0].amax((1, 2)).sort().values
    presence = float(highest[:2].mean())  # the lowest name is not there
    settings["presence"] = presence
    segmenter = build_segmenter(model, spar_processor, "cliper_labels", settings=settings)
    assert encoded.background.shape == (3, 24) and segmenter.encode_labels(encoded) is encoded
    found = segmenter(images, encoded)
    names = [2, 3, 4, 5]
    values, coverage_hw = segmenter.values(images[1:], encoded, names)
    text = encoded.text_embeds.double().numpy()[names]
    net = PlainClip(make_clip(num_hidden_layers=layers))
    expected = plain_values(net, images[1].numpy(), text, encoded.background.double().numpy())
    np.testing.assert_allclose(values.numpy(), expected, atol=5e-5)
    if coverage_hw == (1.0, 1.0):
        for size_hw in (size, (size[0] * 3 // 2, size[1] * 2)):
            wanted, sure = plain_ids(expected, size_hw, [1, 2, 2, 3], stretch, presence)
            labels = label_map(found[1].at(size_hw), encoded.class_ids).numpy()
            assert sure.mean() > 0.9
            np.testing.assert_array_equal(labels[sure], wanted[sure])
    (alone,) = segmenter(images[1:], encoded)
    torch.testing.assert_close(alone(slice(0, 6)), found[1](slice(0, 6)), atol=1e-4, rtol=0)


def test_without_a_background_class_the_best_name_has_each_pixel(make_spar, spar_processor, pixels):
    segmenter = build_segmenter(make_spar(num_hidden_layers=3), spar_processor, "cliper_labels")
    encoded = segmenter.encode_labels("car; dog")
    (maps,) = segmenter(pixels("larger"), encoded)
    assert set(label_map(maps, encoded.class_ids).unique().tolist()) <= {0, 1}
