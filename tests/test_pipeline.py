"""The pipeline task: loading by name, inputs, batches, an encoder of one's own, results."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F
from transformers import pipeline

import spar_hf  # noqa: F401 (registers the task and the Auto classes)
from spar_hf.clip_spar import SparModel
from spar_hf.encoders.sliding_window import SlidingWindow
from spar_hf.image_processing_spar import InvalidImageError, SparImageProcessor
from spar_hf.pipeline_spar import TASK, OpenVocabularySegmentationPipeline
from spar_hf.processing_spar import SparProcessor

LABELS = "road; car, automobile; sky; dog; cat"
TEMPLATES = ("a photo of a {}.", "my {}")


@pytest.fixture(scope="module")
def model(make_spar: Callable[..., SparModel]) -> SparModel:
    return make_spar(num_hidden_layers=2)


@pytest.fixture(scope="module")
def processor(clip_tokenizer: Any) -> SparProcessor:
    return SparProcessor(SparImageProcessor(), clip_tokenizer, TEMPLATES)


@pytest.fixture(scope="module")
def segment(model: SparModel, processor: SparProcessor) -> OpenVocabularySegmentationPipeline:
    return OpenVocabularySegmentationPipeline(model=model, processor=processor, device="cpu")


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def expected_map(
    encoder: Callable[[torch.Tensor], Any], model: SparModel, processor: SparProcessor, image: np.ndarray
) -> np.ndarray:
    """The plain formulation at full resolution, for images that are a multiple of the patch."""
    with torch.no_grad():
        patches = encoder(processor(images=image)["pixel_values"]).patch_embeds[0]
    features = processor.encode_labels(model, LABELS)
    cosine = F.normalize(patches, dim=-1) @ features.text_embeds.T
    logits = F.interpolate(cosine.permute(2, 0, 1)[None], size=image.shape[:2], mode="bilinear")[0]
    return features.class_ids[logits.argmax(0)].numpy()


def agrees(result: dict[str, Any], wanted: np.ndarray) -> bool:
    """Equal but for pixels on a boundary, where rounding decides."""
    return result["segmentation"].shape == wanted.shape and (result["segmentation"] != wanted).mean() < 1e-3


def test_a_result_holds_the_label_map_and_its_shares(
    segment: OpenVocabularySegmentationPipeline, model: SparModel, processor: SparProcessor
) -> None:
    image = picture(96, 128)
    result = segment(image, candidate_labels=LABELS)
    assert result["segmentation"].dtype == np.int32
    assert agrees(result, expected_map(model.vision_model, model, processor, image))
    assert (result["size_hw"], result["grid_hw"]) == ((96, 128), (6, 8))
    assert result["labels"].class_names == ("road", "car", "sky", "dog", "cat")
    shares = [entry["area_fraction"] for entry in result["segments"]]
    assert len(shares) > 1  # the random model tells something apart
    assert shares == sorted(shares, reverse=True) and sum(shares) == pytest.approx(1)
    for entry in result["segments"]:
        assert entry["label"] == result["labels"].class_names[entry["id"]]
        assert entry["area_fraction"] == (result["segmentation"] == entry["id"]).mean()


def test_the_label_map_has_the_images_own_upright_size(
    segment: OpenVocabularySegmentationPipeline, tmp_path: Path
) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(picture(90, 61)).save(tmp_path / "a.png", exif=exif)
    result = segment(str(tmp_path / "a.png"), LABELS, size={"longest_edge": 48})
    assert result["segmentation"].shape == (61, 90)
    assert (result["size_hw"], result["grid_hw"]) == ((32, 48), (2, 3))


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8])
def test_lists_paths_and_batches_give_what_single_images_give(
    segment: OpenVocabularySegmentationPipeline, tmp_path: Path, batch_size: int
) -> None:
    arrays = [picture(64, 80, 0), picture(48, 64, 1), picture(64, 80, 2), picture(50, 70, 3)]
    path = tmp_path / "a.png"
    Image.fromarray(arrays[1]).save(path)
    images = [arrays[0], path, Image.fromarray(arrays[2]), arrays[3]]
    together = segment(images, candidate_labels=LABELS, batch_size=batch_size)
    assert len(together) == 4
    for array, result in zip(arrays, together, strict=True):
        alone = segment(array, candidate_labels=LABELS)
        assert agrees(result, alone["segmentation"])
        assert result["size_hw"] == alone["size_hw"] and result["grid_hw"] == alone["grid_hw"]


def test_a_generator_is_read_as_it_comes(segment: OpenVocabularySegmentationPipeline) -> None:
    results = segment((picture(48, 64, seed) for seed in range(3)), candidate_labels=LABELS)
    assert [result["segmentation"].shape for result in results] == [(48, 64)] * 3
    assert segment([], candidate_labels=LABELS) == []


def test_equal_sizes_share_one_forward_pass(segment: OpenVocabularySegmentationPipeline, model: SparModel) -> None:
    shapes = []

    class Counted:
        """A dense encoder of one's own: nothing but what the interface asks for."""

        config, dtype, device = model.vision_model.config, model.dtype, model.device

        def __call__(self, pixel_values: torch.Tensor) -> Any:
            shapes.append(tuple(pixel_values.shape))
            return model.vision_model(pixel_values)

    images = [picture(48, 64, 0), picture(64, 48, 1), picture(48, 64, 2)]
    segment(images, candidate_labels=LABELS, batch_size=3, encoder=Counted())
    assert sorted(shapes) == [(1, 3, 64, 48), (2, 3, 48, 64)]


def test_a_sliding_window_takes_the_encoders_place(
    segment: OpenVocabularySegmentationPipeline, model: SparModel, processor: SparProcessor
) -> None:
    teacher = SlidingWindow(model.vision_model, stride_px=24)
    image = picture(96, 128)
    result = segment(image, candidate_labels=LABELS, encoder=teacher)
    wanted = expected_map(teacher, model, processor, image)
    assert agrees(result, wanted)
    assert not agrees(segment(image, candidate_labels=LABELS), wanted)


def test_thresholds_reach_the_label_map(segment: OpenVocabularySegmentationPipeline) -> None:
    image = picture(96, 128)
    result = segment(image, LABELS, background_threshold=1.0, background_class=-1)
    assert (result["segmentation"] == -1).all()
    assert result["segments"] == [{"id": -1, "label": "no class", "area_fraction": 1.0}]
    plain = segment(image, LABELS)
    smallest = min(entry["area_fraction"] for entry in plain["segments"])
    masked_out = segment(image, LABELS, area_threshold=smallest * 1.01, background_class=-1)
    assert len(masked_out["segments"]) < len(plain["segments"])


def test_labels_may_be_given_once(model: SparModel, processor: SparProcessor) -> None:
    once = OpenVocabularySegmentationPipeline(
        model=model, processor=processor, device="cpu", candidate_labels=LABELS, templates="{}"
    )
    assert once(picture(48, 64))["labels"].class_names[0] == "road"
    assert once(picture(48, 64), "tree; grass")["labels"].class_names == ("tree", "grass")


@pytest.mark.parametrize("batch_size", [1, 2])
def test_the_task_loads_a_folder_by_name(
    model: SparModel, processor: SparProcessor, tmp_path: Path, batch_size: int
) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    loaded = pipeline(TASK, model=str(tmp_path), device="cpu")
    assert isinstance(loaded, OpenVocabularySegmentationPipeline)
    assert isinstance(loaded.processor, SparProcessor)
    images = [picture(64, 96, 0), picture(48, 64, 1)]
    for image, result in zip(images, loaded(images, candidate_labels=LABELS, batch_size=batch_size), strict=True):
        assert agrees(result, expected_map(model.vision_model, model, processor, image))


def test_a_saved_pipeline_loads_again(
    segment: OpenVocabularySegmentationPipeline, model: SparModel, processor: SparProcessor, tmp_path: Path
) -> None:
    segment.save_pretrained(tmp_path)
    loaded = SparProcessor.from_pretrained(tmp_path)
    assert loaded.templates == list(TEMPLATES)
    assert (tmp_path / "model.safetensors").is_file()


def test_mistakes_say_why(
    segment: OpenVocabularySegmentationPipeline, model: SparModel, processor: SparProcessor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="there are no labels; pass candidate_labels"):
        segment(picture(48, 64))
    with pytest.raises(ValueError, match="label 2 is empty"):
        segment(tmp_path / "missing.png", candidate_labels="road;")  # the labels are read first
    with pytest.raises(InvalidImageError, match=r"missing\.png' does not exist"):
        segment(tmp_path / "missing.png", candidate_labels=LABELS)
    with pytest.raises(ValueError, match="does not know treshold; allowed are candidate_labels"):
        segment(picture(48, 64), LABELS, treshold=0.5)
    with pytest.raises(ValueError, match="a batch of 2 images came as one array"):
        segment(np.stack([picture(48, 64)] * 2), LABELS)
    with pytest.raises(ValueError, match="got a NoneType for a processor; it needs a SparProcessor"):
        OpenVocabularySegmentationPipeline(model=model, device="cpu")
