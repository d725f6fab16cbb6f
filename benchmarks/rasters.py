"""Measures rasters: CPU seconds a megapixel and memory by size, in blocks and in one pass, and how far both agree.

    python benchmarks/rasters.py                                  # benchmarks/results/rasters.json, docs/rasters.md
    python benchmarks/rasters.py --sizes 30000x30000 --whole-mp 0 --output strip.json      # constant memory

Pictures are scenes of the picture book side by side, written as compressed GeoTIFFs. Each row runs in a process of its
own. CPU seconds of the process, input and output included, loading left out; memory is its peak over what it had once
the model was loaded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from record import PeakMemory, origin

from spar_cli.methods import renew
from spar_hf.extras import extra_package
from spar_hf.files import write_json

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "rasters.json", HERE.parent / "docs" / "rasters.md"
SCENE_PX, SCENES = 512, 24
WORDS = "sky; grass; sea; sand; brick wall; wood; road; snow; house; tree; car; boat; fish; flower; star; balloon"


def draw(path: Path, size_hw: tuple[int, int]) -> None:
    """A raster of scenes side by side, window by window."""
    from spar_hf.picture_book.dataset import PictureBook

    rasterio = extra_package("rasterio", "geo")
    book = PictureBook("test", SCENE_PX, SCENE_PX)
    scenes = [book.scene(index).image.transpose(2, 0, 1) for index in range(SCENES)]
    which = np.random.default_rng(0)
    height, width = size_hw
    fields = {"driver": "GTiff", "height": height, "width": width, "count": 3, "dtype": "uint8", "tiled": True}
    fields |= {"blockxsize": SCENE_PX, "blockysize": SCENE_PX, "compress": "deflate", "crs": "EPSG:32633"}
    fields |= {"transform": rasterio.transform.from_origin(4e5, 5e6, 0.5, 0.5), "bigtiff": "IF_SAFER"}
    with rasterio.open(path, "w", **fields) as file:
        for top in range(0, height, SCENE_PX):
            for left in range(0, width, SCENE_PX):
                rows, columns = min(SCENE_PX, height - top), min(SCENE_PX, width - left)
                scene = scenes[which.integers(SCENES)][:, :rows, :columns]
                file.write(scene, window=((top, top + rows), (left, left + columns)))


def measure(way: str, path: Path, model_id: str, output: Path, memory_mb: int) -> dict[str, Any]:
    """One row, in this process: `blocks` writes a file, `window` and `image` are one pass with that reach."""
    from spar_hf import Labels, load
    from spar_hf.build import build_segmenter
    from spar_hf.rasters import segment_raster
    from spar_hf.segmentation_spar import label_map

    torch.set_num_threads(1)
    rasterio = extra_package("rasterio", "geo")
    model, processor = load(model_id)
    segmenter = build_segmenter(model, processor, reach="image" if way == "image" else "window")
    encoded = segmenter.encode_labels(Labels.parse(WORDS))
    class_ids = torch.tensor(encoded.labels.class_ids)
    started = time.process_time()
    with PeakMemory() as memory, torch.inference_mode():
        if way == "blocks":
            rules: dict[str, Any] = {"memory_bytes": memory_mb * 10**6, "progress": show}
            segment_raster(path, segmenter, encoded, processor.image_processor, output, **rules)
        else:
            with rasterio.open(path) as file:
                rules = {"do_resize": False, "max_input_pixels": 10**10, "max_image_pixels": 10**10}
                pixels = processor.image_processor(file.read().transpose(1, 2, 0), return_tensors="pt", **rules)
            found = label_map(segmenter(pixels["pixel_values"], encoded)[0], class_ids)
            np.save(output, found.numpy().astype(np.uint8))
    return {"cpu_s": time.process_time() - started, "memory_mb": memory.mb}


def show(done: int, total: int) -> None:
    if done == total or done % max(1, total // 20) == 0:
        print(f"  block {done} of {total}", file=sys.stderr, flush=True)


def row(way: str, path: Path, size_hw: tuple[int, int], args: argparse.Namespace, output: Path) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, "--measure", way, str(path), str(output), "--model", args.model]
    done = subprocess.run([*command, "--memory-mb", str(args.memory_mb)], stdout=subprocess.PIPE, text=True)
    megapixels = size_hw[0] * size_hw[1] / 1e6
    head = {"way": way, "size_hw": list(size_hw), "megapixels": round(megapixels, 2)}
    if done.returncode:  # killed for its memory, or out of it
        return {**head, "failed": done.returncode}
    found = json.loads(done.stdout.splitlines()[-1])
    return {**head, "cpu_s_per_megapixel": found["cpu_s"] / megapixels, **found}


def run(args: argparse.Namespace) -> dict[str, Any]:
    rasterio = extra_package("rasterio", "geo")
    rows = []
    for size_hw in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.work) as folder:
            path = Path(folder) / "scene.tif"
            draw(path, size_hw)
            megapixels = size_hw[0] * size_hw[1] / 1e6
            blocks = Path(folder) / "labels.tif"
            found = row("blocks", path, size_hw, args, blocks)
            rows.append(found)
            if megapixels <= args.whole_mp:
                whole = Path(folder) / "whole.npy"
                rows.append(row("window", path, size_hw, args, whole))
                if "failed" not in rows[-1] and "failed" not in found:
                    with rasterio.open(blocks) as file:
                        found["differing_percent"] = 100 * float((file.read(1) != np.load(whole)).mean())
            if megapixels <= args.plain_mp:
                rows.append(row("image", path, size_hw, args, Path(folder) / "plain.npy"))
        for done in rows:
            if done["size_hw"] == list(size_hw):
                print(json.dumps(done), file=sys.stderr, flush=True)
    return {**origin("rasterio", threads=1), "model": args.model, "memory_mb": args.memory_mb, "rows": rows}


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown, and the command that made them."""
    sizes = list(dict.fromkeys(tuple(row["size_hw"]) for row in results["rows"]))
    by = {(tuple(row["size_hw"]), row["way"]): row for row in results["rows"]}

    def cell(size: tuple[int, ...], way: str, what: str, digits: str) -> str:
        found = by.get((size, way), {})
        return "out of memory" if "failed" in found else format(found[what], digits) if what in found else ""

    lines = [
        "| pixels | in blocks, s/MP | memory, MB | one pass, within reach, s/MP | memory, MB | labels that differ "
        "| one pass, attention everywhere, s/MP | memory, MB |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for size in sizes:
        cells = [f"{size[0]} x {size[1]}"]
        for way in ("blocks", "window", "image"):
            cells += [cell(size, way, "cpu_s_per_megapixel", ".2f"), cell(size, way, "memory_mb", ".0f")]
            if way == "window":
                differing = cell(size, "blocks", "differing_percent", ".4f")
                cells.append(f"{differing} %" if differing else "")
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    capability = results["machine"]["capability"]
    lines += ["", f"`{results['command']}`: `{results['model']}`, CPU seconds of one thread ({capability}).", ""]
    return "\n".join(lines)


def size_hw(word: str) -> tuple[int, int]:
    height, _, width = word.partition("x")
    return int(height), int(width)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    sides = [f"{side}x{side}" for side in (1024, 2048, 4096, 8192)]
    parser.add_argument("--sizes", nargs="+", type=size_hw, default=[size_hw(side) for side in sides], metavar="HxW")
    parser.add_argument("--whole-mp", type=float, default=17, help="one pass within reach up to so many megapixels")
    parser.add_argument("--plain-mp", type=float, default=5, help="and with attention everywhere")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--memory-mb", type=int, default=1200, help="of a block")
    parser.add_argument("--work", type=Path, help="folder for the pictures; default: the system's")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="only write the table of --output into the page")
    parser.add_argument("--measure", nargs=3, metavar=("WAY", "PATH", "OUTPUT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        way, path, output = args.measure
        print(json.dumps(measure(way, Path(path), args.model, Path(output), args.memory_mb)))
        return
    if not args.table:
        write_json(args.output, run(args))
    results = json.loads(args.output.read_text(encoding="utf-8"))
    print(table(results))
    if args.output == RESULTS:
        renew(PAGE, "rasters", table(results))


if __name__ == "__main__":
    main()
