"""Writes the teacher's features once, so that distillation costs one pass of the student a step.

examples:
  accelerate launch training/cache_teacher.py --student openai/clip-vit-base-patch16 --tars sa1b/ \\
      --max-images 25000 --cache sa1b-features --trunk-blocks 2
      SPAR's recipe on SA-1B, all GPUs of a machine
  python training/cache_teacher.py --student tiny --picture-book 600 --cache .work/features --trunk-blocks 2 \\
      --long-side-px 768 --short-side-px 768 --scale-range 0.17 1 --min-side-px 128
      the picture book, on two CPU cores
  python training/cache_teacher.py ... --estimate
      time and disk that it would take; writes nothing

Then `training/distill.py` with the same flags. With --trunk-blocks N the store also holds what enters the last N
blocks, so that a training step runs N blocks only. A writer that was killed, or found a full disk, goes on where it
stopped when the same command runs again.

exit status: 0; 2 after a mistake, before anything is written, or when it can't go on; 128 + the number of the signal
(130 for Ctrl-C, 143 for SIGTERM) when one stopped it, after the view it was at.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import sys
import time
import zlib
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from spar_cli.errors import caught_signals
from spar_cli.parser import Parser, path, whole_number, whole_number_or_0
from spar_cli.training_options import (
    DATA_USAGE,
    BadImages,
    add_data_flags,
    add_teacher_flags,
    build_views,
    run_script,
    script_parser,
    student_spec,
    teacher_spec,
)
from spar_hf.distillation.batches import as_it_is, ignore_signals
from spar_hf.distillation.cache import FeatureStore
from spar_hf.distillation.teacher import (
    Student,
    build_teacher,
    describe_trunk,
    load_student,
    pixels_seen,
    teacher_features,
)
from spar_hf.distillation.views import Views
from spar_hf.files import readable, require_disk
from spar_hf.sources import BadImage


def parser() -> Parser:
    parser = script_parser(__doc__, f"{DATA_USAGE} --cache FOLDER")
    group = parser.add_argument_group("feature store")
    group.add_argument("--cache", type=path, metavar="FOLDER", required=True, help="folder of the feature store")
    group.add_argument(
        "--draws", type=whole_number, metavar="N", default=1, help="views of each image; epochs go round them (1)"
    )
    group.add_argument(
        "--trunk-blocks",
        type=whole_number_or_0,
        metavar="N",
        default=0,
        help="also store what enters the last N blocks (0)",
    )
    group.add_argument(
        "--shard-views", type=whole_number, metavar="N", default=32, help="views in a file; a kill loses one file (32)"
    )
    group.add_argument("--estimate", action="store_true", help="print time and disk, and stop")
    add_teacher_flags(parser)
    add_data_flags(parser)
    return parser


class ViewPixels(Dataset):
    """Pixels of chosen views and fingerprints of their pictures; `BadImage` comes back as a value."""

    def __init__(self, views: Views, numbers: list[int]):
        self.views, self.numbers = views, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[int, Any, int]:
        number = self.numbers[i]
        try:
            return number, torch.from_numpy(self.views.pixels(number)), self.views.fingerprint(number)
        except BadImage as error:
            return number, error, 0


def main(args: argparse.Namespace) -> int:
    state = Accelerator()
    say = state.print
    student, spec = student_spec(args), teacher_spec(args).on(state.device)
    vision = load_student(student)[1].requires_grad_(False)
    teacher, teacher_is = build_teacher(spec, student, vision.config.patch_size)
    teacher.to(state.device)
    trunk, trunk_is = None, None
    if args.trunk_blocks:
        trunk = Student(vision, vision.trunk_end(args.trunk_blocks)).to(state.device)
        trunk_is = describe_trunk(vision, trunk.first_block)

    with state.main_process_first():
        views = build_views(args, teacher.config.patch_size, args.draws)
        made_from = {**views.describe(), "teacher": teacher_is, "trunk": trunk_is}
        store = FeatureStore(args.cache, made_from, len(views), args.shard_views)
    faults = store.faults()
    # All have the same list before the first shard is written: a shorter one would be dealt out differently.
    state.wait_for_everyone()
    bad = BadImages(args.max_bad_images, say=lambda line: tqdm.write(line))
    if state.is_main_process:
        bad.add(views.bad)
        for fault in faults.values():
            if not fault.endswith("missing"):
                say(f"to be made again: {fault}")
    if not faults and store.sums:
        say(f"{args.cache}: all {len(views)} views are there.")
        return 0

    # What it will take: bytes are known from the sizes, time from the view of median cost.
    todo = list(faults)
    cost = {n: pixels_seen(teacher, views.plan(n).size_hw) for shard in todo for n in store.views_of(shard)}
    grids = [tuple(side // teacher.config.patch_size for side in views.plan(n).size_hw) for n in cost]
    width = teacher.config.projection_dim
    needed = sum(h * w * width * 2 for h, w in grids)
    if trunk:
        prefix, width = trunk.vision.num_prefix_tokens, trunk.vision.config.hidden_size
        needed += sum((prefix + h * w) * width * 2 for h, w in grids)
    if cost:
        typical = min(cost, key=lambda n: abs(cost[n] - statistics.median(cost.values())))
        seconds_per_pixel = time_of(teacher, views.plan(typical).size_hw, state.device) / cost[typical]
        seconds = seconds_per_pixel * sum(cost.values()) / state.num_processes
        say(
            f"{len(cost)} of {len(views)} views to do in {len(todo)} shards: {sum(cost.values()) / 1e6:.0f} "
            f"megapixels with every window counted, about {readable(seconds)} with {state.num_processes} process(es) "
            f"like this one; {needed / 1e9:.3f} GB of disk."
        )
    require_disk(args.cache, needed)
    if args.estimate:
        return 0

    with state.main_process_first():
        store.create()
    mine = todo[state.process_index :: state.num_processes]
    numbers = [number for shard in mine for number in store.views_of(shard)]
    with caught_signals() as stops:
        write_shards(args, state, store, views, numbers, cost, teacher, trunk, bad, stops)
    stop = int(state.gather(torch.tensor([max(stops, default=0)], device=state.device)).max())
    if stop:
        say(f"stopped by {signal.Signals(stop).name}; the same command goes on.")
        return 128 + stop
    if state.is_main_process:
        store.finish()
    say(f"{args.cache}: {len(views)} views; images that could not be read in this run: {len(bad.reasons)}.")
    return 0


def write_shards(
    args: argparse.Namespace,
    state: Accelerator,
    store: FeatureStore,
    views: Views,
    numbers: list[int],
    cost: dict[int, int],
    teacher: Any,
    trunk: Student | None,
    bad: BadImages,
    stops: list[int],
) -> None:
    """Writes the shards that hold the views of these numbers, until a signal comes."""
    pixels_of = ViewPixels(views, numbers)
    loader = DataLoader(
        pixels_of, batch_size=None, num_workers=args.workers, collate_fn=as_it_is, worker_init_fn=ignore_signals
    )
    bar = tqdm(
        total=sum(cost[n] for n in numbers),
        unit="px",
        unit_scale=True,
        smoothing=0.05,
        disable=not state.is_local_main_process,
    )
    rows: dict[int, dict] = {}
    tensors: dict[str, torch.Tensor] = {}
    unread: dict[str, str] = {}
    with bar:
        for number, pixels, fingerprint in loader:
            if stops:
                return
            if isinstance(pixels, BadImage):
                unread[pixels.name] = pixels.reason
                bad.add({pixels.name: pixels.reason})
            else:
                batch = pixels[None].to(state.device)
                tensors[f"{number}.features"] = teacher_features(teacher, batch)[0].half().cpu()
                if trunk:
                    tensors[f"{number}.trunk"] = trunk.trunk(batch)[0].half().cpu()
                rows[number] = {
                    "image": views.name(number),
                    "view": views.plan(number),
                    "fingerprint": fingerprint,
                    "pixels_crc32": zlib.crc32(pixels.numpy()),
                }
            bar.update(cost[number])
            shard = number // store.shard_views
            if number == store.views_of(shard)[-1]:
                store.write(shard, rows, tensors, unread)
                rows, tensors, unread = {}, {}, {}


def time_of(teacher: torch.nn.Module, size_hw: tuple[int, int], device: torch.device) -> float:
    """Seconds of one teacher pass at a size, after a first one that is not counted."""
    pixels = torch.zeros(1, *size_hw, 3, dtype=torch.uint8, device=device)
    for _ in range(2):
        start = time.perf_counter()
        teacher_features(teacher, pixels).cpu()
    return time.perf_counter() - start


if __name__ == "__main__":
    sys.exit(run_script(parser(), main))
