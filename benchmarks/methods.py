"""Times every method of the table on ViT-B/16 (random weights) against one plain pass, on this machine.

    python benchmarks/methods.py                                  # 448, 672 x 896 and 1024 x 1024 px
    python benchmarks/methods.py --sizes 448x448 --methods naclip gem

For each size: milliseconds of the processor (median; the methods share one network and take turns in every round),
peak memory over the loaded network, and both as ratios to one plain pass (maskclip); the time's is the median over the
rounds. With one thread (--threads 1) other work on the machine disturbs it little. A second network is a random
ViT-B/16 and its pass counts. Writes benchmarks/results/methods.json, a size at a time.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import time
from operator import truediv
from pathlib import Path
from typing import Any

import torch
from record import origin

from spar_hf import METHODS, SparVisionConfig, SparVisionModel, build_encoder
from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.files import write_json

RESULTS = Path(__file__).parent / "results" / "methods.json"
SIZES = ("448x448", "672x896", "1024x1024")
REFERENCE = "maskclip"


def build(names: list[str]) -> dict[str, Any]:
    """The methods as encoders around one network."""
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    vision = SparVisionModel(SparVisionConfig()).eval()
    network = ViTModel(ViTConfig()).eval() if any(METHODS[name].needs for name in names) else None
    return {name: build_encoder(vision, name, networks=dict.fromkeys(METHODS[name].needs, network)) for name in names}


def pixels_of(size: str) -> torch.Tensor:
    height_px, width_px = map(int, size.split("x"))
    return torch.randn(1, 3, height_px, width_px, generator=torch.Generator().manual_seed(0))


def milliseconds(encoders: dict[str, Any], size: str, rounds: int) -> dict[str, list[float]]:
    """CPU time of each encoder in each round; every round starts with another one."""
    pixels = pixels_of(size)
    times: dict[str, list[float]] = {name: [] for name in encoders}
    order = list(encoders)
    with torch.inference_mode():
        for turn in range(rounds):
            for name in order[turn % len(order) :] + order[: turn % len(order)]:
                start = time.process_time()
                encoders[name](pixels)
                times[name].append(1000 * (time.process_time() - start))
    return times


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
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
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
        times = milliseconds(encoders, size, args.rounds)
        for name in names:
            rows.append(
                {
                    "method": name,
                    "size": size,
                    "milliseconds": round(statistics.median(times[name]), 1),
                    "peak_mb": round(peaks[name]),
                    "time_ratio": round(statistics.median(map(truediv, times[name], times[REFERENCE])), 2),
                    "memory_ratio": round(peaks[name] / peaks[REFERENCE], 2),
                }
            )
        write_json(args.output, {**origin(), "rows": rows})
        cells = [[str(value) for key, value in row.items() if key != "size"] for row in rows if row["size"] == size]
        print(f"\n{size}, {args.threads} threads:\n", flush=True)
        print("\n".join(markdown_table(["method", "ms", "MB over network", "time", "memory"], cells)), flush=True)


if __name__ == "__main__":
    main()
