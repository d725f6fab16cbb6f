"""Banks of references: the file, the run that makes one and can be stopped, and `spar prototypes`."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from second_networks import NAMES, SETTINGS, bank_for, networks_for, pictures, small
from test_cli import fails

import spar_hf.prototypes
from spar_cli.main import main
from spar_hf import Labels, build_segmenter
from spar_hf.methods.bank import Bank, network_digest
from spar_hf.methods.knn_clip import Prototypes
from spar_hf.networks.vit import ViT
from spar_hf.prototypes import Pictures, build_bank
from spar_hf.segmentation_spar import label_map

CHOSEN = {"neighbours": 3, "threshold": 0.5, "weight": 0.5}


@pytest.fixture
def make(make_spar, spar_processor, tmp_path):
    """`make(output, pictures, dino)`: a bank for kNN-CLIP."""

    def build(output="bank", references=None, dino=None) -> Bank:
        model, networks = make_spar(num_hidden_layers=2), {"dino": dino or small("dino")}
        references = references or pictures(5)
        given = {"networks": networks, "settings": CHOSEN, "progress": False}
        return build_bank(tmp_path / output, "knn_clip", model, spar_processor, references, **given)

    return build


def test_a_bank_says_what_made_it_and_comes_back_as_it_was(make, tmp_path):
    bank = make()
    again = Bank.read(tmp_path / "bank")
    assert again.record == bank.record and repr(again) == repr(bank) and Bank.of(bank) is bank
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in bank.tensors.items())
    assert bank.record["networks"] == {"dino": network_digest(ViT(small("dino")))}
    assert len(bank) == 10 and bank.names == ["road", "car", "sky", "grass"] and str(bank) == str(tmp_path / "bank")
    assert not (tmp_path / "bank.parts").exists()
    assert network_digest(copy.deepcopy(small("dino")).bfloat16()) == network_digest(small("dino"))
    assert bank.places(Labels.parse("a; GRASS; automobile; car")) == {1: 3, 3: 1}


def test_the_same_run_gives_what_is_there_and_another_is_refused(make, monkeypatch):
    bank = make()
    monkeypatch.setattr(Prototypes, "of_picture", None)  # nothing is made again
    assert repr(make()) == repr(bank)
    other = copy.deepcopy(small("dino"))
    other.layernorm.bias.data += 1
    for changed in ({"references": pictures(4)}, {"dino": other}):
        with pytest.raises(ValueError, match=r"is a bank of other pictures, networks or settings; delete it or name"):
            make(**changed)


def test_a_stopped_run_goes_on(make, monkeypatch, tmp_path):
    whole = make("whole")
    monkeypatch.setattr(spar_hf.prototypes, "SAVE_EVERY", 2)
    references, read = pictures(5), []

    def stopping(number: int):
        read.append(number)
        if number == 3 and read.count(3) == 1:
            raise KeyboardInterrupt
        return references.read(number)

    stopped = Pictures(references.labels, references.names, stopping)
    with pytest.raises(KeyboardInterrupt):
        make("bank", stopped)
    assert not (tmp_path / "bank").exists()
    assert [path.name for path in sorted((tmp_path / "bank.parts").iterdir())] == ["pictures-00000000.safetensors"]
    shutil.copytree(tmp_path / "bank.parts", tmp_path / "kept")
    found = make("bank", stopped)
    assert read == [0, 1, 2, 3, 2, 3, 4]
    for name, tensor in whole.tensors.items():
        assert torch.equal(found.tensors[name], tensor)

    shutil.copytree(tmp_path / "kept", tmp_path / "other.parts")
    with pytest.raises(ValueError, match=r"other\.parts holds what another run has done; delete it to start anew"):
        make("other", pictures(4))
    shutil.copytree(tmp_path / "kept", tmp_path / "broken.parts")
    part = tmp_path / "broken.parts/pictures-00000000.safetensors"
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    with pytest.raises(ValueError, match=r"pictures-00000000\.safetensors is broken"):
        make("broken")


def test_files_that_are_no_bank_of_this_method_and_network(make, make_spar, spar_processor, tmp_path):
    make()
    content = (tmp_path / "bank").read_bytes()
    (tmp_path / "cut").write_bytes(content[:100])
    (tmp_path / "changed").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    small("dino").save_pretrained(tmp_path / "net")
    for name, message in (
        ("nowhere", "there is no bank of references .*nowhere; spar prototypes --output .* makes one"),
        ("cut", "cut is no bank of references .*; make it anew with spar prototypes"),
        ("changed", r"changed is broken \(check sum\)"),
        ("net/model.safetensors", "model.safetensors is no bank of references; make one with spar prototypes"),
    ):
        with pytest.raises(ValueError, match=message):
            Bank.of(str(tmp_path / name))
    model, other = make_spar(num_hidden_layers=2), copy.deepcopy(small("dino"))
    other.layernorm.bias.data += 1
    given = {"bank": str(tmp_path / "bank"), "dino": other, "regions": "slic"}
    with pytest.raises(ValueError, match=r"bank .* was made with another network 'dino' than is given; make another"):
        build_segmenter(model, spar_processor, "knn_clip", networks=given, settings=CHOSEN)
    with pytest.raises(
        ValueError, match=r"bank .* is of method 'knn_clip', not 'reco'; make another one with spar pr"
    ):
        build_segmenter(model, spar_processor, "reco", networks={"bank": given["bank"], "dino": small("dino")})
    with pytest.raises(ValueError, match=r"needs a network 'bank' .* give --network bank=FILE, which spar prototypes"):
        build_segmenter(model, spar_processor, "reco", networks={"dino": small("dino")})


def test_nothing_to_make_a_bank_of(make, make_spar, spar_processor, tmp_path):
    empty = Pictures.of_folder(save(tmp_path / "photos", ["a.png"]), Labels.parse(NAMES))
    with pytest.raises(ValueError, match=r"nothing in 1 pictures makes an entry: none has a labelled pixel"):
        make("none", empty)
    with pytest.raises(
        ValueError, match=r"method 'lposs' looks nothing up in a bank .* those that do: reco, knn_clip"
    ):
        build_bank(tmp_path / "x", "lposs", make_spar(num_hidden_layers=2), spar_processor, empty)
    (tmp_path / "void").mkdir()
    for folder, message in (("void", "void holds no pictures"), ("nowhere", "nowhere is no folder; give one")):
        with pytest.raises(ValueError, match=message):
            Pictures.of_folder(tmp_path / folder, None)


def save(folder: Path, names: list[str]) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 256, (40, 60, 3), dtype=np.uint8)
        Image.fromarray(noise).save(folder / name)
    return folder


def test_folders_called_as_a_class_are_of_it(make, tmp_path):
    folder = save(tmp_path / "photos", ["Automobile/a.png", "sky/deep/b.jpg", "boat/c.png", "d.png"])
    references = Pictures.of_folder(folder, Labels.parse(NAMES))
    assert references.names == ("Automobile/a.png", "boat/c.png", "d.png", "sky/deep/b.jpg")
    assert [np.unique(references.read(number).target).tolist() for number in range(4)] == [[1], [-1], [-1], [2]]
    assert references.identity != Pictures.of_folder(save(folder, ["e.png"]), None).identity
    bank = make(references=references)
    assert bank.tensors["name"].tolist() == [1, 2]


def test_the_command(monkeypatch, tmp_path, make_spar, spar_processor, capsys):
    monkeypatch.chdir(tmp_path)
    make_spar(num_hidden_layers=2).save_pretrained("model")
    spar_processor.save_pretrained("model")
    small("dino").save_pretrained("dino")
    save(Path("photos"), ["road/a.png", "sky/b.png"])
    words = ["prototypes", "--method", "knn_clip", "--model", "model", "--network", "dino=dino", "--output", "bank.st"]
    words += [word for name, value in CHOSEN.items() for word in ("--set", f"{name}={value}")]
    assert main([*words, "--images", "photos", "--labels", "road; sky"]) == 0
    assert "2 entries from 2 pictures: bank.st, 0.0 MB" in capsys.readouterr().out
    assert main([*words, "--images", "photos", "--labels", "road; sky"]) == 0
    drawn = [word if word != "bank.st" else "book.st" for word in words]
    assert main([*drawn, "--picture-book", "2", "--short-side", "32"]) == 0
    assert "from 2 pictures: book.st" in capsys.readouterr().out
    assert "is a bank of other pictures" in fails(capsys, *words, "--picture-book", "2")
    for more, message in (
        (["--labels", "a"], "give --images FOLDER, --picture-book N or --generate N, one of them"),
        (
            ["--images", "photos", "--picture-book", "2"],
            "give --images FOLDER, --picture-book N or --generate N, one of them",
        ),
        (["--picture-book", "2", "--labels", "a"], "--labels are for pictures without label maps"),
        (["--picture-book", "2", "--classes", "c"], "--masks and --classes are for --images"),
        (["--generate", "2"], "--generate draws what --labels name; give these, and no --masks"),
        (["--images", "photos", "--window-px", "64"], "--window-px is not for prototypes"),
        (["--images", "nowhere"], "nowhere is no folder; give one that holds pictures"),
    ):
        assert message in fails(capsys, *words, *more)
    assert "--method is missing" in fails(capsys, "prototypes", "--images", "photos", "--output", "x")
    assert "--output is photos, which is a folder" in fails(capsys, *words[:-7], "photos", "--picture-book", "2")


@pytest.mark.parametrize("method", ["freeda", "reco", "corrclip_v2_bank"])
@torch.no_grad()
def test_banks_of_half_precision_networks_are_those_of_fp32(method, make_spar, spar_processor, pixels, tmp_path):
    """A bank made in fp32 is read by the same networks in bf16."""
    model, networks = make_spar(num_hidden_layers=5), networks_for(method)
    networks["bank"] = bank_for(method, tmp_path / "bank", model, spar_processor, networks)
    half = {
        name: copy.deepcopy(part).bfloat16() if isinstance(part, torch.nn.Module) else part
        for name, part in networks.items()
    }
    given = {"networks": half, "settings": SETTINGS.get(method)}
    segmenter = build_segmenter(copy.deepcopy(model).bfloat16(), spar_processor, method, **given)
    (maps,) = segmenter(pixels((64, 80)).bfloat16(), segmenter.encode_labels("road; sky"))
    assert maps(slice(0, 2)).isfinite().all()


@pytest.mark.parametrize("method", ["freeda", "reco", "corrclip_v2_bank", "knn_clip", "clip_diy"])
@torch.no_grad()
def test_one_class_and_images_of_a_patch(method, make_spar, spar_processor, tmp_path):
    model, networks = make_spar(num_hidden_layers=2), networks_for(method)
    if method != "clip_diy":
        networks["bank"] = bank_for(method, tmp_path / "bank", model, spar_processor, networks)
    segmenter = build_segmenter(model, spar_processor, method, networks=networks, settings=SETTINGS[method])
    encoded = segmenter.encode_labels("sky")
    assert segmenter.encode_labels(encoded) is encoded
    for size in ((16, 16), (17, 40)):
        (maps,) = segmenter(torch.zeros(1, 3, *size), encoded)
        assert maps(slice(0, 1)).isfinite().all() and maps(slice(0, 1)).shape == (1, *size)
        assert label_map(maps.at((20, 30)), encoded.class_ids).unique().tolist() == [0]
