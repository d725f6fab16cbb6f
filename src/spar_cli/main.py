"""The `spar` command: reads the line, runs one command, turns a user's mistake into one line and exit status 2."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata

from . import (
    convert,
    demo,
    evaluate,
    export,
    features,
    labels,
    methods,
    models,
    prototypes,
    publish,
    reproduce,
    segment,
)
from .errors import MISTAKE, clean, exit_status, fail
from .exported import on_onnx
from .parser import Parser, check_one_of, with_flags
from .picture_options import PICTURE_FLAGS

COMMANDS = {
    "segment": segment,
    "features": features,
    "labels": labels,
    "methods": methods,
    "models": models,
    "evaluate": evaluate,
    "reproduce": reproduce,
    "prototypes": prototypes,
    "convert": convert,
    "export": export,
    "publish": publish,
    "demo": demo,
}

EPILOG = """examples:
  spar segment street.jpg --labels "road; car, automobile; sky"
  spar segment photos/ --labels "dog; grass" --model openai/clip-vit-base-patch16 --output results --resume
  spar features street.jpg --output features
  spar methods
  spar evaluate --benchmark picturebook --scale 4 --limit 20
  spar publish runs/spar/model --repo-id you/spar
  spar demo

'spar COMMAND --help' explains each command."""


# The library's messages name its arguments; on the command line these have other names.
FLAGS = {
    "max_image_pixels": "--max-pixels",
    "max_input_pixels": "--max-pixels",
    "window_px": "--window-px",
    "stride_px": "--stride-px",
    "mask_orientation": "--mask-orientation",
    **PICTURE_FLAGS,
}


def build_parser() -> Parser:
    """The parser of the whole line."""
    parser = Parser(
        prog="spar",
        description="Open-vocabulary segmentation: name what you look for, get it as a label map.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"spar-hf {metadata.version('spar-hf')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, command in COMMANDS.items():
        own = subparsers.add_parser(name, help=command.HELP, description=command.HELP, epilog=command.EPILOG)
        command.add_arguments(own)
        own.add_argument("-v", "--verbose", action="store_true", help="more messages; full tracebacks")
    return parser


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace.

    Raises:
        ValueError: an unknown command or option, or a wrong value; the message names the nearest known one.
    """
    parser = build_parser()
    command = next((word for word in argv if not word.startswith("-")), None)
    if command is None:
        parser.parse_args(argv)  # leaves for --help and --version
        parser.error(f"no command given; choose one of {', '.join(COMMANDS)}")
    check_one_of("command", command, COMMANDS)
    return parser.parse_args(argv, argparse.Namespace(argv=argv))


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `spar`.

    Args:
        argv: The words after `spar`; None takes those of the process.

    Returns:
        The exit status: 0; 1 where some of several pictures could not be done; 2 after a mistake of the user's.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    verbose = "-v" in argv or "--verbose" in argv
    try:
        args = parse(argv)
    except ValueError as error:
        return fail("spar", " ".join(str(error).split()), MISTAKE)

    with_pytorch = args.command not in ("segment", "labels") or not on_onnx(args)
    if not with_pytorch:
        from spar_onnx.library import without_pytorch

        without_pytorch()

    def run() -> int | None:
        with _loudness(verbose, with_pytorch):
            status = COMMANDS[args.command].run(args)
        if "WORLD_SIZE" in os.environ:
            from spar_hf.processes import leave

            leave()
        return status

    remedy = "give a smaller --short-side, or --dtype bfloat16"
    return exit_status(run, "spar", FLAGS, remedy, verbose)


class _Notes(logging.Handler):
    """Shows the package's own warnings, say of a label that was cut, as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"spar: note: {with_flags(clean(record.getMessage()), FLAGS)}", file=sys.stderr)


@contextmanager
def _loudness(verbose: bool, with_pytorch: bool) -> Iterator[None]:
    """Keeps the libraries quiet, and lets the package's own warnings through."""
    if with_pytorch:
        from transformers.utils import logging as transformers_logging

        if verbose:
            transformers_logging.set_verbosity_info()
        else:
            transformers_logging.set_verbosity_error()
            transformers_logging.disable_progress_bar()
    notes, ours = _Notes(logging.WARNING), logging.getLogger("spar_hf")
    ours.addHandler(notes)
    try:
        yield
    finally:
        ours.removeHandler(notes)


if __name__ == "__main__":
    sys.exit(main())
