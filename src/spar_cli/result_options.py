"""The options of what results are written as, for every command that writes results."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from .parser import check_one_of, whole_number

if TYPE_CHECKING:
    from spar_hf.outputs import ResultOptions

# spar_hf.outputs.FORMATS, which takes a moment to import.
FORMATS = ("png", "palette", "coco", "geojson", "geotiff", "npz", "safetensors", "yolo")


def add_result_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("results")
    group.add_argument(
        "--format",
        action="append",
        dest="formats",
        metavar="NAME",
        help=f"what is written for each picture: {', '.join(FORMATS)}; may be given again (default: png)",
    )
    group.add_argument(
        "--instances",
        action="store_true",
        help="a connected component of a class is a region of its own in coco and geojson (default: a class is one)",
    )
    group.add_argument(
        "--min-area", type=whole_number, default=0, metavar="PX", help="components of fewer pixels have no class"
    )
    group.add_argument(
        "--fill-holes",
        type=whole_number,
        default=0,
        metavar="PX",
        help="holes in a class of at most so many pixels become that class",
    )
    group.add_argument(
        "--top-k",
        type=whole_number,
        default=5,
        metavar="N",
        help="classes of each pixel in npz and safetensors (default: 5)",
    )
    group.add_argument(
        "--scores", action="store_true", help="with png, also NAME-scores.png: the best probability of each pixel"
    )


def check_result_options(args: argparse.Namespace) -> None:
    """Says before the libraries are loaded that a format is none."""
    for name in args.formats or ():
        check_one_of("format", name, FORMATS)


def asked_of_results(args: argparse.Namespace) -> ResultOptions:
    """What the writer is told; its `of_pipeline` is what the pipeline must return for it."""
    from spar_hf.outputs import ResultOptions

    return ResultOptions(
        tuple(dict.fromkeys(args.formats or ("png",))),
        instances=args.instances,
        min_area=args.min_area,
        fill_holes=args.fill_holes,
        top_k=args.top_k,
        scores=args.scores,
    )
