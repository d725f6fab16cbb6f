"""kNN-CLIP against a plain formulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, sclip, softmax, unit
from plain_vfm import bilinear, line_weights
from second_networks import pictures
from test_corrclip import Drawn, drawn
from test_proxyclip import dino, imagenet, vit

from spar_hf import build_segmenter
from spar_hf.networks.masks import Regions
from spar_hf.prototypes import build_bank

CHOSEN = {"neighbours": 3, "threshold": 0.6, "weight": 0.7}
LABELS = "car, automobile; grass; umbrella; sky"


def over(maps: np.ndarray, size: tuple[int, int], patch: int) -> np.ndarray:
    """Maps on the patches that an image has room for, at its pixels."""
    tables = [line_weights(n, side, 1 / patch) for n, side in zip(maps.shape[-2:], size, strict=True)]
    return tables[0] @ maps @ tables[1].T


def plain_means(second, image: np.ndarray, ids: np.ndarray, config) -> dict[int, np.ndarray]:
    patch = second.config.patch_size
    rows, columns = (side // patch for side in image.shape[1:])
    whole = torch.from_numpy(image[:, : rows * patch, : columns * patch]).float()[None]
    tokens = dino(second, imagenet(whole, config))[0, 1:].double().numpy()
    pixels = over(tokens.T.reshape(-1, rows, columns), image.shape[1:], patch)
    return {number: pixels[:, ids == number].mean(axis=1) for number in np.unique(ids)}


@pytest.mark.parametrize(
    ("size", "patch_px", "kind"),
    [((64, 64), 8, "ids"), ((112, 128), 16, "hard"), ((48, 144), 8, "ids"), ((90, 75), 14, "hard")],
)
@torch.no_grad()
def test_knn_clip_equals_its_plain_formulation(
    size, patch_px, kind, make_spar, make_clip, spar_processor, pixels, tmp_path
):
    """METHODS row "knn_clip": the bank and the probabilities."""
    model, second, references = make_spar(num_hidden_layers=2), vit(patch_px), pictures(6)
    config = model.vision_model.config
    given = {"networks": {"dino": second}, "settings": CHOSEN}
    bank = build_bank(tmp_path / "bank", "knn_clip", model, spar_processor, references, **given, progress=False)
    entries, names = [], []
    for number in range(6):
        sample = references.read(number)
        image = spar_processor(images=sample.image, return_tensors="pt")["pixel_values"][0].double().numpy()
        for class_id, mean in plain_means(second, image, sample.target, config).items():
            if class_id >= 0:
                entries.append(mean)
                names.append(class_id)
    np.testing.assert_allclose(bank.features.numpy(), entries, atol=2e-5)
    assert bank.tensors["name"].tolist() == names

    regions = [drawn(kind, size), drawn(kind, size, seed=1)]
    networks = {"dino": second, "regions": Drawn(*regions), "bank": bank}
    segmenter = build_segmenter(model, spar_processor, "knn_clip", networks=networks, settings=CHOSEN)
    encoded = segmenter.encode_labels(LABELS, ["a photo of a {}"])
    images = pixels(size, batch=2)
    maps = segmenter(images, encoded)

    image, ids = images[1].double().numpy(), regions[1].map.numpy()
    net = PlainClip(make_clip(num_hidden_layers=2))
    tokens, grid = net.embed(image, "offset")
    patches = unit(net.project(sclip(net, net.inputs(tokens), grid))[1:])
    text = unit(encoded.text_embeds.double().numpy())
    base = over(softmax(40 * patches @ text.T).T.reshape(-1, *grid), size, 16)
    expected = base.copy()
    # The bank's road, car, sky, grass -> this vocabulary's car, automobile, grass, umbrella, sky.
    votes = [{0: None, 1: 0, 2: 4, 3: 2}[name] for name in names]
    voting = [i for i, vote in enumerate(votes) if vote is not None]
    unsure = 0
    for number, mean in plain_means(second, image, ids, segmenter.config).items():
        if number == 0:
            continue
        order = sorted(voting, key=lambda i: -(unit(entries[i]) @ unit(mean)))[:3]
        share = np.bincount([votes[i] for i in order], minlength=5) / 3
        own = base[:, ids == number].mean(axis=1)
        unsure += share.max() < 0.6
        value = own if share.max() < 0.6 else 0.7 * share + 0.3 * own
        expected[:, ids == number] = value[:, None]
    np.testing.assert_allclose(maps[1](slice(0, 5)).exp().numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(maps[1](slice(3, 5)).exp().numpy(), expected[3:], atol=2e-5)
    (single,) = segmenter(images[:1], encoded)
    torch.testing.assert_close(single(slice(0, 5)).exp(), maps[0](slice(0, 5)).exp(), atol=2e-5, rtol=0)


@torch.no_grad()
def test_no_region_is_the_base_and_numbers_have_to_be_given(make_spar, spar_processor, pixels, tmp_path):
    model, second = make_spar(num_hidden_layers=2), vit(8)
    given = {"networks": {"dino": second}, "settings": CHOSEN}
    bank = build_bank(tmp_path / "bank", "knn_clip", model, spar_processor, pictures(3), **given, progress=False)
    size, image = (64, 80), pixels((64, 80))

    def probabilities(regions: Regions, **changed):
        networks = {"dino": second, "regions": Drawn(regions), "bank": bank}
        settings = {**CHOSEN, **changed}
        segmenter = build_segmenter(model, spar_processor, "knn_clip", networks=networks, settings=settings)
        (maps,) = segmenter(image, segmenter.encode_labels("sky; car"))
        return maps(slice(0, 2)).exp()

    base = probabilities(Regions(drawn=torch.zeros(0, *size, dtype=torch.bool)))
    one = probabilities(Regions(ids=torch.ones(size, dtype=torch.int64)), weight=0.0)
    torch.testing.assert_close(one, base.mean(dim=(1, 2), keepdim=True).expand_as(base))
    torch.testing.assert_close(base.sum(dim=0), torch.ones(size))
    many = Regions(ids=torch.arange(1, 1 + 64 * 80).view(size))  # more regions than patches
    torch.testing.assert_close(probabilities(many, weight=0.0), base)
    networks = {"dino": second, "regions": Drawn(), "bank": bank}
    for missing in CHOSEN:
        settings = {name: value for name, value in CHOSEN.items() if name != missing}
        with pytest.raises(ValueError, match=r"needs neighbours .* which its paper leaves open; give --set neighb"):
            build_segmenter(model, spar_processor, "knn_clip", networks=networks, settings=settings)
    segmenter = build_segmenter(model, spar_processor, "knn_clip", networks=networks, settings=CHOSEN)
    with pytest.raises(ValueError, match=r"bank .* lacks 'boat', 'cow'; it has road, car, sky, grass\. Make one"):
        segmenter.encode_labels("boat; cow")


def test_over_is_bilinear_where_the_grid_fits():
    maps = np.random.default_rng(0).normal(size=(2, 3, 4))
    np.testing.assert_allclose(over(maps, (48, 64), 16), bilinear(maps, (48, 64)))
