"""The options of what results are written as, for every command that writes results."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from .parser import check_one_of

if TYPE_CHECKING:
    from spar_hf.outputs import ResultOptions

FORMATS = ("png",)  # spar_hf.outputs.FORMATS, which takes a moment to import


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
        "--scores", action="store_true", help="with png, also NAME-scores.png: the best probability of each pixel"
    )


def check_result_options(args: argparse.Namespace) -> None:
    """Says before the libraries are loaded that a format is none."""
    for name in args.formats or ():
        check_one_of("format", name, FORMATS)


def asked_of_results(args: argparse.Namespace) -> tuple[ResultOptions, dict[str, Any]]:
    """What the writer is told, and what the pipeline must return for it."""
    from spar_hf.outputs import ResultOptions

    formats = tuple(dict.fromkeys(args.formats or ("png",)))
    return ResultOptions(formats, scores=args.scores), {"return_scores": True} if args.scores else {}
