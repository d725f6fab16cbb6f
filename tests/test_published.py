"""Published numbers: they stand in one file, add up, and nothing else in the tree repeats them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from spar_hf import METHODS
from spar_hf.published import BENCHMARKS, FILE, SIX, method_rows, spar_row, spar_rows, times_faster

ROOT = Path(__file__).resolve().parents[1]


def test_every_number_is_a_percentage_and_has_a_source():
    for row in (*spar_rows(), *method_rows().values()):
        assert row.where and row.protocol and row.model and row.setting and (row.paper or row.setting in METHODS)
        assert set(row.miou) <= set(BENCHMARKS) and all(0 < value < 100 for value in row.miou.values())
        assert row.miou or row.mean is not None
    assert times_faster() > 1


def test_means_are_those_of_the_six_sets():
    whole = [row for row in spar_rows() if row.miou]
    assert len(whole) == 9
    for row in whole:
        assert tuple(row.miou) == SIX
        assert row.mean == pytest.approx(sum(row.miou.values()) / 6, abs=0.0501)  # both are rounded


def test_a_setting_stands_once():
    keys = [(row.model, row.setting) for row in spar_rows()]
    assert len(set(keys)) == len(keys)
    assert spar_row("siglip2-b16", "spar").mean == 43.6 and spar_row("siglip2-b16", "none") is None
    listed = [row["method"] for row in json.loads(FILE.read_text(encoding="utf-8"))["methods"]["rows"]]
    assert len(set(listed)) == len(listed) and list(method_rows()) == listed


def test_the_table_of_methods_reads_them():
    assert set(method_rows()) <= set(METHODS)
    for name, method in METHODS.items():
        assert method.reported == (dict(method_rows()[name].miou) if name in method_rows() else {})
        assert list(method.reported) == [key for key in BENCHMARKS if key in method.reported]  # as tables print them


def test_no_source_file_repeats_a_published_number():
    """Heads of files and pages name them; only what is generated from the file may print them."""
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "src").rglob("*.py")]
    numbers = {f"{value:.1f}" for row in method_rows().values() for value in row.miou.values()}
    numbers |= {f"{row.mean:.1f}" for row in spar_rows()}
    repeated = re.compile(rf"(?:mean IoU|mIoU|table \() ?(?:of |is )?(?:{'|'.join(map(re.escape, numbers))})\b")
    for page in pages:
        text = re.sub(r"<!-- (\S+) -->.*?<!-- /\1 -->", "", page.read_text(encoding="utf-8"), flags=re.S)
        assert not repeated.search(text), page
