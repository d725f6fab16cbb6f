"""`spar segment scene.tif`: rasters, read and written window by window at their own resolution."""

from __future__ import annotations

import argparse
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .labels import words_to_encode
from .options import open_model, read_labels
from .output import check_outputs, one_by_one
from .parser import check_one_of

if TYPE_CHECKING:
    from spar_hf.prompts_spar import Labels
    from spar_hf.rasters import RasterResult

WHEN = ("auto", "always", "never")
# TIFF's tags of width and height, and of a place on Earth: pixel scale, tie points, matrix, keys.
WIDTH, HEIGHT, GEOREFERENCE = 256, 257, {33550, 33922, 34264, 34735}
OWN_FORMATS = ("png", "geotiff")  # of what is written window by window; others want the picture in memory
OVERLAY_PX = 2048  # longer side of the overlay


def add_raster_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("rasters (docs/rasters.md; pip install 'spar-hf[geo]')")
    group.add_argument(
        "--raster",
        default="auto",
        metavar="auto|always|never",
        help="read and write window by window, at the file's own resolution, into NAME-labels.tif; auto: files with a "
        "place on Earth, and files of more than 100 million pixels or of a format that only GDAL reads, but not where "
        "--format asks for more than png and geotiff",
    )


def asked(args: argparse.Namespace) -> bool:
    """Whether the files are to be done as rasters.

    Raises:
        ValueError: some are and some are not.
    """
    when = check_one_of("--raster", args.raster, WHEN)
    files = [path for path in map(Path, args.images) if path.is_file()]
    if when != "auto" or not files:
        return when == "always"
    if set(args.formats or ()) - set(OWN_FORMATS):
        return False  # done as pictures, whose results keep the place on Earth
    rasters = [path for path in files if is_raster(path, args.max_pixels)]
    if rasters and len(rasters) < len(args.images):
        other = next(path for path in map(Path, args.images) if path not in rasters)
        raise ValueError(
            f"{rasters[0]} is a raster and {other} a picture, which are done in different ways; name them in two "
            "commands, or give --raster always or never"
        )
    return bool(rasters)


def is_raster(path: Path, max_pixels: int | None = None) -> bool:
    """Whether a file has a place on Earth, is too large for a picture, or of a format that only GDAL reads.

    Args:
        max_pixels: the user's own limit of a picture's size, above which it is refused.
    """
    from spar_hf.image_file_spar import MAX_FILE_BYTES, InvalidImageError, open_file, open_header
    from spar_hf.image_values_spar import MAX_IMAGE_PIXELS

    def is_large(width: int, height: int) -> bool:
        return max_pixels is None and (width * height > MAX_IMAGE_PIXELS or path.stat().st_size > MAX_FILE_BYTES)

    tags = tiff_tags(path)
    if tags is not None:
        return bool(GEOREFERENCE & tags.keys()) or is_large(tags.get(WIDTH, 0), tags.get(HEIGHT, 0))
    try:
        with open_file(path, str(path), sys.maxsize) as file, open_header(file) as image:
            return is_large(*image.size)
    except InvalidImageError:
        return _only_gdal_reads(path)


def _only_gdal_reads(path: Path) -> bool:
    from spar_hf.image_file_spar import InvalidImageError
    from spar_hf.image_values_spar import ReadOptions
    from spar_hf.rasters.source import open_raster

    try:
        with open_raster(path, ReadOptions(value_range=(0, 1))):
            return True
    except (InvalidImageError, ValueError):  # ValueError: rasterio is not installed
        return False


def tiff_tags(path: Path) -> dict[int, int] | None:
    """The tags of a TIFF's first directory, with their values where these are single numbers; None of another file."""
    with open(path, "rb") as file:
        start = file.read(16)
        kinds = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}
        if start[:4] not in kinds or len(start) < 16:
            return None
        order, big = kinds[start[:4]], b"+" in start[:4]
        offset = struct.unpack_from(f"{order}Q" if big else f"{order}I", start, 8 if big else 4)[0]
        count_size, entry_size = (8, 20) if big else (2, 12)
        try:
            file.seek(offset)
            count = int.from_bytes(file.read(count_size), "little" if order == "<" else "big")
            entries = file.read(min(count, 4096) * entry_size)
        except (OSError, ValueError, OverflowError):
            return {}
    tags = {}
    for place in range(0, len(entries) - entry_size + 1, entry_size):
        tag, kind = struct.unpack_from(f"{order}HH", entries, place)
        value = struct.unpack_from(
            {3: f"{order}H", 16: f"{order}Q"}.get(kind, f"{order}I"), entries, place + (12 if big else 8)
        )
        tags[tag] = value[0]
    return tags


def run(
    args: argparse.Namespace,
    competing: Callable[[Labels, argparse.Namespace], Labels],
    report: Callable[[dict[str, Any]], str],
) -> int:
    """Segments the rasters that are named; `competing` and `report` are those of pictures."""
    from tqdm import tqdm

    from spar_hf.rasters import segment_raster

    labels = read_labels(args.labels).with_thresholds(dict(args.class_threshold))
    options = _thresholds(args, labels)
    check_outputs(args)
    for path in args.images:
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
    opened = open_model(args)
    segmenter = opened.segmenter()
    rivalled = competing(replace(labels, background=options.get("background_class")), args)
    encoded = segmenter.encode_labels(words_to_encode(args, rivalled, opened))

    def do(path: Path, stem: str) -> dict[str, Any]:
        with tqdm(unit="block", leave=False, disable=None) as bar:

            def progress(done: int, total: int) -> None:
                bar.total = total
                bar.update(done - bar.n)

            started = time.perf_counter()
            result = segment_raster(
                path,
                segmenter,
                encoded,
                opened.processor.image_processor,
                args.output / f"{stem}-labels.tif",
                scores=args.output / f"{stem}-scores.tif" if args.scores else None,
                progress=progress,
                say=_notice,
                **options,
            )
        overlay = args.output / f"{stem}-overlay.png"
        _write_overlay(path, result, labels, opened.processor.image_processor.read_options, overlay)
        return _as_json(path, result, labels, overlay, round(time.perf_counter() - started, 4))

    return one_by_one(args.images, do, report, args, {**opened.facts, **options}, "rasters")


def _thresholds(args: argparse.Namespace, labels: Labels) -> dict[str, Any]:
    """Arguments of `segment`; refuses the options that have no meaning for a raster."""
    without = {
        "--area-threshold": (args.area_threshold, "classes are told window by window"),
        "--short-side": (
            args.short_side,
            "a raster is read at its own resolution; resample it before, with gdalwarp -tr",
        ),
        "--refine": (args.refine, "refinements look at whole pictures"),
        "--upsample": (args.upsample, "upsamplers look at whole pictures"),
        "--min-area": (args.min_area, "a component may reach over windows"),
        "--fill-holes": (args.fill_holes, "a hole may reach over windows"),
        "--smooth": (args.smooth, "it is for videos"),
        "--backend onnx": (args.backend == "onnx", "exported models run on pictures"),
        "--format": (set(args.formats or ()) - set(OWN_FORMATS), "its results are written window by window"),
    }
    for flag, (value, why) in without.items():
        if value:
            raise ValueError(f"{flag} does not go with a raster: {why}. Leave it out, or give --raster never")
    options = {
        name: value
        for name in ("background_threshold", "score_threshold")
        if (value := getattr(args, name)) is not None
    }
    if args.background is not None:
        check_one_of("class", args.background, labels.class_names)
        options["background_class"] = labels.class_names.index(args.background)
    return options


def _notice(line: str) -> None:
    from tqdm import tqdm

    names = {"attention_reach='window'": "--attention-reach window", "window_px": "--window-px"}
    for name, flag in {**names, "stride_px": "--stride-px"}.items():
        line = line.replace(name, flag)
    tqdm.write(f"spar: {line}", file=sys.stderr)


def _write_overlay(path: Path, result: RasterResult, labels: Labels, reading: Any, overlay: Path) -> None:
    from spar_hf.files import whole_files
    from spar_hf.rasters.preview import preview
    from spar_hf.visualize import overlay as tinted

    image, segmentation = preview(path, reading, result.label_map, labels, OVERLAY_PX)
    with whole_files(overlay) as (draft,):
        tinted(image, segmentation, labels).save(draft, format="PNG")


def _as_json(path: Path, result: RasterResult, labels: Labels, overlay: Path, seconds: float) -> dict[str, Any]:
    def share(index: int) -> float:
        return result.pixels.get(index, 0) / max(result.valid, 1)

    files = {"overlay": overlay, "label_map": result.label_map, "scores": result.scores}
    return {
        "image": str(path),
        "size_hw": list(result.size_hw),
        "grid_hw": list(result.grid_hw),
        "seconds": seconds,
        "resumed": result.resumed,
        "valid_pixels": result.valid,
        "classes": [
            {"id": number, "label": name, "area_fraction": share(index)}
            for index, (number, name) in enumerate(zip(labels.written_ids, labels.class_names, strict=True))
        ],
        "no_class": share(-1),
        "files": {what: str(file) for what, file in files.items() if file is not None},
    }
