"""Measures what upsampling is worth on the picture book, what it costs, and writes the tables of docs/upsampling.md.

    python training/train_anyup.py --output .work/anyup                       # the AnyUp of the drawings, first
    python benchmarks/upsampling.py                                           # quality, and CPU seconds a picture
    python benchmarks/upsampling.py --bases "single pass" --upsamplers jbu --scales 1 --limit 4
    python benchmarks/upsampling.py --upsamplers upsample_anything --bases "single pass" --scales 1
    python benchmarks/upsampling.py --cost                                    # score maps against features, 1024 px
    python benchmarks/upsampling.py --docs                                    # writes the tables of what is stored

Every base is measured without and with each upsampler, down to one cell for each pixel, and with PAMR, which refines
label scores at full size. A cell that the JSON holds for as many scenes is not measured again, so that several
commands make one table and an interrupted one goes on. Seconds are CPU time of one thread: other work disturbs them
little.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from quality import Row, load
from record import PeakMemory, origin

from spar_hf import SparAnyUp, SparAnyUpConfig
from spar_hf.build import build_segmenter
from spar_hf.evaluation import load_benchmark
from spar_hf.evaluation.evaluate import evaluate, markdown_table
from spar_hf.files import write_json
from spar_hf.segmentation_spar import label_map
from spar_hf.upsampling import load_upsampler

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "upsampling.json"
DOCS = HERE.parent / "docs" / "upsampling.md"
BASES = ("single pass=tiny", "window's reach=tiny,reach=window", "teacher=tiny,stride=56", "student=tiny-spar")
ANYUP = "anyup=.work/anyup/model"
REFINEMENTS = ("pamr",)  # no upsampler, but for the same purpose
PLAIN = "none"
# The cost: side of the picture and of its grid, channels, names.
COST_PX, COST_GRID, COST_CHANNELS, COST_NAMES = 1024, 64, 512, 21
ROWS = 64  # of the output at a time, as label maps are made


def measure(base: Row, upsampler: str, scale: float, limit: int) -> dict[str, Any]:
    """One cell of the table: its scores, and the median CPU time of three scenes from pixels to label map."""
    model, processor = load(base.checkpoint, "cpu")
    how: dict[str, Any] = {"refine": [upsampler]} if upsampler in REFINEMENTS else {"upsample": upsampler}
    segmenter = build_segmenter(model, processor, **base.choices(batch=32), **({} if upsampler == PLAIN else how))
    data = load_benchmark("picturebook", scale=scale, native_px=segmenter.config.image_size)
    result = evaluate(segmenter, processor, data, limit=limit, progress=False)
    # One template is enough to time the rest.
    encoded, class_ids = segmenter.encode_labels(data.labels, ["{}"]), torch.tensor(data.labels.class_ids)
    seconds = []
    for number in range(min(3, limit)):
        pixels = processor(images=data.read(number).image, do_resize=False, return_tensors="pt")["pixel_values"]
        started = time.process_time()
        with torch.inference_mode():
            label_map(segmenter(pixels, encoded)[0], class_ids)
        seconds.append(time.process_time() - started)
    kept = ("num_images", "mean_iou", "boundary_iou", "pixel_accuracy")
    return {**{name: getattr(result, name) for name in kept}, "cpu_seconds": round(statistics.median(seconds), 4)}


def quality(args: argparse.Namespace) -> None:
    """Measures the cells that are asked for and not yet stored."""
    document = stored(args.output)
    document["command"] = origin()["command"]
    bases = [row for row in map(Row.parse, BASES) if row.name in args.bases]
    for scale in args.scales:
        for base in bases:
            for upsampler in args.upsamplers:
                key = {"base": base.name, "upsampler": upsampler.partition("=")[0], "scale": scale}
                if any({**key, "num_images": args.limit}.items() <= row.items() for row in document["results"]):
                    continue
                print(f"{base.name}, {upsampler}, {scale:g}x", file=sys.stderr, flush=True)
                rows = [row for row in document["results"] if not key.items() <= row.items()]
                document["results"] = [*rows, {**key, **measure(base, upsampler, scale, args.limit)}]
                if "=" in upsampler:
                    source = load_upsampler(upsampler).config.source
                    document["sources"] = {**document.get("sources", {}), key["upsampler"]: source}
                write_json(args.output, document)


def cost_of(upsampler: str, what: str) -> dict[str, float]:
    """CPU seconds and peak megabytes, over inputs and model, of the scores of a large picture; Linux only."""
    torch.manual_seed(0)
    # The authors' sizes, with random weights: time and memory are those of any.
    made = SparAnyUp(SparAnyUpConfig()).eval() if upsampler == "anyup" else load_upsampler(upsampler)
    image, features = torch.rand(3, COST_PX, COST_PX), torch.randn(COST_GRID, COST_GRID, COST_CHANNELS)
    text = torch.nn.functional.normalize(torch.randn(COST_NAMES, COST_CHANNELS), dim=-1)
    started = time.process_time()
    with torch.inference_mode(), PeakMemory() as memory:
        weights = made.weights(image, features, (COST_PX, COST_PX))
        for first in range(0, COST_PX, ROWS):
            rows = slice(first, first + ROWS)
            if what == "scores":
                weights.scores(features, text, rows).argmax(0)
            else:  # features, some rows at a time: all of them would take 2.1 GB
                torch.nn.functional.normalize(weights.apply(features, rows), dim=-1).matmul(text.T).argmax(-1)
    return {"cpu_seconds": round(time.process_time() - started, 1), "peak_mb": round(memory.mb)}


def cost(args: argparse.Namespace) -> None:
    """`cost_of` each upsampler and way, a process each."""
    document = stored(args.output)
    for upsampler in args.upsamplers:
        for what in ("scores", "features"):
            key = {"upsampler": upsampler, "upsampled": what}
            words = [sys.executable, __file__, "--cost-of", upsampler, what]
            answer = json.loads(subprocess.run(words, check=True, capture_output=True, text=True).stdout)
            print(key, answer, file=sys.stderr, flush=True)
            rows = [row for row in document["cost"] if not key.items() <= row.items()]
            document["cost"] = [*rows, {**key, **answer}]
            write_json(args.output, document)


def stored(path: Path) -> dict[str, Any]:
    """What is measured so far."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {**origin(), "results": [], "cost": []}


def table(document: dict[str, Any]) -> list[str]:
    """Rows by base and upsampler; for each scale the score and its change, and seconds."""
    results, scales = document["results"], sorted({row["scale"] for row in document["results"]})
    found = {(row["base"], row["upsampler"], row["scale"]): row for row in results}
    heads = [f"{head}, {scale:g}x" for head in ("mIoU", "boundary IoU", "CPU s") for scale in scales]
    lines = []
    for base, upsampler in dict.fromkeys((row["base"], row["upsampler"]) for row in results):
        cells = [found.get((base, upsampler, scale)) for scale in scales]
        plain = [found.get((base, PLAIN, scale)) for scale in scales]
        scores = [
            _score(cell, other if upsampler != PLAIN else None, key)
            for key in ("mean_iou", "boundary_iou")
            for cell, other in zip(cells, plain, strict=True)
        ]
        seconds = ["" if cell is None else f"{cell['cpu_seconds']:.2f}" for cell in cells]
        lines.append([base, upsampler if upsampler == PLAIN else f"`{upsampler}`", *scores, *seconds])
    return markdown_table(["base", "upsampler", *heads], sorted(lines, key=lambda line: _place(line[0])))


def _place(base: str) -> int:
    return [Row.parse(spec).name for spec in BASES].index(base)


def _score(cell: dict[str, Any] | None, plain: dict[str, Any] | None, key: str) -> str:
    if cell is None:
        return ""
    change = "" if plain is None else f" ({100 * (cell[key] - plain[key]):+.1f})".replace("-", "−")
    return f"{100 * cell[key]:.1f}{change}"


def conclusion(document: dict[str, Any]) -> str:
    """One sentence: the mean change over the bases, of each upsampler at each scale."""
    found = {(row["base"], row["upsampler"], row["scale"]): row for row in document["results"]}
    gains: dict[str, dict[float, list[float]]] = {}
    for (base, upsampler, scale), row in found.items():
        plain = found.get((base, PLAIN, scale))
        if upsampler != PLAIN and plain is not None:
            change = 100 * (row["mean_iou"] - plain["mean_iou"])
            gains.setdefault(upsampler, {}).setdefault(scale, []).append(change)
    parts = [
        f"`{name}` "
        + ", ".join(f"{statistics.fmean(values):+.1f} at {scale:g}x" for scale, values in sorted(by_scale.items()))
        for name, by_scale in gains.items()
    ]
    return f"Mean change in mean IoU over the bases measured: {'; '.join(parts)}.".replace(" -", " −")


def cost_table(document: dict[str, Any]) -> list[str]:
    """Rows by upsampler and by what is upsampled."""
    lines = [
        [f"`{row['upsampler']}`", row["upsampled"], f"{row['cpu_seconds']:.1f}", str(row["peak_mb"])]
        for row in document["cost"]
    ]
    return markdown_table(["upsampler", "what is upsampled", "CPU s", "MB over inputs"], lines)


def write_docs(document: dict[str, Any], path: Path = DOCS) -> None:
    """Renews what stands between the marks."""
    from spar_cli.methods import renew

    counts = sorted({row["num_images"] for row in document["results"]})
    if document["results"]:
        scenes = f"{' or '.join(map(str, counts))} scenes of the picture book's test split, drawn at multiples of the "
        trained = "".join(f" `{name}`: {source}." for name, source in document.get("sources", {}).items())
        head = f"{scenes}native side; in brackets the change against no upsampling.{trained}"
        renew(path, "upsampling", "\n".join([head, "", *table(document), "", conclusion(document)]))
    if document["cost"]:
        what = (
            f"{COST_PX} x {COST_PX} px, {COST_GRID} x {COST_GRID} patches of {COST_CHANNELS} channels, {COST_NAMES} "
            f"names, {ROWS} rows of the label map at a time; AnyUp of its authors' size."
        )
        renew(path, "upsampling-cost", "\n".join([what, "", *cost_table(document)]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [Row.parse(spec).name for spec in BASES]
    parser.add_argument("--bases", nargs="+", choices=names, default=names)
    parser.add_argument("--upsamplers", nargs="+", metavar="NAME[=WEIGHTS]", help=f"(none pamr jbu {ANYUP})")
    parser.add_argument("--scales", type=float, nargs="+", default=[1, 2, 4], help="multiples of the native side")
    parser.add_argument("--limit", type=int, default=32, help="scenes of each cell, spread over the split (32)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: %(default)s)")
    parser.add_argument("--cost", action="store_true", help="measure time and memory of one large picture instead")
    parser.add_argument("--cost-of", nargs=2, metavar=("NAME", "WHAT"), help="one of these, as JSON on a line")
    parser.add_argument("--docs", action="store_true", help="measure nothing; write the tables of the stored results")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    if args.cost_of:
        print(json.dumps(cost_of(*args.cost_of)))
        return
    args.upsamplers = args.upsamplers or (["jbu", "anyup"] if args.cost else [PLAIN, *REFINEMENTS, "jbu", ANYUP])
    try:
        if not args.docs:
            (cost if args.cost else quality)(args)
        document = stored(args.output)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    if args.output == RESULTS:
        write_docs(document)
    print("\n".join([*table(document), "", *cost_table(document)]))


if __name__ == "__main__":
    main()
