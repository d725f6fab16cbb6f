"""Times one forward pass and the picture book in PyTorch, torch.compile and onnxruntime, on this machine.

    python benchmarks/backends.py                            # ViT-B/16 of random weights at 672x896; tiny's mIoU
    python benchmarks/backends.py --size 448x448 --rounds 5 --threads 2 --scenes 50

For each backend: CPU seconds of a pass (median of the rounds), the ratio to PyTorch in fp32 of the same run, and the
memory that passes add to the loaded model; backends take turns in every round, each in a process of its own, so that a
noisy machine disturbs all alike. Then mIoU of the shipped `tiny` on the picture book, and the seconds from the command
line to the written label map of one small picture, with PyTorch and without. Writes benchmarks/results/backends.json
with the command, and the table of docs/export.md.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from record import PeakMemory, origin

from spar_cli.methods import renew
from spar_hf import FromFeatures, SparVisionConfig, SparVisionModel, SparVisionOutput, export, load
from spar_hf.evaluation import evaluate, load_benchmark
from spar_hf.evaluation.evaluate import markdown_table
from spar_hf.exporting.arithmetic import to_int8, to_static_int8
from spar_hf.exporting.graphs import VISION_OUTPUTS, FusedAttention, to_onnx, vision_program
from spar_hf.files import write_json
from spar_hf.grid_spar import fit_to_patches
from spar_onnx.folder import open_session

GRAPHS = (("onnxruntime fp32", ""), ("onnxruntime int8", "_int8"), ("onnxruntime int8-static", "_int8_static"))
SPAR = [sys.executable, "-c", "import sys; from spar_cli.main import main; sys.exit(main())"]  # the script's content
RESULTS = Path(__file__).parent / "results" / "backends.json"
DOCS = Path(__file__).parents[1] / "docs" / "export.md"
BACKENDS = (
    "pytorch fp32",
    "pytorch bf16",
    "torch.compile fp32",
    "onnxruntime fp32",
    "onnxruntime int8",
    "onnxruntime int8-static",
)


def vit_b16() -> SparVisionModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072}
    return SparVisionModel(SparVisionConfig(**sizes, hidden_act="quick_gelu")).eval()


def one_pass(backend: str, folder: Path, threads: int) -> Callable[[torch.Tensor], Any]:
    """Pixels (1, 3, H, W) -> patch features, by one of `BACKENDS`."""
    where, dtype = backend.split(" ")
    if where == "onnxruntime":
        session = open_session(folder / f"{dtype}.onnx", threads)
        return lambda pixels: session.run(["patch_embeds"], {"pixel_values": pixels.numpy()})
    model = vit_b16().to(torch.bfloat16 if dtype == "bf16" else torch.float32)
    run = torch.compile(model) if where == "torch.compile" else model
    return lambda pixels: run(pixels.to(model.dtype)).patch_embeds


def worker(backend: str, folder: Path, size_hw: tuple[int, int], threads: int, pipe: Any) -> None:
    """Answers each message with the CPU seconds of a pass and the peak memory of the first one, in MB."""
    torch.set_num_threads(threads)
    pixels = torch.randn(1, 3, *size_hw, generator=torch.Generator().manual_seed(0)) * 0.5
    with torch.inference_mode():
        run = one_pass(backend, folder, threads)
        with PeakMemory() as memory:
            run(pixels)
        while pipe.recv():
            started = time.process_time()
            run(pixels)
            seconds = time.process_time() - started
            pipe.send((seconds, memory.mb))


def speed(size_hw: tuple[int, int], rounds: int, threads: int, backends: list[str]) -> dict[str, dict[str, float]]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with FusedAttention():
            program = vision_program(vit_b16())
        to_onnx(program, folder / "fp32.onnx", "pixel_values", VISION_OUTPUTS, 20)
        to_int8(folder / "fp32.onnx", folder / "int8.onnx")
        seen = [scene.numpy() for scene in torch.randn(2, 1, 3, 224, 224, generator=torch.Generator().manual_seed(1))]
        to_static_int8(folder / "fp32.onnx", folder / "int8-static.onnx", "pixel_values", seen)
        context = mp.get_context("spawn")
        running = {}
        for backend in backends:
            ours, theirs = context.Pipe()
            process = context.Process(target=worker, args=(backend, folder, size_hw, threads, theirs))
            process.start()
            theirs.close()
            running[backend] = (process, ours)
        measured: dict[str, list[tuple[float, float]]] = {backend: [] for backend in backends}
        for _ in range(rounds):
            for backend, (_, pipe) in running.items():
                pipe.send(True)
                measured[backend].append(pipe.recv())
        for process, pipe in running.values():
            pipe.send(False)
            process.join()
    seconds = {backend: statistics.median(pass_[0] for pass_ in found) for backend, found in measured.items()}
    return {
        backend: {
            "cpu_seconds": round(seconds[backend], 3),
            "times_pytorch_fp32": round(seconds[backend] / seconds[backends[0]], 3),
            "memory_mb": round(measured[backend][-1][1], 1),
        }
        for backend in backends
    }


class OnnxEncoder:
    """A dense encoder whose vision tower runs in onnxruntime."""

    def __init__(self, vision: Any, session: Any) -> None:
        self.config, self.dtype, self.device = vision.config, vision.dtype, vision.device
        self.session = session

    def __call__(self, pixel_values: torch.Tensor) -> SparVisionOutput:
        _, extent_hw = fit_to_patches(pixel_values, self.config.patch_size, self.config.size_rule)
        (patches,) = self.session.run(["patch_embeds"], {"pixel_values": pixel_values.numpy()})
        image_hw = (pixel_values.shape[2], pixel_values.shape[3])
        return SparVisionOutput(patch_embeds=torch.from_numpy(patches), image_hw=image_hw, extent_hw=extent_hw)


def quality(scenes: int, scale: float, threads: int) -> dict[str, float]:
    """mIoU of tiny on the picture book, per cent, by backend; words by PyTorch, so that the vision tower decides."""
    model, processor = load("tiny")
    half, _ = load("tiny", dtype=torch.bfloat16)
    book = load_benchmark("picturebook", scale=scale, native_px=model.config.vision_config.image_size)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "tiny"
        export(model, processor, folder, dtypes=("float32", "int8", "int8-static"), scenes=1)
        encoders: dict[str, Any] = {"pytorch fp32": model.vision_model, "pytorch bf16": half.vision_model}
        for backend, ending in GRAPHS:
            session = open_session(folder / "onnx" / f"vision_model{ending}.onnx", threads)
            encoders[backend] = OnnxEncoder(model.vision_model, session)
        found = {}
        for backend, encoder in encoders.items():
            segmenter = FromFeatures(encoder, model, processor)
            result = evaluate(segmenter, processor, book, limit=scenes, progress=False)
            found[backend] = round(100 * float(np.nan_to_num(result.mean_iou)), 2)
    return found


def start_up(rounds: int) -> dict[str, float]:
    """Seconds of `spar segment` for one picture of the native size, the least of the rounds."""
    model, processor = load("tiny")
    native = model.config.vision_config.image_size
    seconds: dict[str, list[float]] = {"pytorch": [], "onnxruntime": []}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(model, processor, folder / "tiny", scenes=1)
        Image.new("RGB", (native, native), "green").save(folder / "green.png")
        for _ in range(rounds):
            for backend, checkpoint in (("pytorch", "tiny"), ("onnxruntime", str(folder / "tiny"))):
                command = [*SPAR, "segment", str(folder / "green.png"), "--labels", "sky; sea"]
                started = time.perf_counter()
                subprocess.run(
                    [*command, "--model", checkpoint, "--output", str(folder / "out")], check=True, capture_output=True
                )
                seconds[backend].append(time.perf_counter() - started)
    return {backend: round(min(found), 2) for backend, found in seconds.items()}


def write_docs(result: dict[str, Any], path: Path = DOCS) -> None:
    """Renews the table of docs/export.md."""
    height, width = result["size_hw"]
    miou, machine = result["picture_book"]["miou"], result["machine"]
    rows = [
        [
            backend,
            f"{row['cpu_seconds']:.2f}",
            f"{row['times_pytorch_fp32']:.2f}",
            f"{row['memory_mb']:.0f}",
            f"{miou[backend]:.1f}" if backend in miou else "",
        ]
        for backend, row in result["speed"].items()
    ]
    book, start = result["picture_book"], result["start_up"]
    head = [
        f"ViT-B/16 of random weights at {width} x {height} px, CPU seconds of a pass, and mIoU of `tiny` on "
        f"{book['scenes']} scenes at {book['scale']:g} times the native side ({machine['capability']}, "
        f"{machine['threads']} thread; `{result['command']}`):",
        "",
    ]
    tail = [
        "",
        f"`spar segment` of one picture of 128 px, from the command to the file: {start['onnxruntime']:.1f} s, with "
        f"PyTorch {start['pytorch']:.1f} s.",
    ]
    header = ["", "s", "of PyTorch fp32", "MB over the model", "mIoU"]
    renew(path, "backends", "\n".join([*head, *markdown_table(header, rows), *tail]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="672x896", help="height x width in pixels")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=BACKENDS)
    parser.add_argument("--scenes", type=int, default=50, help="of the picture book")
    parser.add_argument("--scale", type=float, default=4, help="of the scenes, times the native side")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args()
    height, width = (int(side) for side in args.size.split("x"))
    torch.set_num_threads(args.threads)
    result = {
        **origin("onnxruntime", threads=args.threads),
        "size_hw": [height, width],
        "speed": speed((height, width), args.rounds, args.threads, args.backends),
        "picture_book": {
            "scenes": args.scenes,
            "scale": args.scale,
            "miou": quality(args.scenes, args.scale, args.threads),
        },
        "start_up": start_up(args.rounds),
    }
    write_json(args.output, result)
    if args.output == RESULTS:
        write_docs(result)
    for backend, row in result["speed"].items():
        miou = result["picture_book"]["miou"].get(backend)
        seconds, ratio, memory = row["cpu_seconds"], row["times_pytorch_fp32"], row["memory_mb"]
        print(f"{backend:20} {seconds:8.2f} s  {ratio:5.2f} x  {memory:8.0f} MB  mIoU {miou}")


if __name__ == "__main__":
    main()
