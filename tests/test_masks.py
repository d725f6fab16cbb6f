"""SAM prompted through the adapter against transformers called by hand, and regions of every source."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from second_networks import sam2_model, sam_model, small
from test_proxyclip import imagenet, spread
from torch.nn import functional as F

from spar_hf.networks import masks as masks_file
from spar_hf.networks.masks import (
    MaskFolder,
    Regions,
    SamRegions,
    SamSettings,
    SlicSettings,
    Superpixels,
    boxes_of,
    decode_rle,
    suppressed,
    unpack,
)
from spar_hf.networks.sam import Sam

MODELS = {"sam": spread(sam_model()), "sam2": spread(sam2_model())}
with torch.no_grad():
    for network in MODELS.values():  # logits of a spread well beyond one, as trained ones have
        for layers in network.mask_decoder.output_hypernetworks_mlps:
            layers.proj_out.weight *= 40


def seen_by_hand(kind: str, images: torch.Tensor, config) -> tuple[torch.Tensor, tuple[int, int]]:
    height, width = images.shape[2:]
    scale = 128 / max(height, width)
    size = (128, 128) if kind == "sam2" else (int(height * scale + 0.5), int(width * scale + 0.5))
    resized = F.interpolate(imagenet(images, config), size=size, mode="bilinear", antialias=True)
    return F.pad(resized, (0, 128 - size[1], 0, 128 - size[0])), size


def logits_by_hand(kind: str, low: torch.Tensor, size: tuple[int, int], image_hw: tuple[int, int]) -> torch.Tensor:
    if kind == "sam":
        low = F.interpolate(low, size=(128, 128), mode="bilinear")[..., : size[0], : size[1]]
    return F.interpolate(low, size=image_hw, mode="bilinear")


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_prompts_are_transformers_own(kind, make_vision, pixels, tmp_path):
    config, model = make_vision(num_hidden_layers=2).config, MODELS[kind]
    model.save_pretrained(tmp_path)
    sam, images = Sam(str(tmp_path)), pixels((60, 96))
    image = sam.encode(images, config)
    points = torch.tensor([[[10.0, 20.0]], [[70.0, 50.0]]])
    boxes = torch.tensor([[5.0, 10.0, 40.0, 30.0], [50.0, 20.0, 90.0, 59.0]])
    scores = torch.rand(60, 96, generator=torch.Generator().manual_seed(0))
    mask = sam.mask_prompt(scores, (60, 96))
    low, expected_iou = sam.prompted(image, points=points, boxes=boxes, mask=mask)
    assert low.shape == (2, 1, 32, 32)

    by_hand, size = seen_by_hand(kind, images, config)
    factor = torch.tensor([size[1] / 96, size[0] / 60])
    small_size = (32, 32) if kind == "sam2" else (round(size[0] / 4), round(size[1] / 4))
    prompt = F.interpolate(scores[None, None], size=small_size, mode="bilinear")
    prompt = F.pad(prompt, (0, 32 - small_size[1], 0, 32 - small_size[0]))
    output = model(
        by_hand,
        input_points=(points * factor)[None],
        input_labels=torch.ones(1, 2, 1, dtype=torch.int32),
        input_boxes=(boxes * factor.repeat(2))[None],
        input_masks=prompt,
        multimask_output=False,
    )
    torch.testing.assert_close(low, output.pred_masks[0], atol=1e-5, rtol=0)
    torch.testing.assert_close(expected_iou, output.iou_scores[0], atol=1e-5, rtol=0)
    found = sam.at_image_size(low, image)
    torch.testing.assert_close(found, logits_by_hand(kind, low, size, (60, 96)), atol=1e-5, rtol=0)
    halved, _ = sam.prompted(image, points=points / 2, boxes=boxes / 2, mask=mask, frame_hw=(30, 48))
    torch.testing.assert_close(halved, low, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("kind", "stability"), [("sam", 0.3), ("sam2", 0.5)])
@torch.no_grad()
def test_automatic_masks_are_those_of_a_plain_loop(kind, stability, make_vision, pixels, monkeypatch):
    config, model, images = make_vision(num_hidden_layers=2).config, MODELS[kind], pixels((64, 96))
    settings = SamSettings(points_per_side=5, min_iou=-10.0, min_stability=stability, max_box_iou=0.985)
    source = SamRegions(model, settings)
    monkeypatch.setattr("spar_hf.networks.sam.MASK_NUMBERS", 64 * 96 * 3 * 7)  # 7 points at a time
    found = source(images, config)

    by_hand, size = seen_by_hand(kind, images, config)
    candidates = []
    for row in range(5):
        for column in range(5):
            x, y = (column + 0.5) / 5 * size[1], (row + 0.5) / 5 * size[0]
            output = model(by_hand, input_points=torch.tensor([[[[x, y]]]]), multimask_output=True)
            logits = logits_by_hand(kind, output.pred_masks[0], size, (64, 96))[0].numpy()
            for logit, score in zip(logits, output.iou_scores[0, 0].tolist(), strict=True):
                if score > -10 and (logit > 1).sum() >= stability * max((logit > -1).sum(), 1):
                    candidates.append((score, logit > 0))
    kept: list[tuple[np.ndarray, np.ndarray]] = []
    for _, mask in sorted(candidates, key=lambda pair: -pair[0]):
        places = np.argwhere(mask)
        top, left = places.min(0) if len(places) else (0, 0)
        bottom, right = places.max(0) if len(places) else (0, 0)
        box = np.array([left, top, right, bottom], dtype=float)
        if all(overlap(box, other) <= 0.985 for other, _ in kept):
            kept.append((box, mask))
    assert 1 <= len(kept) < len(candidates) < 75
    assert found.masks.shape == (len(kept), 64, 96)
    differing = (found.masks.numpy() != np.stack([mask for _, mask in kept])).mean()
    assert differing < 1e-4  # logits that are zero up to rounding
    calls = []
    monkeypatch.setattr(source.sam, "encode", lambda *args: calls.append(args))
    assert source(images.clone(), config) is found and not calls


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    low, high = np.maximum(a[:2], b[:2]), np.minimum(a[2:], b[2:])
    shared = np.prod(np.maximum(high - low, 0))
    total = np.prod(a[2:] - a[:2]) + np.prod(b[2:] - b[:2]) - shared
    return shared / total if total else 0.0


@torch.no_grad()
def test_no_mask_is_no_error_and_soft_masks_are_logits(make_vision, pixels):
    config, images = make_vision(num_hidden_layers=2).config, pixels((64, 96))
    none = SamRegions(MODELS["sam"], SamSettings(points_per_side=2, min_iou=1e6))(images, config)
    assert none.masks.shape == (0, 64, 96) and not none.map.any()
    easy = {"points_per_side": 3, "min_iou": -10.0, "min_stability": 0.0}
    soft = SamRegions(MODELS["sam"], SamSettings(**easy, soft=True))(images, config)
    hard = SamRegions(MODELS["sam"], SamSettings(**easy))(images, config)
    assert torch.equal(soft.masks > 0, hard.masks) and soft.masks.max() <= 3
    one = SamRegions(MODELS["sam"], SamSettings(**easy, several=False, max_box_iou=1.0))(images, config)
    assert len(one.masks) == 9
    with pytest.raises(ValueError, match=r"image encoder alone; masks need a whole SamModel"):
        SamRegions(small("sam_vision"))(images, config)


def test_boxes_and_suppression():
    masks = torch.zeros(3, 6, 8, dtype=torch.bool)
    masks[0, 1:4, 2:7] = True
    masks[1, 5, 0] = True
    assert boxes_of(masks).tolist() == [[2, 1, 6, 3], [0, 5, 0, 5], [0, 0, 0, 0]]
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9], [20, 20, 30, 30], [0, 0, 10, 10]])
    assert suppressed(boxes, torch.tensor([0.5, 0.9, 0.1, 0.5]), 0.7).tolist() == [1, 2]
    assert suppressed(boxes, torch.tensor([0.5, 0.9, 0.1, 0.5]), 0.95).tolist() == [1, 0, 2]


def test_regions_are_maps_and_masks():
    ids = torch.tensor([[0, 5, 5], [2, 2, 5]])
    regions = Regions(ids=ids)
    assert regions.masks.tolist() == [[[0, 0, 0], [1, 1, 0]], [[0, 1, 1], [0, 0, 1]]]
    assert torch.equal(Regions(drawn=regions.masks).map, torch.tensor([[0, 2, 2], [1, 1, 2]]))
    overlapping = torch.tensor([[[1, 1, 1], [1, 1, 0]], [[0, 1, 0], [0, 0, 1]]], dtype=torch.bool)
    assert Regions(drawn=overlapping).map.tolist() == [[1, 1, 1], [1, 1, 2]]  # the large one lies over the small
    assert regions.at((4, 6)).ids.tolist()[0] == [0, 0, 5, 5, 5, 5] and regions.at((2, 3)) is regions
    expected = F.interpolate(ids[None, None].float(), size=(3, 7), mode="nearest-exact")[0, 0]
    assert torch.equal(regions.at((3, 7)).ids.float(), expected)
    assert Regions(drawn=overlapping.float()).at((4, 6)).masks.unique().numel() > 2


def pack(runs: list[int]) -> str:
    """COCO's packed form, from its description."""
    text = ""
    for number, run in enumerate(runs):
        value = run - runs[number - 2] if number > 2 else run
        while True:
            bits, value = value & 31, value >> 5
            more = value != (-1 if bits & 16 else 0)
            text += chr(48 + (bits | 32 * more))
            if not more:
                break
    return text


def runs_of(mask: np.ndarray) -> list[int]:
    runs, last = [0], False
    for value in mask.T.ravel():
        if value != last:
            runs.append(0)
            last = value
        runs[-1] += 1
    return runs


def test_coco_runs_both_ways():
    generator = np.random.default_rng(0)
    for height, width in ((1, 1), (7, 5), (90, 140)):
        mask = generator.random((height, width)) < 0.4
        mask[: height // 2] = mask[0, 0]  # long runs too
        runs = runs_of(mask)
        np.testing.assert_array_equal(decode_rle(runs, (height, width)), mask)
        assert unpack(pack(runs)) == runs
        np.testing.assert_array_equal(decode_rle(pack(runs), (height, width)), mask)
    # What the COCO API gives for the corner pixel of 2 x 2 and for a square inside 4 x 4.
    assert decode_rle("013", (2, 2)).tolist() == [[True, False], [False, False]]
    assert decode_rle("52203", (4, 4)).astype(int).sum() == 4


def test_a_folder_of_masks(tmp_path, make_vision, pixels):
    config, images = make_vision(num_hidden_layers=2).config, pixels((64, 96))
    ids = np.arange(8 * 12).reshape(8, 12) * 100
    Image.fromarray(ids.astype(np.uint16)).save(tmp_path / "wide.png")
    mask = np.zeros((8, 12), dtype=bool)
    mask[2:5, 3:9] = True
    entry = {"segmentation": {"size": [8, 12], "counts": pack(runs_of(mask))}, "area": 18}
    (tmp_path / "list.json").write_text(json.dumps([entry]))
    (tmp_path / "sa.json").write_text(json.dumps({"image": {}, "annotations": [entry, entry]}))
    (tmp_path / "empty.json").write_text("[]")
    folder = MaskFolder(tmp_path)
    with pytest.raises(ValueError, match="before a picture is named"):
        folder(images, config)
    folder.select("pictures/wide.jpg", (8, 12))
    assert torch.equal(
        folder(images, config).map, torch.from_numpy(ids).repeat_interleave(8, 0).repeat_interleave(8, 1)
    )
    folder.select("list.jpg", (8, 12))
    assert folder(images, config).masks.sum() == 18 * 64
    folder.select("sa.jpg", (8, 12))
    assert folder(images, config).masks.shape == (2, 64, 96)
    folder.select("empty.jpg", (8, 12))
    assert folder(images, config).masks.shape == (0, 64, 96)


def test_bad_masks_are_named_in_one_line(tmp_path):
    with pytest.raises(ValueError, match=r"--masks .*none is no folder; give one that holds NAME.png"):
        MaskFolder(tmp_path / "none")
    folder = MaskFolder(tmp_path)
    Image.new("RGB", (12, 8)).save(tmp_path / "rgb.png")
    Image.new("L", (12, 9)).save(tmp_path / "size.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n....")
    whole = {"size": [8, 12], "counts": [96]}
    texts = {
        "polygon": [{"segmentation": [[1, 2, 3, 4]]}],
        "turned": [{"segmentation": {"size": [12, 8], "counts": [96]}}],
        "short": [{"segmentation": {"size": [8, 12], "counts": [95]}}],
        "negative": [{"segmentation": {"size": [8, 12], "counts": [100, -4]}}],
        "packed": [{"segmentation": {"size": [8, 12], "counts": "\u20ac"}}],
        "nothing": {"annotation": [{"segmentation": whole}]},
        "number": 5,
    }
    for name, content in texts.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "text.json").write_text("{")
    for name, message in {
        "rgb": "is a picture of mode RGB; a map of regions has one number a pixel",
        "size": r"size.png is 9x12 px \(height x width\) and its picture 8x12; masks must have the picture's own size",
        "broken": "broken.png can't be read as a PNG",
        "missing": r"missing.jpg has no masks: neither .*missing.png nor .*missing.json is there",
        "polygon": r"polygon.json is not a list of",
        "turned": "turned.json is 12x8 px",
        "short": "short.json: mask 0 is no COCO RLE of its size .its runs cover 95 pixels of 96",
        "negative": "negative.json: mask 0 is no COCO RLE",
        "packed": "packed.json: mask 0 is no COCO RLE of its size .character",
        "nothing": "nothing.json is not a list of",
        "number": "number.json is not a list of",
        "text": "text.json is not a list of",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            folder.select(f"{name}.jpg", (8, 12))
        assert "\n" not in str(caught.value)


def test_superpixels_follow_colours(make_vision, monkeypatch):
    config = make_vision(num_hidden_layers=2).config
    image = torch.full((1, 3, 64, 96), -1.0)
    image[..., 40:] = 1.5
    regions = Superpixels(SlicSettings(segments=20))(image, config)
    assert regions.map.shape == (64, 96) and 5 < len(regions.masks) < 40 and regions.map.min() == 1
    for mask in regions.masks:
        columns = mask.any(dim=0).nonzero()
        assert columns.max() < 40 or columns.min() >= 40
    monkeypatch.setitem(__import__("sys").modules, "skimage.segmentation", None)
    with pytest.raises(ValueError, match=r'skimage is needed and not installed; run: pip install "spar-hf\[vfm\]"'):
        Superpixels()(image, config)
    assert masks_file.__doc__
