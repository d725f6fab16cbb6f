"""`spar segment` on a video: a tinted video and the results of each frame, in memory that does not grow."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .output import one_by_one

if TYPE_CHECKING:
    from spar_hf.outputs import ResultOptions
    from spar_hf.prompts_spar import Labels


def videos_among(paths: Sequence[Path]) -> list[Path]:
    """The videos, where a command is about videos.

    Raises:
        ValueError: pictures are among them.
    """
    from spar_hf.video import is_video

    videos = [path for path in paths if is_video(path)]
    others = [path for path in paths if not is_video(path)]
    if videos and others:
        raise ValueError(f"{videos[0]} is a video and {others[0]} is none; give pictures in a command of their own")
    return videos


def segment_videos(
    videos: Sequence[Path],
    stream: Callable[[], Callable[[Any], Any]],
    args: argparse.Namespace,
    labels: Labels,
    options: ResultOptions,
    facts: dict[str, Any],
    report: Callable[[dict[str, Any]], str],
) -> int:
    """Segments videos one after the other; returns the exit status.

    Args:
        videos: files.
        stream: gives, for each video anew, what makes the pipeline's result of a frame, called in order.
        args: of the command.
        labels, options: see `Writer`.
        facts: what runs and how, for the JSON output.
        report: what is told of each.

    Raises:
        InvalidImageError: the only one is no video, or breaks off.
    """

    def do(path: Path, stem: str) -> dict[str, Any]:
        return segment_video(path, stem, stream(), args.output, labels, options)

    return one_by_one(videos, do, report, args, facts, "videos")


def segment_video(
    path: Path, stem: str, segment: Callable[[Any], Any], folder: Path, labels: Labels, options: ResultOptions
) -> dict[str, Any]:
    """Segments a video frame by frame.

    Args:
        path: the video.
        stem: what its files are called: `STEM-overlay.mp4`, and a folder `STEM` with those of each frame.
        segment: a frame to the pipeline's result, called in order.
        folder, labels, options: see `Writer`. For `png` a frame's label map is written alone, as its overlay is in the
            video.

    Returns:
        What is to know of it, as of a picture; areas are means over the frames.

    Raises:
        InvalidImageError: it is no video, or breaks off; what was made of its frames until then is kept.
        OSError: the disk is full; what was written of earlier frames is kept.
    """
    from tqdm import tqdm

    from spar_hf.files import whole_files
    from spar_hf.image_file_spar import InvalidImageError
    from spar_hf.outputs import Writer
    from spar_hf.outputs.regions import cleaned
    from spar_hf.video import VideoWriter, read_frames
    from spar_hf.visualize import tinted

    frames = read_frames(path)
    first = next(frames)
    target = folder / f"{stem}-overlay.mp4"
    formats = tuple({"png": "palette"}.get(name, name) for name in options.formats)
    of_frames = replace(options, formats=formats, min_area=0, fill_holes=0)  # for all formats at once, below
    areas: Any = 0.0
    count, nothing, broken = 0, 0.0, None
    facts: dict[str, Any] = {}
    started = time.perf_counter()
    with Writer(folder, labels, of_frames) as writer, whole_files(target) as (draft,), VideoWriter(draft) as video:
        try:
            for frame in tqdm(_chained(first, frames), unit="frame", disable=None):
                count += 1
                result = cleaned(segment(frame.image), options.min_area, options.fill_holes)
                facts = writer.add(f"{stem}/{count:06d}", frame.image, result, f"{path}#{count}")
                video.add(tinted(frame.image, result["segmentation"], result["labels"]), frame.seconds)
                areas = areas + np.array([entry["area_fraction"] for entry in facts["classes"]])
                nothing += facts["no_class"]
        except InvalidImageError as error:
            broken = error  # the video of what there is takes its place first
    if broken is not None:
        raise broken
    classes = [
        {**entry, "area_fraction": float(area) / count} for entry, area in zip(facts["classes"], areas, strict=True)
    ]
    return {
        **facts,
        "image": str(path),
        "frames": count,
        "classes": classes,
        "no_class": nothing / count,
        "files": {"overlay": str(target), "frames": str(folder / stem)},
        "seconds": round((time.perf_counter() - started) / count, 4),
    }


def _chained(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    yield first
    yield from rest
