"""Conversion of NVIDIA's C-RADIO: every form of its files with random weights, against what shares nothing with it."""

from __future__ import annotations

import argparse
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import randomise
from families import RADIO_TRUNK, SIGLIP_VISION, TEXT
from plain_families import plain_radio
from safetensors.torch import save_file
from source_layouts import RADIO_TEACHERS, on_the_hub, radio_heads, radio_trunk
from transformers import CLIPModel, RadioConfig, RadioModel, SiglipConfig, SiglipModel

import spar_hf
from spar_cli.main import main
from spar_hf.conversion import convert
from spar_hf.conversion.layouts import Asked

SIZES = ((64, 64), (96, 96), (64, 112), (90, 75))
CLOSE = {"atol": 5e-5, "rtol": 0}
ARGS = {"teachers": RADIO_TEACHERS, "cls_token_per_teacher": True, "dtype": torch.bfloat16, "spectral_reparam": False}


def pixels_of(size_hw):
    return torch.randn(1, 3, *size_hw, generator=torch.Generator().manual_seed(sum(size_hw)))


@pytest.fixture(scope="module")
def texts(make_clip, clip_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """The teachers' own checkpoints, of 24 numbers, with their tokenizer: SigLIP as safetensors, CLIP pickled."""
    special = {name: getattr(clip_tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    text = {**TEXT, **special, "vocab_size": len(clip_tokenizer), "projection_size": 24}
    siglip = SiglipModel(SiglipConfig(text_config=text, vision_config=SIGLIP_VISION)).eval()
    randomise(siglip, seed=8)
    folders = {"siglip2-g": tmp_path_factory.mktemp("siglip2-g"), "clip": tmp_path_factory.mktemp("clip")}
    siglip.save_pretrained(folders["siglip2-g"], max_shard_size="100KB")
    clip = make_clip(num_hidden_layers=3)
    clip.save_pretrained(folders["clip"])
    (folders["clip"] / "model.safetensors").unlink()
    old_index = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    torch.save({**clip.state_dict(), **old_index}, folders["clip"] / "pytorch_model.bin")
    for folder in folders.values():
        clip_tokenizer.save_pretrained(folder)
    return folders


def half_file(folder: Path, **changes) -> Path:
    """NVIDIA's `*_half.pth.tar`: weights beside the arguments of their training."""
    folder.mkdir(exist_ok=True)
    content = {"arch": "vit", "epoch": 9, "args": argparse.Namespace(**ARGS)}
    content |= {"state_dict": {**radio_trunk(), **radio_heads()}, **changes}
    torch.save(content, folder / "c-radio_half.pth.tar")
    return folder / "c-radio_half.pth.tar"


def averaged_file(folder: Path) -> Path:
    """With the averaged weights, which are the ones to take, and the heads under the teachers' numbers."""
    weights = {**radio_trunk(), **radio_heads(("0", "1", "2"))}
    return half_file(folder, state_dict={"base_model.x": torch.zeros(1)}, state_dict_ema=weights)


def spectral_file(folder: Path) -> Path:
    args = {**ARGS, "spectral_reparam": {"eps": 1e-12}}
    return half_file(folder, state_dict={**radio_trunk(True), **radio_heads()}, args=argparse.Namespace(**args))


def hub_folder(folder: Path, heads: bool = True) -> Path:
    """As `save_pretrained` of NVIDIA's code leaves it."""
    folder.mkdir(exist_ok=True)
    save_file(on_the_hub({**radio_trunk(), **(radio_heads() if heads else {})}), folder / "model.safetensors")
    config = {"args": {**ARGS, "dtype": "bfloat16"}, "architectures": ["RADIOModel"], "adaptor_names": None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize(
    ("write", "adaptor"),
    [
        (half_file, "siglip2-g"),
        (half_file, "clip"),
        (averaged_file, "clip"),
        (spectral_file, "siglip2-g"),
        (hub_folder, "siglip2-g"),
    ],
)
@torch.no_grad()
def test_every_form_of_nvidias_files(write, adaptor, texts, clip_tokenizer, tmp_path):
    path = write(tmp_path / "source")
    asked = Asked(heads=3, adaptor=adaptor)
    report = convert([path], "radio", tmp_path / "out", asked, text=str(texts[adaptor]))
    assert all(check.agrees for check in report.comparisons) and len(report.comparisons) == 5 and not report.allowed
    assert report.left_out["_heads.dino_v2.fc1.weight" if write != averaged_file else "_heads.1.fc1.weight"]
    model, processor = spar_hf.load(tmp_path / "out")
    vision = model.config.vision_config
    found = (vision.num_cls_tokens, vision.num_registers, vision.class_token, list(vision.summary_idxs))
    assert found == (3, 2, {"clip": 0, "siglip2-g": 2}[adaptor], [0, 2])
    assert (vision.adaptor, vision.max_img_size, vision.image_size, vision.projection_dim) == (adaptor, 96, 512, 24)
    assert int(48 * vision.mlp_ratio) == 81 and "NVIDIA Open Model License" in vision.source
    weights = {name: weight.double().numpy() for name, weight in model.vision_model.state_dict().items()}
    for size_hw in SIZES:
        pixels = pixels_of(size_hw)
        expected = plain_radio(weights, pixels[0].double().numpy(), 16, 3, 3, 5)
        features = model.vision_model(pixels).patch_embeds[0]
        torch.testing.assert_close(features, torch.from_numpy(expected).float(), **CLOSE)
    teacher = {"clip": CLIPModel, "siglip2-g": SiglipModel}[adaptor].from_pretrained(texts[adaptor]).eval()
    ids = processor(text=["a dog", "the sky"])
    words = teacher.get_text_features(**ids).pooler_output
    torch.testing.assert_close(model.get_text_features(**ids).pooler_output, words, **CLOSE)
    torch.testing.assert_close(model.logit_scale, teacher.logit_scale.reshape(()))
    assert (processor.max_length, processor.strip_punctuation) == {"clip": (None, False), "siglip2-g": (64, True)}[
        adaptor
    ]


@torch.no_grad()
def test_the_trunk_alone_is_what_transformers_reads(tmp_path):
    """`RadioModel` renames NVIDIA's names by itself; the converted trunk gives the same."""
    folder = hub_folder(tmp_path / "source", heads=False)
    report = convert([folder], "radio", tmp_path / "out", Asked(heads=3, adaptor="none"))
    assert len(report.comparisons) == 4 and report.text == {}
    tower = spar_hf.SparRadioVisionModel.from_pretrained(tmp_path / "out")
    config = RadioConfig(**{**RADIO_TRUNK, "mlp_ratio": 81 / 48})
    stock = RadioModel.from_pretrained(folder, config=config).eval()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (tower.config.image_mean, tower.config.image_std))
    for size_hw in SIZES[:3]:
        pixels = pixels_of(size_hw)
        found, expected = tower(pixels), stock(pixels * std + mean)
        torch.testing.assert_close(found.patch_embeds.flatten(1, 2), expected.features, **CLOSE)
        torch.testing.assert_close(found.pooler_output, expected.summary, **CLOSE)


def test_spectral_norms_are_multiplied_out(texts, tmp_path):
    """The first part's third singular value onwards keep their ratio, and the largest becomes what the scale says."""
    path = spectral_file(tmp_path / "source")
    convert([path], "radio", tmp_path / "out", Asked(heads=3, adaptor="none"))
    state = spar_hf.SparRadioVisionModel.from_pretrained(tmp_path / "out").state_dict()
    original = radio_trunk()

    def largest(matrix):
        return float(np.linalg.svd(matrix.double().numpy(), compute_uv=False)[0])

    for block in range(3):
        for index, name in enumerate("qkv"):
            ours = state[f"encoder.layer.{block}.attention.{name}_proj.weight"]
            theirs = original[f"base_model.blocks.{block}.attn.qkv.weight"].chunk(3)[index]
            plain = block == 2 and name == "v"
            wanted = largest(theirs) if plain else math.log1p(math.exp(1.5 + index)) + 0.05
            assert largest(ours) == pytest.approx(wanted, rel=1e-5)
            torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), atol=1e-6, rtol=0)
        scale = {0: 1.5, 1: math.log1p(math.exp(1.5)) + 0.05}.get(block, 1.5)
        assert largest(state[f"encoder.layer.{block}.mlp.fc1.weight"]) == pytest.approx(scale, rel=1e-5)


def test_one_class_token_for_all_teachers(texts, tmp_path):
    path = half_file(tmp_path / "source", args=argparse.Namespace(**{**ARGS, "cls_token_per_teacher": False}))
    convert([path], "radio", tmp_path / "out", Asked(heads=3, adaptor="clip"), text=str(texts["clip"]))
    vision = spar_hf.load(tmp_path / "out")[0].config.vision_config
    found = (vision.num_cls_tokens, vision.num_registers, vision.class_token, list(vision.summary_idxs))
    assert found == (1, 4, 0, [0])


class NotPlain:
    pass


def test_what_is_wrong_is_said_in_one_line(texts, tmp_path, clip_tokenizer):
    siglip, clip = str(texts["siglip2-g"]), str(texts["clip"])
    whole = half_file(tmp_path / "whole")
    trunk = hub_folder(tmp_path / "trunk", heads=False)
    bare = tmp_path / "bare.pth"
    torch.save({**radio_trunk(), **radio_heads()}, bare)
    torn = tmp_path / "torn_half.pth.tar"
    torn.write_bytes(whole.read_bytes()[:30_000])
    half = {name: weight for name, weight in radio_trunk().items() if ".blocks.1.mlp" not in name}
    partial = half_file(tmp_path / "partial", state_dict={**half, **radio_heads()})
    calling = half_file(tmp_path / "calling", args=NotPlain())
    strange = half_file(tmp_path / "strange", state_dict={**radio_trunk(), **radio_heads(), "x.y": torch.zeros(2)})
    normal = {"_feature_normalizer.mean": torch.zeros(48)}
    normalised = half_file(tmp_path / "normal", state_dict={**radio_trunk(), **radio_heads(), **normal})
    first_kind = {"_heads.clip.fc1.weight": torch.zeros(40, 48), "_heads.clip.fc2.weight": torch.zeros(24, 40)}
    older = half_file(tmp_path / "older", state_dict={**radio_trunk(), **first_kind})
    wide = tmp_path / "wide"
    shutil.copytree(siglip, wide)
    config = json.loads((wide / "config.json").read_text())
    (wide / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    cases = [
        (whole, None, siglip, r"--adaptor is not given; the teachers with words are clip, siglip2-g, and none"),
        (
            whole,
            "siglip",
            siglip,
            r"no adaptor 'siglip'; choose one of clip, siglip2-g, none. Did you",
        ),
        (whole, "dino_v2", siglip, r"teacher 'dino_v2' reads no words; those that do are clip, siglip2-g. Give"),
        (
            trunk,
            "clip",
            clip,
            r"has no head of 'clip' \(the Hub's .* trunk alone\). Give NVIDIA's \*_half.pth",
        ),
        (
            older,
            "clip",
            clip,
            r"head of 'clip' has no _heads.clip.final.2; it is of a kind that C-RADIOv3",
        ),
        (
            bare,
            "clip",
            clip,
            r"bare.pth does not name its teachers, and they tell class .* Give NVIDIA's",
        ),
        (
            whole,
            "clip",
            None,
            r"text tower of 'clip' \(ViT-H-14-378-quickgelu, dfn5b\) is in no file .* give --te",
        ),
        (whole, "clip", str(wide), r"wide is a checkpoint of type 'bert'; the text tower must be that of a CLIP"),
        (torn, "clip", clip, r"torn_half.pth.tar is no checkpoint of PyTorch, or a damaged one"),
        (partial, "clip", clip, r"weights of the source are missing: base_model.blocks.1.mlp"),
        (calling, "clip", clip, r"holds more than tensors and cannot be read safely \(it calls .*NotPlain\)"),
        (strange, "clip", clip, r"1 weights of the source are unused: x.y. Check --backbone; --allow"),
        (normalised, "clip", clip, r"its features are normalised \(_feature_normalizer\), which RadioModel can"),
    ]
    for path, adaptor, text, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            convert([path], "radio", tmp_path / "out", Asked(heads=3, adaptor=adaptor), text=text)
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()
    with pytest.raises(
        OSError, match=r"'siglip2-g' \(siglip2-g-384\) cannot be read. Give --text: .*siglip2-giant-opt-pa"
    ):
        convert([whole], "radio", tmp_path / "out", Asked(heads=3, adaptor="siglip2-g"))
    with pytest.raises(ValueError, match=r"--text and --adaptor are RADIO's; with --backbone clip leave them out"):
        convert([whole], "clip", tmp_path / "out", Asked(adaptor="clip"))
    with pytest.raises(ValueError, match=r"no patch_generator.embedder; this is no C-RADIO of NVI"):
        convert(
            [half_file(tmp_path / "other", state_dict=radio_heads())], "radio", tmp_path / "out", Asked(adaptor="none")
        )
    with pytest.raises(ValueError, match=r"trunk is a folder of NVIDIA's own; spar convert .* --backbone radio"):
        spar_hf.load(trunk)


def test_the_command(texts, tmp_path, capsys):
    path = half_file(tmp_path / "source")
    line = ["convert", str(path), "--backbone", "radio", "--adaptor", "clip", "--text", str(texts["clip"])]
    line += ["--heads", "3", "--output", str(tmp_path / "out")]
    assert main(line) == 0
    printed = capsys.readouterr().out
    for text in ("c-radio_half.pth.tar (SHA-256 ", "head of clip; NVIDIA Open Model License", "_heads.clip.final.2",
                 "the head of another teacher", "text features", "unused or missing: none"):  # fmt: skip
        assert text in printed
    assert main([*line[:4], "--output", str(tmp_path / "x")]) == 2
    assert "--adaptor is not given" in capsys.readouterr().err
