"""Writes the figures in docs/speed.md from the stored results of the benchmarks, and SPAR's own in docs/benchmarks.md.

python benchmarks/readme.py            # after speed.py, families.py or post_processing.py
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from spar_cli.methods import renew
from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.published import SIX, spar_rows

HERE = Path(__file__).parent
RESULTS = HERE / "results"
DOCS = HERE.parent / "docs"


def read(name: str, folder: Path = RESULTS) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return document


def made_by(document: dict[str, Any]) -> str:
    machine = document["machine"]
    threads = f"{machine['threads']} thread{'s' if machine['threads'] > 1 else ''}"
    return f"{machine['capability']}, {threads}, `{document['command']}`"


def speed_table(document: dict[str, Any]) -> list[str]:
    """A row a size: seconds of ours, the ratios of the others, share of the rate, memory, half precision."""
    rows = {(row["size"], row["dtype"], row["model"]): row for row in document["rows"]}
    sizes = list(dict.fromkeys(row["size"] for row in document["rows"]))
    others = [model for size, dtype, model in rows if (size, dtype) == (sizes[0], "float32") and model != "ours"]
    halved = (sizes[0], "bfloat16", "ours") in rows
    header = ["size", "fp32, s", *others, "of the rate", "peak MB", *(["bf16"] if halved else [])]
    table = []
    for size in sizes:
        ours = rows[size, "float32", "ours"]
        ratios = [f"{rows[size, 'float32', name]['ratio_to_ours']:.2f}x" for name in others]
        half = [half_cell(rows[size, "bfloat16", "ours"])] if halved else []
        table.append(
            [size, f"{ours['seconds']:.2f}", *ratios, f"{ours['of_matrix_rate']:.0%}", f"{ours['peak_mb']:.0f}", *half]
        )
    return [f"{made_by(document)}:", "", *markdown_table(header, table)]


def half_cell(row: dict[str, Any]) -> str:
    """Half precision against fp32, and the part of it that is the widening of weights, where the CPU is slow at it."""
    share = row["widening"] / (row["seconds"] - row["widening"])
    return f"{row['ratio_to_ours']:.2f}x" + (f" (widening: {share:.0%})" if share else "")


def families_table(document: dict[str, Any]) -> list[str]:
    """A row a family and size: seconds of ours and the ratios of the source's own class, without and with a head."""
    rows = {(row["family"], row["size"], row["model"]): row for row in document["rows"] if row["dtype"] == "float32"}
    header = ["family", "size", "fp32, s", "stock", "stock and head"]
    table = []
    for family, size in dict.fromkeys((family, size) for family, size, _ in rows):
        ratios = [rows.get((family, size, model)) for model in ("stock", "stock+head")]
        cells = ["" if row is None else f"{row['ratio_to_ours']:.2f}x" for row in ratios]
        table.append([family, size, f"{rows[family, size, 'ours']['cpu_seconds']:.2f}", *cells])
    return [f"{made_by(document)}:", "", *markdown_table(header, table)]


def post_processing(document: dict[str, Any]) -> list[str]:
    """A row a formulation, number of classes and size."""
    names = {"whole": "whole image", "tiled": "tiles (ours)", "thresholds": "tiles (ours), every threshold"}
    table = []
    for row in document["rows"].values():
        height, width = row["size_hw"]
        sizes = [str(row["classes"]), f"{width} x {height}", f"{row['cpu_seconds']:.1f}", f"{row['memory_mb']:.0f}"]
        table.append([names[row["formulation"]], *sizes])
    return [f"{made_by(document)}:", "", *markdown_table(["label map", "classes", "size", "s", "MB"], table)]


def published() -> list[str]:
    """SPAR's own table: a row a network and setting."""
    settings = {"single": "one pass", "stride-24": "window, stride 24", "spar": "SPAR's student"}
    table = [
        [row.model, settings[row.setting], *(f"{row.miou[name]:.1f}" for name in SIX), f"{row.mean:.1f}"]
        for row in spar_rows()
        if row.setting in settings and row.miou
    ]
    (paper,) = {row.paper for row in spar_rows()}
    return [f"{paper}:", "", *markdown_table(["network", "setting", *SIX, "mean"], table)]


def blocks(folder: Path = RESULTS) -> dict[str, str]:
    """The text between each pair of marks in the pages."""
    speed = [speed_table(read(path.name, path.parent)) for path in sorted((folder / "speed").glob("*.json"))]
    reach = speed_table(read("speed-reach.json", folder))
    lines = {
        "speed": [line for table in speed for line in [*table, ""]][:-1],
        "speed-reach": reach,
        "speed-families": families_table(read("families.json", folder)),
        "speed-post-processing": post_processing(read("post_processing.json", folder)),
        "published": published(),
    }
    return {name: "\n".join(text) for name, text in lines.items()}


def page_of(name: str) -> Path:
    """The page that has a block."""
    return DOCS / ("speed.md" if name.startswith("speed") else "benchmarks.md")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    for name, block in blocks().items():
        renew(page_of(name), name, block)


if __name__ == "__main__":
    main()
