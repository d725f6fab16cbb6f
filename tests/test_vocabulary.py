"""Vocabularies with their text features in a file: the same results at once, and stale files refused in a line."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save_file

import spar_hf
from spar_cli.main import main
from spar_hf import Labels
from spar_hf.vocabulary import Vocabulary, text_side_of

CSV = 'id,name,synonyms,colour,threshold\n7,road,,#804080,\n26,car,"automobile, house",navy,0.2\n23,sky,,,\n'


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    noise = np.random.default_rng(0).normal(128, 80, (90, 150, 3)).clip(0, 255).astype(np.uint8)
    Image.fromarray(noise).save("a.png")
    Path("classes.csv").write_text(CSV, encoding="utf-8")
    return tmp_path


def fails(capsys, *words: str) -> str:
    assert main(list(words)) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("spar: error: ") and err.count("\n") == 1, err
    return err


def test_the_listing_says_what_is_in_a_file(here, capsys):
    assert main(["labels", "--labels", "@classes.csv"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "id  class  names                   colour   threshold",
        " 7  road   road                    #804080",
        "26  car    car, automobile, house  #000080        0.2",
        "23  sky    sky                     #009e73",
    ]
    assert main(["labels", "--labels", ";".join(f"thing {number}" for number in range(50))]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "and 10 more"


@pytest.mark.parametrize("options", [["--not", "grass; tree", "--other", "0.4"], ["--method", "naclip"]], ids=str)
def test_a_saved_vocabulary_gives_what_the_words_give(here, capsys, model_folder, options):
    assert main(["labels", "--labels", "@classes.csv", "--model", model_folder, "--save", "v.safetensors"]) == 0
    assert capsys.readouterr().out.startswith("v.safetensors: 3 classes, 5 names, ")
    common = ["segment", "a.png", "--model", model_folder, "--format", "palette", "--format", "coco", *options]
    for name, labels in (("words", "@classes.csv"), ("saved", "@v.safetensors")):
        assert main([*common, "--labels", labels, "--output", name]) == 0
    for file in ("a-labels.png", "coco-instances.json", "coco-panoptic.json"):
        assert Path("words", file).read_bytes() == Path("saved", file).read_bytes()
    assert set(np.unique(np.asarray(Image.open("saved/a-labels.png")))) <= {7, 26, 23, 255}


def test_only_names_that_compete_are_encoded(here, capsys, model_folder, monkeypatch):
    assert main(["labels", "--labels", "@classes.csv", "--model", model_folder, "--save", "v.safetensors"]) == 0
    encoded = []
    plain = spar_hf.SparProcessor._encode_names

    def counted(self, model, labels, templates, batch_size):
        encoded.extend(labels.names)
        return plain(self, model, labels, templates, batch_size)

    monkeypatch.setattr(spar_hf.SparProcessor, "_encode_names", counted)
    words = ["segment", "a.png", "--model", model_folder, "--labels", "@v.safetensors", "--format", "palette"]
    assert main(words) == 0 and encoded == []
    assert main([*words, "--not", "grass"]) == 0 and encoded == ["grass"]


def test_a_vocabulary_comes_back_whole(tmp_path):
    labels = Labels.parse([{"name": "a", "names": ["x", "ü"], "templates": ["a {}."], "id": 3, "colour": "red"},
                           {"name": "b", "definition": "a thing", "id": 9, "threshold": 0.5}])  # fmt: skip
    labels = replace(labels.against(["c"]), background=1)
    embeds = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    Vocabulary(labels, embeds, "side", "tiny").save(tmp_path / "v.safetensors")
    found = Vocabulary.read(tmp_path / "v.safetensors")
    assert found.labels == labels and (found.text_embeds == embeds).all()
    assert (found.text_side, found.model) == ("side", "tiny")


def test_files_of_another_model_and_broken_ones_are_refused(here, capsys, model, model_folder, spar_processor):
    make = ["labels", "--labels", "@classes.csv", "--model", model_folder, "--save"]
    assert main([*make, "v.safetensors"]) == 0
    capsys.readouterr()
    use = ["segment", "a.png", "--model", model_folder, "--labels", "@v.safetensors"]
    for name, words in {
        "another model": [*use[:3], "tiny", *use[4:]],
        "another arithmetic": [*use, "--dtype", "bfloat16"],
    }.items():
        line = fails(capsys, *words)
        assert f"v.safetensors was made with {model_folder}, and" in line and "spar labels --labels" in line, name
    spar_processor.__class__(
        image_processor=spar_processor.image_processor, tokenizer=spar_processor.tokenizer, templates=["one {}."]
    ).save_pretrained("other")
    model.save_pretrained("other")
    assert "other reads words otherwise" in fails(capsys, *use[:3], "other", *use[4:])

    whole = Path("v.safetensors").read_bytes()
    Path("v.safetensors").write_bytes(whole[:-9])
    assert "v.safetensors is no vocabulary, or a broken one" in fails(capsys, *use)
    Path("v.safetensors").write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert "v.safetensors is broken: its check sum differs" in fails(capsys, *use)
    save_file({"text_embeds": np.zeros((1, 2), np.float32)}, "v.safetensors")
    assert "v.safetensors is no vocabulary; make it again" in fails(capsys, *use)
    Path("v.safetensors").unlink()
    assert "there is no file v.safetensors" in fails(capsys, *use)
    assert "--save is v.pt; give a file that ends in .safetensors" in fails(capsys, *make, "v.pt")
    assert "at most 2 are allowed" in fails(capsys, *make, "v.safetensors", "--max-labels", "2")


def test_a_tokenizer_that_was_used_is_the_same_tokenizer(model, spar_processor):
    before = text_side_of(model, spar_processor)
    spar_processor.encode_labels(model, "road; a car that is longer than all other words")
    assert text_side_of(model, spar_processor) == before
