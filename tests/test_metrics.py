"""The metric against a plain reference, torchmetrics and an erosion written out, and its constant memory."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import evaluate
import numpy as np
import pytest
import torch
from scipy.ndimage import binary_erosion
from torchmetrics.classification import MulticlassAccuracy, MulticlassJaccardIndex

from spar_hf.evaluation import ConfusionMatrix, SegmentationCounts, boundary_region
from spar_hf.evaluation.mean_iou import MeanIoU

SIZES_HW = [(37, 53), (64, 20), (9, 9)]


def blobs(rng: np.random.Generator, size_hw: tuple[int, int], classes: int) -> np.ndarray:
    """A label map of rectangles: large regions, long contours."""
    label_map = np.full(size_hw, rng.integers(classes), dtype=np.int64)
    for _ in range(6):
        top, left = rng.integers(size_hw[0]), rng.integers(size_hw[1])
        label_map[top : top + rng.integers(2, 30), left : left + rng.integers(2, 30)] = rng.integers(classes)
    return label_map


@pytest.fixture
def pairs() -> list[tuple[np.ndarray, np.ndarray]]:
    """(prediction, target) of several sizes; class 5 of 6 occurs in neither, class 4 is predicted but never true."""
    rng = np.random.default_rng(0)
    result = []
    for size_hw in SIZES_HW:
        target, prediction = blobs(rng, size_hw, 4), blobs(rng, size_hw, 5)
        prediction = np.where(rng.random(size_hw) < 0.5, target, prediction)
        prediction[0, 0], target[0, 0] = 4, 0
        target[2:5, 2:6] = 255
        result.append((prediction, target))
    return result


def plain_iou(pairs: list[tuple[np.ndarray, np.ndarray]], classes: int, ignore_index: int = 255) -> list[float]:
    scores = []
    for class_id in range(classes):
        intersection = union = 0
        for prediction, target in pairs:
            for predicted, true in zip(prediction.ravel().tolist(), target.ravel().tolist(), strict=True):
                if true != ignore_index:
                    intersection += predicted == class_id and true == class_id
                    union += predicted == class_id or true == class_id
        scores.append(intersection / union if union else math.nan)
    return scores


def test_known_answer() -> None:
    matrix = ConfusionMatrix(4)
    matrix.update(np.array([[0, 0, 1], [1, 1, 2]]), np.array([[0, 1, 1], [1, 255, 0]]))
    np.testing.assert_array_equal(matrix.matrix, [[1, 0, 1, 0], [1, 2, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    np.testing.assert_allclose(matrix.iou(), [1 / 3, 2 / 3, 0, math.nan])
    np.testing.assert_allclose(matrix.class_accuracy(), [1 / 2, 2 / 3, math.nan, math.nan])
    assert matrix.pixel_accuracy() == 3 / 5


def test_equals_plain_reference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    counts = SegmentationCounts(6)
    for prediction, target in pairs:
        counts.update(prediction, target)
    expected = plain_iou(pairs, 6)
    assert math.isnan(expected[5]) and expected[4] == 0
    scores = counts.scores()
    np.testing.assert_allclose(scores["per_category_iou"], expected)
    assert scores["mean_iou"] == pytest.approx(np.mean(expected[:5]))
    assert scores["num_images"] == len(pairs)


def test_equals_torchmetrics(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    metric = MeanIoU(num_labels=6)
    jaccard = MulticlassJaccardIndex(6, average="macro", ignore_index=255)
    per_class = MulticlassJaccardIndex(6, average="none", ignore_index=255)
    accuracy = MulticlassAccuracy(6, average="micro", ignore_index=255)
    for prediction, target in pairs:
        metric.add(prediction=prediction, reference=target)
        for other in (jaccard, per_class, accuracy):
            other.update(torch.from_numpy(prediction), torch.from_numpy(target))
    scores = metric.compute()
    assert scores["mean_iou"] == pytest.approx(jaccard.compute().item(), abs=1e-6)
    assert scores["overall_accuracy"] == pytest.approx(accuracy.compute().item(), abs=1e-6)
    # torchmetrics writes 0 for a class that is in neither map, where we write nan.
    np.testing.assert_allclose(np.nan_to_num(scores["per_category_iou"]), per_class.compute().numpy(), atol=1e-6)


@pytest.mark.parametrize("distance_px", [1, 2, 7, 40])
def test_boundary_region_is_mask_minus_erosion(distance_px: int) -> None:
    label_map = blobs(np.random.default_rng(1), (37, 53), 4)
    expected = np.zeros(label_map.shape, dtype=bool)
    for class_id in range(4):
        mask = label_map == class_id
        eroded = binary_erosion(mask, np.ones((3, 3)), iterations=distance_px, border_value=0)
        expected |= mask & ~eroded
    np.testing.assert_array_equal(boundary_region(label_map, distance_px), expected)
    assert expected.any() and (distance_px == 40 or not expected.all())


def test_boundary_iou_equals_its_definition(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    """Per class, intersection and union of (mask minus its erosion), summed over the images."""
    counts = SegmentationCounts(6, boundary_ratio=0.04)
    intersection, union = np.zeros(6), np.zeros(6)
    for prediction, target in pairs:
        counts.update(prediction, target)
        distance_px = max(1, round(0.04 * math.sqrt(target.shape[0] ** 2 + target.shape[1] ** 2)))
        for class_id in range(6):
            contours = []
            for label_map in (prediction, target):
                mask = (label_map == class_id) & (target != 255)
                contours.append(mask & ~binary_erosion(mask, np.ones((3, 3)), iterations=distance_px))
            intersection[class_id] += (contours[0] & contours[1]).sum()
            union[class_id] += (contours[0] | contours[1]).sum()
    scores = counts.scores()
    np.testing.assert_allclose(scores["per_category_boundary_iou"][:5], intersection[:5] / union[:5])
    assert math.isnan(scores["per_category_boundary_iou"][5])
    assert scores["boundary_iou"] == pytest.approx((intersection[:5] / union[:5]).mean())


def test_boundary_iou_sees_what_iou_hardly_sees() -> None:
    target, prediction = np.zeros((200, 200), dtype=int), np.zeros((200, 200), dtype=int)
    target[50:150, 50:150] = 1
    prediction[53:153, 50:150] = 1
    counts = SegmentationCounts(2)
    counts.update(prediction, target)
    iou = counts.scores()["per_category_iou"][1]
    boundary_iou = counts.scores()["per_category_boundary_iou"][1]
    assert iou == pytest.approx(97 / 103)
    assert boundary_iou < iou - 0.2
    counts.update(target, target)
    perfect = SegmentationCounts(2)
    perfect.update(target, target)
    assert perfect.scores()["boundary_iou"] == 1


def test_an_ignore_index_next_to_the_classes_is_ignored() -> None:
    counts = SegmentationCounts(2, ignore_index=2)
    target = np.array([[0, 1, 2], [0, 1, 2]])
    counts.update(np.array([[0, 1, 0], [0, 1, 1]]), target)
    assert counts.scores()["mean_iou"] == counts.scores()["boundary_iou"] == 1


def test_counts_of_two_parts_add_up(pairs: list[tuple[np.ndarray, np.ndarray]]) -> None:
    whole, first, rest = SegmentationCounts(6), SegmentationCounts(6), SegmentationCounts(6)
    for number, (prediction, target) in enumerate(pairs):
        whole.update(prediction, target)
        (first if number == 0 else rest).update(prediction, target)
    first += rest
    np.testing.assert_equal(first.scores(), whole.scores())
    with pytest.raises(ValueError, match="num_classes, ignore_index, boundary_ratio must agree"):
        first += SegmentationCounts(5)


def test_metric_through_the_evaluate_library(
    pairs: list[tuple[np.ndarray, np.ndarray]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`evaluate.load` takes the file from its folder, without the Hub."""
    monkeypatch.setattr(evaluate.config, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    spec = importlib.util.find_spec("spar_hf.evaluation.mean_iou")
    assert spec is not None and spec.origin is not None
    loaded = evaluate.load(spec.origin, num_labels=6, cache_dir=str(tmp_path))
    predictions, references = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    expected = MeanIoU(num_labels=6).compute(predictions=predictions, references=references)
    np.testing.assert_equal(loaded.compute(predictions=predictions, references=references), expected)


def test_metric_takes_tensors_and_starts_anew_after_compute(tmp_path: Path) -> None:
    metric = MeanIoU(num_labels=2, cache_dir=str(tmp_path))
    target = torch.tensor([[[0, 1], [1, 255]], [[0, 0], [1, 1]]])
    metric.add_batch(predictions=target.clamp(max=1), references=target)
    assert len(metric) == 2
    assert metric.compute()["mean_iou"] == 1
    assert len(metric) == 0
    assert metric.compute(predictions=[[[1, 1]]], references=[[[0, 0]]])["mean_iou"] == 0
    with pytest.raises(ValueError, match="no image was counted"):
        metric.compute()


def test_metric_stores_no_pixels(tmp_path: Path) -> None:
    """evaluate's own metrics write each pixel to a file in the cache; here nothing grows with the images."""
    metric = MeanIoU(num_labels=3, cache_dir=str(tmp_path))
    label_map = np.random.default_rng(0).integers(0, 3, (200, 300))
    before = {name: np.asarray(value).nbytes for name, value in vars(metric.counts.pixels).items()}
    for _ in range(5):
        metric.add(prediction=label_map, reference=label_map)
    assert {name: np.asarray(value).nbytes for name, value in vars(metric.counts.pixels).items()} == before
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("prediction", "target", "message"),
    [
        (np.zeros((2, 3), int), np.zeros((3, 2), int), r"prediction is \(2, 3\) and the target \(3, 2\)"),
        (np.array([[3]]), np.array([[0]]), "prediction has labels from 3 to 3; the vocabulary has 3 classes"),
        (np.array([[0]]), np.array([[7]]), "target has labels from 7 to 7"),
        (np.array([[0]]), np.array([[-1]]), "target has labels from -1 to -1"),
    ],
)
def test_wrong_labels_are_refused(prediction: np.ndarray, target: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentationCounts(3).update(prediction, target)


def test_wrong_settings_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="num_classes is 0"):
        SegmentationCounts(0)
    with pytest.raises(ValueError, match="ignore_index 1 is one of the 3 classes"):
        SegmentationCounts(3, ignore_index=1)
    with pytest.raises(ValueError, match="boundary_ratio is 0"):
        SegmentationCounts(3, boundary_ratio=0)
    with pytest.raises(ValueError, match="num_process is 2"):
        MeanIoU(num_labels=3, cache_dir=str(tmp_path), num_process=2)
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2\)"):
        MeanIoU(num_labels=3, cache_dir=str(tmp_path)).add(prediction=np.zeros((1, 2, 2), int), reference=[[0]])
    with pytest.raises(ValueError, match="2 predictions came with 1 references"):
        MeanIoU(num_labels=3, cache_dir=str(tmp_path)).add_batch(predictions=[[[0]], [[0]]], references=[[[0]]])
