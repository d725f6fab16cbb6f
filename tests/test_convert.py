"""Conversion: every source layout with random weights, compared with formulations that share nothing with it."""

from __future__ import annotations

import gzip
import json
import pickle
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from plain_clip import PlainClip, plain_method
from plain_families import plain_dinov3, plain_eva, plain_siglip
from safetensors.torch import save_file
from source_layouts import (
    dinotxt_rest,
    dinov3_backbone,
    open_clip_vit,
    timm_clip,
    timm_eva02,
    timm_pe_core,
    timm_siglip,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import (
    AutoModel,
    CLIPModel,
    CLIPVisionConfig,
    DINOv3ViTModel,
    MetaClip2Model,
    PreTrainedTokenizerFast,
    SiglipModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN

import spar_hf
from spar_cli.main import main
from spar_hf.conversion import convert
from spar_hf.conversion.convert import clip_tokenizer
from spar_hf.conversion.layouts import Asked
from spar_hf.conversion.source import read_source

SIZES = ((64, 64), (96, 96), (64, 112), (90, 75))
CLOSE = {"atol": 5e-5, "rtol": 0}
HEADS = {"heads": 3, "text_heads": 2}


@pytest.fixture(scope="module")
def words(clip_tokenizer, tmp_path_factory) -> str:
    """A folder with a tokenizer."""
    folder = tmp_path_factory.mktemp("tokenizer")
    clip_tokenizer.save_pretrained(folder)
    return str(folder)


def lightning(weights, path: Path) -> Path:
    """As SPAR's training leaves it, optimiser state and all."""
    state = {f"segmentor.net.model.{name}": weight for name, weight in weights.items()}
    torch.save({"state_dict": state, "epoch": 9, "global_step": 1, "optimizer_states": [{"lr": 2e-5}]}, path)
    return path


def trimmed(weights, path: Path) -> Path:
    """As SPAR's authors released it."""
    torch.save({f"model.{name}": weight for name, weight in weights.items()}, path)
    return path


def plain_file(weights, path: Path) -> Path:
    torch.save(weights, path)
    return path


def safe_file(weights, path: Path) -> Path:
    save_file({name: weight.contiguous() for name, weight in weights.items()}, path.with_suffix(".safetensors"))
    return path.with_suffix(".safetensors")


WRITERS = (lightning, trimmed, plain_file, safe_file)


def pixels_of(size_hw):
    return torch.randn(1, 3, *size_hw, generator=torch.Generator().manual_seed(sum(size_hw)))


def as_numpy(model: nn.Module):
    return {name: weight.double().numpy() for name, weight in model.state_dict().items()}


# ------------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("write", WRITERS)
@torch.no_grad()
def test_clip(write, clip_tokenizer, words, tmp_path):
    path = write(open_clip_vit(len(clip_tokenizer)), tmp_path / "clip.ckpt")
    report = convert([path], "clip", tmp_path / "out", Asked("quick_gelu", **HEADS), words)
    assert all(check.agrees for check in report.comparisons) and len(report.comparisons) == 5
    model, processor = spar_hf.load(tmp_path / "out")
    stock = CLIPModel.from_pretrained(tmp_path / "out").eval()  # what we write, plain CLIP reads
    net = PlainClip(stock)
    for size_hw in SIZES:
        pixels = pixels_of(size_hw)
        expected, _ = plain_method(net, pixels[0].numpy(), "maskclip")
        found = model.vision_model(pixels).patch_embeds[0]
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), **CLOSE)
    assert model.config.vision_config.source.startswith(path.name)
    assert processor.image_processor.image_mean == list(OPENAI_CLIP_MEAN)
    assert set(tmp_path.iterdir()) == {path, tmp_path / "out"}  # no draft is left


@pytest.mark.parametrize("write", WRITERS)
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh"])
@torch.no_grad()
def test_siglip(write, activation, clip_tokenizer, words, tmp_path):
    path = write(timm_siglip(len(clip_tokenizer)), tmp_path / "siglip.pt")
    asked = Asked(activation, "gelu_pytorch_tanh", **HEADS)
    report = convert([path], "siglip2", tmp_path / "out", asked, words)
    assert all(check.agrees for check in report.comparisons)
    model, processor = spar_hf.load(tmp_path / "out")
    assert (processor.text_padding, processor.max_length, processor.lowercase) == ("max_length", 64, True)
    stock = SiglipModel.from_pretrained(tmp_path / "out").eval()
    assert stock.config.vision_config.hidden_act == activation
    assert stock.config.text_config.hidden_act == "gelu_pytorch_tanh"
    for size_hw in SIZES:
        pixels = pixels_of(size_hw)
        expected = plain_siglip(as_numpy(stock.vision_model), pixels[0].double().numpy(), 16, 3, 3, activation)
        torch.testing.assert_close(
            model.vision_model(pixels).patch_embeds[0], torch.from_numpy(expected).float(), **CLOSE
        )
    assert model.logit_bias.item() == -10 and model.logit_scale.item() == 2


@torch.no_grad()
def test_timms_trunk_alone(tmp_path):
    path = safe_file(timm_siglip(None, patch_px=14, grid=5), tmp_path / "trunk")
    convert([path], "siglip2", tmp_path / "out", Asked("gelu", heads=3))
    tower = AutoModel.from_pretrained(tmp_path / "out")
    assert type(tower) is spar_hf.SparSiglipVisionModel
    assert (tower.config.image_size, tower.config.patch_size) == (70, 14)
    pixels = pixels_of((75, 61))
    expected = plain_siglip(as_numpy(tower), pixels[0].double().numpy(), 14, 3, 3, "gelu")
    torch.testing.assert_close(tower(pixels).patch_embeds[0], torch.from_numpy(expected).float(), **CLOSE)
    with pytest.raises(ValueError, match="holds a vision tower alone"):
        spar_hf.load(tmp_path / "out")


@pytest.mark.parametrize("alone", [True, False])
@torch.no_grad()
def test_timms_clip(alone, clip_tokenizer, words, tmp_path):
    path = plain_file(timm_clip(None if alone else len(clip_tokenizer)), tmp_path / "timm.pt")
    report = convert([path], "clip", tmp_path / "out", Asked("quick_gelu", **HEADS), words)
    assert all(check.agrees for check in report.comparisons) and list(report.left_out) == [
        "head.bias" if alone else "visual.trunk.head.bias"
    ]
    tower = spar_hf.SparVisionModel.from_pretrained(tmp_path / "out")
    net = PlainClip.of_tower(as_numpy(tower), CLIPVisionConfig(**tower.config.to_dict()))
    for size_hw in SIZES:
        expected, _ = plain_method(net, pixels_of(size_hw)[0].numpy(), "maskclip")
        found = tower(pixels_of(size_hw)).patch_embeds[0]
        torch.testing.assert_close(found, torch.from_numpy(expected).float(), **CLOSE)
    biased = {name: weight + 1 if name.endswith("head.bias") else weight for name, weight in timm_clip().items()}
    with pytest.raises(ValueError, match=r"1 weights of the source are unused: head\.bias"):
        convert([plain_file(biased, tmp_path / "bias.pt")], "clip", tmp_path / "x", Asked("gelu", **HEADS))


@pytest.fixture
def xlm_words(tmp_path) -> str:
    """A folder with a tokenizer whose texts begin and end as XLM-V's."""
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {f"w{n}": n for n in range(4, 40)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(tmp_path / "xlm")
    return str(tmp_path / "xlm")


@torch.no_grad()
def test_metaclip2(xlm_words, words, tmp_path):
    path = plain_file(open_clip_vit(60), tmp_path / "worldwide.pt")
    report = convert([path], "metaclip2", tmp_path / "out", Asked("quick_gelu", **HEADS), xlm_words)
    assert all(check.agrees for check in report.comparisons) and len(report.comparisons) == 5
    model, processor = spar_hf.load(tmp_path / "out", method="clip")
    stock = MetaClip2Model.from_pretrained(tmp_path / "out").eval()
    texts = processor(text=["w5 w39 w7", "w39"])
    expected = stock(pixel_values=pixels_of((64, 64)), **texts)
    found = model(pixels_of((64, 64)), **texts)
    torch.testing.assert_close(found.logits_per_image, expected.logits_per_image, **CLOSE)
    # By CLIP's rule, at the highest id, it would be another text.
    with pytest.raises(ValueError, match="does not agree with the source: text features"):
        convert([plain_file(open_clip_vit(700), tmp_path / "x.pt")], "metaclip2", tmp_path / "x",
                Asked("quick_gelu", **HEADS), words)  # fmt: skip
    with pytest.raises(ValueError, match=r"no token_embedding.weight; this is no MetaCLIP 2 of open_clip"):
        convert([plain_file(timm_clip(), tmp_path / "t.pt")], "metaclip2", tmp_path / "x", Asked("gelu", **HEADS))
    folder = tmp_path / "folder"
    folder.mkdir()
    plain_file(open_clip_vit(60), folder / "open_clip_pytorch_model.bin")
    config = {"model_cfg": {"text_cfg": {"pool_type": "eos"}}}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"this is a MetaCLIP 2, .* give --backbone metaclip2"):
        convert([folder], "clip", tmp_path / "x", Asked("gelu", **HEADS), xlm_words)


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize(
    ("make", "more", "design"),
    [(timm_eva02, {}, "eva02"), (timm_pe_core, {}, "pe_core"), (timm_pe_core, {"class_token": False}, "pe_core")],
    ids=["eva02", "pe_core", "pe_core_g"],
)
@torch.no_grad()
def test_eva(make, more, design, alone, clip_tokenizer, words, tmp_path):
    path = safe_file(make(None if alone else len(clip_tokenizer), **more), tmp_path / "eva")
    report = convert([path], "eva", tmp_path / "out", Asked(**HEADS), words)
    assert all(check.agrees for check in report.comparisons) and len(report.comparisons) == (4 if alone else 5)
    tower = spar_hf.SparEvaVisionModel.from_pretrained(tmp_path / "out")
    assert (tower.config.design, tower.config.class_token) == (design, not more)
    assert tower.config.method == {"eva02": "last_values", "pe_core": "attention_pool"}[design]
    for size_hw in SIZES:
        pixels = pixels_of(size_hw)
        expected = plain_eva(as_numpy(tower), pixels[0].double().numpy(), 16, 3, 3, design == "pe_core")
        torch.testing.assert_close(tower(pixels).patch_embeds[0], torch.from_numpy(expected).float(), **CLOSE)
    if not alone:
        model, processor = spar_hf.load(tmp_path / "out")
        assert processor.image_processor.image_mean == ([0.5] * 3 if design == "pe_core" else list(OPENAI_CLIP_MEAN))
        assert model.config.text_config.hidden_act == "gelu" and model.logit_scale.item() == 2


def test_what_is_no_eva_is_refused(tmp_path):
    def refused(weights, message):
        with pytest.raises(ValueError, match=message):
            convert([plain_file(weights, tmp_path / "x.pt")], "eva", tmp_path / "x", Asked(**HEADS))

    one = torch.zeros(1)
    refused(timm_clip(), r"there is no blocks.0.attn.norm.weight \(EVA-02\) and no attn_pool.latent")
    refused({"pos_embed": one, "blocks.0.attn.q_bias": one}, "this is EVA-02 E, .* it is not read")
    for own in ("visual.blocks.0.attn.inner_attn_ln.weight", "visual.attn_pool.probe"):
        refused({own: one}, "a file of the authors' own code, .* take timm's copy of it")
    headless = {name: weight for name, weight in timm_eva02().items() if not name.startswith("head")}
    refused(headless, "there is no head.weight; without it the patches are not in the text space")
    lacking = {name: weight for name, weight in timm_pe_core().items() if name != "blocks.1.norm2.bias"}
    refused(lacking, r"1 weights of the source are missing: blocks\.1\.norm2\.bias")


@torch.no_grad()
def test_dinov3_biases_are_masked_as_in_the_file(tmp_path):
    weights = dinov3_backbone()
    for n in range(3):
        weights[f"blocks.{n}.attn.qkv.bias_mask"].zero_()  # of queries and values, too
    convert([plain_file(weights, tmp_path / "vitl16.pth")], "dinov3", tmp_path / "out", Asked(**HEADS))
    tower = AutoModel.from_pretrained(tmp_path / "out")
    assert not tower.config.query_bias and not tower.config.value_bias
    assert not any(name.endswith(("q_proj.bias", "v_proj.bias")) for name in tower.state_dict())
    for n in range(3):
        weights[f"blocks.{n}.attn.qkv.bias_mask"].fill_(1)  # the keys' bias counts, for which there is no place
    with pytest.raises(ValueError, match="does not agree with the source: image features"):
        convert([plain_file(weights, tmp_path / "unmasked.pth")], "dinov3", tmp_path / "x", Asked(**HEADS))


@pytest.mark.parametrize("release", ["spar", "meta", "backbone"])
@torch.no_grad()
def test_dinov3(release, clip_tokenizer, words, tmp_path):
    rest = dinotxt_rest(len(clip_tokenizer))
    if release == "spar":
        paths = [lightning({**dinov3_backbone(prefix="visual_model.backbone."), **rest}, tmp_path / "spar.ckpt")]
    else:
        paths = [plain_file(dinov3_backbone(), tmp_path / "vitl16.pth")]
        paths += [plain_file(rest, tmp_path / "dinotxt.pth")] if release == "meta" else []
    report = convert(paths, "dinov3", tmp_path / "out", Asked(**HEADS), words)
    assert all(check.agrees for check in report.comparisons)
    assert len(report.left_out) == (1 if release == "backbone" else 5)  # periods, vision head
    model = AutoModel.from_pretrained(tmp_path / "out")
    tower = model if release == "backbone" else model.vision_model
    periods = [1.0, 3.15625, 10.0, 31.625]  # 100 ** (i / 4) in bf16, as the released files have them
    assert tower.config.rope_periods == periods
    for size_hw in SIZES:
        pixels = pixels_of(size_hw)
        expected = plain_dinov3(as_numpy(tower), pixels[0].double().numpy(), 16, 3, 3, 4, periods=periods)
        torch.testing.assert_close(tower(pixels).patch_embeds[0], torch.from_numpy(expected).float(), **CLOSE)
    tower.save_pretrained(tmp_path / "tower")
    torch.testing.assert_close(
        spar_hf.SparDinov3VisionModel.from_pretrained(tmp_path / "tower")(pixels).patch_embeds,
        tower(pixels).patch_embeds,
    )
    # transformers' class loads it too, but computes the periods: powers of 100 in fp32.
    assert DINOv3ViTModel.from_pretrained(tmp_path / "tower").config.rope_theta == 100.0
    if release == "backbone":
        return
    plain = plain_dinotxt(rest, [5, 9, 7, len(clip_tokenizer) - 1])
    words = torch.tensor([[5, 9, 7, len(clip_tokenizer) - 1]])
    found = model.get_text_features(words).pooler_output[0]
    torch.testing.assert_close(found, torch.from_numpy(plain[48:]).float(), **CLOSE)  # the second half


def plain_dinotxt(weights, ids: list[int]) -> np.ndarray:
    """dino.txt's text embedding of one text in NumPy, from the released names; ends with the end-of-text token."""
    from plain_families import ACTIVATIONS, linear, norm, softmax

    w = {name.removeprefix("text_model."): weight.double().numpy() for name, weight in weights.items()}
    x = w["backbone.token_embedding.weight"][ids] + w["backbone.positional_embedding"][: len(ids)]
    for block in range(2):
        name = f"backbone.blocks.{block}"
        y = norm(w, f"{name}.attention_norm", x, 1e-5) @ w[f"{name}.attention.qkv.weight"].T
        q, k, v = (np.split(part, 2, axis=-1) for part in np.split(y, 3, axis=-1))
        later = np.triu(np.full((len(ids), len(ids)), -np.inf), 1)
        mixed = [softmax(q[h] @ k[h].T / np.sqrt(16) + later) @ v[h] for h in range(2)]
        x = x + linear(w, f"{name}.attention.proj", np.concatenate(mixed, axis=-1))
        y = ACTIVATIONS["gelu"](linear(w, f"{name}.feed_forward.fc1", norm(w, f"{name}.ffn_norm", x, 1e-5)))
        x = x + linear(w, f"{name}.feed_forward.fc2", y)
    return norm(w, "backbone.ln_final", x, 1e-5)[-1] @ w["head.linear_projection.weight"].T


@torch.no_grad()
def test_gated_dinov3(tmp_path):
    path = plain_file(dinov3_backbone(gated=True), tmp_path / "plus.pth")
    report = convert([path], "dinov3", tmp_path / "out", Asked(heads=3))
    assert all(check.agrees for check in report.comparisons) and report.vision["use_gated_mlp"]


# --------------------------------------------------------------------------- what shapes cannot tell


def test_open_clips_folder_says_the_rest(clip_tokenizer, words, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(open_clip_vit(len(clip_tokenizer)), folder / "open_clip_model.safetensors")
    config = {
        "model_cfg": {"embed_dim": 24, "vision_cfg": {}, "text_cfg": {}, "quick_gelu": True},
        "preprocess_cfg": {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]},
    }
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    convert([folder], "clip", tmp_path / "out", Asked(**HEADS), words)
    model, processor = spar_hf.load(tmp_path / "out")
    assert model.config.vision_config.hidden_act == model.config.text_config.hidden_act == "quick_gelu"
    assert processor.image_processor.image_mean == [0.5, 0.4, 0.3] == model.config.vision_config.image_mean


@pytest.mark.parametrize(
    ("timm_name", "act_kwargs", "expected"),
    [
        ("vit_base_patch16_siglip_512", {"approximate": "tanh"}, ("gelu", "gelu_pytorch_tanh")),
        ("vit_so400m_patch16_siglip_256", {"approximate": "tanh"}, ("gelu_pytorch_tanh", "gelu_pytorch_tanh")),
        ("vit_so400m_patch14_siglip_384", {}, ("gelu", "gelu")),
    ],
)
def test_open_clips_folder_names_siglips_activations(timm_name, act_kwargs, expected, clip_tokenizer, words, tmp_path):
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(timm_siglip(len(clip_tokenizer)), folder / "open_clip_model.safetensors")
    config = {"vision_cfg": {"timm_model_name": timm_name}, "text_cfg": {"act_kwargs": act_kwargs}}
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    report = convert([folder], "siglip2", tmp_path / "out", Asked(**HEADS), words)
    assert (report.vision["hidden_act"], report.text["hidden_act"]) == expected


def test_what_cannot_be_seen_is_asked_for(clip_tokenizer, words, tmp_path):
    clip = plain_file(open_clip_vit(len(clip_tokenizer)), tmp_path / "clip.pt")
    siglip = plain_file(timm_siglip(len(clip_tokenizer)), tmp_path / "siglip.pt")
    out = tmp_path / "out"
    for path, backbone, asked, message in (
        (
            clip,
            "clip",
            Asked(**HEADS),
            r"activation cannot be seen.*give --activation: gelu for LAION's.*quick_gelu for",
        ),
        (clip, "clip", Asked("gelu"), r"heads of a tower 48 wide cannot be seen in its weights; give --heads"),
        (clip, "clip", Asked("gelu", heads=5, text_heads=2), r"--heads is 5; it must divide the width, 48"),
        (siglip, "siglip2", Asked(**HEADS), r"vision tower's activation cannot be seen.*gelu \(exact\) for ViT-B/16"),
        (siglip, "siglip2", Asked("gelu", **HEADS), r"text tower's activation cannot be seen.*--text-activation"),
    ):
        with pytest.raises(ValueError, match=message):
            convert([path], backbone, out, asked, words)
    with pytest.raises(ValueError, match=r"no published tokenizer has \d+ tokens; give --tokenizer FOLDER or ID"):
        convert([clip], "clip", out, Asked("gelu", **HEADS))
    with pytest.raises(OSError, match=r"tokenizer nobody/here cannot be read. Give --tokenizer: a folder that holds"):
        convert([clip], "clip", out, Asked("gelu", **HEADS), "nobody/here")
    assert not out.exists()


def test_the_wrong_backbone_is_told(clip_tokenizer, words, tmp_path):
    clip = plain_file(open_clip_vit(len(clip_tokenizer)), tmp_path / "clip.pt")
    siglip = plain_file(timm_siglip(len(clip_tokenizer)), tmp_path / "siglip.pt")
    rest = plain_file(dinotxt_rest(len(clip_tokenizer)), tmp_path / "rest.pth")
    for path, backbone, message in (
        (siglip, "clip", r"no visual.conv1.weight .* this is no ViT of CLIP. Check --backbone"),
        (clip, "siglip2", r"no attn_pool.latent; this is no SigLIP of timm"),
        (rest, "dinov3", r"needs the backbone's beside it: spar convert BACKBONE.pth TEXT_ENCODER.pth"),
    ):
        with pytest.raises(ValueError, match=message):
            convert([path], backbone, tmp_path / "out", Asked("gelu", "gelu", 3, 2), words)


# ---------------------------------------------------------------------------------- keys, one by one


def test_unused_and_missing_weights(clip_tokenizer, words, tmp_path):
    weights = open_clip_vit(len(clip_tokenizer))
    asked, out = Asked("gelu", **HEADS), tmp_path / "out"
    extra = plain_file({**weights, "visual.extra": torch.ones(3), "attn_mask": torch.ones(2, 2)}, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"1 weights of the source are unused: visual.extra. .*--allow NAME accepts"):
        convert([extra], "clip", out, asked, words)
    report = convert([extra], "clip", out, asked, words, allow=["visual.ex*"])
    assert report.allowed == ["visual.extra"] and report.left_out == {"attn_mask": "the causal mask"}
    assert report.used["vision_model.encoder.layers.0.self_attn.v_proj.bias"] == [
        "visual.transformer.resblocks.0.attn.in_proj_bias"
    ]
    written = json.loads((out / "conversion.json").read_text())
    assert written["used"] == report.used and written["comparisons"][0]["max_difference"] < 1e-4

    lacking = {
        name: weight for name, weight in weights.items() if "visual.transformer.resblocks.1.mlp.c_fc" not in name
    }
    path = plain_file(lacking, tmp_path / "b.pt")
    with pytest.raises(ValueError, match=r"2 weights of the source are missing: visual.transformer.resblocks.1.mlp"):
        convert([path], "clip", tmp_path / "b", asked, words)
    with pytest.raises(ValueError, match=r"nothing in the source gives vision_model.*; a weight is not made up"):
        convert([path], "clip", tmp_path / "b", asked, words, allow=["*"])
    del weights["logit_scale"]
    path = plain_file(weights, tmp_path / "c.pt")
    report = convert([path], "clip", tmp_path / "c", asked, words, allow=["logit_scale"])
    assert report.allowed == ["logit_scale"]


def test_a_disagreement_is_found_and_nothing_kept(clip_tokenizer, words, tmp_path, monkeypatch):
    """The check after writing is a check: a conversion that swaps two weights does not pass."""
    from spar_hf.conversion import layouts

    path = plain_file(open_clip_vit(len(clip_tokenizer)), tmp_path / "clip.pt")
    monkeypatch.setattr(layouts, "third", lambda index: lambda weight: weight.chunk(3)[2 - index])
    with pytest.raises(ValueError, match=r"does not agree with the source: image features at 64 x 64 differ by up to"):
        convert([path], "clip", tmp_path / "out", Asked("gelu", **HEADS), words)
    assert list(tmp_path.iterdir()) == [path]


# -------------------------------------------------------------------------------------------- reading


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_files_that_cannot_be_read_safely(tmp_path):
    bad = tmp_path / "bad.pt"
    torch.save({"state_dict": {"w": torch.ones(1)}, "hyper": Harmful()}, bad)
    with pytest.raises(ValueError, match=r"more than tensors and cannot be read safely.*state_dict\(\), NEW"):
        read_source([bad])
    bad.write_bytes(pickle.dumps(Harmful()))
    with pytest.raises(ValueError, match=r"cannot be read safely|no checkpoint of PyTorch"):
        read_source([bad])
    script = tmp_path / "ViT-B-16.pt"
    torch.jit.script(nn.Linear(2, 2)).save(str(script))
    with pytest.raises(ValueError, match=r"TorchScript archive.*holds a program.*openai/clip-vit-base-patch16"):
        read_source([script])
    bad.write_bytes(b"no checkpoint at all")
    with pytest.raises(ValueError, match=r"no checkpoint of PyTorch|cannot be read safely"):
        read_source([bad])
    (tmp_path / "x.safetensors").write_bytes(b"nor this")
    with pytest.raises(ValueError, match="it is no file of safetensors"):
        read_source([tmp_path / "x.safetensors"])
    torch.save([1, 2], bad)
    with pytest.raises(ValueError, match="holds no named weights"):
        read_source([bad])
    with pytest.raises(ValueError, match="there is no file"):
        read_source([tmp_path / "absent.pt"])
    with pytest.raises(ValueError, match=r"holds none of open_clip_model.safetensors"):
        read_source([tmp_path])


def test_clips_tokenizer_from_the_file_of_merges(tmp_path):
    """The file's layout: a line of heading, then merges; ids are bytes, bytes that end a word, merges, two marks."""
    letters = [chr(n) for n in (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))]
    merges = [("c", "a"), ("ca", "t</w>"), ("d", "o")]
    filler = [(first, second) for first in letters for second in letters if (first, second) not in merges]
    filler += [(first + second, third) for first, second in filler[:200] for third in letters]
    lines = ["#version: 0.2", *(" ".join(pair) for pair in (merges + filler)[:48894]), "past the end"]
    path = tmp_path / "bpe_simple_vocab_16e6.txt.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    tokenizer = clip_tokenizer(path)
    assert len(tokenizer) == 49408 and tokenizer("Cat do")["input_ids"] == [49406, 513, 67, 334, 49407]
    assert tokenizer.convert_ids_to_tokens([0, 255, 256, 512, 513, 514]) == ["!", "Ń", "!</w>", "ca", "cat</w>", "do"]


# --------------------------------------------------------------------------------------- command line


def test_command(clip_tokenizer, words, tmp_path, capsys):
    path = lightning(timm_siglip(len(clip_tokenizer)), tmp_path / "spar.ckpt")
    line = ["convert", str(path), "--backbone", "siglip2", "--output", str(tmp_path / "out"), "--activation", "gelu",
            "--text-activation", "gelu_pytorch_tanh", "--heads", "3", "--text-heads", "2",
            "--tokenizer", words]  # fmt: skip
    assert main(line) == 0
    printed = capsys.readouterr().out
    for text in ("spar.ckpt (SHA-256 ", "SigLIP with timm's trunk, 3 x 48, patch 16", "visual.trunk.attn_pool.kv.bias",
                 "unused or missing: none", "image features at 64 x 64", "text features", "wrote "):  # fmt: skip
        assert text in printed
    assert main(line) == 2
    assert "out is there already; give a folder that is new or empty" in capsys.readouterr().err
    for change, message in (
        (
            ["--backbone", "sigclip"],
            "there is no backbone 'sigclip'; choose one of clip, metaclip2, siglip2, eva, dinov3, radio, anyup.",
        ),
        (["--activation", "relu"], "there is no activation 'relu'"),
        (["--heads", "0"], "give a whole number, at least 1"),
    ):
        assert main([*line, *change]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1


# -------------------------------------------------------------------------------------- faults of files


@pytest.mark.parametrize(
    "content",
    [b"readme: this is no checkpoint\n", b"A" * 100 + b"PK\x05\x06" + b"\xff" * 18, b"", b"\x80\x02.", b"\0" * 64],
)
def test_files_that_are_no_checkpoint(content, tmp_path, capsys):
    path = tmp_path / "text.pt"
    path.write_bytes(content)
    line = ["convert", str(path), "--backbone", "clip", "--activation", "gelu", "--output", str(tmp_path / "out")]
    assert main(line) == 2
    error = capsys.readouterr().err
    assert "text.pt is no checkpoint of PyTorch, or a damaged one" in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [path]


def test_numbers_that_are_none(clip_tokenizer, words, tmp_path):
    weights = open_clip_vit(len(clip_tokenizer))
    weights["visual.ln_post.weight"] = weights["visual.ln_post.weight"] * float("nan")
    path = plain_file(weights, tmp_path / "nan.pt")
    with pytest.raises(ValueError, match=r"nan.pt cannot be used: visual.ln_post.weight holds NaN or infinity in flo"):
        convert([path], "clip", tmp_path / "out", Asked("gelu", **HEADS), words)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"{", "it is no JSON in UTF-8"),
        (b"[]", "it holds a list"),
        (b'{"model_cfg": 7}', "model_cfg must be an object"),
    ],
)
def test_an_open_clip_folder_with_a_broken_configuration(content, says, clip_tokenizer, tmp_path):
    save_file(open_clip_vit(len(clip_tokenizer)), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=rf"open_clip_config.json cannot be used: {says}"):
        read_source([tmp_path])


def test_a_full_disk_and_a_killed_run_leave_nothing(clip_tokenizer, words, tmp_path):
    """A limit on the size of a file stands for the disk; `.out.1.tmp` would be that of a process that runs."""
    path = plain_file(open_clip_vit(len(clip_tokenizer)), tmp_path / "clip.pt")
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True, check=True
    )
    killed = tmp_path / f".out.{gone.stdout.strip()}.tmp"
    killed.mkdir()
    (killed / "model.safetensors").write_bytes(b"half")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(
            OSError, match=r"disk full while writing .*out. What was written before is intact; free som"
        ):
            convert([path], "clip", tmp_path / "out", Asked("gelu", **HEADS), words)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == [path]
    convert([path], "clip", tmp_path / "out", Asked("gelu", **HEADS), words)
    assert {item.name for item in tmp_path.iterdir()} == {"clip.pt", "out"}
