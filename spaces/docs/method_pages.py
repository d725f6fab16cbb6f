"""A page for each method: from its row, the head of its file, its picture and the stored results."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import formulas
from ideas import IDEAS
from links import ROOT

from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.methods.table import FAMILIES, METHODS, Method
from spar_hf.published import BENCHMARKS, method_rows

BRANCHES = {"clip": "CLIP alone", "vfm": "With a vision foundation model", "generative": "With a generative model"}
PICTURES = ROOT / "docs" / "pictures" / "methods"
RESULTS = ROOT / "benchmarks" / "results"
# Words that begin a paragraph in the head of a file.
PARAGRAPHS = re.compile(
    r"(?<!\d)\. (?=(?:As (?:in )?the authors' code|As released|Deviations?|Choices|Left out|Not here|Not established|"
    r"To reach|Tests|Memory|Unlike it|Regions|Bank)\b)"
)


def groups() -> list[tuple[str, list[Method]]]:
    """The methods by branch, in the table's order."""
    return [(title, [row for row in METHODS.values() if row.branch == branch]) for branch, title in BRANCHES.items()]


def pages() -> dict[str, str]:
    """Name of the method to the Markdown of its page, as it would stand in docs/methods/."""
    return {name: page(row) for name, row in METHODS.items()}


def page(row: Method) -> str:
    """Idea, formula, picture, cost, numbers, licence, deviations."""
    parts = [f"# {row.title}", *_facts(row), *_idea(row), *_picture(row), *_numbers(row), *_cost(row), *_head(row)]
    return "\n".join(parts) + "\n"


def gallery() -> str:
    """The pictures of all methods that have one, for the page of the table."""
    shown = [row for row in METHODS.values() if (PICTURES / f"{row.name}.png").is_file()]
    figures = [
        f'<figure markdown="span">\n[![Label map of {row.title}](pictures/methods/{row.name}.png)]'
        f"(methods/{row.name}.md)\n<figcaption>{row.title}</figcaption>\n</figure>"
        for row in shown
    ]
    body = "\n\n".join(figures)
    grid = f'<div class="pictures" markdown="1">\n\n{body}\n\n</div>'
    return f"\n\n## One scene, every method\n\n{_how_drawn()}\n\n{grid}\n"


def _how_drawn() -> str:
    return (
        "`tiny` on one test scene of the picture book at four times its native side, in each method's own window. "
        "Further networks are stand-ins: `tiny` itself for DINO, superpixels for SAM's regions. The pictures show "
        "what a method does to a label map; they rank nothing. Drawn by `python spaces/docs/pictures.py`."
    )


def _facts(row: Method) -> Iterator[str]:
    needs = ", ".join(f"{name}: `{default}`" if default else name for name, default in row.networks.items())
    window = f"{row.window_px or 'native'} / {row.stride_px} px"
    source = "spar_hf/methods_spar.py" if row.recipe is not None else f"spar_hf/methods/{row.name}.py"
    facts = [
        ["name", f"`{row.name}`"],
        ["paper", row.paper],
        ["for", FAMILIES[row.family]],
        ["gives", "features; a teacher" if row.kind == "feature" else "score maps; a teacher by `--teacher-labels`"],
        ["further networks", needs or "none"],
        ["window / stride", window],
        ["positions", f"`{row.position_interpolation}`"],
        ["code", f"[`{source}`](../../src/{source}), Apache-2.0, written from the paper"],
        ["licence of the authors' code", row.licence or "none stated; no line of it is here"],
    ]
    if row.extra:
        facts.append(["extra", f'`pip install "spar-hf[{row.extra}]"`'])
    yield ""
    first, *others = (f"| {name} | {value} |" for name, value in facts)
    yield from [first, "| --- | --- |", *others]
    options = "".join(f" --network {name}=..." for name, default in row.needs.items() if not default)
    model = "openai/clip-vit-base-patch16" if row.family == "clip" else "c-radio-b"
    yield from ["", "```bash"]
    yield f'spar segment street.jpg --labels "road; car; sky" --model {model} --method {row.name}{options}'
    yield "```"


def _idea(row: Method) -> Iterator[str]:
    text, formula = IDEAS[row.name]
    words: list[str] = []
    if row.recipe is not None:
        formula, words = formulas.of_recipe(row.recipe)
    yield from ["", "## Idea", "", text, "", "$$", str(formula), "$$"]
    for line in words:
        yield from ["", line]
    if row.recipe is None:
        yield from ["", "The steps below say what each sign stands for."]


def _picture(row: Method) -> Iterator[str]:
    yield from ["", "## On one scene", ""]
    if not (PICTURES / f"{row.name}.png").is_file():
        yield (
            f"No picture yet: it needs {_lacking(row)}. `python spaces/docs/pictures.py methods` draws those methods "
            "for whose networks something that ships can stand in; the [table](../methods.md) has them."
        )
        return
    yield f"| the scene | its true classes | {row.title} |"
    yield "| --- | --- | --- |"
    yield (
        f"| ![the scene](../pictures/methods/scene.png) | ![its classes](../pictures/methods/truth.png) "
        f"| ![label map](../pictures/methods/{row.name}.png) |"
    )
    yield from ["", _how_drawn()]


def _lacking(row: Method) -> str:
    if row.family == "radio":
        return "C-RADIO"
    needs = ", ".join(f"`{default}`" if default else name for name, default in row.needs.items())
    return needs or "nothing but CLIP, and has not been drawn"


def _numbers(row: Method) -> Iterator[str]:
    yield from ["", "## Numbers", ""]
    if row.reported:
        cells = [[name, f"{row.reported[name]:.1f}"] for name in BENCHMARKS if name in row.reported]
        source = method_rows()[row.name]
        note = f"; {row.note}" if row.note else ""
        yield f"Published, mean IoU in % with {source.model} under the authors' own protocol{note}:"
        yield from ["", *markdown_table(["benchmark", "mean IoU"], cells), "", f"Source: {source.where}.", ""]
    else:
        yield "Published: none with CLIP ViT-B/16 that is of this alone" + (f"; {row.note}." if row.note else ".")
        yield ""
    measured = _measured().get(row.name)
    if measured:
        yield "Measured, mean IoU in % of `tiny` on 32 test scenes of the picture book, at 1x and 4x its native side:"
        yield ""
        heads = ["window, 1x", "window, 4x", "single pass, 1x", "single pass, 4x"]
        yield from markdown_table(heads, [measured])
        yield ""
        yield "`tiny` is a toy of six blocks: these rank nothing on photographs ([teachers](../methods.md#teachers))."
    else:
        yield "Measured: nothing yet. `spar evaluate --methods` does, under one protocol for all."


@cache
def _measured() -> dict[str, list[str]]:
    document = json.loads((RESULTS / "teachers.json").read_text(encoding="utf-8"))
    rows: dict[str, dict[tuple[str, int], float]] = {}
    for result in document["results"]:
        if result["split"] == "test" and result["seed"] is None:
            rows.setdefault(result["teacher"], {})[result["what"], result["scale"]] = 100 * result["mean_iou"]
    order = [("sliding", 1), ("sliding", 4), ("single pass", 1), ("single pass", 4)]
    return {
        name: [f"{found[key]:.1f}" for key in order]
        for name, found in rows.items()
        if all(key in found for key in order)
    }


def _cost(row: Method) -> Iterator[str]:
    document, found = _costs()
    yield from ["", "## Cost", ""]
    if row.name not in found:
        yield "Not measured yet: `python benchmarks/methods.py` times it."
        return
    yield (
        "Time and peak memory over those of a plain pass (`maskclip`) of ViT-B/16 with random weights "
        f"(`{document['command']}`):"
    )
    yield ""
    rows = found[row.name]
    cells = [[size, f"{one['time_ratio']:.2f}", f"{one['memory_ratio']:.2f}"] for size, one in rows.items()]
    yield from markdown_table(["size", "time", "memory"], cells)


@cache
def _costs() -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    document = json.loads((RESULTS / "methods.json").read_text(encoding="utf-8"))
    found: dict[str, dict[str, Any]] = {}
    for row in document["rows"]:
        found.setdefault(row["method"], {})[row["size"]] = row
    return document, found


def _head(row: Method) -> Iterator[str]:
    if row.recipe is not None:
        yield from ["", "## Deviations", ""]
        yield (
            "The features equal those of the authors' code on random weights, but for what "
            "[the table's page](../methods.md) lists under *Where the authors' codes do otherwise*."
        )
        return
    source = ROOT / "src" / "spar_hf" / "methods" / f"{row.name}.py"
    yield from ["", "## Steps and deviations", "", "From the head of the file:", ""]
    yield as_markdown(head_of(source))


def head_of(path: Path) -> str:
    """The docstring of a file."""
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def as_markdown(head: str) -> str:
    """The head of a file as Markdown: its lines joined, numbered steps as a list, its remarks as paragraphs."""
    lines: list[str] = []
    previous = ""
    for line in head.splitlines():
        numbered = re.match(r"\d\. ", line)
        if not line.strip():
            lines += ["", ""]
        elif numbered and not re.match(r"\d\. |   ", previous):
            lines += ["", line]
        elif numbered:
            lines.append(line)
        elif re.match(r"\d\. |   ", previous) and not line.startswith("   "):
            lines += ["", line]
        elif lines and lines[-1]:
            lines[-1] += " " + line.strip()
        else:
            lines.append(line.strip())
        previous = line
    text = "\n".join(PARAGRAPHS.sub(".\n\n", line) for line in lines)
    return outside_code_spans(re.sub(r"\n{3,}", "\n\n", text))


def outside_code_spans(text: str) -> str:
    """Markdown's own signs are escaped where the head's text only means them as signs."""
    parts = re.split(r"(`[^`]+`)", text)  # text, code span, text, ...
    for index in range(0, len(parts), 2):
        parts[index] = re.sub(r"([*_\[\]])", r"\\\1", parts[index]).replace("<", "&lt;")
    return "".join(parts)
