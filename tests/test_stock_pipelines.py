"""What `transformers.pipeline` loads: its own tasks with our models, our task with stock ones, and saved pipelines."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import spar_dinov3, spar_siglip, stock_siglip
from PIL import Image
from transformers import CLIPModel, CLIPProcessor, pipeline
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

import spar_hf
from spar_hf.families import make_processor
from spar_hf.pipeline_spar import TASK, OpenVocabularySegmentationPipeline
from spar_hf.processing_spar import SparProcessor

LABELS = "road; car, automobile; sky; dog; cat"


def picture(height: int = 64, width: int = 96) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module", params=["clip", "siglip", "dinov3"])
def whole(request: Any, make_spar: Any, clip_tokenizer: Any, tmp_path_factory: Any) -> tuple[Any, SparProcessor, Path]:
    """A small whole model of each family, its processor, and the folder that holds both."""
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "clip":
        model = make_spar(num_hidden_layers=2)
    else:
        model = spar_dinov3(clip_tokenizer) if request.param == "dinov3" else spar_siglip(clip_tokenizer, folder)
    processor = make_processor(model.config, clip_tokenizer)
    processor.image_processor.size = {"longest_edge": 96}
    model.eval().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model, processor, folder


# ------------------------------------------------------------------------------- tasks of transformers


@torch.no_grad()
def test_zero_shot_image_classification(whole: tuple[Any, SparProcessor, Path]) -> None:
    model, processor, folder = whole
    names = ["dog", "sky", "road"]
    (found,) = pipeline("zero-shot-image-classification", model=str(folder), device="cpu")([picture()], names)
    texts = [f"This is a photo of {name}." for name in names]
    siglip = model.config.model_type == "spar_siglip"
    padding = {"padding": "max_length", "max_length": 64} if siglip else {"padding": True}
    words = processor.tokenizer(texts, return_tensors="pt", truncation=True, **padding)
    logits = model(**processor(images=picture()), **words).logits_per_image[0]
    scores = logits.sigmoid() if siglip else logits.softmax(-1)
    assert {entry["label"]: pytest.approx(entry["score"], abs=1e-5) for entry in found} == dict(
        zip(names, scores.tolist(), strict=True)
    )


@torch.no_grad()
def test_image_feature_extraction(whole: tuple[Any, SparProcessor, Path]) -> None:
    model, processor, folder = whole
    extract = pipeline("image-feature-extraction", model=str(folder), device="cpu")
    outputs = model(**processor(images=picture()))
    np.testing.assert_allclose(extract(picture()), outputs.patch_embeds.numpy(), atol=1e-5)
    np.testing.assert_allclose(extract(picture(), pool=True), outputs.pooler_output.numpy(), atol=1e-5)
    (first, second) = extract([picture(), picture(96, 64)], return_tensors=True)
    assert first.shape[:3] == (1, 4, 6) and second.shape[:3] == (1, 6, 4)


def test_a_vision_tower_alone_gives_features(whole: tuple[Any, SparProcessor, Path], tmp_path: Path) -> None:
    model, processor, _ = whole
    model.vision_model.save_pretrained(tmp_path)
    processor.image_processor.save_pretrained(tmp_path)
    extract = pipeline("image-feature-extraction", model=str(tmp_path), device="cpu")
    with torch.no_grad():
        wanted = model.vision_model(**processor.image_processor(picture(), return_tensors="pt")).patch_embeds
    np.testing.assert_allclose(extract(picture()), wanted.numpy(), atol=1e-5)


# ------------------------------------------------------------------------- our task with stock models


@pytest.mark.parametrize("saved", ["tokenizer", "processor"])
@pytest.mark.parametrize("family", ["clip", "siglip"])
def test_a_stock_folder_is_converted(
    family: str, saved: str, make_clip: Callable[..., CLIPModel], clip_tokenizer: Any, tmp_path: Path
) -> None:
    stock = make_clip(num_hidden_layers=2) if family == "clip" else stock_siglip(len(clip_tokenizer))
    stock.save_pretrained(tmp_path)
    clip_tokenizer.save_pretrained(tmp_path)
    if saved == "processor" and family == "clip":
        CLIPProcessor(CLIPImageProcessorPil(), clip_tokenizer).save_pretrained(tmp_path)
    segment = pipeline(TASK, model=str(tmp_path), device="cpu")
    model, processor = spar_hf.load(tmp_path)
    wanted = OpenVocabularySegmentationPipeline(model=model, processor=processor, device="cpu")
    assert type(segment.model) is type(model)
    assert segment.model.config.vision_config.to_dict() == model.config.vision_config.to_dict()
    assert segment.processor.to_dict() == processor.to_dict()
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(segment.model.state_dict()[name], weight, rtol=0, atol=0)
    found, expected = (each(picture(), LABELS, do_resize=False) for each in (segment, wanted))
    assert (found["segmentation"] == expected["segmentation"]).all()
    segment.save_pretrained(tmp_path / "ours")
    assert type(spar_hf.load(tmp_path / "ours")[0]) is type(model)


def test_a_stock_model_keeps_its_type_and_its_weights(
    make_clip: Callable[..., CLIPModel], clip_tokenizer: Any
) -> None:
    stock = make_clip(num_hidden_layers=1).to(torch.bfloat16)
    processor = CLIPProcessor(CLIPImageProcessorPil(), clip_tokenizer)
    try:
        segment = OpenVocabularySegmentationPipeline(model=stock, processor=processor, device="cpu")
        assert segment.model.dtype == torch.bfloat16 and not segment.model.training
        ours = segment.model.vision_model.visual_projection.weight
        torch.testing.assert_close(ours, stock.visual_projection.weight, rtol=0, atol=0)
    finally:
        stock.float()


def test_the_task_alone_takes_a_default_model() -> None:
    segment = pipeline(TASK, device="cpu")
    model, _ = spar_hf.load("tiny")
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(segment.model.state_dict()[name], weight, rtol=0, atol=0)
    assert segment(picture(), LABELS, do_resize=False)["segmentation"].shape == (64, 96)


@pytest.mark.parametrize("name", ["tiny", "tiny-spar"])
def test_what_ships_has_a_name(name: str) -> None:
    segment = spar_hf.pipeline(name, device="cpu", candidate_labels=LABELS)
    assert isinstance(segment, OpenVocabularySegmentationPipeline)
    assert Path(segment.model.name_or_path).name == name
    assert segment(picture(), do_resize=False)["segmentation"].shape == (64, 96)


def test_our_pipeline_takes_models_too(whole: tuple[Any, SparProcessor, Path]) -> None:
    model, processor, folder = whole
    assert spar_hf.pipeline(model, processor=processor, device="cpu").model is model
    assert spar_hf.pipeline(folder, device="cpu").model.config.model_type == model.config.model_type
    with pytest.raises(ValueError, match=r"there is no model 'tini'; choose one of .* Did you mean 'tiny'"):
        spar_hf.pipeline("tini")


def test_what_cannot_be_segmented_with_is_refused_at_construction(
    whole: tuple[Any, SparProcessor, Path], make_clip: Callable[..., CLIPModel], tmp_path: Path
) -> None:
    model, processor, _ = whole
    with pytest.raises(ValueError, match="got a NoneType for a processor; it needs a SparProcessor"):
        OpenVocabularySegmentationPipeline(model=model, device="cpu")
    with pytest.raises(
        ValueError, match=r"is a CLIPVisionModel of type 'clip_vision_model'; those that can be loaded"
    ):
        OpenVocabularySegmentationPipeline(
            model=make_clip(num_hidden_layers=1).vision_model, processor=processor, device="cpu"
        )
    with pytest.raises(ValueError, match="the device is 'meta', where weights have no values"):
        OpenVocabularySegmentationPipeline(model=model, processor=processor, device="meta")
    assert model.device.type == "cpu"


# --------------------------------------------------------------------------------- saved and loaded


def test_a_saved_pipeline_loads_with_the_package(whole: tuple[Any, SparProcessor, Path], tmp_path: Path) -> None:
    model, processor, _ = whole
    segment = OpenVocabularySegmentationPipeline(model=model, processor=processor, device="cpu")
    segment.save_pretrained(tmp_path)
    entry = json.loads((tmp_path / "config.json").read_text())["custom_pipelines"][TASK]
    assert entry == {
        "impl": "pipeline_spar.OpenVocabularySegmentationPipeline", "pt": ["AutoModel"], "type": "multimodal"
    }  # fmt: skip
    wanted = segment(picture(), LABELS)
    for trust in (None, False, True):
        again = pipeline(TASK, model=str(tmp_path), device="cpu", trust_remote_code=trust)
        assert type(again) is OpenVocabularySegmentationPipeline  # the package's, whatever code lies there
        assert (again(picture(), LABELS)["segmentation"] == wanted["segmentation"]).all()


WITHOUT_PACKAGE = """
import sys
sys.modules["spar_hf"] = None  # cannot be imported
import numpy as np
from PIL import Image
from transformers import pipeline

folder, again, labels = sys.argv[1:]
segment = pipeline("open-vocabulary-segmentation", model=folder, device="cpu", trust_remote_code=True)
assert type(segment).__module__.startswith("transformers_modules.")
image = Image.open(folder + "/picture.png")
first = segment(image, candidate_labels=labels)
segment.save_pretrained(again)
segment = pipeline("open-vocabulary-segmentation", model=again, device="cpu", trust_remote_code=True)
second = segment([image, image], candidate_labels=labels, batch_size=2)
assert all((result["segmentation"] == first["segmentation"]).all() for result in second)
try:
    segment("no such file.png", candidate_labels=labels)
except ValueError as error:
    print(error)
np.save(again + "/map.npy", first["segmentation"])
"""


@pytest.mark.parametrize(
    "whole", ["clip", *(pytest.param(name, marks=pytest.mark.slow) for name in ("siglip", "dinov3"))], indirect=True
)
def test_a_saved_pipeline_loads_without_the_package(whole: tuple[Any, SparProcessor, Path], tmp_path: Path) -> None:
    model, processor, _ = whole
    segment = OpenVocabularySegmentationPipeline(model=model, processor=processor, device="cpu")
    segment.save_pretrained(tmp_path / "saved")
    picture().save(tmp_path / "saved" / "picture.png")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_PACKAGE, str(tmp_path / "saved"), str(tmp_path / "again"), LABELS],
        env={**environment, "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "no such file.png" in done.stdout
    found = np.load(tmp_path / "again" / "map.npy")
    assert (found != segment(picture(), LABELS)["segmentation"]).mean() < 1e-3
