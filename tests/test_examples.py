"""The scripts in examples/ and the README's first Python block run as they stand and print an answer."""

import re
import runpy
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# A cluster's has a test of its own, in test_ray.py.
EXAMPLES = sorted(path for path in (ROOT / "examples").glob("*.py") if path.stem != "ray_data")


@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(script, monkeypatch, capsys, tmp_path):
    arguments = ["--output", str(tmp_path), "--scenes", "3"] if script.stem == "draw_pictures" else []
    monkeypatch.setattr(sys, "argv", [str(script), *arguments])
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"\d+ ?%|\d\.\d\d s|scene-3", printed), printed


def test_shipped_pictures_are_what_the_script_draws():
    from PIL import Image, ImageChops

    from spar_hf.picture_book.dataset import PictureBook

    shipped = Image.open(ROOT / "src/spar_hf/assets/pictures/demo.png").convert("RGB")
    drawn = Image.fromarray(PictureBook("test", shipped.height, shipped.width).scene(12).image)
    assert ImageChops.difference(shipped, drawn).getbbox() is None


def test_readme_block_finds_what_the_picture_shows(monkeypatch):
    monkeypatch.chdir(ROOT)
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    block = next(code for code in blocks if "segment(" in code)
    names = {}
    exec(compile(block, "README.md", "exec"), names)
    result = names["result"]
    assert result["segmentation"].shape == (512, 768)
    shares = {found["label"]: found["area_fraction"] for found in result["segments"]}
    assert set(shares) == {"apple", "car", "sky", "sand"}
    largest = result["segments"][0]
    promised = re.search(r'"label": "(\w+)", "area_fraction": (0\.\d+)\.\.\.', block)
    assert largest["label"] == promised[1]
    assert f"{largest['area_fraction']:.4f}".startswith(promised[2])
