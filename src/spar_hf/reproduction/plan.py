"""The rows of a reproduction: which network, what is done with it, on which benchmark, under which protocol.

A row says all that `spar evaluate` is told; it is evaluated by that command, and can be by hand.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from ..evaluation import OWN
from ..methods.table import METHODS, Method, for_method
from ..names_spar import unknown
from ..published import BENCHMARKS, SIX, method_rows, spar_row
from ..refinement import find_refinements
from .weights import WEIGHTS

PARTS = {
    "paper": "SPAR's table: one pass, the sliding window, SPAR's released weights, and reach",
    "methods": "every training-free method under protocol sclip, and under its authors' own where that is known",
    "speed": "seconds per image of one pass and of windows, on drawings of the paper's size; needs no data set",
}
STRIDES = (24, 40, 56)
SPEED_SHORT_SIDE_PX = 672
NATIVE_PX = {"openclip-b16": 224, "siglip2-b16": 512, "dinov3txt-l16": 384}
RADIO, METHOD_PASSES = "c-radio-b", 4
Words = tuple[str, ...]


@dataclass(frozen=True)
class Row:
    """One evaluation.

    Attributes:
        weights: key of `WEIGHTS`.
        model: what the report calls the network.
        setting: `single`, `stride-24`, `reach`, `spar`, or a method's name.
        benchmark: key of `BENCHMARKS`.
        protocol: of the evaluation; "" for the picture book's.
        options: further words of `spar evaluate`.
        networks: the method's and refinements' second networks: name -> id on the Hub, or what the user gave.
        passes: about how many forward passes an image takes, to tell how long the others will.
        published: mean IoU in per cent, None where there is none.
        comparable: whether that was made under this row's protocol.
        note: what the numbers depend on.
        problem: why this row cannot be run; "" where it can.
    """

    weights: str
    model: str
    setting: str
    benchmark: str
    protocol: str
    options: Words = ()
    networks: tuple[tuple[str, str], ...] = ()
    passes: int = 1
    published: float | None = None
    comparable: bool = True
    note: str = ""
    problem: str = ""

    @property
    def name(self) -> str:
        """What its files are called; differs from row to row."""
        parts = [self.model, self.setting, *([self.protocol] if self.protocol not in ("spar", "") else [])]
        return f"{self.benchmark}/{'-'.join(parts)}"


def plan(part: str, networks: Sequence[tuple[str, str]] = ()) -> list[Row]:
    """The rows of a part, cheap ones first.

    Args:
        part: a key of `PARTS`.
        networks: second networks that the user gives, by NAME or METHOD.NAME.
    """
    if part == "methods":
        rows = [row for method in METHODS.values() for row in _method_rows(method, networks)]
    else:
        rows = _paper_rows() if part == "paper" else _speed_rows()
    return sorted(rows, key=lambda row: row.passes)  # stable: what is alike keeps its order


def select(rows: Iterable[Row], words: Sequence[str]) -> list[Row]:
    """The rows that some words name: benchmarks, models, settings; words of one kind are alternatives.

    Raises:
        ValueError: a word names none of them; the message suggests the nearest.
    """
    rows = list(rows)
    kinds = [{row.benchmark for row in rows}, {row.model for row in rows}, {row.setting for row in rows}]
    known = sorted(set().union(*kinds))
    for word in words:
        if word not in known:
            raise ValueError(unknown("row", word, known))
    for kind, value in zip(kinds, ("benchmark", "model", "setting"), strict=True):
        if wanted := kind & set(words):
            rows = [row for row in rows if getattr(row, value) in wanted]
    return rows


# ------------------------------------------------------------------------------------------------- parts


def windows(short_side_px: int, window_px: int, stride_px: int, ratio: float = 1.5) -> int:
    """How many windows an image of that ratio takes."""

    def along(length_px: int) -> int:
        return -(-max(length_px - window_px, 0) // stride_px) + 1

    return along(short_side_px) * along(round(short_side_px * ratio))


def _settings(model: str) -> list[tuple[str, str, Words, int]]:
    """Setting, weights, words and stride (0: one pass) of what is done with a network of the paper."""
    found: list[tuple[str, str, Words, int]] = [
        ("single", model, (), 0),
        ("reach", model, ("--attention-reach", "window"), 0),
        ("spar", f"spar-{model}", (), 0),
    ]
    if f"spar-{model}-new" in WEIGHTS:
        found.append(("spar-new", f"spar-{model}-new", (), 0))
    found += [
        (f"stride-{stride}", model, ("--window-px", "native", "--stride-px", str(stride)), stride)
        for stride in reversed(STRIDES)
    ]
    return found


def _paper_rows() -> list[Row]:
    rows = []
    for model in NATIVE_PX:
        for (setting, weights, options, stride), benchmark in product(_settings(model), SIX):
            published = spar_row(model, setting)
            short_side_px, ratio = (1024, 2.0) if benchmark == "cityscapes" else (672, 1.5)
            rows.append(
                Row(
                    weights,
                    model,
                    setting,
                    benchmark,
                    "spar",
                    options,
                    passes=windows(short_side_px, NATIVE_PX[model], stride, ratio) if stride else 1,
                    published=None if published is None else published.miou.get(benchmark),
                    note=WEIGHTS[weights].note,
                )
            )
    naflex = "siglip2-b16-naflex"
    return [*rows, *(Row(naflex, naflex, "single", benchmark, "spar") for benchmark in SIX)]


def _speed_rows() -> list[Row]:
    rows = []
    for model, native_px in NATIVE_PX.items():
        scale = ("--scale", f"{SPEED_SHORT_SIDE_PX / native_px:g}")
        for setting, weights, options, stride in _settings(model):
            if weights == model or setting == "spar":
                passes = windows(SPEED_SHORT_SIDE_PX, native_px, stride, 1.0) if stride else 1
                rows.append(Row(weights, model, setting, "picturebook", "", (*scale, *options), passes=passes))
    return rows


def _method_rows(method: Method, networks: Sequence[tuple[str, str]]) -> list[Row]:
    published, own = method_rows().get(method.name), OWN.get(method.name)
    model = own.model if own else RADIO if method.family == "radio" else "clip-b16"
    given = for_method(method.name, networks)
    rows = []
    for benchmark in BENCHMARKS:
        common: dict[str, Any] = {
            "passes": METHOD_PASSES,
            "published": None if published is None else published.miou.get(benchmark),
            "note": method.note,
            "problem": _problem(method, given),
        }
        words: tuple[str, ...] = ("--method", method.name)
        rows.append(
            Row(
                model,
                model,
                method.name,
                benchmark,
                "sclip",
                words,
                _networks(method, (), given),
                comparable=method.name == "sclip",  # whose own it is
                **common,
            )
        )
        if own is None or benchmark not in own.protocols or method.name == "sclip":
            continue
        for name, value in own.settings.get(benchmark, {}).items():
            words += ("--set", f"{name}={value}")
        for name in own.refine:
            words += ("--refine", name)
        further = _networks(method, own.refine, given)
        rows.append(Row(model, model, method.name, benchmark, "own", words, further, **common))
    return rows


def _networks(method: Method, refine: Sequence[str], given: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """The second networks of a method and refinements, the user's before the authors'."""
    wanted = {name: where for row in find_refinements(refine).values() for name, where in row.networks.items()}
    wanted |= method.defaults
    wanted |= {name: where for name, where in given.items() if name in {**method.networks, **wanted}}
    return tuple(sorted(wanted.items()))


def _problem(method: Method, given: Mapping[str, str]) -> str:
    """What a method lacks that only the user can give."""
    lacking = [name for name, where in method.needs.items() if not where and name not in given]
    if not lacking:
        return ""
    options = " ".join(f"--network {method.name}.{name}=..." for name in lacking)
    return f"its {' and '.join(lacking)} cannot be downloaded; make or get it (docs/methods.md) and give {options}"
