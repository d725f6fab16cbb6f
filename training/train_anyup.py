"""Trains a small AnyUp on the picture book, for the demonstration and for benchmarks/upsampling.py.

examples:
  python training/train_anyup.py --output anyup-tiny
      15 minutes on one CPU core
  python training/train_anyup.py --output anyup-tiny --resume
      goes on after an interruption

As AnyUp's authors train theirs (Wimmer et al., ICLR 2026, section 3.3; JAFAR's loss): a scene is drawn at two or four
times the native side. The encoder sees it whole, shrunk to the native side, and its features are upsampled to the grid
that the large drawing would have; the target are the features of a native window of the large drawing, at its place.
Without their regularisers. The encoders are those that ship with the package, in turn; the network never learns which.
OUTPUT/model gets the averaged weights (EMA), OUTPUT gets `train.log`.
"""

from __future__ import annotations

import argparse
import logging
import math
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

import spar_hf
from spar_cli.errors import caught_signals
from spar_cli.parser import Parser, path, positive, text, whole_number
from spar_cli.training_options import check_folder, run_script, script_parser
from spar_hf import SparAnyUp, SparAnyUpConfig
from spar_hf.files import clear_drafts, read_state, whole_folder, write_state
from spar_hf.picture_book.dataset import PictureBook

log = logging.getLogger("train_anyup")


def views(index: int, factor: int, native_px: int, patch_px: int) -> tuple[Tensor, Tensor, tuple[int, int]]:
    """A training scene and a window of it.

    Returns:
        The drawing (3, factor * n, factor * n), 0 to 1; its native window; the window's first row and column in
        patches of the drawing.
    """
    side_px = factor * native_px
    drawing = PictureBook("train", side_px, side_px, seed=7).scene(index).image
    image = torch.from_numpy(drawing).permute(2, 0, 1).float() / 255
    rng = np.random.default_rng([7, index])
    top, left = (int(rng.integers(0, (side_px - native_px) // patch_px + 1)) for _ in range(2))
    y, x = top * patch_px, left * patch_px
    return image, image[:, y : y + native_px, x : x + native_px], (top, left)


def loss_of(found: Tensor, target: Tensor) -> Tensor:
    """Cosine distance plus squared distance, with each target's range as the unit; (N, D) each."""
    low, high = target.amin(1, keepdim=True), target.amax(1, keepdim=True)
    distance = ((found - target) / (high - low + 1e-6)).square().mean()
    return 1 - F.cosine_similarity(found, target, dim=1).mean() + distance


def step_loss(model: SparAnyUp, encoders: list[Any], step: int, batch: int) -> Tensor:
    """The loss of one batch; which scenes, factors and encoder it has follows from the step."""
    encoder = encoders[step % len(encoders)]
    config = encoder.config
    native_px, patch_px = config.image_size, config.patch_size
    factor = (2, 4)[step // len(encoders) % 2]
    total: Any = 0
    for index in range(step * batch, (step + 1) * batch):
        image, window, (top, left) = views(index, factor, native_px, patch_px)
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (config.image_mean, config.image_std))
        small = F.interpolate(image[None], size=(native_px, native_px), mode="bicubic", antialias=True)[0]
        with torch.no_grad():
            pixels = (torch.stack([small.clamp(0, 1), window]) - mean) / std
            features, target = encoder(pixels).patch_embeds
        guide = F.interpolate(image[None], size=(native_px, native_px), mode="bilinear", antialias=True)
        rows = len(features)
        found = model(guide, features[None], (factor * rows, factor * rows))[0]
        found = found[top : top + rows, left : left + rows]
        total = total + loss_of(found.flatten(0, 1), target.flatten(0, 1))
    return total / batch


def parser() -> Parser:
    parser = script_parser(__doc__, "--output FOLDER")
    count = {"type": whole_number, "metavar": "N"}
    parser.add_argument("--output", type=path, required=True, metavar="FOLDER", help="for weights, log and state")
    parser.add_argument("--steps", **count, default=600, help="(600)")
    parser.add_argument("--batch-size", **count, default=2, help="scenes a step (2)")
    parser.add_argument("--learning-rate", type=positive, metavar="R", default=1e-3, help="(1e-3)")
    parser.add_argument("--hidden-size", **count, default=32, help="(32)")
    parser.add_argument("--encoders", nargs="+", type=text, metavar="NAME", default=["tiny", "tiny-spar"])
    parser.add_argument("--save-every", **count, default=50, help="steps between saves (50)")
    parser.add_argument("--resume", action="store_true", help="go on from the state in --output, if any")
    return parser


def main(args: argparse.Namespace) -> int:
    check_folder("--output", args.output)
    state_path = args.output / "state.safetensors"
    if state_path.exists() and not args.resume:
        raise ValueError(f"{args.output} holds a run; add --resume to go on with it, or choose another --output.")
    kept = read_state(state_path) if state_path.exists() else None
    torch.manual_seed(0)
    encoders = [spar_hf.load(name)[0].vision_model.requires_grad_(False) for name in args.encoders]
    recipe = f"{args.steps} steps of {args.batch_size}"
    source = f"trained on the picture book with {', '.join(args.encoders)} by training/train_anyup.py, {recipe}"
    model = SparAnyUp(SparAnyUpConfig(hidden_size=args.hidden_size, source=source)).train()
    average = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)

    def rate(step: int) -> float:
        return min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    first = put_back(*kept, model, average, optimiser, schedule) if kept else 0
    args.output.mkdir(parents=True, exist_ok=True)
    clear_drafts(args.output)
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.output / "train.log")],
    )
    with caught_signals() as stops:
        learn(args, state_path, model, average, encoders, optimiser, schedule, first, stops)
    if stops:
        log.info("stopped by %s; the same command with --resume goes on", signal.Signals(stops[0]).name)
        return 128 + stops[0]
    model.load_state_dict(average)
    with whole_folder(args.output / "model") as draft:
        model.eval().save_pretrained(draft)
    state_path.unlink(missing_ok=True)
    log.info("wrote %s", args.output / "model")
    return 0


def learn(
    args: argparse.Namespace,
    state_path: Path,
    model: SparAnyUp,
    average: dict[str, Tensor],
    encoders: list[Any],
    optimiser: Any,
    schedule: Any,
    first: int,
    stops: list[int],
) -> None:
    """Trains to the end, or until a signal."""
    started, losses = time.monotonic(), []
    for step in range(first, args.steps):
        if stops:
            return write_state(state_path, state_of(model, average, optimiser), {"step": step})
        loss = step_loss(model, encoders, step, args.batch_size)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                average[name].lerp_(weight, max(0.01, 1 / (step + 1)))
        losses.append(loss.item())
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            log.info(
                "step %d of %d: loss %.4f, %.2f s a step",
                step + 1, args.steps, float(np.mean(losses)), (time.monotonic() - started) / (step + 1 - first),
            )  # fmt: skip
            losses = []
            write_state(state_path, state_of(model, average, optimiser), {"step": step + 1})


def state_of(model: SparAnyUp, average: dict[str, Tensor], optimiser: Any) -> dict[str, Tensor]:
    """All that is needed to go on."""
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    tensors |= {f"average.{name}": weight for name, weight in average.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    return tensors


def put_back(
    record: dict[str, Any],
    tensors: dict[str, Tensor],
    model: SparAnyUp,
    average: dict[str, Tensor],
    optimiser: Any,
    schedule: Any,
) -> int:
    """Gives a run the state that was written down; returns the step to go on with."""
    parts: dict[str, dict[str, Tensor]] = {"model": {}, "average": {}, "optimiser": {}}
    for name, tensor in tensors.items():
        whose, _, rest = name.partition(".")
        parts[whose][rest] = tensor
    model.load_state_dict(parts["model"])
    average.update(parts["average"])
    state = optimiser.state_dict()
    for name, tensor in parts["optimiser"].items():
        index, _, key = name.partition(".")
        state["state"].setdefault(int(index), {})[key] = tensor
    optimiser.load_state_dict(state)
    step = int(record["step"])
    schedule.last_epoch = step
    for group, base in zip(optimiser.param_groups, schedule.base_lrs, strict=True):
        group["lr"] = base * schedule.lr_lambdas[0](step)
    return step


if __name__ == "__main__":
    sys.exit(run_script(parser(), main))
