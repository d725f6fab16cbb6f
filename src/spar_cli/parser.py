"""The one command-line parser, of `spar` and of the scripts in training/: option types and "did you mean".

Imports no PyTorch, so that help and mistakes on the line are answered at once.
"""

from __future__ import annotations

import argparse
import math
import re
import sys
from collections.abc import Callable, Iterable
from importlib.util import find_spec
from pathlib import Path
from runpy import run_path
from typing import Any, NoReturn

# What the library says of unknown names, from its file: importing the package imports PyTorch, which takes seconds.
_unknown = run_path(str(Path(find_spec("spar_hf").origin).with_name("names_spar.py")))["unknown"]  # type: ignore


def check_one_of(what: str, word: str, allowed: Iterable[str]) -> str:
    """`word` if it is among the allowed ones.

    Raises:
        ValueError: it is not; the message lists them and suggests the nearest.
    """
    allowed = list(allowed)
    if word not in allowed:
        raise ValueError(_unknown(what, word, allowed))
    return word


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` without abbreviations that reports a mistake as a `ValueError` of one line.

    An unknown option or choice names the nearest known one.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see '{self.prog} --help'")

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's, after a look at the names of all options. A parser of commands leaves that to theirs."""
        words = sys.argv[1:] if args is None else list(args)
        if self._subparsers is None:
            for word in words:
                if word == "--":
                    break
                if word.startswith("--"):
                    check_one_of("option", word.partition("=")[0], self.option_names())
        return super().parse_known_args(words, namespace)

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None:
            try:
                check_one_of("choice", value, action.choices)
            except ValueError as error:
                raise argparse.ArgumentError(action, str(error)) from None

    def option_names(self) -> list[str]:
        """The long names of all options."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def flags(self) -> dict[str, str]:
        """Option by the name that the library knows its value by: `min_side_px` -> `--min-side-px`."""
        return {name[2:].replace("-", "_"): name for name in self.option_names() if "-" in name[2:]}


def with_flags(message: str, flags: dict[str, str]) -> str:
    """A message of the library with the names of its arguments turned into those of the options."""
    for name, flag in flags.items():
        message = re.sub(rf"(?<![\w./-]){re.escape(name)}(?![\w/-])", flag, message)
    return message


# ------------------------------------------------------------------------------------------------ types of options


def whole_number_from(least: int, most: int | None = None) -> Callable[[str], int]:
    """An argparse type: a whole number from `least` to `most`."""
    wanted = f"a whole number, at least {least}" if most is None else f"a whole number from {least} to {most}"

    def read(word: str) -> int:
        number = int(word) if re.fullmatch(r"-?[0-9]{1,15}", word) else None
        if number is None or number < least or (most is not None and number > most):
            raise argparse.ArgumentTypeError(f"it is {word!r}; give {wanted}")
        return number

    return read


def _number(word: str) -> float:
    try:
        return float(word)
    except ValueError:
        return math.nan


whole_number = whole_number_from(1)
whole_number_or_0 = whole_number_from(0)


def fraction(word: str) -> float:
    """An argparse type: a number from 0 to 1."""
    value = _number(word)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"it is {word!r}; give a number from 0 to 1")
    return value


def positive(word: str) -> float:
    """An argparse type: a number above 0."""
    value = _number(word)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"it is {word!r}; give a number above 0")
    return value


def positive_or_0(word: str) -> float:
    """An argparse type: a number, at least 0."""
    value = _number(word)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"it is {word!r}; give a number, at least 0")
    return value


def port(word: str) -> int:
    """An argparse type: a port of TCP."""
    if not (word.isascii() and word.isdigit() and 0 < int(word) < 65536):
        raise argparse.ArgumentTypeError(f"it is {word!r}; give a port from 1 to 65535")
    return int(word)


def window_px(word: str) -> int | str:
    """An argparse type: a whole number of pixels, or the word `native` or `paper`."""
    if word not in ("native", "paper") and not re.fullmatch(r"[0-9]{1,15}", word):
        raise argparse.ArgumentTypeError(f"it is {word!r}; give a whole number of pixels, or native, or paper")
    return word if word in ("native", "paper") else int(word)


def name_and_value(word: str) -> tuple[str, str]:
    """An argparse type: NAME=VALUE."""
    name, equals, value = word.partition("=")
    if not (name and equals and value):
        raise argparse.ArgumentTypeError(f"it is {word!r}; write NAME=VALUE")
    return name, value


def text(word: str) -> str:
    """An argparse type: a word that is not empty."""
    if not word.strip():
        raise argparse.ArgumentTypeError(f"it is {word!r}, which is empty; give a name")
    return word


def path(word: str) -> Path:
    """An argparse type: a path; the empty word, which would be the current folder, is none."""
    return Path(text(word))
