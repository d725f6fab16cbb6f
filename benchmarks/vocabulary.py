"""Times `spar segment` with a large vocabulary: encoded anew, and read from what `spar labels --save` wrote.

    python benchmarks/vocabulary.py --runs 300x80 10000x1       # classes x prompt templates of each, the shipped tiny
    python benchmarks/vocabulary.py --runs 10000x80 --model openai/clip-vit-base-patch16

Whole commands from start to end on one small picture, in CPU seconds of their processes, which a busy machine hardly
moves. The label maps of both must be equal. Writes benchmarks/results/vocabulary.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from PIL import Image
from record import origin

from spar_hf.checkpoints import ASSETS
from spar_hf.files import write_json
from spar_hf.prompts_spar import IMAGENET_TEMPLATES

SPAR = [sys.executable, "-c", "import sys; from spar_cli.main import main; sys.exit(main())"]  # the script's content
RESULTS = Path(__file__).parent / "results" / "vocabulary.json"
KINDS = ("red", "green", "small", "round", "old", "wooden", "striped", "shiny", "broken", "distant")
THINGS = ("apple", "car", "tree", "star", "cake", "house", "fish", "boat", "cup", "key")


def name(number: int) -> str:
    """Distinct names of two words, from the hundredth on with a number."""
    words = f"{KINDS[number % 10]} {THINGS[number // 10 % 10]}"
    return f"{words} {number // 100}" if number >= 100 else words


def cpu_seconds(*words: str) -> float:
    """Of a command and all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*SPAR, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1)


def measure(classes: int, templates: int, model: str) -> dict[str, Any]:
    """The commands' CPU seconds with so many classes, each in so many prompt templates."""
    with tempfile.TemporaryDirectory() as folder:
        words, saved = Path(folder, "classes.json"), Path(folder, "classes.safetensors")
        own = IMAGENET_TEMPLATES[:templates]
        words.write_text(json.dumps([{"name": name(n), "templates": own} for n in range(classes)]), encoding="utf-8")
        common = ["--model", model, "--device", "cpu"]
        small = Path(folder, "small.png")
        with Image.open(ASSETS / "pictures" / "demo.png") as demo:
            demo.resize((96, 64)).save(small)  # so that it is the start that counts, not the pixels
        picture = ["segment", str(small), "--short-side", "64", "--format", "palette"]
        found = {
            "save": cpu_seconds("labels", "--labels", f"@{words}", "--save", str(saved), *common),
            "segment, names encoded": cpu_seconds(
                *picture, *common, "--labels", f"@{words}", "--output", f"{folder}/a"
            ),
            "segment, names read": cpu_seconds(*picture, *common, "--labels", f"@{saved}", "--output", f"{folder}/b"),
            "segment, one class": cpu_seconds(*picture, *common, "--labels", "apple", "--output", f"{folder}/c"),
        }
        maps = [Path(folder, run, "small-labels.png").read_bytes() for run in "ab"]
        if maps[0] != maps[1]:
            raise SystemExit("the label maps of both differ")
        size_mb = round(saved.stat().st_size / 1e6, 1)
    return {"classes": classes, "templates": templates, "file_mb": size_mb, "cpu_seconds": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", nargs="+", default=["300x80", "10000x1"], metavar="CLASSESxTEMPLATES")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    runs = []
    for run in args.runs:
        classes, _, templates = run.partition("x")
        runs.append(measure(int(classes), int(templates), args.model))
        print(f"{classes} classes in {templates} templates, {runs[-1]['file_mb']} MB")
        for what, seconds in runs[-1]["cpu_seconds"].items():
            print(f"  {what:24} {seconds:8.1f} CPU s", flush=True)
    write_json(args.output, {**origin(), "model": args.model, "runs": runs})


if __name__ == "__main__":
    main()
