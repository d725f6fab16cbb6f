"""Measures mean IoU on the picture book, over models and picture sizes, and prints a Markdown table.

    python benchmarks/quality.py                    # tiny in one pass, its teachers, tiny-spar; 1x, 2x, 4x, 6x
    python benchmarks/quality.py --limit 64 --scales 4 "single pass=tiny" "teacher 24=tiny,stride=24"
    python benchmarks/quality.py "student=runs/seed0" "student=runs/seed1" "student=runs/seed2"

A row is NAME=CHECKPOINT, with ",method=NAME" for another method (",network=NAME=ID" a further network of it),
",stride=N" for a native-size sliding window around it, ",window=paper" for the window and stride of the method's
authors, ",reach=window" for attention that reaches as far as the native window. Rows of one name are one cell: their
mean and, after the sign, their standard deviation. An interrupted run goes on when it is started again with the same
--state folder.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from record import command_line, origin

import spar_hf
from spar_hf.build import build_segmenter
from spar_hf.evaluation import load_benchmark
from spar_hf.evaluation.evaluate import EvaluationResult, evaluate, markdown_table
from spar_hf.files import write_json

RESULTS = Path(__file__).parent / "results" / "quality.json"
ROWS = (
    "single pass=tiny",
    "the same, window's reach=tiny,reach=window",
    "teacher, stride 24=tiny,stride=24",
    "teacher, stride 40=tiny,stride=40",
    "teacher, stride 56=tiny,stride=56",
    "student (tiny-spar)=tiny-spar",
)


@dataclass(frozen=True)
class Row:
    """One line of the command: a checkpoint and how it is run."""

    name: str
    checkpoint: str
    stride_px: int | None = None
    method: str | None = None
    network: str | None = None
    window: str | None = None
    reach: str | None = None

    @classmethod
    def parse(cls, spec: str) -> Row:
        """Reads NAME=CHECKPOINT[,OPTION=VALUE]...; the name may hold commas, the checkpoint may not."""
        name, equals, rest = spec.partition("=")
        checkpoint, *options = rest.split(",")
        values = dict(option.partition("=")[::2] for option in options)
        known = {"stride", "method", "network", "window", "reach"}
        if not (equals and name.strip() and checkpoint) or not values.keys() <= known:
            raise ValueError(
                f"row is {spec!r}; a row is NAME=CHECKPOINT[,stride=N][,window=paper][,method=NAME][,network=NAME=ID]"
                f"[,reach=window], as in {ROWS[1]!r}."
            )
        stride, window = values.get("stride"), values.get("window")
        if stride is not None and not stride.isdecimal():
            raise ValueError(f"stride is {stride!r} in {spec!r}; it must be a whole number of pixels, such as 24.")
        if window not in (None, "paper", "native"):
            raise ValueError(f"window is {window!r} in {spec!r}; it must be paper or native.")
        stride_px = None if stride is None else int(stride)
        fields = (values.get(name) for name in ("method", "network", "window", "reach"))
        return cls(name.strip(), checkpoint, stride_px, *fields)

    def choices(self, batch: int) -> dict[str, Any]:
        """The arguments of the builders: one pass or a sliding window, as the row's method runs."""
        network, _, where = (self.network or "").partition("=")
        return {
            "method": self.method,
            "networks": {network: where} if network else None,
            "window": self.window or (None if self.stride_px is None else "native"),
            "stride_px": self.stride_px,
            "window_batch": batch,
            "reach": self.reach,
        }


@cache
def load(checkpoint: str, device: str) -> tuple[spar_hf.SparModel, spar_hf.SparProcessor]:
    """Once for all rows and scales, so that the processor encodes the vocabulary once."""
    model, processor = spar_hf.load(checkpoint)
    return model.to(device), processor


def measure(
    row: Row, scale: float, split: str, limit: int | None, state: Path | None, device: str, batch: int
) -> EvaluationResult:
    """Evaluates one row at one scale."""
    model, processor = load(row.checkpoint, device)
    segmenter = build_segmenter(model, processor, **row.choices(batch))
    data = load_benchmark("picturebook", scale=scale, split=split, native_px=segmenter.config.image_size)
    what = re.sub(r"\W+", "-", f"{' '.join(map(str, vars(row).values()))} {split} {scale:g} {limit}")
    return evaluate(
        segmenter,
        processor,
        data,
        limit=limit,
        state_path=None if state is None else state / f"{what}.safetensors",
        command=command_line(),
    )


def table(entries: list[dict[str, Any]], scales: list[float], score: Callable[[dict[str, Any]], float]) -> list[str]:
    """Rows by name, columns by scale; several entries of a name and scale become mean and standard deviation."""
    lines = []
    for name in dict.fromkeys(entry["name"] for entry in entries):
        cells = [name]
        for scale in scales:
            values = [score(entry) for entry in entries if entry["name"] == name and entry["scale"] == scale]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}" if values else "")
        lines.append(cells)
    return markdown_table(["", *(f"{scale:g}x" for scale in scales)], lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", default=ROWS, metavar="NAME=CHECKPOINT[,OPTION=VALUE]")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2, 4, 6], help="multiples of the native side")
    parser.add_argument("--split", choices=("validation", "test"), default="test", help="validation: to choose by")
    parser.add_argument("--limit", type=int, help="scenes per cell, spread over the split (default: all)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: %(default)s)")
    parser.add_argument("--state", type=Path, help="folder for what is needed to go on after an interruption")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=32, help="windows of a teacher run at once")
    args = parser.parse_args(argv)
    try:
        rows = [Row.parse(spec) for spec in args.rows]
        entries: list[dict[str, Any]] = []
        for scale in args.scales:
            for row in rows:
                print(f"{row.name}, {scale:g}x", file=sys.stderr)
                result = measure(row, scale, args.split, args.limit, args.state, args.device, args.batch)
                entries.append({**vars(row), "scale": scale, **json.loads(result.to_json())})
                document = {
                    **origin(),
                    "results": entries,
                }
                write_json(args.output, document)
    except ValueError as error:
        parser.error(str(error))
    count = entries[0]["num_images"]
    print(f"\nMean IoU in %, picture book, {args.split}, {count} scenes, by side in multiples of the native one:\n")
    print("\n".join(table(entries, args.scales, lambda entry: 100 * entry["mean_iou"])))
    print(f"\nMilliseconds per picture (median) on {entries[0]['device']}, {entries[0]['dtype']}:\n")
    print("\n".join(table(entries, args.scales, lambda entry: 1000 * entry["seconds_per_image"])))


if __name__ == "__main__":
    main()
