"""benchmarks/transfer.py: what the criterion says of measured numbers, and the command on the shipped network."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import numpy as np
import pytest

from spar_hf.published import method_rows


@pytest.fixture
def transfer(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("transfer")


def document(transfer, iou: dict[str, float]) -> dict:
    rows = {name: {"mean_iou": value, "published": transfer.published(name)} for name, value in iou.items()}
    return {"model": "tiny", "limit": 2, "split": "validation", "methods": rows}


def test_published_means_are_those_of_the_three_sets(transfer):
    assert transfer.published("clip") == pytest.approx((16.4 + 8.4 + 2.9) / 3)
    assert "ade20k" not in method_rows()["itaclip"].miou and transfer.published("itaclip") is None
    assert {"clip", "maskclip", *transfer.WITHOUT_RESIDUAL} <= set(transfer.own_methods())


def test_the_verdict(transfer):
    as_published = {
        name: transfer.published(name) / 100 for name in ("clip", "maskclip", "clearclip", "naclip", "sc_clip")
    }
    found = transfer.verdict(document(transfer, as_published))
    assert found == {
        "methods": 5, "correlation": pytest.approx(1), "correlates": True, "clip_far_below": True,
        "without_residual_above": True,
    }  # fmt: skip
    turned = {"clip": 0.5, "maskclip": 0.6, "clearclip": 0.2, "naclip": 0.4, "sc_clip": 0.7}
    ranks = [np.argsort(np.argsort(list(values.values()))) for values in (turned, as_published)]
    expected = 1 - 6 * ((ranks[0] - ranks[1]) ** 2).sum() / (5 * 24)  # without ties
    found = transfer.verdict(document(transfer, turned))
    assert found["correlation"] == pytest.approx(expected) and found["correlates"] is False
    assert found["clip_far_below"] is False and found["without_residual_above"] is False
    assert transfer.verdict(document(transfer, {"clip": 0.1}))["correlates"] is None


@pytest.mark.slow
def test_a_run_goes_on(transfer, tmp_path, capsys):
    words = ["tiny", "--limit", "1", "--output", str(tmp_path / "t.json"), "--only", "clip"]
    transfer.main(words)
    first = json.loads((tmp_path / "t.json").read_text())
    transfer.main([*words, "maskclip"])
    second = json.loads((tmp_path / "t.json").read_text())
    assert second["methods"]["clip"] == first["methods"]["clip"] and 0 < second["methods"]["maskclip"]["mean_iou"] < 1
    assert "clip\n" not in capsys.readouterr().err.split("maskclip")[-1]
