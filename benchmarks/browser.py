"""Milliseconds of the page in a real Chromium, and of onnxruntime in Python on the same machine.

    make browser && python benchmarks/browser.py              # of dist/browser
    python benchmarks/browser.py --page DIST --rounds 5 --output browser.json

Each size is segmented with the demo's words, which are encoded once before; a row is the median of the network's time
over the rounds, and that of the whole request: opening the picture, network, label map and drawing. Writes
benchmarks/results/browser.json and the table of docs/browser.md.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import statistics
import tempfile
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Page, sync_playwright
from record import origin

import spar_onnx
from spar_cli.methods import renew
from spar_hf.checkpoints import ASSETS
from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.files import write_json

HERE = Path(__file__).parent
RESULTS, DOCS = HERE / "results" / "browser.json", HERE.parent / "docs" / "browser.md"
DIST = HERE.parent / "dist" / "browser"
COLUMNS = {"network": "network", "whole": "whole request", "python": "onnxruntime in Python, network"}
WORDS = "cake; car, automobile; tree; apple; star; sea; sky; sand"
SIZES_HW = ((256, 384), (512, 768), (800, 1200))


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


def wait(page: Page, expression: str) -> None:
    """Until an expression holds; the page forbids Playwright's own waiting, which runs words as code."""
    while not page.evaluate(expression):
        page.wait_for_timeout(5)


def in_browser(page: Page, picture: Path, rounds: int) -> tuple[float, float]:
    """Median milliseconds of the network and of the whole request."""
    network, whole = [], []
    for turn in range(rounds + 1):
        page.locator("#file").set_input_files(str(picture))
        started = time.perf_counter()
        page.locator("#run").click()
        wait(page, "document.getElementById('work').dataset.state === 'idle'")
        wait(page, "document.querySelectorAll('#answer canvas[data-active]').length === 1")
        took = 1000 * (time.perf_counter() - started)
        note = page.locator("#answer figcaption span").inner_text()
        found = re.search(r"· ([\d.]+) (ms|s)$", note)
        assert found is not None, note
        if turn:  # the first of a size also pays for memory
            network.append(float(found[1]) * (1000 if found[2] == "s" else 1))
            whole.append(took)
    return statistics.median(network), statistics.median(whole)


def in_python(pipeline: Any, picture: Path, rounds: int) -> float:
    """Median milliseconds of the vision tower, in onnxruntime."""
    values = pipeline.pixels.values(pipeline.open_rgb(picture))[None]
    times = []
    for turn in range(rounds + 1):
        started = time.perf_counter()
        pipeline.features(values)
        if turn:
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def table(document: dict[str, Any]) -> str:
    """What was measured, for docs/browser.md."""
    rows = [
        [" x ".join(map(str, row["size_hw"][::-1])), *(f"{row[f'{what}_ms']:.0f}" for what in COLUMNS)]
        for row in document["rows"]
    ]
    machine = document["machine"]
    return "\n".join(
        [
            f"Milliseconds in Chromium {document['chromium'].partition('.')[0]} ({machine['capability']}, "
            f"{machine['threads']} threads; `{document['command']}`):",
            "",
            *markdown_table(["picture", *COLUMNS.values()], rows),
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--page", type=Path, default=DIST, metavar="DIST", help="a built page")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, metavar="FILE")
    args = parser.parse_args()
    models = args.page / "models"
    if not models.is_dir():
        parser.error(f"{args.page} is no built page; run 'make browser' first")
    chromium = os.environ.get("SPAR_CHROMIUM") or shutil.which("chromium")
    if chromium is None:
        parser.error("there is no Chromium here; apt-get install chromium")
    (folder,) = models.iterdir()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(args.page)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    rows = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as scratch:
        browser = playwright.chromium.launch(
            executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        page = browser.new_page()
        page.goto(f"http://127.0.0.1:{server.server_address[1]}/")
        page.locator("#status", has_text="works offline").wait_for()
        runs = page.locator("#status").inner_text()
        page.locator("#words").fill(WORDS)
        pipeline = spar_onnx.load(folder, threads=2)
        print(f"{runs}\nnetwork, whole request, and onnxruntime in Python in ms:")
        for height, width in SIZES_HW:
            picture = Path(scratch) / f"{width}.png"
            Image.open(ASSETS / "pictures" / "demo.png").convert("RGB").resize((width, height)).save(picture)
            network, whole = in_browser(page, picture, args.rounds)
            native = in_python(pipeline, picture, args.rounds)
            rows.append({"size_hw": [height, width], "network_ms": network, "whole_ms": whole, "python_ms": native})
            print(f"{width} x {height}: {network:.0f} {whole:.0f} {native:.0f}", flush=True)
        version = browser.version
        browser.close()
    server.shutdown()
    said = {"chromium": version, "runs": runs, "rounds": args.rounds}
    document = {**origin("onnxruntime", threads=2), **said, "rows": rows}
    write_json(args.output, document)
    if args.output == RESULTS:
        renew(DOCS, "browser-speed", table(document))


if __name__ == "__main__":
    main()
