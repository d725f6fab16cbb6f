"""The `spar` command: reads the line, runs one command, turns a user's mistake into one line and exit status 2."""

from __future__ import annotations

import argparse
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from typing import Any, NoReturn

from . import convert, demo, evaluate, features, methods, publish, segment
from .options import check_one_of

COMMANDS = {
    "segment": segment,
    "features": features,
    "methods": methods,
    "evaluate": evaluate,
    "convert": convert,
    "publish": publish,
    "demo": demo,
}

EPILOG = """examples:
  spar segment street.jpg --labels "road; car, automobile; sky"
  spar segment photos/*.jpg --labels "dog; grass" --model openai/clip-vit-base-patch16 --output results
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
    "bands=(3, 2, 1)": "--bands 3,2,1",
    "bands=(2,)": "--bands 2",
    "alpha='compose'": "--alpha compose",
    "value_range='auto'": "--range auto",
}


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that reports a mistake as a `ValueError` instead of leaving with its usage text."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see '{self.prog} --help'")

    def option_names(self) -> list[str]:
        return [name for name in self._option_string_actions if name.startswith("--")]


def build_parser() -> tuple[Parser, dict[str, Parser]]:
    """The parser of the whole line, and that of each command."""
    parser = Parser(
        prog="spar",
        description="Open-vocabulary segmentation: name what you look for, get it as a label map.",
        epilog=EPILOG,
    )
    parser.add_argument("--version", action="version", version=f"spar-hf {metadata.version('spar-hf')}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    parsers = {}
    for name, command in COMMANDS.items():
        parsers[name] = subparsers.add_parser(name, help=command.HELP, description=command.HELP, epilog=command.EPILOG)
        command.add_arguments(parsers[name])
        parsers[name].add_argument("-v", "--verbose", action="store_true", help="more messages; full tracebacks")
    return parser, parsers


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace.

    Raises:
        ValueError: an unknown command or option, or a wrong value; the message names the nearest known one.
    """
    parser, parsers = build_parser()
    command = next((word for word in argv if not word.startswith("-")), None)
    if command is None:
        parser.parse_args(argv)  # leaves for --help and --version
        parser.error(f"no command given; choose one of {', '.join(COMMANDS)}")
    check_one_of("command", command, COMMANDS)
    for word in argv:
        if word == "--":
            break
        if word.startswith("--"):
            check_one_of("option", word.partition("=")[0], parsers[command].option_names())
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
        return _fail(" ".join(str(error).split()), 2)
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a label or name that the terminal's encoding lacks
        with _loudness(verbose):
            status = COMMANDS[args.command].run(args)
        sys.stdout.flush()
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:  # the reader of a pipe, say `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, MemoryError) as error:
        if verbose:
            traceback.print_exc()
        return _fail(_one_line(error), 2)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "not enough memory" not in str(error).lower():
            raise
        return _fail("out of memory; give a smaller --short-side, or --dtype bfloat16", 2)
    return status or 0


class _Notes(logging.Handler):
    """Shows the package's own warnings, say of a label that was cut, as lines of the command."""

    def emit(self, record: logging.LogRecord) -> None:
        print(f"spar: note: {_with_flags(_clean(record.getMessage()))}", file=sys.stderr)


@contextmanager
def _loudness(verbose: bool) -> Iterator[None]:
    """Keeps the libraries quiet, and lets the package's own warnings through."""
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


def _clean(message: str) -> str:
    """One line without control characters, whatever labels and file names it quotes."""
    from spar_hf.visualize import plain_text

    return plain_text(message)


def _one_line(error: BaseException) -> str:
    """The message of an error, line breaks folded; `[Errno 2]` and its like put into words."""
    if isinstance(error, OSError) and error.strerror:
        return _clean(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    if isinstance(error, MemoryError):
        return "out of memory; give a smaller --short-side"
    return _with_flags(_clean(str(error)) or type(error).__name__)


def _with_flags(message: str) -> str:
    for name, flag in FLAGS.items():
        message = message.replace(name, flag)
    return message


def _fail(message: str, status: int) -> int:
    print(f"spar: error: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
