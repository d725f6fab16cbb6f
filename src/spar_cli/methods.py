"""`spar methods`: the table of methods."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .output import check_outputs, table

HELP = "List the training-free methods that --method takes and the refinements that --refine takes."
EPILOG = """examples:
  spar methods
  spar segment street.jpg --labels "road; car; sky" --model openai/clip-vit-base-patch16 --method naclip"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also renew the table in a Markdown file, between its marks"
    )


def run(args: argparse.Namespace) -> None:
    from spar_hf.files import write_json
    from spar_hf.methods.table import FAMILIES, METHODS
    from spar_hf.published import BENCHMARKS
    from spar_hf.refinement import REFINEMENTS
    from spar_hf.refinement.table import STAGES

    check_outputs(args)
    if args.markdown is not None:
        renew(args.markdown, "methods", markdown())
    short = {"coco_object": "object", "coco_stuff": "stuff"}
    rows: list[tuple[str, ...]] = [("method", "for", "branch", "gives", "window", "stride", "needs", "paper")]
    numbers: list[tuple[str, ...]] = [("method", *(short.get(name, name) for name in BENCHMARKS))]
    for name, method in METHODS.items():
        needs = ", ".join(further(method, "=")) or "-"
        window = "native" if method.window_px is None else str(method.window_px)
        paper = f"{method.title}; {method.paper}"
        rows.append(
            (name, FAMILIES[method.family], method.branch, method.kind, window, str(method.stride_px), needs, paper)
        )
        reported = (f"{method.reported[key]:.1f}" if key in method.reported else "-" for key in BENCHMARKS)
        numbers.append((name, *reported))
    print(table(rows, "<<<<>><<"))
    print("\nReported mean IoU in %, CLIP ViT-B/16, each under its authors' own protocol:\n")
    print(table(numbers, "<" + ">" * len(BENCHMARKS)))
    print("\nfor: the family whose blocks it is about; --model takes one of that family.")
    print("branch: clip alone, a vision foundation model beside it (vfm), or a generative one.")
    print("gives: feature, one text-aligned vector per patch; or label, score maps. Both can be teachers.")
    print("window, stride: the authors', in pixels, for a native side of 224 (RADIO: 512); other networks scale them.")
    print("needs: further networks; --network NAME=ID takes another one. Without an id: give one. In brackets: the")
    print("authors' choice where the model itself does as well, or what a bank is made with. A bank is a file that")
    print("spar prototypes makes. Regions may also come from superpixels, --network regions=slic, or from masks of")
    print("one's own: --masks FOLDER (spar evaluate: --region-masks).")
    print("\nRefinements, which go with any method: --refine NAME, several if need be; they run in this order.\n")
    refinements = [("refinement", "changes", "needs", "paper")]
    for name, row in REFINEMENTS.items():
        refinements.append((name, STAGES[row.stage], ", ".join(row.needs) or "-", f"{row.title}; {row.paper}"))
    print(table(refinements, "<<<<"))
    if args.json is not None:
        options = {
            name: {key: getattr(option, key) for key in ("title", "paper", "stage", "needs")}
            for name, option in REFINEMENTS.items()
        }
        methods = {name: method.to_dict() for name, method in METHODS.items()}
        write_json(args.json, {"methods": methods, "refinements": options})


def further(method: Any, between: str) -> list[str]:
    """A method's further networks and its authors' ids; in brackets what is only used where it is given."""
    needed = [f"{name}{between}{default}" if default else name for name, default in method.needs.items()]
    optional = {**method.takes, **method.bank}
    return [*needed, *(f"[{name}{between}{default}]" for name, default in optional.items())]


def markdown() -> str:
    """The table of feature methods for the documentation."""
    from spar_hf.evaluation.evaluate import markdown_table
    from spar_hf.methods.table import FAMILIES, METHODS
    from spar_hf.published import BENCHMARKS

    rows, numbers = [], []
    for name, method in METHODS.items():
        where = "row" if method.recipe is not None else f"[file](../src/spar_hf/methods/{name}.py)"
        window = f"{method.window_px or 'native'} / {method.stride_px}"
        needs = ", ".join(further(method, ": ")) or "nothing else"
        facts = [
            f"`{name}`",
            method.title,
            method.paper,
            FAMILIES[method.family],
            where,
            needs,
            f"`{method.position_interpolation}`",
            window,
        ]
        rows.append(facts)
        reported = [f"{method.reported[key]:.1f}" if key in method.reported else "" for key in BENCHMARKS]
        numbers.append([f"`{name}`", *reported, method.note])
    heads = ["method", "name", "paper", "for", "row or file", "needs", "positions", "window / stride (px)"]
    return "\n".join(
        [
            *markdown_table(heads, rows),
            "",
            "Mean IoU in %, CLIP ViT-B/16, as published, each under its authors' own protocol:",
            "",
            *markdown_table(["method", *BENCHMARKS, "note"], numbers),
        ]
    )


def renew(path: Path, name: str, block: str) -> None:
    """Puts a generated block between the marks `<!-- NAME -->` and `<!-- /NAME -->` of a file.

    Raises:
        ValueError: the file has no such marks.
    """
    from spar_hf.files import write_atomically

    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = path.read_text(encoding="utf-8")
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"{path} has no place for the table; put the lines {start} and {end} where it shall stand.")
    write_atomically(path, f"{before}{start}\n{block}\n{end}{after}".encode())
