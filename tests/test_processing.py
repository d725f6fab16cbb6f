"""Labels, prompts and SparProcessor: parsing, text features computed once, tokenizer rules, saving."""

from __future__ import annotations

import copy
import logging
import pickle
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from spar_hf.clip_spar import SparModel
from spar_hf.image_processing_spar import SparImageProcessor
from spar_hf.pipeline_spar import OpenVocabularySegmentationPipeline
from spar_hf.processing_spar import LabelFeatures, Labels, SparProcessor
from spar_hf.prompts_spar import IMAGENET_TEMPLATES, check_templates, fill_template
from spar_hf.segmentation_spar import FromFeatures

TEMPLATES = ("a photo of a {}.", "a bad drawing of the {}.", "itap of my {}.")


@pytest.fixture
def model(make_spar: Callable[..., SparModel]) -> SparModel:
    return make_spar(num_hidden_layers=2)


@pytest.fixture
def processor(clip_tokenizer: Any) -> SparProcessor:
    """One of its own."""
    return SparProcessor(SparImageProcessor(), clip_tokenizer)


@pytest.fixture
def calls(model: SparModel, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many prompts each call of the text tower got."""
    sizes: list[int] = []
    text_tower = model.get_text_features

    def counted(**tokens: Any) -> Any:
        sizes.append(len(tokens["input_ids"]))
        return text_tower(**tokens)

    monkeypatch.setattr(model, "get_text_features", counted)
    yield sizes


# Labels


@pytest.mark.parametrize(
    "labels",
    [
        "road; car, automobile; sky",
        " road ;car ,  automobile;sky ",
        ["road", "car, automobile", "sky"],
        ("road", ("car", "automobile"), ["sky"]),
        [["road"], ["car", "automobile"], ["sky"]],
    ],
)
def test_labels_have_one_meaning_in_every_form(labels: Any) -> None:
    parsed = Labels.parse(labels)
    assert parsed == Labels((("road",), ("car", "automobile"), ("sky",)))
    assert len(parsed) == 3
    assert parsed.names == ("road", "car", "automobile", "sky")
    assert parsed.class_ids == (0, 1, 1, 2)
    assert parsed.class_names == ("road", "car", "sky")
    assert Labels.parse(parsed) is parsed


def test_a_name_in_a_list_may_hold_a_comma() -> None:
    assert Labels.parse([["lamp, floor"], ["sky"]]).names == ("lamp, floor", "sky")


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ("", "there are no labels"),
        ("   ", "there are no labels"),
        ([], "there are no labels"),
        ("road;;sky", "label 2 is empty"),
        ("road; car,; sky", "label 2 is empty in ' car,'"),
        (["road", " "], "label 2 is empty"),
        ([["road"], []], "label 2 is empty"),
        ("road; car; Road", r"label 'Road' is in two classes, 1 \('road'\) and 3 \('Road'\)"),
        ("car, automobile; van, automobile", r"label 'automobile' is in two classes, 1 \('car'\) and 2 \('van'\)"),
        ("car, Car; sky", "label 1 names the same thing twice: 'car, Car'"),
        (["road", 3], "label 2 is 3; allowed are a string, a list of strings or a mapping"),
        (5, "labels are a int; allowed are a string such as"),
        ({"road", "sky"}, "labels are a set; allowed are a string such as"),
        (b"road", "labels are a bytes; allowed are a string such as"),
        (["road", {"title": "sky"}], "label 2: there is no field 'title'; choose one of id, name, names, synonyms"),
        (["road", {"names": ["sky"]}], "label 2 has no name; give"),
        ({"road": ["a road"], "road ": ["street"]}, "two classes are called 'road'"),
        ("car; \udcff\udcfe", r"label 2 is ' \\udcff\\udcfe', which holds bytes that are no UTF-8 text"),
        (["car", "x" * 1_000_000], "label 2 has 1000000 characters; at most 2000 are read"),
    ],
)
def test_wrong_labels_say_why(labels: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Labels.parse(labels)


def test_too_many_labels_name_the_limit() -> None:
    many = [f"name {number}" for number in range(10_001)]
    with pytest.raises(ValueError, match=r"there are over 10000 labels; at most 10000 are allowed.*max_labels"):
        Labels.parse(many)
    assert len(Labels.parse(many, max_labels=10_001)) == 10_001


def test_commas_between_classes_are_pointed_out(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert len(Labels.parse("road, car, sky")) == 1
    assert "one class with 3 synonyms (road, car, sky); separate classes with ';'" in caplog.text


def test_the_80_templates_are_all_there() -> None:
    assert len(set(check_templates(IMAGENET_TEMPLATES))) == 80
    assert fill_template("a photo of a {}.", "{car}") == "a photo of a {car}."


@pytest.mark.parametrize("template", ["a photo", "{} and {}", ""])
def test_a_template_needs_one_place_for_the_name(template: str, processor: SparProcessor, model: SparModel) -> None:
    with pytest.raises(ValueError, match=r"must hold exactly one '\{\}'"):
        check_templates(["a {}", template])
    with pytest.raises(ValueError, match=r"must hold exactly one '\{\}'"):
        processor.encode_labels(model, "sky", templates=["a {}", template])
    with pytest.raises(ValueError, match="there are no prompt templates"):
        check_templates([])


# Text features


def plain_text_features(model: SparModel, tokenizer: Any, name: str, templates: tuple[str, ...]) -> torch.Tensor:
    """One name after another, one prompt at a time."""
    rows = []
    for template in templates:
        tokens = tokenizer(template.replace("{}", name), return_tensors="pt")
        with torch.no_grad():
            row = model.get_text_features(**tokens).pooler_output[0]
        rows.append(row / row.norm())
    mean = torch.stack(rows).mean(0)
    return mean / mean.norm()


@pytest.mark.parametrize("batch_size", [1, 4, 5, 1000])
def test_text_features_are_the_normalised_mean_of_normalised_prompts(
    processor: SparProcessor, model: SparModel, clip_tokenizer: Any, batch_size: int
) -> None:
    features = processor.encode_labels(model, "road; car, automobile; sky", TEMPLATES, batch_size=batch_size)
    assert isinstance(features, LabelFeatures)
    assert features.class_ids.tolist() == [0, 1, 1, 2]
    names = ("road", "car", "automobile", "sky")
    wanted = torch.stack([plain_text_features(model, clip_tokenizer, name, TEMPLATES) for name in names])
    torch.testing.assert_close(features.text_embeds, wanted, atol=2e-6, rtol=0)
    assert not features.text_embeds.requires_grad


def test_the_default_is_the_80_templates(processor: SparProcessor, model: SparModel, calls: list[int]) -> None:
    features = processor.encode_labels(model, "road; sky")
    assert sum(calls) == 160
    torch.testing.assert_close(
        features.text_embeds, processor.encode_labels(model, "road; sky", IMAGENET_TEMPLATES).text_embeds
    )


def test_the_processors_own_templates_come_before_the_80(
    clip_tokenizer: Any, model: SparModel, calls: list[int]
) -> None:
    processor = SparProcessor(SparImageProcessor(), clip_tokenizer, templates=TEMPLATES)
    processor.encode_labels(model, "road; sky")
    assert sum(calls) == 6


def test_what_is_encoded_once_serves_many_times(processor: SparProcessor, model: SparModel, calls: list[int]) -> None:
    encoded = processor.encode_labels(model, "road; car, automobile", TEMPLATES)
    assert sum(calls) == 9
    assert processor.encode_labels(model, encoded) is encoded
    segment = OpenVocabularySegmentationPipeline(model=model, processor=processor)
    picture = np.zeros((64, 64, 3), np.uint8)
    for _ in range(2):
        segment(picture, candidate_labels=encoded)
    assert sum(calls) == 9
    segment([picture, picture], candidate_labels="road; car, automobile", templates=TEMPLATES)
    assert sum(calls) == 18  # once for the pictures of a call


def _train(model: SparModel) -> None:
    with torch.no_grad():
        model.text_projection.weight.mul_(torch.linspace(0.5, 2, model.text_projection.weight.shape[0])[:, None])


def _write_into_data(model: SparModel) -> None:
    weight = model.text_projection.weight
    weight.data.copy_(weight.data * torch.linspace(0.5, 2, weight.shape[0])[:, None])


def _hook(model: SparModel) -> None:
    scale = torch.linspace(0.5, 2, model.text_projection.weight.shape[0])
    model.text_projection.register_forward_hook(lambda module, args, output: output * scale)


@pytest.mark.parametrize("change", [_train, _write_into_data, _hook])
def test_text_features_are_those_of_the_model_as_it_is(
    change: Callable[[SparModel], None], processor: SparProcessor, make_spar: Callable[..., SparModel]
) -> None:
    """Optimisers, EMA, hooks: whatever changes what the text says is seen in the next call."""
    model = make_spar(num_hidden_layers=2)
    segment = OpenVocabularySegmentationPipeline(
        model=model, processor=processor, candidate_labels="road; sky", templates=TEMPLATES
    )
    before = segment.encode_labels("road; sky", TEMPLATES).text_embeds
    change(model)
    after = processor.encode_labels(model, "road; sky", TEMPLATES).text_embeds
    assert not torch.allclose(before, after, atol=1e-3)
    seen: list[torch.Tensor] = []
    watched = FromFeatures(model.vision_model, model, processor)
    plain = watched.encode_labels
    watched.encode_labels = lambda *args: (seen.append((found := plain(*args)).text_embeds), found)[1]  # type: ignore
    segment(np.zeros((64, 64, 3), np.uint8), segmenter=watched)
    torch.testing.assert_close(seen[0], after)
    after.zero_()  # what is returned is the caller's
    torch.testing.assert_close(processor.encode_labels(model, "road; sky", TEMPLATES).text_embeds, seen[0])


def test_text_features_follow_an_adapter_on_and_off(
    processor: SparProcessor, make_spar: Callable[..., SparModel]
) -> None:
    peft = pytest.importorskip("peft")
    model = make_spar(num_hidden_layers=2)
    plain = processor.encode_labels(model, "road; sky", TEMPLATES).text_embeds
    config = peft.LoraConfig(target_modules=["q_proj", "k_proj", "text_projection"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config)
    after = processor.encode_labels(adapted, "road; sky", TEMPLATES).text_embeds
    assert not torch.allclose(plain, after, atol=1e-3)
    with adapted.disable_adapter():
        torch.testing.assert_close(processor.encode_labels(adapted, "road; sky", TEMPLATES).text_embeds, plain)
    merged = adapted.merge_and_unload()
    torch.testing.assert_close(
        processor.encode_labels(merged, "road; sky", TEMPLATES).text_embeds, after, atol=1e-5, rtol=0
    )


def test_half_precision_text_towers_give_single_precision_features(
    processor: SparProcessor, make_spar: Callable[..., SparModel]
) -> None:
    model = make_spar(num_hidden_layers=2)
    full = processor.encode_labels(model, "road; sky", TEMPLATES).text_embeds
    half = processor.encode_labels(model.to(torch.bfloat16), "road; sky", TEMPLATES).text_embeds
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, full, atol=0.05, rtol=0)


def test_a_copied_or_pickled_processor_works(processor: SparProcessor, model: SparModel) -> None:
    wanted = processor.encode_labels(model, "road; sky", TEMPLATES).text_embeds
    for twin in (copy.deepcopy(processor), pickle.loads(pickle.dumps(processor))):
        torch.testing.assert_close(twin.encode_labels(model, "road; sky", TEMPLATES).text_embeds, wanted)


def test_a_class_has_a_title_and_templates_of_its_own(processor: SparProcessor, model: SparModel) -> None:
    labels = Labels.parse(
        [{"name": "vehicle", "names": ["car", "lorry"], "templates": ["the toy {}."]}, "sky", {"name": "road"}]
    ).against(["shadow", "Sky"])
    assert labels.class_names == ("vehicle", "sky", "road") and labels.negatives == ("shadow",)
    assert labels.names == ("car", "lorry", "sky", "road", "shadow") and labels.class_ids == (0, 0, 1, 2, -1)
    found = processor.encode_labels(model, labels, TEMPLATES).text_embeds
    own = processor.encode_labels(model, "car; lorry", "the toy {}.").text_embeds
    common = processor.encode_labels(model, "sky; road; shadow", TEMPLATES).text_embeds
    torch.testing.assert_close(found, torch.cat([own, common]), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("name", "text", "classes", "class_names"),
    [
        ("labels.txt", "# streets\nroad\n\ncar, automobile\n", (("road",), ("car", "automobile")), ("road", "car")),
        ("a.json", '{"car": ["a red car"], "sky": "sky, cloud"}', (("a red car",), ("sky", "cloud")), ("car", "sky")),
        ("a.csv", 'name,names\ncar,"red car, lorry"\nsky,\n', (("red car", "lorry"), ("sky",)), ("car", "sky")),
    ],
)
def test_labels_are_read_from_files(
    tmp_path: Path, name: str, text: str, classes: tuple[Any, ...], class_names: tuple[str, ...]
) -> None:
    (tmp_path / name).write_text(text)
    labels = Labels.read(tmp_path / name)
    assert labels.classes == classes and labels.class_names == class_names
    (tmp_path / name).write_bytes(b"\xff\xfe{[")
    with pytest.raises(ValueError, match=f"{name} is no file of labels"):
        Labels.read(tmp_path / name)


def test_ten_thousand_labels_go_through_in_batches(
    processor: SparProcessor, model: SparModel, calls: list[int]
) -> None:
    many = [f"name {number}" for number in range(10_000)]
    features = processor.encode_labels(model, many, "{}", batch_size=512)
    assert features.text_embeds.shape == (10_000, 24)
    assert max(calls) == 512 and sum(calls) == 10_000


def test_a_label_too_long_for_the_text_tower_says_what_is_cut(
    processor: SparProcessor, model: SparModel, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        processor.encode_labels(model, ["sky", "car " * 74 + "dog cat"], ["{}"])
    # 77 tokens less start and end leave 75: the last of 76 words is lost.
    assert "is 76 tokens long in its prompt and the text tower reads 75; cut off: 'cat" in caplog.text
    assert len(caplog.records) == 1
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        processor.encode_labels(model, ["sky", "car " * 74 + "dog"], ["{}"])
        processor.encode_labels(model, [f"{'car ' * 80} {n}" for n in range(5)], ["{}"])
    assert len(caplog.records) == 4
    assert "2 more labels are too long" in caplog.text


# Tokenizer rules and calls


def test_padding_length_and_case_are_fields_of_the_processor(clip_tokenizer: Any) -> None:
    plain = SparProcessor(SparImageProcessor(), clip_tokenizer)
    assert plain(text=["sky", "a photo of the sky"])["input_ids"].shape == (2, 7)
    fixed = SparProcessor(
        SparImageProcessor(), clip_tokenizer, text_padding="max_length", max_length=16, lowercase=True
    )
    ids = fixed(text=["SKY", "a photo of the sky"])["input_ids"]
    assert ids.shape == (2, 16)
    assert ids[0].tolist() == fixed(text="sky")["input_ids"][0].tolist()
    assert fixed(text="sky " * 40)["input_ids"].shape == (1, 16)
    with pytest.raises(ValueError, match="text_padding is 'left'; allowed are 'longest' and 'max_length'"):
        SparProcessor(SparImageProcessor(), clip_tokenizer, text_padding="left")


def test_a_call_prepares_both_sides_of_the_model(processor: SparProcessor, model: SparModel) -> None:
    image = np.zeros((40, 56, 3), np.uint8)
    inputs = processor(images=image, text=["road", "a photo of the sky"], padding=True, do_resize=False)
    assert inputs["pixel_values"].shape == (1, 3, 40, 56)
    assert inputs["original_sizes"].tolist() == [[40, 56]]
    original_sizes = inputs.pop("original_sizes")
    with torch.no_grad():
        outputs = model(**inputs)
    (labels,) = processor.post_process_semantic_segmentation(outputs, original_sizes)
    cosine = F.normalize(outputs.patch_embeds[0], dim=-1) @ F.normalize(outputs.text_embeds, dim=-1).T
    assert labels.shape == (40, 56)
    assert labels[0, 0] == cosine[0, 0].argmax()


def test_wrong_calls_say_why(processor: SparProcessor) -> None:
    with pytest.raises(ValueError, match="nothing to process"):
        processor()
    with pytest.raises(ValueError, match="do_resize only have a meaning with images"):
        processor(text="sky", do_resize=False)
    with pytest.raises(ValueError, match="does not know do_crop"):
        processor(images=np.zeros((20, 20, 3), np.uint8), do_crop=True)


# Saved and loaded


def test_save_and_load(clip_tokenizer: Any, model: SparModel, tmp_path: Path) -> None:
    processor = SparProcessor(
        SparImageProcessor(size=None, min_side_px=8), clip_tokenizer, TEMPLATES, "max_length", 20, lowercase=True
    )
    wanted = processor.encode_labels(model, "road; Sky").text_embeds
    processor.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    loaded = SparProcessor.from_pretrained(tmp_path)
    assert loaded.templates == list(TEMPLATES)
    assert (loaded.text_padding, loaded.max_length, loaded.lowercase) == ("max_length", 20, True)
    assert isinstance(loaded.image_processor, SparImageProcessor)
    assert loaded.image_processor.to_dict() == processor.image_processor.to_dict()
    torch.testing.assert_close(loaded.encode_labels(model, "road; Sky").text_embeds, wanted)


@pytest.mark.slow
def test_a_saved_processor_loads_as_remote_code_without_the_package(
    clip_tokenizer: Any, model: SparModel, tmp_path: Path
) -> None:
    clip_tokenizer.save_pretrained(tmp_path / "tokenizer")
    code = (
        "import sys\nfrom transformers import AutoTokenizer\n"
        "from spar_hf.image_processing_spar import SparImageProcessor\n"
        "from spar_hf.processing_spar import SparProcessor\n"
        "SparImageProcessor.register_for_auto_class()\nSparProcessor.register_for_auto_class()\n"
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1] + '/tokenizer')\n"
        "SparProcessor(SparImageProcessor(size=99), tokenizer, ['my {}']).save_pretrained(sys.argv[1] + '/model')\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)
    code = (
        "import sys\nsys.modules['spar_hf'] = None\n"
        "import numpy\nfrom transformers import AutoImageProcessor, AutoProcessor\n"
        "processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "batch = processor(images=numpy.zeros((50, 60, 3), 'uint8'), text='sky', size=None)\n"
        "print(processor.templates, tuple(batch['pixel_values'].shape), tuple(batch['input_ids'].shape))\n"
        "print(AutoImageProcessor.from_pretrained(sys.argv[1], trust_remote_code=True).size)\n"
    )
    environment = {"HF_MODULES_CACHE": str(tmp_path / "modules"), "HF_HUB_OFFLINE": "1", "PATH": ""}
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "model")],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert result.stdout.strip() == "['my {}'] (1, 3, 50, 60) (1, 3)\n{'shortest_edge': 99}", result.stderr
