"""Regions drawn anew by SAM, against the authors' steps written plainly."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from second_networks import networks_for, small
from test_masks import MODELS, logits_by_hand, seen_by_hand
from torch.nn import functional as F

from spar_hf import build_segmenter
from spar_hf.networks.sam import Sam
from spar_hf.refinement.sam_prompts import Settings, redrawn
from spar_hf.segmentation_spar import GridScores, label_map


def flood(mask: np.ndarray) -> list[np.ndarray]:
    """The 8-connected regions of a mask."""
    left, found = mask.copy(), []
    while left.any():
        region, front = np.zeros_like(mask), [tuple(np.argwhere(left)[0])]
        while front:
            y, x = front.pop()
            if 0 <= y < mask.shape[0] and 0 <= x < mask.shape[1] and left[y, x]:
                left[y, x], region[y, x] = False, True
                front += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
        found.append(region)
    return found


def plain(kind, labels, classes, pixels, config, settings) -> torch.Tensor:
    """`classes` (C, H, W): the probabilities."""
    model, size_hw = MODELS[kind], labels.shape
    half = (size_hw[0] // 2, size_hw[1] // 2)
    coarse = F.interpolate(classes[None], size=half, mode="bilinear")[0]
    small_labels = F.interpolate(labels[None, None].float(), size=half, mode="nearest")[0, 0].long()
    small_labels[coarse.amax(0) < settings.coarse] = -1
    whole = tuple(-(-side // 16) * 16 for side in pixels.shape[2:])
    stretched = F.interpolate(pixels, size=whole, mode="bilinear")
    seen, resized = seen_by_hand(kind, stretched, config)
    scores, inside = torch.zeros(classes.shape), torch.zeros(classes.shape, dtype=torch.bool)
    for number, own in enumerate(coarse):
        kept = [r for r in flood((small_labels == number).numpy()) if r.sum() >= settings.min_pixels]
        for region in kept:
            places = np.argwhere(region)
            y, x = max(places.tolist(), key=lambda p: own[p[0], p[1]].item())
            (top, left), (bottom, right) = places.min(0), places.max(0)
            frame = (128, 128) if kind == "sam2" else tuple(int(s * 128 / max(half) + 0.5) for s in half)
            factor = torch.tensor([frame[1] / half[1], frame[0] / half[0]])
            small_size = (32, 32) if kind == "sam2" else tuple(int(s * 32 / max(size_hw) + 0.5) for s in size_hw)
            prompt = F.interpolate(own[None, None], size=small_size, mode="bilinear")
            prompt = F.pad(prompt, (0, 32 - small_size[1], 0, 32 - small_size[0]))
            output = model(
                seen,
                input_points=(torch.tensor([x, y]) * factor).view(1, 1, 1, 2),
                input_labels=torch.ones(1, 1, 1, dtype=torch.int32),
                input_boxes=(torch.tensor([left, top, right, bottom]) * factor.repeat(2)).view(1, 1, 4),
                input_masks=torch.where(prompt > settings.coarse, settings.mask_factor * prompt, 0.0),
                multimask_output=False,
            )
            if output.iou_scores.item() <= settings.min_iou:
                continue
            logits = logits_by_hand(kind, output.pred_masks[0], resized, whole)
            logits = F.interpolate(logits, size=tuple(size_hw), mode="bilinear")[0, 0]
            # Inside the union of the masks, the largest over all of them: a mask's own outside counts too.
            scores[number] = torch.maximum(scores[number], logits.sigmoid() * classes[number])
            inside[number] |= logits > 0
    scores = scores * inside
    return torch.where(scores.sum(0) == 0, labels, scores.argmax(0))


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("size", [(96, 128), (75, 100)])
@torch.no_grad()
def test_equals_the_authors_steps(kind, size, make_vision, pixels):
    config, images = make_vision(num_hidden_layers=2).config, pixels((60, 80))
    generator = torch.Generator().manual_seed(3)
    maps = GridScores.of(torch.randn(5, 4, 5, generator=generator) * 0.05, size)
    class_ids = torch.tensor([0, 0, 1, 2, -1])
    logits = 40 * F.interpolate(maps.scores[None], size=size, mode="bilinear")[0]
    names = logits.softmax(0)
    classes = torch.stack([names[:2].amax(0), names[2], names[3]])
    labels = label_map(maps, class_ids, background_threshold=0.3).long()
    for settings in (Settings(min_pixels=20, min_iou=-10), Settings(0.35, 40, 0.5, -10), Settings(min_iou=1e3)):
        image = SimpleNamespace(pixel_values=images, network=SimpleNamespace(config=config))
        found = redrawn(labels, image=image, settings=settings, maps=maps, class_ids=class_ids, sam=Sam(MODELS[kind]))
        expected = plain(kind, labels, classes, images, config, settings)
        assert (found != expected).float().mean() < 1e-3  # ties up to rounding
        assert torch.equal(found, labels) == (settings.min_iou > 100)


@torch.no_grad()
def test_any_method_takes_it_and_shares_its_sam(make_spar, spar_processor, pixels):
    model, images = make_spar(num_hidden_layers=3), pixels((96, 128))
    chosen = {"sam.min_pixels": 10, "sam.min_iou": -10.0, "sam.coarse": 0.05}
    for method in (None, "naclip", "trident", "lposs"):
        networks = {**networks_for(method), "sam": MODELS["sam"]}
        segmenter = build_segmenter(model, spar_processor, method, networks=networks, refine=["sam"], settings=chosen)
        encoded = segmenter.encode_labels("car; tree; sky", ["a photo of a {}"])
        (maps,) = segmenter(images, encoded)
        labels = label_map(maps.at((100, 140)), encoded.class_ids)
        assert labels.shape == (100, 140) and labels.dtype == torch.int32
        assert len(maps.corrections) == 1
        assert segmenter.further["sam"] in segmenter.networks and "sam_prompts" not in repr(segmenter)
    trident = build_segmenter(
        model, spar_processor, "trident", networks={**networks_for("trident"), "sam": MODELS["sam"]}, refine=["sam"]
    )
    assert trident.segmenter.encoder.sam is trident.further["sam"]


def test_what_is_missing_or_wrong_is_named(make_spar, spar_processor, pixels):
    model = make_spar(num_hidden_layers=3)
    with pytest.raises(ValueError, match="is a ViTModel; give a SAM or SAM 2"):
        build_segmenter(model, spar_processor, refine=["sam"], networks={"sam": small("dino")})
    segmenter = build_segmenter(
        model,
        spar_processor,
        refine=["sam"],
        networks={"sam": small("sam_vision")},
        settings={"sam.min_pixels": 1, "sam.coarse": 0.01},
    )
    encoded = segmenter.encode_labels("car; tree", ["a photo of a {}"])
    (maps,) = segmenter(pixels((64, 96)), encoded)
    with pytest.raises(ValueError, match="image encoder alone; masks need a whole SamModel"):
        label_map(maps, encoded.class_ids)
