"""CorrCLIP v2's memory bank against a plain formulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, unit
from plain_vfm import bilinear
from second_networks import pictures
from test_corrclip import Drawn, dense_features, drawn, plain_corrclip
from test_proxyclip import vit

from spar_hf import build_segmenter
from spar_hf.methods.bank import nearest, pixel_means
from spar_hf.methods.corrclip_v2_bank import Settings
from spar_hf.prototypes import build_bank

NEIGHBOURS = 4


@pytest.mark.parametrize(
    ("size", "patch_px"),
    [
        ((64, 64), 14),
        ((48, 80), 8),
        pytest.param((112, 96), 16, marks=pytest.mark.slow),
        pytest.param((70, 75), 16, marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_the_bank_equals_its_plain_formulation(size, patch_px, make_spar, make_clip, spar_processor, pixels, tmp_path):
    """METHODS row "corrclip_v2_bank": equals_its_plain_formulation in entries and in scores."""
    model, second, other = make_spar(num_hidden_layers=3), vit(patch_px), vit(8)
    references, net = pictures(2, size_hw=(56, 56)), PlainClip(make_clip(num_hidden_layers=3))
    sources = [drawn("ids", (56, 56)), drawn("ids", (56, 56), seed=1)]
    settings = {"neighbours": NEIGHBOURS}
    networks = {"dino": second, "bank_dino": other, "regions": Drawn(*[s for s in sources for _ in range(2)])}
    bank = build_bank(
        tmp_path / "bank", "corrclip_v2_bank", model, spar_processor, references, networks=networks,
        settings=settings, progress=False,
    )  # fmt: skip
    config, keys, values = model.vision_model.config, [], []
    for number, source in enumerate(sources):
        picture = references.read(number).image
        image = spar_processor(images=picture, return_tensors="pt")["pixel_values"][0].double().numpy()
        ids = source.map.numpy()
        everywhere = dense_features(second, image, config)
        grid = plain_corrclip(net, other, image, ids, config, Settings(), 96, 32)
        clip = bilinear(grid.transpose(2, 0, 1), image.shape[1:])
        for region in sorted(set(ids.flatten()) - {0}):
            keys.append(everywhere[:, ids == region].mean(axis=1))
            values.append(unit(clip[:, ids == region].mean(axis=1)))
    np.testing.assert_allclose(bank.features.numpy(), keys, atol=2e-5)
    np.testing.assert_allclose(bank.tensors["clip"].numpy(), values, atol=2e-5)

    regions = [drawn("ids", size), drawn("ids", size, seed=1)]
    given = {"dino": second, "regions": Drawn(*[r for r in regions for _ in range(2)]), "bank": bank}
    segmenter = build_segmenter(model, spar_processor, "corrclip_v2_bank", networks=given, settings=settings)
    encoded = segmenter.encode_labels("car; sky; grass", ["a photo of a {}"])
    images = pixels(size, batch=2)
    maps = segmenter(images, encoded)
    image, ids, text = images[1].double().numpy(), regions[1].map.numpy(), unit(encoded.text_embeds.double().numpy())
    grid = plain_corrclip(net, second, image, ids, segmenter.config, Settings(), 96, 32, dense=True)
    scores = bilinear(np.einsum("kd,hwd->khw", text, unit(grid)), size)
    everywhere = dense_features(second, image, segmenter.config)
    for region in np.unique(ids):
        query = unit(everywhere[:, ids == region].mean(axis=1))
        order = np.argsort(-(unit(np.array(keys)) @ query), kind="stable")[:NEIGHBOURS]
        support = text @ unit(np.array(values)[order].mean(axis=0))
        scores[:, ids == region] = 0.5 * scores[:, ids == region] + 0.5 * support[:, None]
    np.testing.assert_allclose(maps[1](slice(0, 3)).numpy(), scores, atol=2e-5)
    np.testing.assert_allclose(maps[1](slice(1, 2)).numpy(), scores[1:2], atol=2e-5)
    bare = build_segmenter(model, spar_processor, "corrclip_v2_bank", networks=given, settings={"support": 0.0})
    assert bare.settings.neighbours == 20 and "support=0.0" in repr(bare)


def test_means_of_regions_and_the_nearest_entries_go_in_pieces(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    features, ids = torch.randn(5, 4, 6, generator=generator), torch.randint(0, 7, (33, 29), generator=generator)
    maps = torch.nn.functional.interpolate(features[None].double(), size=(33, 29), mode="bilinear")[0]
    for limit in (2**22, 300):
        monkeypatch.setattr("spar_hf.methods.bank.SIMILARITY_NUMBERS", limit)
        for unit_ in (False, True):
            numbers, means = pixel_means(features, ids, unit=unit_)
            pixels = torch.nn.functional.normalize(maps, dim=0) if unit_ else maps
            expected = torch.stack([pixels[:, ids == number].mean(dim=1) for number in numbers])
            torch.testing.assert_close(means.double(), expected, atol=1e-5, rtol=0)
        queries, entries = torch.randn(40, 5, generator=generator), torch.randn(30, 5, generator=generator)
        values, found = nearest(queries, entries, 4)
        expected = (queries @ entries.T).topk(4, dim=1)
        torch.testing.assert_close(values, expected.values)
        assert torch.equal(found, expected.indices)
    values, found = nearest(torch.ones(2, 3), torch.ones(4, 3), 9)  # no more than there are
    assert found.sort().values.tolist() == [[0, 1, 2, 3]] * 2 and values.tolist() == [[3.0] * 4] * 2
