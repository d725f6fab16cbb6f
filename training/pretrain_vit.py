"""Trains `tiny-vit`, the second network that ships with the package, on the picture book's drawings alone.

examples:
  python training/pretrain_vit.py --output .work/tiny-vit
      40 minutes on one free CPU core, and a part of a second that draws
  python training/pretrain_vit.py --output .work/tiny-vit --resume
      goes on after an interruption
  python benchmarks/affinity.py .work/tiny-vit/model
      whether patches of one object are alike

Self-supervised: it sees pictures, no masks, no captions, no names. Every patch is assigned to one of some prototypes,
and the assignment must not change between two views of a scene. A teacher, the average of the student's weights over
time, assigns the patches of both views, all prototypes as often (Sinkhorn-Knopp, SwAV, NeurIPS 2020). The student,
from which a part of every second view is hidden, predicts the assignment of the same place in the other view, and
that of the hidden patches in its own (iBOT, ICLR 2022), so that a patch says what it is a part of. The prototypes are
compared with the very features that methods use, without a head between: their cosine is what is learned.
The network is a small DINO: `ViTModel` with patches of 8 px. OUTPUT/model gets the teacher, OUTPUT gets `train.log`.

exit status: 0; 2 after a mistake, before anything is written; 128 + the number of the signal (130 for Ctrl-C, 143 for
SIGTERM) when one stopped the run, which then has saved its state.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import multiprocessing as mp
import signal
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tiny_model import make_optimizers, put_back, state_of
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import ViTConfig, ViTImageProcessorPil, ViTModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from vit_views import GRID, PATCH_PX, SIDE_PX, Places, allocate, draw_forever, masks, pairs

from spar_cli.errors import caught_signals
from spar_cli.parser import Parser, path, positive, whole_number, whole_number_or_0
from spar_cli.training_options import check_folder, run_script, script_parser
from spar_hf.files import clear_drafts, read_state, whole_folder, write_state

WARMUP_STEPS = 50
FIRST_SCENES = 256  # in the pool before training starts
STUDENT_TEMPERATURE, TEACHER_TEMPERATURE = 0.1, 0.05  # SwAV's
log = logging.getLogger("pretrain_vit")


class Network(nn.Module):
    """The ViT, and the prototypes that its patches are compared with."""

    def __init__(self, prototypes: int) -> None:
        super().__init__()
        config = ViTConfig(
            hidden_size=96, intermediate_size=384, num_hidden_layers=4, num_attention_heads=6,
            image_size=SIDE_PX, patch_size=PATCH_PX, layer_norm_eps=1e-6,
        )  # fmt: skip
        self.vit = ViTModel(config, add_pooling_layer=False, use_mask_token=True)
        self.prototypes = nn.Parameter(F.normalize(torch.randn(prototypes, config.hidden_size), dim=-1))

    def forward(self, pixels: Tensor, hidden: Tensor | None = None) -> Tensor:
        """Cosines (views, patches, prototypes) of pixels (views, 3, side, side); `hidden` (views, patches) unseen."""
        tokens = self.vit(pixels, bool_masked_pos=hidden).last_hidden_state[:, 1:]
        return F.normalize(tokens, dim=-1) @ F.normalize(self.prototypes, dim=-1).T


def balanced(cosines: Tensor, rounds: int = 3) -> Tensor:
    """Sinkhorn-Knopp: assignments (n, prototypes) whose rows add up to 1 and whose columns are as heavy."""
    shares = (cosines / TEACHER_TEMPERATURE).softmax(-1)
    for _ in range(rounds):
        shares = F.normalize(shares / shares.sum(0), p=1, dim=1)
    return shares


def training_loss(
    student: Network, teacher: Network, pixels: Tensor, places: Places, hidden: Tensor
) -> tuple[Tensor, Tensor]:
    """The loss across views and that of hidden patches, for pixels (2n, 3, side, side), first views first."""
    with torch.no_grad():
        targets = teacher(pixels)
        targets = balanced(targets.flatten(0, 1)).view_as(targets)
        other = Places(*(field.roll(len(field) // 2) for field in places))
        at = other.to_view(places.centres())  # (2n, grid, grid, 2)
        maps = targets.roll(len(targets) // 2, 0).transpose(1, 2).unflatten(2, (GRID, GRID))
        across = F.grid_sample(maps, at, mode="bilinear", padding_mode="border", align_corners=False)
        across = across.flatten(2).transpose(1, 2)  # (2n, patches, prototypes)
        shared = (at.abs() < 1).all(-1).flatten(1)
    found = (student(pixels, hidden) / STUDENT_TEMPERATURE).log_softmax(-1)
    losses = -(across * found).sum(-1), -(targets * found).sum(-1)
    return losses[0][shared].mean(), losses[1][hidden].mean()


def save(folder: Path, network: Network) -> None:
    """Writes the folder that `ViTModel.from_pretrained` and `--network dino=FOLDER` read."""
    vit = ViTModel(network.vit.config, add_pooling_layer=False)
    vit.load_state_dict(
        {name: value for name, value in network.vit.state_dict().items() if name != "embeddings.mask_token"}
    )
    size = {"height": SIDE_PX, "width": SIDE_PX}
    processor = ViTImageProcessorPil(size=size, image_mean=IMAGENET_DEFAULT_MEAN, image_std=IMAGENET_DEFAULT_STD)
    with whole_folder(folder) as draft:
        for part in (vit.half(), processor):
            part.save_pretrained(draft)


def parser() -> Parser:
    parser = script_parser(__doc__, "--output FOLDER")
    count = {"type": whole_number, "metavar": "N"}
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="for weights, log and state")
    parser.add_argument("--steps", **count, default=4_000, help="the learning rate ends with them (4000)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output, if any")
    parser.add_argument("--prototypes", **count, default=128, help="(128)")
    parser.add_argument("--batch-size", **count, default=16, help="scenes a step, two views each (16)")
    parser.add_argument("--learning-rate", type=positive, metavar="R", default=1.5e-3, help="(1.5e-3)")
    parser.add_argument("--pool-scenes", **count, default=3_000, help="kept in memory, 197 KB each (3000)")
    parser.add_argument("--save-minutes", type=positive, metavar="M", default=3, help="between saves (3)")
    parser.add_argument("--threads", **count, default=1, help="(1)")
    parser.add_argument("--seed", type=whole_number_or_0, metavar="N", default=0, help="(0)")
    return parser


def main(args: argparse.Namespace) -> int:
    state_file, tensors = args.output / "state.safetensors", None
    counts = {"step": 0, "scenes_drawn": 0, "elapsed_s": 0.0}
    check_folder("--output", args.output)
    first_scenes = min(FIRST_SCENES, args.pool_scenes)
    if args.batch_size > first_scenes:
        raise ValueError(f"--batch-size is {args.batch_size}; the pool starts with {first_scenes}.")
    if args.resume and state_file.exists():
        counts, tensors = read_state(state_file)
    elif state_file.exists():
        raise ValueError(f"{args.output} holds a run; add --resume to go on with it, or choose another --output.")
    args.output.mkdir(parents=True, exist_ok=True)
    clear_drafts(args.output)
    handlers = [logging.StreamHandler(sys.stdout), logging.FileHandler(args.output / "train.log")]
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", handlers=handlers)
    drawn_before = counts["scenes_drawn"]

    # The drawing process is forked before PyTorch starts threads of its own.
    fork = mp.get_context("fork")
    pictures, drawn, used = allocate(args.pool_scenes), fork.Value("q", 0), fork.Value("q", 0)
    fork.Process(target=draw_forever, args=(pictures, drawn, used, args.seed, drawn_before), daemon=True).start()

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    student = Network(args.prototypes)
    teacher = copy.deepcopy(student).requires_grad_(False)
    optimizers = make_optimizers(student, weight_decay=0.05)
    if tensors is not None:
        put_back(tensors, student, teacher, optimizers)
    rng = np.random.default_rng([args.seed, drawn_before])
    log.info("%.2f M parameters", sum(p.numel() for p in student.vit.parameters()) / 1e6)
    while drawn.value < first_scenes:
        time.sleep(0.1)

    started_s = time.monotonic() - counts["elapsed_s"]
    saved_s, sums = counts["elapsed_s"], []
    with caught_signals() as stops:
        while not stops and counts["step"] < args.steps:
            counts["elapsed_s"] = time.monotonic() - started_s
            cosine = (1 + math.cos(math.pi * counts["step"] / args.steps)) / 2
            for group in (group for optimizer in optimizers for group in optimizer.param_groups):
                group["lr"] = args.learning_rate * min(1.0, (counts["step"] + 1) / WARMUP_STEPS) * max(cosine, 0.01)
            slots = rng.choice(min(drawn.value, args.pool_scenes), args.batch_size, replace=False)
            pixels, places = pairs(pictures[slots], rng)
            losses = training_loss(student, teacher, pixels, places, masks(len(pixels), rng))
            sum(losses).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            counts["step"] += 1
            used.value += len(pixels)
            counts["scenes_drawn"] = drawn_before + drawn.value
            momentum = 0.999 - 0.009 * cosine  # the teacher settles as the student does
            with torch.no_grad():
                torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)
            sums.append([loss.item() for loss in losses])
            if counts["step"] % 25 == 0:
                means, minutes = np.mean(sums, axis=0), counts["elapsed_s"] / 60
                log.info("step %d  %.1f min  across %.3f  hidden %.3f", counts["step"], minutes, *means)
                sums.clear()
            if counts["elapsed_s"] - saved_s > 60 * args.save_minutes:
                saved_s = counts["elapsed_s"]
                save(args.output / "model", teacher)
                write_state(state_file, state_of(student, teacher, optimizers), counts)

    write_state(state_file, state_of(student, teacher, optimizers), counts)
    if stops:
        name = signal.Signals(stops[0]).name
        log.info("stopped by %s after step %d; the same command with --resume goes on", name, counts["step"])
        return 128 + stops[0]
    save(args.output / "model", teacher)
    log.info("wrote %s", args.output / "model")
    return 0


if __name__ == "__main__":
    sys.exit(run_script(parser(), main))
