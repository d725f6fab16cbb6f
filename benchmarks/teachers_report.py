"""Table, findings and picture of what benchmarks/teachers.py measured."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.methods.table import METHODS

PAPERS = "maskclip"  # the paper's teacher

Document = dict[str, Any]
NAN = float("nan")


def scores(document: Document, teacher: str, what: str, scale: float, split: str = "test") -> dict[int | None, float]:
    """Seed (None of what has none) -> mean IoU in per cent, of what was measured."""
    wanted = {"teacher": teacher, "what": what, "scale": scale, "split": split}
    found = (entry for entry in document["results"] if wanted.items() <= entry.items())
    return {entry["seed"]: 100 * entry["mean_iou"] for entry in found}


def mean(document: Document, teacher: str, what: str, scale: float, split: str = "test") -> float:
    """Mean of the `scores`, nan where there are none."""
    found = scores(document, teacher, what, scale, split).values()
    return statistics.fmean(found) if found else NAN


def spread(document: Document, teacher: str, scale: float) -> float:
    """Standard deviation over the seeds of the students with their own last block; nan of fewer than two."""
    found = scores(document, teacher, "own", scale).values()
    return statistics.stdev(found) if len(found) > 1 else NAN


def gain_of_block(document: Document, teacher: str, scale: float) -> float:
    """What the student gains by the teacher's last block in place of its own, both of one seed; nan where unknown."""
    own, other = (scores(document, teacher, block, scale) for block in ("own", "teacher"))
    gains = [other[seed] - own[seed] for seed in other.keys() & own.keys()]
    return statistics.fmean(gains) if gains else NAN


def by_teacher(document: Document) -> list[str]:
    """The teachers, the best sliding window at the largest scale first."""
    known = {name: mean(document, name, "sliding", max(document["scales"])) for name in document["teachers"]}
    return sorted(known, key=lambda name: (math.isnan(known[name]), -known[name]))


def number(value: float, spread: float = NAN) -> str:
    return "" if math.isnan(value) else f"{value:.1f}" + ("" if math.isnan(spread) else f" ± {spread:.1f}")


def signed(value: float) -> str:
    return "" if math.isnan(value) else f"{round(value, 1) + 0.0:+.1f}".replace("-", "−")  # no -0.0


def title(document: Document, teacher: str) -> str:
    return " + ".join(f"`{method}`" for method in document["teachers"][teacher])


def table(document: Document) -> list[str]:
    """The table, the best teacher first."""

    def student(name: str, scale: float) -> str:
        return number(mean(document, name, "own", scale), spread(document, name, scale))

    def difference(name: str, scale: float) -> str:
        return signed(mean(document, name, "own", scale) - mean(document, name, "sliding", scale))

    def other_block(name: str, scale: float) -> str:
        if document["teachers"][name] == [document["own_block"]]:
            return "the same"
        gain = signed(gain_of_block(document, name, scale))
        return number(mean(document, name, "teacher", scale)) + (f" ({gain})" if gain else "")

    columns: dict[str, Callable[[str, float], str]] = {
        "sliding": lambda name, scale: number(mean(document, name, "sliding", scale)),
        "single pass": lambda name, scale: number(mean(document, name, "single pass", scale)),
        "student": student,
        "student − teacher": difference,
        "student with the teacher's block": other_block,
    }
    scales = document["scales"]
    heads = ["teacher", *(f"{head}, {scale:g}x" for head in columns for scale in scales)]
    rows = [
        [title(document, name), *(cell(name, scale) for cell in columns.values() for scale in scales)]
        for name in by_teacher(document)
    ]
    return markdown_table(heads, rows)


def findings(document: Document, scale: float) -> list[str]:
    """What the numbers say at a scale, as a list in Markdown."""
    taught = {name: mean(document, name, "own", scale) for name in by_teacher(document)}
    taught = {name: value for name, value in taught.items() if not math.isnan(value)}
    if not taught:
        return []
    windows = {name: mean(document, name, "sliding", scale) for name in taught}
    start = mean(document, "start", "single pass", scale)
    best, teacher = (max(values, key=values.__getitem__) for values in (taught, windows))

    def named(names: Iterable[str], values: dict[str, float]) -> str:
        return ", ".join(f"{title(document, name)} ({signed(values[name])})" for name in names) or "none"

    lines = [
        f"- The best teacher is {title(document, teacher)} ({number(windows[teacher])}), the best student that of "
        f"{title(document, best)} ({number(taught[best], spread(document, best, scale))}).",
        f"- Better than before distillation ({number(start)}): {sum(value > start for value in taught.values())} of "
        f"{len(taught)} students.",
    ]
    if PAPERS in taught:
        over = {name: value - taught[PAPERS] for name, value in taught.items()}
        ahead = sorted((name for name in over if over[name] > 0), key=lambda name: -over[name])
        lines.append(
            f"- Better than the student of {title(document, PAPERS)}, the paper's teacher: {named(ahead, over)}."
        )
    above = {name: value - windows[name] for name, value in taught.items() if value > windows[name]}
    lines.append(f"- Students above their teacher's sliding window: {named(above, above)}.")
    if len(taught) > 2:
        correlation = statistics.correlation(list(windows.values()), list(taught.values()))
        shown = f"{correlation:.2f}".replace("-", "−")
        lines.append(f"- Correlation of teacher and student over the {len(taught)} teachers: {shown}.")
    for name, methods in document["teachers"].items():
        if len(methods) > 1 and {name, *methods} <= taught.keys():
            gains = [signed(values[name] - max(values[part] for part in methods)) for values in (windows, taught)]
            lines.append(
                f"- {title(document, name)} against the best of its parts: teacher {gains[0]}, student {gains[1]}."
            )
    return lines + _advice(document, scale)


def _advice(document: Document, scale: float) -> list[str]:
    """Which last block the student should have, by teacher; a difference of two runs needs two standard deviations."""
    gains = {name: gain_of_block(document, name, scale) for name in by_teacher(document)}
    gains = {name: gain for name, gain in gains.items() if not math.isnan(gain)}
    variances = [value**2 for name in document["teachers"] if not math.isnan(value := spread(document, name, scale))]
    if not gains:
        return []
    least = 2 * math.sqrt(2 * statistics.fmean(variances)) if variances else 0.0
    groups = {
        "The student should take the teacher's last block for": [name for name, gain in gains.items() if gain > least],
        f"keep its own (`{document['own_block']}`) for": [name for name, gain in gains.items() if gain < -least],
    }
    if variances:
        groups[f"and it makes no difference beyond that of two seeds (±{least:.1f}) for"] = [
            name for name, gain in gains.items() if abs(gain) <= least
        ]
    parts = [
        f"{words} {', '.join(f'{title(document, name)} ({signed(gains[name])})' for name in names) or 'none'}"
        for words, names in groups.items()
    ]
    return [f"- {'; '.join(parts)}."]


def chapter(document: Document) -> str:
    """What stands in the documentation between the marks."""
    scales, seeds = document["scales"], document["seeds"]
    start = [f"{number(mean(document, 'start', 'single pass', scale))} at {scale:g}x" for scale in scales]
    count = next(entry["num_images"] for entry in document["results"] if entry["split"] == "test")
    reach = {
        "window": "Their attention reaches as far as the native window; the teachers', as published, everywhere.",
        "image": "Attention reaches over the whole image.",
    }[document["reach"]]
    pairs = [name for name, methods in document["teachers"].items() if any(METHODS[row].needs for row in methods)]
    named = " and ".join(title(document, name) for name in pairs)
    given = document.get("networks") or {"dino": document["network"]} if pairs else {}  # once there was one for all
    itself = {name: "the same tower, " * (where == document["checkpoint"]) for name, where in given.items()}
    networks = ", ".join(f"{name}: {itself[name]}`{Path(where).name}`" for name, where in given.items())
    network = f"Further networks of {named}: {networks}. " if pairs else ""
    return "\n".join(
        [
            f"Made by `{document['command']}`. Mean IoU in % on the picture book's test split, {count} scenes, at "
            f"{' and '.join(f'{scale:g}x' for scale in scales)} the native side. Teachers: `{document['checkpoint']}` "
            "as the method runs it, in its own sliding window and in a single pass. Students: a single pass of "
            f"`{document['checkpoint']}` with its last two blocks trained on {document['scenes']} scenes for "
            f"{document['epochs']} epochs, mean ± standard deviation of seeds {', '.join(map(str, seeds))}. {reach} "
            f"Before distillation the same student has {', '.join(start)}. Last columns: seed {seeds[0]} with the "
            "teacher's last block, and what it gains over the same seed with its own; empty where the method looks at "
            f"other blocks as well. {network}A sum of names is the mean of their normalised features, chosen by the "
            "validation split.",
            "",
            *table(document),
            "",
            *(line for scale in scales for line in (f"At {scale:g}x:", "", *findings(document, scale), "")),
            f"![Student against teacher, mean IoU at {max(scales):g}x](teachers.png)",
        ]
    )


def plot(document: Document) -> bytes:
    """Student against teacher at the largest scale, as PNG."""
    from matplotlib.figure import Figure

    scale = max(document["scales"])
    figure = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for rank, name in enumerate(by_teacher(document)):
        teacher, student = mean(document, name, "sliding", scale), mean(document, name, "own", scale)
        axes.errorbar(teacher, student, spread(document, name, scale), fmt="o", color="C3", capsize=3, zorder=3)
        axes.plot(teacher, mean(document, name, "teacher", scale), "o", color="C0", fillstyle="none", zorder=2)
        label = " + ".join(document["teachers"][name])
        up = {"rotation": 45, "va": "bottom"} if rank % 2 else {"rotation": -45, "va": "top"}  # neighbours apart
        axes.annotate(label, (teacher, student), (2, 2 if rank % 2 else -2), textcoords="offset points", **up)
    axes.margins(0.15)
    axes.axline((50, 50), slope=1, color="grey", linestyle=":", label="student = teacher")
    start = mean(document, "start", "single pass", scale)
    axes.axhline(start, color="C2", linestyle="--", label="the student before distillation")
    axes.plot([], [], "o", color="C3", label="student with its own last block, all seeds")
    axes.plot([], [], "o", color="C0", fillstyle="none", label="with the teacher's last block, one seed")
    axes.set(xlabel=f"teacher, sliding window: mean IoU at {scale:g}x, %", ylabel="student, one pass: the same")
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    content = io.BytesIO()
    figure.savefig(content, format="png")
    return content.getvalue()
