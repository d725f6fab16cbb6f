"""Pictures drawn by Stable Diffusion, and banks made of them."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_diffusion import PlainDiffusion, grid, minmax
from plain_vfm import bilinear
from second_networks import SETTINGS, diffusion_pipeline, small
from test_cli import fails

import spar_hf.prototypes
from spar_cli.main import main
from spar_hf import Labels, build_segmenter
from spar_hf.methods.bank import Bank
from spar_hf.networks.diffusion import Diffusion
from spar_hf.networks.drawing import Drawing, draw
from spar_hf.prototypes import Pictures, build_bank

STEPS = Drawing(steps=3, guidance=2.0)


@cache
def pipeline():
    return diffusion_pipeline()


@torch.no_grad()
def test_a_drawing_is_the_pipelines_own(monkeypatch):
    """The picture, and where the name is, of one seed: the loop of the pipeline with attention as whole matrices."""
    diffusion, pipe = Diffusion(pipeline()), pipeline()
    image, inside = draw(diffusion, "red car", STEPS, seed=5)
    noise = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(5))
    expected = pipe("A good photo of a red car", latents=noise, num_inference_steps=3, guidance_scale=2.0)
    difference = np.abs(np.asarray(image).astype(int) - np.asarray(expected.images[0]).astype(int))
    assert difference.max() <= 1 and np.asarray(image).std() > 5

    plain, latent, heads = PlainDiffusion(pipe, noise), noise, []
    words, nothing = plain.words("A good photo of a red car"), plain.words("")
    last = len(plain.ids("A good photo of a red car")) - 1
    first = last - (len(plain.ids("red car")) - 2)
    pipe.scheduler.set_timesteps(3)
    for step in pipe.scheduler.timesteps:
        for name, own in plain.run(latent, step, words).items():
            if name.endswith("attn2"):
                heads += [bilinear(grid(p[:, first:last].mean(axis=1)), (16, 16)) for p in own["probs"]]
        one, two = (pipe.unet(latent, step, encoder_hidden_states=s).sample for s in (nothing, words))
        latent = pipe.scheduler.step(one + 2.0 * (two - one), step, latent).prev_sample
    heat = minmax(bilinear(np.mean(heads, axis=0), (64, 64)))
    sure = np.abs(heat - 0.5) > 1e-4
    np.testing.assert_array_equal(inside[sure], heat[sure] >= 0.5)
    assert 0 < inside.mean() < 1


def test_pictures_of_each_class_and_name():
    labels = Labels.parse("road; car, automobile")
    found = Pictures.drawn(Diffusion(pipeline()), labels, 3, STEPS)
    assert found.names == ("road 0", "road 1", "road 2", "car 0", "automobile 1", "car 2")
    sample, again = found.read(4), found.read(4)
    assert sample.image.size == (64, 64) and np.array_equal(sample.target, again.target)
    assert np.array_equal(np.asarray(sample.image), np.asarray(again.image))
    assert set(np.unique(sample.target)) == {-1, 1}
    assert not np.array_equal(np.asarray(sample.image), np.asarray(found.read(3).image))
    assert found.identity != Pictures.drawn(Diffusion(pipeline()), labels, 3, Drawing(steps=4)).identity
    with pytest.raises(ValueError, match="reads 77"):
        Pictures.drawn(Diffusion(pipeline()), Labels.parse("q" + "z" * 90), 1, STEPS)


@pytest.mark.slow
def test_a_bank_of_drawings_goes_on_and_needs_no_diffusion(make_spar, spar_processor, tmp_path, monkeypatch):
    model, labels = make_spar(num_hidden_layers=2), Labels.parse("road; sky; grass")
    references = Pictures.drawn(Diffusion(pipeline()), labels, 2, STEPS)
    given = {"networks": {"dino": small("dino")}, "settings": SETTINGS["freeda"], "progress": False}
    whole = build_bank(tmp_path / "whole", "freeda", model, spar_processor, references, **given)
    assert whole.tensors["name"].tolist() == [0, 0, 1, 1, 2, 2]
    monkeypatch.setattr(spar_hf.prototypes, "SAVE_EVERY", 2)
    read: list[int] = []

    def stopping(number):
        read.append(number)
        if number == 3 and read.count(3) == 1:
            raise KeyboardInterrupt
        return references.read(number)

    stopped = Pictures(labels, references.names, stopping, references.identity)
    with pytest.raises(KeyboardInterrupt):
        build_bank(tmp_path / "bank", "freeda", model, spar_processor, stopped, **given)
    bank = build_bank(tmp_path / "bank", "freeda", model, spar_processor, stopped, **given)
    assert read == [0, 1, 2, 3, 2, 3, 4, 5]
    assert torch.equal(bank.features, whole.features)
    networks = {"dino": small("dino"), "bank": tmp_path / "bank"}
    segmenter = build_segmenter(model, spar_processor, "freeda", networks=networks, settings=SETTINGS["freeda"])
    assert not any(isinstance(part, Diffusion) for part in segmenter.networks)
    (maps,) = segmenter(torch.zeros(1, 3, 64, 64), segmenter.encode_labels("road; sky"))
    assert maps(slice(0, 2)).isfinite().all()


def test_the_command_draws(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small("dino").save_pretrained("dino")
    pipeline().save_pretrained("sd")
    words = ["prototypes", "--method", "freeda", "--model", model_folder, "--network", "dino=dino", "--output", "bank"]
    words += [word for name, value in SETTINGS["freeda"].items() for word in ("--set", f"{name}={value}")]
    drawn = ["--generate", "2", "--labels", "road; sky", "--diffusion", "sd", "--draw-steps", "2"]
    assert main([*words, *drawn]) == 0
    assert "4 entries from 4 pictures: bank, 0.0 MB" in capsys.readouterr().out
    assert len(Bank.read(Path("bank"))) == 4
    assert "there is no folder nowhere of a diffusion" in fails(capsys, *words, *drawn[:4], "--diffusion", "nowhere")
