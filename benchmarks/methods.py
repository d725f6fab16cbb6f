"""Times every method of the table on ViT-B/16 (random weights) against one plain pass, on this machine.

    python benchmarks/methods.py                                  # 448, 672 x 896 and 1024 x 1024 px
    python benchmarks/methods.py --sizes 448x448 --methods naclip gem

For each size: milliseconds of the processor (median; the methods share one tower and take turns in every round), the
part of it that the networks' own blocks and passes take, peak memory over the loaded networks, and time and memory as
ratios to one plain pass (maskclip); the time's is the median over the rounds. With one thread (--threads 1) other work
on the machine disturbs it little. Further networks are random ones of the authors' size. A method that gives scores
makes a label map of 21 names. Writes benchmarks/results/methods.json, a size at a time.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from operator import truediv
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from record import origin

from spar_hf import METHODS, SparVisionConfig, SparVisionModel, build_encoder, build_segmenter, label_map
from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.files import write_json
from spar_hf.networks.masks import Regions
from spar_hf.processing_spar import LabelFeatures
from spar_hf.prompts_spar import Labels

RESULTS = Path(__file__).parent / "results" / "methods.json"
SIZES = ("448x448", "672x896", "1024x1024")
REFERENCE = "maskclip"


class Squares(torch.nn.Module):
    """A source of regions that costs nothing: 8 x 8 rectangles."""

    def forward(self, pixel_values: torch.Tensor, config: Any) -> Regions:
        rows, columns = (torch.arange(side) * 8 // side for side in pixel_values.shape[2:])
        return Regions(ids=1 + 8 * rows[:, None] + columns)


def further_network(name: str, checkpoint: str) -> Any:
    """A random network of the size of its authors' checkpoint."""
    from transformers import (
        Dinov2WithRegistersConfig,
        Dinov2WithRegistersModel,
        SamVisionConfig,
        SamVisionModel,
        ViTConfig,
        ViTModel,
    )

    if name == "regions":
        return Squares()
    if name == "sam":
        return SamVisionModel(SamVisionConfig()).eval()
    if checkpoint == "facebook/dinov2-with-registers-large":
        large = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16}
        return Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**large, image_size=518, patch_size=14)).eval()
    patch_px = int(checkpoint.removeprefix("facebook/dino-vitb"))
    return ViTModel(ViTConfig(patch_size=patch_px), add_pooling_layer=False).eval()


class Timed:
    """A method as a function of pixels, and the processor time that its networks' own passes took so far."""

    def __init__(self, name: str, vision: SparVisionModel) -> None:
        self.seconds = 0.0
        self.started: list[float] = []
        row = METHODS[name]
        networks = {key: further_network(key, checkpoint) for key, checkpoint in row.needs.items()}
        if row.kind == "feature":
            encoder: Any = build_encoder(vision, name, networks=networks)
            self.run: Any = encoder
        else:
            segmenter = build_segmenter(SimpleNamespace(vision_model=vision), None, name, networks=networks)
            encoder = segmenter.encoder
            labels = Labels.parse([f"name {number}" for number in range(21)])
            words = LabelFeatures(labels, torch.randn(21, vision.config.projection_dim))
            self.run = lambda pixels: [label_map(maps, words.class_ids) for maps in segmenter(pixels, words)]
        tower = getattr(encoder, "vision", encoder)
        for module in (tower.embeddings, *tower.blocks, *networks.values()):
            module = getattr(module, "vision_encoder", module)
            module.register_forward_pre_hook(lambda *_: self.started.append(time.process_time()))
            module.register_forward_hook(self._ended)

    def _ended(self, *_: Any) -> None:
        self.seconds += time.process_time() - self.started.pop()

    def __call__(self, pixels: torch.Tensor) -> Any:
        return self.run(pixels)


def build(names: list[str]) -> dict[str, Timed]:
    """The methods around one tower."""
    torch.manual_seed(0)
    vision = SparVisionModel(SparVisionConfig()).eval()
    return {name: Timed(name, vision) for name in names}


def pixels_of(size: str) -> torch.Tensor:
    height_px, width_px = map(int, size.split("x"))
    return torch.randn(1, 3, height_px, width_px, generator=torch.Generator().manual_seed(0))


def milliseconds(encoders: dict[str, Timed], size: str, rounds: int) -> tuple[dict[str, list[float]], ...]:
    """CPU time of each method in each round, and its networks' part; every round starts with another method."""
    pixels = pixels_of(size)
    times: dict[str, list[float]] = {name: [] for name in encoders}
    passes: dict[str, list[float]] = {name: [] for name in encoders}
    order = list(encoders)
    with torch.inference_mode():
        for turn in range(rounds):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                start, before = time.process_time(), encoders[name].seconds
                encoders[name](pixels)
                times[name].append(1000 * (time.process_time() - start))
                passes[name].append(1000 * (encoders[name].seconds - before))
    return times, passes


def peak_mb(encoder: Any, size: str) -> float:
    """Peak megabytes of one pass over what the process holds before it; Linux only."""
    pixels = pixels_of(size)
    with torch.inference_mode():
        encoder(pixels[:, :, :64, :64])  # libraries set up with the first pass
        ctypes.CDLL(None).malloc_trim(0)  # what earlier passes freed shall not be at hand
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _memory_kb("VmRSS")
        encoder(pixels)
    return (_memory_kb("VmHWM") - before) / 1024


def _memory_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name, row in METHODS.items() if row.family == "clip"]
    parser.add_argument("--methods", nargs="+", choices=names, default=names)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="height x width in pixels, such as 672x896")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    names = [REFERENCE, *(name for name in args.methods if name != REFERENCE)]
    encoders = build(names)
    rows: list[dict[str, Any]] = []
    for size in args.sizes:
        peak_mb(encoders[REFERENCE], size)  # libraries keep some memory for each new size
        peaks = {name: peak_mb(encoders[name], size) for name in names}
        times, passes = milliseconds(encoders, size, args.rounds)
        for name in names:
            rows.append(
                {
                    "method": name,
                    "size": size,
                    "milliseconds": round(statistics.median(times[name]), 1),
                    "networks_ms": round(statistics.median(passes[name]), 1),
                    "peak_mb": round(peaks[name]),
                    "time_ratio": round(statistics.median(map(truediv, times[name], times[REFERENCE])), 2),
                    "memory_ratio": round(peaks[name] / peaks[REFERENCE], 2),
                }
            )
        write_json(args.output, {**origin(), "rows": rows})
        cells = [[str(value) for key, value in row.items() if key != "size"] for row in rows if row["size"] == size]
        print(f"\n{size}, {args.threads} threads:\n", flush=True)
        print(
            "\n".join(markdown_table(["method", "ms", "networks", "MB over network", "time", "memory"], cells)),
            flush=True,
        )


if __name__ == "__main__":
    main()
