"""Masks of one's own and superpixels, from the command line to the label map and to a teacher."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_cli import LABELS, fails, here  # noqa: F401
from test_masks import runs_of

from spar_cli.compare import command_for
from spar_cli.main import main
from spar_hf import build_segmenter, load
from spar_hf.networks.masks import MaskFolder, Regions
from spar_hf.segmentation_spar import label_map


def region_map() -> np.ndarray:
    """Of street.png, 150 x 90 pixels."""
    ids = np.zeros((90, 150), dtype=np.uint8)
    ids[:, :60], ids[:50, 60:100], ids[60:, 100:] = 3, 200, 7
    return ids


def as_rle(ids: np.ndarray) -> str:
    numbers = [number for number in np.unique(ids) if number]
    return json.dumps([{"segmentation": {"size": ids.shape, "counts": runs_of(ids == n)}} for n in numbers])


def labels_by_hand(model_folder: str, path: str, regions: Regions, method: str = "textregion") -> np.ndarray:
    """The label map of a picture at its own size, with regions given in Python."""
    model, processor = load(model_folder)
    pixels = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")["pixel_values"]
    drawn = regions.at((pixels.shape[2], pixels.shape[3]))
    segmenter = build_segmenter(model, processor, method, networks={"regions": lambda values, config: drawn})
    encoded = segmenter.encode_labels(LABELS)
    (maps,) = segmenter(pixels, encoded)
    return label_map(maps.at(regions.size_hw), torch.tensor(encoded.labels.class_ids)).numpy()


def test_masks_reach_the_label_map_by_the_picture_s_name(here, capsys, model_folder):  # noqa: F811
    ids = region_map()
    Path("masks").mkdir()
    Image.fromarray(ids).save("masks/street.png")
    Image.open("street.png").transpose(Image.Transpose.FLIP_LEFT_RIGHT).save("mirrored.png")
    Path("masks/mirrored.json").write_text(as_rle(ids[:, ::-1]))
    words = ["segment", "street.png", "mirrored.png", "--labels", LABELS, "--model", model_folder]
    words += ["--method", "textregion"]
    assert main([*words, "--masks", "masks", "--json", "out.json"]) == 0
    facts = json.loads(Path("out.json").read_text())
    assert facts["networks"] == {"regions": "masks in masks"} and facts["failed"] == []
    rle = Regions(drawn=torch.stack([torch.from_numpy(ids[:, ::-1] == n) for n in (3, 7, 200)]))
    for name, regions in (("street", Regions(ids=torch.from_numpy(ids.astype(np.int64)))), ("mirrored", rle)):
        found = np.array(Image.open(f"spar-output/{name}-labels.png"))
        expected = labels_by_hand(model_folder, f"{name}.png", regions)
        assert (found != expected).mean() < 1e-3, name
    by_masks = np.array(Image.open("spar-output/street-labels.png"))
    assert main([*words, "--network", "regions=slic", "--json", "out.json"]) == 0
    assert json.loads(Path("out.json").read_text())["networks"] == {"regions": "slic"}
    assert (np.array(Image.open("spar-output/street-labels.png")) != by_masks).any()


def test_pictures_without_fitting_masks_fail_alone(here, capsys, model_folder):  # noqa: F811
    Path("masks").mkdir()
    for name in ("other", "small"):
        Image.open("street.png").save(f"{name}.png")
    Image.fromarray(region_map()).save("masks/street.png")
    Image.fromarray(region_map()[1:]).save("masks/small.png")
    words = ["--labels", LABELS, "--model", model_folder, "--method", "textregion", "--masks", "masks"]
    assert main(["segment", "street.png", "other.png", "small.png", *words]) == 1
    _, err = capsys.readouterr()
    assert "other.png has no masks: neither masks/other.png nor masks/other.json is there" in err
    assert "masks/small.png is 89x150 px (height x width) and its picture 90x150" in err
    assert Path("spar-output/street-labels.png").exists() and not Path("spar-output/other-labels.png").exists()
    assert "the masks of masks are of one whole picture, and other pixels ask for them too" in fails(
        capsys, "segment", "street.png", *words, "--window-px", "native"
    )
    words = words[:4]
    method = ["--method", "textregion"]
    for more, message in (
        (["--masks", "masks"], r"the model reads no regions, which masks is for"),
        (["--method", "naclip", "--masks", "masks"], "method 'naclip' reads no regions, which masks is for; leave it"),
        ([*method, "--masks", "nowhere"], "--masks nowhere is no folder; give one that holds NAME.png or NAME.json"),
        ([*method, "--masks", "masks", "--network", "regions=slic"], "from masks and from --network regions; give"),
    ):
        assert message in fails(capsys, "segment", "street.png", *words, *more)


def test_evaluate_tells_of_each_image(here, capsys, model_folder):  # noqa: F811
    for folder in ("photos", "truth", "regions"):
        Path(folder).mkdir()
    for number in range(3):
        Image.open("street.png").rotate(90 * number).save(f"photos/{number}.png")
        Image.fromarray((region_map() > 0).astype(np.uint8)).save(f"truth/{number}.png")
        Path(f"regions/{number}.json").write_text(as_rle(region_map()) if number else "[]")
    Path("classes.txt").write_text("sky\ncar, automobile\n")
    words = ["evaluate", "--images", "photos", "--masks", "truth", "--classes", "classes.txt", "--short-side", "90"]
    words += ["--model", model_folder, "--method", "textregion", "--region-masks", "regions"]
    state = ["--state", "state", "--json", "score.json"]
    assert main([*words, *state]) == 0
    result = json.loads(Path("score.json").read_text())
    assert result["num_images"] == 3 and result["record"]["networks"] == {"regions": "masks in regions"}
    capsys.readouterr()
    Path("regions/1.json").write_text("[]")  # other masks make another evaluation
    assert "state was written by another evaluation: segmenter changed" in fails(capsys, *words, *state)
    # Of many methods, those that read regions get them.
    args = SimpleNamespace(
        argv=words[1:], network=[], settings=[], refine=[], masks_of_regions=Path("regions"), json_dir=Path("all")
    )
    for name, refine, given in (("clip", [], 0), ("textregion", [], 1), ("clip", ["mask-vote"], 1)):
        args.refine = refine
        assert command_for(name, args).count("--region-masks") == given


@torch.no_grad()
def test_masks_are_of_the_whole_picture_they_were_chosen_for(tmp_path, pixels, make_vision):
    config, images = make_vision(num_hidden_layers=2).config, pixels((64, 96), batch=2)
    Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8)).save(tmp_path / "a.png")
    folder = MaskFolder(tmp_path)
    folder.select("a.png", (6, 8))
    first = folder(images[:1], config)
    assert torch.equal(folder(images[:1].clone(), config).map, first.map)
    with pytest.raises(ValueError, match="are of one whole picture, and other pixels ask for them too"):
        folder(images[1:], config)
    folder.select("a.png", (6, 8))
    assert torch.equal(folder(images[1:], config).map, first.map)
    before = repr(folder)
    assert before == repr(MaskFolder(tmp_path)) and str(folder) == f"masks in {tmp_path}"
    (tmp_path / "b.json").write_text("[]")
    assert repr(folder) != before


@torch.no_grad()
def test_a_method_of_regions_teaches(model_folder, pixels):
    from spar_hf.distillation.specs import StudentSpec, TeacherSpec
    from spar_hf.distillation.teacher import build_teacher
    from spar_hf.prompts_spar import Labels

    spec = TeacherSpec(
        label_method="textregion", labels=Labels.parse(LABELS), networks={"regions": "slic"}, dtype="float32"
    )
    teacher, described = build_teacher(spec, StudentSpec(model_folder), 16)
    assert described["networks"] == {"regions": "slic"}
    features = teacher(pixels((96, 112), batch=2)).patch_embeds
    assert features.shape == (2, 6, 7, 24) and features.isfinite().all()
