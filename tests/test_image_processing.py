"""SparImageProcessor: sources, modes, sizes, limits and what it refuses."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageFile
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from spar_hf.image_io_spar import read_image
from spar_hf.image_processing_spar import InvalidImageError, SparImageProcessor
from spar_hf.image_values_spar import ReadOptions

MEAN = np.array([0.48145466, 0.4578275, 0.40821073])
STD = np.array([0.26862954, 0.26130258, 0.27577711])


def picture(height: int, width: int, channels: int = 3, seed: int = 0) -> np.ndarray:
    """Random 8-bit pixels (H, W, C), smooth enough that resizing matters."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, channels), dtype=np.uint8)
    planes = [
        Image.fromarray(coarse[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(channels)
    ]
    return np.stack([np.asarray(plane) for plane in planes], axis=-1)


def expected_values(rgb: np.ndarray) -> np.ndarray:
    """The plain formulation: (H, W, 3) of 0 to 255 -> normalised (3, H, W)."""
    return ((rgb.astype(np.float64) / 255 - MEAN) / STD).transpose(2, 0, 1)


def values_of(image: Any, **kwargs: Any) -> np.ndarray:
    (values,) = SparImageProcessor(size=None)(image, **kwargs)["pixel_values"]
    return values.numpy()


@pytest.fixture
def rgb() -> np.ndarray:
    return picture(23, 31)


# Sources


@pytest.mark.parametrize(
    "as_source", ["str", "path", "bytes", "pil", "pil_file", "hwc", "chw", "hwc_tensor", "chw_tensor"]
)
def test_every_source_gives_the_same_values(rgb: np.ndarray, tmp_path: Path, as_source: str) -> None:
    path = tmp_path / "a.png"
    Image.fromarray(rgb).save(path)
    source = {
        "str": lambda: str(path),
        "path": lambda: path,
        "bytes": path.read_bytes,
        "pil": lambda: Image.fromarray(rgb),
        "pil_file": lambda: Image.open(path),
        "hwc": lambda: rgb,
        "chw": lambda: rgb.transpose(2, 0, 1),
        "hwc_tensor": lambda: torch.from_numpy(rgb),
        "chw_tensor": lambda: torch.from_numpy(rgb).permute(2, 0, 1),
    }[as_source]()
    np.testing.assert_allclose(values_of(source), expected_values(rgb), atol=2e-6)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "float255", "uint16", "int64", "bfloat16"])
def test_every_number_type_is_read_on_its_own_scale(rgb: np.ndarray, dtype: str) -> None:
    array = {
        "float32": lambda: rgb.astype(np.float32) / 255,
        "float64": lambda: rgb.astype(np.float64) / 255,
        "float16": lambda: (rgb / 255).astype(np.float16),
        "float255": lambda: rgb.astype(np.float32),
        "uint16": lambda: rgb.astype(np.uint16) * 257,
        "int64": lambda: rgb.astype(np.int64),
        "bfloat16": lambda: torch.from_numpy(rgb).permute(2, 0, 1).to(torch.bfloat16),
    }[dtype]()
    wanted = rgb
    if dtype == "bfloat16":  # 8 bits of precision: the tensor itself is rounded
        wanted = array.float().permute(1, 2, 0).numpy()
    np.testing.assert_allclose(values_of(array), expected_values(wanted), atol=2e-6)


def test_a_boolean_mask_is_black_and_white() -> None:
    mask = np.eye(17, dtype=bool)
    np.testing.assert_allclose(
        values_of(mask), expected_values(np.repeat(mask[..., None] * 255, 3, axis=2)), atol=2e-6
    )


@pytest.mark.parametrize("shape", [(20, 21), (20, 21, 1), (1, 20, 21)])
def test_one_channel_is_grey(shape: tuple[int, ...]) -> None:
    grey = picture(20, 21, 1)
    np.testing.assert_allclose(values_of(grey.reshape(shape)), expected_values(grey.repeat(3, axis=2)), atol=2e-6)


def test_input_data_format_decides_where_the_shape_does_not_tell() -> None:
    array = picture(3, 20)  # (3, 20, 3): either side may be the channels
    last = SparImageProcessor(size=None, min_side_px=1)(array)["original_sizes"]
    first = SparImageProcessor(size=None, min_side_px=1)(array, input_data_format="channels_first")["original_sizes"]
    tensor = SparImageProcessor(size=None, min_side_px=1)(torch.from_numpy(array))["original_sizes"]
    assert last.tolist() == [[3, 20]]
    assert first.tolist() == tensor.tolist() == [[20, 3]]


# Modes


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_opaque_modes_become_rgb_as_pillow_converts_them(rgb: np.ndarray, mode: str) -> None:
    image = Image.fromarray(rgb).convert(mode)
    np.testing.assert_allclose(values_of(image), expected_values(np.asarray(image.convert("RGB"))), atol=2e-6)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "PA", "array"])
def test_alpha_is_composed_over_white(mode: str) -> None:
    rgba = picture(18, 25, 4)
    image = Image.fromarray(rgba)
    if mode in ("LA", "PA"):
        image = image.convert("LA") if mode == "LA" else image.convert("RGB").quantize(16).convert("PA")
        if mode == "PA":
            image.putalpha(Image.fromarray(rgba[..., 3]))
        rgba = np.asarray(image.convert("RGBA"))
    alpha = rgba[..., 3:].astype(np.float64) / 255
    wanted = rgba[..., :3] * alpha + 255 * (1 - alpha)
    source = rgba if mode == "array" else image
    # Pillow composes in integers: half a step of 255, divided by the smallest std.
    np.testing.assert_allclose(values_of(source), expected_values(wanted), atol=1.01 / 255 / STD.min())


def test_a_palette_with_a_transparent_colour_shows_white_there(tmp_path: Path) -> None:
    image = Image.new("P", (20, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.paste(1, (0, 0, 10, 16))
    image.save(tmp_path / "a.png", transparency=0)
    values = values_of(tmp_path / "a.png")
    wanted = np.full((16, 20, 3), 255)
    wanted[:, :10] = (0, 0, 255)
    np.testing.assert_allclose(values, expected_values(wanted), atol=2e-6)


@pytest.mark.parametrize("mode", ["I;16", "I;16B", "I", "F"])
def test_deep_grey_is_read_on_its_full_scale(mode: str, tmp_path: Path) -> None:
    grey = picture(19, 22, 1)[..., 0]
    if mode == "F":
        image = Image.fromarray(grey.astype(np.float32) / 255)
    elif mode == "I":
        image = Image.fromarray(grey.astype(np.int32) * 257)
    else:
        image = Image.fromarray(grey.astype(np.uint16) * 257)
        image = image if mode == "I;16" else image.convert("I").convert("I;16B")
    assert image.mode == mode
    np.testing.assert_allclose(values_of(image), expected_values(grey[..., None].repeat(3, axis=2)), atol=2e-6)


def test_a_16_bit_png_file_is_not_clipped(tmp_path: Path) -> None:
    grey = picture(19, 22, 1)[..., 0]
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "a.png")
    np.testing.assert_allclose(
        values_of(tmp_path / "a.png"), expected_values(grey[..., None].repeat(3, axis=2)), atol=2e-6
    )


@pytest.mark.parametrize(("orientation", "undo"), [(3, 2), (6, 3), (8, 1)])
def test_exif_rotation_is_applied(rgb: np.ndarray, tmp_path: Path, orientation: int, undo: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(rgb).save(tmp_path / "a.png", exif=exif)
    upright = np.rot90(rgb, undo)
    batch = SparImageProcessor(size=None)(tmp_path / "a.png")
    assert batch["original_sizes"].tolist() == [list(upright.shape[:2])]
    np.testing.assert_allclose(batch["pixel_values"][0].numpy(), expected_values(upright), atol=2e-6)


def test_the_first_frame_of_an_animation_counts(rgb: np.ndarray, tmp_path: Path) -> None:
    frames = [Image.fromarray(rgb), Image.fromarray(255 - rgb)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    first = np.asarray(Image.open(tmp_path / "a.gif").convert("RGB"))
    np.testing.assert_allclose(values_of(tmp_path / "a.gif"), expected_values(first), atol=2e-6)


@pytest.mark.filterwarnings("error::ResourceWarning")
def test_reading_a_file_leaves_it_closed_and_pillows_limit_alone(rgb: np.ndarray, tmp_path: Path) -> None:
    path = tmp_path / "a.gif"
    Image.fromarray(rgb).save(path, save_all=True, append_images=[Image.fromarray(rgb[::-1].copy())])
    limit = Image.MAX_IMAGE_PIXELS
    read_image(path)
    assert limit == Image.MAX_IMAGE_PIXELS is not None
    path.unlink()


# Sizes


@pytest.mark.parametrize(
    ("size", "source_hw", "wanted_hw"),
    [
        ({"shortest_edge": 32}, (40, 60), (32, 48)),
        ({"shortest_edge": 32}, (61, 40), (48, 32)),  # 48.8, rounded down as in CLIP's processor
        (32, (40, 60), (32, 48)),
        ({"shortest_edge": 80}, (40, 60), (80, 120)),
        ({"longest_edge": 30}, (40, 60), (20, 30)),
        ({"longest_edge": 120}, (60, 40), (120, 80)),
        ({"max_pixels": 600}, (40, 60), (20, 30)),
        ({"max_pixels": 2400}, (40, 60), (40, 60)),
        ({"max_pixels": 10**9}, (40, 60), (40, 60)),
        (None, (40, 60), (40, 60)),
    ],
)
def test_sizes_keep_the_ratio(size: Any, source_hw: tuple[int, int], wanted_hw: tuple[int, int]) -> None:
    batch = SparImageProcessor(size=size)(picture(*source_hw))
    assert tuple(batch["pixel_values"].shape) == (1, 3, *wanted_hw)
    assert batch["original_sizes"].tolist() == [list(source_hw)]


def test_max_pixels_is_never_exceeded() -> None:
    processor = SparImageProcessor(size={"max_pixels": 5000}, min_side_px=1)
    for height, width in [(71, 71), (500, 11), (997, 991), (333, 1000)]:
        new_height, new_width = processor.input_size_hw(height, width)
        assert new_height * new_width <= 5000
        assert math.isclose(new_height / new_width, height / width, rel_tol=0.12)


def test_do_resize_false_keeps_the_size() -> None:
    batch = SparImageProcessor(size={"shortest_edge": 32})(picture(40, 60), do_resize=False)
    assert tuple(batch["pixel_values"].shape) == (1, 3, 40, 60)


@pytest.mark.parametrize(
    ("source_hw", "wanted_hw"),
    [((1, 1), (16, 16)), ((1, 5000), (16, 5000)), ((5000, 1), (5000, 16)), ((15, 17), (16, 17))],
)
def test_no_side_is_shorter_than_a_patch(source_hw: tuple[int, int], wanted_hw: tuple[int, int]) -> None:
    batch = SparImageProcessor(size=None, min_side_px=16)(np.full((*source_hw, 3), 90, np.uint8))
    assert tuple(batch["pixel_values"].shape) == (1, 3, *wanted_hw)
    assert batch["original_sizes"].tolist() == [list(source_hw)]
    np.testing.assert_allclose(batch["pixel_values"][0, :, 0, 0], (90 / 255 - MEAN) / STD, atol=2e-6)


@pytest.mark.parametrize("source_hw", [(50, 75), (300, 211), (64, 64)])
def test_resizing_equals_clips_pillow_processor(source_hw: tuple[int, int]) -> None:
    image = Image.fromarray(picture(*source_hw))
    stock = CLIPImageProcessorPil(size={"shortest_edge": 64}, do_center_crop=False)(image, return_tensors="pt")
    ours = SparImageProcessor(size={"shortest_edge": 64})(image)
    torch.testing.assert_close(ours["pixel_values"], stock["pixel_values"].float(), atol=2e-6, rtol=0)


# Batches


def test_equal_sizes_are_stacked_and_others_listed() -> None:
    small, large = picture(20, 30), picture(30, 40)
    processor = SparImageProcessor(size=None)
    batch = processor([small, Image.fromarray(small)])
    assert tuple(batch["pixel_values"].shape) == (2, 3, 20, 30)
    mixed = processor([small, large])
    assert [tuple(values.shape) for values in mixed["pixel_values"]] == [(3, 20, 30), (3, 30, 40)]
    assert mixed["original_sizes"].tolist() == [[20, 30], [30, 40]]
    torch.testing.assert_close(mixed["pixel_values"][0], batch["pixel_values"][0])


def test_a_batched_array_is_several_images() -> None:
    arrays = np.stack([picture(20, 30, seed=0), picture(20, 30, seed=1)])
    batch = SparImageProcessor(size=None)(arrays)
    assert tuple(batch["pixel_values"].shape) == (2, 3, 20, 30)
    np.testing.assert_allclose(batch["pixel_values"][1].numpy(), expected_values(arrays[1]), atol=2e-6)


def test_numpy_output() -> None:
    batch = SparImageProcessor(size=None)(picture(20, 30), return_tensors="np")
    assert isinstance(batch["pixel_values"], np.ndarray) and batch["pixel_values"].dtype == np.float32
    assert batch["original_sizes"].tolist() == [[20, 30]]


# Refused


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims a size and holds no pixels."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("side", [10_001, 20_000, 60_000])
def test_a_huge_image_is_refused_on_its_header(side: int, tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(side, side))
    with pytest.raises(InvalidImageError, match=rf"huge\.png' has {side}x{side} pixels .* raise max_image_pixels"):
        SparImageProcessor()(path)


def test_a_raised_limit_is_obeyed_even_above_pillows_own(tmp_path: Path) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(14_000, 14_000))
    with pytest.raises(InvalidImageError, match="damaged"):  # it went on to decode, and there are no pixels
        read_image(path, ReadOptions(max_pixels=500_000_000))


def test_a_huge_image_is_never_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(20_000, 20_000))

    def load(image: Image.Image) -> None:
        raise AssertionError("decoded")

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    for source in (path, path.read_bytes()):
        with pytest.raises(InvalidImageError, match="raise max_image_pixels"):
            read_image(source)


def test_too_many_pixels_for_the_model_are_refused_before_resizing() -> None:
    processor = SparImageProcessor(size={"shortest_edge": 672})
    with pytest.raises(InvalidImageError, match=r"would be 672x3360000 pixels .* raise max_input_pixels"):
        processor(np.zeros((1, 5000, 3), np.uint8))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing.png", "'missing.png' does not exist"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image that can be read; allowed formats are .*PNG"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "not an image that can be read"),
        (b"", "not an image that can be read"),
        ("https://example.org/a.png", "is a URL; only files are read"),
        (np.full((8, 8, 3), np.nan, np.float32), "holds NaN or infinite pixels"),
        (np.full((8, 8, 3), np.inf), "holds NaN or infinite pixels"),
        (np.full((8, 8, 3), -0.5), "holds values from -0.5 to -0.5"),
        (np.full((8, 8, 3), 300), "holds values from 300 to 300"),
        (np.zeros((8, 8, 5), np.uint8), r"has shape \(8, 8, 5\)"),
        (np.zeros((0, 8, 3), np.uint8), "is empty"),
        (np.array([["a", "b"]]), "holds <U1 values"),
        (np.zeros((4, 4), complex), "holds complex128 values"),
        (7, "is a int; allowed are a path"),
        (None, "is a NoneType; allowed are a path"),
        ([], "there are no images"),
        ([np.zeros((8, 8), np.uint8), None], "image 2 of 2 is a NoneType"),
    ],
)
def test_refused_images_say_why(source: Any, message: str) -> None:
    with pytest.raises(InvalidImageError, match=message):
        SparImageProcessor()(source)


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif"])
def test_a_truncated_file_is_refused(rgb: np.ndarray, tmp_path: Path, suffix: str) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture(200, 200)).save(buffer, format={"jpg": "jpeg"}.get(suffix, suffix))
    (tmp_path / f"a.{suffix}").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    with pytest.raises(InvalidImageError, match=rf"a\.{suffix}' (is damaged|cannot be opened|is not an image)"):
        SparImageProcessor()(tmp_path / f"a.{suffix}")


def test_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidImageError, match="cannot be opened"):
        SparImageProcessor()(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"size": {"height": 32, "width": 32}}, "The ratio is always kept"),
        ({"size": {"shortest_edge": 0}}, r"size\['shortest_edge'\] is 0"),
        ({"size": {"shortest_edge": 12.5}}, "must be a whole number"),
        ({"resample": 9}, r"resample is 9; allowed are Pillow's filters .*3 \(bicubic\)"),
        ({"min_side_px": 0}, "min_side_px is 0"),
        ({"max_image_pixels": -1}, "max_image_pixels is -1"),
        ({"image_std": (0.0, 1.0, 1.0)}, "must be above 0"),
        ({"image_mean": (0.5,)}, "each needs three numbers"),
        ({"do_center_crop": True}, "does not know do_center_crop; allowed are size"),
        ({"max_image_pixel": 5}, "does not know max_image_pixel;"),
    ],
)
def test_wrong_arguments_are_refused_in_the_constructor_and_in_a_call(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SparImageProcessor(**arguments)
    with pytest.raises(ValueError, match=message):
        SparImageProcessor()(picture(20, 20), **arguments)


def test_a_call_does_not_change_the_processor() -> None:
    processor = SparImageProcessor()
    before = processor.to_dict()
    processor(picture(20, 20), size={"shortest_edge": 32}, image_mean=(0.5, 0.5, 0.5))
    assert processor.to_dict() == before


# Saved and loaded


@pytest.mark.parametrize("size", [None, {"max_pixels": 5000}, {"shortest_edge": 96}])
def test_save_and_load(size: Any, tmp_path: Path) -> None:
    processor = SparImageProcessor(
        size=size, image_mean=(0.5, 0.4, 0.3), min_side_px=8, max_image_pixels=12345, resample=2
    )
    processor.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert stored["image_processor_type"] == "SparImageProcessor"
    loaded = SparImageProcessor.from_pretrained(tmp_path)
    names = ("size", "image_mean", "image_std", "min_side_px", "max_image_pixels", "max_input_pixels", "resample")
    assert all(getattr(loaded, name) == getattr(processor, name) for name in names)
    assert SparImageProcessor.from_pretrained(tmp_path, size=48).size == {"shortest_edge": 48}


def test_a_plain_clip_file_gives_mean_std_and_filter_only(tmp_path: Path) -> None:
    CLIPImageProcessorPil(image_mean=[0.1, 0.2, 0.3], resample=2).save_pretrained(tmp_path)
    loaded = SparImageProcessor.from_pretrained(tmp_path)
    assert loaded.image_mean == [0.1, 0.2, 0.3] and loaded.resample == 2
    assert loaded.size == SparImageProcessor().size  # not the native 224, and no crop
