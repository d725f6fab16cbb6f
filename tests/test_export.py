"""Exported models: graphs equal PyTorch at every size, the runtime equals the pipeline and needs no PyTorch."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from contextlib import nullcontext
from copy import deepcopy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from conftest import ROWS
from families import spar_dinov3, spar_siglip
from PIL import Image

import spar_onnx
from spar_cli.main import main
from spar_hf import METHODS, FromFeatures, Labels, OpenVocabularySegmentationPipeline, build_encoder, export, load
from spar_hf.checkpoints import ASSETS
from spar_hf.exporting.checks import sizes_to_check, vision_differences
from spar_hf.exporting.graphs import VISION_OUTPUTS, FusedAttention, to_onnx, vision_program
from spar_hf.exporting.label_graph import label_graph
from spar_hf.families import make_processor
from spar_hf.hub.publish import PublishError, prepare
from spar_hf.outputs import FORMATS
from spar_hf.segmentation_spar import feature_scores, segment
from spar_hf.vocabulary import Vocabulary
from spar_onnx.folder import open_session
from spar_onnx.pipeline import label_map

LABELS = "road; car, automobile; sky; tree"
PICTURE = ASSETS / "pictures" / "demo.png"
EXPORT_MODULE = "spar_hf.exporting.export"


@pytest.fixture(scope="module")
def exported(model, spar_processor, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "onnx-model"
    export(model, spar_processor, folder, dtypes=("float32", "int8", "int8-static"), scenes=1)
    return folder


@pytest.fixture
def copy(exported, tmp_path) -> Path:
    """The exported folder, to be broken."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def picture(height: int, width: int, seed: int = 0) -> Image.Image:
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values).resize((width, height))


# --- the label map ---------------------------------------------------------------------------------------------

THRESHOLDS = (
    {},
    {"with_scores": True},
    {"background_threshold": 0.5, "background_class": 1},
    {"background_threshold": (0.3, 0.9, 0.0, 0.5), "with_scores": True},
    {"area_threshold": 0.2},
    {"area_threshold": 1.0, "with_scores": True},
    {"score_threshold": 0.2},
    {"synonyms": "max", "with_scores": True, "logit_scale": 3.0, "area_threshold": 0.1, "background_class": 2},
)


@pytest.mark.parametrize("rule", ("floor", "pad", "stretch"))
@pytest.mark.parametrize("options", THRESHOLDS, ids=str)
def test_label_graph_equals_segment(rule, options):
    image_hw, grid_hw, extent_hw = (100, 137), {"floor": (6, 8)}.get(rule, (7, 9)), None
    extent_hw = {"floor": (96, 128), "pad": (112, 144), "stretch": image_hw}[rule]
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(1, *grid_hw, 32, generator=generator)
    words = torch.randn(7, 32, generator=generator)
    class_ids = torch.tensor([0, 0, 1, 2, 2, 3, -1])
    outputs = type("Outputs", (), dict(patch_embeds=patches, image_hw=image_hw, extent_hw=extent_hw, normalized=None))
    (maps,) = feature_scores(outputs, words, image_hw)
    session = ort.InferenceSession(label_graph(rule, 16, 20).SerializeToString())
    for size_hw in (image_hw, (211, 77)):

        def run(names, size_hw=size_hw, **more):
            sizes = {"size_hw": np.array(size_hw), "image_hw": np.array(image_hw)}
            return session.run(
                names, {"patch_embeds": patches[0].numpy(), "text_embeds": words.numpy(), **sizes, **more}
            )

        expected = segment(maps.at(size_hw), class_ids, **options)
        labels, scores = label_map(run, class_ids.tolist(), **options)
        assert labels.dtype == np.int32 and (labels == expected.labels.numpy()).mean() > 0.9999
        if expected.scores is None:
            assert scores is None
        else:
            np.testing.assert_allclose(scores, expected.scores.numpy(), atol=1e-5)


def test_no_input_of_the_label_graph_has_a_default():
    """onnxruntime-web refuses a value for an input that has one."""
    graph = label_graph("floor", 16, 20).graph
    assert not graph.initializer and {value.name for value in graph.input} == {
        "patch_embeds", "text_embeds", "class_ids", "size_hw", "image_hw", "contending", "logit_scale",
        "with_probabilities",
    }  # fmt: skip


# --- the towers ------------------------------------------------------------------------------------------------


def check_vision(vision, tmp_path: Path, fused: bool = True) -> None:
    with FusedAttention() if fused else nullcontext():
        program = vision_program(vision)
    to_onnx(program, tmp_path / "vision_model.onnx", "pixel_values", VISION_OUTPUTS, 20)
    session = open_session(tmp_path / "vision_model.onnx")
    found = vision_differences(vision, lambda pixels: session.run(None, {"pixel_values": pixels}))
    assert set(found) == {"native", "larger", "oblong", "off-grid"} and max(found.values()) < 2e-5
    one_patch = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        expected = vision(one_patch).patch_embeds.numpy()
    (patches,) = session.run(["patch_embeds"], {"pixel_values": one_patch.numpy()})
    np.testing.assert_allclose(patches, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config",
    ({"method": "naclip", "attention_reach": "window", "size_rule": "pad"}, {"method": "gem", "size_rule": "stretch"}),
    ids=("window", "gem"),
)
def test_vision_graph_equals_pytorch(config, make_vision, tmp_path):
    check_vision(make_vision(num_hidden_layers=2, **config), tmp_path, fused=config["method"] == "naclip")


@pytest.mark.slow
@pytest.mark.parametrize("reach", ("image", "window"))
@pytest.mark.parametrize("method", ROWS)
def test_every_recipe_is_exported(method, reach, make_vision, tmp_path):
    check_vision(make_vision(num_hidden_layers=12, method=method, attention_reach=reach), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("family", ("siglip", "dinov3"))
def test_every_family_is_exported(family, clip_tokenizer, tmp_path):
    make = {"siglip": lambda words: spar_siglip(words, tmp_path / "stock"), "dinov3": spar_dinov3}
    model = make[family](clip_tokenizer).eval()
    processor = make_processor(model.config, clip_tokenizer)
    done = export(model, processor, tmp_path / "out", scenes=1)
    measured = done.record["dtypes"]["float32"]
    assert max(*measured["vision_difference"].values(), measured["text_difference"]) < 2e-5
    assert measured["picture_book"]["equal_labels"] > 0.999


@pytest.mark.slow
def test_programs_of_torch_export(model, spar_processor, tmp_path):
    done = export(model, spar_processor, tmp_path / "out", "torch-export")
    assert max(done.record["dtypes"]["float32"]["difference"].values()) < 2e-5
    program = torch.export.load(tmp_path / "out" / "vision_model.pt2").module(check_guards=False)
    pixels = torch.randn(1, 3, 70, 90)
    with torch.no_grad():
        torch.testing.assert_close(program(pixels)[0], model.vision_model(pixels).patch_embeds, rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="holds programs of torch-export, which PyTorch runs; give a folder of"):
        spar_onnx.load(tmp_path / "out")


def test_the_sizes_are_of_four_kinds():
    sizes = sizes_to_check(16, 64)
    assert sizes == {"native": (64, 64), "larger": (80, 128), "oblong": (32, 128), "off-grid": (73, 58)}


# --- the folder and the pipeline on it -------------------------------------------------------------------------


def test_record_says_what_was_checked(exported):
    record = json.loads((exported / "export.json").read_bytes())
    assert record["opset"] == 20 and record["layout"] == 2 and record["method"] == "maskclip"
    exact, coarse = record["dtypes"]["float32"], record["dtypes"]["int8"]
    assert max(exact["vision_difference"].values()) < 2e-5 and exact["text_difference"] < 2e-5
    assert 1e-4 < max(coarse["vision_difference"].values()) < 0.2
    assert 1e-4 < max(record["dtypes"]["int8-static"]["vision_difference"].values()) < 0.3
    assert exact["picture_book"]["equal_labels"] > 0.999 and 0 < coarse["picture_book"]["equal_labels"] <= 1
    assert {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()} >= {
        "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json",
        "onnx/vision_model.onnx", "onnx/text_model.onnx", "onnx/vision_model_int8.onnx", "onnx/text_model_int8.onnx",
        "onnx/label_map.onnx",
    }  # fmt: skip
    assert not list(exported.glob("*.py")) and not list(exported.parent.glob(".*"))


def test_static_int8_has_its_scales_in_the_graph(exported):
    """QDQ: every product with weights, no scale found at run time, no product of two activations."""
    graph = onnx.load(exported / "onnx" / "vision_model_int8_static.onnx").graph
    operators = [node.op_type for node in graph.node]
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(operators) and "DynamicQuantizeLinear" not in operators
    made = {name: node.op_type for node in graph.node for name in node.output}
    products = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    assert products and all(made.get(node.input[0]) == made.get(node.input[1]) for node in products)


@pytest.mark.parametrize("size", ((64, 64), (70, 130), (40, 200), (9, 90)), ids=str)
def test_pipeline_without_pytorch_equals_the_pipeline(size, exported, model, spar_processor):
    ours = spar_onnx.load(exported)
    theirs = OpenVocabularySegmentationPipeline(model=model, processor=spar_processor)
    for options in (
        {},
        {"background_threshold": 0.3, "return_scores": True},
        {"against": ["grass"], "size": 96},
        {"background_threshold": (0.1, 0.5, 0.2, 0.4), "return_top_k": 3, "against": ["grass"]},
    ):
        image = picture(*size)
        found, expected = ours(image, LABELS, **options), theirs(image, candidate_labels=LABELS, **options)
        assert (found["segmentation"] == expected["segmentation"]).mean() >= 0.999
        assert found.keys() == expected.keys() and found["labels"].classes == expected["labels"].classes
        assert found["grid_hw"] == expected["grid_hw"] and found["size_hw"] == expected["size_hw"]
        if "scores" in expected:
            np.testing.assert_allclose(found["scores"], expected["scores"], atol=1e-4)
        if "top_classes" in expected:
            np.testing.assert_allclose(found["top_probabilities"], expected["top_probabilities"], atol=1e-3)
            assert (found["top_classes"] == expected["top_classes"]).mean() >= 0.999


def test_text_features_equal_those_of_the_processor(exported, model, spar_processor, caplog):
    labels = ["road", "car, automobile", "grass " * 90]
    expected = spar_processor.encode_labels(model, labels).text_embeds.numpy()
    warned = [record.getMessage() for record in caplog.records]
    caplog.clear()
    np.testing.assert_allclose(spar_onnx.load(exported).encode_labels(labels).text_embeds, expected, atol=1e-5)
    assert [record.getMessage() for record in caplog.records] == warned and "cut off" in warned[0]


def test_a_list_of_pictures_gives_a_list_and_words_are_encoded_once(exported):
    segment_one = spar_onnx.load(exported, "int8", threads=1)
    encoded = segment_one.encode_labels(LABELS)
    found = segment_one([picture(50, 60), picture(60, 50, 1)], encoded)
    assert [result["segmentation"].shape for result in found] == [(50, 60), (60, 50)]
    assert "onnx-model" in repr(segment_one) and segment_one.exported.dtypes == ["float32", "int8", "int8-static"]


def test_the_command_runs_without_pytorch(exported, tmp_path):
    formats = [word for name in FORMATS for word in ("--format", name)]
    saved = tmp_path / "words.safetensors"
    code = (
        "import sys\nfrom spar_cli.main import main\n"
        f"model = ['--model', {str(exported)!r}]\n"
        f"assert main(['labels', '--labels', {LABELS!r}, *model, '--save', {str(saved)!r}]) == 0\n"
        f"status = main(['segment', {str(PICTURE)!r}, '--labels', {f'@{saved}'!r}, *model, '--not', 'grass', "
        f"'--output', {str(tmp_path / 'out')!r}, '--short-side', '64', '--scores', *{formats!r}])\n"
        "loaded = [name for name in ('torch', 'transformers', 'datasets') if name in sys.modules]\n"
        "assert status == 0 and not loaded, (status, loaded)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    expected = spar_onnx.load(exported)(PICTURE, LABELS, size=64, against=["grass"])["segmentation"]
    assert (np.asarray(Image.open(tmp_path / "out/demo-labels.png")) == expected.astype(np.uint8)).all()
    assert Vocabulary.read(saved).model == str(exported)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "demo-overlay.png", "demo-labels.png", "demo-scores.png", "demo-labels.tif", "demo.geojson", "demo-scores.npz",
        "demo-scores.safetensors", "demo-panoptic.png", "coco-instances.json", "coco-panoptic.json", "labels",
        "data.yaml", ".spar-results",
    }  # fmt: skip


def test_the_library_runs_without_pytorch(exported):
    code = (
        "import sys, spar_onnx\n"
        f"found = spar_onnx.load({str(exported)!r})({str(PICTURE)!r}, 'road; sky', size=64)\n"
        "assert sum(region['area'] for region in found.to_polygons(instances=True)) == found['segmentation'].size\n"
        "assert found.to_coco()['categories'][1]['name'] == 'sky' and len(found.to_supervision())\n"
        "assert 'torch' not in sys.modules and 'spar_hf' not in sys.modules\n"
        "assert found['labels'].names == ('road', 'sky')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


# --- bad input -------------------------------------------------------------------------------------------------


def test_methods_that_a_graph_does_not_hold(model, spar_processor, tmp_path):
    second = next(name for name, row in METHODS.items() if row.needs)
    with pytest.raises(ValueError, match=r"has a second network .*, which a graph does not hold; export one of clip"):
        export(model, spar_processor, tmp_path / "out", method=second)
    with pytest.raises(ValueError, match=r"'sc_clip' decides by the values .*; export one of clip"):
        export(model, spar_processor, tmp_path / "out", method="sc_clip")
    assert not (tmp_path / "out").exists()


def test_wrong_arguments(model, spar_processor, tmp_path, make_spar):
    def refused(message: str, folder: Path = tmp_path / "out", of=model, **arguments) -> None:
        with pytest.raises(ValueError, match=message):
            export(of, spar_processor, folder, **arguments)

    refused("format is 'tflite'; choose one of 'onnx', 'torch-export'", format="tflite")
    refused("dtype is 'int4'; choose one of", dtypes=["int4"])
    refused("float32 for torch-export", dtypes=["int8"], format="torch-export")
    refused("opset is 11; the graphs need operators of ONNX opset 20", opset=11)
    refused("is there and no exported model; give a folder that is not there yet", folder=tmp_path)
    half = make_spar(num_hidden_layers=2).to(torch.bfloat16)
    refused("load it in float32 on the CPU", of=half)


@torch.library.custom_op("spar_tests::unknown", mutates_args=())
def unknown_operator(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@unknown_operator.register_fake
def _(x):
    return torch.empty_like(x)


def test_an_operator_that_the_opset_lacks(tmp_path):
    class Odd(torch.nn.Module):
        def forward(self, pixel_values):
            return unknown_operator(pixel_values), pixel_values * 2

    program = torch.export.export(Odd(), (torch.zeros(2, 3, 4, 4),), strict=False)
    with pytest.raises(ValueError) as error:
        to_onnx(program, tmp_path / "vision_model.onnx", "pixel_values", VISION_OUTPUTS, 20)
    assert str(error.value) == (
        "vision_model uses the operator spar_tests.unknown, which ONNX opset 20 lacks; merge or remove the module "
        "that uses it, or export with format torch-export."
    )


def test_nothing_is_kept_when_the_check_fails(exported, model, spar_processor, tmp_path, monkeypatch):
    module = sys.modules[EXPORT_MODULE]
    for name in ("vision_program", "text_program"):
        monkeypatch.setattr(module, name, lambda tower: None)
    monkeypatch.setattr(
        module, "to_onnx", lambda program, path, *_: shutil.copyfile(exported / "onnx" / path.name, path)
    )
    other = deepcopy(model)
    with torch.no_grad():  # what was exported is no longer this model
        other.vision_model.visual_projection.weight[0, 0] += 0.01
    with pytest.raises(ValueError, match=r"the float32 graphs differ from PyTorch: .*Nothing was written; "):
        export(other, spar_processor, tmp_path / "out", scenes=1)
    assert list(tmp_path.iterdir()) == []
    export(model, spar_processor, tmp_path / "out", scenes=1)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_graph_asked_for_a_size_under_a_patch(exported):
    with pytest.raises(
        ValueError, match=r"the image is 12x80 px .* reads patches of 16 px; both sides must be at least"
    ):
        spar_onnx.load(exported).features(np.zeros((1, 3, 12, 80), np.float32))


def test_broken_folders_are_refused_in_one_line(copy, tmp_path, capfd):
    def refused(message: str, dtype: str | None = None) -> None:
        with pytest.raises(ValueError, match=message) as error:
            spar_onnx.load(copy, dtype)
        assert "\n" not in str(error.value)

    refused(
        "holds graphs of float32, int8, int8-static and none of float16; choose one of them, or export with", "float16"
    )
    graph = copy / "onnx" / "text_model.onnx"
    whole = graph.read_bytes()
    graph.write_bytes(whole[: len(whole) // 2])
    refused(r"text_model.onnx is corrupt or of another export: its check sum differs; export the model again")
    assert main(["segment", str(PICTURE), "--labels", "sky", "--model", str(copy)]) == 2
    assert capfd.readouterr().err.count("\n") == 1
    with pytest.raises(PublishError, match=r"text_model.onnx is missing or not what was exported"):
        prepare(copy, tmp_path, "you/spar")
    graph.unlink()
    refused("text_model.onnx is missing; export the model again")
    record = json.loads((copy / "export.json").read_bytes())
    (copy / "export.json").write_text(json.dumps({**record, "layout": 9, "spar_hf": "7.1"}))
    refused("was exported by spar-hf 7.1 in layout 9, and this version reads layout 2; export the model again")
    (copy / "export.json").write_text("{")
    refused("export.json cannot be read")
    (copy / "export.json").unlink()
    refused("holds no export.json, so it is no exported model; make one with 'spar export")


def test_a_file_that_onnxruntime_cannot_run(tmp_path):
    (tmp_path / "vision_model.onnx").write_bytes(b"no graph at all")
    with pytest.raises(ValueError, match=r"vision_model.onnx cannot be run by onnxruntime .*export the model again"):
        open_session(tmp_path / "vision_model.onnx")


def test_options_that_the_export_has_settled(exported, capfd):
    for words in (["--method", "naclip"], ["--refine", "pamr"], ["--set", "a=1"], ["--window-px", "native"]):
        assert main(["segment", str(PICTURE), "--labels", "sky", "--model", str(exported), *words]) == 2
        assert f"{words[0]} is for PyTorch, and an exported model is fixed; leave it out" in capfd.readouterr().err
    assert main(["segment", str(PICTURE), "--labels", "sky", "--model", str(exported), "--backend", "pytorch"]) == 2
    assert "which PyTorch does not run; leave --backend out" in capfd.readouterr().err


# --- commands --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_spar_export_and_segment_agree_with_pytorch(tmp_path, capfd):
    folder = tmp_path / "tiny-onnx"
    words = [
        "export",
        "tiny",
        "--format",
        "onnx",
        "--output",
        folder,
        "--dtype",
        "float16",
        "--attention-reach",
        "window",
    ]
    assert main([str(word) for word in words]) == 0
    assert "float16" in capfd.readouterr().out and not (folder / "onnx" / "vision_model.onnx").exists()
    model, processor = load("tiny")
    vision = build_encoder(model.vision_model, reach="window")
    labels = Labels.parse("cake; car, automobile; tree; apple; star; sea; sky; sand")
    segmenter = FromFeatures(vision, model, processor)
    inputs = processor(images=PICTURE)
    (maps,) = segmenter(inputs["pixel_values"], segmenter.encode_labels(labels))
    expected = segment(maps.at(tuple(inputs["original_sizes"][0].tolist())), torch.tensor(labels.class_ids)).labels
    found = spar_onnx.load(folder)(PICTURE, labels)["segmentation"]
    assert (found == expected.numpy()).mean() > 0.999


def test_an_exported_folder_is_prepared_for_the_hub(exported, tmp_path):
    (exported / "notes.txt").write_text("not to be published")
    try:
        prepare(exported, tmp_path, "you/spar-onnx", "apache-2.0")
    finally:
        (exported / "notes.txt").unlink()
    files = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()}
    assert {"onnx/vision_model.onnx", "onnx/label_map.onnx", "export.json", "tokenizer.json", "README.md"} <= files
    assert "notes.txt" not in files
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "license: apache-2.0" in card and "| int8 |" in card
    assert spar_onnx.load(tmp_path)(picture(64, 64), LABELS)["segmentation"].shape == (64, 64)
