"""Times one forward pass of ViT-B/16 (random weights) against the obvious alternatives, on this machine.

    python benchmarks/speed.py                         # ours, stock transformers, open_clip where it is installed
    ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \\
        python benchmarks/speed.py                                                      # as on an older CPU
    python benchmarks/speed.py --models ours window stock --sizes 1024x1024 --dtypes float32 \\
        --output benchmarks/results/speed-reach.json                                    # within the window's reach
    python benchmarks/readme.py                        # writes docs/speed.md's tables from the stored results

For each size and type: seconds of one core (the least of the rounds), ratio to ours in the same run, peak memory over
the loaded model, and the share of this machine's measured matrix-product rate (floating-point operations counted by
formula). Models take turns in every round, each in a process of its own, and seconds are the processor's: what else
the machine does can only add to them. Half precision is ours alone: the others' is many times slower where the CPU has
no instructions for it. Writes benchmarks/results/speed/KIND.json, KIND being the CPU's.
"""

from __future__ import annotations

import argparse
import importlib.util
import multiprocessing as mp
import re
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mismatched_torchvision  # noqa: F401 - before transformers looks for it
import torch
from record import PeakMemory, origin

from spar_hf.arithmetic_spar import HALF, FullProducts, cpu_capability, fast_half
from spar_hf.files import write_json

RESULTS = Path(__file__).parent / "results" / "speed"
SIZES = ("224x224", "448x448", "672x896", "1024x1024")
WIDTH, LAYERS, MLP, PROJECTION, PATCH = 768, 12, 3072, 512, 16


def ours(height_px: int, width_px: int, dtype: torch.dtype, reach: str = "image") -> Callable:
    from spar_hf import SparVisionConfig, SparVisionModel

    sizes = {"hidden_size": WIDTH, "num_hidden_layers": LAYERS, "num_attention_heads": 12}
    config = SparVisionConfig(**sizes, hidden_act="gelu", attention_reach=reach)
    model = SparVisionModel(config).eval().to(dtype)
    return lambda pixels: model(pixels).patch_embeds


def window(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    return ours(height_px, width_px, dtype, reach="window")


def stock(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    from transformers import CLIPVisionConfig, CLIPVisionModel

    model = CLIPVisionModel(CLIPVisionConfig(patch_size=PATCH, hidden_act="gelu")).eval().to(dtype)
    return lambda pixels: model(pixels, interpolate_pos_encoding=True).last_hidden_state


def open_clip(height_px: int, width_px: int, dtype: torch.dtype) -> Callable:
    import open_clip as package

    model = package.create_model("ViT-B-16", force_image_size=(height_px, width_px)).visual.eval().to(dtype)
    return lambda pixels: model(pixels)


MODELS = {"ours": ours, "window": window, "stock": stock, "open_clip": open_clip}


def pairs(height_px: int, width_px: int, model: str) -> int:
    """How many pairs of patches a model's attention scores."""
    from spar_hf.reach_spar import WindowReach

    grid_hw = (height_px // PATCH, width_px // PATCH)
    if model != "window" or max(grid_hw) <= 224 // PATCH:
        return (grid_hw[0] * grid_hw[1]) ** 2
    tiles = WindowReach(grid_hw, 224 // PATCH, torch.device("cpu")).tiles
    return sum(tile.bias.numel() for row in tiles for tile in row)


def forward_flops(height_px: int, width_px: int, model: str) -> float:
    """Floating-point operations of one pass: products of matrices only, two operations a multiply-add."""
    patches = (height_px // PATCH) * (width_px // PATCH)
    tokens = patches + 1
    projection = 2 * tokens * WIDTH * WIDTH
    attention = 4 * (pairs(height_px, width_px, model) + 2 * patches + 1) * WIDTH
    mlp = 4 * tokens * WIDTH * MLP
    block = 4 * projection + attention + mlp
    values_alone = model in ("ours", "window")  # in the last block (MaskCLIP): keys, values, output projection
    last = 3 * projection + mlp if values_alone else block
    head = 2 * tokens * WIDTH * PROJECTION if values_alone else 0
    return 2 * patches * 3 * PATCH**2 * WIDTH + (LAYERS - 1) * block + last + head


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of a matrix product of the network's own shape, best of several."""
    left, right = torch.randn(4096, WIDTH, dtype=dtype), torch.randn(WIDTH, MLP, dtype=dtype)
    best = float("inf")
    for _ in range(12):
        start = time.process_time()
        left @ right
        best = min(best, time.process_time() - start)
    return 2 * 4096 * WIDTH * MLP / best


def _measure(connection, name: str, size: str, dtype_name: str) -> None:
    """Runs in a process of its own: answers each 'go' with seconds, and the end with the peak memory.

    A short pass runs for a second each time: the first finds the caches full of the others' weights. Half precision
    takes turns with fp32 in its process, and answers with the seconds of both: one process may have its memory in
    better places than another, which is worth 10 %.
    """
    torch.set_num_threads(1)
    height_px, width_px = map(int, size.split("x"))
    passes = []
    for dtype in dict.fromkeys([getattr(torch, dtype_name), torch.float32]):
        torch.manual_seed(0)
        run = MODELS[name](height_px, width_px, dtype)
        passes.append(partial(run, torch.randn(1, 3, height_px, width_px, dtype=dtype)))
    with torch.inference_mode():
        with PeakMemory() as memory:
            passes[0]()
        while connection.recv() == "go":
            seconds: list[list[float]] = [[] for _ in passes]
            while sum(seconds[0]) < 1:
                for taken, run in zip(seconds, passes, strict=True):
                    start = time.process_time()
                    run()
                    taken.append(time.process_time() - start)
            connection.send([min(taken) for taken in seconds])
        connection.send({"peak_mb": memory.mb, "widening": widening(passes[0])})


def widening(run: Callable[[], Any]) -> float:
    """Seconds of a pass that go into what fp32 does not do: weights stored in half precision are widened."""
    widened, taken = FullProducts._widened, [0.0]

    def timed(self: FullProducts, weight: torch.Tensor) -> torch.Tensor:
        start = time.process_time()
        found = widened(self, weight)
        taken[-1] += time.process_time() - start
        return found

    with patch.object(FullProducts, "_widened", timed):
        for _ in range(3):
            run()
            taken.append(0.0)
    return min(taken[:-1])


def compare(entries: list[tuple[str, str]], size: str, rounds: int) -> dict[tuple[str, str], dict]:
    """Seconds and memory of each model in its type at one size, all taking turns."""
    context = mp.get_context("spawn")
    pipes, processes = {}, []
    for name, dtype in entries:
        pipes[name, dtype], child = context.Pipe()
        processes.append(context.Process(target=_measure, args=(child, name, size, dtype), daemon=True))
        processes[-1].start()
    seconds: dict[tuple[str, str], list[list[float]]] = {entry: [] for entry in entries}
    for turn in range(rounds):
        order = list(pipes.items())
        for entry, pipe in order[turn % len(order) :] + order[: turn % len(order)]:
            pipe.send("go")
            seconds[entry].append(pipe.recv())
    rows = {}
    for entry, pipe in pipes.items():
        pipe.send("end")
        least = [min(taken) for taken in zip(*seconds[entry], strict=True)]
        rows[entry] = {"seconds": least[0], "fp32_seconds": least[-1], **pipe.recv()}
    for process in processes:
        process.join()
    return rows


def bf16_error(height_px: int, width_px: int) -> float:
    """Norm of the difference that bf16 makes to our features, as a share of their norm in fp32."""
    pixels = torch.randn(1, 3, height_px, width_px, generator=torch.Generator().manual_seed(0))
    features = {}
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(0)
        with torch.inference_mode():
            features[dtype] = ours(height_px, width_px, dtype)(pixels.to(dtype)).float()
    return float((features[torch.bfloat16] - features[torch.float32]).norm() / features[torch.float32].norm())


def kind() -> str:
    """The CPU's kind, for a file's name: `avx2`, `avx512-fast-bfloat16`."""
    return re.sub(r"\W+", "-", cpu_capability().lower())


def products_of(dtype: str) -> torch.dtype:
    """What ours multiplies in."""
    products = getattr(torch, dtype)
    return torch.float32 if products in HALF and not fast_half("cpu", products) else products


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Measures and prints every row."""
    table: list[dict[str, Any]] = []
    print(f"CPU: {cpu_capability()}; one thread")
    print(f"{'size':>10} {'type':>9} {'model':>10} {'seconds':>8} {'vs ours':>8} {'peak MB':>8} {'of rate':>8}")
    others = [(args.models[0], dtype) for dtype in args.dtypes if dtype != "float32"]
    for size in args.sizes:
        height_px, width_px = map(int, size.split("x"))
        before = {dtype: matrix_rate(products_of(dtype)) for dtype in args.dtypes}
        rows = compare([*((name, "float32") for name in args.models), *others], size, args.rounds)
        rates = {dtype: max(rate, matrix_rate(products_of(dtype))) for dtype, rate in before.items()}
        for (name, dtype), row in rows.items():
            flops = forward_flops(height_px, width_px, name)
            row |= {"size": size, "dtype": dtype, "model": name, "flops": flops}
            row |= {"of_matrix_rate": flops / row["seconds"] / rates[dtype], "matrix_gflops": rates[dtype] / 1e9}
            reference = rows[args.models[0], "float32"] if dtype == "float32" else row
            row["ratio_to_ours"] = row["seconds"] / reference["fp32_seconds"]
            table.append(row)
            print(
                f"{size:>10} {dtype:>9} {name:>10} {row['seconds']:>8.3f} {row['ratio_to_ours']:>8.2f} "
                f"{row['peak_mb']:>8.0f} {row['of_matrix_rate']:>8.0%}",
                flush=True,
            )
    return {**origin(), "rows": table}


def main() -> None:
    default = [name for name in MODELS if name != "window" and (name != "open_clip" or importlib.util.find_spec(name))]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=default)
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), help="height x width in pixels, such as 672x896")
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS / f"{kind()}.json", help="default: %(default)s")
    parser.add_argument("--accuracy", action="store_true", help="only print what bf16 does to the features")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.accuracy:
        for size in args.sizes:
            print(f"{size:>10}: bf16 moves the features by {bf16_error(*map(int, size.split('x'))):.2%} of their norm")
        return
    write_json(args.output, measure(args))
    print(f"written to {args.output}")


if __name__ == "__main__":
    main()
