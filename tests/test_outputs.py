"""Results as files and objects of other libraries, each read back by that library."""

from __future__ import annotations

import errno
import importlib
import json
import multiprocessing
import shutil
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import rasterio
from PIL import Image, ImageDraw
from pycocotools import mask as coco_masks
from pycocotools.coco import COCO
from rasterio.features import rasterize
from safetensors import safe_open
from safetensors.numpy import load_file
from shapely.geometry import Polygon, shape
from transformers.image_transforms import rgb_to_id

from spar_hf import results_spar
from spar_hf.outputs import FORMATS, ResultOptions, Writer
from spar_hf.outputs.polygons import area_of, polygons
from spar_hf.outputs.regions import Regions, clean, components
from spar_hf.outputs.rle import as_text, run_lengths
from spar_hf.prompts_spar import Labels
from spar_hf.results_spar import SegmentationResult, segments_of
from spar_hf.visualize import label_map_image, palette

LABELS = Labels.parse(
    [
        {"name": "road", "id": 7, "colour": "#804080"},
        {"name": "car", "synonyms": ["automobile"], "id": 26, "colour": [0, 0, 142]},
        {"name": "ciel d'été", "id": 23},
    ]
)
SIZES_HW = [(1, 1), (1, 9), (40, 31), (32, 32), (7, 90)]


def blocks(size_hw: tuple[int, int], seed: int = 0, side_px: int = 3, num_classes: int = 3) -> np.ndarray:
    """A label map of random squares, some without a class, with single pixels strewn over them."""
    generator = np.random.default_rng(seed)
    height, width = size_hw
    coarse = generator.integers(-1, num_classes, (-(-height // side_px), -(-width // side_px)))
    ids = coarse.repeat(side_px, 0).repeat(side_px, 1)[:height, :width]
    strewn = generator.random(size_hw) < min(0.05, 60 / (height * width))
    return np.where(strewn, generator.integers(-1, num_classes, size_hw), ids).astype(np.int32)


def result_of(segmentation: np.ndarray, labels: Labels = LABELS, seed: int = 1) -> SegmentationResult:
    generator = np.random.default_rng(seed)
    scores = generator.random(segmentation.shape, np.float32)
    ranked = np.argsort(generator.random((len(labels), *segmentation.shape)), axis=0).astype(np.int32)
    return SegmentationResult(
        segmentation=segmentation,
        segments=segments_of(segmentation, labels.class_names, scores),
        labels=labels,
        size_hw=segmentation.shape,
        grid_hw=(2, 2),
        scores=scores,
        top_classes=ranked[:2],
        top_probabilities=-np.sort(-generator.random((2, *segmentation.shape)), axis=0).astype(np.float16),
    )


def picture_of(size_hw: tuple[int, int]) -> Image.Image:
    return Image.fromarray(np.random.default_rng(2).integers(0, 255, (*size_hw, 3), np.uint8))


def written(folder: Path, result: SegmentationResult, *formats: str, source: Path | None = None, **asked) -> dict:
    with Writer(folder, result["labels"], ResultOptions(formats, **asked)) as writer:
        return writer.add("one", picture_of(result["segmentation"].shape), result, source)


def plain_components(segmentation: np.ndarray) -> np.ndarray:
    """Flood filling, pixel by pixel: numbers of components, -1 where there is no class."""
    numbers = np.full(segmentation.shape, -1)
    for start in np.ndindex(segmentation.shape):
        if segmentation[start] < 0 or numbers[start] >= 0:
            continue
        left, number = [start], numbers.max() + 1
        while left:
            y, x = left.pop()
            inside = 0 <= y < numbers.shape[0] and 0 <= x < numbers.shape[1]
            if inside and numbers[y, x] < 0 and segmentation[y, x] == segmentation[start]:
                numbers[y, x] = number
                left += [(y + 1, x), (y - 1, x), (y, x + 1), (y, x - 1)]
    return numbers


# --- regions and outlines --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size_hw", SIZES_HW)
def test_components_are_those_of_flood_filling(size_hw):
    segmentation = blocks(size_hw)
    numbers, classes = components(segmentation)
    expected = plain_components(segmentation)
    pairs = set(zip(numbers.ravel().tolist(), expected.ravel().tolist(), strict=True))
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs})  # the same parts by other numbers
    inside = numbers >= 0
    assert (classes[numbers[inside]] == segmentation[inside]).all() and (segmentation[~inside] == -1).all()


@pytest.mark.parametrize("size_hw", SIZES_HW)
@pytest.mark.parametrize("side_px", [1, 3])
def test_outlines_are_valid_and_give_the_regions_back(size_hw, side_px):
    numbers, classes = components(blocks(size_hw, 3, side_px))
    traced = polygons(numbers)
    assert sorted(traced) == list(range(len(classes)))
    for number, rings in traced.items():
        polygon = Polygon(rings[0], rings[1:])
        assert polygon.is_valid
        assert polygon.area == area_of(rings) == (numbers == number).sum()
        corners = np.diff(np.vstack([rings[0], rings[0][:2]]), axis=0)
        assert (np.sign(corners[1:]) != np.sign(corners[:-1])).any(1).all()  # no corner on a straight line
    if traced:
        drawn = [(Polygon(rings[0], rings[1:]), number + 1) for number, rings in traced.items()]
        assert (rasterize(drawn, out_shape=size_hw, dtype="int32") - 1 == numbers).all()


@pytest.mark.parametrize("size_hw", SIZES_HW)
def test_run_lengths_are_those_of_pycocotools(size_hw):
    for mask in (blocks(size_hw, 4, 1) == 0, blocks(size_hw, 5) == 1, np.ones(size_hw, bool), np.zeros(size_hw, bool)):
        text = as_text(run_lengths(mask, 0, 0, *size_hw))
        assert text.encode() == coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))["counts"]


def test_long_runs_and_parts_of_a_picture():
    part = blocks((20, 30), 6) == 0
    whole = np.zeros((3000, 5000), bool)
    whole[100:120, 4000:4030] = part
    text = as_text(run_lengths(part, 100, 4000, 3000, 5000))
    assert (coco_masks.decode({"size": [3000, 5000], "counts": text.encode()}) == whole).all()


def test_small_components_go_and_holes_are_filled():
    segmentation = np.zeros((12, 16), np.int32)
    segmentation[2:8, 2:8] = 1
    segmentation[4:6, 4:6] = 2  # 4 pixels within 36
    segmentation[10, 10] = 2
    segmentation[0, 15] = 1  # a corner of the picture is no hole
    expected = segmentation.copy()
    expected[10, 10] = expected[0, 15] = -1
    assert (clean(segmentation, min_area=2) == expected).all()
    expected = segmentation.copy()
    expected[4:6, 4:6] = 1
    expected[10, 10] = 0
    assert (clean(segmentation, fill_holes=4) == expected).all()
    expected[2:8, 2:8] = 0  # now the hole of 36 is in one of class 0, which is the outer one
    assert (clean(segmentation, fill_holes=36) == expected).all()
    assert (clean(segmentation, fill_holes=36, background=0)[3:5, 3:5] == 1).all()  # the background keeps its holes
    assert (clean(segmentation, 2, 1)[10, 10], clean(segmentation, 2, 1)[0, 15]) == (0, -1)


def plain_hole_filling(segmentation: np.ndarray, most: int) -> np.ndarray:
    """Each class's holes by flood filling what is not the class, by corners too; the largest that fits wins."""
    out, size_of = segmentation.copy(), np.zeros(segmentation.shape)
    height, width = segmentation.shape
    for index in range(segmentation.max() + 1):
        seen = segmentation == index
        for start in np.ndindex(segmentation.shape):
            left, hole, enclosed = [start], [], True
            while left:
                y, x = left.pop()
                if not (0 <= y < height and 0 <= x < width):
                    enclosed = False
                elif not seen[y, x]:
                    seen[y, x] = True
                    hole.append((y, x))
                    left += [(y + i, x + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
            for place in hole:
                if enclosed and len(hole) <= most and len(hole) > size_of[place]:
                    out[place], size_of[place] = index, len(hole)
    return out


@pytest.mark.parametrize("size_hw", SIZES_HW)
@pytest.mark.parametrize("most", [1, 5, 60])
def test_hole_filling_is_that_of_flood_filling(size_hw, most):
    segmentation = blocks(size_hw, 7, 2, 2)
    assert (clean(segmentation, fill_holes=most) == plain_hole_filling(segmentation, most)).all()


def test_scores_and_boxes_of_regions():
    result = result_of(blocks((30, 44)))
    for instances in (False, True):
        regions = Regions(result, instances)
        for region in regions:
            mask = regions.numbers == region.number
            rows, columns = mask.nonzero()
            assert region.area == mask.sum() and region.score == pytest.approx(result["scores"][mask].mean(), abs=1e-6)
            assert region.xyxy == (columns.min(), rows.min(), columns.max() + 1, rows.max() + 1)
            assert (result["segmentation"][mask] == region.class_index).all()
        assert (regions.numbers >= 0).sum() == sum(region.area for region in regions)


# --- objects of other libraries --------------------------------------------------------------------------------


@pytest.mark.parametrize("instances", [False, True])
def test_supervision_reads_a_result(instances):
    supervision = pytest.importorskip("supervision")
    result = result_of(blocks((30, 44)))
    found = result.to_supervision(instances)
    assert isinstance(found, supervision.Detections)
    assert instances or len(found) == 3
    for box, mask, score, class_id, _, data in found:
        index = LABELS.written_ids.index(class_id)
        assert data["class_name"] == LABELS.class_names[index]
        assert (result["segmentation"][mask] == index).all()
        assert score == pytest.approx(result["scores"][mask].mean(), abs=1e-5)
        rows, columns = mask.nonzero()
        assert box.tolist() == [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
    assert (found.mask.any(0) == (result["segmentation"] >= 0)).all()
    picture = np.asarray(picture_of((30, 44))).copy()
    assert (supervision.MaskAnnotator().annotate(picture.copy(), found) != picture).any()

    empty = result_of(np.full((4, 5), -1, np.int32)).to_supervision()
    assert len(empty) == 0
    del result["scores"]
    assert result.to_supervision().confidence is None


def test_coco_and_polygons_of_a_result():
    result = result_of(blocks((30, 44)))
    data = COCO()
    data.dataset = json.loads(json.dumps(result.to_coco(instances=True, image_id=5, file_name="a.jpg")))
    data.createIndex()
    drawn = np.full((30, 44), -1)
    for entry in data.loadAnns(data.getAnnIds(imgIds=5)):
        drawn[data.annToMask(entry) > 0] = LABELS.written_ids.index(entry["category_id"])
    assert (drawn == result["segmentation"]).all()

    for found in (result.to_polygons(), result.to_polygons(instances=True)):
        drawn[:] = -1
        for region in found:
            index = LABELS.class_names.index(region["label"])
            assert region["id"] == LABELS.written_ids[index]
            shapes = [Polygon(rings[0], rings[1:]) for rings in region["polygons"]]
            assert sum(polygon.area for polygon in shapes) == region["area"]
            drawn[rasterize(shapes, out_shape=drawn.shape) > 0] = index
        assert (drawn == result["segmentation"]).all()
    assert all(len(region["polygons"]) == 1 for region in result.to_polygons(instances=True))


def test_remote_code_converts_by_the_installed_package(tmp_path, monkeypatch):
    """transformers imports what ships with a model as a package of its own, which has no `outputs`."""
    (tmp_path / "remote_model").mkdir()
    (tmp_path / "remote_model/__init__.py").touch()
    shutil.copy(results_spar.__file__, tmp_path / "remote_model")
    monkeypatch.syspath_prepend(str(tmp_path))
    remote = importlib.import_module("remote_model.results_spar")
    result = remote.SegmentationResult(result_of(blocks((30, 44))))
    assert type(result.cleaned(4)) is remote.SegmentationResult
    assert sum(region["area"] for region in result.to_polygons()) == (result["segmentation"] >= 0).sum()

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name="spar_hf")

    monkeypatch.setattr(remote, "import_module", absent)
    with pytest.raises(ValueError, match=r"results are converted by the package spar_hf; run: pip install spar-hf"):
        result.to_coco()


def test_a_cleaned_result_is_whole():
    result = result_of(blocks((30, 44)))
    tidy = result.cleaned(min_area=4, fill_holes=9)
    assert isinstance(tidy, SegmentationResult) and (tidy["segmentation"] != result["segmentation"]).any()
    assert (tidy["segmentation"] == clean(result["segmentation"], 4, 9)).all()
    for segment in tidy["segments"]:
        assert segment["area_fraction"] == pytest.approx((tidy["segmentation"] == segment["id"]).mean())


# --- files -----------------------------------------------------------------------------------------------------


def test_pictures_have_the_ids_colours_and_names_of_the_labels(tmp_path):
    result = result_of(blocks((30, 44)))
    written(tmp_path, result, "palette")
    with Image.open(tmp_path / "one-labels.png") as picture:
        values, table = np.asarray(picture), json.loads(picture.text["classes"])
        colours = np.asarray(picture.convert("RGB"))
    assert [row["name"] for row in table] == ["road", "car", "ciel d'été"]
    assert [row["id"] for row in table] == [7, 26, 23]
    assert [row["colour"] for row in table[:2]] == ["#804080", "#00008e"]
    for index, row in enumerate(table):
        inside = result["segmentation"] == index
        assert (values[inside] == row["id"]).all()
        assert "#{:02x}{:02x}{:02x}".format(*colours[inside][0]) == row["colour"]
    assert (values[result["segmentation"] == -1] == 255).all()
    overlay = written(tmp_path, result, "png", scores=True)["files"]
    assert set(overlay) == {"overlay", "label_map", "scores"}


def test_ids_above_a_byte_make_a_picture_of_16_bits():
    labels = Labels.parse([{"name": "a", "id": 300}, {"name": "b", "id": 0, "colour": "red"}])
    picture = label_map_image(np.array([[0, 1, -1]], np.int32), labels)
    assert picture.mode == "I;16" and np.asarray(picture).tolist() == [[300, 0, 65535]]
    assert label_map_image(np.array([[0, 1, -1]])).getpalette()[:3] == palette(1)[0].tolist()


@pytest.mark.parametrize("instances", [False, True])
def test_pycocotools_and_transformers_read_coco(tmp_path, instances):
    results = {stem: result_of(blocks((30, 44), seed), seed=seed) for seed, stem in enumerate(("b", "a"))}
    with Writer(tmp_path, LABELS, ResultOptions(("coco",), instances=instances)) as writer:
        for stem, result in results.items():
            writer.add(stem, picture_of((30, 44)), result, f"photos/{stem}.jpg")
    data = COCO(tmp_path / "coco-instances.json")
    panoptic = json.loads((tmp_path / "coco-panoptic.json").read_text(encoding="utf-8"))
    assert panoptic["images"] == data.dataset["images"] and panoptic["categories"] == data.dataset["categories"]
    assert [image["file_name"] for image in data.loadImgs([1, 2])] == ["photos/a.jpg", "photos/b.jpg"]
    assert {entry["id"]: entry["name"] for entry in data.loadCats(data.getCatIds())} == {
        7: "road", 26: "car", 23: "ciel d'été"
    }  # fmt: skip
    for image_id, stem in ((1, "a"), (2, "b")):
        expected, drawn = results[stem]["segmentation"], np.full((30, 44), -1)
        for entry in data.loadAnns(data.getAnnIds(imgIds=image_id)):
            mask = data.annToMask(entry) > 0
            assert (mask.sum(), drawn[mask].max()) == (entry["area"], -1) and entry["id"] > 0
            assert entry["score"] == pytest.approx(results[stem]["scores"][mask].mean(), abs=1e-4)
            drawn[mask] = LABELS.written_ids.index(entry["category_id"])
        assert (drawn == expected).all()

        (entry,) = (entry for entry in panoptic["annotations"] if entry["image_id"] == image_id)
        numbers = rgb_to_id(np.asarray(Image.open(tmp_path / entry["file_name"])))
        drawn = np.full((30, 44), -1)
        for segment in entry["segments_info"]:
            assert (numbers == segment["id"]).sum() == segment["area"]
            drawn[numbers == segment["id"]] = LABELS.written_ids.index(segment["category_id"])
        assert (drawn == expected).all() and set(np.unique(numbers)) - {0} == {s["id"] for s in entry["segments_info"]}


def geotiff_source(path: Path, size_hw: tuple[int, int], crs: str | None, transform: rasterio.Affine) -> Path:
    with rasterio.open(
        path, "w", driver="GTiff", height=size_hw[0], width=size_hw[1], count=3, dtype="uint8", crs=crs,
        transform=transform,
    ) as raster:  # fmt: skip
        raster.write(np.moveaxis(np.asarray(picture_of(size_hw)), -1, 0))
    return path


NORTH_UP = rasterio.Affine(0.5, 0, 500_000, 0, -0.5, 4_600_000)
ROTATED = NORTH_UP @ rasterio.Affine.rotation(30)


@pytest.mark.parametrize("transform", [NORTH_UP, ROTATED], ids=["north-up", "rotated"])
@pytest.mark.parametrize("instances", [False, True])
def test_shapely_and_rasterio_read_geojson_in_the_rasters_coordinates(tmp_path, transform, instances):
    result = result_of(blocks((30, 44)))
    source = geotiff_source(tmp_path / "scene.tif", (30, 44), "EPSG:32633", transform)
    written(tmp_path, result, "geojson", source=source, instances=instances)
    content = json.loads((tmp_path / "one.geojson").read_text(encoding="utf-8"))
    assert content["crs"]["properties"]["name"] == "urn:ogc:def:crs:EPSG::32633"
    drawn = np.full((30, 44), -1)
    for feature in content["features"]:
        polygon, facts = shape(feature["geometry"]), feature["properties"]
        index = LABELS.class_names.index(facts["class"])
        assert polygon.is_valid and facts["id"] == LABELS.written_ids[index] and 0 <= facts["score"] <= 1
        assert facts["area"] == pytest.approx(polygon.area, rel=1e-6)
        outlines = polygon.geoms if polygon.geom_type == "MultiPolygon" else [polygon]
        assert all(part.exterior.is_ccw and not any(ring.is_ccw for ring in part.interiors) for part in outlines)
        drawn[rasterize([polygon], out_shape=drawn.shape, transform=transform) > 0] = index
    assert (drawn == result["segmentation"]).all()


def test_geojson_of_a_picture_without_a_place_is_in_pixels(tmp_path):
    result = result_of(blocks((30, 44)))
    Image.new("RGB", (44, 30)).save(tmp_path / "photo.jpg")
    written(tmp_path, result, "geojson", source=tmp_path / "photo.jpg")
    content = json.loads((tmp_path / "one.geojson").read_text(encoding="utf-8"))
    assert "crs" not in content
    drawn = [(shape(feature["geometry"]), feature["properties"]["id"]) for feature in content["features"]]
    ids = np.array([*LABELS.written_ids, 0])
    assert (rasterize(drawn, out_shape=(30, 44)) == ids[result["segmentation"]]).all()


@pytest.mark.parametrize("crs", ["EPSG:32633", "EPSG:4326", None])
@pytest.mark.parametrize("size_hw", [(30, 44), (260, 300)])
def test_rasterio_reads_the_geotiff(tmp_path, crs, size_hw):
    result = result_of(blocks(size_hw, side_px=20) if size_hw[0] > 256 else blocks(size_hw))
    source = geotiff_source(tmp_path / "scene.tif", size_hw, crs, ROTATED)
    written(tmp_path, result, "geotiff", "geojson", source=source)
    with rasterio.open(tmp_path / "one-labels.tif") as raster:
        values, colours = raster.read(1), raster.colormap(1)
        assert raster.crs == (None if crs is None else rasterio.crs.CRS.from_string(crs))
        assert raster.transform.almost_equals(ROTATED) and raster.nodata == 255
        assert [row["name"] for row in json.loads(raster.tags(1)["classes"])] == list(LABELS.class_names)
    assert (values == np.array([*LABELS.written_ids, 255])[result["segmentation"]]).all()
    assert (colours[7], colours[26]) == ((128, 64, 128, 255), (0, 0, 142, 255))
    named = json.loads((tmp_path / "one.geojson").read_text(encoding="utf-8")).get("crs")
    if crs == "EPSG:4326":
        assert named["properties"]["name"] == "urn:ogc:def:crs:OGC:1.3:CRS84"


def test_a_raster_of_many_ids_without_a_place(tmp_path, recwarn):
    labels = Labels.parse([{"name": "a", "id": 300}, {"name": "b", "id": 0, "colour": "red"}])
    result = result_of(np.array([[0, 1, -1]] * 3, np.int32), labels)
    written(tmp_path, result, "geotiff")
    assert not recwarn.list
    with pytest.warns(rasterio.errors.NotGeoreferencedWarning), rasterio.open(tmp_path / "one-labels.tif") as raster:
        assert raster.read(1)[0].tolist() == [300, 0, 65535] and raster.nodata == 65535


def test_score_maps(tmp_path):
    result = result_of(blocks((30, 44)))
    written(tmp_path, result, "npz", "safetensors")
    ids = np.array(LABELS.written_ids)[result["top_classes"]]
    stored = np.load(tmp_path / "one-scores.npz")
    tensors = load_file(tmp_path / "one-scores.safetensors")
    with safe_open(tmp_path / "one-scores.safetensors", "np") as file:
        assert file.metadata()["classes"] == str(stored["classes"])
    for arrays in (stored, tensors):
        assert (arrays["ids"] == ids).all() and arrays["ids"].dtype == np.uint8
        assert arrays["probabilities"].dtype == np.float16
        assert (arrays["probabilities"] == result["top_probabilities"]).all()
    assert json.loads(str(stored["classes"]))[1]["name"] == "car"


def test_yolo_lines_have_the_regions_areas_and_names(tmp_path):
    supervision = pytest.importorskip("supervision")
    segmentation = np.zeros((60, 80), np.int32)
    segmentation[10:50, 10:70] = 1
    segmentation[20:30, 20:30] = segmentation[20:30, 40:50] = 2  # two holes in the car
    result = result_of(segmentation)
    written(tmp_path, result, "yolo")
    areas = np.zeros(3)
    drawn = Image.new("L", (800, 600), 9)
    for line in (tmp_path / "labels/one.txt").read_text().splitlines():
        index, *numbers = line.split()
        points = np.array(numbers, float).reshape(-1, 2)
        assert points.min() >= 0 and points.max() <= 1
        x, y = (points * (80, 60)).T
        areas[int(index)] += (x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
        ImageDraw.Draw(drawn).polygon([tuple(point) for point in points * (800, 600)], fill=int(index))
    np.testing.assert_allclose(areas, np.bincount(segmentation.ravel()), atol=0.01)
    assert (np.asarray(drawn)[5::10, 5::10] == segmentation).all()  # the middle of each pixel

    (tmp_path / "images").mkdir()
    picture_of((60, 80)).save(tmp_path / "images/one.png")
    read = supervision.DetectionDataset.from_yolo(
        str(tmp_path / "images"), str(tmp_path / "labels"), str(tmp_path / "data.yaml"), force_masks=True
    )
    assert read.classes == list(LABELS.class_names)
    (_, _, found) = next(iter(read))
    for class_id in range(3):  # OpenCV fills the pixels that an outline runs through
        mask = found.mask[found.class_id == class_id].any(0)
        assert (mask & (segmentation == class_id)).sum() == (segmentation == class_id).sum()


# --- the writer ------------------------------------------------------------------------------------------------


def test_a_coco_file_grows_and_a_picture_done_again_is_there_once(tmp_path):
    options = ResultOptions(("coco",))
    for stem, seed in (("a", 0), ("b", 1), ("a", 2)):
        with Writer(tmp_path, LABELS, options) as writer:
            assert writer.recorded("a") == (seed > 0)
            writer.add(stem, picture_of((20, 20)), result_of(blocks((20, 20), seed)))
    data = COCO(tmp_path / "coco-instances.json")
    assert [image["file_name"] for image in data.loadImgs(data.getImgIds())] == ["a", "b"]
    drawn = sum(data.annToMask(entry) for entry in data.loadAnns(data.getAnnIds(imgIds=1)))
    assert (drawn == (blocks((20, 20), 2) >= 0)).all()
    with pytest.raises(ValueError, match=r"holds results in coco of other classes.*give another --output"):
        Writer(tmp_path, Labels.parse("a; b"), options)


def test_a_line_that_a_killed_process_left_is_cut_off(tmp_path):
    options = ResultOptions(("coco",))
    with Writer(tmp_path, LABELS, options) as writer:
        writer.add("a", picture_of((20, 20)), result_of(blocks((20, 20))))
    (records,) = (tmp_path / ".spar-results").glob("*.jsonl")
    whole = records.read_bytes()
    records.write_bytes(whole + whole.splitlines()[1][:100])
    with Writer(tmp_path, LABELS, options) as writer:
        assert writer.recorded("a") and not writer.recorded("b")
        writer.add("b", picture_of((20, 20)), result_of(blocks((20, 20), 1)))
    assert len(COCO(tmp_path / "coco-instances.json").getImgIds()) == 2
    records.write_bytes(whole[:50])  # killed at its first line
    with Writer(tmp_path, LABELS, options) as writer:
        writer.add("c", picture_of((20, 20)), result_of(blocks((20, 20))))
    assert [i["file_name"] for i in COCO(tmp_path / "coco-instances.json").loadImgs([1])] == ["c"]


def _write_some(folder: Path, process: int) -> None:
    with Writer(folder, LABELS, ResultOptions(("coco", "yolo")), process) as writer:
        for number in range(process, 9, 3):
            writer.add(f"p{number}", picture_of((20, 24)), result_of(blocks((20, 24), number), seed=number))


def test_processes_write_what_one_writes(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_write_some, args=(tmp_path / "many", process)) for process in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    with Writer(tmp_path / "one", LABELS, ResultOptions(("coco", "yolo"))) as writer:
        for number in range(9):
            writer.add(f"p{number}", picture_of((20, 24)), result_of(blocks((20, 24), number), seed=number))
    names = {path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*") if path.is_file()}
    shown = [name for name in names if not name.parts[0].startswith(".")]
    assert len(shown) == 9 + 9 + 3
    for name in shown:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "many" / name).read_bytes(), name


@pytest.mark.parametrize("name", FORMATS)
def test_a_full_disk_leaves_earlier_results_whole(tmp_path, monkeypatch, name):
    result = result_of(blocks((20, 20)))
    with Writer(tmp_path, LABELS, ResultOptions((name,))) as writer:
        writer.add("a", picture_of((20, 20)), result)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert len(before) > 0

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    writer = Writer(tmp_path, LABELS, ResultOptions((name,)))
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="disk full while writing"):
        writer.add("b", picture_of((20, 20)), result)
    with pytest.raises(OSError, match="disk full while writing") if FORMATS[name].finish else nullcontext():
        writer.close()
    monkeypatch.undo()
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_mistakes_are_named():
    with pytest.raises(ValueError, match=r"there is no format 'coko'.*Did you mean 'coco'"):
        ResultOptions(("coko",))
    with pytest.raises(ValueError, match=r"top_k is 0; it must be a whole number, at least 1"):
        ResultOptions(top_k=0)
