"""Checkpoints that are broken, or meant to do harm: one line that names the file, and no code of theirs runs."""

from __future__ import annotations

import ast
import json
import os
import pickle
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from broken_folders import break_folder, loads_or_says
from conftest import randomise
from families import spar_dinov3, spar_siglip
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import ViTConfig, ViTModel

import spar_hf
from spar_cli.main import main
from spar_hf.checkpoints import load_tower
from spar_hf.families import make_processor
from spar_hf.networks.loading import load_network

PACKAGE = Path(spar_hf.__file__).parent


@pytest.fixture(scope="module")
def bases(make_spar, make_clip, clip_tokenizer, tmp_path_factory) -> dict[str, Path]:
    """Whole folders of every layout, by name."""
    home = tmp_path_factory.mktemp("whole")
    model = make_spar(num_hidden_layers=2)
    for name, options in {"spar": {}, "sharded": {"max_shard_size": "100KB"}}.items():
        model.save_pretrained(home / name, **options)
        make_processor(model.config, clip_tokenizer).save_pretrained(home / name)
    clip = make_clip(num_hidden_layers=2)
    clip.save_pretrained(home / "clip")
    clip_tokenizer.save_pretrained(home / "clip")
    for name in ("pickled", "pickled-shards"):
        shutil.copytree(home / "clip", home / name, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.save(clip.state_dict(), home / "pickled" / "pytorch_model.bin")
    names = sorted(clip.state_dict())
    parts = {"pytorch_model-00001-of-00002.bin": names[:40], "pytorch_model-00002-of-00002.bin": names[40:]}
    for file, kept in parts.items():
        torch.save({name: clip.state_dict()[name] for name in kept}, home / "pickled-shards" / file)
    index = {"metadata": {}, "weight_map": {name: file for file, kept in parts.items() for name in kept}}
    (home / "pickled-shards" / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    for name, other in {
        "siglip": spar_siglip(clip_tokenizer, home / "stock"),
        "dinov3": spar_dinov3(clip_tokenizer),
    }.items():
        other.save_pretrained(home / name)
        make_processor(other.config, clip_tokenizer).save_pretrained(home / name)
    return {path.name: path for path in home.iterdir() if path.name != "stock"}


@pytest.fixture
def copy(bases, tmp_path) -> Callable[[str], Path]:
    """`copy("spar")`: a folder of the test's own."""
    return lambda name: shutil.copytree(bases[name], tmp_path / name)


def change(path: Path, *where: str, to: object) -> None:
    """Sets a field of a JSON file, or with `...` removes it."""
    content = holder = json.loads(path.read_text())
    for step in where[:-1]:
        holder = holder[step]
    if to is ...:
        del holder[where[-1]]
    else:
        holder[where[-1]] = to
    path.write_text(json.dumps(content))


def change_weight(folder: Path, name: str, changed: Callable[[torch.Tensor], torch.Tensor]) -> None:
    weights = load_file(folder / "model.safetensors")
    weights[name] = changed(weights[name])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def refused(folder: Path, load: Callable = spar_hf.load) -> str:
    """The one line with which a folder is refused."""
    with pytest.raises((ValueError, OSError)) as caught:
        load(folder)
    message = str(caught.value)
    assert message.isprintable() and str(folder) in message, repr(message)
    return message


# ------------------------------------------------------------------------------------------ broken files


@pytest.mark.parametrize("name", ["spar", "sharded", "clip", "pickled", "pickled-shards", "siglip", "dinov3"])
def test_whole_folders_load(name, bases):
    assert loads_or_says(bases[name]) is None


FIELDS = [  # file, field, value, what the line says
    ("tokenizer.json", ("added_tokens", 0, "id"), ["x"], "tokenizer.json cannot be used: it is no file of tokenizers"),
    ("processor_config.json", ("image_processor", "image_std"), [{}, 1, 1], "processor_config.json.*wrong kind"),
    ("processor_config.json", ("image_processor",), "gelu_new", "image_processor is 'gelu_new' and must be an object"),
    ("processor_config.json", ("image_processor", "image_mean"), [float("nan")] * 3, "it holds NaN, which is no num"),
    ("processor_config.json", ("image_processor", "image_std"), [0.5, 0.5, 0], r"image_std \[0.5, 0.5, 0.0\]; each"),
    ("processor_config.json", ("text_padding",), "long", "text_padding is 'long'; allowed are 'longest' and"),
    ("processor_config.json", ("templates",), 7, "processor_config.json cannot be used"),
    ("tokenizer_config.json", ("pad_token",), [1], "tokenizer_config.json cannot be used"),
    ("tokenizer_config.json", ("eos_token",), "naclip", "tokenizer_config.json.*token 6.. and the model's vocabulary"),
    ("tokenizer_config.json", ("model_max_length",), "many", "tokenizer_config.json with processor_config.json"),
    ("config.json", ("text_config", "intermediate_size"), None, "config.json.*'intermediate_size' expected int"),
    ("config.json", ("text_config", "eos_token_id"), 5, "its texts lack token 5, with which the model's end"),
    ("config.json", ("vision_config", "image_std"), [1e999, 1, 1], "config.json cannot be used: it holds Infinity"),
    ("config.json", ("vision_config", "image_size"), 10**9, "a network of .* numbers, and the files hold"),
    ("config.json", ("vision_config", "num_hidden_layers"), 10**9, "and there are .* weights in all"),
    ("config.json", ("vision_config", "num_attention_heads"), -1, "num_attention_heads is -1 and there are"),
    ("config.json", ("text_config", "max_position_embeddings"), 10**12, "a network of 3.3e"),
    ("config.json", ("vision_config", "hidden_size"), 51, "config.json"),
    ("config.json", ("num_labels",), 10**9, "num_labels is 1000000000, and transformers would list them"),
    ("config.json", ("vision_config", "size_rule"), "crop", "size_rule is 'crop'; choose one of 'floor'"),
    ("config.json", ("dtype",), "float23", "config.json cannot be used"),
    ("config.json", ("model_type",), "bert", "checkpoint of type 'bert'; those that can be loaded"),
    ("config.json", ("model_type",), ["bert"], "checkpoint of type .*; those that can be loaded"),
    ("config.json", ("quantization_config",), {"quant_method": "fp8"}, "quantized with 'fp8'; torchao and bitsandb"),
    ("config.json", ("quantization_config",), "int8", "it is quantized with None"),
    ("config.json", ("_attn_implementation",), "kernels-community/flash-attn", "may ask for 'eager' or 'sdpa'"),
    ("config.json", ("text_config", "attn_implementation"), "flash_attention_2", "may ask for 'eager' or 'sdpa'"),
    ("config.json", ("transformers_weights",), "../x.safetensors", "transformers_weights would have other files"),
]  # fmt: skip


@pytest.mark.parametrize(("file", "where", "value", "says"), FIELDS, ids=lambda value: str(value)[:40])
def test_a_field_that_is_wrong(file, where, value, says, copy):
    folder = copy("spar")
    change(folder / file, *where, to=value)
    line = refused(folder)
    assert re.search(says, line) and file in line, line


BYTES = [
    ("config.json", b"[]", "it holds a list where an object"),
    ("config.json", b"", r"it is no JSON in UTF-8 \(Expecting value"),
    ("config.json", b"\xff\xfe{}", "it is no JSON in UTF-8 .*decode byte 0xff"),
    ("config.json", b"{" * 100_000, "it is no JSON in UTF-8"),
    ("config.json", b'{"a": ' * 100_000, "it is no JSON in UTF-8"),
    ("tokenizer.json", b"<!DOCTYPE html>", "it is no JSON in UTF-8"),
    ("tokenizer_config.json", b"{}", "tokenizer"),
    ("model.safetensors", b"", "it is no file of safetensors"),
    ("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n", "it is no file of safetensors"),
    ("model.safetensors", b"\xff" * 3000, r"it is no file of safetensors \(.*header too large"),
]


@pytest.mark.parametrize(("file", "content", "says"), BYTES, ids=lambda value: str(value)[:30])
def test_a_file_that_is_something_else(file, content, says, copy):
    folder = copy("spar")
    (folder / file).write_bytes(content)
    if content == b"{}":  # a tokenizer needs little of its configuration
        loads_or_says(folder)
        return
    line = refused(folder)
    assert re.search(says, line) and file in line, line


def test_weights_that_do_not_fit(copy):
    for changed, says in (
        (lambda weight: weight * float("nan"), "final_layer_norm.weight holds NaN or infinity in float32"),
        (lambda weight: weight.index_fill(0, torch.tensor([3]), float("-inf")), "holds NaN or infinity in float32"),
        (lambda weight: weight[:-1].clone(), r"final_layer_norm.weight is \(31,\) and by config.json must be \(32,\)"),
        (lambda weight: weight.to(torch.float8_e4m3fn), "model.safetensors"),
    ):
        folder = copy("spar")
        change_weight(folder, "text_model.final_layer_norm.weight", changed)
        if changed(torch.ones(32)).dtype == torch.float8_e4m3fn:
            loads_or_says(folder)
        else:
            line = refused(folder)
            assert re.search(says, line) and "model.safetensors" in line, line
        shutil.rmtree(folder)
    folder = copy("spar")
    change_weight(folder, "logit_scale", lambda weight: weight + 1000)
    assert "logit_scale is 1e+03, and scores would be multiplied by its exponential" in refused(folder)
    shutil.rmtree(folder)
    folder = copy("spar")
    change_weight(folder, "text_model.final_layer_norm.weight", lambda weight: weight * 1e6)
    spar_hf.load(folder)
    line = refused(folder, lambda folder: spar_hf.load(folder, dtype=torch.float16))
    assert "holds NaN or infinity in float16" in line


def test_files_that_are_not_there(copy):
    folder = copy("spar")
    for name, says in (
        ("tokenizer.json", "tokenizer"),
        ("tokenizer_config.json", "holds no tokenizer"),
        ("processor_config.json", "holds no tokenizer"),
        ("model.safetensors", "holds no weights (model.safetensors, pytorch_model.bin or their index)"),
        ("config.json", "holds no config.json"),
    ):
        (folder / name).unlink()
        assert says in refused(folder)
    folder = copy("clip")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").mkdir()
    assert "model.safetensors cannot be used: it is no ordinary file" in refused(folder)


def test_overrides_are_the_callers_mistakes(bases):
    for wrong, error, says in (
        ({"attention_reach": "far"}, ValueError, "attention_reach is 'far'; choose one of 'image', 'window'"),
        ({"stride_px": "x"}, ValueError, "stride_px"),
        ({"positon_interpolation": "size"}, TypeError, "positon_interpolation"),
    ):
        with pytest.raises(error, match=says) as caught:
            spar_hf.load(bases["spar"], **wrong)
        assert "cannot be used" not in str(caught.value)
    with pytest.raises(ValueError, match=r"no model 'tinny'; choose one of tiny, tiny-spar. Did you mean 'tiny'"):
        spar_hf.load("tinny")


# ----------------------------------------------------------------------------------- files of elsewhere


@pytest.mark.parametrize("name", ["../outside.safetensors", "/etc/passwd", "sub/x.safetensors", "x.bin", 7, None])
def test_an_index_stays_in_its_folder(name, copy):
    folder = copy("sharded")
    index = folder / "model.safetensors.index.json"
    shard = json.loads(index.read_text())["weight_map"]["logit_scale"]
    for outside in (folder.parent / "outside.safetensors", folder / "x.bin"):
        shutil.copy(folder / shard, outside)
    change(index, "weight_map", "logit_scale", to=name)
    line = refused(folder)
    lies = "lies outside the model's folder" if isinstance(name, str) and "/" in name else ".index.json cannot be used"
    assert lies in line


def test_an_index_that_promises_too_much(copy):
    folder = copy("sharded")
    index = folder / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    other = next(name for name in listed.values() if name != listed["logit_scale"])
    change(index, "weight_map", "logit_scale", to=other)
    assert f"{other} cannot be used: it lacks 'logit_scale', which model.safetensors.index.json" in refused(folder)
    change(index, "weight_map", to={})
    assert "its weight_map must give the file of each weight" in refused(folder)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "processor_config.json"])
def test_links_stay_in_their_folder(name, copy, tmp_path):
    folder = copy("spar")
    (folder / name).rename(tmp_path / "elsewhere")
    (folder / name).symlink_to(tmp_path / "elsewhere")
    assert f"{name} cannot be used: it is a link out of the model's folder. Put the file itself" in refused(folder)
    (folder / name).unlink()
    (tmp_path / "elsewhere").rename(folder / "inside")
    (folder / name).symlink_to("inside")
    (tmp_path / "link").symlink_to(folder)  # the folder itself may be one
    spar_hf.load(tmp_path / "link")


def test_links_of_the_hubs_cache(bases, tmp_path):
    home = tmp_path / "models--you--spar"
    snapshot = home / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    shutil.copytree(bases["spar"], home / "blobs")
    for path in (home / "blobs").iterdir():
        (snapshot / path.name).symlink_to(Path("../../blobs") / path.name)
    assert loads_or_says(snapshot) is None
    shutil.move(home / "blobs" / "config.json", tmp_path)
    assert "link out of the model's folder" in refused_link(snapshot, tmp_path / "config.json")


def refused_link(folder: Path, target: Path) -> str:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to(target)
    return refused(folder)


def test_states_that_lead_elsewhere(copy):
    folder = copy("spar")
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "other/model"}))
    assert "adapter_config.json cannot be used: it is part of an adapter" in refused(folder)
    (folder / "adapter_config.json").unlink()
    (folder / "shard-00000-model-00001-of-00001.safetensors").write_bytes(b"")
    assert "it is part of an adapter or of a distributed state. Merge it" in refused(folder)


# ------------------------------------------------------------------------------------------------ pickles


@pytest.mark.parametrize("name", ["pickled", "pickled-shards"])
def test_pickled_weights_load_and_are_saved_as_safetensors(name, bases, tmp_path, pixels):
    model, processor = spar_hf.load(bases[name])
    expected, _ = spar_hf.load(bases["clip"])
    with torch.no_grad():
        torch.testing.assert_close(
            model.vision_model(pixels("off_grid")).patch_embeds, expected.vision_model(pixels("off_grid")).patch_embeds
        )
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.bin")) and spar_hf.load(tmp_path)


class Harmful:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def test_harmful_and_damaged_pickles(copy):
    folder = copy("pickled")
    path = folder / "pytorch_model.bin"
    whole = path.read_bytes()
    torch.save({"logit_scale": torch.ones(1), "x": Harmful()}, path)
    assert "holds more than tensors and cannot be read safely (it calls exec)" in refused(folder)
    path.write_bytes(pickle.dumps(Harmful(), protocol=2))
    assert "pytorch_model.bin holds more than tensors" in refused(folder)
    for content in (b"", b"no checkpoint", whole[: len(whole) // 2], b"A" * 100 + b"PK\x05\x06" + b"\xff" * 18):
        path.write_bytes(content)
        assert "pytorch_model.bin is no checkpoint of PyTorch, or a damaged one" in refused(folder)
    torch.save([1, 2], path)
    assert "it holds other things than named weights" in refused(folder)
    torch.save({"a": np.ones(3)}, path)
    assert "cannot be read safely (it calls numpy." in refused(folder)


# --------------------------------------------------------------------------------------- code of theirs


def evil(folder: Path, marker: Path) -> None:
    (folder / "evil.py").write_text(f"open({str(marker)!r}, 'w')\n")


@pytest.fixture
def yes(monkeypatch) -> list[str]:
    """Somebody who answers yes to every question, and the questions."""
    asked: list[str] = []
    monkeypatch.setattr("builtins.input", lambda question="": asked.append(question) or "y")
    return asked


CODE = [
    ("config.json", ("model_type",), "evil_model", {"AutoConfig": "evil.C", "AutoModel": "evil.M"}),
    ("tokenizer_config.json", ("tokenizer_class",), "EvilTokenizer", {"AutoTokenizer": ["evil.T", "evil.T"]}),
    ("processor_config.json", ("processor_class",), "EvilProcessor", {"AutoProcessor": "evil.P"}),
    ("processor_config.json", ("image_processor", "image_processor_type"), "Evil", {"AutoImageProcessor": "evil.I"}),
]  # fmt: skip


@pytest.mark.parametrize(("file", "where", "name", "auto_map"), CODE, ids=lambda value: str(value)[:24])
def test_no_code_of_a_checkpoint_runs(file, where, name, auto_map, copy, tmp_path, yes, capsys):
    folder, marker = copy("spar"), tmp_path / "EXECUTED"
    evil(folder, marker)
    change(folder / file, *where, to=name)
    change(folder / file, *where[:-1], "auto_map", to=auto_map)
    picture = PACKAGE / "assets/pictures/five-things.png"
    line = ["segment", str(picture), "--labels", "car; sky", "--output", str(tmp_path / "out"), "--model"]
    status = main([*line, str(folder), "--short-side", "64"])
    error = capsys.readouterr().err
    # The class of a processor is ours whatever the file says; anything else is refused.
    assert status == 2 and error.count("\n") == 1 and file in error if name != "EvilProcessor" else status == 0
    assert "trust_remote_code" not in error
    assert not marker.exists() and not yes


def test_no_code_of_a_second_network_or_tokenizer_runs(copy, tmp_path, yes):
    from spar_hf.conversion.convert import load_tokenizer

    folder, marker = copy("spar"), tmp_path / "EXECUTED"
    evil(folder, marker)
    change(folder / "tokenizer_config.json", "tokenizer_class", to="EvilTokenizer")
    change(folder / "tokenizer_config.json", "auto_map", to={"AutoTokenizer": ["evil.T", "evil.T"]})
    with pytest.raises(ValueError, match=r"tokenizer_config.json cannot be used: it asks to run code of its own"):
        load_tokenizer(str(folder), 600)
    change(folder / "config.json", "model_type", to="evil_model")
    change(folder / "config.json", "auto_map", to={"AutoConfig": "evil.C", "AutoModel": "evil.M"})
    assert "config.json cannot be used: it asks to run code of its own" in refused(folder, load_network)
    assert "checkpoint of type 'evil_model'" in refused(folder, load_tower)
    assert "checkpoint of type 'evil_model'" in refused(folder, spar_hf.pipeline)
    assert not marker.exists() and not yes


def test_second_networks_are_read_with_the_same_care(tmp_path):
    network = ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8))
    randomise(network, 0)
    network.save_pretrained(tmp_path)
    torch.testing.assert_close(load_network(str(tmp_path)).state_dict(), network.state_dict())
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").unlink()
    torch.testing.assert_close(load_network(str(tmp_path)).state_dict(), network.state_dict())
    (tmp_path / "model.safetensors").write_bytes(whole)
    change_weight(tmp_path, "layernorm.weight", lambda weight: weight * float("nan"))
    assert "model.safetensors cannot be used: layernorm.weight holds NaN" in refused(tmp_path, load_network)
    change(tmp_path / "config.json", "hidden_size", to=17)
    assert "config.json" in refused(tmp_path, load_network)


def test_every_load_says_that_no_code_is_trusted():
    """`from_pretrained` is called in few places, each with `trust_remote_code=False`; what ships can't use ours."""
    calls = []
    for path in sorted([*PACKAGE.rglob("*.py"), *(PACKAGE.parent / "spar_cli").glob("*.py")]):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            if node.func.attr in ("from_pretrained", "snapshot_download", "hf_hub_download", "pipeline"):
                given = {word.arg: word.value for word in node.keywords}
                trusts = given.get("trust_remote_code")
                calls.append((path.name, node.func.attr, isinstance(trusts, ast.Constant) and trusts.value is False))
            if node.func.attr in ("load",) and ast.unparse(node.func) == "torch.load":
                calls.append((path.name, "torch.load", any(w.arg == "weights_only" for w in node.keywords)))
    # Those of a class of ours that only pass on what they were given, a single file that is read as JSON, and the two
    # models of diffusers, which knows code of others for whole pipelines alone.
    passed_on = {("anyup_spar.py", "from_pretrained"), ("encoder_spar.py", "from_pretrained")}
    others = {("publish.py", "hf_hub_download"), ("pipelines.py", "from_pretrained")}
    assert {call[:2] for call in calls if not call[2]} <= {*others, *passed_on}
    homes = {"checkpoint_files.py", "checkpoints.py", "loading.py", "pipelines.py", "pretrained.py", "publish.py"}
    assert {name for name, _, _ in calls if not name.endswith("_spar.py")} == homes


# --------------------------------------------------------------------------------------------- by chance


@pytest.mark.fuzz
@settings(max_examples=1500, deadline=None, database=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(seed=st.integers(0, 2**32 - 1))
def test_whatever_is_broken_is_named(seed, bases, tmp_path_factory):
    """`python -m pytest -m fuzz tests/test_broken_folders.py`"""
    names = sorted(bases)
    home = tmp_path_factory.mktemp("fuzz")
    try:
        folder = shutil.copytree(bases[names[seed % len(names)]], home / "model")
        print(seed, break_folder(folder, random.Random(seed)))
        loads_or_says(folder)
    finally:
        shutil.rmtree(home)


@pytest.mark.parametrize("seed", range(12))
def test_a_dozen_of_them(seed, bases, tmp_path):
    folder = shutil.copytree(bases[sorted(bases)[seed % len(bases)]], tmp_path / "model")
    break_folder(folder, random.Random(seed))
    loads_or_says(folder)


def test_what_cannot_be_opened(copy):
    folder = copy("spar")
    (folder / "config.json").chmod(0)
    if os.access(folder / "config.json", os.R_OK):
        pytest.skip("this user reads every file")
    assert "config.json" in refused(folder)
