"""Evaluates any segmenter on a benchmark under a named protocol; can be stopped and resumed.

segmenter = build_segmenter(model, processor, "naclip", window="paper")
data = load_benchmark("picturebook", scale=4, native_px=segmenter.config.image_size)
result = evaluate(segmenter, processor, data)
print(result.table())
"""

from __future__ import annotations

import json
import math
import shlex
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from tqdm.auto import tqdm

from ..files import digest, weights_digest, write_atomically
from ..networks.masks import MaskFolder
from ..processes import ALONE, Processes
from ..segmentation_spar import Segmenter, label_map
from ..segmenters import sliding_scores
from .benchmarks import BenchmarkData
from .counts import SegmentationCounts
from .protocols import Protocol, is_clip, load_protocol
from .samples import IGNORED, Sample


@dataclass(frozen=True)
class EvaluationResult:
    """The scores of one evaluation, and what they are scores of.

    Attributes:
        benchmark: Name of the benchmark.
        variant: Which one of that name, such as the scale of the picture book.
        record: What the segmenter was built of: networks, settings, refinements in the order in which they ran.
        protocol: Every constant of the protocol, under "name" its name.
        num_images: Images that were counted.
        mean_iou: Mean over the classes that occur in prediction or target, 0 to 1. All scores are nan if none does.
        pixel_accuracy: Fraction of the pixels that were predicted right.
        mean_accuracy: Mean over the true classes of the fraction of their pixels that were predicted right.
        boundary_iou: Mean boundary IoU over the same classes as `mean_iou`; see `SegmentationCounts`.
        per_class_iou: First name of each class -> IoU, nan for a class that occurs nowhere.
        seconds_per_image: Median over the images, of encoder and post-processing; without reading and resizing.
        seconds_per_image_mean: The mean of the same.
        peak_memory_mb: On a GPU the most that torch held; on a CPU the peak of the whole process, libraries included.
        device: Where the encoder ran.
        dtype: In which type.
        command: The command line that made this.
    """

    benchmark: str
    variant: str
    record: dict[str, Any]
    protocol: dict[str, Any]
    num_images: int
    mean_iou: float
    pixel_accuracy: float
    mean_accuracy: float
    boundary_iou: float
    per_class_iou: dict[str, float]
    seconds_per_image: float
    seconds_per_image_mean: float
    peak_memory_mb: float
    device: str
    dtype: str
    command: str

    def to_json(self) -> str:
        """Valid JSON: a score that does not exist (nan) is null."""
        return json.dumps(_without_nan(asdict(self)), indent=1, ensure_ascii=False) + "\n"

    def save(self, path: str | Path) -> None:
        """Writes the JSON, whole or not at all."""
        write_atomically(Path(path), self.to_json().encode())

    def table(self) -> str:
        """A Markdown table of the classes, best first, and of the means."""
        scored = sorted(self.per_class_iou.items(), key=lambda entry: (math.isnan(entry[1]), -entry[1]))
        rows = [(title, "absent" if math.isnan(iou) else f"{100 * iou:.1f}") for title, iou in scored]
        rows += [
            ("**mean IoU**", f"**{100 * self.mean_iou:.1f}**"),
            ("pixel accuracy", f"{100 * self.pixel_accuracy:.1f}"),
            ("mean class accuracy", f"{100 * self.mean_accuracy:.1f}"),
            ("boundary IoU", f"{100 * self.boundary_iou:.1f}"),
            ("seconds per image (median)", f"{self.seconds_per_image:.3f}"),
            ("peak memory, MB", f"{self.peak_memory_mb:.0f}"),
        ]
        name = f"{self.benchmark} ({self.variant})" if self.variant else self.benchmark
        refine = self.record.get("refine")
        refined = f", refined with {', '.join(refine)}" if refine else ""
        return "\n".join(
            [
                f"{name}, protocol {self.protocol['name']}{refined}, {self.num_images} images, "
                f"{self.device} {self.dtype}",
                "",
                *markdown_table(["class", "IoU, %"], rows),
            ]
        )


def evaluate(
    segmenter: Segmenter,
    processor: Any,
    benchmark: BenchmarkData,
    protocol: Protocol | str | None = None,
    limit: int | None = None,
    record: dict[str, Any] | None = None,
    progress: bool = True,
    state_path: str | Path | None = None,
    save_every: int = 20,
    command: str | None = None,
    masks: MaskFolder | None = None,
    processes: Processes = ALONE,
) -> EvaluationResult:
    """Runs the benchmark, one image at a time.

    Several processes share the images and add up their counts, which are whole numbers: the scores are those of one
    process, and each returns them. A state of one is a state of several.

    Args:
        segmenter: Any segmenter; `FromFeatures` for a dense encoder, or what `build_segmenter` makes.
        processor: The `SparProcessor` of the model, which makes pixels of images.
        benchmark: From `load_benchmark`.
        protocol: A name in `PROTOCOLS` or a `Protocol`; None is the benchmark's first. A protocol with a window runs
            `segmenter` in each window and averages the scores.
        limit: Evaluates so many images, spread evenly over the benchmark; None takes all.
        record: What the segmenter was built of, kept in the result; see `build.record`.
        progress: Shows a bar with the running mean IoU.
        state_path: Saves counts and position in this file, and goes on from there if it exists.
        save_every: Images of each process between two saves.
        command: Kept in the result; the command line of this process when None.
        masks: What the segmenter reads its regions from, to be told of each image.
        processes: That share the images; all of them must call this.

    Raises:
        ValueError: If the protocol is not defined for the benchmark, the limit is not positive, or the state belongs
            to another evaluation.
    """
    if not isinstance(protocol, Protocol):
        protocol = load_protocol(protocol, benchmark.name, clip=is_clip(segmenter.config))
    if limit is not None and limit < 1:
        raise ValueError(f"limit is {limit}; it must be at least 1. Leave it out to take all {len(benchmark)} images.")
    if protocol.window_px is not None and protocol.stride_px is not None:
        segmenter = sliding_scores(segmenter, protocol.window_px, protocol.stride_px)
    count = len(benchmark) if limit is None else min(limit, len(benchmark))
    state = State(SegmentationCounts(len(benchmark.labels), ignore_index=IGNORED))
    if state_path is not None and processes.is_main:
        fingerprint = _fingerprint(segmenter, processor, benchmark, protocol, record, count)
        state.resume(Path(state_path), fingerprint)
    state = processes.gather(state)[0]
    start = state.counts.num_images

    device = segmenter.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)

    def read(number: int) -> tuple[torch.Tensor, Sample]:
        sample = benchmark.read(number * len(benchmark) // count)
        if masks is not None:
            masks.select(sample.name, (sample.image.height, sample.image.width))
        # The protocol alone decides the size, whatever the checkpoint's image processor is set to.
        inputs = processor(images=protocol.resize(sample.image), do_resize=False, return_tensors="pt")
        return inputs["pixel_values"], sample

    # Where pixels can be background by threshold, the first class is the background.
    labels = benchmark.labels if protocol.background_threshold is None else replace(benchmark.labels, background=0)
    unlabelled = (read(number)[0] for number in range(count))
    encoded = segmenter.encode_labels(labels, protocol.templates, unlabelled)
    class_ids = torch.tensor(labels.class_ids)
    # Between two saves, each process does its share of a round.
    round_images = count if state_path is None else save_every * processes.count
    show = progress and processes.is_main
    with tqdm(initial=start, total=count, desc=benchmark.name, disable=not show) as bar:
        for first in range(start - start % round_images, count, round_images):
            numbers = range(max(first, start), min(first + round_images, count))
            part = State(SegmentationCounts(len(benchmark.labels), ignore_index=IGNORED))
            for number in processes.share(numbers):
                pixel_values, sample = read(number)
                started = _now(device)
                with torch.inference_mode():
                    (maps,) = segmenter(pixel_values, encoded)
                    labels_found = label_map(
                        maps.at((sample.target.shape[0], sample.target.shape[1])), class_ids, **protocol.thresholds()
                    )
                prediction = labels_found.cpu().numpy()
                part.seconds.append(_now(device) - started)
                part.counts.update(prediction, sample.target)
                if show:
                    so_far = (state.counts + part.counts).scores()["mean_iou"]
                    bar.set_postfix_str(f"mIoU {100 * float(np.nan_to_num(so_far)):.1f}")
                    bar.update(min(number + processes.count, numbers.stop) - bar.n)
            part.peak_memory_mb = peak_memory_mb(device)
            for other in processes.gather(part):
                state += other
            if state_path is not None and processes.is_main:
                state.save(Path(state_path), fingerprint)

    scores = state.counts.scores()
    return EvaluationResult(
        benchmark=benchmark.name,
        variant=benchmark.variant,
        record=record or {},
        protocol=asdict(protocol),
        num_images=state.counts.num_images,
        mean_iou=scores["mean_iou"],
        pixel_accuracy=scores["overall_accuracy"],
        mean_accuracy=scores["mean_accuracy"],
        boundary_iou=scores["boundary_iou"],
        per_class_iou=dict(zip(benchmark.labels.class_names, scores["per_category_iou"], strict=True)),
        seconds_per_image=statistics.median(state.seconds),
        seconds_per_image_mean=statistics.fmean(state.seconds),
        peak_memory_mb=max(state.peak_memory_mb, peak_memory_mb(device)),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        dtype=str(segmenter.dtype).removeprefix("torch."),
        command=shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]) if command is None else command,
    )


class State:
    """What an evaluation has so far, and the file that keeps it.

    Args:
        counts: Empty counts for the benchmark's classes.
    """

    def __init__(self, counts: SegmentationCounts) -> None:
        self.counts = counts
        self.seconds: list[float] = []
        self.peak_memory_mb = 0.0

    def __iadd__(self, other: State) -> State:
        """Adds what another process, or a later part, has."""
        self.counts += other.counts
        self.seconds += other.seconds
        self.peak_memory_mb = max(self.peak_memory_mb, other.peak_memory_mb)
        return self

    def save(self, path: Path, fingerprint: dict[str, str]) -> None:
        """Writes the state, whole or not at all."""
        tensors = {
            "pixels": self.counts.pixels.matrix,
            "boundary": self.counts.boundary.matrix,
            "seconds": np.array(self.seconds),
            "peak_memory_mb": np.array(self.peak_memory_mb),
        }
        write_atomically(path, save(tensors, metadata={"fingerprint": json.dumps(fingerprint)}))

    def resume(self, path: Path, fingerprint: dict[str, str]) -> None:
        """Takes up the state in `path`, if that file exists.

        Raises:
            ValueError: If the file is no state, or was written by an evaluation of something else.
        """
        if not path.exists():
            return
        try:
            with safe_open(path, framework="numpy") as file:
                written = json.loads((file.metadata() or {})["fingerprint"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} is no state of an evaluation ({error}). Delete it or name another file."
            ) from error
        changed = [what for what in fingerprint if written.get(what) != fingerprint[what]]
        if changed:
            raise ValueError(
                f"{path} was written by another evaluation: {', '.join(changed)} changed. "
                "Delete it to start anew, or name another file."
            )
        self.counts.pixels.matrix = tensors["pixels"]
        self.counts.boundary.matrix = tensors["boundary"]
        self.counts.num_images = len(tensors["seconds"])
        self.seconds = tensors["seconds"].tolist()
        self.peak_memory_mb = float(tensors["peak_memory_mb"])


def _fingerprint(
    segmenter: Segmenter,
    processor: Any,
    benchmark: BenchmarkData,
    protocol: Protocol,
    record: dict[str, Any] | None,
    count: int,
) -> dict[str, str]:
    """What decides the scores, by name, so that a refused state can say what changed."""
    return {
        # The repr of a segmenter holds its structure and every setting.
        "segmenter": digest([repr(segmenter).encode(), segmenter.config.to_json_string().encode()]),
        "weights": weights_digest(*segmenter.networks),
        "processor": digest([processor.to_json_string().encode()]),
        "benchmark": json.dumps(
            [benchmark.name, benchmark.variant, digest([json.dumps(benchmark.labels.classes).encode()])]
        ),
        "images": json.dumps([count, digest(name.encode() + b"\0" for name in benchmark.sample_names)]),
        "protocol": json.dumps(asdict(protocol)),
        "record": json.dumps(record, sort_keys=True),
    }


def _now(device: torch.device) -> float:
    """Seconds, after what was queued on a GPU is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def peak_memory_mb(device: torch.device) -> float:
    """The most memory so far, in 10^6 bytes: torch's on a GPU, the whole process's on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    import resource  # here, since Windows lacks it

    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def markdown_table(header: list[str], rows: Iterable[Iterable[str]]) -> list[str]:
    """The lines of a Markdown table, numbers to the right."""
    alignment = ["---", *["---:"] * (len(header) - 1)]
    return [f"| {' | '.join(row)} |" for row in (header, alignment, *rows)]


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value
