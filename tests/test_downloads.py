"""Checkpoints from a Hub on loopback: what is downloaded, what an interruption leaves, what cannot be had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hub_server import HubServer, hub_for
from huggingface_hub import constants

import spar_hf
from spar_hf.checkpoints import load_tower
from spar_hf.downloads import fetch, revision_of
from spar_hf.families import make_processor


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with hub_for(monkeypatch, tmp_path / "home") as server:
        yield server


@pytest.fixture(scope="module")
def folder(make_spar, clip_tokenizer, tmp_path_factory) -> Path:
    home = tmp_path_factory.mktemp("spar")
    model = make_spar(num_hidden_layers=2)
    model.save_pretrained(home)
    make_processor(model.config, clip_tokenizer).save_pretrained(home)
    return home


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def same(model: torch.nn.Module, folder: Path) -> None:
    expected, _ = spar_hf.load(folder)
    for name, weight in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], weight, atol=0, rtol=0)


def downloaded(hub: HubServer) -> set[str]:
    return {line.rpartition("/")[2] for line in hub.requests if "/resolve/" in line}


def test_what_is_needed_is_downloaded_once(hub, folder):
    hub.put("you/spar", {**files_of(folder), "pytorch_model.bin": b"large", "picture.png": b"x", "model.onnx": b"x"})
    model, processor = spar_hf.load("you/spar")
    same(model, folder)
    assert downloaded(hub) == {
        "config.json", "model.safetensors", "processor_config.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip
    assert processor.tokenizer("sky")["input_ids"]
    hub.requests.clear()
    spar_hf.load("you/spar")
    assert not [line for line in hub.requests if line.startswith("GET") and "/resolve/" in line]
    revision = hub.repository("you/spar").refs["main"]
    assert revision_of(fetch("you/spar")) == revision and revision_of(folder) is None
    model, vision, _ = load_tower("you/spar", revision=revision)
    same(model, folder)
    assert model.config._commit_hash == vision.config._commit_hash == revision  # the record of a teacher has it


def test_pickled_weights_where_there_are_no_others(hub, folder, make_clip, clip_tokenizer, tmp_path):
    make_clip(num_hidden_layers=2).save_pretrained(tmp_path / "clip")
    clip_tokenizer.save_pretrained(tmp_path / "clip")
    files = files_of(tmp_path / "clip")
    del files["model.safetensors"]
    torch.save(make_clip(num_hidden_layers=2).state_dict(), tmp_path / "weights.bin")
    hub.put("you/clip", {**files, "pytorch_model.bin": (tmp_path / "weights.bin").read_bytes()})
    same(spar_hf.load("you/clip")[0], tmp_path / "clip")


def test_shards_and_an_index_that_leads_elsewhere(hub, folder, make_spar, tmp_path):
    make_spar(num_hidden_layers=2).save_pretrained(tmp_path / "sharded", max_shard_size="100KB")
    files = {name: content for name, content in files_of(folder).items() if name != "model.safetensors"}
    files |= files_of(tmp_path / "sharded")
    hub.put("you/sharded", files)
    same(spar_hf.load("you/sharded")[0], folder)
    index = json.loads(files["model.safetensors.index.json"])
    index["weight_map"]["logit_scale"] = "../../outside.safetensors"
    hub.put("you/evil", {**files, "model.safetensors.index.json": json.dumps(index).encode()})
    with pytest.raises(ValueError, match=r"it lists '../../outside.safetensors', which lies outside the model's fold"):
        spar_hf.load("you/evil")


@pytest.mark.parametrize("how", ["dropped", "short", "config"])
def test_an_interrupted_download_goes_on(how, hub, folder, monkeypatch):
    """The connection breaks before, or in the middle of, a file; the second try finds nothing to trip over."""
    import hub_server

    hub.put("you/spar", files_of(folder))
    broken = []
    if how == "short":
        honest = hub_server._Handler.lfs_get

        def lfs_get(self, oid):
            if not broken or self.hub.objects[oid] is None:
                content = self.hub.objects[oid]
                broken.append(oid)
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.send_header("ETag", f'"{oid}"')
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
                return
            honest(self, oid)

        monkeypatch.setattr(hub.server.RequestHandlerClass, "lfs_get", lfs_get, raising=False)
    else:
        part = "/lfs/" if how == "dropped" else "tokenizer.json"
        hub.faults = lambda method, path: 500 if part in path and method == "GET" else False
    try:
        spar_hf.load("you/spar")
    except OSError as error:
        assert str(error).startswith("cannot download you/spar: ") and str(error).isprintable()
        assert str(error).endswith("run the same command again, which goes on where this one stopped.")
    else:
        assert broken  # the client tried again by itself
    hub.faults = lambda method, path: False
    same(spar_hf.load("you/spar")[0], folder)


def test_what_cannot_be_had(hub, folder, monkeypatch):
    with pytest.raises(OSError, match=r"cannot download you/nothing: the Hub has no such model, or it is private; ch"):
        spar_hf.load("you/nothing")
    with pytest.raises(OSError, match=r"cannot download you/sp ar: that is no id of the Hub"):
        spar_hf.load("you/sp ar")
    hub.put("you/spar", files_of(folder))
    with pytest.raises(OSError, match=r"cannot download you/spar: it has no revision 'v9'; leave it out"):
        spar_hf.load("you/spar", revision="v9")
    spar_hf.load("you/spar")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    same(spar_hf.load("you/spar")[0], folder)
    with pytest.raises(OSError, match=r"cannot download you/other: it is not whole in the cache and the Hub cannot"):
        spar_hf.load("you/other")
    snapshot = fetch("you/spar")
    (snapshot / "model.safetensors").unlink()  # as after an interruption
    with pytest.raises(OSError, match=r"cannot download you/spar: it is not whole in the cache and the Hub cannot"):
        spar_hf.load("you/spar")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    same(spar_hf.load("you/spar")[0], folder)
