"""benchmarks/gpu.py: every row runs, and FlexAttention's form of the reach is that of the library."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from spar_hf.reach_spar import WindowReach

WORDS = "--device cpu --dtype float32 --models vit-b16 --rounds 1 --dry-run --sizes"


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")
    return importlib.import_module("gpu")


@pytest.mark.parametrize("grid_hw", [(6, 6), (9, 7), (4, 12)])
def test_flex_attention_reaches_as_far(benchmark, grid_hw):
    generator = torch.Generator().manual_seed(0)
    query, key, value = torch.randn(3, 2, 3, grid_hw[0] * grid_hw[1], 8, generator=generator)
    reach = WindowReach(grid_hw, 4, torch.device("cpu"))
    expected = (query @ key.transpose(2, 3) * 8**-0.5 + reach.bias(*[grid_hw[0] * grid_hw[1]] * 2)).softmax(-1) @ value
    found = benchmark.flex_attend(reach, query, key, value)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
    torch.testing.assert_close(reach.attend(query, key, value), expected, atol=2e-5, rtol=0)


@pytest.mark.slow
def test_every_row_runs_on_a_cpu(benchmark, capsys):
    benchmark.main([*WORDS.split(), "240"])
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == ["pass"] * 2 + ["attention"] * 3 + ["teacher", "step", "labels"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_reach_on_a_gpu(benchmark, capsys):
    benchmark.main(["--models", "vit-b16", "--rounds", "2", "--dry-run", "--sizes", "448", "1024"])
    assert "flex" in capsys.readouterr().out


def test_no_device_is_one_line(benchmark, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(SystemExit):
        benchmark.main([])
    assert "there is no CUDA device here" in capsys.readouterr().err
