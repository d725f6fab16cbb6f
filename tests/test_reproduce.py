"""`spar reproduce` as a whole: a Hub and a server of archives on loopback, published layouts, random weights."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from archive_server import ArchiveServer, tarred, zipped
from hub_server import hub_for
from source_layouts import dinotxt_rest, dinov3_backbone, open_clip_vit, timm_siglip
from test_benchmarks import write_picture

import spar_hf.files
from spar_cli import compare
from spar_cli.main import build_parser, main, parse
from spar_cli.reproduce import pull_request, seconds_left, words_of
from spar_hf import METHODS
from spar_hf.build import record
from spar_hf.evaluation import OWN, PROTOCOLS, load_protocol
from spar_hf.hub.model_card import model_card, read_records
from spar_hf.published import BENCHMARKS, method_rows, spar_row, spar_rows
from spar_hf.reproduction import DATASETS, PARTS, WEIGHTS, Outcome, Row, archives, data_set_of, plan, select
from spar_hf.reproduction.report import means, times, verdict_of

ROOT = Path(__file__).resolve().parents[1]
CLIP_WORDS, SIGLIP_WORDS = "openai/clip-vit-base-patch16", "google/siglip2-base-patch16-512"
IMAGES = 2  # of each data set in these tests


# ---------------------------------------------------------------------------------------------------- plan


@pytest.mark.parametrize("part", PARTS)
def test_every_row_is_a_command_line(part, tmp_path):
    rows = plan(part)
    assert len({row.name for row in rows}) == len(rows) > 10
    assert [row.passes for row in rows] == sorted(row.passes for row in rows)
    args = parse(["reproduce", part, "--root", str(tmp_path)])
    args.data = tmp_path / "data"
    parser = build_parser()
    for row in rows:
        assert row.weights in WEIGHTS and (row.benchmark in BENCHMARKS or row.benchmark == "picturebook")
        told = parser.parse_args(words_of(row, "folder", tmp_path / "row.json", args))
        assert (told.benchmark, told.model) == (row.benchmark, "folder")
        assert told.state == tmp_path / "row.safetensors"
        assert told.protocol == (row.protocol or None)


def test_the_paper_is_all_there():
    rows = plan("paper")
    numbers = {(row.model, row.setting, row.benchmark): row.published for row in rows if row.published is not None}
    published = {(p.model, p.setting, name): value for p in spar_rows() for name, value in p.miou.items()}
    assert numbers == published and len(numbers) == 54
    for model in ("openclip-b16", "siglip2-b16", "dinov3txt-l16"):
        settings = {row.setting for row in rows if row.model == model}
        assert {"single", "reach", "spar", "stride-24", "stride-40", "stride-56"} <= settings
    strided = next(
        row for row in rows if (row.model, row.setting, row.benchmark) == ("openclip-b16", "stride-24", "voc20")
    )
    assert strided.options == ("--window-px", "native", "--stride-px", "24")
    assert 600 < strided.passes < 750  # the paper's 680 windows at 672 x 1008 px


def test_the_methods_are_all_there():
    rows = plan("methods")
    assert {row.setting for row in rows if row.protocol == "sclip"} == set(METHODS)
    assert {(row.setting, row.benchmark) for row in rows if row.protocol == "own"} == {
        (name, benchmark) for name, own in OWN.items() for benchmark in own.protocols if name != "sclip"
    }
    for row in rows:
        reported = method_rows()[row.setting].miou.get(row.benchmark) if row.setting in method_rows() else None
        assert row.published == reported
        assert row.comparable == (row.protocol == "own" or row.setting == "sclip")
        assert bool(row.problem) == any(not where for where in METHODS[row.setting].needs.values())
    given = plan("methods", [("reco.bank", "b.safetensors"), ("reco.dino", "facebook/dino-vits16")])
    assert next(row.networks for row in given if row.setting == "reco") == (
        ("bank", "b.safetensors"), ("dino", "facebook/dino-vits16")
    )  # fmt: skip
    assert not [row for row in given if row.setting == "reco" and row.problem]


def test_the_authors_own_settings_are_known_to_their_methods():
    for name, own in OWN.items():
        assert name in method_rows() and own.model in WEIGHTS and set(own.settings) <= set(own.protocols)
        for benchmark in own.protocols:
            settings = {key: str(value) for key, value in own.settings.get(benchmark, {}).items()}
            record(name, None, settings, own.refine)  # raises for a setting that is none
            assert own.protocols[benchmark].name == "own"
    sclip = PROTOCOLS["sclip"]
    assert {name: p.replace(name="") for name, p in OWN["sclip"].protocols.items()} == {
        name: sclip[name].replace(name="") for name in BENCHMARKS
    }


def test_spars_thresholds_on_voc21_are_clips_alone():
    clip, other = load_protocol("spar", "voc21"), load_protocol("spar", "voc21", clip=False)
    assert (clip.background_threshold, clip.area_threshold) == (0.1, 0.1)
    assert (other.background_threshold, other.area_threshold) == (None, None) and other.logit_scale == 65
    assert load_protocol("spar", "context60", clip=False) == load_protocol("spar", "context60")
    assert load_protocol("sclip", "voc21", clip=False) == load_protocol("sclip", "voc21")


def test_rows_are_selected_by_words_of_each_kind():
    rows = plan("paper")
    some = select(rows, ["voc20", "ade20k", "single", "openclip-b16"])
    assert [row.name for row in some] == ["voc20/openclip-b16-single", "ade20k/openclip-b16-single"]
    assert select(rows, []) == rows
    with pytest.raises(ValueError, match=r"there is no row 'voc22'; .*Did you mean 'voc2"):
        select(rows, ["voc22"])


def test_sources_are_whole():
    for benchmark in BENCHMARKS:
        assert data_set_of(benchmark) in DATASETS
    for data_set in DATASETS.values():
        assert data_set.images > 0 and data_set.licence and data_set.page.startswith("http")
        for archive in data_set.archives:
            kind, _, digits = archive.checksum.partition(":")
            assert not archive.checksum or len(digits) == 2 * hashlib.new(kind).digest_size
            assert bool(archive.checksum) == bool(archive.source) and archive.members and archive.gigabytes > 0
    for weights in WEIGHTS.values():
        assert bool(weights.hub) != bool(weights.by_hand) and weights.licence
        assert bool(weights.files) <= bool(weights.backbone)


# -------------------------------------------------------------------------------------------------- report


def made(row: Row, miou: float, images: int | None = None, seconds: float = 0.5) -> Outcome:
    key = data_set_of(row.benchmark)
    whole = DATASETS[key].images if key else 4
    result = {"mean_iou": miou / 100, "num_images": images or whole, "seconds_per_image": seconds}
    result |= {"seconds_per_image_mean": seconds, "peak_memory_mb": 100.0, "device": "cpu", "dtype": "float32"}
    return Outcome(row, result)


def test_verdicts():
    assert [verdict_of(d, 0.5) for d in (0.0, 0.54, -0.54, 0.56, -0.56, None)] == [
        "reproduced", "reproduced", "reproduced", "above", "below", "no score"
    ]  # fmt: skip
    rows = {(row.setting, row.protocol): row for row in plan("methods") if row.benchmark == "voc20"}
    assert made(rows["naclip", "own"], 80.0).verdict(0.5) == "reproduced"
    assert made(rows["naclip", "own"], 70.0).verdict(0.5) == "below"
    assert made(rows["naclip", "own"], 80.0, images=10).verdict(0.5) == "10 images, not all"
    assert made(rows["naclip", "sclip"], 80.0).verdict(0.5) == "another protocol"
    assert made(rows["clip_surgery", "sclip"], 80.0).verdict(0.5) == "nothing published"
    assert Outcome(rows["naclip", "own"], error="why").verdict(0.5) == "not run"


def test_means_and_times():
    rows = [row for row in plan("paper") if (row.model, row.setting) == ("siglip2-b16", "stride-40")]
    outcomes = [made(row, 40.0 + number) for number, row in enumerate(rows)]
    (mean,) = means(outcomes, 0.5)
    assert mean["ours"] == pytest.approx(42.5) and mean["published"] == spar_row("siglip2-b16", "stride-40").mean
    assert mean["verdict"] == "above" and means(outcomes[1:], 0.5) == []
    assert means([*outcomes[1:], made(rows[0], 40.0, images=3)], 0.5) == []
    speed = {row.setting: row for row in plan("speed") if row.model == "openclip-b16"}
    found = times(
        [made(speed["single"], 1, seconds=0.1), made(speed["stride-24"], 1, seconds=4), made(speed["reach"], 1)]
    )
    assert [(row["setting"], row["times"], row["verdict"]) for row in found] == [
        ("stride-24", pytest.approx(40), "reproduced"), ("reach", pytest.approx(5), "nothing published")
    ]  # fmt: skip


def test_time_left_is_by_forward_passes():
    rows = [row for row in plan("paper") if row.benchmark == "voc20" and row.model == "openclip-b16"]
    single, strided = (next(row for row in rows if row.setting == name) for name in ("single", "stride-24"))
    args = parse(["reproduce", "paper"])
    assert seconds_left([], [strided], args) == 0
    left = seconds_left([made(single, 50, seconds=0.1)], [single, strided], args)
    assert left == pytest.approx(1449 * 0.1 * (1 + strided.passes))
    args.limit, args.processes = 100, 2
    assert seconds_left([made(single, 50, 100, 0.1)], [single], args) == pytest.approx(100 * 0.1 / 2)


# ------------------------------------------------------------------------------------------- whole command


class World:
    """A Hub, a server of archives, and a folder, with small weights and small data sets in the published layouts."""

    def __init__(self, hub, server: ArchiveServer, folder: Path) -> None:
        self.hub, self.server, self.folder = hub, server, folder

    def run(self, *words: str) -> int:
        return main(["reproduce", *words, "--root", str(self.folder)])

    def report(self, part: str = "paper") -> tuple[str, dict]:
        folder = self.folder / part
        return (folder / "reproduction.md").read_text(), json.loads((folder / "reproduction.json").read_text())


def picture(shape: Sequence[int], top: int, folder: Path, suffix: str) -> bytes:
    path = folder / f"picture{suffix}"
    write_picture(path, np.random.default_rng(top).integers(0, top, shape, dtype=np.uint8))
    return path.read_bytes()


def trees(folder: Path) -> dict[str, dict[str, bytes]]:
    """The files of each archive, as published, with two pictures each, and what is not needed beside them."""
    folder.mkdir()
    photo, other = (picture((40, 60, 3), 256, folder, suffix) for suffix in (".jpg", ".png"))
    few, many = (picture((40, 60), top, folder, ".png") for top in (20, 150))
    names = ["2007_000001", "2007_000002"]
    lists = "\n".join(names).encode() + b"\n"
    voc = {f"JPEGImages/{name}.jpg": photo for name in [*names, "2007_000009"]}
    voc |= {f"SegmentationClass/{name}.png": few for name in names}
    voc |= {"ImageSets/Segmentation/val.txt": lists, "ImageSets/Main/val.txt": lists, "Annotations/a.xml": b"<a/>"}
    ade = {f"images/validation/ADE_{n}.jpg": photo for n in (1, 2)} | {"images/training/ADE_9.jpg": photo}
    ade |= {f"annotations/validation/ADE_{n}.png": many for n in (1, 2)} | {"objectInfo150.txt": b"x"}
    streets = {f"leftImg8bit/val/ulm/ulm_{n}_leftImg8bit.png": other for n in (1, 2)}
    maps = {f"gtFine/val/ulm/ulm_{n}_gtFine_labelIds.png": few for n in (1, 2)}
    return {
        "VOCtrainval_11-May-2012.tar": {f"VOCdevkit/VOC2012/{name}": content for name, content in voc.items()},
        "VOCtrainval_03-May-2010.tar": {f"VOCdevkit/VOC2010/JPEGImages/{name}.jpg": photo for name in names},
        "ADEChallengeData2016.zip": {f"ADEChallengeData2016/{name}": content for name, content in ade.items()},
        "val2017.zip": {f"val2017/00000{n}.jpg": photo for n in (1, 2)},
        "stuffthingmaps_trainval2017.zip": {f"{s}2017/00000{n}.png": few for n in (1, 2) for s in ("val", "train")},
        "leftImg8bit_trainvaltest.zip": {**streets, "leftImg8bit/test/a.png": other, "license.txt": b"x"},
        "gtFine_trainvaltest.zip": maps,
    }


@pytest.fixture
def world(tmp_path, monkeypatch, clip_tokenizer, make_clip):
    """The small world; rows run in this process, and the clock does not wait."""
    packed = {
        name: (zipped if name.endswith(".zip") else tarred)(files)
        for name, files in trees(tmp_path / "pictures").items()
    }
    monkeypatch.setattr(archives, "WAIT_S", 0.0)
    monkeypatch.setattr(compare, "run_aside", run_here)
    with hub_for(monkeypatch, tmp_path / "home") as hub, ArchiveServer() as server:
        server.files = {f"/{name}": content for name, content in packed.items()}
        for name, data_set in DATASETS.items():
            moved = tuple(on(server, archive, packed[archive.name]) for archive in data_set.archives)
            monkeypatch.setitem(DATASETS, name, replace(data_set, archives=moved, images=IMAGES, gigabytes=0.0))
        for name, weights in WEIGHTS.items():
            asked = {**weights.asked, **({"heads": 3, "text_heads": 2} if weights.backbone else {})}
            monkeypatch.setitem(WEIGHTS, name, replace(weights, asked=asked, gigabytes=0.0))
        fill(hub, tmp_path, clip_tokenizer, make_clip)
        yield World(hub, server, tmp_path / "root")


def on(server: ArchiveServer, archive: archives.Archive, content: bytes) -> archives.Archive:
    """The archive on the server, with its own check sum where its publisher's is known."""
    kind = archive.checksum.partition(":")[0]
    own = f"{kind}:{hashlib.new(kind, content).hexdigest()}" if kind else ""
    url = archive.url if archive.login else f"{server.url}/{archive.name}"
    return replace(archive, url=url, checksum=own, gigabytes=0.0)


def fill(hub, folder: Path, tokenizer, make_clip) -> None:
    """The Hub's repositories: open_clip's and timm's files, a plain CLIP, tokenizers."""
    tokenizer.save_pretrained(folder / "words")
    words = {path.name: path.read_bytes() for path in (folder / "words").iterdir()}
    make_clip(num_hidden_layers=2).save_pretrained(folder / "clip")
    clip = {path.name: path.read_bytes() for path in (folder / "clip").iterdir()}
    hub.put(CLIP_WORDS, {**clip, **words})
    hub.put(SIGLIP_WORDS, {**words, "config.json": b"{}"})
    size = len(tokenizer)
    for repo, weights in (
        (WEIGHTS["openclip-b16"].hub, open_clip_vit(size)),
        (WEIGHTS["siglip2-b16"].hub, timm_siglip(size)),
    ):
        torch.save(weights, folder / "weights.bin")
        hub.put(repo, {"open_clip_pytorch_model.bin": (folder / "weights.bin").read_bytes(), "README.md": b"x"})


def run_here(command: Sequence[str], processes: int = 1) -> tuple[int, str]:
    """`run_aside` without a process of its own: its start would take most of the test."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        status = main(list(command))
    lines = [line for line in said.getvalue().splitlines() if line.startswith("spar: error: ")]
    return status, (lines or [""])[-1]


def by_hand(world: World, name: str, **files: dict) -> Path:
    """Puts weights where a user would."""
    folder = world.folder / "weights" / name
    folder.mkdir(parents=True)
    for stem, content in files.items():
        torch.save(content, folder / f"{stem}.pth")
    return folder


def test_from_nothing_to_a_report(world, capsys, clip_tokenizer):
    """Downloads, one of which breaks, converts, evaluates, compares; the same command goes on from there."""
    words = ["paper", "--only", "voc20,openclip-b16,single,reach,spar"]
    world.server.cut = lambda path, first: 5000 if first == 0 else None
    assert world.run(*words, "--dry-run") == 0
    out, _ = capsys.readouterr()
    assert "3 rows" in out and "VOCtrainval_11-May-2012.tar" in out
    assert "SPAR MaskCLIP (Legacy), the paper's: download it in a browser from https://drive.google.com/file/d/" in out
    assert not world.folder.exists() and world.server.asked == [] and world.hub.requests == []

    assert world.run(*words) == 1  # SPAR's weights are not there yet
    out, err = capsys.readouterr()
    assert [first for _, first in world.server.asked] == [None, "bytes=5000-"]
    page, data = world.report()
    assert (
        "## Not run" in page
        and "1 rows (voc20/openclip-b16-spar): SPAR MaskCLIP (Legacy), the paper's has to be g" in page
    )
    assert "put what you get into ROOT/weights/spar-openclip-b16" in page and str(world.folder) not in page
    assert "[1/2] voc20/openclip-b16-single:" in err and " left" in err

    trimmed = {f"model.{name}": weight for name, weight in open_clip_vit(len(clip_tokenizer)).items()}
    by_hand(world, "spar-openclip-b16", released=trimmed)
    assert world.run(*words) == 0
    out, err = capsys.readouterr()
    assert "[1/3] voc20/openclip-b16-single: done before" in err and len(world.server.asked) == 2
    page, data = world.report()
    rows = {row["setting"]: row for row in data["rows"]}
    assert set(rows) == {"single", "reach", "spar"} and not any(row["error"] for row in rows.values())
    for setting, row in rows.items():
        assert row["published"] == (spar_row("openclip-b16", setting).miou["voc20"] if setting != "reach" else None)
        assert row["ours"] == pytest.approx(100 * row["result"]["mean_iou"])
        assert row["verdict"] == ("below" if setting != "reach" else "nothing published")
        assert row["result"]["num_images"] == IMAGES and row["result"]["peak_memory_mb"] > 0
        assert row["result"]["command"].startswith("spar evaluate --benchmark voc20 --model ROOT/models/")
    assert rows["single"]["ours"] == rows["spar"]["ours"] != rows["reach"]["ours"]  # the same random weights
    assert data["archives"]["VOCtrainval_11-May-2012.tar"]["compared_with"].endswith("as published by torchvision")
    assert f"| {rows['single']['ours']:.1f} | 52.3 |" in page and "gh pr create --fill" in out
    card = str(
        model_card(
            "you/clip", spar_hf.load(model := world.folder / "models/openclip-b16")[0], read_records(model, None), True
        )
    )
    assert f"| spar | 2 | {rows['single']['ours']:.1f} | 52.3 |" in card
    report = json.loads((world.folder / "models/openclip-b16/conversion.json").read_text())
    assert report["layout"] and all(check["max_difference"] < 1e-3 for check in report["comparisons"])


def test_methods_under_the_fields_protocol_and_their_own(world, capsys):
    assert world.run("methods", "--only", "voc20,naclip,sclip,reco", "--limit", "1") == 1
    _, data = world.report("methods")
    rows = {(row["setting"], row["protocol"]): row for row in data["rows"]}
    assert set(rows) == {("naclip", "sclip"), ("naclip", "own"), ("sclip", "sclip"), ("reco", "sclip")}
    assert rows["reco", "sclip"]["error"].startswith("its dino and bank cannot be downloaded; make or get it")
    for key in (("naclip", "sclip"), ("naclip", "own")):
        assert rows[key]["verdict"] == "1 images, not all" and rows[key]["published"] == 79.7
    assert rows["naclip", "own"]["result"]["protocol"]["name"] == "own"
    assert rows["naclip", "own"]["result"]["record"]["method"] == "naclip"
    assert (
        rows["naclip", "own"]["result"]["mean_iou"] == rows["naclip", "sclip"]["result"]["mean_iou"]
    )  # the same here


@pytest.mark.parametrize("mended", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_what_cannot_be_had_leaves_the_rest(mended, world, capsys, monkeypatch):
    """A gated repository, a wrong check sum, a data set behind a login, label maps to be made: each in one line."""
    world.hub.gated.add(WEIGHTS["siglip2-b16"].hub)
    ade = DATASETS["ade20k"]
    wrong = (replace(ade.archives[0], checksum="sha1:" + "0" * 40),)
    monkeypatch.setitem(DATASETS, "ade20k", replace(ade, archives=wrong))
    words = ["paper", "--only", "single,openclip-b16,siglip2-b16,voc20,ade20k,cityscapes,context59"]
    assert world.run(*words, "--limit", "1") == 1
    _, err = capsys.readouterr()
    _, data = world.report()
    reasons = {row["name"]: row["error"] for row in data["rows"]}
    assert [name for name, reason in reasons.items() if not reason] == ["voc20/openclip-b16-single"]
    assert reasons["voc20/siglip2-b16-single"] == (
        "cannot download timm/ViT-B-16-SigLIP2-512: it is gated; accept its licence at "
        "https://huggingface.co/timm/ViT-B-16-SigLIP2-512 with your account there, and run 'hf auth login'."
    )
    assert "has the sha1" in reasons["ade20k/openclip-b16-single"]
    assert "ADEChallengeData2016.zip.wrong" in reasons["ade20k/openclip-b16-single"]
    assert "make an account at https://www.cityscapes-dataset.com" in reasons["cityscapes/openclip-b16-single"]
    assert "tools/dataset_converters/pascal_context.py DATA/VOCdevkit" in reasons["context59/openclip-b16-single"]
    assert "spar: error: siglip2-b16: cannot download" in err

    if not mended:
        return
    # What was missing is put where the messages said, and the same command does the rest.
    world.hub.gated.clear()
    monkeypatch.setitem(DATASETS, "ade20k", ade)
    for name in ("leftImg8bit_trainvaltest.zip", "gtFine_trainvaltest.zip"):
        (world.folder / "downloads" / name).write_bytes(world.server.files[f"/{name}"])
    context = world.folder / "data/VOCdevkit/VOC2010"
    for name in ("2007_000001", "2007_000002"):
        write_picture(context / f"SegmentationClassContext/{name}.png", np.ones((40, 60), np.uint8))
    (context / "ImageSets/SegmentationContext").mkdir(parents=True)
    (context / "ImageSets/SegmentationContext/val.txt").write_text("2007_000001\n2007_000002\n")
    assert world.run(*words[:2], "single,openclip-b16,ade20k,cityscapes,context59", "--limit", "1") == 0


def test_a_disk_too_small(world, capsys, monkeypatch):
    usage = shutil.disk_usage(world.folder.parent)._replace(free=100)
    monkeypatch.setattr(spar_hf.files.shutil, "disk_usage", lambda place: usage)
    assert world.run("paper", "--only", "voc20,openclip-b16,single") == 1
    _, err = capsys.readouterr()
    assert "its disk has 0.00 GB free. Free some space, choose another folder, or give another --root" in err
    assert not list(world.folder.rglob("*.tar")) and "not run" in json.dumps(world.report()[1])


def test_mistakes(world, capsys, monkeypatch):
    for words, said in (
        (["papers"], "there is no part 'papers'; choose one of paper, methods, speed. Did you mean 'paper'?"),
        (["paper", "--only", "voc"], "there is no row 'voc'"),
        (["paper", "--limit", "0"], "give a whole number, at least 1"),
    ):
        assert world.run(*words) == 2
        assert said in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world.run("paper") == 2
    assert "leave 'accelerate launch' out and give --processes N" in capsys.readouterr().err


def test_a_second_one_in_the_same_folder_waits_outside(world, capsys):
    from filelock import FileLock

    world.folder.mkdir()
    with FileLock(world.folder / ".lock"):
        assert world.run("paper", "--only", "voc20,openclip-b16,single") == 2
    assert f"another spar reproduce is at work in {world.folder}" in capsys.readouterr().err


def test_the_pull_request_is_one_command(tmp_path, monkeypatch):
    """It is run, in a real clone; only `gh` is a stand-in that writes down what it was told."""
    report = tmp_path / "root" / "paper" / "reproduction.md"
    report.parent.mkdir(parents=True)
    facts = {"date": "2026-01-02", "device": "NVIDIA H100 80GB HBM3 float32", "part": "paper"}
    report.write_text("# Reproduction\n")
    report.with_suffix(".json").write_text(json.dumps(facts))
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/gh").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/told\n')
    (tmp_path / "bin/gh").chmod(0o755)
    clone = tmp_path / "clone"
    environment = {**os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    for name in ("AUTHOR", "COMMITTER"):
        environment |= {f"GIT_{name}_NAME": "a", f"GIT_{name}_EMAIL": "a@example.org"}

    def shell(command: str) -> str:
        done = subprocess.run(command, shell=True, cwd=clone, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    clone.mkdir()
    shell("git init --quiet . && git commit --quiet --allow-empty --message start")
    shell(pull_request(report))
    name = "paper-2026-01-02-nvidia-h100-80gb-hbm3-float32"
    assert shell("git show --name-only --format=%s HEAD").split("\n\n")[1].split() == [
        f"benchmarks/results/reproductions/{name}.json", f"benchmarks/results/reproductions/{name}.md"
    ]  # fmt: skip
    assert shell("git branch --show-current").strip() == f"reproduction-{name}"
    assert (tmp_path / "told").read_text().strip() == "pr create --fill"


# ---------------------------------------------------------------------------------------------------- slow


@pytest.mark.slow
def test_all_of_the_paper_in_processes_of_their_own(world, capfd, clip_tokenizer, monkeypatch):
    """All three networks, SPAR's files as Lightning left them; each row in two real processes."""
    monkeypatch.setattr(compare, "run_aside", RUN_ASIDE)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "src"))
    size = len(clip_tokenizer)
    sources = {"openclip-b16": open_clip_vit(size), "siglip2-b16": timm_siglip(size)}
    sources["dinov3txt-l16"] = {**dinov3_backbone(prefix="visual_model.backbone."), **dinotxt_rest(size)}
    by_hand(world, "dinov3txt-l16", backbone=dinov3_backbone(), rest=dinotxt_rest(size))
    for name, weights in sources.items():
        state = {f"segmentor.net.model.{key}": weight for key, weight in weights.items()}
        by_hand(world, f"spar-{name}", checkpoint={"state_dict": state, "epoch": 9})
    words = [
        "paper",
        "--only",
        "voc20,openclip-b16,siglip2-b16,dinov3txt-l16,single,reach,spar,stride-56",
        "--limit",
        "1",
    ]
    assert world.run(*words, "--processes", "2") == 0
    _, data = world.report()
    assert len(data["rows"]) == 12 and not any(row["error"] for row in data["rows"])
    ours = {row["name"].partition("/")[2]: row["ours"] for row in data["rows"]}
    for name in sources:
        assert ours[f"{name}-single"] == ours[f"{name}-spar"]


@pytest.mark.slow
def test_speed_needs_no_data(world, capsys):
    assert world.run("speed", "--only", "openclip-b16,single,stride-56", "--limit", "1") == 0
    page, data = world.report("speed")
    assert [row["setting"] for row in data["times"]] == ["stride-56"] and data["times"][0]["times"] > 1
    assert world.server.asked == [] and "## Times" in page


RUN_ASIDE = compare.run_aside
