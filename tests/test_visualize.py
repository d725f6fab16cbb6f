"""Overlay, legend, label map and PCA picture: exact ids, text that fits, colours that differ."""

from __future__ import annotations

import io
import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from spar_hf import visualize
from spar_hf.prompts_spar import Labels
from spar_hf.visualize import drawable, fit_text, label_map_image, overlay, palette, pca_picture, plain_text

LONG = "a space suit with a name that goes on and on " * 20
HOSTILE = [
    "<b>bold</b><script>alert(1)</script>",
    "سماء زرقاء",
    "שלום עולם",
    "天空",
    LONG,
    "W" * 500,
    "line\nbreak\x1b[31m",
    "\u202eevil",
]


def halves(height: int, width: int, first: int = 0, second: int = 1) -> np.ndarray:
    """Left half one class, right half another."""
    ids = np.full((height, width), first)
    ids[:, width // 2 :] = second
    return ids


def saved_and_read(picture: Image.Image) -> Image.Image:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return Image.open(io.BytesIO(buffer.getvalue()))


# --- colours ---------------------------------------------------------------------------------------------------


def test_palette_is_distinct_and_grows_by_appending():
    many = palette(256)
    assert many.shape == (256, 3) and many.dtype == np.uint8
    assert len({tuple(colour) for colour in many.tolist()}) == 256
    assert (palette(12) == many[:12]).all()
    assert tuple(many[0]) == (86, 180, 233)  # sky blue of Okabe and Ito
    assert palette(0).shape == (0, 3)


def test_palette_colours_differ_without_red_or_green_cones():
    # Independent of the module's OKLab: plain distances of simulated sRGB values, by the linear model of Viénot,
    # Brettel and Mollon (1999) for protanopia and deuteranopia.
    to_lms = np.array([[17.8824, 43.5161, 4.11935], [3.45565, 27.1554, 3.86714], [0.0299566, 0.184309, 1.46709]])
    without = {
        "long": np.array([[0, 2.02344, -2.52581], [0, 1, 0], [0, 0, 1]]),
        "middle": np.array([[1, 0, 0], [0.494207, 0, 1.24827], [0, 0, 1]]),
    }
    colours = palette(12) / 255.0
    for matrix in without.values():
        seen = np.clip(colours**2.2 @ (np.linalg.inv(to_lms) @ matrix @ to_lms).T, 0, 1) ** (1 / 2.2)
        distances = [np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)]
        assert min(distances) > 0.1  # the 8-bit distance of 26 that a reader tells apart side by side


# --- label map -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.int32, np.int64, np.uint8, np.int16])
def test_label_map_keeps_ids_up_to_254(dtype):
    ids = np.arange(255).reshape(5, 51).astype(dtype)
    read = saved_and_read(label_map_image(ids))
    assert read.mode == "P" and read.size == (51, 5)
    assert (np.asarray(read) == ids).all()
    assert tuple(read.getpalette()[3:6]) == tuple(palette(2)[1])


def test_label_map_keeps_ids_above_254():
    ids = np.array([[0, 254, 255], [846, 847, 65534]])
    read = saved_and_read(label_map_image(ids))
    assert (np.asarray(read).astype(int) == ids).all()


@pytest.mark.parametrize("dtype", [np.int8, np.int16, np.int32])
def test_no_class_is_the_highest_value_of_the_label_map(dtype):
    small = saved_and_read(label_map_image(np.array([[-1, 3]], dtype)))
    assert small.mode == "P" and np.asarray(small).tolist() == [[255, 3]]
    assert tuple(small.convert("RGB").getpixel((0, 0))) == (0, 0, 0)
    if dtype != np.int8:
        large = saved_and_read(label_map_image(np.array([[-1, 300]], dtype)))
        assert np.asarray(large).tolist() == [[65535, 300]]


@pytest.mark.parametrize("ids", [np.array([[-2, 0]]), np.array([[0, 65535]])])
def test_label_map_refuses_ids_that_a_png_cannot_hold(ids):
    with pytest.raises(ValueError, match="a PNG holds -1 to 65534"):
        label_map_image(ids)


@pytest.mark.parametrize("ids", [np.zeros((2, 2, 2), int), np.zeros((0, 4), int), np.zeros((2, 2))])
def test_label_map_refuses_what_is_no_label_map(ids):
    with pytest.raises(ValueError, match="one \\(H, W\\) array of whole numbers"):
        label_map_image(ids)


# --- overlay ---------------------------------------------------------------------------------------------------


def test_overlay_tints_each_region_by_its_class():
    image = Image.new("RGB", (600, 500), (100, 100, 100))
    picture = np.asarray(overlay(image, halves(500, 600, 0, 2), ["a", "b", "c"], opacity=0.5)).astype(int)
    for column, class_id in ((100, 0), (500, 2)):
        expected = (100 + palette(3)[class_id].astype(int)) / 2
        assert np.abs(picture[250, column] - expected).max() <= 1
    border = picture[250, 295:306]
    assert not (np.abs(border[:, None] - picture[250, [100, 500]][None]).max(-1) <= 1).any(1).all()


@pytest.mark.parametrize("size_hw", [(500, 600), (1700, 23), (7, 1800)])
def test_overlay_in_bands_is_the_overlay_in_one(monkeypatch, size_hw):
    generator = np.random.default_rng(1)
    image = Image.fromarray(generator.integers(0, 256, (*size_hw, 3), dtype=np.uint8))
    ids = generator.integers(-1, 4, (size_hw[0] // 7 + 1, size_hw[1] // 7 + 1)).repeat(7, 0).repeat(7, 1)
    ids = ids[: size_hw[0], : size_hw[1]].astype(np.int8)
    whole = np.asarray(overlay(image, ids, ["a", "b", "c"]))
    monkeypatch.setattr(visualize, "BAND_PIXELS", 3 * size_hw[1])
    assert (np.asarray(overlay(image, ids, ["a", "b", "c"])) == whole).all()


def test_overlay_without_opacity_shows_the_image_inside_the_regions():
    image = Image.effect_noise((512, 512), 60).convert("RGB")
    picture = np.asarray(overlay(image, halves(512, 512), Labels.parse("a; b"), opacity=0.0))
    assert (picture[:512, :200] == np.asarray(image)[:, :200]).all()


def test_pixels_without_a_class_stay_as_they_are():
    image = Image.effect_noise((512, 512), 60).convert("RGB")
    for none in (-1, 255):
        picture = np.asarray(overlay(image, halves(512, 512, none, 0), ["a"]))
        assert (picture[:512, :200] == np.asarray(image)[:, :200]).all()


@pytest.mark.parametrize("size_hw", [(1, 1), (1, 5000), (700, 3), (64, 64), (333, 500), (3000, 4000)])
@pytest.mark.parametrize("class_names", [["sky", "tree"], HOSTILE])
def test_overlay_of_any_size_has_its_picture_above_its_legend(size_hw, class_names):
    height, width = size_hw
    ids = np.random.default_rng(0).integers(0, len(class_names), (min(height, 4), min(width, 4)))
    ids = ids.repeat(-(-height // 4), 0).repeat(-(-width // 4), 1)[:height, :width]
    picture = overlay(Image.new("RGB", (width, height)), ids, class_names)
    factor = max(1, -(-visualize.MIN_SIDE_PX // max(size_hw)))
    assert picture.width >= max(width * factor, visualize.MIN_LEGEND_PX)
    assert picture.height > height * factor
    edge = np.asarray(picture)[height * factor :]  # nothing of the legend touches its paper's edge
    for line in (edge[:, :4], edge[:, -4:], edge[-4:], edge[:2]):
        assert (line == 255).all()


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("canvas_px", [200, 512, 2048])
def test_no_text_of_the_legend_overflows(monkeypatch, text, canvas_px):
    drawn = []
    real = ImageDraw.ImageDraw.text

    def record(self, xy, text, *, font, anchor, **kwargs):
        drawn.append((font.getbbox(text, anchor=anchor), xy, text, anchor))
        return real(self, xy, text, font=font, anchor=anchor, **kwargs)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **kwargs: record(self, xy, text, **kwargs))
    class_names = [text, "sky", "tree", "a second " + text]
    ids = np.arange(4).repeat(canvas_px * canvas_px // 4).reshape(canvas_px, canvas_px)
    picture = overlay(Image.new("RGB", (canvas_px, canvas_px)), ids, class_names)
    boxes = [(xy[0] + box[0], xy[1] + box[1], xy[0] + box[2], xy[1] + box[3]) for box, xy, _, _ in drawn]
    assert len(boxes) == 8  # a name and a share for each class
    assert all(left >= 0 and right <= picture.width and bottom <= picture.height for left, _, right, bottom in boxes)
    for a, b in itertools.combinations(boxes, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (a, b)


def test_legend_lists_what_occurs_largest_first(monkeypatch):
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **kwargs: drawn.append(text))
    ids = np.zeros((100, 100), int)
    ids[:70] = 2
    ids[0, 0] = 3
    overlay(Image.new("RGB", (100, 100)), ids, ["road", "never seen", "sky", "bird"])
    assert drawn == ["sky", "70.0 %", "road", "30.0 %", "bird", "< 0.1 %"]


def test_legend_folds_many_classes_and_counts_what_has_none(monkeypatch):
    drawn = []
    monkeypatch.setattr(ImageDraw.ImageDraw, "text", lambda self, xy, text, **kwargs: drawn.append(text))
    ids = np.arange(100).repeat(100).reshape(100, 100)
    ids[50:] = -1
    overlay(Image.new("RGB", (100, 100)), ids, [f"class {i}" for i in range(100)])
    assert drawn[-4:] == ["and 26 more", "26.0 %", "no class", "50.0 %"]
    assert len(drawn) == 2 * (visualize.MAX_LEGEND_ROWS + 2)


def test_overlay_refuses_another_size_and_opacity():
    image = Image.new("RGB", (40, 30))
    with pytest.raises(ValueError, match=r"the segmentation is 40 x 30, the image 30 x 40 .*own size"):
        overlay(image, np.zeros((40, 30), int), ["a"])
    with pytest.raises(ValueError, match=r"opacity is 1\.5; it must be 0 to 1"):
        overlay(image, np.zeros((30, 40), int), ["a"], opacity=1.5)


def test_overlay_leaves_its_inputs_alone():
    image, ids = Image.effect_noise((600, 600), 50), halves(600, 600)
    before_image, before_ids = image.tobytes(), ids.copy()
    overlay(image, ids, ["a", "b"])
    assert image.tobytes() == before_image and (ids == before_ids).all()


# --- text ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width_px", [10, 60, 200])
def test_fit_text_is_the_longest_that_fits(width_px):
    _, font = drawable("abc…", "", 20)
    fitted = fit_text(LONG, font, width_px)
    assert fitted.endswith("…") and LONG.startswith(fitted[:-1])
    assert font.getlength(fitted) <= max(width_px, font.getlength("…"))
    if width_px > 30:
        assert font.getlength(LONG[: len(fitted) + 1] + "…") > width_px
    assert fit_text("ok", font, 1000) == "ok"


def test_plain_text_folds_what_would_break_a_line_or_turn_it():
    assert plain_text(" a\n\tb\x1b[31m\u2028c ") == "a b [31m c"
    assert plain_text("\u202eabc\u2066d") == "abcd"
    assert plain_text("می\u200cخواهم") == "می\u200cخواهم"  # a joiner is part of the word


@pytest.mark.parametrize("text", ["straße éü", "Ωδ жя ё", "سماء", "שלום", "Tiếng Việt", "ქართული", "հայ"])
def test_the_shipped_font_covers_common_scripts(text, monkeypatch):
    monkeypatch.setattr(visualize, "SYSTEM_FONTS", ())
    shown, font = drawable(text, "class 3", 20)
    assert shown == text and font.getname()[0] == "DejaVu Sans"


def test_a_script_without_a_font_is_named_by_its_class(monkeypatch):
    monkeypatch.setattr(visualize, "SYSTEM_FONTS", ("no such font.ttf",))
    shown, font = drawable("\U00013000\U00013001", "class 3", 20)  # hieroglyphs
    assert shown == "class 3" and isinstance(font, ImageFont.FreeTypeFont)


# --- PCA -------------------------------------------------------------------------------------------------------


def test_pca_picture_shows_the_main_direction_in_red():
    features = torch.zeros(4, 6, 8)
    features[..., 0] = 1.0
    features[:, 3:, 0], features[:, 3:, 1] = 0.0, 1.0  # two halves at right angles
    features[:2, :, 2] += 0.1  # a small difference between top and bottom
    colours = np.asarray(pca_picture(features)).astype(int)
    assert colours.shape == (4, 6, 3)
    left, right = colours[:, :3, 0], colours[:, 3:, 0]
    assert abs(left.mean() - right.mean()) > 250 and left.std() < 5 and right.std() < 5
    assert abs(colours[:2, :, 1].mean() - colours[2:, :, 1].mean()) > 200


def test_pca_picture_does_not_depend_on_length_or_call():
    features = torch.randn(5, 7, 16, generator=torch.Generator().manual_seed(0))
    first = np.asarray(pca_picture(features)).astype(int)
    scaled = np.asarray(pca_picture(features * torch.rand(5, 7, 1).add(0.5))).astype(int)
    assert np.abs(first - scaled).max() <= 1
    assert np.asarray(pca_picture(features.bfloat16())).shape == (5, 7, 3)


@pytest.mark.parametrize("coverage_hw", [(1.0, 1.0), (1.4, 0.8)])
def test_pca_picture_places_patches_as_the_label_map_does(coverage_hw):
    features = torch.randn(4, 5, 16, generator=torch.Generator().manual_seed(1))
    coarse = np.asarray(pca_picture(features)).astype(float)
    size_hw = (23, 31)
    fine = np.asarray(pca_picture(features, size_hw, coverage_hw)).astype(float)
    assert fine.shape == (*size_hw, 3)
    for y, x in itertools.product((0, 7, 22), (0, 13, 30)):  # plain bilinear interpolation, one pixel at a time
        row = np.clip((y + 0.5) / 23 * coverage_hw[0] * 4 - 0.5, 0, 3)
        column = np.clip((x + 0.5) / 31 * coverage_hw[1] * 5 - 0.5, 0, 4)
        top, left = min(int(row), 2), min(int(column), 3)
        dy, dx = row - top, column - left
        upper = coarse[top, left] * (1 - dx) + coarse[top, left + 1] * dx
        lower = coarse[top + 1, left] * (1 - dx) + coarse[top + 1, left + 1] * dx
        assert np.abs(fine[y, x] - (upper * (1 - dy) + lower * dy)).max() <= 1.5  # both are rounded to 8 bits


def test_pca_picture_of_equal_features_is_grey_and_of_wrong_ones_an_error():
    assert np.unique(np.asarray(pca_picture(torch.ones(3, 3, 8)))).tolist() == [128]
    assert np.asarray(pca_picture(torch.ones(1, 1, 2), (10, 20))).shape == (10, 20, 3)
    with pytest.raises(ValueError, match="finite features"):
        pca_picture(torch.full((2, 2, 4), float("nan")))
    with pytest.raises(ValueError, match=r"shape \(1, 2, 2, 4\)"):
        pca_picture(torch.ones(1, 2, 2, 4))
