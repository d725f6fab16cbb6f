"""The adapter of Stable Diffusion: words, latents, attention as the pipeline itself has them, and bad input."""

from __future__ import annotations

import json
from functools import cache
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from plain_diffusion import PlainDiffusion
from safetensors.torch import load_file, save_file
from second_networks import diffusion_pipeline
from transformers import BertConfig, BertModel

import spar_hf.extras
from spar_hf.networks.diffusion import Diffusion

CONFIG = SimpleNamespace(image_mean=(0.5, 0.45, 0.4), image_std=(0.25, 0.3, 0.2))


@cache
def pipeline(xl: bool = False):
    return diffusion_pipeline(xl)


@pytest.fixture
def noise():
    return torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("size", [(64, 64), (112, 128), (64, 150), (90, 75)])
@pytest.mark.parametrize("mode", ["bilinear", "nearest", "antialias"])
@torch.no_grad()
def test_a_picture_becomes_the_latent_that_the_pipeline_makes(size, mode, pixels, noise):
    images, diffusion = pixels(size), Diffusion(pipeline(), noise)
    plain = PlainDiffusion(pipeline(), noise)
    square = diffusion.square(images, CONFIG, 64, mode)
    expected = plain.square(images[0].numpy(), CONFIG, 64, mode)
    torch.testing.assert_close(square, expected, atol=1e-5, rtol=0)
    own = diffusion.noise_for(5, 2, 64)
    assert torch.equal(torch.cat(own), noise)
    found = diffusion.noised(diffusion.latent(square, own[0]), 100, own[1])
    torch.testing.assert_close(found, plain.noised(expected, 100, sampled=True), atol=1e-5, rtol=1e-5)
    found = diffusion.noised(diffusion.latent(square), 0, own[0])
    torch.testing.assert_close(found, plain.noised(expected, 0), atol=1e-5, rtol=1e-5)


def test_noise_comes_from_its_seed_alone():
    diffusion = Diffusion(pipeline())
    one, two = diffusion.noise_for(7, 2, 64)
    assert torch.equal(one, diffusion.noise_for(7, 1, 64)[0]) and not torch.equal(one, two)
    assert not torch.equal(one, diffusion.noise_for(8, 1, 64)[0])
    torch.testing.assert_close(torch.stack([one, two]).std(), torch.tensor(1.0), atol=0.1, rtol=0)


@pytest.mark.parametrize("xl", [False, True])
@torch.no_grad()
def test_words_are_encoded_as_the_pipeline_encodes_them(xl):
    diffusion, pipe = Diffusion(pipeline(xl)), pipeline(xl)
    texts = ["", "a photograph of dining table", "red house and T-shirt, sky"]
    parts = [[], ["a photograph of", "dining table"], ["red house", "and", "T-shirt", ", sky"]]
    found = diffusion.encode([diffusion.prompt(part) for part in parts])
    for row, text in enumerate(texts):
        expected = pipe.encode_prompt(text, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False)
        torch.testing.assert_close(found.states[row], expected[0][0], atol=1e-5, rtol=1e-5)
        if xl:
            torch.testing.assert_close(found.pooled[row], expected[2][0], atol=1e-5, rtol=1e-5)
    prompt = diffusion.prompt(parts[2])
    assert list(prompt.ids) == pipe.tokenizer(texts[2])["input_ids"]
    ids = pipe.tokenizer("T-shirt", add_special_tokens=False)["input_ids"]
    assert list(prompt.ids[prompt.places[2]]) == ids and len(ids) > 1


@torch.no_grad()
def test_attention_is_that_of_whole_matrices_and_the_layers_stay_as_they_were(noise):
    diffusion, plain = Diffusion(pipeline()), PlainDiffusion(pipeline(), noise)
    texts = diffusion.encode([diffusion.prompt(["road"]), diffusion.prompt(["sky"])])
    layers = {**diffusion.layers("attn1"), **diffusion.layers("attn2")}
    assert sorted(set(layers.values())) == [1, 2, 4, 8] and len(layers) == 2 * 16
    seen: dict[str, list] = {name: [] for name in layers}
    former = dict(diffusion.unet.attn_processors)
    out = diffusion.look(noise[:1], 100, texts, {name: seen[name].append for name in layers})
    assert diffusion.unet.attn_processors == former
    for row, word in enumerate(("road", "sky")):
        states = plain.words(word)
        expected = plain.run(noise[:1], 100, states)
        sample = plain.pipe.unet(noise[:1], 100, encoder_hidden_states=states).sample
        torch.testing.assert_close(out[row : row + 1], sample, atol=2e-5, rtol=1e-4)
        for name, own in expected.items():
            found = seen[name][row]
            assert found.side == 16 // layers[name] and found.num_heads == len(own["probs"])
            probs = np.stack([found.probabilities(head) for head in range(found.num_heads)])
            np.testing.assert_allclose(probs, own["probs"], atol=1e-5)
            np.testing.assert_allclose(found.mean(), own["probs"].mean(axis=0), atol=1e-5)
            np.testing.assert_allclose(found.output, own["out"], atol=1e-4)

    def broken(attention):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        diffusion.look(noise[:1], 100, texts, {next(iter(layers)): broken})
    assert diffusion.unet.attn_processors == former


@torch.no_grad()
def test_an_xl_pipeline_sees_as_its_own_call_has_it(noise):
    pipe = pipeline(xl=True)
    diffusion = Diffusion(pipe)
    found = diffusion.look(noise[:1], 50, diffusion.encode([diffusion.prompt(["road"])]), {})
    states, _, pooled, _ = pipe.encode_prompt("road", device="cpu", do_classifier_free_guidance=False)
    sizes = pipe._get_add_time_ids((64, 64), (0, 0), (64, 64), states.dtype, pooled.shape[-1])
    added = {"text_embeds": pooled, "time_ids": sizes}
    expected = pipe.unet(noise[:1], 50, encoder_hidden_states=states, added_cond_kwargs=added).sample
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def test_names_are_put_together_as_many_as_a_prompt_holds():
    diffusion = Diffusion(pipeline())
    names = [f"thing {chr(97 + i)} of {chr(97 + i // 2)}" for i in range(26)]
    groups = diffusion.groups(names, "a photo of", "and", "and more")
    assert len(groups) > 1 and [n for group in groups for n in group] == list(range(26))
    for number, group in enumerate(groups):
        parts = ["a photo of"]
        for name in group:
            parts += [names[name], "and"]
        assert len(diffusion.prompt([*parts[:-1], "and more"]).ids) <= 77
        if number + 1 < len(groups):  # one more does not fit
            with pytest.raises(ValueError, match="tokens and the diffusion model reads 77"):
                diffusion.prompt([*parts, names[group[-1] + 1], "and more"])
    assert diffusion.groups(["x"], "", "and", "") == [[0]]


@pytest.mark.slow
def test_a_saved_pipeline_comes_back_the_same(tmp_path):
    for xl in (False, True):
        pipeline(xl).save_pretrained(tmp_path / str(xl))
        again, own = Diffusion(tmp_path / str(xl)), Diffusion(pipeline(xl))
        assert all(torch.equal(value, again.state_dict()[name]) for name, value in own.state_dict().items())
        assert again.prompt(["red house"]) == own.prompt(["red house"]) and repr(again) == repr(own)
        assert again.alphas == own.alphas


def test_bad_input_is_one_line(tmp_path, pixels, noise, monkeypatch):
    diffusion = Diffusion(pipeline(), noise)
    for call, words in {
        lambda: diffusion.square(pixels((63, 90)), CONFIG, 64): r"picture is 63x90 px .* under 64 px; give a larger",
        lambda: diffusion.prompt(["ab cd"] * 40): r"prompt 'ab cd ab .* has \d+ tokens .* reads 77: '.*' would be cut",
        lambda: diffusion.prompt(["<|endoftext|>"]): r"has no words for '<\|endoftext\|>'; write it in other words",
        lambda: diffusion.noise_for(0, 3, 64): r"given noise of shape \(2, 4, 16, 16\) and 3 of shape",
        lambda: diffusion.noise_for(0, 1, 128): r"given noise of shape .* 1 of shape \(4, 32, 32\) are taken",
        lambda: diffusion.noised(noise[:1], 1000, noise[:1]): r"step is 1000; .* steps 0 to 999",
        lambda: diffusion.check_side(60, "method 'x'"): r"side_px of method 'x' is 60; .* 32, or 0 .* \(64\)",
        lambda: diffusion.check_layers(["mid.x"], "method 'x'"): r"method 'x' reads layer mid.x .* Diffusion 1 or",
        lambda: Diffusion("nowhere"): r"there is no folder nowhere of a diffusion model; give one",
        lambda: Diffusion(SimpleNamespace(unet=None)): r"diffusion model's unet is missing and must be a UNet2DCond",
    }.items():
        with pytest.raises(ValueError, match=words) as raised:
            call()
        assert "\n" not in str(raised.value)
    with monkeypatch.context() as patch:
        patch.setattr(spar_hf.extras, "import_module", lambda name: __import__("no_such_package"))
        with pytest.raises(ValueError, match=r'diffusers is needed .* run: pip install "spar-hf\[diffusion\]"'):
            Diffusion("nowhere")
    diffusion.vae.encode = lambda pixels: SimpleNamespace(
        latent_dist=SimpleNamespace(mean=torch.full((1, 4, 16, 16), torch.nan))
    )
    with pytest.raises(ValueError, match=r"latent holds NaN or infinity in float32; run it in bfloat16 or float32"):
        diffusion.latent(torch.zeros(1, 3, 64, 64))
    del diffusion.vae.encode


def test_another_or_a_broken_pipeline_is_refused(tmp_path):
    folder = tmp_path / "pipeline"
    pipeline().save_pretrained(folder)
    index = json.loads((folder / "model_index.json").read_text())

    def refused(words):
        with pytest.raises(ValueError, match=words) as raised:
            Diffusion(folder)
        assert "\n" not in str(raised.value)

    for part, kind in {"text_encoder": "T5EncoderModel", "unet": "FluxTransformer2DModel"}.items():
        (folder / "model_index.json").write_text(json.dumps({**index, part: ["diffusers", kind]}))
        refused(rf"the diffusion model's {part} is a {kind} and must be a .*; give Stable Diffusion 1, 2 or XL")
    (folder / "model_index.json").write_text(json.dumps(index))
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    whole = load_file(weights)
    save_file({**whole, "conv_in.bias": torch.full((12,), torch.nan)}, weights, {"format": "pt"})
    refused(r"conv_in.bias holds NaN or infinity")
    save_file({name: value for name, value in whole.items() if name != "conv_in.bias"}, weights, {"format": "pt"})
    refused(r"diffusion_pytorch_model.safetensors .* conv_in.bias")
    weights.write_bytes(b"no weights")
    refused(r"diffusion_pytorch_model.safetensors cannot be used: it is no file of safetensors")
    weights.unlink()
    refused(r"diffusion_pytorch_model.safetensors cannot be used: there is no such file")
    other = pipeline()
    bert = BertModel(BertConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=1, intermediate_size=8))
    parts = SimpleNamespace(**{**other.components, "text_encoder": bert})
    with pytest.raises(ValueError, match=r"text_encoder is a BertModel and must be a CLIPTextModel"):
        Diffusion(parts)
