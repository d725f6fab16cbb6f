"""FreeDA over a bank of one's own against a plain formulation."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, unit
from plain_vfm import bilinear, starts
from second_networks import pictures
from skimage.segmentation import felzenszwalb
from test_proxyclip import dino, imagenet, vit

from spar_hf import build_segmenter
from spar_hf.methods.freeda import TEMPLATES, corner_weights
from spar_hf.prototypes import build_bank
from spar_hf.segmentation_spar import label_map

SIDE, NEIGHBOURS, NAMES = 48, 3, "road; car, automobile; sky; grass"
CHOSEN = {"side_px": SIDE, "neighbours": NEIGHBOURS, "scale": 4.0, "min_size": 12}


def corners(n_in: int, n_out: int) -> np.ndarray:
    """(n_out, n_in): bilinear with corners on corners."""
    table = np.zeros((n_out, n_in))
    for i in range(n_out):
        place = i * (n_in - 1) / max(n_out - 1, 1)
        below = min(int(place), n_in - 1)
        table[i, below] += 1 - (place - below)
        table[i, min(below + 1, n_in - 1)] += place - below
    return table


def plain_patches(second, pixels: np.ndarray, config) -> np.ndarray:
    """(F, h, w) of pixels (3, H, W), squashed."""
    square = torch.from_numpy(bilinear(pixels, (SIDE, SIDE))).float()[None]
    tokens = dino(second, imagenet(square, config))[0, 1:].double().numpy()
    side = SIDE // second.config.patch_size
    return tokens.T.reshape(-1, side, side)


def plain_means(patches: np.ndarray, mask: np.ndarray) -> np.ndarray | None:
    """The mean patch of a mask (H, W) bool that comes to the grid corner on corner."""
    down, across = (corners(n_in, n_out) for n_in, n_out in zip(mask.shape, patches.shape[1:], strict=True))
    share = down @ mask.astype(float) @ across.T
    return None if share.sum() == 0 else (patches * share).sum(axis=(1, 2)) / share.sum()


def plain_texts(model, processor, names) -> np.ndarray:
    texts = []
    for name in names:
        inputs = processor(text=[template.format(name) for template in TEMPLATES], return_tensors="pt")
        texts.append(unit(model.get_text_features(**inputs).pooler_output.double().numpy().mean(axis=0)))
    return np.stack(texts)


def square_of(pixels: np.ndarray, side: int) -> np.ndarray:
    image = torch.from_numpy(pixels).float()[None]
    return torch.nn.functional.interpolate(image, size=(side, side), mode="bicubic", align_corners=False)[0].numpy()


def plain_freeda(net, second, image, texts, prototypes, config) -> np.ndarray:
    """(K, H, W) of an image (3, H, W)."""
    height, width = image.shape[1:]
    total, count = np.zeros((len(texts), height, width)), np.zeros((height, width))
    window, stride = config.window_px, config.stride_px
    std, mean = (np.array(v, np.float32)[:, None, None] for v in (config.image_std, config.image_mean))
    for y in starts(height, window, stride):
        for x in starts(width, window, stride):
            inside = (slice(None), slice(y, y + window), slice(x, x + window))
            crop = image[inside]
            patches = plain_patches(second, crop, config)
            colours = (crop.astype(np.float32) * std + mean).clip(0, 1).transpose(1, 2, 0)  # ties depend on rounding
            ids = felzenszwalb(colours, scale=4.0, sigma=1.0, min_size=12)
            assert len(np.unique(ids)) > 3
            cosine = np.einsum("kf,fhw->khw", unit(prototypes), patches / np.linalg.norm(patches, axis=0))
            down, across = (corners(n, size) for n, size in zip(patches.shape[1:], ids.shape, strict=True))
            values = down @ (1 / (1 + np.exp(-cosine))) @ across.T
            for number in np.unique(ids):
                own = plain_means(patches, ids == number)
                if own is not None:
                    values[:, ids == number] = (1 / (1 + np.exp(-unit(prototypes) @ unit(own))))[:, None]
            tokens, _ = net.embed(square_of(crop, 64).astype(float), "offset")
            x_last = net.inputs(tokens)[-1]
            whole = texts @ unit(net.project(x_last)[0])
            total[inside] += 0.8 * values + 0.2 * whole[:, None, None]
            count[inside[1:]] += 1
    return total / count


@pytest.mark.parametrize(("size", "patch_px"), [((64, 64), 8), ((144, 128), 16), ((40, 150), 8), ((90, 75), 16)])
@torch.no_grad()
def test_freeda_equals_its_plain_formulation(size, patch_px, make_spar, make_clip, spar_processor, pixels, tmp_path):
    """METHODS row "freeda": the bank, the prototypes, and the scores."""
    model, second, references = make_spar(num_hidden_layers=2), vit(patch_px), pictures(5)
    given = {"networks": {"dino": second}, "settings": CHOSEN}
    bank = build_bank(tmp_path / "bank", "freeda", model, spar_processor, references, **given, progress=False)
    config = model.vision_model.config
    features, names = [], []
    for number in range(5):
        sample = references.read(number)
        image = spar_processor(images=sample.image, return_tensors="pt")["pixel_values"][0].double().numpy()
        patches = plain_patches(second, image, config)
        for class_id in sorted(set(sample.target.flatten()) - {-1}):
            features.append(plain_means(patches, sample.target == class_id))
            names.append(class_id)
    np.testing.assert_allclose(bank.features.numpy(), features, atol=2e-5)
    assert bank.tensors["name"].tolist() == names and bank.names == ["road", "car", "sky", "grass"]

    segmenter = build_segmenter(
        model, spar_processor, "freeda", networks={"dino": second, "bank": tmp_path / "bank"}, settings=CHOSEN
    )
    encoded = segmenter.encode_labels(NAMES)
    texts = plain_texts(model, spar_processor, ["road", "car", "automobile", "sky", "grass"])
    keys = plain_texts(model, spar_processor, bank.names)[names]
    found = [np.argsort(-(keys @ text), kind="stable")[:NEIGHBOURS] for text in texts]
    prototypes = np.array(features)[np.array(found)].mean(axis=1)
    np.testing.assert_allclose(encoded.prototypes.numpy(), prototypes, atol=2e-5)

    images = pixels(size, batch=2)
    images = torch.nn.functional.avg_pool2d(images, 9, 1, 4)  # superpixels of some size
    maps = segmenter(images, encoded)
    net = PlainClip(make_clip(num_hidden_layers=2))
    expected = plain_freeda(net, second, images[1].double().numpy(), texts, prototypes, segmenter.config)
    np.testing.assert_allclose(maps[1](slice(0, 5)).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(maps[1](slice(1, 3)).numpy(), expected[1:3], atol=2e-5)
    (single,) = segmenter(images[:1], encoded)
    torch.testing.assert_close(single(slice(0, 5)), maps[0](slice(0, 5)), atol=2e-5, rtol=0)
    classes = np.stack([expected[0], expected[1:3].max(axis=0), expected[3], expected[4]])
    best = np.sort(classes, axis=0)
    sure = best[-1] - best[-2] > 1e-4
    assert sure.mean() > 0.9
    labels = label_map(maps[1], encoded.class_ids).numpy()
    np.testing.assert_array_equal(labels[sure], classes.argmax(axis=0)[sure])


def test_masks_come_to_a_grid_corner_on_corner():
    ids = torch.randint(0, 5, (13, 9), generator=torch.Generator().manual_seed(0))
    for grid in ((4, 5), (1, 3), (13, 9), (20, 2)):
        masks = torch.nn.functional.one_hot(ids, 5).permute(2, 0, 1)[None].double()
        expected = torch.nn.functional.interpolate(masks, size=grid, mode="bilinear", align_corners=True)[0]
        torch.testing.assert_close(corner_weights(ids, grid), expected.flatten(1).float(), atol=1e-6, rtol=0)


@torch.no_grad()
def test_a_bank_that_is_too_small_is_refused(make_spar, spar_processor, tmp_path):
    model, second = make_spar(num_hidden_layers=2), vit(8)
    given = {"networks": {"dino": second}, "settings": {"side_px": SIDE}}
    build_bank(tmp_path / "bank", "freeda", model, spar_processor, pictures(2), **given, progress=False)
    networks = {"dino": second, "bank": tmp_path / "bank"}
    with pytest.raises(ValueError, match=r"has 4 entries and neighbours is 350: all names .* --set neighbours=N"):
        build_segmenter(model, spar_processor, "freeda", networks=networks, settings={"side_px": SIDE})
    with pytest.raises(ValueError, match=r"was made with side_px=48 and is read with 64; make another one"):
        build_segmenter(model, spar_processor, "freeda", networks=networks, settings={"side_px": 64})
    with pytest.raises(ValueError, match=r"side_px of method 'freeda' is 50; .* multiple .* \(8 px\)"):
        build_segmenter(model, spar_processor, "freeda", networks=networks, settings={"side_px": 50})
