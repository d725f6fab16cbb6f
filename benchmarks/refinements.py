"""Measures every refinement alone on the picture book and writes the table of docs/refinement.md.

    python benchmarks/refinements.py                       # tiny, 4x, 32 scenes: none, then each refinement alone
    python benchmarks/refinements.py --limit 8 pamr pamr+cluster-vote
    python benchmarks/refinements.py --docs                # rewrites the table from the stored results

Each row is what `spar evaluate --benchmark picturebook --scale 4 --limit 32 --refine NAME` gives; "a+b" is several.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from record import origin

import spar_hf
from spar_cli.methods import renew
from spar_hf import REFINEMENTS, build_segmenter
from spar_hf.evaluation import load_benchmark
from spar_hf.evaluation.evaluate import evaluate, markdown_table
from spar_hf.files import write_json
from spar_hf.refinement.table import STAGES

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "refinements.json"
DOCS = HERE.parent / "docs" / "refinement.md"


def measure(rows: list[list[str]], args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates every row and stores what is done after each."""
    model, processor = spar_hf.load(args.model)
    data = load_benchmark("picturebook", scale=args.scale, native_px=model.vision_model.config.image_size)
    document: dict[str, Any] = {
        **origin(),
        "model": args.model,
        "scale": args.scale,
        "results": [],
    }
    for names in rows:
        print(" + ".join(names) or "none", file=sys.stderr)
        segmenter = build_segmenter(model, processor, refine=names)
        result = evaluate(segmenter, processor, data, limit=args.limit)
        document["results"].append({**json.loads(result.to_json()), "refine": names, "command": document["command"]})
        write_json(args.output, document)
    return document


def table(document: dict[str, Any]) -> list[str]:
    """The Markdown table of the refinements with what was measured of each alone."""
    measured = {tuple(entry["refine"]): entry for entry in document["results"]}
    plain = measured[()]
    lines = []
    for name, row in REFINEMENTS.items():
        entry = measured.get((name,))
        score = change = ""
        if entry is not None:
            score = f"{100 * entry['mean_iou']:.1f}"
            change = f"{100 * (entry['mean_iou'] - plain['mean_iou']):+.1f}".replace("-", "−")
        does = f"{row.title} ({row.paper})"
        needs = ", ".join(row.needs) or "nothing"
        lines.append([f"`{name}`", does, STAGES[row.stage], needs, score, change])
    header = ["refinement", "does", "changes", "needs", "mIoU", "change"]
    return [
        f"`{document['model']}` in one pass at {document['scale']:g}× its native side, {plain['num_images']} scenes "
        f"of the picture book's test split: {100 * plain['mean_iou']:.1f} % mean IoU without any.",
        "",
        f"| {' | '.join(header)} |",
        f"| {' | '.join(['---'] * 4 + ['---:'] * 2)} |",
        *markdown_table(header, lines)[2:],
    ]


def write_docs(document: dict[str, Any], path: Path = DOCS) -> None:
    """Puts the table between its marks."""
    renew(path, "refinements", "\n".join(["", *table(document), ""]))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", metavar="NAME[+NAME]", help="default: each that runs alone")
    parser.add_argument("--model", default="tiny", help="default: %(default)s")
    parser.add_argument("--scale", type=float, default=4, help="multiple of the native side (default: %(default)s)")
    parser.add_argument("--limit", type=int, default=32, help="scenes (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="JSON file (default: %(default)s)")
    parser.add_argument("--docs", action="store_true", help="measure nothing; write the table of the stored results")
    args = parser.parse_args(argv)
    if args.docs:
        write_docs(json.loads(args.output.read_text(encoding="utf-8")))
        return
    # The picture book's classes have no definitions.
    alone = [name for name, row in REFINEMENTS.items() if not row.networks and row.stage != "texts"]
    try:
        document = measure([[], *(row.split("+") for row in args.rows or alone)], args)
    except ValueError as error:
        parser.error(str(error))
    if args.output == RESULTS:
        write_docs(document)
    print("\n".join(table(document)))


if __name__ == "__main__":
    main()
