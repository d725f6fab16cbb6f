"""Publishing to a Hub on loopback with the real client: what arrives, what loads from there, what never leaves."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from distillation_help import SIZES, save_network, save_pictures
from distillation_help import run as distill
from families import spar_dinov3, spar_radio, spar_siglip
from hub_server import hub_for
from huggingface_hub import ModelCard, constants
from PIL import Image
from safetensors.torch import load, load_file

from spar_cli.main import main
from spar_hf import SparModel
from spar_hf.families import make_processor
from spar_hf.hub.model_card import without_paths
from spar_hf.hub.publish import PublishError, prepare
from spar_onnx.folder import LAYOUT, RECORD

TEACHER = {
    "model": "openai/clip-vit-base-patch16", "weights": "0123", "revision": "abc", "method": "maskclip",
    "dtype": "float32", "window_px": 64, "stride_px": 24,
    "data": {"kind": "dataset", "name": "you/photos", "split": "train", "images": 25000},
    "train": "last:2", "loss": "mse", "learning_rate": 2e-5, "steps": 100, "seed": 0, "git_revision": "f00",
}  # fmt: skip
WEIGHTS_AND_WORDS = {
    "config.json",
    "model.safetensors",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
}


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback that this process and its children use, with a token that may write."""
    with hub_for(monkeypatch, tmp_path / "home") as server:
        monkeypatch.setattr(sys.modules["spar_hf.hub.publish"], "WAIT_S", 0.0)
        yield server


@pytest.fixture(scope="session")
def trained(make_spar, spar_processor, tmp_path_factory) -> Path:
    """OUTPUT of a distillation: model/, run.json with this machine's paths, metrics.json, log, checkpoints."""
    output = tmp_path_factory.mktemp("alice") / "run"
    model = make_spar(num_hidden_layers=2)
    model.config.vision_config.teacher = model.vision_model.config.teacher = TEACHER
    model.save_pretrained(output / "model")
    spar_processor.save_pretrained(output / "model")
    made_from = {
        "teacher": {"model": TEACHER["model"]},
        **{k: TEACHER[k] for k in ("steps", "seed", "learning_rate", "data")},
    }
    run = {
        "command": f"python {output}/distill.py --student openai/clip-vit-base-patch16 --output {output} --steps 100",
        "device": "cpu", "processes": 1, "mixed_precision": "no", "versions": {"torch": "2.13.0"},
        "made_from": made_from,
    }  # fmt: skip
    (output / "run.json").write_text(json.dumps(run))
    metrics = {"mean_iou": {"start": {"4x": 0.25}, "student": {"4x": 0.5}}, "scenes": 50}
    (output / "metrics.json").write_text(json.dumps(metrics))
    evaluation = {
        "benchmark": "ade20k", "variant": "", "protocol": {"name": "spar"}, "num_images": 2000, "mean_iou": 0.123456,
        "command": f"spar evaluate --benchmark ade20k --data /home/alice/ADE --model {output}/model",
    }  # fmt: skip
    (output / "model" / "ade20k.json").write_text(json.dumps(evaluation))
    (output / "model" / "log.jsonl").write_text('{"step": 1}\n')
    (output / "model" / "optimizer.bin").write_bytes(b"pickled")
    (output / "model" / ".env").write_text("HF_TOKEN=hf_abcdefghijklmnop\n")
    return output


@pytest.fixture
def spar(capfd) -> Callable[..., Done]:
    """`spar(...)`: the command in this process; its status and what it printed."""

    def run(*words: object) -> Done:
        capfd.readouterr()
        status = main([str(word) for word in words])
        return Done(status, *capfd.readouterr())

    return run


class Done(NamedTuple):
    status: int
    out: str
    err: str


def process(*command: object, cwd: Path | None = None, **environment: str) -> Done:
    """A fresh process, which meets the Hub through the environment alone."""
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=240, cwd=cwd,
        stdin=subprocess.DEVNULL, env={**os.environ, **environment}, check=False,
    )  # fmt: skip
    return Done(done.returncode, done.stdout, done.stderr)


def python(code: str, *words: str, cwd: Path, installed: bool = True) -> Done:
    """Code in a fresh process that may only read; with `installed=False` the package cannot be imported there."""
    hide = "" if installed else 'import sys\nsys.modules["spar_hf"] = None\n'
    return process("-c", hide + code, *words, cwd=cwd, HF_TOKEN="hf_reader")


# --- what arrives ------------------------------------------------------------------------------------------------


def test_publish_commits_once_and_a_second_time_not_at_all(hub, trained, spar):
    words = ("publish", trained / "model", "--repo-id", "you/spar", "--license", "apache-2.0")
    first = process("-m", "spar_cli.main", *words)
    assert first.status == 0, first.err
    assert first.out.startswith(f"published {hub.url}/you/spar\n")
    repository = hub.repository("you/spar")
    assert [message for _, _, message in repository.commits] == ["initial commit", "Publish spar"]
    files = hub.files("you/spar")
    code = {name for name in files if name.endswith("_spar.py")}
    assert set(files) == {".gitattributes", "README.md", *WEIGHTS_AND_WORDS, *code}
    package = Path(sys.modules["spar_hf"].__file__).parent
    assert all(content == (package / name).read_bytes() for name, content in files.items() if name in code)
    assert {"clip_spar.py", "processing_spar.py", "dense_spar.py"} <= code
    assert load_file(trained / "model/model.safetensors").keys() == load(files["model.safetensors"]).keys()

    second = spar(*words)
    assert second.status == 0, second.err
    assert second.out.startswith("nothing has changed at ")
    assert len(repository.commits) == 2


def test_nothing_of_this_machine_leaves(hub, trained, spar):
    done = spar("publish", trained / "model", "--repo-id", "you/spar", "--with-space")
    assert done.status == 0, done.err
    for line in ("log.jsonl", "optimizer.bin", ".env", "ade20k.json"):
        assert line in done.out.partition("left out")[2]
    everything = hub.files("you/spar") | {f"space/{k}": v for k, v in hub.files("you/spar-space", "spaces").items()}
    for name, content in everything.items():
        for secret in (b"alice", b"hf_abc", b"hf_writer", str(trained).encode(), str(Path.home()).encode() + b"/"):
            assert secret not in content, (name, secret)
    assert set(hub.files("you/spar-space", "spaces")) == {".gitattributes", "README.md", "app.py", "requirements.txt"}


def test_a_built_page_becomes_a_static_space(hub, spar, tmp_path):
    exported, page = tmp_path / "exported", tmp_path / "page"
    record = {"layout": LAYOUT, "format": "onnx", "patch_px": 16, "size_rule": "floor", "text": {}, "files": {}}
    for folder in (exported, page / "models/exported"):
        folder.mkdir(parents=True)
        (folder / RECORD).write_text(json.dumps(record | {"dtypes": {}}))
    (exported / "config.json").write_text(json.dumps({"model_type": "spar"}))
    words = ("publish", exported, "--repo-id", "you/onnx", "--with-page", page)

    refused = spar(*words)
    assert refused.status == 2 and f"{page} is no built page; build one with 'python spaces/" in refused.err
    for name in ("index.html", "service-worker.js", "README.md"):
        (page / name).write_text("the page's own")
    refused = spar(*words[:4], "--with-space")
    assert refused.status == 2 and "an exported folder, which the Gradio Space cannot load" in refused.err
    (page / "models/exported" / RECORD).write_text("{}")
    refused = spar(*words)
    assert refused.status == 2 and f"{page} ships with another model than {exported}; build it" in refused.err
    assert not hub.repositories

    shutil.copy(exported / RECORD, page / "models/exported")
    done = spar(*words)
    assert done.status == 0, done.err
    assert f"page      {hub.url}/spaces/you/onnx-page" in done.out
    files = hub.files("you/onnx-page", "spaces")
    assert set(files) - {".gitattributes"} == {
        "README.md",
        "index.html",
        "service-worker.js",
        "models/exported/export.json",
    }
    assert files["README.md"] == b"the page's own"
    assert hub.repository("you/onnx-page", "spaces").created["sdk"] == "static"


def test_card_holds_what_was_measured_and_leaves_out_the_rest(hub, trained, make_spar, tmp_path):
    prepare(trained / "model", tmp_path, "you/spar", license="apache-2.0")
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.library_name == "transformers" and card.data.pipeline_tag == "image-segmentation"
    assert card.data.license == "apache-2.0"
    assert card.data.base_model == "openai/clip-vit-base-patch16" and card.data.datasets == "you/photos"
    assert {"open-vocabulary-segmentation", "spar"} <= set(card.data.tags)
    measured = {result.dataset_name: result.metric_value for result in card.data.eval_results}
    assert measured == {"picturebook, 4x the native side": 50.0, "ade20k": 12.35}
    assert "| picturebook, 4x the native side | picturebook | 50 | 25.0 | 50.0 |" in card.text
    assert "| ade20k | spar | 2000 |  | 12.3 |" in card.text
    assert "python distill.py --student openai/clip-vit-base-patch16 --output run --steps 100" in card.text
    assert "window 64 px, stride 24 px" in card.text and "25000 images" in card.text

    bare, out = tmp_path / "bare", tmp_path / "out"
    out.mkdir()
    make_spar(num_hidden_layers=2, attention_reach="window").vision_model.save_pretrained(bare)
    prepare(bare, out, "you/tower")
    card = ModelCard.load(out / "README.md")
    assert "Attention reaches: `window`." in card.text
    known = card.data.to_dict()
    assert not {"license", "base_model", "datasets", "model-index"} & set(known), known
    assert "## Training" not in card.text and "## Results" not in card.text and "None" not in card.text
    assert "No measurement came with these weights" in card.text


def test_records_of_another_run_are_not_used(trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    run = json.loads((tmp_path / "run/run.json").read_text())
    run["made_from"]["steps"] = 7
    (tmp_path / "run/run.json").write_text(json.dumps(run))
    (tmp_path / "out").mkdir()
    prepare(tmp_path / "run/model", tmp_path / "out", "you/spar")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert [result.dataset_name for result in card.data.eval_results] == ["ade20k"]
    assert "distill.py" not in card.text


def test_a_readme_of_the_folder_gives_facts_and_notes(trained, tmp_path):
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    (folder / "README.md").write_text(
        "---\nlicense: mit\ntags: [toy]\nfoo: bar\n---\n\n# mine\n\nTrained with love.\n"
    )
    (tmp_path / "out").mkdir()
    prepare(folder, tmp_path / "out", "you/spar")
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "mit" and card.data.tags == ["open-vocabulary-segmentation", "spar", "toy"]
    assert "Trained with love." in card.text.partition("## Notes")[2] and "foo" not in card.data.to_dict()
    again = tmp_path / "again"
    again.mkdir()
    shutil.copy(tmp_path / "out/README.md", folder / "README.md")  # what we wrote ourselves is no notes
    prepare(folder, again, "you/spar")
    assert "## Notes" not in (again / "README.md").read_text()


def test_paths_are_cut_out_of_commands():
    line = (
        "python /home/alice/distill.py --images=/data/a --model ~/m --student openai/clip --output runs/a 'C:\\b\\c'"
    )
    assert without_paths(line) == "python distill.py --images=a --model m --student openai/clip --output runs/a c"


@pytest.mark.parametrize(
    "text, what", [("see /home/alice/data", "a path of this machine"), ("hf_" + "a" * 30, "token")]
)
def test_a_card_that_would_leak_is_refused(trained, tmp_path, text, what):
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    (folder / "README.md").write_text(f"# mine\n\n{text}\n")
    (tmp_path / "out").mkdir()
    with pytest.raises(PublishError, match=what):
        prepare(folder, tmp_path / "out", "you/spar")


# --- what loads from there ---------------------------------------------------------------------------------------

LOAD = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoProcessor
trust = sys.argv[1] == "trust"
if not trust:
    import spar_hf
model = AutoModel.from_pretrained("you/spar", trust_remote_code=trust)
processor = AutoProcessor.from_pretrained("you/spar", trust_remote_code=trust)
inputs = processor(images="street.png", return_tensors="pt")
with torch.no_grad():
    features = model.vision_model(inputs["pixel_values"]).patch_embeds
words = processor.encode_labels(model, "road; car, automobile; sky").text_embeds
save_file({"features": features, "words": words}, sys.argv[2])
print(type(model).__module__.partition(".")[0], type(processor).__module__.partition(".")[0])
"""


@pytest.fixture
def street(tmp_path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (90, 150, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "street.png")
    Image.open(tmp_path / "street.png").save(tmp_path / "street.jpg")
    return tmp_path


def test_published_model_loads_with_and_without_the_package(hub, trained, street, spar):
    assert spar("publish", trained / "model", "--repo-id", "you/spar").status == 0
    remote = python(LOAD, "trust", "remote.safetensors", cwd=street, installed=False)
    assert remote.status == 0, remote.err
    assert remote.out.split() == ["transformers_modules", "transformers_modules"]
    own = python(LOAD, "no", "own.safetensors", cwd=street)
    assert own.status == 0, own.err
    assert own.out.split() == ["spar_hf", "spar_hf"]

    remote, own = load_file(street / "remote.safetensors"), load_file(street / "own.safetensors")
    model = SparModel.from_pretrained(trained / "model")
    from spar_hf import SparProcessor

    inputs = SparProcessor.from_pretrained(trained / "model")(images=str(street / "street.png"), return_tensors="pt")
    with torch.no_grad():
        expected = model.vision_model(inputs["pixel_values"]).patch_embeds
    torch.testing.assert_close(remote["features"], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(own["features"], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(own["words"], remote["words"], atol=1e-6, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["siglip", "dinov3", "radio"])
def test_the_other_families_go_to_the_hub_and_back(family, hub, clip_tokenizer, street, tmp_path, spar):
    if family == "siglip":
        model = spar_siglip(clip_tokenizer, tmp_path / "stock")
    else:
        model = {"dinov3": spar_dinov3, "radio": spar_radio}[family](clip_tokenizer)
    processor = make_processor(model.config, clip_tokenizer)
    processor.image_processor.size = {"shortest_edge": 72}
    for part in (model, processor):
        part.save_pretrained(tmp_path / "model")
    done = spar("publish", tmp_path / "model", "--repo-id", "you/spar")
    assert done.status == 0, done.err
    inputs = processor(images=str(street / "street.png"), return_tensors="pt")
    with torch.no_grad():
        expected = model.vision_model(inputs["pixel_values"]).patch_embeds
    words = processor.encode_labels(model, "road; car, automobile; sky").text_embeds
    for trust, installed in (("trust", False), ("no", True)):
        loaded = python(LOAD, trust, "found.safetensors", cwd=street, installed=installed)
        assert loaded.status == 0, loaded.err
        found = load_file(street / "found.safetensors")
        torch.testing.assert_close(found["features"], expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(found["words"], words, atol=1e-5, rtol=0)


@pytest.mark.slow
def test_snippets_of_the_card_run(hub, trained, street, spar):
    assert spar("publish", trained / "model", "--repo-id", "you/spar").status == 0
    with_remote_code, with_package = re.findall(
        r"```python\n(.*?)```", hub.files("you/spar")["README.md"].decode(), re.DOTALL
    )
    check = "assert tuple(label_map.shape) == (90, 150), label_map.shape\n"
    run = python(with_remote_code + check, cwd=street, installed=False)
    assert run.status == 0, run.err
    run = python(with_package, cwd=street)
    assert run.status == 0 and "'area_fraction'" in run.out, run.err


@pytest.mark.slow
def test_snippet_of_a_lone_tower_runs(hub, make_spar, tmp_path, spar):
    make_spar(num_hidden_layers=2).vision_model.save_pretrained(tmp_path / "tower")
    done = spar("publish", str(tmp_path / "tower"), "--repo-id", "you/tower")
    assert done.status == 0, done.err
    (snippet,) = re.findall(r"```python\n(.*?)```", hub.files("you/tower")["README.md"].decode(), re.DOTALL)
    run = python(snippet + "assert features.shape == (1, 12, 16, 24)\n", cwd=tmp_path, installed=False)
    assert run.status == 0, run.err


@pytest.mark.slow
def test_push_to_hub_of_transformers_works_too(hub, trained, street):
    code = (
        "import sys, spar_hf; model, processor = spar_hf.load(sys.argv[1])\n"
        "model.push_to_hub('you/spar'); processor.push_to_hub('you/spar')"
    )
    pushed = process("-c", code, trained / "model")
    assert pushed.status == 0, pushed.err
    files = hub.files("you/spar")
    assert set(files) >= WEIGHTS_AND_WORDS and "clip_spar.py" in files
    loaded = python(LOAD, "trust", "remote.safetensors", cwd=street, installed=False)
    assert loaded.status == 0, loaded.err


def test_distillation_publishes_its_result(hub, tmp_path):
    start, photos = save_network(tmp_path / "start"), save_pictures(tmp_path / "photos")
    flags = ["--student", start, "--images", photos, *SIZES, "--max-steps", 1, "--workers", 0, "--tracker", "none"]
    distill("distill.py", *flags, "--output", tmp_path / "run", "--push-to-hub", "you/student")
    files = hub.files("you/student")
    assert load(files["model.safetensors"]).keys() == load_file(tmp_path / "run/model/model.safetensors").keys()
    card = files["README.md"].decode()
    assert "--student start --images photos" in card and "- steps: 1\n" in card and str(tmp_path) not in card
    assert not {"run.json", "log.jsonl"} & set(files)


# --- faults ------------------------------------------------------------------------------------------------------


def fails(run: Done) -> str:
    """The one line of a mistake."""
    assert run.status == 2 and run.out == "", (run.status, run.out, run.err)
    assert run.err.startswith("spar: error: ") and run.err.count("\n") == 1, run.err
    return run.err


@pytest.mark.parametrize(
    "settings, repo_id, says",
    [
        ({"HF_TOKEN": ""}, "you/spar", "there is no token for the Hub; run 'hf auth login'"),
        ({"HF_TOKEN": "hf_reader"}, "you/spar", "the token can only read; make one with write access"),
        ({"HF_TOKEN": "hf_nobody"}, "you/spar", "the token is not valid; get one"),
        ({}, "other/spar", "has no right to write there; give a --repo-id under your own name"),
        ({}, "spar", "give owner and name, such as you/spar"),
        ({}, "you/sp ar", "--repo-id is 'you/sp ar'"),
        ({"HF_HUB_OFFLINE": True}, "you/spar", "offline mode is on; unset HF_HUB_OFFLINE"),
        ({"ENDPOINT": "http://127.0.0.1:9"}, "you/spar", "check the network and run the same command again"),
    ],
)  # fmt: skip
def test_mistakes_and_their_remedies(hub, trained, settings, repo_id, says, spar, monkeypatch):
    for name, value in settings.items():
        if name == "HF_TOKEN":
            monkeypatch.setenv(name, value)
        else:
            monkeypatch.setattr(constants, name, value)
    line = fails(spar("publish", trained / "model", "--repo-id", repo_id))
    assert says in line
    assert not hub.repositories


def test_a_name_taken_by_another_model_is_not_overwritten(hub, trained, tmp_path, spar):
    assert spar("publish", trained / "model", "--repo-id", "you/spar").status == 0
    repository = hub.repository("you/spar")
    files = dict(repository.at("main")[1])
    files["config.json"] = type(files["config.json"])(b'{"model_type": "bert"}', False)
    repository.commit(files, "another model", "main")
    assert "holds another model (model_type 'bert')" in fails(
        spar("publish", trained / "model", "--repo-id", "you/spar")
    )
    assert len(repository.commits) == 3


def test_private_is_not_promised_for_a_public_repository(hub, trained, spar):
    assert spar("publish", trained / "model", "--repo-id", "you/secret", "--private").status == 0
    assert hub.repository("you/secret").created["visibility"] == "private"
    assert spar("publish", trained / "model", "--repo-id", "you/open").status == 0
    assert "exists and is public" in fails(spar("publish", trained / "model", "--repo-id", "you/open", "--private"))


def test_pull_request(hub, trained, spar, monkeypatch):
    folder = trained / "model"
    assert "no repository you/spar" in fails(spar("publish", folder, "--repo-id", "you/spar", "--create-pr"))
    assert spar("publish", folder, "--repo-id", "you/spar").status == 0
    before = hub.repository("you/spar").refs["main"]
    monkeypatch.setenv("HF_TOKEN", "hf_other")
    asked = spar("publish", folder, "--repo-id", "you/spar", "--create-pr", "--license", "mit")
    assert asked.status == 0, asked.err
    assert asked.out.startswith(f"published {hub.url}/you/spar/discussions/1\n")
    assert hub.repository("you/spar").refs["main"] == before
    assert b"license: mit" in hub.files("you/spar", revision="refs/pr/1")["README.md"]


def test_weights_that_are_no_longer_there_are_deleted(hub, trained, spar):
    assert spar("publish", trained / "model", "--repo-id", "you/spar").status == 0
    repository = hub.repository("you/spar")
    files = dict(repository.at("main")[1])
    for name in ("model-00001-of-00002.safetensors", "model.safetensors.index.json", "old_spar.py", "figure.svg"):
        files[name] = files["config.json"]
    repository.commit(files, "sharded", "main")
    assert spar("publish", trained / "model", "--repo-id", "you/spar").status == 0
    left = set(hub.files("you/spar"))
    assert "figure.svg" in left and not {name for name in left if "0000" in name or "index" in name or "old" in name}


def test_interrupted_uploads_are_taken_up_again(hub, trained, spar):
    """The connection drops in the upload of the weights, and after the commit has been made but not answered."""
    dropped: list[str] = []

    def fault(method: str, path: str) -> bool | int:
        if (method == "PUT" and dropped.count("PUT") < 2) or ("/commit/" in path and dropped.count("POST") < 1):
            dropped.append(method)
            return True if len(dropped) != 2 else 503
        return False

    hub.faults = fault
    done = spar("publish", trained / "model", "--repo-id", "you/spar")
    assert done.status == 0, done.err
    assert dropped == ["PUT", "PUT", "POST"]
    assert len(hub.repository("you/spar").commits) == 2
    assert hub.files("you/spar")["model.safetensors"]


def test_a_lost_answer_makes_no_second_commit(hub, trained, monkeypatch, spar):
    import hub_server

    honest, lost = hub_server._Handler.commit, []

    def commit(self, **route):
        if not lost:
            lost.append(route)
            self.send = lambda *args, **kwargs: setattr(self, "close_connection", True)
        honest(self, **route)

    monkeypatch.setattr(hub.server.RequestHandlerClass, "commit", commit, raising=False)
    done = spar("publish", trained / "model", "--repo-id", "you/spar")
    assert done.status == 0, done.err
    assert lost and len(hub.repository("you/spar").commits) == 2


def test_a_hub_that_stays_broken_gets_no_commit(hub, trained, spar):
    hub.faults = lambda method, path: 500 if "/commit/" in path else False
    line = fails(spar("publish", trained / "model", "--repo-id", "you/spar"))
    assert "the Hub answered 500" in line and "run the same command again later" in line
    assert len(hub.repository("you/spar").commits) == 1


def test_folders_that_cannot_be_published(capsys, tmp_path, trained):
    assert main(["publish", str(tmp_path / "none"), "--repo-id", "you/spar"]) == 2
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/pytorch_model.bin").write_bytes(b"")
    assert main(["publish", str(tmp_path / "pickled"), "--repo-id", "you/spar"]) == 2
    assert "pickled weights" in capsys.readouterr().err
    broken = shutil.copytree(trained / "model", tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    assert main(["publish", str(broken), "--repo-id", "you/spar"]) == 2
    assert "does not load" in capsys.readouterr().err


def test_a_teacher_of_which_little_is_known(make_spar, spar_processor, tmp_path):
    """Records that other programs wrote: what is missing is left out, what is wrong is named."""
    for teacher, says in (
        ({"model": "you/teacher"}, "- teacher: you/teacher\n"),
        ({"method": "naclip", "window_px": 224}, "- teacher: method naclip, window 224 px\n"),
        ({"model": "x/y", "method": None, "data": "photos", "steps": 3}, "- teacher: x/y\n- steps: 3\n"),
        ({"note": "none of ours"}, "It was distilled"),
    ):
        model = make_spar(num_hidden_layers=2)
        model.config.vision_config.teacher = model.vision_model.config.teacher = teacher
        folder = tmp_path / "model"
        model.save_pretrained(folder)
        spar_processor.save_pretrained(folder)
        (folder / "run.json").write_text('{"made_from": {"teacher": "x"}, "versions": [1], "steps": 3}')
        out = tmp_path / "out"
        out.mkdir()
        prepare(folder, out, "you/spar")
        card = (out / "README.md").read_text()
        assert says in card and "None" not in card, card
        shutil.rmtree(folder)
        shutil.rmtree(out)


@pytest.mark.parametrize(
    "wrong",
    [{"protocol": "spar"}, {"mean_iou": "high"}, {"num_images": None}, {"command": "spar 'open"}, {"command": 7}],
)
def test_results_that_lack_a_part_are_named(wrong, trained, tmp_path):
    folder = shutil.copytree(trained / "model", tmp_path / "model")
    results = json.loads((folder / "ade20k.json").read_text())
    (folder / "ade20k.json").write_text(json.dumps(results | wrong))
    (tmp_path / "out").mkdir()
    with pytest.raises(ValueError, match=r"ade20k.json cannot be used: ") as caught:
        prepare(folder, tmp_path / "out", "you/spar")
    assert str(caught.value).isprintable()


def test_what_a_killed_run_left_is_cleared(hub, trained, tmp_path, spar):
    gone = process("-c", "import os; print(os.getpid())").out.strip()
    left = tmp_path / "home/spar-publish" / f".you--spar.{gone}.tmp"
    left.mkdir(parents=True)
    (left / "model.safetensors").write_bytes(b"half")
    assert spar("publish", trained / "model", "--repo-id", "you/spar").status == 0
    assert list((tmp_path / "home/spar-publish").iterdir()) == []


def test_a_name_taken_by_what_nobody_knows(hub, trained, spar):
    for content in (b"[]", b"no JSON", b'{"model_type": 7}'):
        hub.put("you/spar", {"config.json": content})
        assert "you/spar holds another model" in fails(spar("publish", trained / "model", "--repo-id", "you/spar"))
