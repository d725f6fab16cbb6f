"""Random and broken pictures: each is read to upright RGB of the right size, or refused in one line."""

from __future__ import annotations

import io
import resource
import time
import warnings
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from spar_hf.image_file_spar import InvalidImageError
from spar_hf.image_io_spar import Header, read_header, read_image, read_stored
from spar_hf.image_values_spar import ReadOptions

SECONDS = 10.0
MEMORY_KB = 1_500_000  # over what the test had before, whatever a header claims
MODES = {
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "JPEG": ("L", "RGB", "CMYK"),
    "TIFF": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "I", "F", "YCbCr", "LAB"),
    "WEBP": ("RGB", "RGBA"),
    "GIF": ("L", "P", "RGB"),
    "BMP": ("1", "L", "P", "RGB", "RGBA"),
    "PPM": ("1", "L", "RGB", "I;16"),
    "TGA": ("L", "LA", "RGB", "RGBA", "P"),
    "JPEG2000": ("L", "RGB", "RGBA"),
    "AVIF": ("RGB", "RGBA"),
}
WITH_EXIF = ("PNG", "JPEG", "WEBP", "TIFF", "AVIF")


def noise(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def pillow_file(
    form: str, mode: str, size_hw: tuple[int, int], orientation: int, how: dict[str, Any], seed: int
) -> bytes:
    height, width = size_hw
    if mode in ("I;16", "I", "F"):
        image = Image.fromarray(noise(seed, height, width).astype({"I;16": "u2", "I": "i4", "F": "f4"}[mode]))
    elif mode == "LAB":
        image = Image.frombytes("LAB", (width, height), noise(seed, height, width, 3).tobytes())
    else:
        image = Image.fromarray(noise(seed, height, width, 4)).convert(mode)
    if form in WITH_EXIF and (form != "TIFF" or 1 <= orientation <= 8):  # libtiff refuses to write others
        exif = Image.Exif()
        exif[0x0112] = orientation
        how = {**how, "exif": exif}
    buffer = io.BytesIO()
    image.save(buffer, form, **how)
    return buffer.getvalue()


@st.composite
def files(draw: Any) -> tuple[bytes, tuple[int, int]]:
    """A picture's file and the size that it has upright."""
    size_hw = draw(st.tuples(st.integers(1, 40), st.integers(1, 40)))
    orientation, seed = draw(st.integers(0, 9)), draw(st.integers(0, 99))
    form = draw(st.sampled_from(sorted({*MODES, "bands"})))
    if form == "bands":
        count, dtype = draw(st.integers(1, 7)), draw(st.sampled_from(["u1", "i1", "u2", "i2", "u4", "i4", "f4", "f8"]))
        planar = draw(st.sampled_from(["contig", "separate"])) if count > 1 else None
        stored = noise(seed, *size_hw, count).astype(dtype)
        stored = np.moveaxis(stored, 2, 0) if planar == "separate" else stored
        compression = draw(st.sampled_from([None, "zlib", "lzma"]))
        how = {"tile": (16, 16)} if draw(st.booleans()) else {"rowsperstrip": draw(st.integers(1, 50))}
        if compression == "zlib" and dtype[0] != "f":
            how["predictor"] = draw(st.booleans()) or None
        buffer = io.BytesIO()
        order = draw(st.sampled_from("<>"))
        tifffile.imwrite(
            buffer,
            np.ascontiguousarray(stored if count > 1 else stored[..., 0]).astype(order + dtype),
            byteorder=order,
            bigtiff=order == "<" and draw(st.booleans()),
            photometric="rgb" if count >= 3 and draw(st.booleans()) else "minisblack",
            planarconfig=planar,
            compression=compression,
            extratags=[(274, 3, 1, orientation, True)],
            **how,
        )
        return buffer.getvalue(), Header(size_hw, orientation if 1 <= orientation <= 8 else 1).size_hw
    options: dict[str, Any] = {}
    if form == "TIFF":
        options["compression"] = draw(st.sampled_from(["raw", "tiff_lzw", "tiff_adobe_deflate", "packbits"]))
    if form == "TGA" and draw(st.booleans()):
        options["compression"] = "tga_rle"
    if form == "JPEG" and draw(st.booleans()):
        options["progressive"] = True
    mode = draw(st.sampled_from(MODES[form]))
    if mode == "YCbCr" and options.get("compression") == "raw":  # refused, and Pillow does not read it either
        options["compression"] = "tiff_lzw"
    turned = form in WITH_EXIF and 5 <= orientation <= 8
    return pillow_file(form, mode, size_hw, orientation, options, seed), size_hw[::-1] if turned else size_hw


@st.composite
def broken(draw: Any) -> bytes:
    """A file with bits flipped, bytes replaced, cut out or put in, or its end cut off."""
    content = bytearray(draw(files())[0])
    for _ in range(draw(st.integers(1, 3))):
        # Headers decide most: half of the faults are at the start.
        place = draw(st.integers(0, min(len(content), 200) if draw(st.booleans()) else len(content)))
        kind = draw(st.sampled_from(["flip", "flip", "flip", "bytes", "bytes", "cut", "insert", "truncate"]))
        if kind == "truncate":
            del content[max(place, 1) :]
        elif kind == "cut":
            del content[place : place + draw(st.integers(1, 32))]
        elif kind == "insert":
            content[place:place] = draw(st.binary(min_size=1, max_size=32))
        elif kind == "bytes":
            extreme = st.sampled_from([b"\xff" * 4, bytes(4), b"\x7f\xff\xff\xff", b"\xff\xff\xff\x7f"])
            piece = draw(st.one_of(st.binary(min_size=1, max_size=8), extreme))
            content[place : place + len(piece)] = piece
        elif place < len(content):
            content[place] ^= 1 << draw(st.integers(0, 7))
    return bytes(content)


OPTIONS = st.builds(
    ReadOptions,
    bands=st.sampled_from([None, None, None, None, (1,), (3, 2, 1)]),
    alpha=st.sampled_from(["auto", "compose", "ignore"]),
    value_range=st.sampled_from([None, None, "auto", (0.0, 3000.0)]),
)


def outcome(content: bytes, options: ReadOptions) -> Image.Image | None:
    """What was read, None where it was refused; anything else fails."""
    before, started = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    image = None
    try:
        image = read_image(content, options)
    except InvalidImageError as error:
        message = str(error)
        assert message and "\n" not in message and len(message) < 500
    else:
        assert image.mode == "RGB" and min(image.size) >= 1 and np.asarray(image).dtype == np.uint8
        assert read_header(content, options).size_hw == (image.height, image.width)
    for read in (read_header, read_stored):
        try:
            read(content, options)
        except InvalidImageError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - started < SECONDS
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < MEMORY_KB
    return image


def draw(examples: int, check: Callable[..., bool], **strategies: st.SearchStrategy[Any]) -> Counter[bool]:
    """Runs a check on so many drawn inputs, the same each time; how many were read and refused."""
    seen: Counter[bool] = Counter()

    @settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(**strategies)
    def run(**drawn: Any) -> None:
        seen[check(**drawn)] += 1

    run()
    return seen


def check_whole(file: tuple[bytes, tuple[int, int]], alpha: str) -> bool:
    content, size_hw = file
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = outcome(content, ReadOptions(alpha=alpha, value_range="auto"))
    assert image is not None and (image.height, image.width) == size_hw
    return True


@pytest.mark.parametrize("examples", [60, pytest.param(2000, marks=pytest.mark.fuzz)])
def test_whole_pictures_are_read_at_their_size(examples: int) -> None:
    seen = draw(examples, check_whole, file=files(), alpha=st.sampled_from(["auto", "compose", "ignore"]))
    assert seen[True] >= examples - 10  # hypothesis leaves out what it has drawn before


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, of metadata that are cut off
@pytest.mark.parametrize("examples", [100, pytest.param(3000, marks=pytest.mark.fuzz)])
def test_broken_pictures_are_read_or_refused(examples: int) -> None:
    for start in (b"", b"II*\0", b"MM\0*", b"P6\n", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", bytes(64)):
        assert outcome(start, ReadOptions()) is None
    seen = draw(
        examples, lambda content, options: outcome(content, options) is not None, content=broken(), options=OPTIONS
    )
    print(f"{seen[True]} pictures read, {seen[False]} refused")
    assert min(seen[True], seen[False]) > examples / 10
