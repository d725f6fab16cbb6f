"""CASS's text side against loops in fp64, on the features that test_cass.py holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, unit
from plain_vfm import bilinear, starts
from second_networks import small

from spar_hf import build_encoder, build_segmenter
from spar_hf.methods.cass_text import clusters_of

LABELS = "car; grass, sea, sky; dog; house, tree"


def plain_clusters(names: np.ndarray, height: float) -> set[frozenset[int]]:
    """Ward's merges by the formula of Lance and Williams, until none is under the height."""
    groups = [frozenset([i]) for i in range(len(names))]
    distance = {(a, b): 1 - unit(names)[min(a)] @ unit(names)[min(b)] for a in groups for b in groups if a != b}
    while len(groups) > 1:
        a, b = min(((a, b) for a in groups for b in groups if a != b), key=lambda pair: distance[pair])
        if distance[a, b] > height:
            break
        merged = a | b
        for other in groups:
            if other not in (a, b):
                total = len(a) + len(b) + len(other)
                square = (len(a) + len(other)) * distance[a, other] ** 2 + (len(b) + len(other)) * distance[
                    b, other
                ] ** 2
                square -= len(other) * distance[a, b] ** 2
                distance[merged, other] = distance[other, merged] = np.sqrt(square / total)
        groups = [group for group in groups if group not in (a, b)] + [merged]
    return set(groups)


def plain_scores(patches, names, g, groups, alpha, gamma) -> np.ndarray:
    """(K, h, w)."""
    flat, pulled = unit(patches.reshape(-1, patches.shape[-1])), names.copy()
    for group in groups:
        name = max(group, key=lambda i: names[i] @ g)
        nearest = np.argsort(-(flat @ names[name]))[:2]
        pulled[name] = unit((1 - alpha) * names[name] + alpha * unit(flat[nearest].mean(axis=0)))
    scores = (1 - gamma) * pulled @ flat.T + gamma * (names @ g)[:, None]
    return scores.reshape(-1, *patches.shape[:2])


@pytest.mark.parametrize("size", [(64, 64), (80, 112), (32, 128), (90, 75)])
@pytest.mark.parametrize("windows", [False, True])
@torch.no_grad()
def test_the_text_side_equals_its_plain_formulation(size, windows, make_spar, make_clip, spar_processor, pixels):
    """METHODS row "cass_text": equals_its_plain_formulation in a whole image and in windows of 64 px, step 32."""
    images, model, networks = pixels(size, batch=2), make_spar(num_hidden_layers=3), {"dino": small("dino")}
    settings = {"windows": windows, "patch_weight": 0.3, "image_weight": 0.25, "height": 0.5}
    segmenter = build_segmenter(model, spar_processor, "cass_text", networks=networks, settings=settings)
    encoded = segmenter.encode_labels(LABELS, ["a photo of a {}"])
    found = segmenter(images, encoded)[1]
    names = encoded.text_embeds.double().numpy()
    groups = plain_clusters(names, 0.5)
    assert {frozenset(group) for group in encoded.clusters} == groups and len(groups) < 7
    features = build_encoder(model.vision_model, "cass", networks=networks)
    net, image = PlainClip(make_clip(num_hidden_layers=3)), images[1:]
    g = unit(net.project(net.inputs(net.embed(image[0].double().numpy(), "offset")[0])[-1][:1])[0])
    if not windows:
        patches = features(image).patch_embeds[0].double().numpy()
        np.testing.assert_allclose(found.grid.numpy(), plain_scores(patches, names, g, groups, 0.3, 0.25), atol=2e-5)
        return
    if size == (90, 75):
        return  # windows of 64 px leave nothing over
    total, count = np.zeros((7, *size)), np.zeros(size)
    side = (min(size[0], 64), min(size[1], 64))
    for y in starts(size[0], 64, 32):
        for x in starts(size[1], 64, 32):
            inside = (..., slice(y, y + side[0]), slice(x, x + side[1]))
            patches = features(image[inside]).patch_embeds[0].double().numpy()
            total[inside] += bilinear(plain_scores(patches, names, g, groups, 0.3, 0.25), side)
            count[inside] += 1
    np.testing.assert_allclose(found(slice(0, 7)).numpy(), total / count, atol=2e-5)


def test_a_single_name_and_heights():
    assert clusters_of(torch.ones(1, 4), 0.1) == ((0,),)
    names = torch.nn.functional.normalize(torch.randn(5, 8, generator=torch.Generator().manual_seed(0)), dim=1)
    assert len(clusters_of(names, 0.0)) == 5 and len(clusters_of(names, 10.0)) == 1
