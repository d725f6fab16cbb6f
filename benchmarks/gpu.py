"""Times the passes, the teacher, a training step, the reach and post-processing on an accelerator (random weights).

    python benchmarks/gpu.py                                                       # on a CUDA device, some minutes
    python benchmarks/gpu.py --device cpu --dtype float32 --sizes 224 448 --rounds 1 --models vit-b16 --dry-run

Rows, each the median of the rounds, with the peak memory above the loaded model:
    pass       one pass of ViT-B/16 and ViT-L/14, and its share of the card's measured rate of matrix products
    reach      the pass within the window's reach: `tiles` as the library does it, `flex` by FlexAttention with a block
               mask, both against attention everywhere in the same run
    teacher    the sliding window of 224 px at stride 24 over one picture
    step       a training step of the last two blocks against stored features, forward and backward
    labels     150 classes from features to a label map at the picture's size
Wanted on an H100: the pass at 1024 px at half the rate or more; the reach at 4096 px five times as fast as attention
everywhere. `--dry-run` stops after checking on small sizes that both forms of the reach agree and that every row runs.
Writes benchmarks/results/gpu.json.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from record import origin
from speed import forward_flops
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from spar_hf import SlidingWindow, SparVisionConfig, SparVisionModel
from spar_hf.distillation.selection import set_trainable
from spar_hf.encoder_spar import SparVisionOutput
from spar_hf.files import write_json
from spar_hf.reach_spar import WindowReach
from spar_hf.segmentation_spar import feature_scores, label_map

RESULTS = Path(__file__).parent / "results" / "gpu.json"
MODELS = {
    "vit-b16": {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    "vit-l14": {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16,
        "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
CLASSES, STRIDE_PX, TRAINED_BLOCKS = 150, 24, 2


def vit(name: str, args: argparse.Namespace, reach: str = "image") -> SparVisionModel:
    """A tower with random weights on the device."""
    torch.manual_seed(0)
    config = SparVisionConfig(**MODELS[name], hidden_act="quick_gelu", attention_reach=reach)
    return SparVisionModel(config).eval().to(args.device, getattr(torch, args.dtype))


def seconds(run: Callable[[], Any], args: argparse.Namespace) -> tuple[float, float]:
    """Median seconds of a call, and its peak memory in MB above what was held before (0 on a CPU)."""
    cuda = args.device.type == "cuda"
    run()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    taken = []
    for _ in range(args.rounds):
        started = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started)
    peak = (torch.cuda.max_memory_allocated() - held) / 2**20 if cuda else 0.0
    return statistics.median(taken), peak


def matrix_rate(args: argparse.Namespace) -> float:
    """Operations a second of a large matrix product in the type of the run."""
    side = 8192 if args.device.type == "cuda" else 1024
    left = torch.randn(side, side, device=args.device, dtype=getattr(torch, args.dtype))
    return 2 * side**3 / seconds(lambda: left @ left, args)[0]


@lru_cache
def block_mask(reach: WindowReach) -> BlockMask:
    """Which blocks of patches reach each other."""
    (down, across), width = reach.log_shares, reach.grid_hw[1]

    def reaches(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (down[query // width, key // width] + across[query % width, key % width]) > float("-inf")

    patches = reach.grid_hw[0] * width
    return create_block_mask(reaches, None, None, patches, patches, device=down.device)


def flex_attend(reach: WindowReach, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """`WindowReach.attend` of patches alone, (B, H, N, d), by FlexAttention."""
    (down, across), width = reach.log_shares, reach.grid_hw[1]

    def add_share(score: Tensor, batch: Tensor, head: Tensor, of: Tensor, to: Tensor) -> Tensor:
        return score + down[of // width, to // width] + across[of % width, to % width]

    attend = torch.compile(flex_attention) if query.is_cuda else flex_attention
    return attend(query, key, value, score_mod=add_share, block_mask=block_mask(reach))


def attention_rows(name: str, side_px: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Attention of one block of a model: everywhere, within reach tile by tile, and by FlexAttention.

    Raises:
        ValueError: the two forms of the reach do not agree.
    """
    config = SparVisionConfig(**MODELS[name])
    grid = side_px // config.patch_size
    shape = (1, config.num_attention_heads, grid**2, config.hidden_size // config.num_attention_heads)
    query, key, value = torch.randn(3, *shape, device=args.device, dtype=getattr(torch, args.dtype))
    reach = WindowReach((grid, grid), config.image_size // config.patch_size, args.device)
    ways = {
        "everywhere": lambda: F.scaled_dot_product_attention(query, key, value),
        "tiles": lambda: reach.attend(query, key, value),
        "flex": lambda: flex_attend(reach, query, key, value),
    }
    apart = float((ways["tiles"]() - ways["flex"]()).abs().max())
    if not apart < (1e-5 if args.dtype == "float32" else 3e-2):
        raise ValueError(f"the reach by tiles and by FlexAttention are {apart:.2g} apart at {side_px} px.")
    rows = [{"row": "attention", "model": name, "side_px": side_px, "way": way} for way in ways]
    for row, run in zip(rows, ways.values(), strict=True):
        row["seconds"], row["peak_mb"] = seconds(run, args)
        row["times_everywhere"] = rows[0]["seconds"] / row["seconds"]
    return rows


def pass_rows(name: str, side_px: int, rate: float, args: argparse.Namespace) -> list[dict[str, Any]]:
    """One pass of a model with attention everywhere and within reach."""
    rows: list[dict[str, Any]] = []
    for reach in ("image", "window"):
        model = vit(name, args, reach)
        pixels = torch.randn(1, 3, side_px, side_px, device=args.device, dtype=model.dtype)
        taken, peak = seconds(lambda model=model, pixels=pixels: model(pixels), args)
        row = {"row": "pass", "model": name, "side_px": side_px, "way": reach, "seconds": taken, "peak_mb": peak}
        if name == "vit-b16":
            operations = forward_flops(side_px, side_px, "ours" if reach == "image" else "window")
            row["of_matrix_rate"] = operations / taken / rate
        rows.append(row)
        rows[-1]["times_everywhere"] = rows[0]["seconds"] / taken
    return rows


def other_rows(name: str, side_px: int, args: argparse.Namespace) -> list[dict[str, Any]]:
    """Teacher, training step and label map at one size."""
    model = vit(name, args)
    pixels = torch.randn(1, 3, side_px, side_px, device=args.device, dtype=model.dtype)
    teacher = SlidingWindow(model, stride_px=STRIDE_PX, batch_size=256)
    outputs = model(pixels)
    text = F.normalize(torch.randn(CLASSES, outputs.patch_embeds.shape[-1], device=args.device), dim=-1)
    class_ids = torch.arange(CLASSES, device=args.device)
    features = SparVisionOutput(patch_embeds=outputs.patch_embeds.float())

    def labels() -> Tensor:
        (maps,) = feature_scores(features, text, (side_px, side_px))
        return label_map(maps, class_ids)

    student = vit(name, args).train()
    set_trainable(student, f"last:{TRAINED_BLOCKS}")

    @torch.enable_grad()
    def step() -> None:
        student.zero_grad()
        F.mse_loss(student(pixels).patch_embeds.float(), features.patch_embeds).backward()

    rows = []
    for row, run in {"teacher": lambda: teacher(pixels), "step": step, "labels": labels}.items():
        taken, peak = seconds(run, args)
        rows.append({"row": row, "model": name, "side_px": side_px, "way": "", "seconds": taken, "peak_mb": peak})
    return rows


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument("--sizes", nargs="+", type=int, default=[448, 1024, 2048, 4096], metavar="PX")
    parser.add_argument(
        "--teacher-to", type=int, default=2048, metavar="PX", help="largest side of the teacher's rows"
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dry-run", action="store_true", help="write nothing")
    parser.add_argument("--output", type=Path, default=RESULTS)
    args = parser.parse_args(argv)
    if args.device.type == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; add --device cpu --dtype float32 --dry-run to see that it runs.")
    rate, rows = matrix_rate(args), []
    print(f"{'row':10} {'model':8} {'side':>5} {'way':10} {'seconds':>9} {'peak MB':>8} {'of rate':>8} {'times':>6}")
    for name in args.models:
        for side_px in args.sizes:
            side_px -= side_px % SparVisionConfig(**MODELS[name]).patch_size
            found = pass_rows(name, side_px, rate, args) + attention_rows(name, side_px, args)
            found += other_rows(name, side_px, args) if side_px <= args.teacher_to else []
            for row in found:
                share, times = row.get("of_matrix_rate"), row.get("times_everywhere")
                figures = f"{'' if share is None else f'{share:.0%}':>8} {'' if times is None else f'{times:.2f}':>6}"
                place = f"{row['row']:10} {name:8} {side_px:5} {row['way']:10}"
                print(f"{place} {row['seconds']:9.4f} {row['peak_mb']:8.0f} {figures}", flush=True)
            rows += found
    if not args.dry_run:
        card = torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu"
        write_json(args.output, {**origin(), "card": card, "dtype": args.dtype, "matrix_rate": rate, "rows": rows})


if __name__ == "__main__":
    sys.exit(main())
