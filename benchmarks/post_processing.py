"""Measures post-processing: time and memory of the tiled label map against the whole-image formulation.

    python benchmarks/post_processing.py            # writes benchmarks/results/post_processing.json

Each row runs in a process of its own, so that its peak memory is its own. Memory is counted above the process that has
loaded the libraries and holds the features. Features are random: neither formulation's cost depends on their values.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from record import origin
from torch import Tensor
from torch.nn import functional as F

from spar_hf.encoder_spar import SparVisionOutput
from spar_hf.files import write_json
from spar_hf.segmentation_spar import feature_scores, label_map

RESULTS = Path(__file__).parent / "results" / "post_processing.json"
PATCH_PX, DIM, LOGIT_SCALE = 16, 512, 40.0
# Limits: 150 classes at 2048x1024 within 250 MB and three times as fast; 847 classes at 2048x2048 within 1 GB.
ROWS = {
    "whole-150": {"formulation": "whole", "classes": 150, "size_hw": (1024, 2048)},
    "tiled-150": {"formulation": "tiled", "classes": 150, "size_hw": (1024, 2048), "limit_mb": 250},
    "tiled-150-thresholds": {"formulation": "thresholds", "classes": 150, "size_hw": (1024, 2048), "limit_mb": 250},
    "tiled-847": {"formulation": "tiled", "classes": 847, "size_hw": (2048, 2048), "limit_mb": 1000},
    "tiled-847-thresholds": {"formulation": "thresholds", "classes": 847, "size_hw": (2048, 2048), "limit_mb": 1000},
}


def whole(patches: Tensor, text: Tensor, class_ids: Tensor, size_hw: tuple[int, int]) -> Tensor:
    """Interpolation, soft-max and arg-max over the full stack (K, H, W)."""
    cosine = F.normalize(patches, dim=-1) @ F.normalize(text, dim=-1).T
    scores = F.interpolate(cosine.permute(2, 0, 1)[None], size=size_hw, mode="bilinear", align_corners=False)[0]
    return class_ids[(scores * LOGIT_SCALE).softmax(0).argmax(0)]


def tiled(patches: Tensor, text: Tensor, class_ids: Tensor, size_hw: tuple[int, int], **thresholds: float) -> Tensor:
    """`label_map` of features, in tiles."""
    (maps,) = feature_scores(SparVisionOutput(patch_embeds=patches[None]), text, size_hw)
    return label_map(maps, class_ids, **thresholds)


def thresholds(patches: Tensor, text: Tensor, class_ids: Tensor, size_hw: tuple[int, int]) -> Tensor:
    return tiled(patches, text, class_ids, size_hw, background_threshold=0.1, area_threshold=0.001)


FORMULATIONS: dict[str, Callable[[Tensor, Tensor, Tensor, tuple[int, int]], Tensor]] = {
    "whole": whole,
    "tiled": tiled,
    "thresholds": thresholds,
}


def resident_mb() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def measure(name: str, repeats: int) -> dict[str, Any]:
    """One row, in this process."""
    row = ROWS[name]
    height, width = row["size_hw"]
    generator = torch.Generator().manual_seed(0)
    patches = torch.randn(height // PATCH_PX, width // PATCH_PX, DIM, generator=generator)
    text = torch.randn(row["classes"], DIM, generator=generator)
    class_ids = torch.arange(row["classes"])
    F.normalize(patches[:2], dim=-1) @ text.T  # the libraries' own buffers
    before_mb, seconds, cpu_seconds = resident_mb(), [], []
    for _ in range(repeats):
        started, cpu_started = time.perf_counter(), time.process_time()
        labels = FORMULATIONS[row["formulation"]](patches, text, class_ids, (height, width))
        seconds.append(time.perf_counter() - started)
        cpu_seconds.append(time.process_time() - cpu_started)
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {
        **row,
        "seconds": round(statistics.median(seconds), 3),
        "cpu_seconds": round(statistics.median(cpu_seconds), 3),
        "memory_mb": round(peak_mb - before_mb),
        "labels_sum": int(labels.sum()),  # the two formulations must agree
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3, help="runs of each row; the median counts (default: 3)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (default: its own)")
    parser.add_argument("--row", choices=ROWS, help="measure one row in this process and print it")
    parser.add_argument(
        "--output", type=Path, default=RESULTS, help="default: benchmarks/results/post_processing.json"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.row is not None:
        print(json.dumps(measure(args.row, args.repeats)))
        return

    rows = {}
    for name in ROWS:
        command = [sys.executable, __file__, "--row", name, "--repeats", str(args.repeats)]
        command += ["--threads", str(args.threads)]
        result = subprocess.run(command, check=True, capture_output=True, text=True)
        rows[name] = json.loads(result.stdout)
        print(
            f"{name:22} {rows[name]['seconds']:8.2f} s {rows[name]['cpu_seconds']:8.2f} CPU s "
            f"{rows[name]['memory_mb']:6} MB",
            flush=True,
        )
    # On a machine that other work shares, CPU time says more than the clock.
    speedup = {key: rows["whole-150"][key] / rows["tiled-150"][key] for key in ("seconds", "cpu_seconds")}
    print(
        f"150 classes at 2048x1024: {speedup['seconds']:.1f} times as fast as the whole-image formulation "
        f"({speedup['cpu_seconds']:.1f} times by CPU time)"
    )
    report = {
        **origin(),
        "load_average": round(os.getloadavg()[0], 1),
        "speedup_150": {key: round(value, 2) for key, value in speedup.items()},
        "rows": rows,
    }
    write_json(args.output, report)


if __name__ == "__main__":
    main()
