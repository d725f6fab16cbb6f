"""The one reader of pictures: bands, depth, alpha, orientation, limits, and the same in evaluation and training."""

from __future__ import annotations

import io
import itertools
import os
import struct
import sys
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image, ImageOps

from spar_cli.main import main
from spar_hf.evaluation import load_benchmark
from spar_hf.image_file_spar import InvalidImageError
from spar_hf.image_io_spar import TURNS, read_header, read_image, read_stored, turn
from spar_hf.image_processing_spar import SparImageProcessor
from spar_hf.image_values_spar import ReadOptions, say_once
from spar_hf.sources import BadImage, DatasetPhotographs, Photographs, image_folder, tar_files

RED, GREEN, BLUE = (200, 30, 20), (10, 180, 40), (30, 60, 220)


@pytest.fixture(autouse=True)
def fresh_notices() -> None:
    say_once.cache_clear()


def scene(height: int = 24, width: int = 40) -> np.ndarray:
    """(H, W, 3): no row, column, channel or corner is like another."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x * 255 // (width - 1), y * 255 // (height - 1), (7 * x + 3 * y) % 256], axis=-1).astype(np.uint8)


def read(source: Any, **options: Any) -> np.ndarray:
    image = read_image(source, ReadOptions(**options))
    assert image.mode == "RGB"
    return np.asarray(image)


def tiff(values: np.ndarray, **how: Any) -> bytes:
    buffer = io.BytesIO()
    how = {"photometric": "rgb", **how}
    tifffile.imwrite(buffer, values, **how)
    return buffer.getvalue()


def with_nir(rgb: np.ndarray) -> np.ndarray:
    """A fourth band as near infrared has it: neither 0 nor full."""
    return np.concatenate([rgb, (40 + rgb[..., :1] // 2)], axis=2)


# Bands


def test_near_infrared_marked_as_alpha_is_not_opacity(caplog: pytest.LogCaptureFixture) -> None:
    rgb = scene()
    file = tiff(with_nir(rgb), extrasamples=["unassalpha"])  # as GDAL marks it
    assert Image.open(io.BytesIO(file)).mode == "RGBA"
    assert np.array_equal(read(file), rgb)
    assert "marked as alpha" in caplog.text and "alpha='compose'" in caplog.text
    opacity = with_nir(rgb)[..., 3:] / 255
    assert np.abs(read(file, alpha="compose") - (rgb * opacity + 255 * (1 - opacity))).max() <= 1
    assert np.array_equal(read(file, bands=(4, 3, 2)), with_nir(rgb)[..., [3, 2, 1]])


@pytest.mark.parametrize("form", ["PNG", "WEBP", "TIFF"])
def test_only_a_tiffs_alpha_is_left_out(form: str, caplog: pytest.LogCaptureFixture) -> None:
    rgba = np.dstack([scene(), np.full((24, 40), 128, np.uint8)])
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, form, **({"lossless": True} if form == "WEBP" else {}))
    composed = np.asarray(
        Image.alpha_composite(Image.new("RGBA", (40, 24), "white"), Image.fromarray(rgba)).convert("RGB")
    )
    assert np.array_equal(read(buffer.getvalue()), scene() if form == "TIFF" else composed)
    assert np.array_equal(read(buffer.getvalue(), alpha="compose"), composed)
    assert np.array_equal(read(buffer.getvalue(), alpha="ignore"), scene())


def test_an_opaque_tiff_is_read_without_a_notice(caplog: pytest.LogCaptureFixture) -> None:
    file = tiff(np.dstack([scene(), np.full((24, 40), 255, np.uint8)]), extrasamples=["unassalpha"])
    assert np.array_equal(read(file), scene())
    assert caplog.text == ""


@pytest.mark.parametrize(("count", "dtype"), [(4, "u2"), (5, "u1"), (8, "u2"), (2, "u1")])
def test_bands_of_a_tiff(count: int, dtype: str, caplog: pytest.LogCaptureFixture) -> None:
    bands = np.concatenate([scene(), scene()[::-1], scene()[:, ::-1]], axis=2)[..., :count]
    file = tiff(bands.astype(dtype) * (257 if dtype == "u2" else 1), photometric="minisblack", planarconfig="contig")
    first = bands[..., [0, 1, 2] if count > 2 else [0, 0, 0]]
    assert np.array_equal(read(file), first)
    assert f"has {count} bands" in caplog.text and "bands=(" in caplog.text
    assert np.array_equal(read(file, bands=(2, 1, 1)), bands[..., [1, 0, 0]])
    assert np.array_equal(read(file, bands=(2,)), bands[..., [1, 1, 1]])
    with pytest.raises(InvalidImageError, match=f"has {count} bands; bands is 1, 2, 9"):
        read(file, bands=(1, 2, 9))


LAYOUTS = list(itertools.product("<>", ["contig", "separate"], [None, "zlib", "predicted"], [None, (32, 48)]))


@pytest.mark.parametrize("dtype", ["u1", "u2", "i2", "f4", "f8"])
def test_every_layout_of_a_tiff_equals_tifffile(dtype: str) -> None:
    rng = np.random.default_rng(0)
    for order, planar, compression, tile in LAYOUTS:
        if compression == "predicted" and dtype.startswith("f"):
            continue  # below; tifffile writes it with a further package only
        for count in (1, 2, 3, 5):
            if (count == 1 and planar == "separate") or (count == 3 and dtype == "u1"):
                continue
            values = rng.integers(0, 200, (70, 101, count)).astype(dtype)
            stored = np.moveaxis(values, 2, 0) if planar == "separate" else values
            file = tiff(
                np.ascontiguousarray(stored[..., 0] if count == 1 else stored).astype(order + dtype),
                byteorder=order,
                photometric="rgb" if count >= 3 else "minisblack",
                planarconfig=planar if count > 1 else None,
                compression="zlib" if compression == "predicted" else compression,
                predictor=compression == "predicted" or None,
                **({"tile": tile} if tile else {"rowsperstrip": 16}),
            )
            pixels = read_stored(file).values
            assert np.array_equal(pixels.reshape(values.shape), values), (order, planar, compression, tile, count)


@pytest.mark.parametrize("dtype", ["f4", "f8"])
@pytest.mark.parametrize("order", "<>")
def test_the_predictor_of_floats(dtype: str, order: str) -> None:
    """Adobe's Technical Note 3: a row's highest bytes, then its next, ...; each minus the byte of the pixel before."""
    values = np.random.default_rng(0).normal(size=(7, 11, 5)).astype(dtype)
    strip = b""
    for row in values:
        big = [np.array([value], ">" + dtype).tobytes() for value in row.ravel()]
        planes = bytes(sample[byte] for byte in range(values.itemsize) for sample in big)
        strip += bytes((byte - (planes[i - 5] if i >= 5 else 0)) % 256 for i, byte in enumerate(planes))
    packed = zlib.compress(strip)
    tags = {
        256: 11,
        257: 7,
        258: 8 * values.itemsize,
        259: 8,
        262: 1,
        273: 8,
        277: 5,
        278: 7,
        279: len(packed),
        317: 3,
    }
    tags[339] = 3
    entries = b"".join(struct.pack(order + "HHII", tag, 4, 1, value) for tag, value in tags.items())
    header = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(order + "I", 8 + len(packed))
    file = header + packed + struct.pack(order + "H", len(tags)) + entries + bytes(4)
    assert np.array_equal(read_stored(file).values, values)


@pytest.mark.parametrize("compression", ["tiff_lzw", "packbits", "tiff_adobe_deflate", "raw"])
def test_tiffs_that_pillow_writes(compression: str) -> None:
    rgba = with_nir(scene())
    buffer = io.BytesIO()
    Image.fromarray(rgba).save(buffer, "TIFF", compression=compression)
    assert np.array_equal(read_stored(buffer.getvalue()).values, rgba)
    assert np.array_equal(read(buffer.getvalue()), scene())


def test_big_tiff() -> None:
    bands = np.concatenate([scene(), scene()], axis=2)
    assert np.array_equal(read(tiff(bands, bigtiff=True)), scene())


def test_a_tiff_of_a_kind_that_is_not_read_says_so() -> None:
    for bits in (12, 24):  # the directory of a 16-bit file, changed
        file = tiff(np.zeros((8, 8, 6), np.uint16)).replace(
            struct.pack("<6H", *[16] * 6), struct.pack("<6H", *[bits] * 6)
        )
        with pytest.raises(InvalidImageError, match=rf"TIFF of 6 bands of {bits} bits.* Save it"):
            read(file)
    picture = Image.fromarray(scene()).convert("YCbCr")
    for compression in ("tiff_lzw", "raw"):
        buffer = io.BytesIO()
        picture.save(buffer, "TIFF", compression=compression)
        if compression == "raw":
            with pytest.raises(InvalidImageError, match=r"TIFF in YCbCr without compression.* Save it as RGB"):
                read(buffer.getvalue())
        else:
            assert np.abs(read(buffer.getvalue()).astype(int) - np.asarray(picture.convert("RGB"))).max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "bands"])
def test_every_orientation_is_undone(orientation: int, kind: str) -> None:
    rgb = scene()
    stored = stored_as(rgb, orientation)
    if kind == "bands":
        file = tiff(with_nir(stored), extratags=[(274, 3, 1, orientation, True)])
    else:
        file = encode(stored, kind, orientation)
    expected = (
        np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(file))).convert("RGB")) if kind != "bands" else rgb
    )
    found = read(file)
    assert found.shape == rgb.shape and np.array_equal(found, expected)
    header = read_header(file)
    assert header.size_hw == (24, 40) and header.stored_hw == stored.shape[:2] and header.orientation == orientation
    assert np.array_equal(turn(stored, orientation), rgb)
    # Whoever reads the picture next doesn't turn it again.
    assert np.array_equal(read(read_image(file)), found)


def stored_as(upright: np.ndarray, orientation: int) -> np.ndarray:
    """What `orientation` makes upright: the inverse of Pillow's turn."""
    inverse = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    turned = inverse.get(orientation, TURNS.get(orientation))
    return upright if turned is None else np.asarray(Image.fromarray(upright).transpose(turned))


def encode(values: np.ndarray, form: str, orientation: int = 1) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    buffer = io.BytesIO()
    Image.fromarray(values).save(buffer, form, exif=exif, **({"quality": 95} if form == "JPEG" else {}))
    return buffer.getvalue()


# Depth and range


def png_16(values: np.ndarray, colour_type: int) -> bytes:
    """A 16-bit PNG (H, W, C), which Pillow can't write in colour."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("kind", ["png grey", "png rgb", "png rgba", "tiff", "array"])
def test_16_bits_are_read_on_their_whole_scale(kind: str) -> None:
    deep = np.random.default_rng(0).integers(0, 65536, (24, 40, 3)).astype(np.uint16)
    expected = np.rint(deep / 257)
    opaque = np.full((24, 40, 1), 65535, np.uint16)
    source = {
        "png grey": lambda: png_16(deep[..., :1], 0),
        "png rgb": lambda: png_16(deep, 2),
        "png rgba": lambda: png_16(np.concatenate([deep, opaque], axis=2), 6),
        "tiff": lambda: tiff(deep),
        "array": lambda: deep,
    }[kind]()
    assert np.array_equal(read(source), expected[..., [0, 0, 0]] if kind == "png grey" else expected)


@pytest.mark.parametrize("kind", ["png grey", "png rgb", "tiff", "bands", "array"])
def test_12_bits_in_16_are_scaled_when_asked_and_named_when_not(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    deep = scene().astype(np.uint16) * 12  # 0 to 3060
    source = {
        "png grey": lambda: png_16(deep[..., :1], 0),
        "png rgb": lambda: png_16(deep, 2),
        "tiff": lambda: tiff(deep),
        "bands": lambda: tiff(with_nir(deep)),
        "array": lambda: deep,
    }[kind]()
    expected = scene()[..., [0, 0, 0]] if kind == "png grey" else scene()
    assert read(source).max() <= 12
    assert "from 0 to 3060 in band" in caplog.text and "value_range='auto'" in caplog.text
    caplog.clear()
    assert np.array_equal(read(source, value_range="auto"), expected)
    assert "0 becomes black and 3060 white" in caplog.text
    assert np.array_equal(read(source, value_range=(0, 3060)), expected)
    clipped = np.clip((expected * 12.0 - 600) / 1200 * 255, 0, 255)
    assert np.abs(read(source, value_range=(600, 1800)) - clipped).max() <= 0.5


def test_auto_range_starts_at_the_lowest_value_where_that_is_far_from_0() -> None:
    kelvin = 280 + scene()[..., 0] / 255 * 30
    assert np.array_equal(read(kelvin.astype(np.float32), value_range="auto")[..., 0], scene()[..., 0])
    assert np.array_equal(read(-(kelvin - 310), value_range="auto")[..., 0], 255 - scene()[..., 0])
    assert read(np.full((20, 20), 7, np.uint16), value_range="auto").max() == 0  # flat: there is no range


@pytest.mark.parametrize("highest", [1.001, 1.3])
def test_floats_a_little_over_1_are_refused(highest: float) -> None:
    """What bicubic resizing makes of 0 to 1 would be black as 0 to 255."""
    with pytest.raises(InvalidImageError, match=r"neither 0 to 1 nor 0 to 255. Clip"):
        read(scene() / 255 * highest)


@pytest.mark.parametrize("dtype", ["uint8", "float32"])
def test_8_bit_tensors_are_converted(dtype: str) -> None:
    import torch

    processor, pixels = SparImageProcessor(size=None), torch.from_numpy(scene()).permute(2, 0, 1)
    wanted = processor(Image.fromarray(scene()))["pixel_values"]
    assert torch.allclose(processor(pixels.to(getattr(torch, dtype)))["pixel_values"], wanted, atol=1e-6)
    with pytest.raises(InvalidImageError, match="Pass pixels that are not normalised yet"):
        processor(wanted[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": (1, 2)}, "one or three band numbers"),
        ({"bands": (0, 1, 2)}, "counted from 1"),
        ({"alpha": "yes"}, "allowed are auto, compose, ignore"),
        ({"value_range": "full"}, "give 'auto', or two numbers"),
        ({"value_range": (5, 5)}, "give 'auto', or two numbers"),
        ({"value_range": (0, float("nan"))}, "give 'auto', or two numbers"),
    ],
)
def test_wrong_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ReadOptions(**options)
    with pytest.raises(ValueError, match=message):
        SparImageProcessor(**options)


def test_options_are_saved_with_the_processor(tmp_path: Path) -> None:
    processor = SparImageProcessor(bands=(3, 2, 1), alpha="ignore", value_range=(0, 3000), max_image_ratio=50)
    processor.save_pretrained(tmp_path)
    assert SparImageProcessor.from_pretrained(tmp_path).read_options == processor.read_options
    assert processor.read_options.bands == (3, 2, 1) and processor.read_options.value_range == (0.0, 3000.0)


# Limits and formats


@pytest.mark.parametrize("size", [(65535, 1), (150_000, 1), (1, 65535)])
def test_a_line_is_no_picture(size: tuple[int, int]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", size).save(buffer, "PNG")
    with pytest.raises(InvalidImageError, match=r"one side may be 10,000 times the other"):
        read(buffer.getvalue())


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipes_and_devices_are_refused_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(tmp_path / "a.png")
    for path in (tmp_path / "a.png", Path("/dev/zero")):
        with pytest.raises(InvalidImageError, match="pipe, socket or device; only regular files"):
            read(path)
    with pytest.raises(BadImage, match="pipe, socket or device"):
        image_folder(str(tmp_path)).size_hw(0)
    for step in (image_folder(str(tmp_path)).fingerprint, lambda index: image_folder(str(tmp_path)).draw(index, 9, 9)):
        with pytest.raises(BadImage, match="pipe, socket or device"):
            step(0)
    assert main(["segment", str(tmp_path / "a.png"), "--labels", "sea", "--output", str(tmp_path / "o")]) == 2
    assert "pipe, socket or device" in capsys.readouterr().err


def slow_files() -> dict[str, bytes]:
    """Files that keep Pillow's headers busy in Python: 2 MB here, 50 MB took 22 s."""
    jpeg, gif = encode(scene(), "JPEG"), io.BytesIO()
    Image.fromarray(scene()).save(gif, "GIF")
    start = gif.getvalue()
    colours = 13 + 3 * 2 ** ((start[10] & 7) + 1)
    crumb = struct.pack(">I", 0) + b"tEXt" + struct.pack(">I", zlib.crc32(b"tEXt"))
    png = encode(scene(), "PNG")
    return {
        "pnm comment": b"P6\n#" + b"a" * 2**21 + b"\n4 4\n255\n" + bytes(48),
        "jpeg fill": jpeg[:2] + b"\xff" * 2**21 + jpeg[2:],
        "gif comment": start[:colours] + b"!\xfe" + (b"\xff" + b"a" * 255) * 2**13 + b"\0" + start[colours:],
        "png crumbs": png[:33] + crumb * 2**17 + png[33:],
        "png crumbs behind": png[:-12] + crumb * 2**18 + png[-12:],
    }


@pytest.mark.parametrize("kind", list(slow_files()))
def test_metadata_is_not_read_for_minutes(kind: str) -> None:
    with pytest.raises(InvalidImageError, match=r"mostly comments .* Save it anew"):
        read(slow_files()[kind])


def test_large_files_are_refused_before_they_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    with open(path, "wb") as file:
        file.truncate(2**30)  # sparse
    with pytest.raises(InvalidImageError, match="has 1024 MB; at most 512 MB are read"):
        read(path)
    with pytest.raises(InvalidImageError, match="at most 0 MB"):
        read(encode(scene(), "PNG"), max_file_bytes=100)


def test_what_python_would_decode_is_limited() -> None:
    file = b"P6 3000 2000 254\n" + bytes(18_000_000)  # a maximum other than 255: Pillow loops over samples
    with pytest.raises(InvalidImageError, match="a kind of PPM that is slow to decode; at most 4 million"):
        read(file)
    assert read(b"P6 2 2 254\n" + bytes([254] * 12)).min() == 255


def test_jpeg_2000_takes_four_times_the_memory() -> None:
    assert read(encode(scene(), "JPEG2000")).shape == (24, 40, 3)
    with pytest.raises(InvalidImageError, match=r"at most 0\.00075 million are read"):
        read(encode(scene(), "JPEG2000"), max_pixels=3000)


def test_a_tiff_of_too_many_pieces_or_bytes_is_refused() -> None:
    many = tiff(np.zeros((24, 40, 5), np.uint8), rowsperstrip=1)
    place = many.index(struct.pack("<HHI", 273, 4, 24)) + 4
    with pytest.raises(InvalidImageError, match="TIFF directory"):
        read(many[:place] + struct.pack("<I", 23) + many[place + 4 :])
    with pytest.raises(InvalidImageError, match=r"24x40 pixels in 5 bands of 16 bits, .* are decoded"):
        read(tiff(np.zeros((24, 40, 5), np.uint16)), max_pixels=960)


@pytest.mark.parametrize("content", [b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", b"%PDF-1.4\n", b"<svg/>"])
def test_raster_formats_only_wherever_pictures_are_read(content: bytes, tmp_path: Path) -> None:
    for name in ("images", "masks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(content)
    (tmp_path / "classes.txt").write_text("sea\nsky\n")
    with pytest.raises(InvalidImageError, match="not an image that can be read"):
        read(tmp_path / "images" / "a.png")
    source = image_folder(str(tmp_path / "images"))
    for step in (source.size_hw, lambda index: source.draw(index, 8, 8)):
        with pytest.raises(BadImage, match="not an image that can be read"):
            step(0)
    data = benchmark(tmp_path)
    with pytest.raises(ValueError, match="not an image that can be read"):
        data.read(0)


def test_an_eps_that_pillow_has_opened_is_refused() -> None:
    image = Image.open(io.BytesIO(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"))
    with pytest.raises(InvalidImageError, match="EPS, no raster"):
        read(image)


def test_heic_is_read_where_pillow_heif_is_and_named_where_not(monkeypatch: pytest.MonkeyPatch) -> None:
    pillow_heif = pytest.importorskip("pillow_heif")
    rgb = np.asarray(Image.fromarray(scene(4, 5)).resize((80, 64)))
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6
    pillow_heif.from_pillow(Image.fromarray(stored_as(rgb, 6))).save(buffer, quality=95, exif=exif.tobytes())
    found = read(buffer.getvalue())
    assert found.shape == rgb.shape and np.abs(found.astype(int) - rgb).mean() < 4
    assert read_header(buffer.getvalue()).size_hw == rgb.shape[:2]
    with pytest.raises(InvalidImageError, match=r"are read. Shrink it, or raise max_image_pixels"):
        read(buffer.getvalue(), max_pixels=100)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(InvalidImageError, match=r"is HEIC, .*pip install 'spar-hf\[heif\]'"):
        read(buffer.getvalue())


# Evaluation and training read the same


def benchmark(folder: Path, **options: Any) -> Any:
    return load_benchmark(
        "custom", images=folder / "images", masks=folder / "masks", classes=folder / "classes.txt", **options
    )


def write_pair(folder: Path, image: bytes, mask: np.ndarray, suffix: str = "jpg") -> Path:
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    (folder / "images" / f"a.{suffix}").write_bytes(image)
    Image.fromarray(mask).save(folder / "masks" / "a.png")
    (folder / "classes.txt").write_text("left\nright\nother\n")
    return folder


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("square", [False, True])
def test_a_picture_and_its_label_map_are_never_turned_apart(orientation: int, square: bool, tmp_path: Path) -> None:
    rgb = scene(32, 32) if square else scene(24, 40)
    mask = (rgb[..., 0] > 90).astype(np.uint8) + (rgb[..., 1] > 170)
    file = encode(stored_as(rgb, orientation), "JPEG", orientation)
    pairs = {
        "upright": write_pair(tmp_path / "upright", file, mask),
        "stored": write_pair(tmp_path / "stored", file, stored_as(mask, orientation)),
    }
    told_by_size = orientation == 1 or (orientation >= 5 and not square)
    for how, folder in pairs.items():
        for given in (None, how):
            if given is None and not told_by_size:
                with pytest.raises(ValueError, match=r"EXIF orientation .* does not tell .* mask_orientation"):
                    benchmark(folder).read(0)
                continue
            sample = benchmark(folder, mask_orientation=given).read(0)
            assert np.array_equal(sample.target, mask)
            assert np.array_equal(np.asarray(sample.image), read(file))


def test_a_label_map_may_have_an_orientation_of_its_own(tmp_path: Path) -> None:
    rgb, mask = scene(), (scene()[..., 0] > 90).astype(np.uint8)
    folder = write_pair(tmp_path, encode(stored_as(rgb, 3), "JPEG", 3), mask)
    (folder / "masks" / "a.png").write_bytes(encode(stored_as(mask, 3), "PNG", 3))
    assert np.array_equal(benchmark(folder).read(0).target, mask)


def test_an_unknown_mask_orientation_is_refused(tmp_path: Path) -> None:
    folder = write_pair(tmp_path, encode(scene(), "JPEG"), np.zeros((24, 40), np.uint8))
    with pytest.raises(ValueError, match="mask_orientation is 'turned'; choose one of 'upright', 'stored'"):
        benchmark(folder, mask_orientation="turned")


def pictures() -> dict[str, bytes]:
    rgba = Image.fromarray(np.dstack([scene(), scene()[..., 0]]))
    buffer = io.BytesIO()
    rgba.save(buffer, "PNG")
    return {
        "16-bit grey": png_16(scene()[..., :1].astype(np.uint16) * 257, 0),
        "16-bit rgb": png_16(scene().astype(np.uint16) * 257, 2),
        "alpha": buffer.getvalue(),
        "nir": tiff(with_nir(scene()), extrasamples=["unassalpha"]),
        "5 bands": tiff(np.concatenate([scene(), scene()], axis=2)[..., :5]),
        "turned": encode(scene(), "JPEG", 6),
        "bmp": encode(scene(), "BMP"),
    }


@pytest.mark.parametrize("name", list(pictures()))
def test_inference_evaluation_and_training_read_the_same(name: str, tmp_path: Path) -> None:
    import datasets

    content, suffix = pictures()[name], {"turned": "jpg", "nir": "tif", "5 bands": "tif"}.get(name, "png")
    expected = read(content)
    assert 0 < expected.mean() < 250 and expected.std() > 20
    height, width = expected.shape[:2]
    folder = write_pair(tmp_path / "pair", content, np.zeros((height, width), np.uint8), suffix)
    assert np.array_equal(np.asarray(benchmark(folder).read(0).image), expected)
    path = folder / "images" / f"a.{suffix}"
    assert np.array_equal(np.asarray(SparImageProcessor().open_rgb(path)), expected)
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        tar.add(path, path.name)
    column = datasets.Dataset.from_dict({"image": [str(path)]}).cast_column("image", datasets.Image(decode=False))
    sources = [
        image_folder(str(folder / "images")),
        tar_files([str(tmp_path / "a.tar")]),
        DatasetPhotographs({}, ["a"], column["image"]),
    ]
    for source in sources:
        assert source.size_hw(0) == (height, width)
        assert np.array_equal(source.draw(0, height, width), expected)


def test_a_header_longer_than_what_is_read_first(tmp_path: Path) -> None:
    """Of a tar's members the first bytes are read; a long profile, or a directory at the end, needs more."""
    buffer = io.BytesIO()
    Image.fromarray(scene()).save(buffer, "JPEG", icc_profile=bytes(200_000))
    noise = np.random.default_rng(0).integers(0, 255, (120, 200, 5), np.uint8)
    for name, content, size in (("a.jpg", buffer.getvalue(), (24, 40)), ("a.tif", tiff(noise), (120, 200))):
        assert len(content) > 70_000
        (tmp_path / "f").write_bytes(b"x" * 17 + content)
        source = Photographs({}, [name], [(tmp_path / "f", 17, len(content))])
        assert source.size_hw(0) == size


def test_training_reads_with_the_options_it_is_given(tmp_path: Path) -> None:
    (tmp_path / "a.tif").write_bytes(tiff(with_nir(scene())))
    source = image_folder(str(tmp_path))
    source.read_with(bands=(4, 3, 2))
    assert np.array_equal(source.draw(0, 24, 40), with_nir(scene())[..., [3, 2, 1]])
    assert source.description["bands"] == [4, 3, 2]


# The command line


def test_segment_reads_bands_and_range(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    deep = np.stack([scene(48, 64)[..., i] for i in (2, 1, 0)], axis=-1).astype(np.uint16) * 12
    (tmp_path / "a.tif").write_bytes(tiff(np.concatenate([deep, deep], axis=2)))
    Image.fromarray(scene(48, 64)).save(tmp_path / "b.png")
    words = ["--labels", "sea; sky; sand", "--output", str(tmp_path / "o")]
    assert main(["segment", str(tmp_path / "a.tif"), *words]) == 0
    notes = capsys.readouterr().err
    assert "has 6 bands" in notes and "--bands 3,2,1" in notes
    assert "from 0 to 3060 in bands 1, 2, 3" in notes and "--range auto" in notes
    assert main(["segment", str(tmp_path / "a.tif"), *words, "--bands", "3,2,1", "--range", "auto"]) == 0
    assert "0 becomes black and 3060 white" in capsys.readouterr().err
    assert main(["segment", str(tmp_path / "b.png"), *words]) == 0
    maps = [np.asarray(Image.open(tmp_path / "o" / f"{name}-labels.png")) for name in "ab"]
    assert np.array_equal(*maps)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--bands", "1,2"], "three band numbers, such as 3,2,1"),
        (["--bands", "0,1,2"], "three band numbers"),
        (["--alpha", "white"], "choose one of auto, compose, ignore"),
        (["--range", "low"], "give auto, or what is black and white"),
        (["--range", "9,1"], "give auto, or what is black and white"),
        (["--bands", "7,2,1"], "has 3 bands; bands is 7, 2, 1"),
    ],
)
def test_wrong_picture_options_are_one_line(
    option: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(scene()).save(tmp_path / "a.png")
    assert main(["segment", str(tmp_path / "a.png"), "--labels", "sea; sky", *option]) == 2
    error = capsys.readouterr().err
    assert message in error and len(error.strip().splitlines()) == 1


@pytest.mark.slow
def test_the_largest_pictures_stay_within_memory() -> None:
    """100 million pixels of the kinds that take most: 16-bit colour, alpha, a rotated photograph."""
    import subprocess

    code = """
import io, resource, sys
import numpy as np
from PIL import Image
from spar_hf.image_io_spar import read_image
mode, size = sys.argv[1], (10_000, 10_000)
buffer = io.BytesIO()
exif = Image.Exif(); exif[0x0112] = 6
image = Image.new(mode, size, 0 if len(mode) == 1 or mode == "I;16" else (9,) * len(mode))
image.save(buffer, "PNG", exif=exif, compress_level=1)
del image
content = buffer.getvalue()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
assert read_image(content).size == size
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 2**10)
"""
    for mode in ("1", "I;16", "RGB", "RGBA"):
        run = subprocess.run([sys.executable, "-c", code, mode], capture_output=True, text=True, check=True)
        assert float(run.stdout) < 1500, mode
