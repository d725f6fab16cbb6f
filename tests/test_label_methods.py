"""Every label method of the table, end to end: segment, evaluate, and teach."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distillation_help import SIZES, run, save_pictures
from PIL import Image
from second_networks import SETTINGS, folders_for

from spar_cli.main import main
from spar_hf import METHODS, SparModel

# Of those around one diffusion model, one is quick enough for every run.
SLOW = [name for name, row in METHODS.items() if "diffusion" in row.needs and name != "diffsegmenter"]
LABELS = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name
    for name, row in METHODS.items()
    if row.kind == "label"
]


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """Two small pictures, their masks and the classes: a benchmark of one's own."""
    monkeypatch.chdir(tmp_path)
    save_pictures(tmp_path / "photos", 2)
    (tmp_path / "masks").mkdir()
    for path in (tmp_path / "photos").iterdir():
        with Image.open(path) as picture:
            mask = np.arange(picture.height * picture.width).reshape(picture.height, picture.width) // 400 % 3
        Image.fromarray(mask.astype(np.uint8)).save(tmp_path / "masks" / path.name)
    (tmp_path / "classes.txt").write_text("road\ncar, automobile\nsky\n")
    return tmp_path


def words_for(name: str, own: Path, model_folder: str, start: str) -> list[str]:
    """Networks and settings of a method as words of a command line; its bank is made of the pictures."""
    words = folders_for(name, own, f"--{start}network")
    settings = SETTINGS.get(name, {}).items()
    values = {key: ",".join(map(str, value)) if isinstance(value, tuple) else value for key, value in settings}
    numbers = [f"{key}={value}" for key, value in values.items()]
    if "bank" in METHODS[name].needs:
        given = [word if word != f"--{start}network" else "--network" for word in words]
        given += [word for network in METHODS[name].bank for word in ("--network", f"{network}={own / 'dino'}")]
        given += [word for number in numbers for word in ("--set", number)]
        pictures = ["--images", "photos", "--masks", "masks", "--classes", "classes.txt"]
        assert (
            main(["prototypes", "--method", name, "--model", model_folder, *pictures, *given, "--output", "bank"]) == 0
        )
        words += [f"--{start}network", "bank=bank"]
    return words + [word for number in numbers for word in (f"--{start}set", number)]


@pytest.mark.parametrize("name", LABELS)
def test_a_label_method_segments_and_is_evaluated(name, own, model_folder):
    words = ["--model", model_folder, "--method", name, *words_for(name, own, model_folder, "")]
    pictures = [str(path) for path in sorted((own / "photos").iterdir())]
    assert main(["segment", *pictures, "--labels", "@classes.txt", *words, "--json", "out.json"]) == 0
    facts = json.loads(Path("out.json").read_text())
    assert facts["method"] == name and set(facts["settings"]) and len(facts["images"]) == 2
    for path in pictures:
        with Image.open(path) as picture, Image.open(f"spar-output/{Path(path).stem}-labels.png") as found:
            assert found.size == picture.size
            assert set(np.unique(found)) <= {0, 1, 2, 255}
    folders = ["--images", "photos", "--masks", "masks", "--classes", "classes.txt", "--short-side", "64"]
    assert main(["evaluate", *folders, *words, "--json", "result.json"]) == 0
    result = json.loads(Path("result.json").read_text())
    assert result["record"]["method"] == name and result["num_images"] == 2 and 0 <= result["mean_iou"] < 1


@pytest.mark.parametrize("name", LABELS)
def test_a_label_method_teaches(name, own, model_folder):
    flags = ["--teacher-labels", name, "--labels", "@classes.txt", "--window-px", "0"]
    flags += words_for(name, own, model_folder, "teacher-")
    flags += ["--student", model_folder, "--images", "photos", *SIZES, "--workers", "0", "--epochs", "1"]
    if "diffusion" in METHODS[name].needs:  # sees nothing in less
        flags += ["--scale-range", "1", "1", "--min-side-px", "64", "--crop-probability", "0"]
    run("distill.py", *flags, "--output", "run")
    student = SparModel.from_pretrained("run/model")
    assert student.config.vision_config.teacher["method"] == name
    start = SparModel.from_pretrained(model_folder).state_dict()
    assert any(not torch.equal(value, start[key]) for key, value in student.state_dict().items())
