"""The evaluation end to end: known scores, protocols, stopping and resuming, the JSON, the table of benchmarks."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file as load_numpy
from torch import nn

from spar_hf import (
    SlidingWindow,
    SparImageProcessor,
    SparModel,
    SparProcessor,
    SparVisionConfig,
    SparVisionOutput,
    load,
)
from spar_hf.build import build_encoder
from spar_hf.evaluation import (
    PROTOCOLS,
    BenchmarkData,
    Protocol,
    Sample,
    load_benchmark,
    load_protocol,
    load_vocabulary,
)
from spar_hf.evaluation.evaluate import EvaluationResult, evaluate
from spar_hf.files import write_atomically
from spar_hf.processes import Processes
from spar_hf.processing_spar import LabelFeatures
from spar_hf.prompts_spar import Labels
from spar_hf.segmentation_spar import FromFeatures

SHADE = 13  # the class k is painted in the red value 13 k


class PaintedEncoder(nn.Module):
    """A dense encoder that reads the class from the colour: one pixel a patch, one-hot features.

    Args:
        num_classes: Length of the features.
        mistakes: Class -> the class that is seen instead.
    """

    def __init__(self, num_classes: int, mistakes: dict[int, int] | None = None) -> None:
        super().__init__()
        self.config = SparVisionConfig(patch_size=1, image_size=32)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        seen = torch.arange(num_classes)
        for true, mistaken in (mistakes or {}).items():
            seen[true] = mistaken
        self.register_buffer("seen", seen)

    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        class_ids = (pixel_values[:, 0] * 255 / SHADE).round().long()  # (B, H, W)
        size_hw = (pixel_values.shape[2], pixel_values.shape[3])
        features = nn.functional.one_hot(self.seen[class_ids], len(self.seen)).float()
        return SparVisionOutput(patch_embeds=features, image_hw=size_hw, extent_hw=size_hw)


class SizeRecorder(nn.Module):
    """A dense encoder that notes the sizes of the batches that it is given; every patch looks like the class 0."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.config = SparVisionConfig(patch_size=16, image_size=224)
        self.dtype, self.device = torch.float32, torch.device("cpu")
        self.width, self.sizes = width, []

    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        batch, _, height, width = pixel_values.shape
        self.sizes += [(height, width)] * batch
        features = torch.zeros(batch, height // 16, width // 16, self.width)
        features[..., 0] = 1
        extent_hw = (height // 16 * 16, width // 16 * 16)
        return SparVisionOutput(patch_embeds=features, image_hw=(height, width), extent_hw=extent_hw)


class OneHotText(SparProcessor):
    """The real processor, but for the text: each name's embedding is its class, one-hot."""

    def encode_labels(self, model: Any, labels: Any, templates: Any = None) -> LabelFeatures:
        return LabelFeatures(labels, torch.eye(len(labels))[list(labels.class_ids)])


def segmenter(encoder: Any, processor: SparProcessor, model: nn.Module | None = None) -> FromFeatures:
    return FromFeatures(encoder, nn.Module() if model is None else model, processor)


def scored(
    encoder: Any, processor: SparProcessor, *arguments: Any, model: nn.Module | None = None, **options: Any
) -> EvaluationResult:
    return evaluate(segmenter(encoder, processor, model), processor, *arguments, **options)


@pytest.fixture
def one_hot_processor(clip_tokenizer: Any) -> OneHotText:
    image_processor = SparImageProcessor(image_mean=[0.0] * 3, image_std=[1.0] * 3)
    return OneHotText(image_processor=image_processor, tokenizer=clip_tokenizer)


def write_street(data: Path, city: str, class_ids: np.ndarray, ignored: np.ndarray) -> None:
    """An image of Cityscapes whose colours say its classes, and its label map."""
    painted = np.zeros((*class_ids.shape, 3), np.uint8)
    painted[..., 0] = SHADE * class_ids
    target = np.where(ignored, 255, class_ids).astype(np.uint8)
    for folder, suffix, array in (("leftImg8bit", "leftImg8bit", painted), ("gtFine", "gtFine_labelTrainIds", target)):
        path = data / "cityscapes" / folder / "val" / city / f"{city}_1_{suffix}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(array).save(path)


@pytest.fixture
def streets(tmp_path: Path) -> tuple[Path, np.ndarray]:
    """Two images of different sizes with the classes 0, 2, 5 and 18: the folder, and the scored pixels by class."""
    count = np.zeros(19)
    for city, size_hw in (("bonn", (24, 40)), ("ulm", (33, 17))):
        class_ids = np.random.default_rng(len(city)).choice([0, 2, 5, 18], size_hw)
        class_ids[:8] = 5
        ignored = np.zeros(size_hw, bool)
        ignored[-5:, :6] = True
        write_street(tmp_path, city, class_ids, ignored)
        count += np.bincount(class_ids[~ignored], minlength=19)
    return tmp_path, count


def as_drawn(benchmark: str, protocol: str = "spar") -> Protocol:
    return load_protocol(protocol, benchmark).replace(short_side_px=None)


def test_a_perfect_encoder_scores_one(streets: tuple[Path, np.ndarray], one_hot_processor: OneHotText) -> None:
    data = load_benchmark("cityscapes", streets[0])
    result = evaluate(
        segmenter(PaintedEncoder(19), one_hot_processor),
        one_hot_processor,
        data,
        as_drawn("cityscapes"),
        progress=False,
    )
    assert result.mean_iou == result.pixel_accuracy == result.boundary_iou == result.mean_accuracy == 1
    assert result.num_images == 2 and result.protocol["name"] == "spar, changed"
    present = {title for title, iou in result.per_class_iou.items() if not math.isnan(iou)}
    assert present == {"road", "building", "pole", "bicycle"}
    assert result.seconds_per_image > 0 and result.seconds_per_image_mean > 0 and result.peak_memory_mb > 10


def test_known_mistakes_give_known_scores(streets: tuple[Path, np.ndarray], one_hot_processor: OneHotText) -> None:
    """Class 2 is taken for 5, and 18 for 7, which is never true."""
    folder, count = streets
    data = load_benchmark("cityscapes", folder)
    encoder = PaintedEncoder(19, mistakes={2: 5, 18: 7})
    result = scored(encoder, one_hot_processor, data, as_drawn("cityscapes"), progress=False)
    iou = dict(enumerate(result.per_class_iou.values()))
    expected = {0: 1.0, 2: 0.0, 5: count[5] / (count[5] + count[2]), 18: 0.0, 7: 0.0}
    assert {class_id: score for class_id, score in iou.items() if not math.isnan(score)} == pytest.approx(expected)
    assert result.mean_iou == pytest.approx(np.mean(list(expected.values())))
    assert result.pixel_accuracy == pytest.approx((count[0] + count[5]) / count.sum())
    assert result.mean_accuracy == pytest.approx(2 / 4)


def test_label_shift_and_synonyms(tmp_path: Path, one_hot_processor: OneHotText) -> None:
    """VOC20 on the files of VOC21: the stored value 15 is the class 14, which has several names; 0 is not scored."""
    root = tmp_path / "VOCdevkit/VOC2012"
    for folder in ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"):
        (root / folder).mkdir(parents=True)
    (root / "ImageSets/Segmentation/val.txt").write_text("2007_1\n")
    stored = np.repeat(np.repeat(np.uint8([[0, 15, 20, 15]]), 32, 0), 16, 1)  # 32 x 64: whole JPEG blocks, flat
    painted = np.zeros((32, 64, 3), np.uint8)
    painted[..., 0] = SHADE * np.maximum(stored.astype(int) - 1, 0)
    Image.fromarray(painted).save(root / "JPEGImages/2007_1.jpg", quality=100, subsampling=0)
    palette = Image.fromarray(stored).convert("P")
    palette.frombytes(stored.tobytes())
    palette.putpalette([7, 7, 7] * 256)
    palette.save(root / "SegmentationClass/2007_1.png")
    data = load_benchmark("voc20", tmp_path)
    assert len(data.labels.classes[14]) > 1
    result = scored(PaintedEncoder(20), one_hot_processor, data, as_drawn("voc20"), progress=False)
    present = {title: iou for title, iou in result.per_class_iou.items() if not math.isnan(iou)}
    assert present == {data.labels.class_names[14]: 1, data.labels.class_names[19]: 1}


def photo(size_hw: tuple[int, int], name: str, labels: Any) -> BenchmarkData:
    """A benchmark of one image, all of class 0."""
    sample = Sample("image", Image.new("RGB", (size_hw[1], size_hw[0])), np.zeros(size_hw, np.int32))
    return BenchmarkData(name, "", labels, ("image",), lambda index: sample)


@pytest.mark.parametrize(
    ("protocol", "benchmark", "size_hw", "expected"),
    [
        ("spar", "voc20", (96, 128), [(672, 896)]),
        ("spar", "ade20k", (80, 400), [(410, 2048)]),  # the longer side bounds it
        ("spar", "cityscapes", (64, 128), [(1024, 2048)]),
        ("sclip", "voc20", (96, 128), [(224, 224)] * (2 * 3)),  # 336 x 448, window 224, stride 112
        ("sclip", "cityscapes", (64, 128), [(224, 224)] * (4 * 9)),  # 560 x 1120
    ],
)
def test_protocols_decide_what_the_encoder_sees(
    protocol: str,
    benchmark: str,
    size_hw: tuple[int, int],
    expected: list[tuple[int, int]],
    one_hot_processor: OneHotText,
) -> None:
    labels = load_vocabulary(benchmark)
    encoder = SizeRecorder(len(labels))
    # A checkpoint's own resizing has no say.
    one_hot_processor.image_processor.do_resize = True
    one_hot_processor.image_processor.size = {"shortest_edge": 48}
    result = evaluate(
        segmenter(encoder, one_hot_processor),
        one_hot_processor,
        photo(size_hw, benchmark, labels),
        protocol,
        progress=False,
    )
    assert encoder.sizes == expected
    assert result.protocol["name"] == protocol and result.mean_iou == 1


def test_constants_of_the_protocols() -> None:
    """SPAR's and SCLIP's published constants: (logit scale, background threshold, area threshold)."""
    for name in ("spar", "sclip"):
        constants = {
            benchmark: (row.logit_scale, row.background_threshold, row.area_threshold)
            for benchmark, row in PROTOCOLS[name].items()
        }
        assert constants.pop("voc21") == (65, 0.1, 0.1)
        assert constants.pop("context60") == constants.pop("coco_object") == (50, 0.1, None)
        assert set(constants.values()) == {(40, None, None)}
        assert all(len(row.templates) == 80 for row in PROTOCOLS[name].values())
    assert {row.short_side_px for row in PROTOCOLS["spar"].values()} == {672, 1024}
    sides_px = {name: row.short_side_px for name, row in PROTOCOLS["sclip"].items()}
    assert (sides_px.pop("cityscapes"), sides_px.pop("coco_stuff")) == (560, 448) and set(sides_px.values()) == {336}
    assert not any(row.antialias for row in PROTOCOLS["sclip"].values())
    assert {(row.window_px, row.stride_px) for row in PROTOCOLS["sclip"].values()} == {(224, 112)}


class Halves(SizeRecorder):
    """Each window's left half is long and nearly class 2, its right half is short and surely class 1."""

    def forward(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        outputs = super().forward(pixel_values)
        middle = outputs.patch_embeds.shape[2] // 2
        outputs.patch_embeds[:, :, :middle] = torch.tensor([6.0, 0.0, 8.0])
        outputs.patch_embeds[:, :, middle:] = torch.tensor([0.0, 1.0, 0.0])
        return outputs


def test_a_protocols_windows_average_cosines_not_features(one_hot_processor: OneHotText) -> None:
    """Where two windows lie over each other 0.5 of class 1 beats 0.4 of class 2; means of features say class 2."""
    target = np.ones((224, 336), np.int32)
    target[:, :112] = 2
    sample = Sample("image", Image.new("RGB", (336, 224)), target)
    data = BenchmarkData("custom", "", Labels.parse("a; b; c"), ("image",), lambda index: sample)
    result = scored(Halves(3), one_hot_processor, data, as_drawn("custom", "sclip"), progress=False)
    assert result.pixel_accuracy > 0.97
    window = SlidingWindow(Halves(3), 224, 112)
    result = scored(window, one_hot_processor, data, as_drawn("custom"), progress=False)
    assert result.pixel_accuracy < 0.7


def test_a_protocol_may_resize_as_opencv_does() -> None:
    """Four pixels for each, half-pixel centres, sides rounded half up, in 8 bits."""
    image = np.random.default_rng(0).integers(0, 256, (75, 99, 3), dtype=np.uint8)
    found = np.asarray(load_protocol("sclip", "voc20").replace(short_side_px=30).resize(Image.fromarray(image)))
    assert found.shape == (30, 40, 3)  # 39.6
    for y, x in np.ndindex(30, 40):
        at_y, at_x = (y + 0.5) * 75 / 30 - 0.5, (x + 0.5) * 99 / 40 - 0.5
        top, left = int(at_y), int(at_x)
        down, right = at_y - top, at_x - left
        four = image[top : top + 2, left : left + 2].astype(float)
        expected = np.array([1 - down, down]) @ (four.transpose(2, 0, 1) @ np.array([1 - right, right])).T
        assert np.abs(found[y, x] - expected).max() <= 0.5001
    assert load_protocol("sclip", "voc20").replace(short_side_px=5).resize(Image.new("L", (2, 4))).size == (5, 10)


def test_protocol_errors() -> None:
    assert load_protocol(None, "picturebook").name == "picturebook" and load_protocol(None, "ade20k").name == "spar"
    with pytest.raises(ValueError, match="protocol 'spar' is not defined for benchmark 'picturebook', which has pict"):
        load_protocol("spar", "picturebook")
    with pytest.raises(
        ValueError, match="protocol 'sam' is not defined for benchmark 'ade20k', which has spar and sclip"
    ):
        load_protocol("sam", "ade20k")
    with pytest.raises(ValueError, match="window_px is 224 and stride_px None"):
        Protocol("half", window_px=224)


@pytest.fixture
def book() -> BenchmarkData:
    return load_benchmark("picturebook", scale=1.5, native_px=64)


@pytest.fixture
def processor(clip_tokenizer: Any) -> SparProcessor:
    """With one template instead of 80: quick."""
    return SparProcessor(SparImageProcessor(), clip_tokenizer, ["a photo of a {}."])


@pytest.fixture
def tiny(make_spar: Callable[..., SparModel]) -> SparModel:
    return make_spar(num_hidden_layers=6)


def scores_of(result: EvaluationResult) -> dict[str, Any]:
    """What must not depend on when the run was stopped."""
    names = ("mean_iou", "pixel_accuracy", "mean_accuracy", "boundary_iou", "num_images", "per_class_iou")
    return {name: getattr(result, name) for name in names}


def stop_at(data: BenchmarkData, sample: int) -> BenchmarkData:
    """The same benchmark, but Ctrl-C comes when this sample of all 512 is read."""

    def read(index: int) -> Any:
        if index >= sample:
            raise KeyboardInterrupt
        return data.read(index)

    return replace(data, read=read)


class Together(Processes):
    """Processes that are threads of this one."""

    def gather(self, part: Any) -> list[Any]:
        PARTS[self.index] = part
        BARRIER.wait()
        parts = [deepcopy(PARTS[index]) for index in range(self.count)]
        BARRIER.wait()
        return parts


PARTS: dict[int, Any] = {}
BARRIER = threading.Barrier(3, timeout=60)


def test_several_processes_count_what_one_counts(
    tmp_path: Path, tiny: SparModel, processor: SparProcessor, book: BenchmarkData
) -> None:
    arguments = (segmenter(tiny.vision_model, processor, tiny), processor)
    options: dict[str, Any] = {"limit": 8, "progress": False, "save_every": 1}
    alone = evaluate(*arguments, book, **options, state_path=tmp_path / "alone.safetensors")
    state = tmp_path / "together.safetensors"
    read: list[int] = []
    counted = replace(book, read=lambda index: (read.append(index), book.read(index))[1])

    def run(data: BenchmarkData) -> list[EvaluationResult]:
        with ThreadPoolExecutor(3) as pool:
            shares = [Together(index, 3) for index in range(3)]
            parts = [pool.submit(evaluate, *arguments, data, **options, state_path=state, processes=s) for s in shares]
            return [part.result() for part in parts]

    for result in run(counted):
        np.testing.assert_equal(scores_of(result), scores_of(alone))
    assert sorted(read) == [number * 512 // 8 for number in range(8)]  # each once
    matrices = [load_numpy(path)["pixels"] for path in (state, tmp_path / "alone.safetensors")]
    np.testing.assert_array_equal(*matrices)  # to the last pixel
    # One process takes up what several have done.
    np.testing.assert_equal(
        scores_of(evaluate(*arguments, stop_at(book, 0), **options, state_path=state)), scores_of(alone)
    )


def test_stopped_and_resumed_equals_uninterrupted(
    tmp_path: Path, tiny: SparModel, processor: SparProcessor, book: BenchmarkData
) -> None:
    arguments = (segmenter(tiny.vision_model, processor, tiny), processor)
    options: dict[str, Any] = {"limit": 7, "progress": False}
    whole = evaluate(*arguments, book, **options)
    state = tmp_path / "folder" / "state.safetensors"
    with pytest.raises(KeyboardInterrupt):
        evaluate(*arguments, stop_at(book, 300), **options, state_path=state, save_every=2)
    read: list[int] = []
    counted = replace(book, read=lambda index: (read.append(index), book.read(index))[1])
    resumed = evaluate(*arguments, counted, **options, state_path=state, save_every=2)
    assert read == [292, 365, 438]  # 7 scenes spread over 512: 0, 73, 146, 219 were saved
    np.testing.assert_equal(scores_of(resumed), scores_of(whole))
    assert whole.num_images == 7 and 0 < whole.mean_iou < 0.5
    # Finished: nothing is read again.
    again = evaluate(*arguments, stop_at(book, 0), **options, state_path=state)
    np.testing.assert_equal(scores_of(again), scores_of(whole))
    assert [path.name for path in state.parent.iterdir()] == ["state.safetensors"]


@pytest.mark.parametrize(
    "changed", ["images", "encoder", "stride", "weights", "processor", "benchmark", "protocol", "nothing"]
)
def test_a_state_of_something_else_is_refused(
    tmp_path: Path,
    make_spar: Callable[..., SparModel],
    processor: SparProcessor,
    book: BenchmarkData,
    changed: str,
) -> None:
    state = tmp_path / "state"
    tiny = make_spar(num_hidden_layers=6)
    options: dict[str, Any] = {"limit": 2, "progress": False, "state_path": state}
    teacher = SlidingWindow(tiny.vision_model, stride_px=32)
    scored(teacher, processor, book, model=tiny, **options)
    reason = "segmenter" if changed in ("stride", "encoder") else changed
    if changed == "images":
        options["limit"] = 3
    elif changed == "encoder":
        teacher = SlidingWindow(make_spar(num_hidden_layers=6, method="naclip").vision_model, stride_px=32)
    elif changed == "stride":
        teacher = SlidingWindow(tiny.vision_model, stride_px=24)
    elif changed == "weights":
        with torch.no_grad():
            tiny.vision_model.visual_projection.weight[0, 0] += 1e-3
    elif changed == "processor":
        processor = SparProcessor(processor.image_processor, processor.tokenizer, ["a drawing of a {}."])
    elif changed == "benchmark":
        book = load_benchmark("picturebook", scale=1, native_px=64)
    elif changed == "protocol":
        options["protocol"] = load_protocol(None, "picturebook").replace(logit_scale=50.0)
    else:
        scored(teacher, processor, book, model=tiny, **options)
        return
    with pytest.raises(ValueError, match=rf"state was written by another evaluation: {reason} changed"):
        scored(teacher, processor, book, model=tiny, **options)


def test_a_broken_state_is_refused(
    tmp_path: Path, tiny: SparModel, processor: SparProcessor, book: BenchmarkData
) -> None:
    state = tmp_path / "state"
    state.write_bytes(b"no state")
    with pytest.raises(ValueError, match="state is no state of an evaluation"):
        scored(tiny.vision_model, processor, book, model=tiny, limit=1, progress=False, state_path=state)


def test_limit_must_be_positive(tiny: SparModel, processor: SparProcessor, book: BenchmarkData) -> None:
    with pytest.raises(ValueError, match="limit is 0; it must be at least 1"):
        scored(tiny.vision_model, processor, book, model=tiny, limit=0, progress=False)


def test_json_is_valid_and_whole(
    tmp_path: Path, streets: tuple[Path, np.ndarray], one_hot_processor: OneHotText, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/spar", "evaluate", "--data", "my data"])
    data = load_benchmark("cityscapes", streets[0])
    result = evaluate(
        segmenter(PaintedEncoder(19), one_hot_processor),
        one_hot_processor,
        data,
        as_drawn("cityscapes"),
        progress=False,
    )
    result.save(tmp_path / "results" / "cityscapes.json")
    written = json.loads((tmp_path / "results" / "cityscapes.json").read_text(), parse_constant=pytest.fail)
    assert written["mean_iou"] == 1 and written["seconds_per_image"] > 0
    assert written["command"] == "spar evaluate --data 'my data'"
    assert written["per_class_iou"]["road"] == 1 and written["per_class_iou"]["train"] is None
    assert written["protocol"]["logit_scale"] == 40
    lines = result.table().splitlines()
    assert lines[0].startswith("cityscapes (gtFine/val/*_gtFine_labelTrainIds.png), protocol spar, changed, 2 images")
    assert "| road | 100.0 |" in lines and "| train | absent |" in lines and "| **mean IoU** | **100.0** |" in lines


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(self: Path, content: bytes) -> int:
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


@pytest.fixture(scope="module")
def quality() -> ModuleType:
    path = Path(__file__).parents[1] / "benchmarks" / "quality.py"
    spec = importlib.util.spec_from_file_location("quality", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["quality"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_rows_of_the_quality_table(quality: ModuleType) -> None:
    assert quality.Row.parse("teacher, stride 24=tiny,stride=24") == quality.Row("teacher, stride 24", "tiny", 24)
    assert quality.Row.parse("a=me/model,method=naclip") == quality.Row("a", "me/model", None, "naclip")
    reaching = quality.Row.parse("a=tiny,reach=window")
    assert build_encoder(load("tiny")[0].vision_model, **reaching.choices(1)).config.attention_reach == "window"
    for spec in ("tiny", "=tiny", "a=", "a=tiny,windows=3"):
        with pytest.raises(ValueError, match=r"a row is NAME=CHECKPOINT\[,stride=N\]"):
            quality.Row.parse(spec)
    with pytest.raises(ValueError, match="window is '3' in 'a=tiny,window=3'; it must be paper or native"):
        quality.Row.parse("a=tiny,window=3")
    with pytest.raises(ValueError, match="stride is 'x'"):
        quality.Row.parse("a=tiny,stride=x")


def test_quality_table_has_mean_and_spread(quality: ModuleType) -> None:
    entries = [
        {"name": "one", "scale": 1, "score": 20.04},
        {"name": "three", "scale": 1, "score": 1.0},
        {"name": "three", "scale": 1, "score": 2.0},
        {"name": "three", "scale": 1, "score": 3.0},
        {"name": "three", "scale": 4, "score": 7.0},
    ]
    assert quality.table(entries, [1, 4], lambda entry: entry["score"]) == [
        "|  | 1x | 4x |",
        "| --- | ---: | ---: |",
        "| one | 20.0 |  |",
        "| three | 2.0 ± 1.0 | 7.0 |",
    ]


def test_quality_command(
    tmp_path: Path, tiny: SparModel, processor: SparProcessor, quality: ModuleType, capsys: pytest.CaptureFixture
) -> None:
    tiny.save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    output = tmp_path / "quality.json"
    rows = [f"single pass={tmp_path}/model", f"teacher={tmp_path}/model,stride=24"]
    quality.main([*rows, "--scales", "1", "1.5", "--limit", "2", "--output", str(output), "--device", "cpu"])
    document = json.loads(output.read_text())
    results = {(entry["name"], entry["scale"]): entry for entry in document["results"]}
    assert results.keys() == {(name, scale) for name in ("single pass", "teacher") for scale in (1, 1.5)}
    assert all(entry["protocol"]["name"] == "picturebook" for entry in results.values())
    assert document["command"] and document["versions"].keys() == {"spar-hf", "torch", "transformers"}
    printed = capsys.readouterr().out
    expected = 100 * results["teacher", 1.5]["mean_iou"]
    assert f"| {expected:.1f} |" in next(line for line in printed.splitlines() if line.startswith("| teacher |"))
    with pytest.raises(SystemExit):
        quality.main(["nonsense"])
