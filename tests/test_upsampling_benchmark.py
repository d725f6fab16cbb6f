"""benchmarks/upsampling.py: its cells, its tables, and that the page shows what is stored."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "upsampling.py"


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(SCRIPT.parent)
    spec = importlib.util.spec_from_file_location("upsampling_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def cell(base: str, upsampler: str, scale: float, mean_iou: float, boundary_iou: float = 0.25) -> dict:
    scores = {"mean_iou": mean_iou, "boundary_iou": boundary_iou, "pixel_accuracy": 0.5}
    return {"base": base, "upsampler": upsampler, "scale": scale, "num_images": 2, "cpu_seconds": 0.126, **scores}


def test_tables_and_conclusion(benchmark):
    document = {
        "results": [
            cell("student", "none", 1, 0.5),
            cell("student", "jbu", 1, 0.525, 0.3),
            cell("single pass", "none", 1, 0.4),
            cell("single pass", "none", 4, 0.3),
            cell("single pass", "jbu", 1, 0.385),
        ],
        "cost": [{"upsampler": "jbu", "upsampled": "scores", "cpu_seconds": 3.25, "peak_mb": 61}],
    }
    assert benchmark.table(document)[2:] == [
        "| single pass | none | 40.0 | 30.0 | 25.0 | 25.0 | 0.13 | 0.13 |",
        "| single pass | `jbu` | 38.5 (−1.5) |  | 25.0 (+0.0) |  | 0.13 |  |",
        "| student | none | 50.0 |  | 25.0 |  | 0.13 |  |",
        "| student | `jbu` | 52.5 (+2.5) |  | 30.0 (+5.0) |  | 0.13 |  |",
    ]
    assert benchmark.conclusion(document) == "Mean change in mean IoU over the bases measured: `jbu` +0.5 at 1x."
    assert benchmark.cost_table(document)[2:] == ["| `jbu` | scores | 3.2 | 61 |"]


@pytest.mark.slow
def test_a_cell_is_measured_once(benchmark, tmp_path, monkeypatch):
    output = tmp_path / "upsampling.json"
    words = ["--bases", "single pass", "--scales", "0.5", "--limit", "1", "--output", str(output)]
    benchmark.main([*words, "--upsamplers", "none", "jbu"])
    rows = json.loads(output.read_text())["results"]
    assert [row["upsampler"] for row in rows] == ["none", "jbu"]
    assert rows[0]["mean_iou"] != rows[1]["mean_iou"] and all(row["cpu_seconds"] > 0 for row in rows)
    asked = []
    monkeypatch.setattr(benchmark, "measure", lambda *what: asked.append(what) or {"mean_iou": 0.0, "num_images": 1})
    monkeypatch.setattr(benchmark, "table", lambda document: [])
    benchmark.main([*words, "--upsamplers", "none", "jbu", "pamr"])
    assert [what[1] for what in asked] == ["pamr"]


def test_the_cost_of_a_small_picture(benchmark, monkeypatch):
    for name, value in {"COST_PX": 64, "COST_GRID": 8, "COST_CHANNELS": 16, "COST_NAMES": 3}.items():
        monkeypatch.setattr(benchmark, name, value)
    found = benchmark.cost_of("jbu", "scores")
    assert found["cpu_seconds"] >= 0 and 0 <= found["peak_mb"] < 1000


def test_the_page_shows_the_stored_results(benchmark):
    document, page = benchmark.stored(benchmark.RESULTS), benchmark.DOCS.read_text(encoding="utf-8")
    assert document["results"] and document["cost"]
    for part in (benchmark.table(document), benchmark.cost_table(document), [benchmark.conclusion(document)]):
        assert "\n".join(part) in page, "run: python benchmarks/upsampling.py --docs"
