"""The command line with real files: what it writes and prints, and one clear line for every mistake."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import ViTConfig, ViTModel

import spar_hf
from spar_cli.compare import command_for, pairs
from spar_cli.main import COMMANDS, main, parse
from spar_cli.output import output_stems, shorten, table
from spar_hf.checkpoints import ASSETS
from spar_hf.families import FAMILIES
from spar_hf.files import whole_files
from spar_hf.methods.table import METHODS
from spar_hf.refinement import REFINEMENTS
from spar_hf.refinement.table import STAGES

LABELS = "road; car, automobile; sky"


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder with one picture of 150 x 90 pixels in it."""
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).normal(128, 80, (90, 150)).clip(0, 255).astype(np.uint8)
    picture = Image.fromarray(noise).convert("RGB")
    picture.paste("orange", (0, 0, 60, 90))
    picture.paste("navy", (60, 0, 100, 50))
    picture.save(tmp_path / "street.png")
    return tmp_path


def files_of(folder: Path) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def fails(capsys, *words: str) -> str:
    """Runs a command that must fail: status 2, one line on stderr, nothing on stdout. Returns the line."""
    status = main(list(words))
    out, err = capsys.readouterr()
    assert status == 2, (status, out, err)
    assert out == ""
    assert err.startswith("spar: error: ") and err.count("\n") == 1, err
    return err


# --- segment ---------------------------------------------------------------------------------------------------


def test_segment_writes_what_the_pipeline_finds(here, capsys, model_folder):
    words = ["segment", "street.png", "--labels", LABELS, "--model", model_folder, "--json", "out/result.json"]
    assert main([*words, "--output", "out"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert files_of(here) == {
        "street.png", "out/street-overlay.png", "out/street-labels.png", "out/result.json"
    }  # fmt: skip

    model, processor = spar_hf.load(model_folder)
    segment = spar_hf.OpenVocabularySegmentationPipeline(model=model, processor=processor)
    expected = segment("street.png", candidate_labels=LABELS)["segmentation"]
    label_map = Image.open("out/street-labels.png")
    assert label_map.mode == "P" and (np.asarray(label_map) == expected).all()
    assert Image.open("out/street-overlay.png").width >= 150

    written = json.loads(Path("out/result.json").read_text())
    assert written["command"].startswith("spar segment street.png --labels 'road; car")
    assert written["model"] == model_folder and written["method"] == "maskclip"
    (image,) = written["images"]
    assert image["size_hw"] == [90, 150] and image["seconds"] > 0
    assert image["files"]["label_map"] == "out/street-labels.png"
    assert [entry["label"] for entry in image["classes"]] == ["road", "car", "sky"]
    for entry in image["classes"]:
        assert entry["area_fraction"] == pytest.approx((expected == entry["id"]).mean(), abs=1e-6)
        shown = [line for line in out.splitlines() if line.strip().startswith(entry["label"])]
        assert len(shown) == (entry["area_fraction"] > 0)
        if shown and entry["area_fraction"] > 0.001:
            assert shown[0].endswith(f"{100 * entry['area_fraction']:.1f} %")


def test_segment_with_a_sliding_window_is_the_teacher(here, capsys, model_folder):
    common = ["segment", "street.png", "--labels", LABELS, "--model", model_folder]
    window = [*common, "--window-px", "native", "--stride-px", "24", "--output", "b", "--json", "b.json"]
    assert main([*common, "--output", "a"]) == 0
    assert main(window) == 0
    facts = json.loads(Path("b.json").read_text())
    assert (facts["window_px"], facts["stride_px"]) == (64, 24)

    model, processor = spar_hf.load(model_folder)
    teacher = spar_hf.SlidingWindow(model.vision_model, window_px=64, stride_px=24)
    segment = spar_hf.OpenVocabularySegmentationPipeline(model=model, processor=processor)
    expected = segment("street.png", candidate_labels=LABELS, encoder=teacher)["segmentation"]
    written = np.asarray(Image.open("b/street-labels.png"))
    assert (written == expected).all()
    assert (written != np.asarray(Image.open("a/street-labels.png"))).any()


def test_model_options_reach_the_model(here, capsys, model_folder):
    words = ["features", "street.png", "--model", model_folder, "--json", "r.json"]
    stored, facts = {}, {}
    for name, options in {
        "plain": [],
        "short": ["--short-side", "48"],
        "method": ["--method", "naclip"],
        "reach": ["--attention-reach", "window"],
        "bf16": ["--dtype", "bfloat16", "--device", "cpu"],
    }.items():
        assert main([*words, "--output", name, *options]) == 0
        stored[name] = load_file(f"{name}/street.safetensors")["patch_embeds"]
        facts[name] = json.loads(Path("r.json").read_text())
    assert (facts["plain"]["method"], facts["plain"]["dtype"]) == ("maskclip", "float32")
    assert stored["short"].shape[:2] == (3, 5)  # 48 x 80 pixels in patches of 16
    assert stored["bf16"].dtype == torch.bfloat16 and facts["bf16"]["dtype"] == "bfloat16"
    assert torch.allclose(stored["bf16"].float(), stored["plain"], rtol=0.1, atol=0.1 * float(stored["plain"].std()))

    assert facts["method"]["method"] == "naclip"
    model, processor = spar_hf.load(model_folder, method="naclip")
    pixel_values = processor(images="street.png")["pixel_values"]
    with torch.inference_mode():
        expected = model.vision_model(pixel_values).patch_embeds[0]
    assert torch.equal(stored["method"], expected) and not torch.allclose(expected, stored["plain"], rtol=0.1)

    assert (facts["plain"]["attention_reach"], facts["reach"]["attention_reach"]) == ("image", "window")
    model, _ = spar_hf.load(model_folder, attention_reach="window")
    with torch.inference_mode():
        expected = model.vision_model(pixel_values).patch_embeds[0]
    assert torch.equal(stored["reach"], expected) and not torch.allclose(expected, stored["plain"], rtol=0.01)


def test_several_images_of_one_name_and_odd_names(here, capsys, model_folder):
    picture = Image.open("street.png")
    names = ["a/street.jpg", "b/street.png", "-dash.png", "..png", "sp ace;$(x).png", "ünï 天.png", "new\nline.png"]
    for name in names:
        Path(name).parent.mkdir(exist_ok=True)
        picture.save(name, format="PNG")
    words = ["segment", "--labels", LABELS, "--model", model_folder, "--output", "out/deep", "--", *names]
    before = files_of(here)
    assert main(words) == 0
    written = files_of(here) - before
    stems = ["street", "street-2", "dash", "image", "sp ace;$(x)", "ünï 天", "new_line"]
    results = {f"out/deep/{stem}-{kind}.png" for stem in stems for kind in ("overlay", "labels")}
    assert written == {*results, "out/deep/spar-segment.jsonl"}
    out, _ = capsys.readouterr()
    assert out.count("label map") == len(names)
    assert "new line.png: 150 x 90 px" in out  # a line break in a name breaks no line


def test_labels_are_only_text(here, capsys, model_folder):
    hostile = "<script>alert(1)</script>; ../../escape; \x1b[31mred; شارع; " + "long " * 60
    assert main(["segment", "street.png", "--labels", hostile, "--model", model_folder]) == 0
    out, _ = capsys.readouterr()
    assert "\x1b" not in out
    assert max(map(len, out.splitlines())) < 200
    assert files_of(here) == {"street.png", "spar-output/street-overlay.png", "spar-output/street-labels.png"}


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "I;16", "1"])
def test_pictures_of_any_mode(here, capsys, model_folder, mode):
    name = "picture.tif" if mode in ("CMYK", "I;16") else "picture.png"
    Image.open("street.png").convert("I" if mode == "I;16" else mode).convert(mode).save(name)
    assert main(["segment", name, "--labels", LABELS, "--model", model_folder]) == 0
    assert Image.open("spar-output/picture-labels.png").size == (150, 90)


def test_a_photograph_turned_by_its_camera(here, capsys, model_folder):
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise
    Image.open("street.png").save("turned.jpg", exif=exif)
    assert main(["segment", "turned.jpg", "--labels", LABELS, "--model", model_folder]) == 0
    assert Image.open("spar-output/turned-labels.png").size == (90, 150)


@pytest.mark.parametrize("size", [(1, 1), (3, 300), (5, 5)])
def test_very_small_pictures(here, capsys, model_folder, size):
    Image.new("RGB", size, "red").save("small.png")
    assert main(["segment", "small.png", "--labels", LABELS, "--model", model_folder]) == 0
    assert Image.open("spar-output/small-labels.png").size == size


def test_the_shipped_checkpoint_runs_by_default(here, capsys):
    assert main(["segment", "street.png", "--labels", "house; tree; sky"]) == 0
    assert "street.png: 150 x 90 px" in capsys.readouterr().out


# --- features, methods, evaluate -------------------------------------------------------------------------------


def test_features_are_those_of_the_encoder(here, capsys, model_folder):
    words = ["features", "street.png", "--model", model_folder, "--output", "out", "--json", "r.json"]
    assert main(words) == 0
    assert files_of(here) == {"street.png", "out/street.safetensors", "out/street-pca.png", "r.json"}
    stored = load_file("out/street.safetensors")["patch_embeds"]

    model, processor = spar_hf.load(model_folder)
    pixel_values = processor(images=Image.open("street.png"), return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        expected = model.vision_model(pixel_values).patch_embeds[0]
    assert torch.equal(stored, expected)
    assert Image.open("out/street-pca.png").size == (150, 90)

    with safe_open("out/street.safetensors", "pt") as file:
        metadata = file.metadata()
    assert json.loads(metadata["grid_hw"]) == list(expected.shape[:2])
    assert json.loads(metadata["size_hw"]) == [90, 150] and metadata["method"] == "maskclip"
    assert json.loads(Path("r.json").read_text())["images"][0]["dim"] == expected.shape[2]


def test_features_keep_the_type_they_were_made_in(here, capsys, model_folder):
    assert main(["features", "street.png", "--model", model_folder, "--dtype", "bfloat16"]) == 0
    assert load_file("spar-output/street.safetensors")["patch_embeds"].dtype == torch.bfloat16


def test_methods_lists_every_row(here, capsys):
    assert main(["methods", "--json", "methods.json"]) == 0
    out, _ = capsys.readouterr()
    document = json.loads(Path("methods.json").read_text())
    written = document["methods"]
    assert list(written) == list(METHODS) and list(document["refinements"]) == list(REFINEMENTS)
    for name, option in REFINEMENTS.items():
        (described,) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert option.paper in described and STAGES[option.stage] in described
    for name, method in METHODS.items():
        (described, reported) = [line for line in out.splitlines() if line.split()[:1] == [name]]
        assert method.paper in described and method.kind in described and method.branch in described
        assert [float(word) for word in reported.split()[1:] if word != "-"] == list(method.reported.values())


def test_evaluate_prints_a_table_and_writes_json(here, capsys, model_folder):
    words = ["evaluate", "--benchmark", "picturebook", "--scale", "1.5", "--limit", "2", "--model", model_folder]
    assert main([*words, "--json", "out/score.json"]) == 0
    out, _ = capsys.readouterr()
    written = json.loads(Path("out/score.json").read_text())
    assert 0 <= written["mean_iou"] <= 1 and written["seconds_per_image"] > 0
    assert written["command"] == f"spar {' '.join(words)} --json out/score.json"
    assert written["num_images"] == 2
    assert f"**{100 * written['mean_iou']:.1f}**" in out


@pytest.mark.slow
def test_evaluate_compares_methods_and_goes_on(here, capfd, model_folder):
    words = ["evaluate", "--benchmark", "picturebook", "--scale", "1", "--limit", "2", "--model", model_folder]
    words += ["--methods", "clip,naclip,proxyclip", "--json-dir", "all", "--network", "dino=./nowhere"]
    assert main(words) == 1  # proxyclip's network is not there
    out, _ = capfd.readouterr()
    assert "picturebook (1x test), protocol picturebook, 2 images" in out or "protocol picturebook, 2 images" in out
    rows = {line.split("`")[1]: line for line in out.splitlines() if line.startswith("| `")}
    assert set(rows) == {"clip", "naclip"}
    for name, row in rows.items():
        result = json.loads(Path(f"all/{name}.json").read_text())
        assert f"| {100 * result['mean_iou']:.1f} | {100 * result['boundary_iou']:.1f} |" in row
        assert result["record"]["method"] == name
    assert "- `proxyclip` was not run: " in out and "nowhere" in out
    assert Path("all/table.md").read_text() in out
    assert main(words) == 1
    _, err = capfd.readouterr()
    assert "clip: done before" in err and "naclip: done before" in err
    assert "all/clip.json was made by another command" in fails(capfd, *words[:6], "3", *words[7:])
    assert "--methods needs --json-dir" in fails(capfd, *words[:-4])
    assert pairs("--set", {"a": "1", "b": "x=2"}) == ["--set", "a=1", "--set", "b=x=2"]
    words = ["evaluate", "--benchmark", "picturebook", "--methods", "naclib", "--json-dir", "b"]
    assert "there is no method 'naclib'" in fails(capfd, *words)


def test_networks_and_settings_of_many_methods_may_be_one_methods_own():
    words = ["evaluate", "--benchmark", "picturebook", "--methods", "lposs,lavg,clip", "--json-dir", "c"]
    words += ["--network", "dino=a", "--network", "lavg.dino=b", "--set", "lposs.steps=3", "--set", "lavg.cuts=2"]
    args = parse(words)
    own = {name: command_for(name, args)[:-4] for name in ("lposs", "lavg", "clip")}
    common = ["evaluate", "--benchmark", "picturebook", "--method"]
    assert own["lposs"] == [*common, "lposs", "--network", "dino=a", "--set", "steps=3"]
    assert own["lavg"] == [*common, "lavg", "--network", "dino=b", "--set", "cuts=2"]
    assert own["clip"] == [*common, "clip"]


@pytest.mark.parametrize("protocol", ["spar", "sclip"])
def test_evaluate_takes_folders_of_ones_own(here, capsys, model_folder, protocol):
    for folder in ("photos", "masks"):
        Path(folder).mkdir()
    target = np.zeros((60, 90), np.uint8)
    target[:, 45:] = 1
    target[:5] = 255
    Image.fromarray(target).save("masks/a.png")
    picture = np.random.default_rng(0).integers(0, 256, (60, 90, 3), dtype=np.uint8)
    Image.fromarray(picture).save("photos/a.png")
    Path("classes.txt").write_text("sky\ncar, automobile\n")
    words = ["evaluate", "--images", "photos", "--masks", "masks", "--classes", "classes.txt"]
    more = ["--protocol", protocol, "--short-side", "64", "--refine", "key-smoothing"]
    assert main([*words, *more, "--model", model_folder, "--json", "score.json"]) == 0
    written = json.loads(Path("score.json").read_text())
    assert written["benchmark"] == "custom" and set(written["per_class_iou"]) == {"sky", "car"}
    assert written["protocol"]["window_px"] == {"spar": None, "sclip": 224}[protocol]
    assert list(written["record"]["refine"]) == ["key-smoothing"] and 0 < written["pixel_accuracy"] < 1


def test_the_documentation_has_the_table_as_it_is(tmp_path, capsys):
    docs = Path(__file__).parent.parent / "docs" / "methods.md"
    copy = tmp_path / "methods.md"
    copy.write_text(docs.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["methods", "--markdown", str(copy)]) == 0
    renewed = copy.read_text(encoding="utf-8")
    assert renewed == docs.read_text(encoding="utf-8"), "run spar methods --markdown docs/methods.md"
    for name, method in METHODS.items():
        assert f"| `{name}` | {method.title} | {method.paper} |" in renewed
    copy.write_text("no marks")
    capsys.readouterr()
    message = fails(capsys, "methods", "--markdown", str(copy))
    assert "has no place for the table; put the lines <!-- methods -->" in message


def test_the_table_of_models_is_whole_and_as_it_is(tmp_path, capsys):
    docs = Path(__file__).parent.parent / "docs" / "checkpoints.md"
    copy, facts = tmp_path / "checkpoints.md", tmp_path / "models.json"
    copy.write_text(docs.read_text(encoding="utf-8"), encoding="utf-8")
    assert main(["models", "--markdown", str(copy), "--json", str(facts)]) == 0
    printed = capsys.readouterr().out
    renewed = copy.read_text(encoding="utf-8")
    assert renewed == docs.read_text(encoding="utf-8"), "run spar models --markdown docs/checkpoints.md"
    rows = json.loads(facts.read_text())["models"]
    assert {row["class"] for row in rows} == {whole.__name__ for whole, _ in FAMILIES}
    for row in rows:
        assert f"| {row['family']} | `{row['class']}` |" in renewed and row["checked against"] in printed
    by_name = {row["family"]: row for row in rows}
    assert by_name["MetaCLIP 2"]["methods"] == "CLIP's of spar methods"
    assert by_name["C-RADIOv3, v4"]["methods"] == "summary_head, scra, radseg"
    assert (by_name["TIPSv2"]["methods"], by_name["TIPSv2"]["positions"]) == ("final_norm", "bilinear_antialias")
    assert by_name["PE-Core"]["positions"] == "antialias, rotary"


@pytest.mark.parametrize(
    "name",
    [
        name
        for name, row in METHODS.items()
        if row.recipe is None and not row.needs and row.family == "clip" and row.kind == "feature"
    ],
)
def test_a_method_in_a_file_runs_like_any_other(name, here, model_folder):
    words = ["--model", model_folder, "--method", name]
    assert main(["features", "street.png", *words, "--json", "one.json"]) == 0
    window = [*words, "--window-px", "paper", "--json", "window.json"]
    assert main(["segment", "street.png", "--labels", LABELS, *window]) == 0
    assert json.loads(Path("one.json").read_text())["method"] == name
    facts = json.loads(Path("window.json").read_text())
    expected = METHODS[name].window_for(64, 16)
    assert (facts["method"], facts["window_px"], facts["stride_px"]) == (name, *expected)


def test_a_second_network_comes_from_a_folder(here, capsys, model_folder):
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
    ViTModel(config).save_pretrained(here / "dino")
    words = ["features", "street.png", "--model", model_folder, "--json", "out.json"]
    assert main([*words, "--method", "proxyclip", "--network", "dino=./dino", "--set", "shift=1.1"]) == 0
    facts = json.loads(Path("out.json").read_text())
    assert (facts["networks"], facts["images"][0]["grid_hw"]) == ({"dino": "./dino"}, [11, 18])
    assert facts["settings"] == {"shift": 1.1, "sharpness": 3.0}
    capsys.readouterr()
    for method, given, message in (
        ("naclip", "dino=dino", "method 'naclip' takes no further network; leave 'dino' out"),
        (
            "proxyclip",
            "dinno=dino",
            "method 'proxyclip': there is no network 'dinno'; choose one of dino. Did you mean",
        ),
        ("proxyclip", "dino", "--network: it is 'dino'; write NAME=VALUE"),
    ):
        assert message in fails(capsys, *words, "--method", method, "--network", given)
    assert "there is no setting 'shfit'" in fails(capsys, *words, "--method", "proxyclip", "--set", "shfit=1")


def test_what_is_nothing_has_no_class(here, capsys, model_folder):
    Image.new("RGB", (96, 64), (128, 128, 128)).save("nothing.png")
    words = ["segment", "nothing.png", "--model", model_folder, "--json", "r.json"]
    assert main([*words, "--labels", "car", "--background-threshold", "0.99", "--scores"]) == 0
    assert "(no class)  100.0 %" in capsys.readouterr().out
    (result,) = json.loads(Path("r.json").read_text())["images"]
    assert result["no_class"] == 1 and result["classes"][0]["area_fraction"] == 0
    assert (np.asarray(Image.open("spar-output/nothing-labels.png")) == 255).all()
    assert np.asarray(Image.open("spar-output/nothing-scores.png")).shape == (64, 96)
    options = ["--score-threshold", "2", "--background", "sky", "--not", "shadow; reflection"]
    assert main([*words, "--labels", "car; sky", *options]) == 0
    (result,) = json.loads(Path("r.json").read_text())["images"]
    assert [entry["area_fraction"] for entry in result["classes"]] == [0, 1]
    capsys.readouterr()
    message = fails(capsys, *words, "--labels", "car; sky", "--background", "ski")
    assert "there is no class 'ski'; choose one of car, sky. Did you mean 'sky'?" in message


def test_labels_come_from_a_file(here, capsys, model_folder):
    Path("classes.txt").write_text("sky\ncar, automobile\n")
    words = ["segment", "street.png", "--model", model_folder, "--json", "r.json"]
    assert main([*words, "--labels", "@classes.txt"]) == 0
    (result,) = json.loads(Path("r.json").read_text())["images"]
    assert [entry["label"] for entry in result["classes"]] == ["sky", "car"]
    capsys.readouterr()
    message = fails(capsys, *words, "--labels", "classes.txt")
    assert "--labels is 'classes.txt', which is a file; write --labels @classes.txt" in message
    assert "holds bytes that are no UTF-8 text" in fails(capsys, *words, "--labels", "car; \udcff\udcfe")


def test_refinements_run_in_the_tables_order_and_are_recorded(here, capsys, model_folder):
    Image.open(ASSETS / "pictures/demo.png").resize((192, 128)).save("street.png")  # a random network sees one class
    words = ["segment", "street.png", "--labels", "car; tree; sky; sand; sea", "--json", "result.json"]
    maps = []
    for options in ([], ["--refine", "pamr", "--refine", "flip"], ["--refine", "floss"]):
        assert main([*words, *options]) == 0
        maps.append(np.asarray(Image.open("spar-output/street-labels.png")))
        written = json.loads(Path("result.json").read_text())
        names = [word for word in options if word != "--refine"]
        assert list(written["refine"]) == sorted(names, key=list(REFINEMENTS).index)
    assert (maps[0] != maps[1]).any() and (maps[0] != maps[2]).any()

    words = ["evaluate", "--benchmark", "picturebook", "--scale", "1.5", "--limit", "1", "--model", model_folder]
    options = ["--refine", "prompt-denoising", "--refine", "cluster-vote", "--window-px", "native"]
    assert main([*words, *options, "--json", "score.json"]) == 0
    out, _ = capsys.readouterr()
    assert list(json.loads(Path("score.json").read_text())["record"]["refine"]) == ["prompt-denoising", "cluster-vote"]
    assert "refined with prompt-denoising, cluster-vote" in out

    assert main([*words, "--state", "half.safetensors"]) == 0
    capsys.readouterr()
    assert "another evaluation: segmenter, record changed" in fails(
        capsys, *words, "--state", "half.safetensors", "--refine", "pamr"
    )


def test_evaluate_runs_the_window_of_the_command_line(here, capsys, model_folder):
    words = ["evaluate", "--benchmark", "picturebook", "--scale", "1.5", "--limit", "1", "--model", model_folder]
    scores = []
    for name, options in {"a": [], "b": ["--window-px", "native"]}.items():
        assert main([*words, *options, "--json", f"{name}.json"]) == 0
        scores.append(json.loads(Path(f"{name}.json").read_text())["per_class_iou"])
    assert scores[0] != scores[1]


# --- mistakes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no command given; choose one of segment, features, labels, methods, models, evaluate"),
        (["segmnt"], "there is no command 'segmnt'; choose one of segment, .* Did you mean 'segment'"),
        (["segment", "street.png"], "required: --labels"),
        (
            ["segment", "--labels", "a"],
            "there is no IMAGE; name a picture, folder, pattern, tar or @LIST, or give --data",
        ),
        (["evaluate"], "there is nothing to evaluate on; give --benchmark NAME, or --images, --masks, --classes"),
        (["segment", "street.png", "--lables", "a"], "there is no option '--lables'.* Did you mean '--labels'"),
        (["segment", "street.png", "--labels", ""], "no labels"),
        (["segment", "street.png", "--labels", "road; ; sky"], "label 2 is empty"),
        (["segment", "street.png", "--labels", "road; car, road"], "label 'road' is in two classes"),
        (["segment", "street.png", "--labels", ";".join(f"n{i}" for i in range(20000))], "at most"),
        (["segment", "street.png", "--labels", "a", "--dtype", "float23"], "dtype 'float23'.*Did you mean 'float32'"),
        (["segment", "street.png", "--labels", "a", "--method", "naklip"], "method 'naklip'.*Did you mean 'naclip'"),
        (["segment", "street.png", "--labels", "a", "--device", "cuda:99"], "--device is 'cuda:99'; this machine has"),
        (["segment", "street.png", "--labels", "a", "--device", "toaster"], "--device is 'toaster'; this machine has"),
        (["segment", "street.png", "--labels", "a", "--model", "tinny"], "no model 'tinny'.*Did you mean 'tiny'"),
        (["segment", "street.png", "--labels", "a", "--model", "empty"], "folder empty holds no config.json"),
        (["segment", "street.png", "--labels", "a", "--window-px", "wide"], "it is 'wide'; give a whole number"),
        (
            ["segment", "street.png", "--labels", "a", "--short-side", "0"],
            "it is '0'; give a whole number, at least 1",
        ),
        (["segment", "street.png", "--labels", "a", "--short-side", "9" * 5000], "give a whole number"),
        (["segment", "missing.png", "--labels", "a"], "there is no file missing.png"),
        (["segment", "empty", "--labels", "a"], "empty: no image there .*give a folder of images"),
        (["segment", "street.png", "--labels", "a", "--output", "street.png"], "which is a file; give a folder"),
        (["segment", "street.png", "--labels", "a", "--json", "empty"], "which is a folder; give a file"),
        (["evaluate", "--benchmark", "voc12"], "benchmark 'voc12'.*Did you mean 'voc21'"),
        (["evaluate", "--benchmark", "picturebook", "--scale", "-1"], "it is '-1'; give a number above 0"),
        (["evaluate", "--benchmark", "picturebook", "--protocol", "sclip"], "protocol 'sclip' is not defined"),
    ],
    ids=lambda value: " ".join(value)[:60] if isinstance(value, list) else "",
)
def test_mistakes_before_a_model_is_loaded(here, capsys, words, message):
    Path("empty").mkdir()
    before = files_of(here)
    line = fails(capsys, *words)
    assert re.search(message, line), line
    assert files_of(here) == before and not Path("spar-output").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--window-px", "8"], "--window-px is 8; it must be a multiple of the patch"),
        (["--window-px", "40"], "--window-px is 40; it must be a multiple of the patch"),
        (["--stride-px", "0"], "--stride-px is 0; it must be from 1 to the window's 64"),
        (["--window-px", "native", "--stride-px", "65"], "--stride-px is 65"),
        (["--stride-px", "-3"], "--stride-px is -3"),
        (["--refine", "parm"], "no refinement 'parm'; choose one of image-engineering, flip, .*Did you mean 'pamr'"),
        (["--max-pixels", "1000"], r"0\.0135 million.*at most 0\.001 million.*raise --max-pixels"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_that_need_the_model(here, capsys, model_folder, options, message):
    line = fails(capsys, "segment", "street.png", "--labels", LABELS, "--model", model_folder, *options)
    assert re.search(message, line), line
    assert files_of(here) == {"street.png"}


def test_a_model_folder_without_weights(here, capsys, model_folder):
    Path("bare").mkdir()
    Path("bare/config.json").write_bytes((Path(model_folder) / "config.json").read_bytes())
    line = fails(capsys, "segment", "street.png", "--labels", "a", "--model", "bare")
    assert "folder bare holds no weights" in line


@pytest.mark.parametrize("what", ["text", "truncated", "empty", "huge"])
def test_files_that_are_no_usable_picture(here, capsys, model_folder, what):
    path = Path("bad.png")
    if what == "text":
        path.write_text("not a picture")
    elif what == "truncated":
        path.write_bytes(Path("street.png").read_bytes()[:2000])
    elif what == "empty":
        path.touch()
    else:  # a few kB on disk, 1.2 GB once decoded; without this option it is done window by window
        Image.new("1", (20000, 20000)).save(path)
    before = files_of(here)
    line = fails(capsys, "segment", "bad.png", "--labels", LABELS, "--model", model_folder, "--raster", "never")
    assert "bad.png" in line
    if what == "huge":
        assert "20000x20000" in line and "raise --max-pixels" in line
    assert files_of(here) == before


def test_a_bad_picture_among_good_ones_leaves_whole_results_only(here, capsys, model_folder):
    Path("bad.png").write_bytes(Path("street.png").read_bytes()[:2000])
    words = ["segment", "street.png", "bad.png", "--labels", LABELS, "--model", model_folder, "--json", "r.json"]
    assert main(words) == 1
    first, summary = capsys.readouterr().err.splitlines()
    assert "bad.png" in first and summary == "spar: error: 1 of 2 pictures could not be done; the others are."
    written = json.loads(Path("r.json").read_text())
    assert [entry["image"] for entry in written["images"]] == ["street.png"]
    assert [entry["image"] for entry in written["failed"]] == ["bad.png"]
    assert files_of(here) == {
        "street.png", "bad.png", "r.json", "spar-output/street-overlay.png", "spar-output/street-labels.png",
        "spar-output/spar-segment.jsonl",
    }  # fmt: skip


def test_a_folder_that_cannot_be_written(here, capsys, model_folder, monkeypatch):
    def refuse(source, target):
        raise PermissionError(13, "Permission denied", str(target))

    monkeypatch.setattr(os, "replace", refuse)
    line = fails(capsys, "segment", "street.png", "--labels", LABELS, "--model", model_folder)
    assert "Permission denied" in line
    assert files_of(here) == {"street.png"}


def test_ctrl_c_is_one_line(here, capsys, monkeypatch):
    def interrupt(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(COMMANDS["methods"], "run", interrupt)
    assert main(["methods"]) == 130
    assert capsys.readouterr().err == "spar: error: interrupted\n"


def test_a_bug_is_not_dressed_up_as_a_mistake(here, monkeypatch):
    def bug(args):
        raise TypeError("a bug")

    monkeypatch.setattr(COMMANDS["methods"], "run", bug)
    with pytest.raises(TypeError):
        main(["methods"])


# --- the program -----------------------------------------------------------------------------------------------


def test_help_teaches_and_version_is_the_package_s(capsys):
    for words in (["--help"], *([name, "--help"] for name in COMMANDS)):
        with pytest.raises(SystemExit) as leaving:
            main(words)
        assert leaving.value.code == 0
        out, _ = capsys.readouterr()
        assert "examples:\n  spar " in out
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"spar-hf {spar_hf.__version__}\n"


def test_a_process_of_its_own_is_quiet_and_exits_with_2(here, model_folder):
    command = [sys.executable, "-m", "spar_hf", "segment"]
    options = ["--labels", LABELS, "--model", model_folder]
    run = subprocess.run([*command, "street.png", *options], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stderr) == (0, "")
    run = subprocess.run([*command, "nothing.png", *options], capture_output=True, text=True, timeout=300)
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr == "spar: error: there is no file nothing.png\n"


def test_help_and_mistakes_on_the_line_load_no_torch():
    code = "import sys; from spar_cli.main import main; print(main(['segmnt']), 'torch' in sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout == "2 False\n", run.stderr


# --- parts -----------------------------------------------------------------------------------------------------


def test_output_stems_are_safe_and_distinct():
    names = [
        "a/x.png",
        "b/x.jpg",
        "X.png",
        "x-2.png",
        "..",
        "a/...png",
        "a\\b.png",
        "c:d|e?.png",
        "\u202ex.png",
        "y" * 999,
    ]
    stems = output_stems([Path(name).name for name in names])
    assert len({stem.casefold() for stem in stems}) == len(names)
    for stem in stems:
        assert stem and stem not in (".", "..") and not set(stem) & set('/\\:*?"<>|\u202e')
        assert not stem.startswith((".", "-")) and len(stem.encode()) < 130


def test_whole_files_appear_together_or_not_at_all(tmp_path):
    old = tmp_path / "old.txt"
    old.write_text("before")
    with pytest.raises(RuntimeError), whole_files(old, tmp_path / "new.txt") as (first, second):
        first.write_text("after")
        second.write_text("half")
        raise RuntimeError
    assert old.read_text() == "before" and files_of(tmp_path) == {"old.txt"}
    with whole_files(old, tmp_path / "deep" / "new.txt") as (first, second):
        first.write_text("after")
        second.write_text("whole")
        assert old.read_text() == "before"
    assert old.read_text() == "after" and files_of(tmp_path) == {"old.txt", "deep/new.txt"}


def test_tables_line_up_for_wide_characters():
    lines = table([("class", "area"), ("天空", "1.0 %"), ("a", "10.0 %")], "<>").splitlines()
    assert lines == ["class    area", "天空    1.0 %", "a      10.0 %"]
    assert shorten("x" * 1000, 10) == "x" * 9 + "…" and shorten("天" * 9, 10) == "天天天天…"
