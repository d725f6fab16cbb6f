"""Distils any dense teacher into one forward pass: mean squared error of student(x) and teacher(x), nothing else.

examples:
  accelerate launch training/distill.py --student openai/clip-vit-base-patch16 --tars sa1b/ --max-images 25000 \\
      --output runs/spar
      SPAR (CVPR 2026): the last two blocks learn from sliding windows of the same network, on unlabelled images
  accelerate launch training/distill.py --student openai/clip-vit-base-patch16 --tars sa1b/ --max-images 25000 \\
      --cache sa1b-features --trunk-blocks 2 --output runs/spar
      the same with stored teacher features and a stored trunk (training/cache_teacher.py with the same flags first)
  accelerate launch training/distill.py --student openai/clip-vit-base-patch16 --images photos/ \\
      --teacher-method naclip --output runs/naclip
      a stronger teacher than the paper's
  python training/distill.py --student tiny --picture-book 40 --output runs/try --max-steps 20 --tracker none \\
      --long-side-px 384 --short-side-px 384 --min-side-px 128 --stride-px 64
      a minute on a CPU, without any data
  ACCELERATE_USE_CPU=true torchrun --nproc-per-node 2 training/distill.py ...
      two processes on CPUs, no accelerator
  accelerate launch training/distill.py ... --output runs/spar --resume
      goes on after an interruption (SIGTERM, Ctrl-C, a kill, a full disk)

OUTPUT/model is a folder for `AutoModel.from_pretrained` and `spar_hf.load`; OUTPUT/run.json says what made it.
Runs on CPUs and GPUs, one or many (DDP, FSDP): `training/recipes/*.yaml`. A step is processes x accumulate batches;
how that product is split changes nothing, as the loss is the mean over a step's images and the seed fixes the order.

exit status: 0; 2 after a mistake, before anything is written, or when the run can't go on; 128 + the number of the
signal (130 for Ctrl-C, 143 for SIGTERM) when one stopped the run, which then has saved a checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import shlex
import signal
import sys
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import gather_object, set_seed
from huggingface_hub.utils import validate_repo_id
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from tqdm.auto import tqdm
from transformers import get_scheduler

from spar_cli.errors import caught_signals
from spar_cli.parser import Parser, path, positive, positive_or_0, text, whole_number, whole_number_or_0
from spar_cli.training_options import (
    DATA_USAGE,
    BadImages,
    RunStopped,
    add_data_flags,
    add_teacher_flags,
    build_views,
    check_folder,
    run_script,
    script_parser,
    student_spec,
    teacher_spec,
)
from spar_hf.distillation.batches import Batches, plan_steps, share_of
from spar_hf.distillation.cache import FeatureStore, read_cache_json
from spar_hf.distillation.checkpoint import checkpoints, load_checkpoint, save_checkpoint
from spar_hf.distillation.log import Log, read_log
from spar_hf.distillation.losses import LOSSES, distillation_loss
from spar_hf.distillation.result import describe_software, evaluate_before_and_after, write_student
from spar_hf.distillation.selection import first_trained_block, set_trainable
from spar_hf.distillation.specs import StudentSpec, TeacherSpec
from spar_hf.distillation.teacher import (
    Student,
    build_teacher,
    describe_trunk,
    linear_head,
    load_student,
    mean_feature,
)
from spar_hf.distillation.views import Views
from spar_hf.files import clear_drafts, weights_digest, write_json
from spar_hf.hub.publish import publish

HEADS = ("none", "linear")  # linear: the best map from the student's start to the teacher, see `linear_head`
SCHEDULES = ("constant", "constant_with_warmup", "linear", "cosine")  # of transformers.get_scheduler


def parser() -> Parser:
    parser = script_parser(__doc__, f"{DATA_USAGE} --output FOLDER")
    count = {"type": whole_number, "metavar": "N"}
    count_or_0 = {"type": whole_number_or_0, "metavar": "N"}
    group = parser.add_argument_group("run")
    group.add_argument("--output", type=path, metavar="FOLDER", required=True, help="folder of the run")
    group.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output, if any")
    group.add_argument("--cache", type=path, metavar="FOLDER", help="features of training/cache_teacher.py")
    group.add_argument("--draws", **count, help="views of each image: one per epoch on line, 1 with --cache")
    group.add_argument(
        "--trunk-blocks", **count_or_0, default=0, help="learn on the stored input of the last N blocks"
    )
    group.add_argument("--save-every", **count, default=500, help="steps between checkpoints, two are kept (500)")
    group.add_argument("--log-every", **count, default=10, help="steps between lines of log.jsonl and tracker (10)")
    group.add_argument("--tracker", choices=("tensorboard", "trackio", "wandb", "none"), default="tensorboard")
    scales = {"type": positive, "nargs": "*", "metavar": "K", "default": []}
    group.add_argument("--evaluate-scales", **scales, help="at the end, on the picture book, K times the native side")
    group.add_argument("--evaluate-limit", **count, default=50, help="scenes of each evaluation (50)")
    group.add_argument("--push-to-hub", type=text, metavar="OWNER/NAME", help="publish the result there")

    group = parser.add_argument_group("learning (defaults: SPAR, section 4)")
    group.add_argument("--train", default="last:2", help="last:N, all, positions, patch-embed, several by commas")
    group.add_argument("--loss", choices=LOSSES, default="mse", help="SPAR, section 3: mse")
    group.add_argument("--head", choices=HEADS, default="none", help="the student is compared through it; SPAR: none")
    group.add_argument("--learning-rate", type=positive, metavar="R", default=2e-5, help="(2e-5)")
    group.add_argument("--weight-decay", type=positive_or_0, metavar="R", default=1e-4, help="(1e-4)")
    group.add_argument("--schedule", choices=SCHEDULES, default="constant", help="of the learning rate (constant)")
    group.add_argument("--warmup-steps", **count_or_0, default=0, help="of the other schedules (0)")
    group.add_argument("--epochs", **count, default=10, help="(10)")
    group.add_argument("--max-steps", **count, help="stop after so many steps")
    group.add_argument("--batch-size", **count, default=1, help="images of equal size per process (1)")
    group.add_argument("--accumulate", **count, default=1, help="batches per process and step (1)")
    group.add_argument("--clip-norm", type=positive, metavar="R", help="clip the gradient to that norm")
    group.add_argument("--mixed-precision", choices=("no", "bf16", "fp16"), help="`accelerate config`'s; SPAR: fp16")
    group.add_argument("--seed", **count_or_0, default=0, help="of the order of training (0)")
    add_teacher_flags(parser)
    add_data_flags(parser)
    return parser


def check(args: argparse.Namespace) -> None:
    """Raises a `ValueError` for flags that don't go together, before anything is loaded."""
    if args.tracker != "none" and args.tracker not in map(str, get_available_trackers()):
        raise ValueError(f"--tracker {args.tracker} is not installed; pip install it, or give --tracker none.")
    if args.trunk_blocks and not args.cache:
        raise ValueError("--trunk-blocks trains on a stored trunk; give the --cache that holds it.")
    if args.warmup_steps and args.schedule == "constant":
        raise ValueError("--warmup-steps has no part in --schedule constant; choose constant_with_warmup.")
    if args.learning_rate * args.weight_decay >= 1:
        raise ValueError(
            "--learning-rate times --weight-decay must be below 1: each step takes that part of the weights."
        )
    if args.push_to_hub:
        validate_repo_id(args.push_to_hub)
    check_folder("--output", args.output)
    if not args.resume and checkpoints(args.output):
        raise ValueError(f"{args.output} holds a run; add --resume to go on with it, or choose another --output.")
    if (args.output / "model").exists() and not (args.output / "run.json").exists():
        raise ValueError(f"{args.output} holds a model that is of no run; choose another --output.")


def settled(spec: TeacherSpec, cache: Path | None, device: torch.device) -> TeacherSpec:
    """The teacher with `auto` settled: the type that its stored features were made in, or the device's fastest."""
    if cache is None or spec.dtype != "auto":
        return spec.on(device)
    return replace(spec, dtype=read_cache_json(cache)["made_from"]["teacher"]["dtype"])


@dataclass
class Run:
    """Everything that training needs. `student`, `stepper`: the network and `optimizer` as accelerate has them."""

    args: argparse.Namespace
    accelerator: Accelerator
    specs: tuple[StudentSpec, TeacherSpec]
    student: nn.Module
    trained: list[nn.Parameter]
    optimizer: torch.optim.Optimizer
    stepper: Any
    scheduler: Any
    teacher: nn.Module | None
    store: FeatureStore | None
    views: Views
    steps: list[list[list[int]]]
    centre: torch.Tensor
    head: torch.Tensor | None
    bad: BadImages
    made_from: dict[str, Any]
    first: int = 0
    lines: list[dict[str, Any]] = field(default_factory=list)  # of log.jsonl, up to `first`

    def save(self, step: int) -> None:
        state = self.accelerator, self.student, self.optimizer, self.scheduler
        save_checkpoint(self.args.output, *state, step, self.made_from)

    def load(self) -> None:
        """Goes on from the last checkpoint, if any."""
        state = self.accelerator, self.student, self.optimizer, self.scheduler
        say = self.accelerator.print
        self.first = load_checkpoint(self.args.output, *state, self.made_from, say)
        if self.first:
            say(f"going on after step {self.first}")
            written = read_log(self.args.output / "log.jsonl", say)
            self.lines = [line for line in written if line["step"] <= self.first]


def prepare(args: argparse.Namespace) -> Run:
    """Student, teacher, data, plan and optimiser, at the last checkpoint. Writes nothing."""
    check(args)
    tracker = None if args.tracker == "none" else args.tracker
    accelerator = Accelerator(mixed_precision=args.mixed_precision, log_with=tracker, project_dir=args.output)
    set_seed(args.seed)
    say, device = accelerator.print, accelerator.device
    specs = student_spec(args), settled(teacher_spec(args), args.cache, device)
    _, vision, processor = load_student(specs[0])
    native_px, patch_px = vision.config.image_size, vision.config.patch_size
    if args.evaluate_scales and min(args.evaluate_scales) * native_px < patch_px:
        raise ValueError(f"--evaluate-scales has {min(args.evaluate_scales)}, less than a patch; give larger ones.")
    if args.evaluate_scales and processor is None:
        raise ValueError(f"--evaluate-scales needs a text tower, and {args.student} is a vision tower; leave it out.")
    start_weights = weights_digest(vision)
    student = Student(vision, vision.trunk_end(args.trunk_blocks) if args.trunk_blocks else 0)
    noise = torch.randint(256, (1, native_px, native_px, 3), dtype=torch.uint8)
    unreached = set_trainable(vision, args.train, probe=lambda: student(noise))
    trained = [parameter for parameter in student.parameters() if parameter.requires_grad]
    if args.trunk_blocks and first_trained_block(vision) < student.first_block:
        raise ValueError(f"--train {args.train} reaches blocks before the last {args.trunk_blocks}, which are stored.")
    with accelerator.main_process_first():
        teacher, teacher_is = build_teacher(specs[1], specs[0], patch_px)
        views = build_views(args, patch_px, args.draws or (1 if args.cache else args.epochs))
        trunk_is = describe_trunk(vision, student.first_block) if args.trunk_blocks else None
        made_from = {**views.describe(), "teacher": teacher_is, "trunk": trunk_is}
        store = FeatureStore.open(args.cache, made_from) if args.cache else None
        if store and accelerator.is_main_process:
            store.check_pictures(views)
    for name in ("patch_size", "projection_dim"):
        ours, theirs = getattr(vision.config, name), getattr(teacher.config, name)
        if ours != theirs:
            raise ValueError(f"the teacher's {name} is {theirs} and the student's {ours}; they must be the same.")
    teacher = None if store else teacher.to(device)
    bad = BadImages(args.max_bad_images, tqdm.write if accelerator.is_main_process else lambda line: None)
    bad.add({**views.bad, **(store.bad if store else {})})
    centre = torch.zeros(1)
    if store or args.loss == "centred-cosine":
        centre, length = mean_feature(teacher, store, views)
        say(f"teacher features: length {length:.2f} (root mean square), {centre.norm():.2f} of it common to all")
    head = linear_head(student, teacher, store, views).to(device) if args.head == "linear" else None

    per_step = accelerator.num_processes * args.accumulate
    steps = plan_steps(views, store, args.epochs, args.batch_size, per_step, args.seed, args.max_steps)
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, weight_decay=args.weight_decay)
    scheduler = get_scheduler(args.schedule, optimizer, args.warmup_steps, len(steps))
    learning = ("train", "loss", "head", "learning_rate", "weight_decay", "schedule", "warmup_steps", "clip_norm")
    made_from |= {name: getattr(args, name) for name in (*learning, "batch_size", "seed")}
    made_from |= {"student": start_weights, "student_runs": vision.config.features_depend_on()}
    made_from |= {"batches_per_step": per_step, "steps": len(steps)}
    prepared, stepper = accelerator.prepare(student, optimizer)
    parts = (
        prepared,
        trained,
        optimizer,
        stepper,
        scheduler,
        teacher,
        store,
        views,
        steps,
        centre.to(device),
        head,
        bad,
    )
    run = Run(args, accelerator, specs, *parts, made_from)
    run.load()
    say(f"{len(views.images)} images, {len(steps)} steps, {sum(p.numel() for p in trained) / 1e6:.2f} M weights train")
    if unreached:
        say(f"frozen, as the loss does not depend on them: {', '.join(unreached)}")
    return run


def train(run: Run) -> int | None:
    """Trains to the end, or until a signal; returns its number."""
    args, accelerator, processes = run.args, run.accelerator, run.accelerator.num_processes
    device, main = accelerator.device, accelerator.is_main_process
    log = Log(args.output / "log.jsonl", run.lines) if main else None
    share = share_of(run.steps[run.first :], accelerator.process_index, processes, args.accumulate)
    reader = Batches(share, run.views, run.store, bool(args.trunk_blocks))
    batches = iter(reader.loader(args.workers, device.type == "cuda"))
    # Since the last log line: sum of losses, images; when it was.
    totals, since = torch.zeros(2, device=device), time.perf_counter()
    run.student.train()
    with (
        caught_signals() as stops,
        tqdm(total=len(run.steps), initial=run.first, unit="step", disable=not main) as bar,
    ):
        for step in range(run.first, len(run.steps)):
            todo = [next(batches) for _ in range(args.accumulate)]
            unread = {name: reason for batch in todo for name, reason in batch.bad.items()}
            counts = [sum(len(batch.images) for batch in todo), len(unread), max(stops, default=0)]
            everyone = accelerator.gather(torch.tensor([counts], device=device))  # (processes, 3)
            (num_images, num_unread, _), stop = everyone.sum(dim=0).tolist(), int(everyone[:, 2].max())
            if stop:
                run.save(step)
                name = signal.Signals(stop).name
                accelerator.print(f"stopped by {name} after step {step}; the same command with --resume goes on.")
                return stop
            if num_unread:
                run.bad.add({name: reason for part in gather_object([unread]) for name, reason in part.items()})

            for i, batch in enumerate(todo):
                # The processes average their gradients once a step, with the last batch.
                with contextlib.nullcontext() if i == args.accumulate - 1 else accelerator.no_sync(run.student):
                    loss = LOSSES[args.loss]
                    losses = distillation_loss(run.student, run.teacher, batch, loss, run.centre, run.head)
                    if not losses.isfinite().all():
                        raise RunStopped(
                            f"the loss is {losses.tolist()} in step {step + 1}: {', '.join(batch.images)}."
                        )
                    # Mean over the images of the step, whichever process has them.
                    accelerator.backward(losses.sum() * processes / max(num_images, 1))
                    totals += torch.stack([losses.detach().sum(), losses.new_tensor(len(batch.images))])
            if args.clip_norm:
                accelerator.clip_grad_norm_(run.trained, args.clip_norm)
            if num_images:
                run.stepper.step()
            run.scheduler.step()
            run.stepper.zero_grad()
            bar.update()

            done, last = step + 1, step + 1 == len(run.steps)
            if done % args.log_every == 0 or last:
                total, images = accelerator.reduce(totals, "sum").tolist()
                rate = images / (time.perf_counter() - since)
                line = {
                    "loss": total / max(images, 1),
                    "images_per_second": rate,
                    "lr": run.scheduler.get_last_lr()[0],
                }
                bar.set_postfix(loss=f"{line['loss']:.4g}", images_per_s=f"{rate:.1f}")
                accelerator.log(line, step=done)
                if log:
                    log.write({"step": done, **line})
                totals.zero_()
                since = time.perf_counter()
            if done % args.save_every == 0 or last:
                run.save(done)
    return None


def main(args: argparse.Namespace) -> int:
    run = prepare(args)
    accelerator, output = run.accelerator, args.output
    record = {**describe_run(run), "made_from": run.made_from}
    accelerator.wait_for_everyone()  # all have read before anything is written
    if accelerator.is_main_process:
        write_json(output / "run.json", record)
        for draft in clear_drafts(output):
            accelerator.print(f"removed {draft.name}, which a killed run has left")
    if args.tracker != "none":
        accelerator.init_trackers("distill")
    stop = train(run)
    if stop:
        accelerator.end_training()
        return 128 + stop
    weights = get_model_state_dict(run.student, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    accelerator.end_training()
    if accelerator.is_main_process:
        finish(run, {name.removeprefix("vision."): weight for name, weight in weights.items()}, record)
        accelerator.print(f"images that could not be read: {len(run.bad.reasons)}")
    return 0


def describe_run(run: Run) -> dict[str, Any]:
    """What run.json says beside what the run was made from."""
    accelerator = run.accelerator
    return {
        "command": shlex.join(["python", *sys.argv]),
        "seed": run.args.seed,
        "student": run.specs[0].to_dict(),
        "teacher": run.specs[1].to_dict(),
        **describe_software(Path(__file__).parent),
        "processes": accelerator.num_processes,
        "distributed": accelerator.distributed_type.value,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
    }


def finish(run: Run, weights: dict[str, torch.Tensor], record: dict[str, Any]) -> None:
    """Writes OUTPUT/model; evaluates; publishes."""
    args, folder = run.args, run.args.output / "model"
    model, processor = write_student(folder, run.specs[0], weights, run.made_from, record["git_revision"])
    print(f"wrote {folder}")
    if args.evaluate_scales:
        to = args.output / "metrics.json", args.student
        metrics = evaluate_before_and_after(*to, model, processor, args.evaluate_scales, args.evaluate_limit)
        for scale, before in metrics["start"].items():
            print(f"picture book {scale}: mean IoU {100 * before:.1f} -> {100 * metrics['student'][scale]:.1f}")
    if args.push_to_hub:
        print(f"published {publish(folder, args.push_to_hub).url}")


if __name__ == "__main__":
    sys.exit(run_script(parser(), main))
