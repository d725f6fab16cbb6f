"""Times `spar segment` with a large vocabulary: encoded anew, and read from what `spar labels --save` wrote.

    python benchmarks/vocabulary.py                        # 10,000 classes, the shipped tiny
    python benchmarks/vocabulary.py --classes 1000 --model openai/clip-vit-base-patch16

Whole commands from start to end on one small picture, in CPU seconds of their processes, which a busy machine hardly
moves. The label maps of both must be equal. Writes benchmarks/results/vocabulary.json.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

from record import origin

from spar_hf.checkpoints import ASSETS
from spar_hf.files import write_json

SPAR = [sys.executable, "-c", "import sys; from spar_cli.main import main; sys.exit(main())"]  # the script's content
RESULTS = Path(__file__).parent / "results" / "vocabulary.json"
KINDS = ("red", "green", "small", "round", "old", "wooden", "striped", "shiny", "broken", "distant")
THINGS = ("apple", "car", "tree", "star", "cake", "house", "fish", "boat", "cup", "key")


def names(count: int) -> list[str]:
    """Distinct names of two to three words and a number."""
    return [
        f"{KINDS[n % 10]} {THINGS[n // 10 % 10]} {n // 100}" if n >= 100 else f"{KINDS[n % 10]} {THINGS[n // 10]}"
        for n in range(count)
    ]


def cpu_seconds(*words: str) -> float:
    """Of a command and all that it starts."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([*SPAR, *words], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classes", type=int, default=10_000, help="default: 10000")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        words, saved = Path(folder, "classes.txt"), Path(folder, "classes.safetensors")
        words.write_text("\n".join(names(args.classes)), encoding="utf-8")
        model = ["--model", args.model, "--device", "cpu"]
        picture = [
            "segment",
            str(ASSETS / "pictures" / "demo.png"),
            "--short-side",
            "64",
            "--format",
            "palette",
            *model,
        ]
        found = {
            "save": cpu_seconds("labels", "--labels", f"@{words}", "--save", str(saved), *model),
            "segment, names encoded": cpu_seconds(*picture, "--labels", f"@{words}", "--output", f"{folder}/a"),
            "segment, names read": cpu_seconds(*picture, "--labels", f"@{saved}", "--output", f"{folder}/b"),
            "segment, one class": cpu_seconds(*picture, "--labels", "apple", "--output", f"{folder}/c"),
        }
        maps = [Path(folder, run, "demo-labels.png").read_bytes() for run in "ab"]
        assert maps[0] == maps[1], "the label maps differ"
        size = saved.stat().st_size
    for what, seconds in found.items():
        print(f"{what:24} {seconds:8.1f} CPU s")
    seconds = {what: round(value, 1) for what, value in found.items()}
    write_json(
        args.output,
        {
            **origin(),
            "model": args.model,
            "classes": args.classes,
            "file_mb": round(size / 1e6, 1),
            "cpu_seconds": seconds,
        },
    )


if __name__ == "__main__":
    main()
