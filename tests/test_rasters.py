"""Rasters: features block by block against the whole pass, files of every kind read back with rasterio."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import rasterio
import rasterio.shutil
import torch
from conftest import PATCH_PX, randomise
from families import KINDS, whole_model
from PIL import Image
from rasterio.control import GroundControlPoint
from rasterio.enums import ColorInterp
from rasterio.transform import Affine, from_origin
from torch import nn

import spar_hf
from spar_cli.main import main
from spar_cli.raster import is_raster, tiff_tags
from spar_hf.build import build_encoder, build_segmenter
from spar_hf.encoders.sliding_window import SlidingWindow
from spar_hf.grid_spar import POSITION_RULES, Part, part_of, resize_positions, upsample
from spar_hf.image_file_spar import InvalidImageError
from spar_hf.image_values_spar import ReadOptions
from spar_hf.picture_book.dataset import PictureBook
from spar_hf.rasters import segment_raster
from spar_hf.rasters.blocks import Grid, Surroundings, cut
from spar_hf.rasters.features import Journal, tower_features, window_features
from spar_hf.rasters.source import open_raster
from spar_hf.rasters.store import grid_file
from spar_hf.reach_spar import Pool
from spar_hf.segmentation_spar import segment

WORDS = "sky; grass; sea; sand; tree; house"
SIZES_HW = {"native": (64, 64), "larger": (208, 176), "oblong": (64, 320), "off_grid": (150, 201)}


class ArrayRaster:
    """A raster in memory."""

    name = "array"

    def __init__(self, values: np.ndarray) -> None:
        self.values, self.size_hw = values, values.shape[:2]

    def rgb(self, window: Any) -> np.ndarray:
        return self.values[window]


def noise(size_hw: tuple[int, int], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (*size_hw, 3), dtype=np.uint8)


def grid_of(values: np.ndarray, config: Any) -> Grid:
    return Grid(ArrayRaster(values), config.patch_size, config.size_rule, (0.4, 0.5, 0.6), (0.2, 0.3, 0.25))


def whole_pixels(values: np.ndarray) -> torch.Tensor:
    normalised = (values / 255 - np.array([0.4, 0.5, 0.6])) / np.array([0.2, 0.3, 0.25])
    return torch.from_numpy(normalised.transpose(2, 0, 1)).float()[None]


def ignore(done: int, total: int) -> None:
    """A progress that nobody looks at."""


def stored(features: Any) -> torch.Tensor:
    with grid_file(features.path, features.grid_hw, features.width, features.dtype) as file:
        return file.read(tuple(slice(0, length) for length in features.grid_hw))


# ------------------------------------------------------------------------------------------- features in blocks


@pytest.mark.parametrize("rule", POSITION_RULES)
@pytest.mark.parametrize("whole_hw", [(23, 31), (4, 19), (4, 4), (3, 2)], ids=str)
def test_positions_of_a_part_are_those_of_the_whole(rule, whole_hw):
    table = torch.randn(16, 5, generator=torch.Generator().manual_seed(0))
    whole = resize_positions(table, whole_hw, rule).unflatten(0, whole_hw)
    rows, columns = slice(1, 3), slice(0, 2)
    with part_of(Part(whole_hw, (1, 0), (slice(0, 2), slice(0, 2)))):
        part = resize_positions(table, (2, 2), rule).unflatten(0, (2, 2))
    torch.testing.assert_close(part, whole[rows, columns], atol=1e-5, rtol=0)


def test_a_pool_is_attention_to_all_parts():
    query, key, value = (torch.randn(2, 3, n, 8, generator=torch.Generator().manual_seed(n)) for n in (2, 50, 51))
    value = value[:, :, :50]
    pool = Pool()
    for part in (slice(0, 7), slice(7, 8), slice(8, 50)):
        found = pool.add(query * 30, key[:, :, part], value[:, :, part])
    scores = (query.double() * 30) @ key.double().transpose(2, 3) / 8**0.5
    torch.testing.assert_close(found, (scores.softmax(-1) @ value.double()).float(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("grid_hw", [(1, 1), (7, 40), (33, 5)], ids=str)
@pytest.mark.parametrize("side", [1, 6, 12, 100])
@pytest.mark.parametrize("around", [Surroundings(3, 3), Surroundings(4, 5, 3)], ids=str)
def test_blocks_are_a_partition(grid_hw, side, around):
    times = np.zeros(grid_hw, dtype=int)
    for block in cut(grid_hw, around, side):
        times[block.own] += 1
        for own, given, length in zip(block.own, block.given, grid_hw, strict=True):
            assert given.start == 0 or (given.start <= own.start - around.before and given.start % around.unit == 0)
            assert given.stop == min(own.stop + around.after, length)
    assert (times == 1).all()


QUICK = ("siglip", "eva02")  # padded, without prefix tokens; rotary positions with a class token


@pytest.fixture(
    scope="module",
    params=["clip", *(pytest.param(kind, marks=[] if kind in QUICK else pytest.mark.slow) for kind in KINDS)],
)
def tower(request, make_vision, clip_tokenizer, tmp_path_factory):
    """A tower of each family, attention within reach."""
    if request.param == "clip":
        return make_vision(num_hidden_layers=4, attention_reach="window")
    folder = tmp_path_factory.mktemp(request.param)
    return build_encoder(whole_model(request.param, clip_tokenizer, folder).vision_model, reach="window")


SLOW = pytest.mark.slow


@pytest.mark.parametrize("size", ["off_grid", *(pytest.param(n, marks=SLOW) for n in SIZES_HW if n != "off_grid")])
def test_a_tower_in_blocks_is_its_whole_pass(tower, size, tmp_path):
    values = noise(SIZES_HW[size])
    if tower.config.size_rule == "stretch":  # of whole patches: a raster is not stretched
        values = values[: values.shape[0] // 16 * 16, : values.shape[1] // 16 * 16]
    with torch.inference_mode():
        whole = tower(whole_pixels(values)).patch_embeds[0]
    seen = []
    found = stored(
        tower_features(
            tower, grid_of(values, tower.config), Journal(tmp_path, "key"), 9, lambda *done: seen.append(done)
        )
    )
    torch.testing.assert_close(found, whole, atol=2e-4 * float(whole.abs().max()), rtol=0)
    assert seen[-1][0] == seen[-1][1] and len(seen) == seen[-1][1]


@pytest.mark.slow
def test_a_tower_of_the_shape_of_vit_b_has_the_labels_of_its_whole_pass(tmp_path):
    shape = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    config = spar_hf.SparVisionConfig(**shape, image_size=224, patch_size=16, projection_dim=512)
    vision = build_encoder(spar_hf.SparVisionModel(config).eval(), reach="window")
    randomise(vision, seed=3)
    values = mosaic(2, 3)
    with torch.inference_mode():
        whole = vision(whole_pixels(values)).patch_embeds[0]
    found = stored(tower_features(vision, grid_of(values, vision.config), Journal(tmp_path, "key"), 40, ignore))
    text = torch.randn(512, 20, generator=torch.Generator().manual_seed(0))
    unit = [nn.functional.normalize(features, dim=-1) for features in (found, whole)]
    maps = [upsample((features @ text).permute(2, 0, 1), values.shape[:2]).argmax(0) for features in unit]
    assert len(maps[1].unique()) > 2 and float((maps[0] != maps[1]).float().mean()) <= 1e-3


@pytest.mark.parametrize("window_px, stride_px", [(64, 24), (96, 48), (32, 32)])
@pytest.mark.parametrize("size", SIZES_HW)
def test_a_window_in_blocks_slides_as_over_the_whole(make_vision, size, window_px, stride_px, tmp_path):
    sliding = SlidingWindow(make_vision(num_hidden_layers=2), window_px, stride_px, batch_size=16)
    values = noise(SIZES_HW[size])
    whole = sliding(whole_pixels(values)).patch_embeds[0]
    found = stored(window_features(sliding, grid_of(values, sliding.config), Journal(tmp_path, "key"), 13, ignore))
    torch.testing.assert_close(found, whole, atol=1e-4 * float(whole.abs().max()), rtol=0)


# --------------------------------------------------------------------------------------------- whole rasters


@cache
def tiny(reach: str = "window", **choices: Any) -> Any:
    model, processor = spar_hf.load("tiny")
    segmenter = build_segmenter(model, processor, reach=reach, **choices)
    return segmenter, segmenter.encode_labels(spar_hf.Labels.parse(WORDS)), processor.image_processor


def mosaic(rows: int, columns: int, side: int = 256) -> np.ndarray:
    book = PictureBook("test", side, side)
    scenes = iter(range(rows * columns))
    return np.concatenate(
        [np.concatenate([book.scene(next(scenes)).image for _ in range(columns)], 1) for _ in range(rows)], 0
    )


PROFILE = {"driver": "GTiff", "crs": "EPSG:32633", "transform": from_origin(400_000, 5_000_000, 0.5, 0.5)}


def write_raster(path: Path, values: np.ndarray, mask: np.ndarray | None = None, **profile: Any) -> Path:
    """(H, W, C) values as a GeoTIFF; `colorinterp` and other fields of the profile as given."""
    values = values[..., None] if values.ndim == 2 else values
    interpretation = profile.pop("colorinterp", None)
    height, width, count = values.shape
    fields = {"height": height, "width": width, "count": count, "dtype": values.dtype.name, **PROFILE, **profile}
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True), rasterio.open(path, "w", **fields) as file:
        if interpretation:
            file.colorinterp = interpretation
        file.write(values.transpose(2, 0, 1))
        if mask is not None:
            file.write_mask(mask)
    return path


def run_raster(path: Path, tmp_path: Path, side: int = 20, image_processor: Any = None, **options: Any) -> np.ndarray:
    """The label map that comes of a raster, done in blocks of `side` patches; 255 is no class."""
    segmenter, encoded, reading = options.pop("tiny", None) or tiny()
    memory = (4 * 14 * 192 + 27 * PATCH_PX**2) * side**2
    target = tmp_path / "out" / "labels.tif"
    segment_raster(path, segmenter, encoded, image_processor or reading, target, memory_bytes=memory, **options)
    with rasterio.open(target) as file:
        return file.read(1)


def reading(**options: Any) -> Any:
    """tiny's image processor that reads otherwise."""
    processor = type(tiny()[2]).from_dict(tiny()[2].to_dict())
    for name, value in options.items():
        setattr(processor, name, value)
    return processor


def whole_labels(values: np.ndarray, segmenter: Any = None, **options: Any) -> np.ndarray:
    """The label map of one pass over the whole picture at its own size."""
    own, encoded, processor = tiny()
    pixels = processor(values, return_tensors="pt", do_resize=False)["pixel_values"]
    maps = (segmenter or own)(pixels, encoded)[0]
    return segment(maps, torch.tensor(encoded.labels.class_ids), **options).labels.numpy()


def differing(found: np.ndarray, expected: np.ndarray) -> float:
    assert found.shape == expected.shape
    return float((found != np.where(expected < 0, 255, expected)).mean())


@pytest.mark.parametrize("size_hw", [(640, 512), (130, 900), (399, 301)], ids=str)
def test_labels_are_those_of_the_whole_pass(size_hw, tmp_path):
    values = mosaic(3, 4)[: size_hw[0], : size_hw[1]] if size_hw != (640, 512) else mosaic(3, 2)[:640]
    path = write_raster(tmp_path / "scene.tif", values, tiled=True, blockxsize=256, blockysize=256)
    found = run_raster(path, tmp_path)
    assert len(np.unique(found)) > 2 and differing(found, whole_labels(values)) <= 1e-3
    options = {"background_threshold": 0.6, "background_class": 1}
    assert differing(run_raster(path, tmp_path, side=30, **options), whole_labels(values, **options)) <= 1e-3


@pytest.mark.slow
def test_a_sliding_window_is_that_of_the_whole(tmp_path):
    values = mosaic(2, 2)[:400, :350]
    path = write_raster(tmp_path / "scene.tif", values)
    chosen = tiny(reach="image", window=128, stride_px=48)
    found = run_raster(path, tmp_path, tiny=chosen)
    assert differing(found, whole_labels(values, chosen[0])) <= 1e-3


def test_plain_attention_slides_a_window_and_says_so(tmp_path):
    values, said = mosaic(2, 2)[:400, :350], []
    path = write_raster(tmp_path / "scene.tif", values)
    small = reading(size={"shortest_edge": 160})
    found = run_raster(path, tmp_path, tiny=tiny(reach="image"), image_processor=small, say=said.append)
    sliding = tiny(reach="image", window=160, stride_px=80)[0]
    assert differing(found, whole_labels(values, sliding)) <= 1e-3
    assert said == [
        "this model looks at the whole picture at once, so on a raster a window of 160 px slides, 80 px at a time; "
        "with attention_reach='window' it needs one pass, and window_px and stride_px choose another window"
    ]


def test_what_looks_at_whole_pictures_is_refused(tmp_path):
    path = write_raster(tmp_path / "scene.tif", noise((64, 64)))
    with pytest.raises(ValueError, match="looks at whole pictures; leave it out"):
        run_raster(path, tmp_path, tiny=tiny(refine=("closing",)))
    with pytest.raises(ValueError, match=r"10 x 64 px .* at least one patch, 16 px"):
        run_raster(write_raster(path, noise((10, 64))), tmp_path)


# ------------------------------------------------------------------------------------------------ what is written


def test_the_label_map_lies_where_the_raster_lies(tmp_path):
    turned = Affine.translation(400_000, 5_000_000) * Affine.rotation(20) * Affine.scale(0.5, -0.5)
    path = write_raster(tmp_path / "scene.tif", mosaic(1, 1), transform=turned)
    run_raster(path, tmp_path, scores=tmp_path / "out" / "scores.tif")
    with (
        rasterio.open(tmp_path / "out" / "labels.tif") as file,
        rasterio.open(tmp_path / "out" / "scores.tif") as best,
    ):
        for written in (file, best):
            assert written.crs.to_epsg() == 32633 and written.transform.almost_equals(turned, 1e-9)
            assert written.profile["tiled"] and written.compression.name == "deflate"
        assert file.dtypes == ("uint8",) and file.nodata == 255 and best.nodata is None
        assert json.loads(file.tags()["CLASS_NAMES"]) == WORDS.split("; ")
        assert file.colorinterp == (ColorInterp.palette,)
        assert file.colormap(1)[0][:3] == tuple(spar_hf.visualize.palette(6)[0]) and file.colormap(1)[255][3] == 0
        assert 100 < best.read(1).mean() < 255
    assert "<Category>house</Category>" in (tmp_path / "out" / "labels.tif.aux.xml").read_text()
    assert sorted(entry.name for entry in (tmp_path / "out").iterdir()) == [
        "labels.tif", "labels.tif.aux.xml", "scores.tif"
    ]  # fmt: skip


def test_overviews_are_of_the_commonest_class(tmp_path):
    found = run_raster(write_raster(tmp_path / "scene.tif", mosaic(3, 3)), tmp_path, side=64)
    with rasterio.open(tmp_path / "out" / "labels.tif") as file:
        assert file.overviews(1) == [2, 4]
        shrunk = file.read(1, out_shape=(384, 384))
    assert (shrunk == found[::2, ::2]).mean() > 0.98 and set(np.unique(shrunk)) <= set(np.unique(found))


def test_ground_control_points_and_nothing_at_all_are_kept(tmp_path):
    points = [GroundControlPoint(row=r, col=c, x=10 + c / 1e4, y=50 - r / 1e4) for r, c in ((0, 0), (0, 99), (99, 0))]
    path = write_raster(tmp_path / "gcps.tif", mosaic(1, 1), transform=None, crs="EPSG:4326", gcps=points)
    run_raster(path, tmp_path)
    with rasterio.open(tmp_path / "out" / "labels.tif") as file:
        assert len(file.gcps[0]) == 3 and file.gcps[1].to_epsg() == 4326
    run_raster(write_raster(tmp_path / "none.tif", mosaic(1, 1), transform=None, crs=None), tmp_path)
    with rasterio.open(tmp_path / "out" / "labels.tif") as file:
        assert file.crs is None and file.transform.is_identity


# --------------------------------------------------------------------------------------------- what is read


def seen(path: Path, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """RGB and valid pixels of a whole raster, put together from windows that do not fit it."""
    with open_raster(path, ReadOptions(**options)) as raster:
        height, width = raster.size_hw
        rgb, valid = np.zeros((height, width, 3), np.uint8), np.zeros((height, width), bool)
        for top in range(0, height, 37):
            for left in range(0, width, 29):
                window = slice(top, min(top + 37, height)), slice(left, min(left + 29, width))
                rgb[window], valid[window] = raster.rgb(window), raster.valid(window)
        return rgb, valid


def as_a_picture(path: Path, **options: Any) -> np.ndarray:
    """The same file by the reader of pictures."""
    from spar_hf.image_io_spar import read_image

    return np.asarray(read_image(path, ReadOptions(**options)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
@pytest.mark.parametrize("options", [{}, {"bands": (1,)}, {"value_range": "auto"}, {"bands": (5, 3, 1)}], ids=str)
def test_bands_and_values_are_read_as_of_pictures(count, dtype, options, tmp_path):
    if max(options.get("bands", (1,))) > count:
        pytest.skip("there is no such band")
    top = {"uint8": 255, "uint16": 65535, "float32": 1}[dtype]
    values = (np.random.default_rng(count).random((50, 70, count)) * top).astype(dtype)
    path = write_raster(tmp_path / "scene.tif", values, photometric="minisblack")
    rgb, valid = seen(path, **options)
    assert valid.all()
    np.testing.assert_array_equal(rgb, as_a_picture(path, **options))


def test_a_band_that_is_not_there_is_named(tmp_path):
    path = write_raster(tmp_path / "scene.tif", noise((20, 30))[..., :2])
    with pytest.raises(InvalidImageError, match=r"scene.tif has 2 bands; bands is 3, 2, 1"):
        seen(path, bands=(3, 2, 1))
    path = write_raster(tmp_path / "scene.tif", noise((20, 30)).astype("complex64"))
    with pytest.raises(InvalidImageError, match=r"scene.tif holds complex64 values; allowed are"):
        seen(path)
    path = write_raster(tmp_path / "scene.tif", (noise((20, 30)).astype("int16") - 300))
    with pytest.raises(InvalidImageError, match="value_range='auto'"):
        seen(path)


def test_nodata_nan_and_masks_are_no_pixels(tmp_path):
    values = noise((60, 80)).astype(np.float32) / 255
    hole = np.zeros((60, 80), bool)
    hole[10:30, 20:50] = True
    with_nan, with_number = values.copy(), values.copy()
    with_nan[hole], with_number[hole] = np.nan, -9999
    with_nan[0, 0, 1] = np.inf
    plain = seen(write_raster(tmp_path / "plain.tif", values))[0]
    for name, given, profile in (
        ("nan", with_nan, {}),
        ("nan nodata", with_nan, {"nodata": float("nan")}),
        ("number", with_number, {"nodata": -9999}),
    ):
        rgb, valid = seen(write_raster(tmp_path / f"{name}.tif", given, **profile))
        expected = ~hole
        expected[0, 0] = "nan" not in name
        np.testing.assert_array_equal(valid, expected)
        np.testing.assert_array_equal(rgb, np.where(expected[..., None], plain, 0))
    rgb, valid = seen(write_raster(tmp_path / "mask.tif", noise((60, 80)), mask=~hole))
    np.testing.assert_array_equal(valid, ~hole)
    # One band of several may happen to hold the value.
    one = noise((60, 80)).clip(1, 255)
    one[5, 5, 1], one[hole] = 0, 0
    np.testing.assert_array_equal(seen(write_raster(tmp_path / "zero.tif", one, nodata=0))[1], ~hole)


def test_pixels_that_are_none_are_no_class_and_not_counted(tmp_path):
    values = mosaic(1, 2)
    hole = np.zeros(values.shape[:2], bool)
    hole[40:100, 100:300] = True
    values[hole] = 0
    path = write_raster(tmp_path / "scene.tif", values, mask=~hole)
    found = run_raster(path, tmp_path)
    assert (found[hole] == 255).all() and (found[~hole] != 255).all()
    assert differing(np.where(hole, 0, found), np.where(hole, 0, whole_labels(values))) <= 1e-3


def test_alpha_palettes_and_orientation_are_those_of_pictures(tmp_path):
    values = np.dstack([noise((60, 80)), np.full((60, 80), 255, np.uint8)])
    values[:20, :, 3], values[20:30, :, 3] = 0, 128
    rgb = (ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha)
    path = write_raster(tmp_path / "alpha.tif", values, colorinterp=rgb)
    np.testing.assert_array_equal(seen(path)[0], values[..., :3])  # a TIFF's alpha may be near infrared
    composed, valid = seen(path, alpha="compose")
    np.testing.assert_array_equal(valid, values[..., 3] > 0)
    np.testing.assert_array_equal(composed[20:], as_a_picture(path, alpha="compose")[20:])
    Image.fromarray(values).save(tmp_path / "alpha.png")
    composed, valid = seen(tmp_path / "alpha.png")
    np.testing.assert_array_equal(composed[20:], as_a_picture(tmp_path / "alpha.png")[20:])
    np.testing.assert_array_equal(valid, values[..., 3] > 0)

    Image.fromarray(noise((60, 80))).quantize(40).save(tmp_path / "palette.png")
    np.testing.assert_array_equal(seen(tmp_path / "palette.png")[0], as_a_picture(tmp_path / "palette.png"))

    picture = Image.fromarray(np.linspace(0, 255, 60 * 80 * 3).reshape(60, 80, 3).astype(np.uint8))
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[274] = orientation
        picture.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        found, expected = seen(tmp_path / "turned.jpg")[0], as_a_picture(tmp_path / "turned.jpg")
        assert found.shape == expected.shape and np.abs(found.astype(int) - expected).max() <= 3


# -------------------------------------------------------------------------------------------------------- faults


def test_a_truncated_raster_is_one_line_and_old_results_stay(tmp_path):
    values = mosaic(2, 2)
    path = write_raster(tmp_path / "scene.tif", values, compress="deflate")
    before = run_raster(path, tmp_path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InvalidImageError, match=r"scene.tif (cannot be read to its end|is no raster that can be)"):
        run_raster(path, tmp_path)
    with rasterio.open(tmp_path / "out" / "labels.tif") as file:
        np.testing.assert_array_equal(file.read(1), before)
    path.write_bytes(b"II*\0" + bytes(60))
    with pytest.raises(InvalidImageError, match=r"scene.tif is no raster that can be opened \(.*\)"):
        run_raster(path, tmp_path)


class Stopped(Exception):
    """What ends a run in these tests, as a kill does."""


@pytest.mark.parametrize("chosen", [{}, {"reach": "image", "window": 128, "stride_px": 64}], ids=["tower", "window"])
def test_a_stopped_run_goes_on_where_it_was(chosen, tmp_path, monkeypatch):
    monkeypatch.setattr("spar_hf.rasters.features.RECORD_S", 0.0)
    path = write_raster(tmp_path / "scene.tif", mosaic(2, 2))
    own, done = tiny(**({"reach": "window"} | chosen)), []
    expected = run_raster(path, tmp_path / "whole", tiny=own, side=36, progress=lambda *now: done.append(now))
    total = done[-1][1]
    for stop in (2, total // 2, total - 1):

        def progress(now: int, total: int, stop: int = stop) -> None:
            done.append((now, total))
            if now == stop:
                raise Stopped

        with pytest.raises(Stopped):
            run_raster(path, tmp_path, tiny=own, side=36, progress=progress)
        assert not (tmp_path / "out" / "labels.tif").exists()
    done.clear()
    found = run_raster(path, tmp_path, tiny=own, side=36, progress=lambda *now: done.append(now))
    assert len(done) <= 2  # the last record is of a block before the last stop
    np.testing.assert_array_equal(found, expected)
    assert not (tmp_path / "out" / ".labels.work").exists()


def test_work_of_another_raster_is_not_gone_on_with(tmp_path, monkeypatch):
    monkeypatch.setattr("spar_hf.rasters.features.RECORD_S", 0.0)
    values = mosaic(2, 2)
    path = write_raster(tmp_path / "scene.tif", values)

    def progress(now: int, total: int) -> None:
        if now == 3:
            raise Stopped

    with pytest.raises(Stopped):
        run_raster(path, tmp_path, progress=progress)
    write_raster(path, values[::-1].copy())
    os.utime(path, (1, 1))
    assert differing(run_raster(path, tmp_path), whole_labels(values[::-1].copy())) <= 1e-3


def test_two_processes_do_not_share_the_work(tmp_path):
    path = write_raster(tmp_path / "scene.tif", mosaic(1, 1))

    def progress(now: int, total: int) -> None:
        with pytest.raises(ValueError, match="another process is at work in"):
            run_raster(path, tmp_path)

    run_raster(path, tmp_path, progress=progress)


COMMAND = [sys.executable, "-m", "spar_hf", "segment"]


@pytest.mark.slow  # processes of their own
def test_full_disks_are_one_line_and_the_run_goes_on(tmp_path):
    """The limit of a file's size stops the features, then the label map."""
    path = write_raster(tmp_path / "scene.tif", mosaic(2, 2))
    args = [*COMMAND, str(path), "--labels", WORDS, "--attention-reach", "window", "--output", str(tmp_path / "out")]
    for limit in (200_000, 600_000):  # the tokens take 786 kB, the features 524 kB

        def before(limit: int = limit) -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

        done = subprocess.run(args, capture_output=True, text=True, preexec_fn=before)
        assert done.returncode == 2 and "Traceback" not in done.stderr
        assert done.stderr.splitlines()[-1].startswith("spar: error: disk full while writing")
        assert not (tmp_path / "out" / "scene-labels.tif").exists()
    assert main(args[3:]) == 0


def test_a_label_map_that_does_not_fit_is_not_kept(tmp_path, monkeypatch):
    path, out = write_raster(tmp_path / "scene.tif", noise((256, 256))), tmp_path / "out"
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)

    def progress(now: int, total: int) -> None:
        if now == total - 1:  # the window of the map is left
            resource.setrlimit(resource.RLIMIT_FSIZE, (1_000, hard))

    # The record of the journal, the last to be written before the map, has the limit too.
    monkeypatch.setattr("spar_hf.rasters.features.write_state", lambda *args: None)
    monkeypatch.setattr("spar_hf.rasters.features.GridFile.flush", lambda self: None)
    try:
        with pytest.raises(OSError, match=r"disk full while writing .*labels\.tif"):
            run_raster(path, tmp_path, progress=progress)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (out / "labels.tif").exists() and not list(out.glob("*.tmp"))


# ------------------------------------------------------------------------------------------------ command line


def test_the_command_writes_the_map_and_says_what_it_found(tmp_path, capsys):
    values = mosaic(2, 2)
    path = write_raster(tmp_path / "scene.tif", values)
    out, facts = tmp_path / "out", tmp_path / "all.json"
    words = ["--labels", WORDS, "--attention-reach", "window", "--output", str(out), "--json", str(facts), "--scores"]
    assert main(["segment", str(path), *words]) == 0
    printed = capsys.readouterr().out
    assert "512 x 512 px, 32 x 32 patches" in printed and "scene-labels.tif" in printed
    with rasterio.open(out / "scene-labels.tif") as file:
        assert file.crs.to_epsg() == 32633 and differing(file.read(1), whole_labels(values)) <= 1e-3
    assert Image.open(out / "scene-overlay.png").width >= 512
    (result,) = json.loads(facts.read_text())["images"]
    assert sum(entry["area_fraction"] for entry in result["classes"]) == pytest.approx(1)
    assert result["files"]["scores"].endswith("scene-scores.tif")


@pytest.mark.parametrize(
    "options, said",
    [
        (["--short-side", "300"], "--short-side does not go with a raster: a raster is read at its own resolution"),
        (["--refine", "pamr"], "--refine does not go with a raster: refinements look at whole pictures"),
        (["--area-threshold", "0.1"], "--area-threshold does not go with a raster"),
        (["--raster", "sometimes"], "--raster 'sometimes'"),
        (["--bands", "4,2,1"], "scene.tif has 3 bands; bands is 4, 2, 1"),
    ],
)
def test_what_does_not_go_with_a_raster_is_one_line(options, said, tmp_path, capsys):
    path = write_raster(tmp_path / "scene.tif", noise((64, 64)))
    assert main(["segment", str(path), "--labels", WORDS, "--output", str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err


def test_rasters_are_told_from_pictures(tmp_path, monkeypatch, capsys):
    scene = write_raster(tmp_path / "scene.tif", noise((40, 50)))
    plain = write_raster(tmp_path / "plain.tif", noise((40, 50)), crs=None, transform=None)
    big = write_raster(tmp_path / "big.tif", noise((40, 50)), crs=None, transform=None, bigtiff="YES")
    Image.fromarray(noise((40, 50))).save(tmp_path / "picture.png")
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with rasterio.open(scene) as file:
        rasterio.shutil.copy(file, tmp_path / "scene.vrt", driver="VRT")
    assert tiff_tags(plain)[256] == tiff_tags(big)[256] == 50 and tiff_tags(tmp_path / "picture.png") is None
    names = ("scene.tif", "plain.tif", "big.tif", "picture.png", "broken.png", "scene.vrt")
    assert [name for name in names if is_raster(tmp_path / name)] == ["scene.tif", "scene.vrt"]
    monkeypatch.setattr("spar_hf.image_values_spar.MAX_IMAGE_PIXELS", 1999)
    assert [name for name in names if is_raster(tmp_path / name)] == [*names[:4], "scene.vrt"]
    assert not is_raster(plain, max_pixels=10) and not is_raster(tmp_path / "picture.png", max_pixels=10)
    assert main(["segment", str(scene), str(tmp_path / "broken.png"), "--labels", "sky"]) == 2
    assert "scene.tif is a raster and" in capsys.readouterr().err


def test_without_rasterio_the_extra_is_named(tmp_path, monkeypatch, capsys):
    path = write_raster(tmp_path / "scene.tif", noise((64, 64)))
    monkeypatch.setitem(sys.modules, "rasterio", None)
    assert main(["segment", str(path), "--labels", WORDS, "--output", str(tmp_path / "out")]) == 2
    assert 'pip install "spar-hf[geo]"' in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_constant(tmp_path):
    """A strip of 60 megapixels takes no more than one of 15; see benchmarks/rasters.py for the whole."""
    script = Path(__file__).parents[1] / "benchmarks" / "rasters.py"
    output = tmp_path / "rows.json"
    sizes = ["2000x7500", "2000x30000"]
    options = [
        "--whole-mp",
        "0",
        "--plain-mp",
        "0",
        "--memory-mb",
        "300",
        "--output",
        str(output),
        "--work",
        str(tmp_path),
    ]
    subprocess.run([sys.executable, str(script), "--sizes", *sizes, *options], check=True)
    small, large = (row["memory_mb"] for row in json.loads(output.read_text())["rows"])
    assert large < 800 and large < 1.25 * small + 50
