"""Trains a small AnyUp on the picture book, for the demonstration and for benchmarks/upsampling.py.

    python training/train_anyup.py --output anyup-tiny               # 15 minutes on one CPU core
    python training/train_anyup.py --output anyup-tiny --resume      # goes on after an interruption

As AnyUp's authors train theirs (Wimmer et al., ICLR 2026, section 3.3; JAFAR's loss): a scene is drawn at two or four
times the native side. The encoder sees it whole, shrunk to the native side, and its features are upsampled to the grid
that the large drawing would have; the target are the features of a native window of the large drawing, at its place.
Without their regularisers. The encoders are those that ship with the package, in turn; the network never learns which.
The folder gets the averaged weights (EMA) and `train.log`.
"""

from __future__ import annotations

import argparse
import logging
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor
from torch.nn import functional as F

import spar_hf
from spar_hf import SparAnyUp, SparAnyUpConfig
from spar_hf.files import write_atomically
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


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--batch", type=int, default=2, help="scenes a step")
    parser.add_argument("--learning_rate", type=float, default=1e-3)
    parser.add_argument("--hidden_size", type=int, default=32)
    parser.add_argument("--encoders", nargs="+", default=["tiny", "tiny-spar"], help="checkpoints")
    parser.add_argument("--save_every", type=int, default=50)
    parser.add_argument("--resume", action="store_true")
    args = parser.parse_args(argv)
    if min(args.steps, args.batch, args.save_every) < 1:
        parser.error("--steps, --batch and --save_every must be at least 1")
    args.output.mkdir(parents=True, exist_ok=True)
    state_path = args.output / "state.safetensors"
    if state_path.exists() and not args.resume:
        parser.error(f"{state_path} is there already; go on with --resume, or give another folder")
    logging.basicConfig(
        level=logging.INFO,
        format="%(message)s",
        handlers=[logging.StreamHandler(), logging.FileHandler(args.output / "train.log")],
    )
    torch.manual_seed(0)
    encoders = [spar_hf.load(name)[0].vision_model.requires_grad_(False) for name in args.encoders]
    source = f"trained on the picture book with {', '.join(args.encoders)} by training/train_anyup.py"
    model = SparAnyUp(SparAnyUpConfig(hidden_size=args.hidden_size, source=source)).train()
    average = {name: weight.detach().clone() for name, weight in model.state_dict().items()}
    optimiser = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.0)

    def rate(step: int) -> float:
        return min((step + 1) / 50, 0.5 + 0.5 * math.cos(math.pi * step / args.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, rate)
    first = load_state(state_path, model, average, optimiser, schedule) if args.resume else 0
    started, losses = time.monotonic(), []
    for step in range(first, args.steps):
        loss = step_loss(model, encoders, step, args.batch)
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
            save_state(state_path, model, average, optimiser, step + 1)
    model.load_state_dict(average)
    model.eval().save_pretrained(args.output)
    state_path.unlink(missing_ok=True)
    log.info("wrote %s", args.output)


def save_state(path: Path, model: SparAnyUp, average: dict[str, Tensor], optimiser: Any, step: int) -> None:
    """All that is needed to go on, whole or absent."""
    tensors = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    tensors |= {f"average.{name}": weight for name, weight in average.items()}
    for index, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{index}.{key}": torch.as_tensor(value) for key, value in state.items()}
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    record = {"step": str(step)}
    write_atomically(path, save(tensors, metadata=record))


def load_state(path: Path, model: SparAnyUp, average: dict[str, Tensor], optimiser: Any, schedule: Any) -> int:
    """Reads what `save_state` wrote; returns the step to go on with."""
    if not path.exists():
        raise SystemExit(f"there is no {path} to go on from; leave --resume out.")
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no dictionary
        record = file.metadata()
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
    main()
