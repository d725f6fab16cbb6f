"""`spar segment` on a video: a tinted video and the results of each frame, in memory that does not grow."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .output import progress

if TYPE_CHECKING:
    from spar_hf.outputs import ResultOptions
    from spar_hf.prompts_spar import Labels


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
            for frame in progress(_chained(first, frames), "frame"):
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


def _chained(first: Any, rest: Any) -> Any:
    yield first
    yield from rest
