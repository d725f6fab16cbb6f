"""Label maps against the plain formulation: every score at full resolution, soft-max, maxima, thresholds."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from spar_hf import segmentation_spar
from spar_hf.encoder_spar import SparVisionOutput
from spar_hf.grid_spar import axis_block, upsample
from spar_hf.processing_spar import LabelFeatures, Labels, SparProcessor
from spar_hf.segmentation_spar import FullScores, GridScores, class_probabilities, feature_scores, segment

PATCH_PX = 16
MARGIN = 1e-5  # pixels whose two best probabilities are closer than this may go either way


def features(
    grid_hw: tuple[int, int], num_names: int, dim: int = 24, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Patches that lean towards a name region by region (h, w, D), and text features (K, D); neither normalised."""
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(num_names, dim, generator=generator)
    regions = torch.randint(num_names, (1, 1, 3, 4), generator=generator).float()
    region = F.interpolate(regions, size=grid_hw)[0, 0].long()
    patches = text[region] + 1.5 * torch.randn(*grid_hw, dim, generator=generator)
    return patches * (0.5 + torch.rand(*grid_hw, 1, generator=generator)), text * 3


def maps_of(patches: torch.Tensor, text: torch.Tensor, size_hw: tuple[int, int]) -> segmentation_spar.ScoreMaps:
    (maps,) = feature_scores(SparVisionOutput(patch_embeds=patches[None]), text, size_hw)
    return maps


def label_map(
    patches: torch.Tensor, text: torch.Tensor, ids: torch.Tensor, size_hw: tuple[int, int], **thresholds: Any
) -> torch.Tensor:
    return segmentation_spar.label_map(maps_of(patches, text, size_hw), ids, **thresholds)


def plain_probabilities(
    patches: torch.Tensor,
    text: torch.Tensor,
    class_ids: torch.Tensor,
    size_hw: tuple[int, int],
    image_hw: tuple[int, int],
    extent_hw: tuple[int, int],
    logit_scale: float,
    synonyms: str = "max",
) -> torch.Tensor:
    """Probability of each class (C, H, W), everything at full resolution; positions sampled one by one, in fp64."""
    patches, text = patches.double(), text.double()
    cosine = F.normalize(patches, dim=-1) @ F.normalize(text, dim=-1).T
    axes = []
    for size, image, extent in zip(size_hw, image_hw, extent_hw, strict=True):
        pixel_of_input = (torch.arange(size, dtype=torch.float64) + 0.5) / size * image
        axes.append(pixel_of_input / extent * 2 - 1)  # grid_sample: -1 and 1 are the outer edges of the grid
    rows, columns = torch.meshgrid(*axes, indexing="ij")
    where = torch.stack([columns, rows], dim=-1)[None]
    scores = F.grid_sample(
        cosine.permute(2, 0, 1)[None], where, mode="bilinear", padding_mode="border", align_corners=False
    )[0]
    names = (logit_scale * scores).softmax(0)
    together = torch.sum if synonyms == "sum" else torch.amax
    return torch.stack([together(names[class_ids == index], 0) for index in range(int(class_ids.max()) + 1)])


def plain_label_map(
    probabilities: torch.Tensor,
    background_threshold: float | None = None,
    background_class: int = 0,
    area_threshold: float | None = None,
) -> torch.Tensor:
    """SCLIP's order: mask out small foreground classes, take the arg-max again, then the threshold."""
    probabilities = probabilities.clone()
    if area_threshold is not None:
        first = probabilities.argmax(0)
        area = torch.stack([(first == index).sum() for index in range(len(probabilities))]).double()
        foreground = [index for index in range(len(probabilities)) if index != background_class]
        total = area[foreground].sum()
        for index in foreground:
            if area[index] <= area_threshold * total:
                probabilities[index] = 0
    labels = probabilities.argmax(0)
    labels[probabilities.amax(0) == 0] = background_class
    if background_threshold is not None:
        labels[probabilities.amax(0) < background_threshold] = background_class
    return labels


def assert_equal_but_for_ties(labels: torch.Tensor, wanted: torch.Tensor, undecided: torch.Tensor) -> None:
    assert labels.dtype == torch.int32
    assert labels.shape == wanted.shape
    assert undecided.float().mean() < 0.01  # the comparison must leave something to compare
    assert torch.equal(labels[~undecided].long(), wanted[~undecided])


def undecided(probabilities: torch.Tensor, threshold: float | None = None) -> torch.Tensor:
    best, second = probabilities.topk(2, dim=0).values
    close = best - second < MARGIN
    return close if threshold is None else close | ((best - threshold).abs() < MARGIN)


def processor_output(
    patches: torch.Tensor, image_hw: tuple[int, int], extent_hw: tuple[int, int] | None = None
) -> SimpleNamespace:
    return SimpleNamespace(patch_embeds=patches, image_hw=image_hw, extent_hw=extent_hw or image_hw, normalized=None)


@pytest.fixture(scope="module")
def post_process(spar_processor: SparProcessor) -> Any:
    return spar_processor.post_process_semantic_segmentation


# The formula


@pytest.mark.parametrize(
    ("grid_hw", "size_hw"),
    [
        ((6, 9), (96, 144)),  # sixteen pixels a patch
        ((6, 9), (97, 143)),
        ((6, 9), (31, 200)),  # shrunk one way, stretched the other
        ((6, 9), (6, 9)),
        ((6, 9), (4, 5)),
        ((1, 9), (40, 150)),
        ((7, 1), (120, 33)),
        ((1, 1), (30, 20)),
        ((13, 11), (1, 1)),
    ],
)
@pytest.mark.parametrize("num_names", [2, 7, 40, 67])
def test_label_maps_equal_the_plain_formulation(
    grid_hw: tuple[int, int], size_hw: tuple[int, int], num_names: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(segmentation_spar.TILE_NUMBERS, "cpu", num_names * 20**2)  # tiles of 20 px: many seams
    patches, text = features(grid_hw, num_names)
    ids = torch.arange(num_names)
    probabilities = plain_probabilities(patches, text, ids, size_hw, size_hw, size_hw, 40.0)
    labels = label_map(patches, text, ids, size_hw)
    assert_equal_but_for_ties(labels, probabilities.argmax(0), undecided(probabilities))


@pytest.mark.parametrize("names_at_once", [None, 1, 7])  # None: by tiles of the grid
@pytest.mark.parametrize("synonyms", ["max", "sum"])
@pytest.mark.parametrize("background_threshold", [None, 0.3, 0.6])
@pytest.mark.parametrize("area_threshold", [None, 0.05, 0.15])
@pytest.mark.parametrize("background_class", [0, 4, None])
def test_synonyms_and_thresholds_equal_the_plain_formulation(
    background_threshold: float | None,
    area_threshold: float | None,
    background_class: int | None,
    synonyms: str,
    names_at_once: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patches, text = features((9, 12), 40, seed=3)
    ids = torch.arange(40) // 3 % 11  # synonyms, some of them apart from each other
    size_hw = (101, 150)
    arguments = (patches, text, ids, size_hw, size_hw, size_hw, 20.0)
    best = plain_probabilities(*arguments)  # which class wins, its best name decides
    background = -1 if background_class is None else background_class
    wanted = plain_label_map(best, None, background, area_threshold)
    left = best.clone()
    if area_threshold is not None:
        for index in set(range(11)) - set(wanted.unique().tolist()) - {background}:
            left[index] = 0
    close = undecided(left)
    if background_threshold is not None:
        found = plain_probabilities(*arguments, synonyms).gather(0, wanted.clamp(min=0)[None])[0]
        wanted = wanted.masked_fill(found < background_threshold, background)
        close |= (found - background_threshold).abs() < MARGIN

    maps = maps_of(patches, text, size_hw)
    if names_at_once is not None:
        monkeypatch.setitem(segmentation_spar.MAP_NUMBERS, "cpu", names_at_once * size_hw[0] * size_hw[1])
        grid = maps.grid
        maps = FullScores(
            make=lambda names, size: upsample(grid[names], size), size_hw=size_hw, num_names=40, device=grid.device
        )
    labels = segmentation_spar.label_map(
        maps,
        ids,
        logit_scale=20.0,
        background_threshold=background_threshold,
        background_class=background_class,
        area_threshold=area_threshold,
        synonyms=synonyms,
    )
    assert_equal_but_for_ties(labels, wanted, close)
    if background_threshold or area_threshold:
        assert not torch.equal(wanted, best.argmax(0))  # the thresholds decide something here


@pytest.mark.parametrize("names_at_once", [None, 1, 5])
def test_scores_and_probabilities_of_all_classes(names_at_once: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    patches, text = features((7, 9), 20, seed=2)
    ids = torch.tensor([0, 0, 0, 1, 2, 2, 3, 4, 5, 6, 6, 6, 6, 7, 8, 9, 9, -1, -1, -1])
    size_hw = (61, 90)
    apart = torch.where(ids < 0, torch.arange(20) - 7, ids)  # a name that only competes is a class of its own
    arguments = (patches, text, apart, size_hw, size_hw, size_hw, 40.0)
    best, together = plain_probabilities(*arguments), plain_probabilities(*arguments, "sum")
    maps: segmentation_spar.ScoreMaps = maps_of(patches, text, size_hw)
    if names_at_once is not None:
        monkeypatch.setitem(segmentation_spar.MAP_NUMBERS, "cpu", names_at_once * size_hw[0] * size_hw[1])
        grid = maps.grid
        assert grid is not None
        maps = FullScores(
            make=lambda names, size: upsample(grid[names], size), size_hw=size_hw, num_names=20, device=grid.device
        )
    found = segment(maps, ids, with_scores=True)
    winner = best.argmax(0)
    assert_equal_but_for_ties(found.labels, winner.masked_fill(winner >= 10, -1), undecided(best))
    wanted = together.gather(0, winner[None])[0].float()
    clear = ~undecided(best) & (winner < 10)
    assert found.scores is not None
    torch.testing.assert_close(found.scores[clear], wanted[clear], atol=1e-5, rtol=1e-4)
    everything = torch.empty(10, *size_hw)
    for (rows, columns), tile in class_probabilities(maps, ids):
        everything[:, rows, columns] = tile
    torch.testing.assert_close(everything, together[:10].float(), atol=1e-5, rtol=1e-4)


def test_a_synonym_does_not_make_a_class_less_sure() -> None:
    patches, text = features((6, 9), 2)
    (one, other), size_hw = text, (60, 90)
    twice = torch.stack([one, one, one, other])
    single = label_map(patches, text, torch.arange(2), size_hw, background_threshold=0.6)
    several = label_map(patches, twice, torch.tensor([0, 0, 0, 1]), size_hw, background_threshold=0.6)
    sclip = label_map(patches, twice, torch.tensor([0, 0, 0, 1]), size_hw, background_threshold=0.6, synonyms="max")
    assert (single == 0).any() and (several[single == 0] == 0).all()
    assert (sclip != 0).all()  # three names share what one had


def test_a_single_class_is_told_from_nothing_by_its_score() -> None:
    text = torch.eye(3)[:1]
    patches = torch.eye(3)[torch.tensor([[0, 1], [2, 0]])]
    ids = torch.zeros(1, dtype=torch.long)
    assert label_map(patches, text, ids, (2, 2), background_threshold=0.99).tolist() == [[0, 0], [0, 0]]
    assert label_map(patches, text, ids, (2, 2), score_threshold=0.5).tolist() == [[0, -1], [-1, 0]]


def test_corrections_come_last_and_other_sizes_are_the_same_scores() -> None:
    patches, text = features((6, 9), 5)
    grid = maps_of(patches, text, (60, 90)).grid
    maps = GridScores.of(grid, (60, 90), corrections=(lambda labels: labels + 1, lambda labels: labels * 10))
    plain = label_map(patches, text, torch.arange(5), (31, 40))
    assert torch.equal(segmentation_spar.label_map(maps.at((31, 40)), torch.arange(5)), (plain + 1) * 10)


@pytest.mark.parametrize("size_hw", [(1, 65535), (65535, 1)])
def test_a_label_map_of_any_shape_takes_two_weights_a_pixel(size_hw: tuple[int, int]) -> None:
    grid_hw = (1, 4096) if size_hw[0] == 1 else (4096, 1)
    patches, text = features(grid_hw, 3)
    labels = label_map(patches, text, torch.arange(3), size_hw)
    cosine = F.normalize(patches.double(), dim=-1) @ F.normalize(text.double(), dim=-1).T
    wanted = F.interpolate(cosine.permute(2, 0, 1)[None], size=size_hw, mode="bilinear", align_corners=False)[0]
    close = wanted.topk(2, dim=0).values.diff(dim=0).abs()[0] < 1e-5
    assert torch.equal(labels[~close].long(), wanted.argmax(0)[~close])


def test_a_class_at_the_area_threshold_is_masked_out() -> None:
    text = torch.eye(3)
    patches = text[torch.tensor([[0, 1], [1, 2]])]  # areas 1, 2 and 1 of 4; foreground 2 and 1 of 3
    ids = torch.arange(3)
    assert label_map(patches, text, ids, (2, 2)).tolist() == [[0, 1], [1, 2]]
    assert label_map(patches, text, ids, (2, 2), background_class=0, area_threshold=0.33).tolist() == [[0, 1], [1, 2]]
    at_threshold = label_map(patches, text, ids, (2, 2), background_class=0, area_threshold=1 / 3)
    assert at_threshold[1, 1] != 2 and at_threshold[0].tolist() == [0, 1]


def test_where_every_class_is_masked_out_all_is_background() -> None:
    patches, text = torch.eye(4).view(2, 2, 4), torch.eye(4)
    labels = label_map(patches, text, torch.arange(4), (20, 20), background_class=-1, area_threshold=0.5)
    assert (labels == -1).all()


@pytest.mark.parametrize("logit_scale", [5.0, 100.0])
def test_the_logit_scale_matters_to_the_threshold_only(logit_scale: float) -> None:
    patches, text = features((6, 9), 12)
    ids = torch.arange(12)
    probabilities = plain_probabilities(patches, text, ids, (60, 90), (60, 90), (60, 90), logit_scale)
    assert torch.equal(
        label_map(patches, text, ids, (60, 90), logit_scale=logit_scale), label_map(patches, text, ids, (60, 90))
    )
    labels = label_map(
        patches, text, ids, (60, 90), logit_scale=logit_scale, background_threshold=0.5, background_class=0
    )
    assert_equal_but_for_ties(labels, plain_label_map(probabilities, 0.5), undecided(probabilities, 0.5))


def test_identical_names_do_not_disturb() -> None:
    patches, text = features((5, 5), 33)
    doubled = torch.cat([text, text])
    ids = torch.arange(33).repeat(2)
    assert torch.equal(label_map(patches, doubled, ids, (50, 50)), label_map(patches, text, ids[:33], (50, 50)))


# Where the patches lie


@pytest.mark.parametrize("size_px", [1, 7, 96, 97, 250])
@pytest.mark.parametrize("grid", [1, 2, 6])
def test_weights_along_an_axis_are_bilinear_interpolation(size_px: int, grid: int) -> None:
    values = torch.randn(grid, generator=torch.Generator().manual_seed(0))
    wanted = F.interpolate(values.view(1, 1, grid), size=size_px, mode="linear", align_corners=False).flatten()
    for start in range(0, size_px, 40):
        pixels = slice(start, min(start + 40, size_px))
        patches, weights = axis_block(pixels, size_px, grid, 1.0, values.device)
        torch.testing.assert_close(weights @ values[patches], wanted[pixels], atol=2e-6, rtol=0)
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    torch.testing.assert_close(upsample(values.view(1, grid), (3, size_px)), wanted.expand(3, -1), atol=2e-6, rtol=0)
    torch.testing.assert_close(upsample(values.view(grid, 1), (size_px, 1))[:, 0], wanted, atol=2e-6, rtol=0)


@pytest.mark.parametrize(
    ("rule", "image_hw", "extent_hw", "grid_hw"),
    [
        ("floor", (93, 157), (80, 144), (5, 9)),
        ("pad", (93, 157), (96, 160), (6, 10)),
        ("stretch", (93, 157), (93, 157), (6, 10)),
    ],
)
@pytest.mark.parametrize("size_hw", [(93, 157), (186, 311), (40, 64)])
def test_the_extent_of_the_grid_is_undone(
    post_process: Any,
    rule: str,
    image_hw: tuple[int, int],
    extent_hw: tuple[int, int],
    grid_hw: tuple[int, int],
    size_hw: tuple[int, int],
) -> None:
    patches, text = features(grid_hw, 9, seed=1)
    (labels,) = post_process(processor_output(patches[None], image_hw, extent_hw), [size_hw], text)
    probabilities = plain_probabilities(patches, text, torch.arange(9), size_hw, image_hw, extent_hw, 40.0)
    assert_equal_but_for_ties(labels, probabilities.argmax(0), undecided(probabilities))


def test_a_padded_image_is_cut_out_of_the_full_map_exactly(post_process: Any) -> None:
    patches, text = features((6, 10), 9, seed=2)
    (whole,) = post_process(processor_output(patches[None], (96, 160)), None, text)
    (cut,) = post_process(processor_output(patches[None], (93, 157), (96, 160)), None, text)
    assert torch.equal(cut, whole[:93, :157])


# Batches, types, forms


def test_each_image_of_a_batch_has_its_own_size(post_process: Any) -> None:
    pairs = [features((6, 9), 8, seed=seed) for seed in (0, 5)]
    text = pairs[0][1]
    outputs = processor_output(torch.stack([patches for patches, _ in pairs]), (96, 144))
    for sizes in ([(96, 144), (50, 201)], torch.tensor([[96, 144], [50, 201]])):
        both = post_process(outputs, sizes, text)
        assert [tuple(labels.shape) for labels in both] == [(96, 144), (50, 201)]
        for labels, (patches, _), size_hw in zip(both, pairs, [(96, 144), (50, 201)], strict=True):
            assert torch.equal(labels, label_map(patches, text, torch.arange(8), size_hw))
    assert [tuple(labels.shape) for labels in post_process(outputs, None, text)] == [(96, 144)] * 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_features_are_compared_in_single_precision(post_process: Any, dtype: torch.dtype) -> None:
    patches, text = features((6, 9), 8)
    half = patches.to(dtype)
    (labels,) = post_process(processor_output(half[None], (96, 144)), None, text)
    (wanted,) = post_process(processor_output(half.float()[None], (96, 144)), None, text)
    assert torch.equal(labels, wanted)


def test_label_features_carry_their_synonyms(post_process: Any) -> None:
    patches, text = features((6, 9), 4)
    labels = Labels.parse("road; car, automobile; sky")
    (found,) = post_process(processor_output(patches[None], (96, 144)), None, LabelFeatures(labels, text))
    assert torch.equal(found, label_map(patches, text, torch.tensor([0, 1, 1, 2]), (96, 144)))
    outputs = processor_output(patches[None], (96, 144))
    outputs.text_embeds = text
    assert torch.equal(post_process(outputs)[0], label_map(patches, text, torch.arange(4), (96, 144)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"target_sizes": [(10, 10), (10, 10)]}, r"one \(height, width\) of at least one pixel is needed"),
        ({"target_sizes": [(10, 0)]}, "is needed for each of 1 images"),
        ({"target_sizes": [10]}, "is needed for each of 1 images"),
        ({"background_threshold": 1.5}, "background_threshold is 1.5; it must be from 0 to 1"),
        ({"area_threshold": -0.1}, "area_threshold is -0.1; it must be from 0 to 1"),
        ({"logit_scale": 0.0}, "logit_scale is 0.0; it must be above 0"),
        ({"label_features": torch.ones(4, 23)}, "patch features have 24 numbers and text features 23"),
        ({"label_features": None}, "there are no text features; pass label_features"),
        ({"label_features": torch.full((4, 24), torch.nan)}, "the features hold NaN or infinite numbers"),
    ],
)
def test_wrong_arguments_say_why(post_process: Any, change: dict[str, Any], message: str) -> None:
    patches, text = features((6, 9), 4)
    with pytest.raises(ValueError, match=message):
        post_process(processor_output(patches[None], (96, 144)), **{"label_features": text, **change})
    patches[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match="the features hold NaN or infinite numbers"):
        post_process(processor_output(patches[None], (96, 144)), None, text)
