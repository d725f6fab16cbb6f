"""What the pages name is there: links, files, modules, functions, and every option of every command."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from spar_cli.main import parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "CHANGELOG", "SECURITY", "CODE_OF_CONDUCT")]
PAGES += [
    *sorted((ROOT / "docs").rglob("*.md")),
    *sorted((ROOT / "src").rglob("README.md")),
    ROOT / "spaces/README.md",
]
FOLDERS = ("src", "tests", "benchmarks", "training", "docs", "examples", "spaces")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.S | re.M)


def ids(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as the usual viewers make them."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target or target.startswith("mailto:"):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), target


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_files_are_there(page):
    text = page.read_text(encoding="utf-8")
    for name in re.findall(rf"(?<![\w/.-])(?:{'|'.join(FOLDERS)})/[\w./-]*\w", text):
        # "benchmarks/results/x" of a page is the repository's, whatever folder the page is in.
        assert (ROOT / name).exists() or (page.parent / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_named_parts_of_the_package_are_there(page):
    text = page.read_text(encoding="utf-8")
    code = [match for language, match in BLOCK.findall(text) if language != "text"] + re.findall(r"`([^`\n]+)`", text)
    for name in {name for part in code for name in re.findall(r"\bspar_hf(?:\.\w+)+", part)}:
        parts = name.split(".")
        found = importlib.import_module(parts[0])
        for depth, part in enumerate(parts[1:], start=2):
            if not hasattr(found, part):
                importlib.import_module(".".join(parts[:depth]))
            found = getattr(found, part)
    for block in (block for language, block in BLOCK.findall(text) if language == "python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("spar_hf"):
                module = importlib.import_module(node.module)
                assert [alias.name for alias in node.names if not hasattr(module, alias.name)] == []


def commands(page: Path) -> list[list[str]]:
    """The words of every shell command of a page, in blocks and in code spans of the running text."""
    text = page.read_text(encoding="utf-8")
    lines = []
    for language, block in BLOCK.findall(text):
        if language in ("bash", "sh"):
            lines += block.replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:spar|python|pytest|accelerate) [^`]+)`", BLOCK.sub("", text).replace("\n", " "))
    return [
        shlex.split(line, comments=True) for line in lines if line.count("'") % 2 == 0 and line.count('"') % 2 == 0
    ]


@pytest.mark.parametrize("page", PAGES, ids=ids)
def test_commands_have_the_options_that_they_are_shown_with(page):
    for words in commands(page):
        if "spar" in words[:1] and len(words) > 1 and words[1].isalpha() and words[1].islower() and words[-1] != "...":
            try:
                parse(words[1:])
            except ValueError as error:
                incomplete = re.search("the following arguments are required|expected one argument", str(error))
                assert incomplete, f"{shlex.join(words)}: {error}"  # a fragment in running text
            except SystemExit as leaving:  # --help, --version
                assert leaving.code == 0
        scripts = [word for word in words if word.startswith(("benchmarks/", "training/")) and word.endswith(".py")]
        for script in scripts[:1]:
            sources = (ROOT / script, ROOT / "src/spar_cli/training_options.py")
            known = "".join(source.read_text(encoding="utf-8") for source in sources)
            options = [word.partition("=")[0] for word in words[words.index(script) :] if word.startswith("--")]
            assert [option for option in options if f'"{option}"' not in known] == [], shlex.join(words)


def test_the_pages_show_commands():
    shown = [words for page in PAGES for words in commands(page)]
    assert sum(words[:1] == ["spar"] for words in shown) > 30
    assert sum("benchmarks/" in " ".join(words) for words in shown) > 8


def test_figures_of_speed_and_published_ones_are_the_stored_ones():
    """`python benchmarks/readme.py` puts them there."""
    import readme

    for name, block in readme.blocks().items():
        text = readme.page_of(name).read_text(encoding="utf-8")
        assert f"<!-- {name} -->\n{block}\n<!-- /{name} -->" in text, name
