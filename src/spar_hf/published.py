"""Published numbers, read from `published.json`: the one place where they stand, each with its source.

What quotes one (the table of methods, the documentation, model cards, `spar reproduce`) reads it from here. Numbers
are mean IoU in per cent. Where a number could not be traced to its table, `where` says so.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("published.json")
BENCHMARKS = ("voc21", "context60", "coco_object", "voc20", "context59", "coco_stuff", "cityscapes", "ade20k")
# The six sets of SPAR's table, in its order; its means are over these.
SIX = ("voc21", "voc20", "cityscapes", "ade20k", "context60", "context59")


@dataclass(frozen=True)
class Published:
    """Some numbers of one source.

    Attributes:
        paper: what published them, or for a method its row's `paper` in `spar_hf.METHODS`.
        where: in it: the table, the plot, or that this is not recorded.
        protocol: under which they were made: one of `spar_hf.evaluation.PROTOCOLS`; `own` is the method's authors'.
        model: the network: a key of `spar_hf.reproduction.WEIGHTS`, or for a method in words.
        setting: what was done with it: `single`, `stride-24`, `spar`, ..., or the method's name.
        miou: benchmark -> mean IoU in per cent.
        mean: the mean over `SIX`, as published; None where there is none.
        note: what else they depend on.
        url: of the paper.
    """

    paper: str
    where: str
    protocol: str
    model: str
    setting: str
    miou: Mapping[str, float] = field(default_factory=dict)
    mean: float | None = None
    note: str = ""
    url: str = ""


@cache
def _content() -> dict[str, Any]:
    return dict(json.loads(FILE.read_text(encoding="utf-8")))


@cache
def spar_rows() -> tuple[Published, ...]:
    """SPAR's own numbers, as its paper has them."""
    source = _content()["spar"]
    common = {name: source[name] for name in ("paper", "url", "protocol")}
    return tuple(Published(**common, **row) for row in source["rows"])


def spar_row(model: str, setting: str) -> Published | None:
    """The numbers of a network in a setting; None where the paper has none."""
    return next((row for row in spar_rows() if (row.model, row.setting) == (model, setting)), None)


def times_faster() -> float:
    """How many times as long as one pass SPAR's teacher of stride 24 takes, as its paper states."""
    return float(_content()["spar"]["times_faster_than_stride_24"])


@cache
def method_rows() -> Mapping[str, Published]:
    """The numbers of the training-free methods, by name in `spar_hf.METHODS`; those without any are absent."""
    source = _content()["methods"]
    common = {name: source[name] for name in ("where", "protocol", "model")}
    return {
        row["method"]: Published(
            paper="", setting=row["method"], miou=row["miou"], **{**common, "where": row.get("where", common["where"])}
        )
        for row in source["rows"]
    }
