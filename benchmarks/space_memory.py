"""The page's memory for the largest pictures that it accepts, above what it holds with its model loaded.

    python benchmarks/space_memory.py                          # writes benchmarks/results/space-memory.json
    python benchmarks/space_memory.py --row rgb-segment --output /tmp/memory.json

Each row is a process of its own: it answers a small request, so that libraries, model and words are in memory, then
the row's requests, and reports the peak of its resident memory in between (Linux). The pictures are made here: few
bytes, many pixels. A row over `LIMIT_MB` ends the command with status 1.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from record import PeakMemory, origin, status_kb

from spar_hf.checkpoints import ASSETS
from spar_hf.demo.handlers import OWN_METHOD, Api, Page
from spar_hf.demo.settings import Settings
from spar_hf.files import write_json

RESULTS = Path(__file__).parent / "results" / "space-memory.json"
LIMIT_MB = 1500
SIZE = (7900, 5000)  # width and height: 39.5 of the 40 million pixels that are read
WORDS = "cake; car, automobile; tree; apple; star; sea; sky; sand"

# A picture, the requests that come at the same time, and the threshold of uncertain pixels.
ROWS: dict[str, tuple[str, tuple[str, ...]]] = {
    "rgb-segment": ("rgb.png", ("segment",)),
    "rgb-similarity": ("rgb.png", ("similarity",)),
    "rgb-compare": ("rgb.png", ("compare",)),
    "rgb-two-at-once": ("rgb.png", ("segment", "similarity")),
    "rgb-three-at-once": ("rgb.png", ("segment", "segment", "compare")),
    "rgb-page": ("rgb.png", ("page",)),
    "rgb-300-words": ("rgb.png", ("many",)),
    "rgba-segment": ("rgba.png", ("segment",)),
    "rgba-two-at-once": ("rgba.png", ("segment", "similarity")),
    "grey-16-bit-two-at-once": ("grey16.png", ("segment", "similarity")),
    "jpeg-rotated-two-at-once": ("rotated.jpg", ("segment", "similarity")),
    "tiff-float-two-at-once": ("float.tif", ("segment", "similarity")),
    "wide-two-at-once": ("wide.png", ("segment", "similarity")),
}


def make_picture(name: str, folder: Path) -> str:
    """A picture of `SIZE`, all of one colour but for a corner."""
    path = folder / name
    if name == "rgba.png":
        picture = Image.new("RGBA", SIZE, (200, 120, 60, 128))
    elif name == "grey16.png":
        picture = Image.fromarray(np.full(SIZE[::-1], 30000, dtype=np.uint16))
    elif name == "float.tif":
        picture = Image.fromarray(np.full(SIZE[::-1], 0.5, dtype=np.float32))
    else:
        picture = Image.new("RGB", (40_000, 980) if name == "wide.png" else SIZE, (200, 120, 60))
    options: dict[str, Any] = {"compression": "tiff_lzw"} if name.endswith(".tif") else {}
    if name == "rotated.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6  # lies on its side
        options["exif"] = exif
    picture.save(path, **options)
    return str(path)


def measure(row: str) -> dict[str, Any]:
    """Runs one row in this process."""
    name, wanted = ROWS[row]
    page = Page(Settings(model="tiny", device="cpu", max_file_mb=200))
    api = Api(page)
    many = "; ".join(f"word {number}" for number in range(300))
    requests: dict[str, Callable[[str], Any]] = {
        "segment": lambda path: api.segment(path, WORDS, "tiny", OWN_METHOD, 0.5),
        "many": lambda path: api.segment(path, many, "tiny", OWN_METHOD, 0.5),
        "similarity": lambda path: api.similarity(path, "tiny", OWN_METHOD, 0.3, 0.7),
        "compare": lambda path: api.compare(path, WORDS, "tiny", OWN_METHOD),
        "page": lambda path: page.segment(path, WORDS, "tiny", OWN_METHOD, 0.5),
    }
    with tempfile.TemporaryDirectory() as folder:
        small = f"{folder}/small.png"
        Image.open(ASSETS / "pictures" / "demo.png").convert("RGB").resize((192, 128)).save(small)
        for request in dict.fromkeys(wanted):
            requests[request](small)
        path = subprocess.run(  # in another process, whose memory is its own
            [sys.executable, __file__, "--make", name, folder], check=True, capture_output=True, text=True
        ).stdout.strip()
        before = status_kb("VmRSS") * 1024 / 1e6
        threads = [threading.Thread(target=requests[request], args=(path,)) for request in wanted]
        started = time.perf_counter()
        with PeakMemory() as memory:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        seconds = time.perf_counter() - started
        size = Path(path).stat().st_size
        return {
            "row": row,
            "picture": name,
            "file_kb": round(size / 1000),
            "requests": list(wanted),
            "before_mb": round(before),
            "peak_above_mb": round(memory.mb),
            "seconds": round(seconds, 1),
        }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--row", choices=ROWS, action="append", help="only this row; may be given again")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--here", choices=ROWS, help=argparse.SUPPRESS)
    parser.add_argument("--make", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.make:
        print(make_picture(args.make[0], Path(args.make[1])))
        return 0
    if args.here:
        print(json.dumps(measure(args.here)))
        return 0
    rows = []
    for row in args.row or ROWS:
        done = subprocess.run([sys.executable, __file__, "--here", row], check=True, stdout=subprocess.PIPE, text=True)
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
    write_json(args.output, {**origin("gradio", "pillow"), "limit_mb": LIMIT_MB, "rows": rows})
    return int(any(row["peak_above_mb"] > LIMIT_MB for row in rows))


if __name__ == "__main__":
    sys.exit(main())
