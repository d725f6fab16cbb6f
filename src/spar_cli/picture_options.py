"""The options of what is read of a picture, for every command and script that reads pictures."""

from __future__ import annotations

import argparse
import re
from typing import Any

# How the library's messages name them.
PICTURE_FLAGS = {
    "bands=(3, 2, 1)": "--bands 3,2,1",
    "bands=(2,)": "--bands 2",
    "alpha='compose'": "--alpha compose",
    "value_range='auto'": "--range auto",
}


def band_numbers(word: str) -> tuple[int, ...]:
    """An argparse type: one band or three, counted from 1."""
    if not re.fullmatch(r"[1-9][0-9]{0,3}(,[1-9][0-9]{0,3}){2}|[1-9][0-9]{0,3}", word):
        raise argparse.ArgumentTypeError(f"it is {word!r}; give three band numbers, such as 3,2,1, or one for grey")
    return tuple(int(number) for number in word.split(","))


def value_range(word: str) -> str | tuple[float, float]:
    """An argparse type: `auto`, or the values of black and white."""
    if word == "auto":
        return word
    try:
        black, white = (float(number) for number in word.split(","))
    except ValueError:
        black = white = 0.0
    if not float("-inf") < black < white < float("inf"):
        raise argparse.ArgumentTypeError(f"it is {word!r}; give auto, or what is black and white, such as 0,3000")
    return black, white


def alpha(word: str) -> str:
    """An argparse type: what an alpha band is taken for."""
    from spar_hf.image_values_spar import ALPHAS

    if word not in ALPHAS:
        raise argparse.ArgumentTypeError(f"it is {word!r}; choose one of {', '.join(ALPHAS)}")
    return word


def add_picture_options(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """The options of what is read of a picture, wherever pictures are read."""
    group = parser.add_argument_group("pictures")
    group.add_argument(
        "--bands",
        type=band_numbers,
        metavar="R,G,B",
        help="the bands that become red, green and blue, counted from 1, such as 3,2,1; one becomes grey (default: "
        "the first three)",
    )
    group.add_argument(
        "--alpha",
        type=alpha,
        metavar="auto|compose|ignore",
        help="compose: where the band marked as alpha is transparent, white shows; ignore: it is left out; auto: "
        "ignore in TIFFs, whose writers mark any fourth band so, else compose (default: auto)",
    )
    group.add_argument(
        "--range",
        type=value_range,
        dest="value_range",
        metavar="auto|LOW,HIGH",
        help="the values that become black and white; auto takes each picture's own (default: all that the type of "
        "its numbers can hold)",
    )
    return group


def asked_of_pictures(args: argparse.Namespace) -> dict[str, Any]:
    """Those of the options that are given, by the names of `ReadOptions`."""
    options = {"bands": args.bands, "alpha": args.alpha, "value_range": args.value_range}
    return {name: value for name, value in options.items() if value is not None}
