"""The report of a reproduction: ours, published, difference, cost and verdict of each row, as Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from ..evaluation.evaluate import markdown_table
from ..published import SIX, spar_row, times_faster
from .datasets import DATASETS, data_set_of
from .plan import Row
from .weights import WEIGHTS

TIMES_TOLERANCE = 2.0  # of a ratio of times, which depends on the machine: within this factor
OTHER_PROTOCOL, NOTHING = "another protocol", "nothing published"


@dataclass(frozen=True)
class Outcome:
    """A row and what came of it.

    Attributes:
        row: of the plan.
        result: what `spar evaluate --json` wrote; None where there is none.
        error: why there is none.
    """

    row: Row
    result: Mapping[str, Any] | None = None
    error: str = ""

    @property
    def ours(self) -> float | None:
        """Mean IoU in per cent."""
        value = None if self.result is None else self.result["mean_iou"]
        return None if value is None else 100 * float(value)

    @property
    def difference(self) -> float | None:
        """Ours less the published."""
        return None if self.ours is None or self.row.published is None else self.ours - self.row.published

    @property
    def is_whole(self) -> bool:
        """Whether all images of the benchmark were evaluated."""
        key = data_set_of(self.row.benchmark)
        return self.result is not None and (key is None or self.result["num_images"] == DATASETS[key].images)

    def verdict(self, tolerance: float) -> str:
        """In words; `reproduced` where the difference is at most the tolerance, in points of mean IoU."""
        if self.result is None:
            return "not run"
        if not self.is_whole:
            return f"{self.result['num_images']} images, not all"
        if self.row.published is None:
            return NOTHING
        if not self.row.comparable:
            return OTHER_PROTOCOL
        return verdict_of(self.difference, tolerance)


def verdict_of(difference: float | None, tolerance: float) -> str:
    """`reproduced`, `above` or `below`.

    Both numbers are published to one decimal, so a difference is compared after rounding to that.
    """
    if difference is None:
        return "no score"
    rounded = round(difference, 1)
    if abs(rounded) <= tolerance:
        return "reproduced"
    return "above" if rounded > 0 else "below"


# --------------------------------------------------------------------------------------------------- parts


def means(outcomes: Iterable[Outcome], tolerance: float) -> list[dict[str, Any]]:
    """The means over SPAR's six sets, of the networks and settings of which all six are there and whole."""
    groups: dict[tuple[str, str], list[Outcome]] = {}
    for outcome in outcomes:
        if outcome.row.protocol == "spar" and outcome.ours is not None and outcome.is_whole:
            groups.setdefault((outcome.row.model, outcome.row.setting), []).append(outcome)
    found = []
    for (model, setting), group in groups.items():
        if {outcome.row.benchmark for outcome in group} != set(SIX):
            continue
        ours, published = fmean(float(outcome.ours or 0) for outcome in group), spar_row(model, setting)
        number = None if published is None else published.mean
        difference = None if number is None else ours - number
        found.append(
            {
                "model": model,
                "setting": setting,
                "ours": ours,
                "published": number,
                "where": "" if published is None else published.where,
                "difference": difference,
                "verdict": NOTHING if number is None else verdict_of(difference, tolerance),
            }
        )
    return found


def times(outcomes: Iterable[Outcome]) -> list[dict[str, Any]]:
    """How many times as long as one pass each setting takes, on the drawings."""
    done = [outcome for outcome in outcomes if outcome.row.benchmark == "picturebook" and outcome.result is not None]
    one = {outcome.row.model: outcome.result for outcome in done if outcome.row.setting == "single"}
    found = []
    for outcome in done:
        single = one.get(outcome.row.model)
        if single is None or outcome.result is None or outcome.row.setting == "single":
            continue
        ratio = outcome.result["seconds_per_image"] / single["seconds_per_image"]
        published = times_faster() if outcome.row.setting == "stride-24" else None
        near = published is not None and 1 / TIMES_TOLERANCE <= ratio / published <= TIMES_TOLERANCE
        far = NOTHING if published is None else "above" if ratio > published else "below"
        found.append(
            {
                "model": outcome.row.model,
                "setting": outcome.row.setting,
                "times": ratio,
                "published": published,
                "verdict": "reproduced" if near else far,
            }
        )
    return found


# ------------------------------------------------------------------------------------------------ Markdown


def as_markdown(part: str, outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> str:
    """The report as a page.

    Args:
        part: of the plan.
        outcomes: in the order of the page.
        facts: `date`, `tolerance`, `versions`, `device`, `command`, `archives` (check sums).
    """
    tolerance = float(facts["tolerance"])
    lines = [
        f"# Reproduction: {part}",
        "",
        f"{facts['date']}, {facts['device']}, {', '.join(f'{name} {v}' for name, v in facts['versions'].items())}. "
        f"Mean IoU in %. *Reproduced*: all images of the benchmark, the published protocol, and at most {tolerance:g} "
        f"points from the published number. Times: within a factor of {TIMES_TOLERANCE:g}, on drawings.",
        "",
        f"    {facts['command']}",
    ]
    done = [outcome for outcome in outcomes if outcome.result is not None]
    if found := means(done, tolerance):
        header = ["network", "setting", "ours", "published", "difference", "verdict", "source"]
        lines += ["", f"## Means over {', '.join(SIX)}", "", *markdown_table(header, map(_mean_cells, found))]
    if ratios := times(done):
        cells = [
            [row["model"], row["setting"], f"{row['times']:.1f}", _number(row["published"]), row["verdict"]]
            for row in ratios
        ]
        header = ["network", "setting", "times one pass", "published", "verdict"]
        lines += ["", "## Times", "", *markdown_table(header, cells)]
    if done:
        header = ["network", "setting", "benchmark", "protocol", "ours", "published", "difference", "verdict"]
        header += ["images", "s / image", "peak MB"]
        lines += ["", "## Rows", "", *markdown_table(header, (_cells(outcome, tolerance) for outcome in done))]
    if failed := [outcome for outcome in outcomes if outcome.result is None]:
        lines += ["", "## Not run", "", *_reasons(failed)]
    if notes := dict.fromkeys((outcome.row.setting, outcome.row.note) for outcome in done if outcome.row.note):
        lines += ["", "## What the numbers depend on", "", *(f"- `{setting}`: {note}." for setting, note in notes)]
    if archives := facts["archives"]:
        lines += ["", "## Archives", ""]
        lines += [
            f"- {name}: SHA-256 {row['sha256']}; "
            + (f"agrees with {row['compared_with']}" if row["compared_with"] else "nothing published to compare with")
            for name, row in archives.items()
        ]
    return "\n".join(lines) + "\n"


def _cells(outcome: Outcome, tolerance: float) -> list[str]:
    row, result = outcome.row, outcome.result or {}
    return [
        row.model,
        f"`{row.setting}`",
        row.benchmark,
        row.protocol or "-",
        _number(outcome.ours),
        _number(row.published),
        _signed(outcome.difference),
        outcome.verdict(tolerance),
        str(result["num_images"]),
        f"{result['seconds_per_image']:.3g}",
        f"{result['peak_memory_mb']:.0f}",
    ]


def _mean_cells(row: Mapping[str, Any]) -> list[str]:
    numbers = [_number(row["ours"]), _number(row["published"]), _signed(row["difference"])]
    return [row["model"], row["setting"], *numbers, row["verdict"], row["where"] or "-"]


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.1f}".replace("-", "−")


def _reasons(failed: Sequence[Outcome]) -> list[str]:
    """One line for each reason, with the rows that it kept from running."""
    reasons: dict[str, list[str]] = {}
    for outcome in failed:
        reasons.setdefault(outcome.error, []).append(outcome.row.name)
    shown = {reason: names[:4] + (["..."] if len(names) > 4 else []) for reason, names in reasons.items()}
    return [
        f"- {len(reasons[reason])} rows ({', '.join(names)}): {reason.rstrip('.')}." for reason, names in shown.items()
    ]


# ---------------------------------------------------------------------------------------------------- JSON


def as_json(part: str, outcomes: Sequence[Outcome], facts: Mapping[str, Any]) -> dict[str, Any]:
    """The report as data; arguments as `as_markdown`."""
    tolerance = float(facts["tolerance"])
    rows = []
    for outcome in outcomes:
        row = outcome.row
        rows.append(
            {
                "name": row.name,
                "weights": {"name": row.weights, "title": WEIGHTS[row.weights].title},
                "setting": row.setting,
                "benchmark": row.benchmark,
                "protocol": row.protocol,
                "ours": outcome.ours,
                "published": row.published,
                "difference": outcome.difference,
                "verdict": outcome.verdict(tolerance),
                "error": outcome.error,
                "note": row.note,
                "result": None if outcome.result is None else dict(outcome.result),
            }
        )
    return {
        "part": part,
        **facts,
        "means": means(outcomes, tolerance),
        "times": times(outcomes),
        "rows": rows,
    }
