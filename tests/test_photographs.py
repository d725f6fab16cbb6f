"""benchmarks/photographs.py: what the probe learns from, what it is, and the command on files and on any ViT."""

from __future__ import annotations

import json

import numpy as np
import photographs
import pytest
import torch
from PIL import Image
from sklearn.linear_model import LogisticRegression
from transformers import Dinov2Config, Dinov2Model

from spar_hf.evaluation.samples import IGNORED


@pytest.mark.parametrize(
    ("size_hw", "grid_hw", "covered"),
    [((32, 48), (2, 3), (1.0, 1.0)), ((70, 90), (4, 5), (70 / 64, 90 / 80)), ((70, 90), (5, 6), (70 / 80, 90 / 96))],
    ids=["whole", "floor", "pad"],
)
def test_shares_of_classes_are_counted_pixel_by_pixel(size_hw, grid_hw, covered):
    target = np.random.default_rng(0).integers(-1, 4, size_hw).astype(np.int32)
    found = photographs.patch_classes(target, 4, grid_hw, covered).numpy()
    counts = np.zeros((*grid_hw, 4))
    for y in range(size_hw[0]):
        for x in range(size_hw[1]):
            row = min(int((y + 0.5) / size_hw[0] * covered[0] * grid_hw[0]), grid_hw[0] - 1)
            column = min(int((x + 0.5) / size_hw[1] * covered[1] * grid_hw[1]), grid_hw[1] - 1)
            if target[y, x] != IGNORED:
                counts[row, column, target[y, x]] += 1
    np.testing.assert_allclose(found, counts / np.maximum(counts.sum(-1, keepdims=True), 1), atol=1e-6)


def test_the_probe_is_the_logistic_regression():
    rng = np.random.default_rng(1)
    classes = rng.integers(0, 3, 300)
    features = (rng.normal(size=(3, 8))[classes] + rng.normal(size=(300, 8))) * rng.uniform(0.1, 9, 8) + 5
    weight, bias = photographs.fit(torch.from_numpy(features).float(), torch.eye(3)[classes])
    # scikit-learn's C weighs the sum of the losses; features of unit variance, as the penalty is on those.
    mean, std = features.mean(0), features.std(0, ddof=1)
    other = LogisticRegression(C=1 / (photographs.WEIGHT_DECAY * len(features)), max_iter=2000, tol=1e-8)
    other.fit((features - mean) / std, classes)
    ours = (torch.from_numpy(features).float() @ weight.T + bias).softmax(-1).numpy()
    np.testing.assert_allclose(ours, other.predict_proba((features - mean) / std), atol=5e-3)


@pytest.fixture
def tree(tmp_path):
    """Eight pictures whose left half is dark and right half bright, and their label maps."""
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
    rng = np.random.default_rng(0)
    for number in range(8):
        height, width = (90, 130) if number % 2 else (70, 64)
        edge = int(rng.integers(width // 4, 3 * width // 4))
        values, target = rng.integers(0, 90, (height, width, 3)), np.zeros((height, width), np.uint8)
        values[:, edge:] += 150
        target[:, edge:] = 1
        Image.fromarray(values.astype(np.uint8)).save(tmp_path / "images" / f"{number}.png")
        Image.fromarray(target).save(tmp_path / "masks" / f"{number}.png")
    (tmp_path / "classes.txt").write_text("dark\nbright, light\n")
    return tmp_path


def words(tree, weights):
    paths = {"--images": "images", "--masks": "masks", "--classes": "classes.txt"}
    given = [part for flag, name in paths.items() for part in (flag, str(tree / name))]
    return ["--weights", str(weights), *given, "--scales", "1", "2", "--output", str(tree / "found.json")]


def test_a_tower_on_files(tree, make_spar, capsys):
    make_spar(num_hidden_layers=2).vision_model.save_pretrained(tree / "tower")
    photographs.main(words(tree, tree / "tower"))
    document = json.loads((tree / "found.json").read_text())
    assert {(row["row"], row["scale"]) for row in document["rows"]} == {
        (row, scale) for row in photographs.ROWS for scale in (1, 2)
    }
    assert all(row["pictures"] == 4 for row in document["rows"])
    # Bright and dark are told apart by any features.
    assert all(row["mean_iou"] > 0.6 for row in document["rows"] if row["scale"] == 1)
    assert "| sliding window |" in capsys.readouterr().out
    photographs.main(words(tree, tree / "tower"))  # all there
    assert json.loads((tree / "found.json").read_text()) == document
    assert "the probe learns" not in capsys.readouterr().out


def test_any_vit_has_no_reach(tree):
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 56, "patch_size": 14}
    Dinov2Model(Dinov2Config(**sizes)).save_pretrained(tree / "dinov2")
    photographs.main(words(tree, tree / "dinov2"))
    rows = json.loads((tree / "found.json").read_text())["rows"]
    assert {row["row"] for row in rows} == set(photographs.ROWS) - {"within reach"}


def test_too_few_pictures(tree, capsys):
    for number in range(1, 8):
        (tree / "images" / f"{number}.png").unlink()
    with pytest.raises(SystemExit):
        photographs.main(words(tree, "tiny"))
    assert "custom has 1 picture; one is needed to learn from and one to measure" in capsys.readouterr().err
