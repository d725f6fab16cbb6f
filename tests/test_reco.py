"""ReCo against a plain formulation: retrieval, co-segmentation, scores."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from plain_clip import PlainClip, maskclip, unit
from plain_vfm import bilinear
from second_networks import pictures
from test_knn_clip import over
from test_proxyclip import dino, imagenet, vit

from spar_hf import Labels, build_segmenter
from spar_hf.methods.reco import common
from spar_hf.prototypes import Pictures, build_bank
from spar_hf.segmentation_spar import label_map

NAMES = "road; sky, clouds; grass"
CONTEXT = ("tree", "sky")
SIDE, COUNT = 48, 3


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def middle(image: Image.Image, side: int) -> np.ndarray:
    """CLIP's preprocessing: the shorter side resized, the middle of the longer."""
    short = min(image.size)
    size = tuple(int(side * length / short) for length in image.size)
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((length - side) / 2) for length in size)
    return np.asarray(resized.crop((left, top, left + side, top + side)))


class Plain:
    """ReCo on one network and some pictures."""

    def __init__(self, net: PlainClip, second, processor, model, config) -> None:
        self.net, self.second, self.config = net, second, config
        self.text = lambda name: processor.encode_labels(model, [[name]]).text_embeds[0].double().numpy()

    def pixels(self, square: np.ndarray) -> np.ndarray:
        mean, std = (np.array(v)[:, None, None] for v in (self.config.image_mean, self.config.image_std))
        return (square.transpose(2, 0, 1) / 255 - mean) / std

    def patches(self, image: np.ndarray) -> np.ndarray:
        """(F, h, w) of pixels (3, H, W)."""
        patch = self.second.config.patch_size
        rows, columns = (side // patch for side in image.shape[1:])
        whole = torch.from_numpy(image[:, : rows * patch, : columns * patch]).float()[None]
        tokens = dino(self.second, imagenet(whole, self.config))[0, 1:].double().numpy()
        return tokens.T.reshape(-1, rows, columns)

    def attention(self, image: np.ndarray, text: np.ndarray) -> np.ndarray:
        """sigmoid(10 cos) on CLIP's patches."""
        tokens, grid = self.net.embed(image, "offset")
        patches = unit(self.net.project(maskclip(self.net, self.net.inputs(tokens), grid))[1:])
        return sigmoid(10 * patches @ text).reshape(grid)

    def embed(self, image: Image.Image) -> np.ndarray:
        tokens, _ = self.net.embed(self.pixels(middle(image, 64)), "offset")
        return unit(self.net.project(self.net.inputs(tokens)[-1])[0])

    def prototype(self, name: str, images: list[Image.Image], context: list[np.ndarray], released: bool) -> np.ndarray:
        text = self.text(name)
        order = np.argsort([-self.embed(image) @ text for image in images], kind="stable")[:COUNT]
        features, weights = [], []
        for number in order:
            pixels = self.pixels(middle(images[number], SIDE))
            x = self.patches(pixels)
            weight = bilinear(self.attention(pixels, text), x.shape[1:])
            for vector in context:
                weight = weight * (1 - sigmoid(np.einsum("f,fhw->hw", vector, x / np.linalg.norm(x, axis=0))))
            features.append(x.reshape(len(x), -1).T)
            weights.append(weight.reshape(-1))
        patches = len(features[0])
        flat = np.concatenate(features)
        graph = unit(flat) @ unit(flat).T * np.concatenate(weights)
        seeds, start = [], 0
        grid = np.zeros((len(flat), len(order)))
        for j in range(len(order)):
            end = start + patches
            grid[:, j] = graph[:, start : start + end if released else end].max(axis=1)
            start = end
        for i in range(len(order)):
            mean = grid[i * patches : (i + 1) * patches].mean(axis=1)
            seeds.append(features[i][mean.argmax()])
        return unit(np.mean(seeds, axis=0))


@pytest.mark.parametrize(
    ("size", "patch_px", "released"),
    [((64, 64), 8, True), ((112, 128), 16, False), ((48, 144), 8, True), ((90, 75), 14, True)],
)
@torch.no_grad()
def test_reco_equals_its_plain_formulation(
    size, patch_px, released, make_spar, make_clip, spar_processor, pixels, tmp_path
):
    """METHODS row "reco": prototypes, and scores."""
    model, second, references = make_spar(num_hidden_layers=2), vit(patch_px), pictures(5, NAMES)
    settings = {"pictures": COUNT, "side_px": SIDE, "context": CONTEXT, "released": released}
    given = {"networks": {"dino": second}, "settings": settings}
    bank = build_bank(tmp_path / "bank", "reco", model, spar_processor, references, **given, progress=False)
    assert bank.names == ["road", "sky", "clouds", "grass"]
    segmenter = build_segmenter(
        model, spar_processor, "reco", networks={"dino": second, "bank": tmp_path / "bank"}, settings=settings
    )
    net = PlainClip(make_clip(num_hidden_layers=2))
    plain = Plain(net, second, spar_processor, model, segmenter.config)
    images = [references.read(number).image for number in range(5)]
    found: list[np.ndarray] = []
    for name in CONTEXT:
        found.append(plain.prototype(name, images, found, released))
    expected = [
        found[CONTEXT.index(name)] if name in CONTEXT else plain.prototype(name, images, found, released)
        for name in bank.names
    ]
    np.testing.assert_allclose(bank.features.numpy(), expected, atol=2e-5)

    encoded = segmenter.encode_labels("grass; CLOUDS; road")
    batch = pixels(size, batch=2)
    maps = segmenter(batch, encoded)
    image, patch = batch[1].double().numpy(), second.config.patch_size
    x = plain.patches(image)
    cosine = np.einsum("kf,fhw->khw", np.array(expected)[[3, 2, 0]], x / np.linalg.norm(x, axis=0))
    of_text = np.stack([plain.attention(image, unit(t)) for t in encoded.text_embeds.double().numpy()])
    scores = over(sigmoid(cosine), size, patch) * over(of_text, size, 16)
    np.testing.assert_allclose(maps[1](slice(0, 3)).exp().numpy(), scores, atol=2e-5)
    np.testing.assert_allclose(maps[1](slice(1, 3)).exp().numpy(), scores[1:], atol=2e-5)
    (single,) = segmenter(batch[:1], encoded)
    torch.testing.assert_close(single(slice(0, 3)), maps[0](slice(0, 3)), atol=2e-5, rtol=0)
    best = np.sort(scores, axis=0)
    sure = best[-1] - best[-2] > 1e-4
    assert sure.mean() > 0.9
    labels = label_map(maps[1], encoded.class_ids).numpy()
    np.testing.assert_array_equal(labels[sure], scores.argmax(axis=0)[sure])

    with pytest.raises(ValueError, match=r"bank .* lacks 'boat'; it has road, sky, clouds, grass\. Make one with"):
        segmenter.encode_labels("road; boat")


@torch.no_grad()
def test_a_name_looks_in_the_folder_of_its_class(make_spar, spar_processor, tmp_path):
    model, second = make_spar(num_hidden_layers=2), vit(8)
    for name, colour in (("road/a.png", 90), ("grass/b.png", 30), ("grass/c.png", 200), ("d.png", 120)):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(colour).integers(0, colour, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(tmp_path / "photos" / name)
    chosen = {"networks": {"dino": second}, "settings": {"pictures": 1, "side_px": SIDE, "context": ()}}

    def made(folder: str, labels: str, output: str):
        references = Pictures.of_folder(tmp_path / folder, Labels.parse(labels))
        return build_bank(tmp_path / output, "reco", model, spar_processor, references, **chosen, progress=False)

    both = made("photos", "road; meadow, grass; sky", "all")
    alone = made("photos/road", "road", "one")
    torch.testing.assert_close(both.features[0], alone.features[0])
    grass = made("photos/grass", "grass", "two")
    torch.testing.assert_close(both.features[2], grass.features[0])
    with pytest.raises(ValueError, match="makes a prototype for each name; give --labels"):
        references = Pictures.of_folder(tmp_path / "photos", None)
        build_bank(tmp_path / "none", "reco", model, spar_processor, references, **chosen, progress=False)


def test_the_released_columns_run_into_the_next_pictures():
    generator = torch.Generator().manual_seed(0)
    features, weights = torch.randn(6, 9, 5, generator=generator), torch.rand(6, 9, generator=generator)
    assert not torch.allclose(common(features, weights, True), common(features, weights, False), atol=1e-3)
    torch.testing.assert_close(common(features[:1], weights[:1], True), common(features[:1], weights[:1], False))
