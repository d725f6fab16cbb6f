"""The second network of the drawings: views and what they share, the loss, and the measure of its features."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from distillation_help import run, script
from transformers import ViTModel

from spar_hf.files import read_state
from spar_hf.networks.vit import ViT
from spar_hf.picture_book.dataset import PictureBook

ROOT = Path(__file__).parents[1]


@pytest.fixture
def views():
    with script("pretrain_vit.py"):
        yield importlib.import_module("vit_views")


@pytest.fixture
def trainer():
    with script("pretrain_vit.py") as module:
        yield module


@pytest.fixture
def affinity(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("affinity")


def test_a_place_is_found_again_in_the_other_view(views, monkeypatch):
    """Pictures whose colour is the place: patches of the two views that are matched have the same colour."""
    for name in ("GAIN", "OFFSET", "CAST"):
        monkeypatch.setattr(views, name, 0.0)
    across, down = np.meshgrid(np.arange(views.SCENE_PX), np.arange(views.SCENE_PX))
    picture = np.stack([across, down, np.full_like(across, 128)], axis=-1).astype(np.uint8)
    pixels, places = views.pairs(np.stack([picture] * 6), np.random.default_rng(0))
    assert pixels.shape == (12, 3, views.SIDE_PX, views.SIDE_PX) and 0 < int(places.flipped.sum()) < 12
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (views.IMAGENET_DEFAULT_MEAN, views.IMAGENET_DEFAULT_STD))
    patches = torch.nn.functional.avg_pool2d((pixels * std + mean) * 255, views.PATCH_PX)[:, :2]  # (12, 2, g, g)
    centres = places.centres()
    torch.testing.assert_close(patches.permute(0, 2, 3, 1), centres - 0.5, atol=1.5, rtol=0)
    other = views.Places(*(field.roll(6) for field in places))
    at = other.to_view(centres)
    found = torch.nn.functional.grid_sample(patches.roll(6, 0), at, align_corners=False)
    inside = (at.abs() < 1 - 1 / views.GRID).all(-1)
    shares = inside.float().mean((1, 2))
    assert shares.max() > 0.3
    torch.testing.assert_close(found.permute(0, 2, 3, 1)[inside], centres[inside] - 0.5, atol=2.5, rtol=0)


def test_light_changes_and_places_do_not(views):
    picture = PictureBook("train", views.SCENE_PX, views.SCENE_PX).scene(0).image
    one, two = (views.pairs(picture[None], np.random.default_rng(seed)) for seed in (0, 0))
    assert torch.equal(one[0], two[0])
    assert one[0].std(0).mean() > 0.1


def test_patches_are_hidden_in_every_second_view(views):
    hidden = views.masks(8, np.random.default_rng(0))
    assert hidden.shape == (8, views.GRID**2) and not hidden[1::2].any()
    assert all(0.05 < float(row.float().mean()) < 0.6 for row in hidden[::2])


def test_assignments_are_balanced_as_by_hand(trainer):
    cosines = torch.rand(40, 5, generator=torch.Generator().manual_seed(0)) * 0.4
    cosines[:, 0] += 0.3  # all are nearest to the first
    plain = np.exp(cosines.double().numpy() / 0.05)
    plain /= plain.sum(1, keepdims=True)
    for _ in range(3):
        for column in range(5):
            plain[:, column] /= plain[:, column].sum()
        for row in range(40):
            plain[row] /= plain[row].sum()
    found = trainer.balanced(cosines)
    np.testing.assert_allclose(found.numpy(), plain, atol=2e-5)
    assert found.sum(0).max() < 3 * found.sum(0).min() and (cosines.argmax(1) == 0).float().mean() > 0.8


def test_the_loss_of_two_equal_views_by_hand(trainer, views):
    torch.manual_seed(0)
    network = trainer.Network(prototypes=7)
    teacher = trainer.Network(prototypes=7)
    one = torch.full((4,), 0.0)
    places = views.Places(one, one, torch.full((4,), 256.0), torch.zeros(4, dtype=torch.bool))
    first = torch.randn(2, 3, views.SIDE_PX, views.SIDE_PX)
    pixels, hidden = torch.cat([first, first.flip(0)]), views.masks(4, np.random.default_rng(1))
    across, own = trainer.training_loss(network, teacher, pixels, places, hidden)
    with torch.no_grad():
        targets = trainer.balanced(teacher(pixels).flatten(0, 1)).view(4, -1, 7).double()
        found = network(pixels, hidden).double() / 0.1
    logs = found - found.exp().sum(-1, keepdim=True).log()
    wanted = [
        np.mean([-float((targets[(view + 2) % 4, n] * logs[view, n]).sum()) for view in range(4) for n in range(144)]),
        np.mean([-float((targets[v, n] * logs[v, n]).sum()) for v, n in hidden.nonzero().tolist()]),
    ]
    np.testing.assert_allclose([across.item(), own.item()], wanted, atol=2e-5)


def test_what_is_written_is_a_second_network(trainer, tmp_path):
    torch.manual_seed(0)
    network = trainer.Network(prototypes=3)
    trainer.save(tmp_path / "model", network)
    adapter = ViT(str(tmp_path / "model"))
    assert isinstance(adapter.network, ViTModel) and adapter.patch_px == 8 and adapter.num_heads == 6
    assert tuple(adapter.image_mean) == (0.485, 0.456, 0.406)
    image = torch.randn(1, 3, 96, 96)
    ours = network.vit(image).last_hidden_state
    torch.testing.assert_close(adapter.network.float()(image).last_hidden_state, ours, atol=5e-3, rtol=5e-3)


def test_a_short_run_learns_and_goes_on(tmp_path):
    words = ("--output", tmp_path / "run", "--batch-size", 2, "--pool-scenes", 2, "--prototypes", 4, "--threads", 1)
    assert run("pretrain_vit.py", *words, "--steps", 1) == 0
    with pytest.raises(ValueError, match="holds a run; add --resume"):
        run("pretrain_vit.py", *words, "--steps", 2)
    assert run("pretrain_vit.py", *words, "--steps", 2, "--resume") == 0
    counts, _ = read_state(tmp_path / "run" / "state.safetensors")
    assert counts["step"] == 2 and counts["scenes_drawn"] >= 4
    assert (tmp_path / "run" / "model" / "preprocessor_config.json").exists()


def test_the_area_under_the_curve_by_hand(affinity):
    rng = np.random.default_rng(0)
    scores, same = rng.integers(0, 6, 40) / 6, rng.random(40) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a in scores[same] for b in scores[~same]]
    assert affinity.auc(scores, same) == pytest.approx(np.mean(pairs), abs=1e-12)


def test_cells_of_two_classes_are_left_out(affinity):
    mask = np.full((16, 24), 3, np.uint8)
    mask[:8, 8:16] = 5
    mask[8:, :7] = 1  # 56 of 64 pixels: less than nine tenths
    mask[8:, 16:] = 2
    mask[15, 23] = 0  # one of 64
    assert affinity.classes_of_cells(mask).tolist() == [3, 5, 3, -1, 3, 2]


def test_a_network_is_measured(affinity, tmp_path, capsys):
    affinity.main(["random", "--limit", "1", "--scales", "1", "--output", str(tmp_path / "a.json")])
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["network"] == "random" and 0.5 < row["auc_things"] < row["auc"] < 1
    assert row["cosine_other"] < row["cosine_same"] <= 1 and "| random | 1 |" in capsys.readouterr().out
