"""Distils any dense teacher into one forward pass: mean squared error of student(x) and teacher(x), nothing else.

    # SPAR (CVPR 2026): the last two blocks learn from sliding windows of the same network, on unlabelled images
    accelerate launch training/distill.py --student openai/clip-vit-base-patch16 --tars sa1b/ --max-images 25000 \\
        --output runs/spar
    # the same with stored teacher features and a stored trunk (training/cache_teacher.py with the same flags first)
    accelerate launch training/distill.py --student openai/clip-vit-base-patch16 --tars sa1b/ --max-images 25000 \\
        --cache sa1b-features --trunk-blocks 2 --output runs/spar
    # a stronger teacher than the paper's
    accelerate launch training/distill.py --student openai/clip-vit-base-patch16 --images photos/ \\
        --teacher-method naclip --output runs/naclip
    # two processes on CPUs, no accelerator
    ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 training/distill.py ...
    # go on after an interruption (SIGTERM, Ctrl-C, a kill, a full disk)
    accelerate launch training/distill.py ... --output runs/spar --resume

OUTPUT/model is a folder for `AutoModel.from_pretrained` and `spar_hf.load`; OUTPUT/run.json says what made it.
Runs on CPUs and GPUs, one or many (DDP, FSDP): `training/recipes/*.yaml`. A step is processes x accumulate batches;
how that product is split changes nothing, as the loss is the mean over a step's images and the seed fixes the order.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm.auto import tqdm
from transformers import get_scheduler

from spar_cli.training_options import (
    BadImages,
    Parser,
    RunStopped,
    add_data_flags,
    add_teacher_flags,
    build_views,
    run_script,
)
from spar_hf.checkpoints import load_tower
from spar_hf.distillation.batches import Batch, Batches, plan_steps, share_of
from spar_hf.distillation.cache import FeatureStore
from spar_hf.distillation.checkpoint import load_checkpoint, save_checkpoint
from spar_hf.distillation.selection import first_trained_block, set_trainable
from spar_hf.distillation.teacher import (
    Student,
    build_teacher,
    describe_trunk,
    linear_head,
    load_student,
    mean_feature,
    teacher_features,
)
from spar_hf.files import weights_digest, write_atomically, write_json
from spar_hf.hub.publish import publish


def mse(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """SPAR, section 3: on features that are not normalised."""
    return (student - teacher).square().mean(dim=(1, 2, 3))


def distance(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """Length of the difference, not squared: where the teacher is uncertain its median is learned, not its mean."""
    return (student - teacher).norm(dim=-1).mean(dim=(1, 2))


def cosine(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """One minus the cosine: the length of a feature is free."""
    return 1 - F.cosine_similarity(student, teacher, dim=-1).mean(dim=(1, 2))


def centred_cosine(student: torch.Tensor, teacher: torch.Tensor, centre: torch.Tensor) -> torch.Tensor:
    """The cosine of what differs from the teacher's mean over the data: the direction all features share is free."""
    return cosine(student - centre, teacher - centre, centre)


# (B, h, w, D), (B, h, w, D), (D,) -> (B,)
LOSSES: dict[str, Callable] = {"mse": mse, "distance": distance, "cosine": cosine, "centred-cosine": centred_cosine}
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")  # of transformers.get_scheduler


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder of the run")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if any")
    parser.add_argument("--train", default="last:2", help="last:N, all, positions, patch-embed, joined by commas")
    parser.add_argument("--loss", choices=LOSSES, default="mse", help="SPAR, section 3: mse")
    parser.add_argument(
        "--head",
        choices=("none", "linear"),
        default="none",
        help="compare through the best linear map from the student's start to the teacher; SPAR: none",
    )
    parser.add_argument("--learning-rate", type=float, default=2e-5, help="SPAR, section 4: 2e-5")
    parser.add_argument("--weight-decay", type=float, default=1e-4, help="SPAR, section 4: 1e-4")
    parser.add_argument("--schedule", default="constant", choices=SCHEDULES, help="SPAR, section 4: constant")
    parser.add_argument("--warmup-steps", type=int, default=0)
    parser.add_argument("--epochs", type=int, default=10, help="SPAR, section 4: 10")
    parser.add_argument("--max-steps", type=int, help="stop after so many steps")
    parser.add_argument("--batch-size", type=int, default=1, help="images of equal size per process; SPAR: 1")
    parser.add_argument("--accumulate", type=int, default=1, help="batches per process and step")
    parser.add_argument("--clip-norm", type=float, help="clip the gradient to that norm")
    parser.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="`accelerate config`'s; SPAR: fp16")
    parser.add_argument("--cache", type=Path, help="features of training/cache_teacher.py; on line when not given")
    parser.add_argument("--draws", type=int, help="views of each image: one per epoch on line, 1 with --cache")
    parser.add_argument("--trunk-blocks", type=int, default=0, help="train on the stored input of the last N blocks")
    parser.add_argument("--save-every", type=int, default=500, help="steps between checkpoints; the last two are kept")
    parser.add_argument("--log-every", type=int, default=10, help="steps between lines of log.jsonl and the tracker")
    parser.add_argument("--tracker", choices=("tensorboard", "trackio", "wandb", "none"), default="tensorboard")
    parser.add_argument("--seed", type=int, default=0, help="of the order of training")
    parser.add_argument("--evaluate-scales", type=float, nargs="*", default=[], help="picture book, times native side")
    parser.add_argument("--evaluate-limit", type=int, default=50, help="scenes of each evaluation")
    parser.add_argument("--push-to-hub", metavar="REPO_ID", help="publish the result there")
    add_teacher_flags(parser)
    add_data_flags(parser)
    return parser.parse_args()


def distillation_loss(
    student: nn.Module,
    teacher: nn.Module | None,
    batch: Batch,
    loss: Callable,
    centre: torch.Tensor,
    head: torch.Tensor | None = None,
) -> torch.Tensor:
    """The whole method: loss(student(x), teacher(x)), one number per image, (B,).

    `head` is the affine map (1 + D, D) that goes between, see `linear_head`.
    """
    x = batch.inputs.to(centre.device, non_blocking=True)
    if not batch.images:  # nothing to learn from, but the processes average their gradients together
        return student(x).sum(dim=(1, 2, 3)) * 0
    target = teacher_features(teacher, x) if batch.target is None else batch.target.to(centre.device)
    found = student(x, batch.grid_hw).float()
    if head is not None:
        found = head[0] + found @ head[1:]
    return loss(found, target.float(), centre)


def main() -> None:
    args = parse_flags()
    tracker = None if args.tracker == "none" else args.tracker
    if tracker and tracker not in map(str, get_available_trackers()):
        raise ValueError(f"--tracker {tracker} is not installed; pip install {tracker}, or give --tracker none.")
    if args.trunk_blocks and not args.cache:
        raise ValueError("--trunk-blocks trains on a stored trunk; give the --cache that holds it.")
    if not args.resume and any(args.output.glob("checkpoint-*")):
        raise ValueError(f"{args.output} holds a run; add --resume to go on with it, or choose another --output.")
    args.output.mkdir(parents=True, exist_ok=True)
    accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=tracker, project_dir=args.output)
    set_seed(args.seed)
    say, processes, device = accelerator.print, accelerator.num_processes, accelerator.device

    # Student, teacher, data.
    _, vision, _ = load_student(args)
    start_weights = weights_digest(vision)
    student = Student(vision, vision.trunk_end(args.trunk_blocks) if args.trunk_blocks else 0)
    native_px = vision.config.image_size
    noise = torch.randint(256, (1, native_px, native_px, 3), dtype=torch.uint8)
    unreached = set_trainable(vision, args.train, probe=lambda: student(noise))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if args.trunk_blocks and first_trained_block(vision) < student.first_block:
        raise ValueError(f"--train {args.train} reaches blocks before the last {args.trunk_blocks}, which are stored.")
    with accelerator.main_process_first():
        teacher, teacher_is = build_teacher(args)
        views = build_views(args, vision.config.patch_size, args.draws or (1 if args.cache else args.epochs))
        trunk_is = describe_trunk(vision, student.first_block) if args.trunk_blocks else None
        made_from = {**views.describe(), "teacher": teacher_is, "trunk": trunk_is}
        store = FeatureStore.open(args.cache, made_from) if args.cache else None
    for field in ("patch_size", "projection_dim"):
        ours, theirs = getattr(vision.config, field), getattr(teacher.config, field)
        if ours != theirs:
            raise ValueError(f"the teacher's {field} is {theirs} and the student's {ours}; they must be the same.")
    teacher = None if store else teacher.to(device)
    bad = BadImages(args.max_bad_images, tqdm.write if accelerator.is_main_process else lambda line: None)
    bad.add({**views.bad, **(store.bad if store else {})})
    centre = torch.zeros(1)
    if store or args.loss == "centred-cosine":
        centre, length = mean_feature(teacher, store, views)
        say(f"teacher features: length {length:.2f} (root mean square), {centre.norm():.2f} of it common to all")
    centre = centre.to(device)
    head = linear_head(student, teacher, store, views).to(device) if args.head == "linear" else None

    # Plan, optimiser, last checkpoint.
    steps = plan_steps(views, store, args.epochs, args.batch_size, processes * args.accumulate, args.seed)
    steps = steps[: args.max_steps]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.schedule, optimizer, args.warmup_steps, len(steps))
    learning = ("train", "loss", "head", "learning_rate", "weight_decay", "schedule", "warmup_steps", "clip_norm")
    made_from |= {name: getattr(args, name) for name in (*learning, "batch_size", "seed")}
    made_from |= {"student": start_weights, "student_runs": vision.config.features_depend_on()}
    made_from |= {"batches_per_step": processes * args.accumulate, "steps": len(steps)}
    student, stepper = accelerator.prepare(student, optimizer)
    first = load_checkpoint(args.output, accelerator, student, optimizer, scheduler, made_from)
    if first:
        say(f"going on after step {first}")
    say(f"{len(views.images)} images, {len(steps)} steps, {sum(p.numel() for p in trained) / 1e6:.2f} M weights train")
    if unreached:
        say(f"frozen, as the loss does not depend on them: {', '.join(unreached)}")
    run = {**describe_run(args, accelerator), "made_from": made_from}
    if accelerator.is_main_process:
        write_json(args.output / "run.json", run)
    log = Log(args.output / "log.jsonl", first) if accelerator.is_main_process else None
    if tracker:
        accelerator.init_trackers("distill")

    stops: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stops.append(number))
    share = share_of(steps[first:], accelerator.process_index, processes, args.accumulate)
    batches = iter(Batches(share, views, store, bool(args.trunk_blocks)).loader(args.workers, device.type == "cuda"))
    bar = tqdm(total=len(steps), initial=first, unit="step", disable=not accelerator.is_main_process)
    # Since the last log line: sum of losses, images; when it was.
    totals, since = torch.zeros(2, device=device), time.perf_counter()
    student.train()
    for step in range(first, len(steps)):
        todo = [next(batches) for _ in range(args.accumulate)]
        unread = {name: reason for batch in todo for name, reason in batch.bad.items()}
        counts = torch.tensor([sum(len(batch.images) for batch in todo), len(unread), len(stops)], device=device)
        num_images, num_unread, num_stops = accelerator.reduce(counts, "sum").tolist()
        if num_stops:
            save_checkpoint(args.output, accelerator, student, optimizer, scheduler, step, made_from)
            bar.close()
            accelerator.end_training()
            return say(f"stopped by a signal after step {step}; the same command with --resume goes on.")
        if num_unread:
            bad.add({name: reason for part in gather_object([unread]) for name, reason in part.items()})

        for i, batch in enumerate(todo):
            # The processes average their gradients once a step, with the last batch.
            with contextlib.nullcontext() if i == args.accumulate - 1 else accelerator.no_sync(student):
                losses = distillation_loss(student, teacher, batch, LOSSES[args.loss], centre, head)
                if not losses.isfinite().all():
                    raise RunStopped(f"the loss is {losses.tolist()} in step {step + 1}: {', '.join(batch.images)}.")
                # Mean over the images of the step, whichever process has them.
                accelerator.backward(losses.sum() * processes / max(num_images, 1))
                totals += torch.stack([losses.detach().sum(), losses.new_tensor(len(batch.images))])
        if args.clip_norm:
            accelerator.clip_grad_norm_(trained, args.clip_norm)
        if num_images:
            stepper.step()
        scheduler.step()
        stepper.zero_grad()
        bar.update()

        done, last = step + 1, step + 1 == len(steps)
        if done % args.log_every == 0 or last:
            loss, images = accelerator.reduce(totals, "sum").tolist()
            rate = images / (time.perf_counter() - since)
            line = {"loss": loss / max(images, 1), "images_per_second": rate, "lr": scheduler.get_last_lr()[0]}
            bar.set_postfix(loss=f"{line['loss']:.4g}", images_per_s=f"{rate:.1f}")
            accelerator.log(line, step=done)
            if log:
                log.write({"step": done, **line})
            totals.zero_()
            since = time.perf_counter()
        if done % args.save_every == 0 or last:
            save_checkpoint(args.output, accelerator, student, optimizer, scheduler, done, made_from)
    bar.close()

    weights = get_model_state_dict(student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    accelerator.end_training()
    if accelerator.is_main_process:
        finish(args, {name.removeprefix("vision."): weight for name, weight in weights.items()}, run)
        say(f"images that could not be read: {len(bad.reasons)}")


# --- The record and the result ------------------------------------------------------------------------------------


class Log:
    """log.jsonl: a line every --log-every steps. Lines of steps that a resumed run does again are dropped."""

    def __init__(self, path: Path, first: int):
        lines = path.read_text().splitlines(keepends=True) if path.exists() else []
        # A kill may have cut the last line.
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= first]
        write_atomically(path, "".join(kept).encode())
        self.file = open(path, "a")  # noqa: SIM115

    def write(self, line: dict[str, Any]) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()


def describe_run(args: argparse.Namespace, accelerator: Accelerator) -> dict[str, Any]:
    """Command, seed, versions and revision, for run.json."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(Path(__file__).parent), *words]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()

    revision = git("rev-parse", "HEAD") + ("-modified" if git("status", "--porcelain", "-uno") else "")
    packages = ("spar-hf", "torch", "transformers", "accelerate", "numpy", "pillow")
    return {
        "command": shlex.join(["python", *sys.argv]),
        "seed": args.seed,
        "git_revision": revision or None,
        "versions": {"python": sys.version.split()[0], **{name: version(name) for name in packages}},
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
    }


def finish(args: argparse.Namespace, weights: dict[str, torch.Tensor], run: dict[str, Any]) -> None:
    """Writes OUTPUT/model, the starting checkpoint with the new vision tower; evaluates; publishes."""
    model, vision, processor = load_student(args)
    vision.load_state_dict(weights)
    made_from = run["made_from"]
    kept = ["data", "augmentation", "augmentation_seed", "draws"]
    kept += ["train", "loss", "head", "learning_rate", "steps", "seed"]
    record = {**made_from["teacher"], **{name: made_from[name] for name in kept}, "git_revision": run["git_revision"]}
    for config in (vision.config, getattr(model.config, "vision_config", vision.config)):
        config.teacher = record
    draft, folder = args.output / "model.tmp", args.output / "model"
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft)
    if processor is not None:
        processor.save_pretrained(draft)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(draft, folder)
    print(f"wrote {folder}")
    if args.evaluate_scales:
        evaluate_picture_book(args, model, processor)
    if args.push_to_hub:
        print(f"published {publish(folder, args.push_to_hub).url}")


def evaluate_picture_book(args: argparse.Namespace, student: nn.Module, processor: Any) -> None:
    """Mean IoU in one pass before and after, in metrics.json. The teacher's: `spar evaluate --stride-px 24`."""
    from spar_hf.evaluation import evaluate, load_benchmark
    from spar_hf.segmentation_spar import FromFeatures

    start, _, _ = load_tower(args.student)
    native_px = student.vision_model.config.image_size
    metrics: dict[str, dict[str, float]] = {}
    for scale in args.evaluate_scales:
        data = load_benchmark("picturebook", scale=scale, native_px=native_px)
        for name, model in (("start", start), ("student", student)):
            result = evaluate(
                FromFeatures(model.vision_model, model, processor), processor, data, limit=args.evaluate_limit
            )
            metrics.setdefault(name, {})[f"{scale:g}x"] = result.mean_iou
        print(f"picture book {scale:g}x: mean IoU {100 * metrics['start'][f'{scale:g}x']:.1f} -> "
              f"{100 * metrics['student'][f'{scale:g}x']:.1f}")  # fmt: skip
    write_json(args.output / "metrics.json", {"mean_iou": metrics, "scenes": args.evaluate_limit})


if __name__ == "__main__":
    run_script(main)
