"""segment_raster: one picture of any size, from a file to files, in constant memory; a killed run goes on."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..encoder_spar import DenseVisionModel
from ..encoders.sliding_window import SlidingWindow
from ..files import digest, full_disk_in_words, require_disk, weights_digest, whole_files
from ..image_values_spar import ReadOptions
from ..results_spar import NO_CLASS
from ..segmentation_spar import FromFeatures, Segmenter, segment
from ..visualize import as_written
from .blocks import Grid, block_side, runs
from .features import Features, Journal, Progress, tower_features, window_features, work_bytes
from .geotiff import TILE_PX, MapWriter, no_class_value, write_categories
from .labels import WindowScores, unit_text
from .source import Raster, Rectangle, open_raster, quiet_gdal
from .store import grid_file, work_folder

MEMORY_BYTES = 1_200_000_000  # for a block; the process takes some hundred megabytes beside it
WINDOW_PX = 2 * TILE_PX  # of pixels whose classes are found at once
NATIVE_SIDES = 3  # of the window for plain attention, where the processor knows no size: as many native sides


@dataclass(frozen=True)
class RasterResult:
    """What came of a raster.

    Attributes:
        size_hw, grid_hw: height and width in pixels, rows and columns of patches.
        pixels: of each class that occurs, by id; -1 is no class.
        valid: pixels that are any, of which the classes' shares are told.
        label_map, scores: the files.
        resumed: whether a run that was stopped went on.
    """

    size_hw: tuple[int, int]
    grid_hw: tuple[int, int]
    pixels: dict[int, int]
    valid: int
    label_map: Path
    scores: Path | None
    resumed: bool


def raster_encoder(
    segmenter: Segmenter, image_processor: Any, memory_bytes: int = MEMORY_BYTES
) -> tuple[DenseVisionModel | SlidingWindow, str | None]:
    """The encoder that runs on a raster, and one line about it where it is not the one that runs on pictures.

    A tower whose attention is within reach, and a sliding window, give the same features in blocks as over the whole.
    Attention over the whole image can't; there a window slides, half a side at a time, of the size that pictures are
    resized to for the model.

    Raises:
        ValueError: the segmenter gives no features to cut into blocks.
    """
    if type(segmenter) is not FromFeatures:
        raise ValueError(
            "a raster is done in blocks of features, and this method, refinement or upsampler looks at whole "
            "pictures; leave it out, or cut the raster into pictures."
        )
    encoder, patch_px = segmenter.encoder, segmenter.config.patch_size
    side = block_side(memory_bytes, segmenter.config.hidden_size, patch_px)
    if isinstance(encoder, SlidingWindow):
        return _batched(encoder, side), None
    if isinstance(encoder, DenseVisionModel) and encoder.config.attention_reach == "window" and _is_local(encoder):
        return encoder, None
    window = min(_working_px(image_processor, segmenter.config) // patch_px, side)
    sliding = SlidingWindow(encoder, window * patch_px, max(window // 2, 1) * patch_px)
    return _batched(sliding, side), (
        f"this model looks at the whole picture at once, so on a raster a window of {sliding.window_px} px slides, "
        f"{sliding.stride_px} px at a time; with attention_reach='window' it needs one pass, and window_px and "
        "stride_px choose another window"
    )


def _is_local(vision: DenseVisionModel) -> bool:
    """Whether the last block asks for nothing beyond reach: no statistics of the image, no matrix of all patches."""
    recipe = getattr(vision, "recipe", None)
    if recipe is None:
        return True
    plain = all(t.block == 12 and not t.iterations and t.sigma_patches is None for t in recipe.terms)
    return bool(plain and recipe.blocks == 1)


def _working_px(image_processor: Any, config: Any) -> int:
    """About the side that pictures have for the model."""
    size = image_processor.size if image_processor.do_resize else None
    if not size:
        return NATIVE_SIDES * int(config.image_size)
    (rule, value), *_ = size.items()
    return int(value**0.5) if rule == "max_pixels" else int(value)


def _batched(sliding: SlidingWindow, side: int) -> SlidingWindow:
    """The same windows, as many at once as a block has room for."""
    patches = (sliding.window_px // sliding.config.patch_size) ** 2
    batch = max(1, min(sliding.batch_size, side**2 // (2 * patches)))
    return SlidingWindow(sliding.encoder, sliding.window_px, sliding.stride_px, batch)


def segment_raster(
    path: Path,
    segmenter: Segmenter,
    encoded: Any,
    image_processor: Any,
    label_map: Path,
    *,
    scores: Path | None = None,
    memory_bytes: int = MEMORY_BYTES,
    progress: Progress = lambda done, total: None,
    say: Callable[[str], None] = lambda line: None,
    **thresholds: Any,
) -> RasterResult:
    """Segments a raster file at its own resolution into GeoTIFFs.

    Beside the label map, a hidden folder holds the features meanwhile; a run that was stopped goes on from there when
    it is called again with the same raster, model and reading. Old results are replaced once the new ones are whole.

    Args:
        path: the raster, of any format that GDAL reads.
        segmenter: of a dense encoder; see `raster_encoder`.
        encoded: what its `encode_labels` gave.
        image_processor: how pictures are read and normalised.
        label_map: the file of the classes' `written_ids` (uint8, or uint16 where one is above 254); the highest value
            is no class.
        scores: the file of the best probability of each pixel, 0 to 255, if wanted.
        memory_bytes: about what a block may take.
        progress: is told of blocks that are done, and of all.
        say: is told a line where something is not as with a picture.
        thresholds: `logit_scale`, `background_threshold`, `background_class`, `score_threshold`, `synonyms`; see
            `segmentation_spar.segment`.

    Raises:
        ValueError: the raster can't be read (`InvalidImageError`), or the segmenter can't run on one.
        OSError: the disk is full; what was written before is intact.
    """
    encoder, notice = raster_encoder(segmenter, image_processor, memory_bytes)
    options = image_processor.read_options
    with open_raster(path, options) as raster:
        grid = Grid.of(raster, encoder.config, image_processor)
        if notice is not None and max(raster.size_hw) > getattr(encoder, "window_px", 0):
            say(notice)
        key = _key(path, encoder, grid, options, memory_bytes)
        work = label_map.with_name(f".{label_map.stem}.work")
        with full_disk_in_words(label_map, work), work_folder(work) as folder:
            journal = Journal.of(folder, key)
            resumed = journal.step + journal.blocks > 0
            if not resumed:
                require_disk(folder, work_bytes(encoder, grid.size_hw), "or take a smaller --dtype")
            windows, steps = len(_windows(raster.size_hw)), 0

            def features_progress(done: int, total: int) -> None:
                nonlocal steps
                steps = total
                progress(done, total + windows)

            def labels_progress(done: int, total: int) -> None:
                progress(steps + done, steps + total)

            features = _features(encoder, grid, journal, memory_bytes, features_progress)
            target = _Target(label_map, scores, labels_progress)
            result = _labels(raster, grid, features, segmenter, encoded, target, resumed, **thresholds)
        shutil.rmtree(work, ignore_errors=True)
    return result


def _key(path: Path, encoder: Any, grid: Grid, options: ReadOptions, memory_bytes: int) -> str:
    """What the features depend on, as one word."""
    status = path.stat()
    facts = {
        "file": [str(path.resolve()), status.st_size, status.st_mtime_ns],
        "reading": [options.bands, options.alpha, options.value_range, grid.mean, grid.std, grid.size_hw],
        "config": encoder.config.features_depend_on(),
        "encoder": [repr(type(encoder)), str(encoder.dtype), memory_bytes],
        "window": [getattr(encoder, name, None) for name in ("window_px", "stride_px")],
        "weights": weights_digest(encoder),
    }
    return digest([json.dumps(facts, sort_keys=True, default=str).encode()])


def _features(encoder: Any, grid: Grid, journal: Journal, memory_bytes: int, progress: Progress) -> Features:
    config = encoder.config
    side = block_side(memory_bytes, config.hidden_size, config.patch_size)
    run = window_features if isinstance(encoder, SlidingWindow) else tower_features
    return run(encoder, grid, journal, side, progress)


def _windows(size_hw: tuple[int, int]) -> list[Rectangle]:
    """The windows of pixels whose classes are found at once, row by row."""
    return list(product(runs(size_hw[0], WINDOW_PX), runs(size_hw[1], WINDOW_PX)))


@dataclass(frozen=True)
class _Target:
    """The files to write, and who is told of each window."""

    label_map: Path
    scores: Path | None
    progress: Progress


def _labels(
    raster: Raster,
    grid: Grid,
    features: Features,
    segmenter: Segmenter,
    encoded: Any,
    target: _Target,
    resumed: bool,
    **thresholds: Any,
) -> RasterResult:
    """Finds the classes of the pixels window by window, and writes them."""
    labels, class_ids = encoded.labels, torch.tensor(encoded.labels.class_ids)
    thresholds["background_threshold"] = labels.least_probabilities(thresholds.get("background_threshold"))
    text, nothing = unit_text(encoded, segmenter.device), no_class_value(max(labels.written_ids))
    dtype = np.uint8 if nothing == 255 else np.uint16
    counts, valid_pixels = np.zeros(len(labels) + 1, dtype=np.int64), 0
    label_map, scores, windows = target.label_map, target.scores, _windows(raster.size_hw)
    with quiet_gdal() as rasterio, whole_files(*(path for path in (label_map, scores) if path is not None)) as drafts:
        maps = [MapWriter(rasterio, drafts[0], raster, np.dtype(dtype).name, nothing, labels)]
        maps += [MapWriter(rasterio, draft, raster, "uint8", None) for draft in drafts[1:]]
        try:
            with grid_file(features.path, features.grid_hw, features.width, features.dtype) as file:
                for number, window in enumerate(windows, start=1):
                    in_window = WindowScores.of(file, features, text, grid, window)
                    found = segment(in_window, class_ids, with_scores=scores is not None, **thresholds)
                    ids, valid = found.labels.cpu().numpy(), raster.valid(window)
                    counts += np.bincount(ids[valid] + 1, minlength=len(counts))
                    valid_pixels += int(valid.sum())
                    shown = np.where(valid & (ids != NO_CLASS), as_written(ids, labels), nothing)
                    maps[0].write(window, shown.astype(dtype))
                    if found.scores is not None:
                        maps[1].write(window, (255 * found.scores.cpu().numpy()).round().astype(np.uint8) * valid)
                    target.progress(number, len(windows))
            for written in maps:
                written.finish()
        finally:
            for written in maps:
                written.close()
    write_categories(label_map.with_name(f"{label_map.name}.aux.xml"), labels)
    pixels = {index - 1: int(count) for index, count in enumerate(counts) if count}
    return RasterResult(raster.size_hw, features.grid_hw, pixels, valid_pixels, label_map, scores, resumed)
