"""`spar models`: the table of model families."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .methods import renew
from .output import check_outputs, table

HELP = "List the families of models that load or convert, and what each was checked against."
EPILOG = """examples:
  spar models
  spar segment street.jpg --labels "road; car; sky" --model google/siglip2-base-patch16-512"""

STOCK = "transformers' forward, plain NumPy"
TIMM = "timm's and open_clip's forwards, plain NumPy"


@dataclass(frozen=True)
class Row:
    """A family as it is published; all else in the table is read off its classes.

    Attributes:
        name: of the family.
        model: name of the whole model's class in `spar_hf`.
        native: side of the images it was trained at, px.
        source: where its weights come from: `loads` is a stock checkpoint as it is, `converts` one of another code.
        checked: what its features were compared with, on random weights.
        vision: fields of the vision configuration that tell it from others of its class.
    """

    name: str
    model: str
    native: str
    source: str
    checked: str
    vision: dict[str, Any] = field(default_factory=dict)


ROWS = (
    Row("CLIP of OpenAI, LAION, DFN; MetaCLIP", "SparModel", "224; 336, 378", "loads, converts", f"{STOCK}, {TIMM}"),
    Row("MetaCLIP 2", "SparMetaclipModel", "224; 378", "loads, converts", f"{STOCK}, open_clip's forward"),
    Row("SigLIP, SigLIP2", "SparSiglipModel", "224 to 512", "loads, converts", f"{STOCK}, {TIMM}"),
    Row(
        "SigLIP2 NaFlex",
        "SparSiglipModel",
        "256, any ratio",
        "loads",
        f"{STOCK}; images packed there, single here",
        {"num_patches": 196, "size_rule": "stretch"},
    ),
    Row("DINOv3.txt", "SparDinov3Model", "384 (SPAR's)", "converts", f"{STOCK}"),
    Row("TIPSv2", "SparTipsModel", "448", "loads", STOCK),
    Row("EVA-02-CLIP, B and L", "SparEvaModel", "224; 336", "converts", TIMM),
    Row(
        "PE-Core",
        "SparEvaModel",
        "224 to 448",
        "converts",
        TIMM,
        {"design": "pe_core", "image_mean": [0.5] * 3, "image_std": [0.5] * 3},
    ),
    Row(
        "C-RADIOv3, v4",
        "SparRadioModel",
        "512 (preferred)",
        "converts",
        f"{STOCK}, NVIDIA's code; the stock class has no head",
        {"projection_dim": 1536, "adaptor_hidden_size": 2560},
    ),
)
CODE = ("class", "text tower", "methods", "sides", "positions")  # columns of names, in Markdown
MEANS = {0.5: "0.5 / 0.5", 0.0: "none", 0.48145466: "CLIP's", 0.485: "ImageNet's"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table as JSON")
    parser.add_argument(
        "--markdown", type=Path, metavar="FILE", help="also renew the table in a Markdown file, between its marks"
    )


def run(args: argparse.Namespace) -> None:
    from spar_hf.evaluation.evaluate import markdown_table
    from spar_hf.files import write_json

    check_outputs(args)
    rows = [facts(row) for row in ROWS]
    heads = list(rows[0])
    if args.markdown is not None:
        cells = [[in_markdown(*cell) for cell in row.items()] for row in rows]
        renew(args.markdown, "models", "\n".join(markdown_table(heads, cells)))
    print(table([tuple(heads), *(tuple(row.values()) for row in rows)], "<" * len(heads)))
    print("\nmethods: ways to dense features; those of CLIP are its rows of `spar methods`.")
    print("sides: what happens to a side that is no multiple of the patch. positions: how the table is resized.")
    if args.json is not None:
        write_json(args.json, {"models": rows})


def in_markdown(column: str, cell: str) -> str:
    """Names as code; a part of several words is no name."""
    if column not in CODE:
        return cell
    return ", ".join(part if " " in part else f"`{part}`" for part in cell.split(", "))


def facts(row: Row) -> dict[str, str]:
    """A row of the table, by column."""
    import torch

    import spar_hf
    from spar_hf.build import methods_for

    model_class = getattr(spar_hf, row.model)
    config = model_class.config_class(vision_config=row.vision)
    with torch.device("meta"):  # takes no memory
        model = model_class(config)
    vision = config.vision_config
    methods = methods_for(type(model.vision_model))
    positions = [vision.position_interpolation or "", "rotary" if hasattr(vision, "rope_theta") else ""]
    return {
        "family": row.name,
        "class": row.model,
        "text tower": type(model.text_model).__name__,
        "native px": row.native,
        "methods": "CLIP's of spar methods" if vision.method in methods else ", ".join([vision.method, *methods]),
        "sides": vision.size_rule,
        "positions": ", ".join(filter(None, positions)),
        "mean / std": MEANS[vision.image_mean[0]],
        "weights": row.source,
        "checked against": row.checked,
    }
