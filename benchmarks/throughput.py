"""Pictures a second of the whole `spar segment` command, from file to file, against the plain loop over the pipeline.

    python benchmarks/throughput.py                              # ViT-B/16 with random weights, pictures of 448 px
    python benchmarks/throughput.py --model tiny --images 64
    python benchmarks/throughput.py --short-side 448 --side 3000 # photographs, resized for the network

Three ways to the same two files for each picture, an overlay and a label map:
    loop           `pipeline(path, candidate_labels=words)` in a loop, and each result saved
    encoded loop   the same with the words encoded once, before the loop
    command        `spar segment FOLDER`, which reads ahead and writes behind in other processes

Seconds are those from the first picture to the last file, without start and loading. The ways take turns in every
round, each in a process of its own. The network's share is the time in the segmenter over all the time of the command.
Writes benchmarks/results/throughput.json, and the table of docs/many.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from record import origin

import spar_hf
from spar_cli.methods import renew
from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.files import write_json
from spar_hf.picture_book.dataset import PictureBook
from spar_hf.pipeline_spar import OpenVocabularySegmentationPipeline
from spar_hf.visualize import label_map_image, overlay

RESULTS = Path(__file__).parent / "results" / "throughput.json"
DOCS = Path(__file__).parents[1] / "docs" / "many.md"
WORDS = "cake; car, automobile; tree; apple; star; sea; sky; sand"
WAYS = ("loop", "encoded loop", "command")
# Targets, against the loop that is the faster: pictures a second, and the network's share of the time.
TIMES, SHARE = 1.5, 0.85


def make_pictures(folder: Path, count: int, side_px: int) -> None:
    """Scenes of the picture book, as JPEG."""
    folder.mkdir()
    book = PictureBook("test", side_px, side_px)
    for number in range(count):
        Image.fromarray(book.scene(number).image).save(folder / f"{number:05d}.jpg", quality=92)


def make_model(folder: Path) -> None:
    """ViT-B/16 with CLIP's text tower, random weights, and tiny's tokenizer."""
    _, processor = spar_hf.load("tiny")
    torch.manual_seed(0)
    vision = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "hidden_act": "gelu"}
    text = {"vocab_size": max(len(processor.tokenizer), 512), "eos_token_id": processor.tokenizer.eos_token_id}
    config = spar_hf.SparConfig(vision_config={**vision, "patch_size": 16}, text_config=text, projection_dim=512)
    spar_hf.SparModel(config).save_pretrained(folder)
    processor.save_pretrained(folder)


def loop(args: argparse.Namespace) -> dict[str, float]:
    """The plain loop, in this process."""
    model, processor = spar_hf.load(args.model, dtype=getattr(torch, args.dtype))
    if args.short_side is not None:
        processor.image_processor.size, processor.image_processor.do_resize = {"shortest_edge": args.short_side}, True
    pipeline = OpenVocabularySegmentationPipeline(model=model, processor=processor, device=model.device)
    output = args.folder / "loop"
    output.mkdir(exist_ok=True)
    words: Any = pipeline.encode_labels(WORDS) if args.way == "encoded loop" else WORDS
    started = time.perf_counter()
    for path in sorted((args.folder / "pictures").iterdir()):
        result = pipeline(str(path), candidate_labels=words)
        picture = overlay(Image.open(path), result["segmentation"], result["labels"])
        picture.save(output / f"{path.stem}-overlay.png")
        label_map_image(result["segmentation"]).save(output / f"{path.stem}-labels.png")
    return {"seconds": time.perf_counter() - started}


def command(args: argparse.Namespace) -> dict[str, float]:
    """The command, which says itself what it took."""
    written = args.folder / "command.json"
    line = [sys.executable, "-m", "spar_hf", "segment", args.folder / "pictures", "--labels", WORDS]
    line += ["--model", args.model, "--dtype", args.dtype, "--output", args.folder / "command", "--json", written]
    for flag in ("short_side", "workers", "batch_size"):
        if getattr(args, flag) is not None:
            line += [f"--{flag.replace('_', '-')}", getattr(args, flag)]
    subprocess.run([str(word) for word in line], check=True, capture_output=True)
    said = json.loads(written.read_text())
    return {"seconds": said["seconds"], "network_share": said["network_seconds"] / said["seconds"]}


def measured(args: argparse.Namespace, way: str) -> dict[str, float]:
    """One way in a process of its own."""
    line = [sys.executable, __file__, *sys.argv[1:], "--way", way, "--folder", args.folder, "--model", args.model]
    environment = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    run = subprocess.run([str(word) for word in line], env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(run.stdout.splitlines()[-1])


def table(document: dict[str, Any]) -> str:
    """What was measured, for docs/many.md."""
    settings, rates = document["settings"], document["rows"]
    ours = rates["command"]["images_per_second"]
    rows = [
        [name, f"{rates[way]['images_per_second']:.2f}", f"{ours / rates[way]['images_per_second']:.2f}"]
        for name, way in (
            ("the plain loop, words encoded for each picture", "loop"),
            ("the plain loop, words encoded once before", "encoded loop"),
            ("`spar segment FOLDER`", "command"),
        )
    ]
    machine = document["machine"]
    return "\n".join(
        [
            f"{settings['images']} pictures of {settings['side']} px, `{settings['model']}` in {settings['dtype']} "
            f"({machine['capability']}, {machine['threads']} threads; `{document['command']}`):",
            "",
            *markdown_table(["", "pictures/s", "command against it"], rows),
            "",
            f"The network has {document['network_share']:.0%} of the command's time.",
        ]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="vit-b", help="vit-b (random weights), tiny, a folder or an id (vit-b)")
    parser.add_argument("--images", type=int, default=32, help="pictures (32)")
    parser.add_argument("--side", type=int, default=448, help="of the pictures, px (448)")
    parser.add_argument("--short-side", type=int, help="of what the network sees (the pictures' own)")
    parser.add_argument("--dtype", default="float32", help="of the network (float32)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch (its own)")
    parser.add_argument("--workers", type=int, help="of the command (its own choice)")
    parser.add_argument("--batch-size", type=int, help="of the command (its own choice)")
    parser.add_argument("--rounds", type=int, default=3, help="each way runs so often; the median counts (3)")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=RESULTS, help="benchmarks/results/throughput.json")
    args = parser.parse_args()
    if args.way is not None:
        print(json.dumps(command(args) if args.way == "command" else loop(args)))
        return

    named = args.model
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        make_pictures(args.folder / "pictures", args.images, args.side)
        if named == "vit-b":
            args.model = str(args.folder / "vit-b")
            make_model(Path(args.model))
        runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(args.rounds):
            for way in WAYS:
                runs[way].append(measured(args, way))
    rows = {}
    for way, found in runs.items():
        rows[way] = {"images_per_second": round(args.images / statistics.median(run["seconds"] for run in found), 3)}
        print(f"{way:14} {rows[way]['images_per_second']:8.2f} images/s")
    share = statistics.median(run["network_share"] for run in runs["command"])
    times = {way: rows["command"]["images_per_second"] / rows[way]["images_per_second"] for way in WAYS[:2]}
    print(
        f"command: {times['loop']:.2f} times the loop, {times['encoded loop']:.2f} times the encoded loop (wanted: "
        f"{TIMES}); the network has {share:.0%} of its time (wanted: {SHARE:.0%})"
    )
    settings = {name: str(value) for name, value in vars(args).items() if name not in ("way", "folder", "output")}
    settings["model"] = named
    times = {way: round(value, 2) for way, value in times.items()}
    result = {"rows": rows, "times": times, "network_share": round(share, 3)}
    document = {**origin(threads=args.threads), "settings": settings, **result}
    write_json(args.output, document)
    if args.output == RESULTS:
        renew(DOCS, "throughput", table(document))


if __name__ == "__main__":
    main()
