"""benchmarks/teachers.py: table, findings and picture of a small results document, and the run itself, small."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from spar_hf import Labels

ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "benchmarks" / "teachers.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(SCRIPT.parent)  # the scripts of that folder import each other
        spec = importlib.util.spec_from_file_location("teachers", SCRIPT)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        patch.setitem(sys.modules, "teachers", module)  # dataclasses look their module up
        spec.loader.exec_module(module)
        module.report = sys.modules.pop("teachers_report")
    return module


@pytest.fixture
def document() -> dict[str, Any]:
    """Three teachers in no order; `naclip` has two kinds of student, the mix has no validation score."""
    scores: dict[tuple[str, str, int | None, str], float] = {
        ("start", "single pass", None, "test"): 0.5,
        ("naclip", "sliding", None, "test"): 0.4,
        ("naclip", "sliding", None, "validation"): 0.9,
        ("naclip", "single pass", None, "test"): 0.3,
        ("naclip", "own", 0, "test"): 0.5,
        ("naclip", "own", 1, "test"): 0.52,
        ("naclip", "teacher", 0, "test"): 0.25,
        ("maskclip", "sliding", None, "test"): 0.7,
        ("maskclip", "sliding", None, "validation"): 0.8,
        ("maskclip", "single pass", None, "test"): 0.45,
        ("maskclip", "own", 0, "test"): 0.6,
        ("maskclip", "own", 1, "test"): 0.62,
        ("maskclip+naclip", "sliding", None, "test"): 0.75,
    }
    return {
        "command": "python benchmarks/teachers.py --scales 4",
        "checkpoint": "tiny",
        "own_block": "maskclip",
        "scenes": 8,
        "epochs": 1,
        "seeds": [0, 1],
        "scales": [4.0],
        "reach": "window",
        "teachers": {"naclip": ["naclip"], "maskclip": ["maskclip"], "maskclip+naclip": ["maskclip", "naclip"]},
        "results": [
            {**dict(zip(("teacher", "what", "seed", "split"), key, strict=True)), "scale": 4.0, "num_images": 2}
            | {"mean_iou": score}
            for key, score in scores.items()
        ],
    }


def test_table_is_sorted_by_teacher_and_leaves_out_what_is_unknown(
    benchmark: ModuleType, document: dict[str, Any]
) -> None:
    head, _, *rows = benchmark.report.table(document)
    assert head == (
        "| teacher | sliding, 4x | single pass, 4x | student, 4x | student − teacher, 4x | "
        "student with the teacher's block, 4x |"
    )
    assert rows == [
        "| `maskclip` + `naclip` | 75.0 |  |  |  |  |",
        "| `maskclip` | 70.0 | 45.0 | 61.0 ± 1.4 | −9.0 | the same |",
        "| `naclip` | 40.0 | 30.0 | 51.0 ± 1.4 | +11.0 | 25.0 (−25.0) |",
    ]
    document["scales"] = [1.0, 4.0]
    assert benchmark.report.table(document)[3] == (
        "| `maskclip` |  | 70.0 |  | 45.0 |  | 61.0 ± 1.4 |  | −9.0 | the same | the same |"
    )


def test_findings_say_who_is_better_and_which_block_to_take(benchmark: ModuleType, document: dict[str, Any]) -> None:
    assert benchmark.report.findings(document, 4.0) == [
        "- The best teacher is `maskclip` (70.0), the best student that of `maskclip` (61.0 ± 1.4).",
        "- Better than before distillation (50.0): 2 of 2 students.",
        "- Better than the student of `maskclip`, the paper's teacher: none.",
        "- Students above their teacher's sliding window: `naclip` (+11.0).",
        "- The student should take the teacher's last block for none; keep its own (`maskclip`) for `naclip` (−25.0); "
        "and it makes no difference beyond that of two seeds (±4.0) for none.",
    ]
    document["results"].append({"teacher": "maskclip+naclip", "what": "own", "seed": 0, "split": "test", "scale": 4.0})
    document["results"][-1]["mean_iou"] = 0.64
    lines = benchmark.report.findings(document, 4.0)
    assert "- Better than the student of `maskclip`, the paper's teacher: `maskclip` + `naclip` (+3.0)." in lines
    assert "- `maskclip` + `naclip` against the best of its parts: teacher +5.0, student +3.0." in lines
    assert "- Correlation of teacher and student over the 3 teachers: 1.00." in lines
    document["results"] = document["results"][:1]
    assert benchmark.report.findings(document, 4.0) == []


def test_a_difference_that_is_none_has_no_sign_of_its_own(benchmark: ModuleType) -> None:
    assert [benchmark.report.signed(value) for value in (-0.04, 0.04, -1.25, float("nan"))] == [
        "+0.0",
        "+0.0",
        "−1.2",
        "",
    ]


def test_report_only_renews_table_and_picture(
    benchmark: ModuleType, document: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    results, page = tmp_path / "teachers.json", tmp_path / "methods.md"
    results.write_text(json.dumps(document))
    page.write_text("above\n<!-- teachers -->\nold\n<!-- /teachers -->\nbelow\n")
    assert benchmark.main(["--report-only", "--output", str(results), "--markdown", str(page)]) == 0
    assert benchmark.report.table(document)[2] in capsys.readouterr().out
    text = page.read_text(encoding="utf-8")
    assert text.startswith("above\n<!-- teachers -->\nMade by `python benchmarks/teachers.py --scales 4`. ")
    assert text.endswith("(teachers.png)\n<!-- /teachers -->\nbelow\n") and "old" not in text
    assert "2 scenes, at 4x the native side" in text and "Before distillation the same student has 50.0 at 4x" in text
    assert "Their attention reaches as far as the native window" in text
    with Image.open(tmp_path / "teachers.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 20)}
    assert (255, 255, 255) in colours and len(colours) > 10


def test_a_second_network_is_named(benchmark: ModuleType, document: dict[str, Any]) -> None:
    assert "networks of" not in benchmark.report.chapter(document)
    document["teachers"]["proxyclip"] = ["proxyclip"]
    document["networks"] = {"dino": "folder/of-one", "regions": "slic"}
    told = "Further networks of `proxyclip`: dino: `of-one`, regions: `slic`. A sum"
    assert told in benchmark.report.chapter(document)
    document["networks"] = {"dino": "tiny"}
    assert "Further networks of `proxyclip`: dino: the same tower, `tiny`. A sum" in benchmark.report.chapter(document)
    del document["networks"]
    document["network"] = "tiny"  # a document of before
    assert "Further networks of `proxyclip`: dino: the same tower, `tiny`. A sum" in benchmark.report.chapter(document)


def test_networks_and_settings_are_the_methods_own(benchmark: ModuleType, tmp_path: Path) -> None:
    given = [
        ("dino", "tiny"),
        ("regions", "slic"),
        ("lposs.dino", "other"),
        ("reco.bank", "a"),
        ("knn_clip.bank", "b"),
    ]
    assert benchmark.taken("proxyclip", given) == {"dino": "tiny"} and benchmark.taken("clip", given) == {}
    assert benchmark.taken("lposs", given) == {"dino": "other"} and benchmark.taken(None, given) == {}
    assert benchmark.taken("knn_clip", given) == {"dino": "tiny", "regions": "slic", "bank": "b"}
    run = benchmark.Benchmark.__new__(benchmark.Benchmark)
    run.args = SimpleNamespace(
        network=given, settings=[("knn_clip.neighbours", "3"), ("lposs.steps", "4")], work=tmp_path
    )
    assert run.teacher_flags(["proxyclip", "clip"]) == [
        "--teacher-method", "proxyclip", "clip", "--teacher-network", "dino=tiny",
    ]  # fmt: skip
    flags = run.teacher_flags(["lposs"])
    assert flags[:3] == ["--teacher-labels", "lposs", "--labels"]
    assert flags[4:] == ["--teacher-network", "dino=other", "--teacher-set", "steps=4"]
    assert len(Labels.read(flags[3].removeprefix("@"))) == 32
    args = ["--report-only", "--output", str(tmp_path / "none.json")]
    with pytest.raises(FileNotFoundError):
        benchmark.main(args)


def test_the_default_teachers_are_those_whose_networks_are_given(
    benchmark: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    monkeypatch.setattr(benchmark, "run", lambda args: seen.append(args.teachers) or 1)
    assert benchmark.main([]) == benchmark.main(["--network", "dino=a", "--network", "regions=slic"]) == 1
    assert "proxyclip" in seen[0] and seen[0][0] == "maskclip"
    assert not {"trident", "corrclip", "lposs", "reco"} & set(seen[0])
    assert set(seen[1]) - set(seen[0]) == {"corrclip", "corrclip_v2"}


def test_unknown_teachers_are_refused(benchmark: ModuleType, capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit):
        benchmark.main(["--teachers", "naclip", "nothing"])
    assert "--teachers: nothing; choose of clip, maskclip, " in capsys.readouterr().err


@pytest.mark.slow
def test_two_teachers_from_start_to_table(tmp_path: Path) -> None:
    page = tmp_path / "methods.md"
    page.write_text("<!-- teachers -->\n<!-- /teachers -->\n")
    output, work = tmp_path / "teachers.json", tmp_path / "work"
    small = "--teachers maskclip sclip --seeds 0 --scenes 8 --epochs 1 --limit 1 --scales 1 2"
    places = ["--work", str(work), "--output", str(output), "--markdown", str(page)]
    command = [sys.executable, str(SCRIPT), *shlex.split(small), *places]
    first = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert first.returncode == 0, first.stdout + first.stderr
    document = json.loads(output.read_text())
    mix = next(name for name in document["teachers"] if "+" in name)
    runs = {(entry["teacher"], entry["what"]) for entry in document["results"]}
    assert runs == {
        ("start", "single pass"),
        ("sclip", "teacher"),
        *((name, what) for name in ("maskclip", "sclip", mix) for what in ("sliding", "single pass", "own")),
    }
    taught = {name: (work / name / "own-seed0/model/model.safetensors").read_bytes() for name in ("maskclip", mix)}
    assert taught["maskclip"] != taught[mix] and (tmp_path / "teachers.png").exists()

    # The same command again trains and measures nothing.
    (work / "maskclip/features/shard-00000.safetensors").unlink()
    second = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert second.returncode == 0 and not re.search(r": \d+ s$", second.stdout, re.MULTILINE)

    def known(results: list[dict[str, Any]]) -> list[str]:
        return sorted(map(json.dumps, results))

    assert known(json.loads(output.read_text())["results"]) == known(document["results"])
