"""LaVG against dense eigenvectors, a DenseCRF for each mask and features of every pixel."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from plain_clip import PlainClip, sclip, unit
from plain_vfm import bilinear, starts
from scipy import ndimage, sparse
from scipy.linalg import eigh
from test_proxyclip import dino, imagenet, vit

from spar_hf import METHODS, build_segmenter
from spar_hf.methods import lavg
from spar_hf.methods.lavg import Settings, cuts, drawn_anew, second_eigenvector
from spar_hf.prompts_spar import Labels
from spar_hf.refinement.dense_crf import Settings as CrfSettings
from spar_hf.refinement.dense_crf import dense_crf
from spar_hf.segmentation_spar import label_map

LABELS = "other, nothing; car; grass, sea; dog; house, tree"
# Random keys are much alike; a graph with exactly one way to be cut best, and colours that the DenseCRF follows.
SMALL = {
    "side_px": 72,
    "min_cosine": 0.94,
    "cuts": 3,
    "near_weight": 1.0,
    "near_px": 2.0,
    "alike_weight": 0.8,
    "alike_px": 8.0,
}


def plain_vector(tied: np.ndarray, loose: float = 1e-5) -> np.ndarray:
    a = np.where(tied, 1.0, loose)
    d = np.diag(a.sum(axis=1))
    u = eigh(d - a, d)[1][:, 1]
    return u if u[np.abs(u).argmax()] > 0 else -u


def plain_cuts(keys: np.ndarray, grid: tuple[int, int], min_cosine: float, most: int = 8) -> list[np.ndarray]:
    cosine = unit(keys) @ unit(keys).T
    free, masks = list(range(len(keys))), []
    while len(masks) < most and (not masks or len(free) > 5):
        u = plain_vector(cosine[np.ix_(free, free)] > min_cosine)
        e = {n: np.abs(u).min() for n in range(len(keys))} | dict(zip(free, u, strict=True))
        inside = {n for n, value in zip(free, u, strict=True) if value > u.mean()}
        last = len(keys) - 1
        corners = len(inside & {0, grid[1] - 1, last - grid[1] + 1, last})
        seed = max(e, key=lambda n: abs(e[n]))
        if corners >= 3 or seed not in inside:
            e = {n: -value for n, value in e.items()}
            inside = set(free) - inside
        part = [max(e, key=lambda n: e[n])]
        for n in part:
            y, x = divmod(n, grid[1])
            for v, w in ((y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)):
                m = v * grid[1] + w
                if 0 <= v < grid[0] and 0 <= w < grid[1] and m in inside and m not in part:
                    part.append(m)
        mask = np.zeros(len(keys), dtype=bool)
        mask[part] = True
        masks.append(mask.reshape(grid))
        free = [n for n in free if n not in part]
    return masks


def plain_masks(second, image: np.ndarray, config, settings: Settings) -> list[np.ndarray]:
    """(H, W) each, of one image (3, H, W); the last is what lies in none."""
    side, patch = settings.side_px, second.config.patch_size
    mean, std = (np.array(v)[:, None, None] for v in (config.image_mean, config.image_std))
    colours = ((image * std + mean).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    square = np.array(Image.fromarray(colours).resize((side, side), Image.Resampling.LANCZOS))
    seen = torch.from_numpy((square.transpose(2, 0, 1) / 255 - mean) / std).float()[None]
    kept = []
    hook = second.layers[-1].attention.k_proj.register_forward_hook(lambda m, a, out: kept.append(out))
    dino(second, imagenet(seen, config))
    hook.remove()
    masks = []
    for mask in plain_cuts(kept[0][0, 1:].double().numpy(), (side // patch,) * 2, settings.min_cosine, settings.cuts):
        large = mask.repeat(patch, 0).repeat(patch, 1)
        odds = np.exp(np.stack([1.0 - large, large]))
        field = CrfSettings(
            settings.steps,
            settings.near_weight,
            settings.near_px,
            settings.alike_weight,
            settings.alike_px,
            settings.alike_colour,
        )
        found = dense_crf(torch.from_numpy(odds / odds.sum(axis=0)), torch.from_numpy(square), field)
        filled = ndimage.binary_fill_holes((found[1] > found[0]).numpy())
        if (filled & large).sum() / max((filled | large).sum(), 1) < settings.min_iou:
            filled[:] = False
        grey = Image.fromarray(filled.astype(np.uint8) * 255).resize((image.shape[2], image.shape[1]))
        masks.append(np.array(grey) > np.array(grey).max() / 2)
    return [*masks, ~np.any(masks, axis=0)]


def plain_lavg(net, masks, image: np.ndarray, text: np.ndarray, foreground=None) -> np.ndarray:
    """(K, H, W) in windows of 64 px, step 32."""
    height, width = image.shape[1:]
    total, count = np.zeros((len(text), height, width)), np.zeros((height, width))
    side = (min(height, 64), min(width, 64))
    for y in starts(height, 64, 32):
        for x in starts(width, 64, 32):
            part = (slice(y, y + side[0]), slice(x, x + side[1]))
            tokens, grid = net.embed(image[:, part[0], part[1]], "offset")
            features = unit(net.project(sclip(net, net.inputs(tokens), grid)[1:]))
            features = bilinear(features.T.reshape(-1, *grid), side)
            scores = np.einsum("dyx,kd->kyx", features, text)
            for mask in masks[::-1]:
                if mask[part].any():
                    scores[:, mask[part]] = (text @ features[:, mask[part]].mean(axis=1))[:, None]
            if foreground is not None and masks[-1][part].any():
                scores[np.ix_(foreground, *[range(n) for n in side])] = np.where(
                    masks[-1][part], scores.min(), scores[foreground]
                )
            total[(slice(None), *part)] += scores
            count[part] += 1
    return total / count


@pytest.fixture(scope="module")
def spar(make_spar, spar_processor):
    return make_spar(num_hidden_layers=2), spar_processor


@pytest.mark.parametrize(
    ("size", "patch_px", "settings"),
    [
        ((64, 64), 8, {}),
        ((112, 128), 8, {"cuts": 2}),
        ((64, 96), 8, {"empty_rest": True, "min_iou": 0.8}),
        ((90, 75), 12, {"empty_rest": True, "cuts": 2}),  # off the grid
        ((48, 100), 8, {"min_cosine": 0.92}),
    ],
)
@torch.no_grad()
def test_lavg_equals_its_plain_formulation(size, patch_px, settings, spar, make_clip, pixels):
    settings, second = Settings(**{**SMALL, **settings}), vit(patch_px)
    images = torch.nn.functional.avg_pool2d(
        pixels(size, batch=2), 5, stride=1, padding=2
    )  # colours that hang together
    chosen = {name: getattr(settings, name) for name in Settings.__dataclass_fields__}
    segmenter = build_segmenter(*spar, "lavg", networks={"dino": second}, settings=chosen)
    encoded = segmenter.encode_labels(replace(Labels.parse(LABELS), background=0), ["a photo of a {}"])
    found = segmenter(images, encoded)
    image, text = images[1].double().numpy(), encoded.text_embeds.double().numpy()
    masks = plain_masks(second, image, segmenter.config, settings)
    assert np.array_equal(segmenter.masks(images[1:]).numpy(), np.stack(masks[:-1]))
    assert sum(mask.any() for mask in masks) > 1
    net, foreground = PlainClip(make_clip(num_hidden_layers=2)), list(range(2, len(text)))
    expected = plain_lavg(net, masks, image, text, foreground if settings.empty_rest else None)
    np.testing.assert_allclose(found[1](slice(0, len(text))).numpy(), expected, atol=2e-5)
    np.testing.assert_allclose(found[1](slice(2, 4)).numpy(), expected[2:4], atol=2e-5)
    (single,) = segmenter(images[:1], encoded)
    torch.testing.assert_close(single(slice(0, 4)), found[0](slice(0, 4)), atol=2e-5, rtol=0)
    larger = (size[0] * 3 // 2, size[1] * 2)
    ranked = np.sort(bilinear(expected, larger), axis=0)
    decided = torch.from_numpy(ranked[-1] - ranked[-2] > 1e-4)
    ids = torch.tensor(encoded.labels.class_ids)
    labels = label_map(found[1].at(larger), ids)
    winner = ids[torch.from_numpy(bilinear(expected, larger).argmax(axis=0))]
    assert decided.any() and torch.equal(labels[decided].long(), winner[decided])


def test_the_sparse_eigenvector_is_the_dense_one():
    generator = np.random.default_rng(0)
    for count, groups in ((600, 3), (900, 7)):
        vectors = generator.standard_normal((groups, 12))[generator.integers(0, groups, count)]
        vectors = unit(vectors + 0.9 * generator.standard_normal((count, 12)))
        tied = vectors @ vectors.T > 0.3
        assert count > lavg.DENSE_PATCHES
        found = second_eigenvector(sparse.csr_array(tied), 1e-5)
        expected = plain_vector(tied)
        scale = np.linalg.norm(expected) / np.linalg.norm(found)
        np.testing.assert_allclose(scale * found, expected, atol=1e-8 * np.abs(expected).max() * count)


def test_cuts_share_no_patch_and_end(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    keys = torch.nn.functional.normalize(torch.randn(12 * 9, 6, generator=generator), dim=-1)
    masks = cuts(keys, (12, 9), Settings(cuts=50))
    assert len(masks) > 8 and masks.sum(axis=0).max() == 1 and (masks.sum(axis=0) == 0).sum() <= 5
    monkeypatch.setattr(lavg, "ROW_NUMBERS", 300)
    assert np.array_equal(cuts(keys, (12, 9), Settings(cuts=50)), masks)
    assert np.array_equal(cuts(keys, (12, 9), Settings(cuts=4)), masks[:4])
    alike = torch.ones(9, 6) / 6**0.5  # nothing to tell apart
    assert cuts(alike, (3, 3), Settings()).sum(axis=0).max() == 1


def test_two_labels_are_one_number():
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 1, 5, 5, generator=generator) > 0.5
    masks = torch.nn.functional.interpolate(masks.float(), size=(30, 30))[:, 0] > 0.5
    colours = torch.randint(0, 256, (30, 30, 3), generator=generator).float()
    settings = Settings(**SMALL)
    field = CrfSettings(10, 1.0, 2.0, 0.8, 8.0, 5.0)
    for mask, found in zip(masks, drawn_anew(masks, colours, settings), strict=True):
        odds = torch.stack([~mask, mask]).float().exp()
        both = dense_crf(odds / odds.sum(dim=0), colours, field)
        unsure = (both[1] - both[0]).abs() < 1e-5
        assert torch.equal((both[1] > both[0]) | unsure, found | unsure)


def test_mistakes_say_what_to_do(spar, pixels):
    with pytest.raises(ValueError, match=r"side_px of method 'lavg' is 100; it must be a multiple .* patch \(8 px\)"):
        build_segmenter(*spar, "lavg", networks={"dino": vit(8)}, settings={"side_px": 100})
    segmenter = build_segmenter(*spar, "lavg", networks={"dino": vit(8)}, settings={**SMALL, "empty_rest": True})
    with pytest.raises(ValueError, match="empty_rest is for a vocabulary with a background; name one"):
        segmenter(pixels("native"), segmenter.encode_labels("car; sky"))
    with pytest.raises(ValueError, match=r"method 'lavg': there is no network 'sam'; choose one of dino"):
        build_segmenter(*spar, "lavg", networks={"sam": vit(8)})
    assert METHODS["lavg"].kind == "label" and METHODS["lavg"].window_for(224, 16) == (224, 112)
