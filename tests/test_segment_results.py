"""`spar segment` with vocabularies from files, thresholds of each class, and every format at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image
from pycocotools.coco import COCO
from rasterio.features import rasterize
from shapely.geometry import shape

import spar_hf
from spar_cli import result_options
from spar_cli.main import main
from spar_hf import Labels, OpenVocabularySegmentationPipeline
from spar_hf.outputs import FORMATS
from spar_hf.outputs.options import ResultOptions
from spar_hf.visualize import colours_of, overlay, palette

CSV = 'id,name,synonyms,colour,threshold\n7,road,,#804080,\n26,car,"automobile, house",navy,0.5\n23,sky,,,\n'


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """An empty working folder with two pictures of one size and a file of classes."""
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("a", "b")):
        noise = np.random.default_rng(seed).normal(128, 80, (90, 150, 3)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noise).save(f"{name}.png")
    Path("classes.csv").write_text(CSV, encoding="utf-8")
    return tmp_path


@pytest.mark.parametrize("suffix", [".csv", ".json"])
def test_labels_of_a_file_have_ids_colours_and_thresholds(tmp_path, suffix):
    path = tmp_path / f"classes{suffix}"
    rows = [
        {"id": 7, "name": "road", "colour": [128, 64, 128]},
        {"id": "26", "name": "car", "synonyms": ["automobile", "house"], "colour": "navy", "threshold": 0.5},
        {"id": 23, "name": "sky"},
    ]
    path.write_text(CSV if suffix == ".csv" else json.dumps(rows), encoding="utf-8")
    labels = Labels.read(path)
    assert labels.class_names == ("road", "car", "sky") and labels.written_ids == (7, 26, 23)
    assert labels.classes == (("road",), ("car", "automobile", "house"), ("sky",))
    assert labels.colours == ((128, 64, 128), (0, 0, 128), None)
    assert colours_of(labels).tolist() == [[128, 64, 128], [0, 0, 128], palette(3)[2].tolist()]
    assert labels.least_probabilities(None) == (0.0, 0.5, 0.0) and labels.least_probabilities(0.2) == (0.2, 0.5, 0.2)
    assert Labels.parse("a; b").written_ids == (0, 1) and Labels.parse("a; b").least_probabilities(0.2) == 0.2


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": 70000}, "label 1's id is 70000; give a whole number from 0 to 65534"),
        ({"id": -1}, "label 1's id is -1"),
        ({"id": True}, "label 1's id is True"),
        ({"id": 1}, "label 2 has no id and others have; give each class an id, or none"),
        ({"colour": "blau"}, "label 1's colour is 'blau'; give one such as '#d55e00'"),
        ({"colour": [1, 2]}, r"label 1's colour is \[1, 2\]"),
        ({"colour": [1, 2, 256]}, r"label 1's colour is \[1, 2, 256\]"),
        ({"threshold": "1.5"}, "label 1's threshold is '1.5'; give a probability from 0 to 1"),
        ({"threshold": float("nan")}, "label 1's threshold is nan"),
        ({"names": ["x"], "synonyms": ["y"]}, "label 1 has names and synonyms"),
        ({"synonyms": ["y", ""]}, "label 1 is empty in"),
    ],
)
def test_mistakes_in_a_file_of_labels(row, message):
    with pytest.raises(ValueError, match=message):
        Labels.parse([{"name": "a", **row}, {"name": "b"}])


def test_two_classes_with_one_id():
    with pytest.raises(ValueError, match="two classes have the id 3"):
        Labels.parse([{"name": "a", "id": 3}, {"name": "b", "id": 3}])


@pytest.mark.parametrize("against", [None, ["grass"]])
def test_thresholds_of_classes_and_likeliest_classes_are_those_of_all_probabilities(model, spar_processor, against):
    segment = OpenVocabularySegmentationPipeline(model=model, processor=spar_processor)
    picture = Image.fromarray(np.random.default_rng(3).integers(0, 255, (70, 130, 3), np.uint8))
    labels = [{"name": "road"}, {"name": "car", "names": ["car", "house"], "threshold": 0.6}, {"name": "sky"}]
    plain = segment(picture, candidate_labels=["road", ["car", "house"], "sky"], against=against)
    asked = {"candidate_labels": labels, "against": against, "background_threshold": 0.4}
    found = segment(picture, **asked, return_probabilities=True, return_top_k=9)
    winner, probabilities = plain["segmentation"], found["probabilities"].astype(np.float32)
    of_winner = np.take_along_axis(probabilities, np.maximum(winner, 0)[None].astype(np.int64), 0)[0]
    limits = np.array([0.4, 0.6, 0.4])[winner]
    certain = np.abs(of_winner - limits) > 1e-3  # fp16
    expected = np.where(of_winner < limits, -1, winner)
    assert (found["segmentation"] == expected)[certain].all()
    assert {-1, 0, 1, 2} >= set(np.unique(found["segmentation"])) and (expected != winner).any()

    assert found["top_classes"].shape == (3, 70, 130)  # there are no more
    assert (np.diff(found["top_probabilities"], axis=0) <= 0).all()
    in_order = np.take_along_axis(probabilities, found["top_classes"].astype(np.int64), 0)
    np.testing.assert_allclose(in_order, found["top_probabilities"], atol=1e-3)
    with pytest.raises(ValueError, match="return_top_k is 0; give how many classes"):
        segment(picture, candidate_labels=labels, return_top_k=0)
    with pytest.raises(ValueError, match="background_threshold has 2 numbers for 3 classes"):
        segment(picture, candidate_labels=["a", "b", "c"], background_threshold=[0.1, 0.2])


def test_every_format_at_once(here, capsys, model_folder):
    words = ["segment", "a.png", "b.png", "--labels", "@classes.csv", "--model", model_folder, "--json", "r.json"]
    formats = [word for name in FORMATS for word in ("--format", name)]
    assert main([*words, *formats, "--instances", "--min-area", "5", "--fill-holes", "5", "--top-k", "2"]) == 0
    out, err = capsys.readouterr()
    assert err == "" and "  geojson        spar-output/a.geojson" in out

    model, processor = spar_hf.load(model_folder)
    segment = OpenVocabularySegmentationPipeline(model=model, processor=processor)
    data = COCO("spar-output/coco-instances.json")
    for image_id, (stem, image) in enumerate(
        zip("ab", json.loads(Path("r.json").read_text())["images"], strict=True), 1
    ):
        expected = segment(f"{stem}.png", candidate_labels=Labels.read("classes.csv"), return_scores=True).cleaned(
            5, 5
        )
        ids = np.array([7, 26, 23, 255])[expected["segmentation"]]
        assert (np.asarray(Image.open(f"spar-output/{stem}-labels.png")) == ids).all()
        assert data.loadImgs(image_id)[0]["file_name"] == f"{stem}.png"
        assert len(data.getAnnIds(imgIds=image_id)) == len(expected.to_polygons(instances=True))
        assert np.load(f"spar-output/{stem}-scores.npz")["ids"].shape == (2, 90, 150)
        assert [entry["id"] for entry in image["classes"]] == [7, 26, 23]
        for entry in image["classes"]:
            assert entry["area_fraction"] == pytest.approx((ids == entry["id"]).mean(), abs=1e-6)
        assert all(Path(path).is_file() for path in image["files"].values())
        assert {"overlay", "label_map", "panoptic", "geojson", "geotiff", "yolo"} <= image["files"].keys()


def test_the_overlay_shows_the_classes_own_colours():
    labels = Labels.parse([{"name": "a", "colour": "#010203"}, {"name": "b"}])
    picture = overlay(Image.new("RGB", (600, 500), "white"), np.zeros((500, 600), np.int32), labels, opacity=1.0)
    assert picture.getpixel((300, 250)) == (1, 2, 3)


def test_other_and_thresholds_of_classes_on_the_line(here, capsys, model_folder):
    words = ["segment", "a.png", "--labels", "road; car; sky", "--model", model_folder, "--format", "palette"]
    for name, options in {
        "other": ["--other", "0.5"],
        "same": ["--background-threshold", "0.5"],
        "each": ["--class-threshold", "road=0.5", "--class-threshold", "car=0.5", "--class-threshold", "sky=0.5"],
        "none": [],
    }.items():
        assert main([*words, "--output", name, *options]) == 0
    maps = {name: np.asarray(Image.open(f"{name}/a-labels.png")) for name in ("other", "same", "each", "none")}
    assert (maps["other"] == maps["same"]).all() and (maps["other"] == maps["each"]).all()
    assert (maps["other"] == 255).any() and not (maps["none"] == 255).any()
    capsys.readouterr()
    assert main([*words, "--class-threshold", "rod=0.5"]) == 2
    assert "there is no class 'rod'; choose one of road, car, sky. Did you mean 'road'" in capsys.readouterr().err
    assert main([*words, "--class-threshold", "road=2"]) == 2
    assert "class 'road''s threshold is '2'; give a probability from 0 to 1" in capsys.readouterr().err


def test_the_command_knows_the_formats_and_mistakes(here, capsys, model_folder):
    assert tuple(FORMATS) == result_options.FORMATS
    words = ["segment", "a.png", "--labels", "a", "--model", model_folder]
    for options, message in (
        (["--format", "coko"], "there is no format 'coko'; choose one of png, palette, coco"),
        (["--top-k", "0"], "it is '0'; give a whole number, at least 1"),
    ):
        assert main([*words, *options]) == 2
        assert message in capsys.readouterr().err
    assert main([*words, "--format", "coco"]) == 0
    capsys.readouterr()
    assert main(["segment", "a.png", "--labels", "b", "--model", model_folder, "--format", "coco"]) == 2
    assert "spar-output holds results in coco of other classes" in capsys.readouterr().err


def test_what_formats_need_is_asked_of_the_pipeline():
    assert ResultOptions().of_pipeline() == {}
    assert ResultOptions(scores=True).of_pipeline() == {"return_scores": True}
    assert ResultOptions(("coco", "npz"), top_k=3).of_pipeline() == {"return_scores": True, "return_top_k": 3}


def geotiff(path: str, size_hw: tuple[int, int]) -> None:
    """A raster of random colours with a place on Earth."""
    values = np.random.default_rng(5).integers(0, 255, (3, *size_hw), np.uint8)
    place = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_600_000)
    profile = {"driver": "GTiff", "count": 3, "dtype": "uint8", "crs": "EPSG:32633", "transform": place}
    with rasterio.open(path, "w", height=size_hw[0], width=size_hw[1], **profile) as raster:
        raster.write(values)


def test_rasters_have_the_ids_colours_and_thresholds_of_a_saved_vocabulary(here, capsys, model_folder):
    geotiff("scene.tif", (96, 160))
    assert main(["labels", "--labels", "@classes.csv", "--model", model_folder, "--save", "v.safetensors"]) == 0
    model = ["--model", model_folder, "--json", "r.json"]
    assert main(["segment", "scene.tif", "--labels", "@v.safetensors", *model, "--class-threshold", "road=0.9"]) == 0
    with rasterio.open("spar-output/scene-labels.tif") as raster:
        values, colours = raster.read(1), raster.colormap(1)
        assert [row["id"] for row in json.loads(raster.tags(1)["classes"])] == [7, 26, 23]
    assert set(np.unique(values)) <= {7, 26, 23, 255}
    assert (colours[26], colours[7]) == ((0, 0, 128, 255), (128, 64, 128, 255))
    (record,) = json.loads(Path("r.json").read_text())["images"]
    assert {entry["id"]: entry["area_fraction"] for entry in record["classes"]} == {
        number: pytest.approx((values == number).mean()) for number in (7, 26, 23)
    }
    # The same as a picture, whose label map keeps the place.
    words = ["segment", "scene.tif", "--labels", "@v.safetensors", *model, "--class-threshold", "road=0.9"]
    assert main([*words, "--format", "geotiff", "--format", "geojson", "--output", "picture"]) == 0
    with rasterio.open("picture/scene-labels.tif") as raster:
        assert (raster.read(1) == values).mean() > 0.99 and raster.crs.to_epsg() == 32633
        place = raster.transform
    content = json.loads(Path("picture/scene.geojson").read_text())
    assert content["crs"]["properties"]["name"].endswith("EPSG::32633")
    drawn = [(shape(feature["geometry"]), feature["properties"]["id"]) for feature in content["features"]]
    with rasterio.open("picture/scene-labels.tif") as raster:
        assert (rasterize(drawn, out_shape=(96, 160), fill=255, transform=place) == raster.read(1)).all()
    capsys.readouterr()
    assert main([*words, "--min-area", "9"]) == 2
    assert "--min-area does not go with a raster: a component may reach over windows" in capsys.readouterr().err
