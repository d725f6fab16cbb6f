"""Any segmenter as a teacher: probabilities of patches, features that say what they say, and training with them."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from conftest import SIZES_HW
from distillation_help import SIZES, run, run_as_command, save_pictures
from torch.nn import functional as F
from transformers import ViTConfig, ViTModel

from spar_hf import SparModel, build_segmenter
from spar_hf.distillation.label_teacher import LabelTeacher, Settings, patch_probabilities
from spar_hf.segmentation_spar import GridScores, label_map

LABELS = "road; car, automobile; sky; tree"
TEMPLATES = ("a photo of a {}.",)


@pytest.mark.parametrize(
    ("size_hw", "extent_hw", "grid_hw"),
    [((48, 64), (48, 64), (3, 4)), ((53, 70), (48, 64), (3, 4)), ((40, 60), (48, 64), (3, 4))],
)
def test_probabilities_are_means_over_the_pixels_of_a_patch(size_hw, extent_hw, grid_hw):
    scores = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    found = patch_probabilities(GridScores.of(scores, size_hw), grid_hw, extent_hw, 3.0)
    full = F.interpolate(scores[None].double(), size=size_hw, mode="bilinear", align_corners=False)[0]
    probabilities = (3.0 * full).softmax(0).numpy()
    for row in range(grid_hw[0]):
        for column in range(grid_hw[1]):
            inside = probabilities[:, 16 * row : 16 * row + 16, 16 * column : 16 * column + 16]
            np.testing.assert_allclose(found[row, column].numpy(), inside.mean((1, 2)), atol=1e-5)


@pytest.fixture
def teacher(make_spar, spar_processor):
    def make(settings: Settings, refine=("pamr",)) -> LabelTeacher:
        model = make_spar(num_hidden_layers=3)
        segmenter = build_segmenter(model, spar_processor, "naclip", refine=refine)
        encoded = segmenter.encode_labels(LABELS, TEMPLATES)
        return LabelTeacher(segmenter, encoded, encoded.text_embeds, model.vision_model, settings)

    return make


@pytest.mark.parametrize("target", ["moved", "text"])
@pytest.mark.parametrize("size", SIZES_HW)
@torch.no_grad()
def test_features_equal_the_plain_formulation(size, target, teacher, pixels):
    images = pixels(size, batch=2)
    teaches = teacher(Settings(target=target, steps=3, step_size=0.2))
    found = teaches(images).patch_embeds
    own = teaches.encoder(images).patch_embeds.double()
    text = F.normalize(teaches.text_embeds.double(), dim=-1).numpy()
    for image in range(2):
        (maps,) = teaches.segmenter(images[image : image + 1], teaches.encoded)
        grid_hw = own.shape[1:3]
        extent_hw = tuple(side // 16 * 16 for side in images.shape[2:])
        probabilities = patch_probabilities(maps, grid_hw, extent_hw, 40.0).double().numpy()
        for row in range(grid_hw[0]):
            for column in range(grid_hw[1]):
                p, f = probabilities[row, column], own[image, row, column].numpy()
                confidence = 1 + (p * np.log(np.maximum(p, 1e-12))).sum() / np.log(len(p))
                length = np.linalg.norm(f)
                unit = f / length
                if target == "text":
                    words = p @ text / np.linalg.norm(p @ text)
                    wanted = length * (confidence * words + (1 - confidence) * unit)
                else:
                    for _ in range(3):
                        q = np.exp(40 * text @ unit)
                        unit = unit + 0.2 * confidence * ((p - q / q.sum()) @ text)
                        unit /= np.linalg.norm(unit)
                    wanted = length * unit
                np.testing.assert_allclose(found[image, row, column].numpy(), wanted, atol=2e-5 * max(length, 1))


@torch.no_grad()
def test_the_words_find_in_the_features_what_the_method_found(teacher, pixels):
    """With a method that is sure everywhere, the label map of the target is the method's."""
    images = pixels("larger")
    teaches = teacher(Settings(steps=200, step_size=0.5))  # the words lie within 2 degrees of each other
    grid_hw = (images.shape[2] // 16, images.shape[3] // 16)
    wanted = torch.randint(0, 5, grid_hw, generator=torch.Generator().manual_seed(1))
    sure = F.one_hot(wanted, 5).float()
    found = teaches.target(teaches.encoder(images).patch_embeds[0], sure)
    maps = GridScores.of(torch.einsum("kd,ijd->kij", teaches.text_embeds, F.normalize(found, dim=-1)), grid_hw)
    assert torch.equal(label_map(maps, torch.arange(5)).long(), wanted)


@torch.no_grad()
def test_an_unsure_method_changes_nothing(teacher, pixels):
    images = pixels("native")
    teaches = teacher(Settings())
    own = teaches.encoder(images).patch_embeds[0]
    even = torch.full((*own.shape[:2], 5), 0.2)
    torch.testing.assert_close(teaches.target(own, even), own, atol=1e-5, rtol=1e-5)


def test_mistakes_say_what_to_do(teacher):
    with pytest.raises(ValueError, match=r"target is 'mean'; choose one of 'moved', 'text'"):
        Settings(target="mean")
    made = teacher(Settings())
    with pytest.raises(ValueError, match="there are 3 text features for 5 names"):
        LabelTeacher(made.segmenter, made.encoded, made.text_embeds[:3], made.encoder)


@pytest.mark.parametrize(
    "flags",
    [
        ("--teacher-labels", "lposs", "--teacher-network", "dino={dino}", "--window-px", "0"),
        ("--teacher-labels", "naclip", "--teacher-refine", "pamr", "--target", "text"),
    ],
)
def test_a_label_method_teaches_end_to_end(flags, make_spar, spar_processor, tmp_path):
    """Stored by the cache as any teacher's features, learned from, and written into the student's record."""
    make_spar(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    spar_processor.save_pretrained(tmp_path / "model")
    config = ViTConfig(hidden_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16)
    ViTModel(config).save_pretrained(tmp_path / "dino")
    (tmp_path / "words.txt").write_text("road\ncar, automobile\nsky\n")
    pictures = save_pictures(tmp_path / "pictures", 2)
    common = ["--student", tmp_path / "model", "--images", pictures, *SIZES, "--workers", "0"]
    common += [flag.format(dino=tmp_path / "dino") for flag in flags] + ["--labels", f"@{tmp_path}/words.txt"]
    run("cache_teacher.py", *common, "--cache", tmp_path / "cache")
    run("distill.py", *common, "--cache", tmp_path / "cache", "--output", tmp_path / "run", "--epochs", "2")
    run("distill.py", *common, "--output", tmp_path / "live", "--epochs", "2")
    students = [SparModel.from_pretrained(tmp_path / name / "model") for name in ("run", "live")]
    record = students[0].config.vision_config.teacher
    assert record["method"] == flags[1] and record["labels"] == [["road"], ["car", "automobile"], ["sky"]]
    assert ("pamr" in record["refine"]) == ("pamr" in flags)
    weights = [student.vision_model.state_dict() for student in students]
    start = SparModel.from_pretrained(tmp_path / "model").vision_model.state_dict()
    assert any(not torch.equal(weights[0][name], start[name]) for name in start)
    for name in start:  # the store holds half precision
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-3, rtol=0)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--teacher-labels", "lposs"), "give both, the method and the labels"),
        (("--labels", "road; car"), "give both, the method and the labels"),
        (("--teacher-labels", "lpos", "--labels", "road"), "there is no method 'lpos'.*Did you mean 'lposs'"),
        (("--teacher-labels", "naclip", "--labels", "road", "--teacher-refine", "parm"), "Did you mean 'pamr'"),
        (("--teacher-refine", "pamr"), "refinement 'pamr' is of score maps; name the method"),
        (("--teacher-set", "steps=3"), "setting 'steps' is of a label method; name the method"),
        (("--teacher-labels", "naclip", "--labels", "road", "--teacher-method", "sclip"), "teaches alone"),
    ],
)
def test_wrong_flags_write_nothing(flags, message, tmp_path, capfd):
    common = ["--student", "tiny", "--images", save_pictures(tmp_path / "pictures", 1), "--output", tmp_path / "run"]
    assert run_as_command("distill.py", *common, *flags) == 2
    assert re.search(message, capfd.readouterr().err) and not (tmp_path / "run").exists()
