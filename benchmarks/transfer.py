"""Whether a network of the picture book ranks the methods as a real CLIP does: its mIoU against the published ones.

    python benchmarks/transfer.py tiny                       # 64 scenes of the validation split
    python benchmarks/transfer.py .work/captions/model --limit 512 --split test
    python benchmarks/transfer.py tiny --only clip maskclip sclip

Every method without a further network, as its authors run theirs relative to the native side (CLIP's 224 px): the
short side at 336 px, windows of 224 px, stride 112. The criterion, stated before any network was trained for it: the
rank correlation (Spearman) with the mean published for VOC21, Context60 and ADE20K is at least 0.6, `clip` is far
below `maskclip` (less than half of it), and the methods whose last block has no residual connection are above both. A
criterion that fails is reported as such.
Writes benchmarks/results/transfer/NAME.json, method by method; a run goes on where an earlier one stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from record import origin
from scipy.stats import spearmanr

import spar_hf
from spar_hf import METHODS, build_segmenter
from spar_hf.evaluation import load_benchmark
from spar_hf.evaluation.evaluate import evaluate, markdown_table
from spar_hf.files import write_json
from spar_hf.published import method_rows

RESULTS = Path(__file__).parent / "results" / "transfer"
SETS = ("voc21", "context60", "ade20k")
SCALE = 336 / 224
WANTED, FAR_BELOW = 0.6, 0.5
WITHOUT_RESIDUAL = ("clearclip", "naclip", "sc_clip")


def published(method: str) -> float | None:
    """The mean of the published mIoU of a method; None where one of the sets is missing."""
    row = method_rows().get(method)
    values = [row.miou.get(name) for name in SETS] if row else [None]
    return None if None in values else sum(values) / len(SETS)  # type: ignore[arg-type]


def own_methods() -> list[str]:
    """The methods of CLIP that need no other network."""
    return [name for name, row in METHODS.items() if not row.needs and row.family == "clip"]


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Evaluates what the stored results lack; they are written after each method."""
    model, processor = spar_hf.load(args.model)
    native_px = model.vision_model.config.image_size
    data = load_benchmark("picturebook", scale=SCALE, native_px=native_px, split=args.split)
    settings = {"model": args.model, "split": args.split, "limit": args.limit}
    document: dict[str, Any] = {**origin(), **settings, "methods": {}}
    if args.output.exists():
        stored = json.loads(args.output.read_text(encoding="utf-8"))
        if {name: stored[name] for name in settings} == settings:
            document = stored
    for name in args.only or own_methods():
        if name in document["methods"]:
            continue
        print(name, file=sys.stderr, flush=True)
        segmenter = build_segmenter(model, processor, name, window=native_px, stride_px=native_px // 2)
        found = evaluate(segmenter, processor, data, limit=args.limit)
        document["methods"][name] = {"mean_iou": found.mean_iou, "published": published(name)}
        write_json(args.output, document)
    return document


def verdict(document: dict[str, Any]) -> dict[str, Any]:
    """Each part of the criterion: the correlation, and the two orders; None where a method was not measured."""
    rows = {name: row for name, row in document["methods"].items() if row["published"] is not None}
    iou = {name: row["mean_iou"] for name, row in document["methods"].items()}
    both = {"clip", "maskclip"} <= set(iou)
    better = [iou[name] for name in WITHOUT_RESIDUAL if name in iou]
    correlation = None
    if len(rows) > 2:
        correlation = float(spearmanr(*zip(*((r["mean_iou"], r["published"]) for r in rows.values()), strict=True))[0])
    return {
        "methods": len(rows),
        "correlation": correlation,
        "correlates": None if correlation is None else correlation >= WANTED,
        "clip_far_below": iou["clip"] < FAR_BELOW * iou["maskclip"] if both else None,
        "without_residual_above": min(better) > max(iou["clip"], iou["maskclip"]) if both and better else None,
    }


def table(document: dict[str, Any]) -> list[str]:
    """The methods from the best published down, what was measured, and the verdict in a line."""
    rows = sorted(document["methods"].items(), key=lambda row: -(row[1]["published"] or 0))
    cells = [
        [f"`{name}`", "" if row["published"] is None else f"{row['published']:.1f}", f"{100 * row['mean_iou']:.1f}"]
        for name, row in rows
    ]
    found = verdict(document)
    words = {True: "yes", False: "no", None: "not measured"}
    correlation = "not measured" if found["correlation"] is None else f"{found['correlation']:.2f}"
    return [
        f"`{document['model']}`, {document['limit']} scenes of the {document['split']} split:",
        "",
        *markdown_table(["method", "published, mean of three", "here, mIoU"], cells),
        "",
        f"Rank correlation over {found['methods']} methods: {correlation} (wanted: {WANTED}). `clip` below half of "
        f"`maskclip`: {words[found['clip_far_below']]}. {', '.join(f'`{name}`' for name in WITHOUT_RESIDUAL)} above "
        f"both: {words[found['without_residual_above']]}.",
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="checkpoint that ships with the package, folder or id")
    parser.add_argument(
        "--only", nargs="+", choices=own_methods(), metavar="METHOD", help="default: all without networks"
    )
    parser.add_argument("--split", default="validation", choices=("validation", "test"))
    parser.add_argument("--limit", type=int, default=64, help="scenes (default: %(default)s)")
    parser.add_argument("--output", type=Path, help="default: results/transfer/NAME.json")
    args = parser.parse_args(argv)
    if args.output is None:
        path = Path(args.model)
        name = path.parent.name if path.name == "model" else path.name
        args.output = RESULTS / f"{name}.json"
    document = measure(args)
    print("\n".join(table(document)))


if __name__ == "__main__":
    main()
