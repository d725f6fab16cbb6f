"""The site: a page a method, formulas in MathML, links that lead to pages, and nothing public left out."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import formulas
import links
import method_pages
import pytest
import yaml
from ideas import IDEAS

import spar_hf
from spar_hf.methods_spar import RECIPES, Recipe, Term

ROOT = Path(__file__).resolve().parents[1]


def test_every_method_has_an_idea_in_two_sentences_and_a_formula():
    assert list(IDEAS) != [] and set(IDEAS) == set(spar_hf.METHODS)
    for name, idea in IDEAS.items():
        assert len(re.findall(r"[.](?: |$)", idea.text)) == 2, name
        assert (idea.formula is None) == (name in RECIPES), name


@pytest.mark.parametrize("name", list(spar_hf.METHODS))
def test_the_page_of_a_method_has_all_that_is_promised(name):
    text = method_pages.page(spar_hf.METHODS[name])
    headings = re.findall(r"^## (.+)$", text, re.M)
    assert headings[:4] == ["Idea", "On one scene", "Numbers", "Cost"] and "eviations" in headings[4]
    shown = formulas.as_mathml(text)
    (formula,) = re.findall(r"<math.+?</math>", shown, re.S)
    ElementTree.fromstring(formula)
    assert "$$" not in shown and "\\" not in "".join(ElementTree.fromstring(formula).itertext())
    for value in spar_hf.METHODS[name].reported.values():
        assert f"{value:.1f}" in text


@pytest.mark.parametrize(
    "name, formula",
    [
        ("clip", r"y = x + A_{qk} V W_o, \qquad z = y + \mathrm{MLP}(\mathrm{LN}(y))"),
        ("maskclip", r"y = x + I V W_o, \qquad z = y + \mathrm{MLP}(\mathrm{LN}(y))"),
        ("naclip", r"y = A_{kk,\sigma} V W_o"),
        ("clip_surgery", r"y = x + \sum_{b = 12 - 5}^{12} \left(A_{vv}\right)^{(b)} V^{(b)} W_o^{(b)}"),
    ],
)
def test_a_recipe_writes_its_formula(name, formula):
    assert formulas.of_recipe(RECIPES[name].recipe)[0] == formula


def test_the_words_of_a_formula_say_what_its_signs_mean():
    recipe = Recipe(
        (Term("qq", weight=0.5, block=7), Term("vv", sigma_patches=3.0)), residual=False, feed_forward=False
    )
    formula, words = formulas.of_recipe(recipe)
    assert formula == r"y = \left(\frac{1}{2}\,A_{qq}^{(7)} + A_{vv,\sigma}\right) V W_o"
    said = " ".join(words)
    assert (
        "neither residual nor MLP" in said and "σ = 3 patches" in said and "the block whose projections meet" in said
    )


@pytest.mark.parametrize("name", [name for name in spar_hf.METHODS if name not in RECIPES])
def test_the_head_of_a_file_loses_no_word_on_its_page(name):
    head = method_pages.head_of(ROOT / f"src/spar_hf/methods/{name}.py")
    shown = method_pages.as_markdown(head)
    assert re.sub(r"\\(?=[*_\[\]])", "", shown).replace("&lt;", "<").split() == head.split()
    steps = len(re.findall(r"^\d\. ", head, re.M))
    assert len(re.findall(r"^\d\. ", shown, re.M)) == steps


@pytest.mark.parametrize(
    "page, link, found",
    [
        ("docs/reach.md", "../src/spar_hf/reach_spar.py", "repository/src/spar_hf/reach_spar.py.md"),
        ("docs/reach.md", "../README.md#why", "repository/readme.md#why"),
        ("docs/methods/gem.md", "../methods.md", "../methods.md"),
        ("docs/methods/lposs.md", "../../src/x.py", "../repository/src/x.py.md"),
        ("README.md", "docs/reach.md#below", "../reach.md#below"),
        ("src/spar_hf/assets/tiny/README.md", "../../../../docs/reach.md", "../../../../../reach.md"),
        ("docs/reach.md", "https://example.org/x", "https://example.org/x"),
        ("docs/reach.md", "#below", "#below"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(page, link, found):
    assert links.rewritten(f"[x]({link})", page) == f"[x]({found})"
    code = f"```python\nx[0]({link})\n```\n"
    assert links.rewritten(code, page) == code


def test_a_link_to_nothing_stops_the_build():
    with pytest.raises(ValueError, match=r"src/there_is_none\.py is linked and is not in the repository"):
        links.closure({"docs/x.md": "[x](../src/there_is_none.py)"}, ())


def test_every_page_is_in_the_navigation_and_every_public_name_in_the_reference():
    class Loader(yaml.SafeLoader):
        """mkdocs.yml has tags of Python's in no place, but reads with any."""

    navigation = str(yaml.load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"), Loader)["nav"])
    docs = ROOT / "docs"
    assert [page for path in docs.rglob("*.md") if (page := path.relative_to(docs).as_posix()) not in navigation] == []
    reference = "".join(path.read_text(encoding="utf-8") for path in (docs / "reference").glob("*.md"))
    named = set(re.findall(r"^::: spar_hf\.(\w+)$", reference, re.M))
    assert set(spar_hf.__all__) - named == set()


@pytest.mark.slow
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=900)
    assert run.returncode == 0, run.stderr
    for name in spar_hf.METHODS:
        assert (tmp_path / "methods" / name / "index.html").is_file()
    start = (tmp_path / "how-it-works" / "index.html").read_text(encoding="utf-8")
    assert start.count("<math") == 3 and "$$" not in start
    pages = list(tmp_path.rglob("*.html"))
    fetched = {
        address
        for page in pages
        for address in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?://[^"]+)"', page.read_text("utf-8"))
    }
    assert fetched == set(), "the site fetches nothing from elsewhere"
