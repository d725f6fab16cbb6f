"""Every refinement against its plain formulation; how they compose; batches; mistakes."""

from __future__ import annotations

import importlib.util
import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import plain_refinement as plain
import pytest
import torch
from conftest import SIZES_HW
from families import spar_dinov3, spar_siglip
from plain_clip import PlainClip
from scipy import ndimage
from second_networks import networks_for
from sklearn.cluster import DBSCAN
from torch.nn import functional as F

from spar_hf import (
    REFINEMENTS,
    FromFeatures,
    Refined,
    SlidingScores,
    SlidingWindow,
    build_encoder,
    build_segmenter,
    floss_templates,
    label_map,
    segmentation_spar,
)
from spar_hf.grid_spar import axis_positions
from spar_hf.processing_spar import LabelFeatures
from spar_hf.prompts_spar import IMAGENET_TEMPLATES, Labels
from spar_hf.refinement import cluster_vote, floss, pamr, scores, tagclip, views
from spar_hf.refinement.clip_internals import ClipInternals, Scene
from spar_hf.refinement.refined import ExpertFeatures
from spar_hf.segmenters import sliding_scores

LABELS = "road; car, automobile; sky; tree; dog"
NUM_NAMES = 6
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_cosines(size_hw: tuple[int, int], names: int = NUM_NAMES) -> torch.Tensor:
    """Smooth score maps (K, h, w) with the spread that CLIP's cosines have."""
    coarse = rand(1, names, 3, 3, seed=size_hw[0])
    return 0.2 + 0.03 * F.interpolate(coarse, size=size_hw, mode="bilinear", align_corners=True)[0]


@pytest.fixture(scope="module")
def text_embeds() -> torch.Tensor:
    return F.normalize(rand(NUM_NAMES, 24, seed=5), dim=-1)


@pytest.fixture(scope="module")
def class_ids() -> torch.Tensor:
    return torch.tensor([0, 1, 1, 2, 3, 4])


@pytest.fixture
def tapped(make_spar, pixels):
    """`tapped("off_grid", layers=6)`: one image, and the same through the plain network: its tokens of each block."""

    def make(size: str, layers: int = 6):
        model = make_spar(num_hidden_layers=layers)
        images = pixels(size)
        return ClipInternals(model, images), images[0].double().numpy()

    return make


@pytest.fixture
def plain_states(make_clip):
    def make(image: np.ndarray, layers: int = 6):
        net = PlainClip(make_clip(num_hidden_layers=layers))
        tokens, grid_hw = net.embed(image, "offset")
        return net, net.inputs(tokens), grid_hw

    return make


def settings_of(name: str):
    return REFINEMENTS[name].settings


@pytest.fixture
def scene(text_embeds, class_ids):
    """`scene(image)`: what a refinement of scores may know."""

    def make(image=None, ids=class_ids, background=None) -> Scene:
        return Scene(image, text_embeds, ids, background)

    return make


def few_maps(monkeypatch, names: int, size_hw: tuple[int, int]) -> None:
    """So many names at a time."""
    monkeypatch.setitem(segmentation_spar.MAP_NUMBERS, "cpu", names * size_hw[0] * size_hw[1])


# --- each option -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_hw", [(24, 24), (19, 37), (40, 21)])
def test_pamr(size_hw):
    maps, image = rand(3, *size_hw), rand(3, *size_hw, seed=1)
    image[:, :5, :5] = 1.0  # a flat corner: nothing to tell its pixels apart
    refined = pamr.pamr(lambda names: maps[names], image, pamr.Settings())
    expected = plain.pamr(maps.double().numpy(), image.double().numpy())
    np.testing.assert_allclose(refined(slice(0, 3)).numpy(), expected, **TOLERANCE)
    np.testing.assert_allclose(refined(slice(1, 2)).numpy(), expected[1:2], **TOLERANCE)
    assert np.abs(expected - maps.numpy()).max() > 0.5


@pytest.mark.parametrize("size_hw", [(4, 4), (3, 7)])
def test_prompt_denoising(size_hw, scene, class_ids):
    cosines = random_cosines(size_hw)
    cosines[3:5] -= 0.05
    found = scores.prompt_denoising(cosines, scene(), settings_of("prompt-denoising"))
    expected = plain.prompt_denoising(cosines.double().numpy(), class_ids.tolist())
    np.testing.assert_allclose(found.numpy(), expected, **TOLERANCE)
    assert 0 < (expected[:, 0, 0] == -100).sum() < NUM_NAMES
    unsure = torch.full_like(cosines, 0.2)
    torch.testing.assert_close(scores.prompt_denoising(unsure, scene(), settings_of("prompt-denoising")), unsure)


@pytest.mark.parametrize("size", SIZES_HW)
def test_key_smoothing(size, tapped, plain_states, scene):
    image, array = tapped(size)
    net, states, grid_hw = plain_states(array)
    cosines = random_cosines(grid_hw)
    cosines[2, 0, 0] = 3.0  # one patch is certain, and keeps its probabilities
    keys = np.concatenate(net.heads(net.num_layers - 1, states[-2], "k"), axis=-1)[1:]
    keys = net.linear(f"vision_model.encoder.layers.{net.num_layers - 1}.self_attn.out_proj", keys)
    expected = plain.key_smoothing(cosines.double().numpy(), keys)
    found = scores.key_smoothing(cosines, scene(image), settings_of("key-smoothing"))
    np.testing.assert_allclose(found.numpy(), expected, **TOLERANCE)
    assert found[2, 0, 0] == 1


@pytest.mark.parametrize("size", SIZES_HW)
def test_redundancy_removal(size, tapped, plain_states, text_embeds, scene):
    image, array = tapped(size)
    net, states, grid_hw = plain_states(array)
    class_embed = plain.unit(net.project(states[-1][:1]))[0]
    patches = F.normalize(rand(*grid_hw, 24), dim=-1)
    cosines = torch.einsum("kd,ijd->kij", text_embeds, patches)
    expected = plain.redundancy_removal(patches.double().numpy(), text_embeds.double().numpy(), class_embed)
    found = scores.redundancy_removal(cosines, scene(image), settings_of("redundancy-removal"))
    np.testing.assert_allclose(found.numpy(), expected, **TOLERANCE)


@pytest.mark.parametrize("background", [None, 1])
@pytest.mark.parametrize("layers", [12, 6])
@pytest.mark.parametrize("size", SIZES_HW)
def test_tagclip(size, layers, background, tapped, plain_states, text_embeds, class_ids, scene):
    image, array = tapped(size, layers)
    net, states, grid_hw = plain_states(array, layers)
    cosines = 4 * random_cosines(grid_hw)
    covered = array[:, : grid_hw[0] * net.patch_px, : grid_hw[1] * net.patch_px]
    arrays = (cosines.double().numpy(), text_embeds.double().numpy())
    settings = (class_ids.tolist(), image.logit_scale, 64, "offset", background)
    expected = plain.tagclip(net, states, covered, *arrays, *settings)
    columns, num_classes = tagclip.columns_of(class_ids, background)
    found = tagclip.class_scores(cosines, scene(image), columns, num_classes, 0.5)
    np.testing.assert_allclose(found.numpy(), list(expected.values()), **TOLERANCE)
    # The classes above the middle of the scores stay, and so does the background, whatever its score.
    kept = tagclip.reidentification(cosines, scene(image, background=background), tagclip.Settings())[:, 0, 0] > -50
    middle = (min(expected.values()) + max(expected.values())) / 2
    assert kept.tolist() == [label == background or expected[label] > middle for label in class_ids.tolist()]


def test_tagclip_keeps_all_names_of_a_class_that_is_there(tapped, scene, class_ids, monkeypatch):
    image, _ = tapped("native")
    cosines = random_cosines((4, 4))
    monkeypatch.setattr(tagclip, "class_scores", lambda *_: torch.tensor([0.1, 0.9, 0.6, 0.49, 0.0]))
    found = tagclip.reidentification(cosines, scene(image), tagclip.Settings())
    kept = torch.tensor([False, True, True, True, True, False])
    torch.testing.assert_close(found[kept], cosines[kept])
    assert (found[~kept] == -100).all()
    nothing_else = tagclip.reidentification(cosines, scene(image, torch.zeros_like(class_ids), 0), tagclip.Settings())
    torch.testing.assert_close(nothing_else, cosines)


def test_component_boxes():
    masks = rand(40, 9, 14) > 0.9
    for mask, found in zip(masks.numpy(), tagclip.component_boxes(masks).numpy(), strict=True):
        expected = np.zeros_like(mask)
        components, _ = ndimage.label(mask, structure=np.ones((3, 3)))
        for rows, columns in ndimage.find_objects(components):
            expected[rows.start : min(rows.stop, 8), columns.start : min(columns.stop, 13)] = True
        np.testing.assert_array_equal(found, expected)
    assert not tagclip.component_boxes(torch.zeros(2, 3, 4, dtype=torch.bool)).any()


@pytest.mark.parametrize("layers", [12, 6])
@pytest.mark.parametrize("size", SIZES_HW)
def test_self_correlation(size, layers, tapped, plain_states):
    image, array = tapped(size, layers)
    net, states, _ = plain_states(array, layers)
    found = image.self_correlation(cluster_vote.Settings().block)
    np.testing.assert_allclose(found.numpy(), plain.self_correlation(net, states), **TOLERANCE)


@pytest.mark.parametrize("eps, neighbours", [(0.15, 4), (0.25, 4), (0.3, 12), (0.01, 2), (5.0, 3)])
def test_dbscan_equals_scikit_learns(eps, neighbours):
    points = rand(300, 2) * rand(300, 1, seed=1).sign() + (rand(300, 1, seed=2) > 0)  # uneven, so borders and noise
    expected = DBSCAN(eps=eps, min_samples=neighbours).fit_predict(points.numpy())
    np.testing.assert_array_equal(cluster_vote.dbscan(points, eps, neighbours).numpy(), expected)


def test_median_equals_scipys():
    maps = rand(3, 11, 20)
    expected = np.stack([ndimage.median_filter(single, size=7) for single in maps.numpy()])
    np.testing.assert_array_equal(cluster_vote.median(maps, 7).numpy(), expected)


def test_cluster_vote_settings_are_the_authors_at_their_sizes():
    assert cluster_vote.Settings().dbscan(196) == (pytest.approx(0.7), 3)
    assert cluster_vote.Settings().dbscan(441) == (pytest.approx(1.1), 7)
    sides = [cluster_vote.Settings().dbscan(n * n) for n in (2, 8, 14, 18, 21, 40)]
    assert sides == sorted(sides) and sides[0][0] > 0 and sides[0][1] >= 1


@pytest.mark.parametrize("size", SIZES_HW)
def test_cluster_vote(size, tapped, plain_states, monkeypatch):
    image, array = tapped(size)
    net, states, grid_hw = plain_states(array)
    correlation = plain.self_correlation(net, states)
    rows = np.maximum(correlation[1:, 1:] - correlation[0, 1:], 0)
    distances = np.unique(np.linalg.norm(rows[:, None] - rows, axis=-1).round(5))
    near = distances[: len(distances) // 4]  # a random network's rows are further apart than CLIP's
    gap = np.diff(near)[len(near) // 2 :].argmax() + len(near) // 2
    eps = float(near[gap : gap + 2].mean())  # in the widest gap, away from rounding
    monkeypatch.setattr(cluster_vote.Settings, "dbscan", lambda self, n: (eps, 2))
    height, width = array.shape[1:]
    labels = torch.randint(0, 4, (height, width), generator=torch.Generator().manual_seed(0), dtype=torch.int32) - 1
    coverage_hw = (height / (16 * grid_hw[0]), width / (16 * grid_hw[1]))
    expected = plain.cluster_vote(labels.numpy(), correlation, grid_hw, eps, 2, coverage_hw)
    found = cluster_vote.cluster_vote(labels, image, cluster_vote.Settings())
    assert found.dtype == torch.int32
    assert (found.numpy() != expected).mean() < 2e-3  # pixels where two clusters' maps are equal to the last digit
    assert (expected != labels.numpy()).any()


def test_without_clusters_nobody_votes(tapped, monkeypatch):
    image, _ = tapped("native")
    monkeypatch.setattr(cluster_vote.Settings, "dbscan", lambda self, n: (1e-9, 2))
    labels = torch.arange(64 * 64, dtype=torch.int32).view(64, 64)
    torch.testing.assert_close(cluster_vote.cluster_vote(labels, image, cluster_vote.Settings()), labels)


@pytest.mark.parametrize("size_hw", [(32, 48), (23, 41)])
def test_blur_and_greyscale(size_hw):
    images = rand(2, 3, *size_hw)
    kernel = np.exp(-0.5 * (np.arange(-5, 6) / 5) ** 2)
    expected = images.double().numpy()
    for axis in (2, 3):
        expected = ndimage.correlate1d(expected, kernel / kernel.sum(), axis=axis, mode="mirror")
    np.testing.assert_allclose(views.blur(images, views.EngineeringSettings()).numpy(), expected, atol=1e-5)
    luma = 0.2989 * images[:, 0] + 0.587 * images[:, 1] + 0.114 * images[:, 2]
    torch.testing.assert_close(views.greyscale(images), torch.stack([luma] * 3, dim=1))


@pytest.mark.parametrize("names", [["flip"], ["image-engineering"], ["flip", "image-engineering"]])
@pytest.mark.parametrize("size", SIZES_HW)
@torch.no_grad()
def test_views_average_the_logits_of_the_paper(size, names, make_spar, pixels, text_embeds):
    model = make_spar(num_hidden_layers=2)
    images = pixels(size)
    height, width = (side // 16 * 16 for side in images.shape[2:])
    whole = images[..., :height, :width]

    def logits(pixel_values: torch.Tensor) -> torch.Tensor:
        """At the size of the pixels, (K, H, W)."""
        features = F.normalize(model.vision_model(pixel_values).patch_embeds, dim=-1)[0]
        grid = torch.einsum("kd,ijd->kij", text_embeds, features)
        return F.interpolate(grid[None], size=(height, width), mode="bilinear", align_corners=False)[0]

    expected = logits(images)
    if "image-engineering" in names:
        expected = (
            expected + logits(views.greyscale(images)) + logits(views.blur(images, views.EngineeringSettings()))
        ) / 3
    if "flip" in names:
        mirrored = [logits(whole.flip(axis)).flip(axis) for axis in (-2, -1)]
        expected = 0.7 * expected + 0.3 * (mirrored[0] + mirrored[1]) / 2

    outputs = build_encoder(model.vision_model, views=names)(images)
    grid = torch.einsum("kd,ijd->kij", text_embeds, outputs.patch_embeds[0])
    found = F.interpolate(grid[None], size=(height, width), mode="bilinear", align_corners=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert outputs.image_hw == tuple(images.shape[2:]) and outputs.extent_hw == (height, width)


# --- FLOSS -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "counts"), [([0, 1, 2, 3, 4, 5], [4, 4, 4, 4, 2, 7]), ([0, 1, 2, 3, 0, 4], [4, 4, 4, 4, 4, 7])]
)
def test_floss_ranks_templates_by_entropy(ids, counts):
    images = [F.normalize(1 + rand(*grid_hw, 24, seed=n), dim=-1) for n, grid_hw in enumerate([(6, 8), (9, 5)])]
    template_embeds = F.normalize(1 + rand(7, NUM_NAMES, 24, seed=9), dim=-1)
    # In the shadow of other names, few templates find the name 4 and none the name 5.
    template_embeds[2:, 4] = 0.8 * template_embeds[2:, 0]
    template_embeds[:, 5] = 0.8 * template_embeds[:, 3]
    arrays = [image.double().numpy() for image in images]
    expected = plain.floss_ranking(arrays, template_embeds.double().numpy(), ids)
    assert floss.rank_templates(images, template_embeds, ids, floss.Settings()) == expected
    assert [len(chosen) for chosen in expected] == counts


def test_a_name_that_may_win_is_not_left_out():
    left_out = 0
    for seed in range(20):
        table = (2 * rand(5, 3, 4, seed=seed)).softmax(0)
        winner = plain.resize(table.numpy(), (40, 50)).argmax(axis=0)
        down, across = (axis_positions(slice(0, n), n, g, 1.0, table.device) for n, g in ((40, 3), (50, 4)))
        for name in range(5):
            windows = floss.may_win(table, name)
            rows = floss.pixels_over(windows.any(1), down)
            columns = floss.pixels_over(windows.any(0), across)
            outside = np.ones((40, 50), dtype=bool)
            outside[rows, columns] = False
            assert not (winner[outside] == name).any()
            left_out += outside.mean()
    assert left_out > 5  # images of 100, of random scores; of real ones nearly all
    above = torch.stack([torch.full((3, 1), 0.6), torch.full((3, 1), 0.4)])
    assert floss.may_win(above, 0).all() and not floss.may_win(above, 1).any()


@pytest.mark.parametrize(
    "size_hw, coverage_hw", [((12, 16), (1.0, 1.0)), ((17, 13), (1.1, 1.2)), ((2, 3), (1.0, 1.0))]
)
def test_floss_hears_the_surest_expert(size_hw, coverage_hw, monkeypatch):
    few_maps(monkeypatch, NUM_NAMES, (5, size_hw[1]))
    patches = F.normalize(rand(3, 4, 24), dim=-1)
    experts = F.normalize(rand(NUM_NAMES, NUM_NAMES, 24, seed=1), dim=-1)
    default = F.normalize(rand(NUM_NAMES, 24, seed=2), dim=-1)

    def cosines(names: torch.Tensor) -> torch.Tensor:
        return torch.einsum("kd,ijd->kij", names, patches)

    make = floss.fused([cosines(names) for names in (*experts, default)], coverage_hw, floss.Settings())
    arrays = (patches.double().numpy(), experts.double().numpy(), default.double().numpy())
    expected = plain.floss_fusion(*arrays, size_hw, coverage_hw)
    np.testing.assert_allclose(make(slice(0, 6), size_hw).numpy(), expected, **TOLERANCE)
    np.testing.assert_allclose(make(slice(2, 4), size_hw).numpy(), expected[2:4], **TOLERANCE)


def test_floss_templates_name_the_prompts(make_spar, spar_processor):
    model = make_spar(num_hidden_layers=2)
    pictures = [np.random.default_rng(n).integers(0, 256, (48, 80, 3), dtype=np.uint8) for n in range(2)]
    templates = [*IMAGENET_TEMPLATES[:5], "a photo of a {}."]
    segmenter = FromFeatures(model.vision_model, model, spar_processor)
    chosen = floss_templates(segmenter, LABELS, pictures, templates=templates)
    assert list(chosen) == ["road", "car", "automobile", "sky", "tree", "dog"]
    assert all(len(some) in (4, 6) or len(some) < 4 for some in chosen.values())
    assert {template for some in chosen.values() for template in some} <= set(templates)


# --- composition -----------------------------------------------------------------------------------------------


TEMPLATES = IMAGENET_TEMPLATES[:3]


class Model:
    """A model, its processor and a vocabulary: `run(names, images)` gives label maps."""

    def __init__(self, model, processor) -> None:
        self.model, self.processor = model, processor

    def segmenter(self, names, **choices):
        networks = networks_for(None, names)
        return build_segmenter(self.model, self.processor, refine=names, networks=networks, **choices)

    def encoded(self, segmenter, images: torch.Tensor):
        labels = replace(Labels.parse(LABELS), definitions=("a grey way", None, "what is above", None, None))
        return segmenter.encode_labels(labels, TEMPLATES, unlabelled=iter(images.split(1)))

    def run(self, names, images: torch.Tensor, encoded=None, **options) -> list[torch.Tensor]:
        segmenter = self.segmenter(names)
        encoded = self.encoded(segmenter, images) if encoded is None else encoded
        with torch.inference_mode():
            return [label_map(maps.at((40, 56)), encoded.class_ids, **options) for maps in segmenter(images, encoded)]


@pytest.fixture(scope="module")
def model(make_spar, spar_processor) -> Model:
    return Model(make_spar(num_hidden_layers=6), spar_processor)


@pytest.mark.parametrize("name", REFINEMENTS)
def test_an_image_of_a_batch_is_refined_as_if_alone(name, model, pixels):
    images = pixels("off_grid", batch=3)
    encoded = model.encoded(model.segmenter([name]), images)
    together = model.run([name], images, encoded)
    for image, found in zip(images.split(1), together, strict=True):
        (alone,) = model.run([name], image, encoded)
        assert (found != alone).float().mean() < 1e-3
        assert found.shape == (40, 56) and found.dtype == torch.int32


@pytest.mark.parametrize("name", REFINEMENTS)
@torch.inference_mode()
def test_a_refinement_goes_with_any_encoder_and_bf16(name, make_spar, spar_processor, pixels):
    model = Model(make_spar(num_hidden_layers=6, method="naclip").to(torch.bfloat16), spar_processor)
    images = pixels("larger")
    segmenter = model.segmenter([name], window="native", stride_px=32)
    encoded = model.encoded(segmenter, images)
    (maps,) = segmenter(images, encoded)
    labels = label_map(maps.at((31, 45)), encoded.class_ids)
    assert labels.shape == (31, 45) and 0 <= int(labels.min()) <= int(labels.max()) < 5
    inner = segmenter.segmenter.encoder if isinstance(segmenter, Refined) else segmenter.encoder
    assert isinstance(inner, SlidingWindow)  # around the views, where there are any


@pytest.mark.parametrize("names", [(), ("flip",), ("prompt-denoising",), ("key-smoothing",), ("floss",), ("pamr",)])
@pytest.mark.parametrize("size_hw", [(96, 128), (90, 75), (40, 100)])
@torch.inference_mode()
def test_windows_average_their_maps_pixel_by_pixel(size_hw, names, model, pixels, monkeypatch):
    """SCLIP's sliding window: each window's scores, resized to its pixels, summed and divided by the windows there."""
    few_maps(monkeypatch, 2, size_hw)
    images, (height, width) = pixels(size_hw), size_hw
    whole = model.segmenter(names)
    segmenter = sliding_scores(whole, 64, 32)
    assert isinstance(segmenter, Refined if names == ("pamr",) else SlidingScores)
    encoder = build_encoder(model.model.vision_model, views=[n for n in names if REFINEMENTS[n].stage == "views"])
    places = [sorted({*range(0, max(side - 64, 0) + 1, 32), max(side - 64, 0)}) for side in size_hw]
    insides = [tuple(slice(start, start + 64) for start in place) for place in itertools.product(*places)]
    windows = [encoder(images[..., rows, columns]).patch_embeds[0] for rows, columns in insides]
    vectors = torch.cat([window.flatten(0, 1) for window in windows])
    vectors = vectors[:: len(vectors) // NUM_NAMES][:NUM_NAMES] - vectors.mean(0)  # so that each name is found
    text = F.normalize(vectors, dim=-1)
    encoded = LabelFeatures(Labels.parse(LABELS), text)
    experts = F.normalize(text + 0.1 * rand(NUM_NAMES, NUM_NAMES, 24, seed=1), dim=-1)
    if "floss" in names:
        encoded = ExpertFeatures(encoded.labels, text, experts)
    ids = encoded.class_ids

    total, count = np.zeros((NUM_NAMES, height, width)), np.zeros((height, width))
    for inside, patches in zip(insides, windows, strict=True):
        crop = images[..., inside[0], inside[1]]
        unit = patches if "flip" in names else F.normalize(patches, dim=-1)
        covered = tuple(side / (side // 16 * 16) for side in crop.shape[2:])
        single = torch.einsum("kd,ijd->kij", text, unit)
        for row in (REFINEMENTS[name] for name in names if REFINEMENTS[name].stage == "scores"):
            single = row.apply(single, Scene(ClipInternals(model.model, crop), text, ids, None), row.settings)
        maps = plain.resize(single.double().numpy(), crop.shape[2:], covered)
        if "floss" in names:
            arrays = (array.double().numpy() for array in (unit, experts, text))
            maps = plain.floss_fusion(*arrays, crop.shape[2:], covered)
        total[(..., *inside)] += maps
        count[inside] += 1
    maps = plain.resize(total / count, (40, 56))
    if "pamr" in names:
        guide = F.interpolate(images, size=(40, 56), mode="bilinear", align_corners=False)[0]
        maps = plain.pamr(maps, guide.double().numpy())
    expected = ids.numpy()[maps.argmax(axis=0)]
    (found,) = segmenter(images, encoded)
    found = label_map(found.at((40, 56)), ids)
    assert (found.numpy() != expected).mean() < 2e-3
    assert len(found.unique()) > 1 or "key-smoothing" in names  # a random network's keys are all alike


def test_the_table_sets_the_order(model, pixels, monkeypatch):
    few_maps(monkeypatch, 2, (40, 56))
    images = pixels("same_count")
    names = ["pamr", "key-smoothing", "flip", "prompt-denoising", "redundancy-removal"]
    results = [model.run(order, images)[0] for order in (names, names[::-1])]
    torch.testing.assert_close(*results)
    ran = model.segmenter(names).refinements
    assert list(ran) == ["redundancy-removal", "prompt-denoising", "key-smoothing", "pamr"]


@pytest.mark.parametrize("pair", list(itertools.combinations(["floss", "tagclip", "pamr", "cluster-vote"], 2)))
def test_stages_compose(pair, model, pixels):
    (labels,) = model.run(pair, pixels("larger"))
    assert labels.shape == (40, 56) and int(labels.max()) < 5


def test_the_pipeline_takes_a_segmenter(model):
    from spar_hf import OpenVocabularySegmentationPipeline

    pictures = [np.random.default_rng(n).integers(0, 256, (40, 56, 3), dtype=np.uint8) for n in range(2)]
    segment = OpenVocabularySegmentationPipeline(model=model.model, processor=model.processor)
    options = {"candidate_labels": LABELS, "templates": TEMPLATES, "do_resize": False}
    pixel_values = torch.cat([model.processor(images=p, do_resize=False)["pixel_values"] for p in pictures])
    expected = model.run(["flip", "pamr"], pixel_values)
    for batch_size in (1, 2):
        found = segment(pictures, segmenter=model.segmenter(["flip", "pamr"]), batch_size=batch_size, **options)
        for result, labels in zip(found, expected, strict=True):
            assert (result["segmentation"] != labels.numpy()).mean() < 1e-3
            assert result["grid_hw"] == (2, 3)
    plain_result = segment(pictures[0], **options)["segmentation"]
    assert (plain_result != expected[0].numpy()).any()


def test_numbers_of_a_refinement_can_be_set_and_are_shown(model, pixels):
    segmenter = model.segmenter(["pamr"], settings={"pamr.steps": "0", "pamr.dilations_px": "1,2"})
    assert segmenter.refinements["pamr"].settings == pamr.Settings(steps=0, dilations_px=(1, 2))
    assert "steps=0, dilations_px=(1, 2)" in repr(segmenter)
    images = pixels("larger")
    encoded = model.encoded(segmenter, images)
    for refined, plain_maps in zip(segmenter(images, encoded), segmenter.segmenter(images, encoded), strict=True):
        torch.testing.assert_close(refined(slice(0, 6)), plain_maps(slice(0, 6)))  # no steps change nothing


@pytest.mark.parametrize("family", ["siglip", "dinov3"])
@torch.inference_mode()
def test_the_other_families_take_what_does_not_look_inside(family, clip_tokenizer, spar_processor, pixels, tmp_path):
    model = spar_siglip(clip_tokenizer, tmp_path) if family == "siglip" else spar_dinov3(clip_tokenizer)
    images = pixels("off_grid")  # padded by one family, stretched by the other
    for name, row in REFINEMENTS.items():
        if row.looks_inside:
            with pytest.raises(ValueError, match=f"refinement '{name}' looks into .* take a CLIP checkpoint"):
                build_segmenter(model, spar_processor, refine=[name])
        elif row.stage not in ("texts", "templates"):
            segmenter = build_segmenter(model, spar_processor, refine=[name], networks=networks_for(None, [name]))
            inner = segmenter.segmenter if isinstance(segmenter, Refined) else segmenter
            text_embeds = inner.encoder(images).patch_embeds[0].flatten(0, 1)[::5]  # each finds its own patch
            names = [f"name {number}" for number in range(len(text_embeds))]
            (maps,) = segmenter(images, LabelFeatures(Labels.parse(names), text_embeds))
            found = label_map(maps.at((40, 56)), torch.arange(len(names)))
            assert found.shape == (40, 56) and len(found.unique()) > 1


# --- mistakes --------------------------------------------------------------------------------------------------


def test_mistakes_say_what_to_do(model, pixels):
    with pytest.raises(ValueError, match=r"no refinement 'parm'; choose one of image-engineering, .*'pamr'"):
        model.segmenter(["parm"])
    with pytest.raises(ValueError, match=r"floss chooses templates by unlabelled images, and there are none"):
        model.segmenter(["floss"]).encode_labels(LABELS, TEMPLATES)
    with pytest.raises(ValueError, match=r"no setting 'stepz'; choose one of .* Did you mean 'steps'"):
        model.segmenter(["pamr"], settings={"pamr.stepz": 3})
    with pytest.raises(ValueError, match="refinement 'pamr': setting steps is 'x'; it is a int"):
        model.segmenter(["pamr"], settings={"pamr.steps": "x"})
    with pytest.raises(ValueError, match=r"'pamr\.steps' is of a refinement that is not on"):
        model.segmenter([], settings={"pamr.steps": 3})
    plain_segmenter = FromFeatures(model.model.vision_model, model.model, model.processor)
    with pytest.raises(ValueError, match="refinement 'flip' changes the encoder"):
        Refined(plain_segmenter, ["flip"], model.model)
    images = pixels("larger")
    windows = SlidingScores(plain_segmenter, 64, 32)
    encoded = windows.encode_labels(LABELS, TEMPLATES)
    with pytest.raises(ValueError, match="refinement 'prompt-denoising' acts on the scores of patches"):
        Refined(windows, ["prompt-denoising"], model.model)(images, encoded)
    with pytest.raises(ValueError, match="a correction of finished label maps runs in each window"):
        SlidingScores(Refined(plain_segmenter, ["cluster-vote"], model.model), 64, 32)(images, encoded)

    class Other(torch.nn.Module):
        vision_model = torch.nn.Linear(1, 1)
        logit_scale = torch.zeros(())

    Refined(plain_segmenter, ["pamr", "prompt-denoising"], Other())
    for name in ("redundancy-removal", "tagclip", "key-smoothing", "cluster-vote"):
        with pytest.raises(ValueError, match=f"refinement '{name}' looks into .* is a Linear. Leave it out"):
            Refined(plain_segmenter, [name], Other())


# --- documentation ---------------------------------------------------------------------------------------------


def test_the_page_shows_the_stored_results(monkeypatch):
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(root / "benchmarks")
    spec = importlib.util.spec_from_file_location("refinements", root / "benchmarks" / "refinements.py")
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    document = json.loads(benchmark.RESULTS.read_text())
    assert [tuple(entry["refine"]) for entry in document["results"]] == [
        (),
        *((name,) for name, row in REFINEMENTS.items() if not row.networks and row.stage != "texts"),
    ]
    page = benchmark.DOCS.read_text(encoding="utf-8")
    assert "\n".join(benchmark.table(document)) in page, "run: python benchmarks/refinements.py --docs"
