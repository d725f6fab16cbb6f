"""Writes the teacher's features once, so that distillation costs one pass of the student a step.

    # SPAR's recipe on SA-1B, all GPUs of a machine
    accelerate launch training/cache_teacher.py --student openai/clip-vit-base-patch16 --tars sa1b/ \\
        --max-images 25000 --cache sa1b-features --trunk-blocks 2
    # the picture book, on two CPU cores
    python training/cache_teacher.py --student tiny --picture-book 600 --cache .work/features --trunk-blocks 2 \\
        --long-side-px 768 --short-side-px 768 --scale-range 0.17 1 --min-side-px 128

Then `training/distill.py` with the same flags. With --trunk-blocks N the store also holds what enters the last N
blocks, so that a training step runs N blocks only. A writer that was killed goes on where it stopped when the same
command runs again. Prints time and disk before it starts (--estimate: only that).
"""

from __future__ import annotations

import argparse
import statistics
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm

from spar_cli.training_options import BadImages, Parser, add_data_flags, add_teacher_flags, build_views, run_script
from spar_hf.distillation.batches import as_it_is
from spar_hf.distillation.cache import FeatureStore
from spar_hf.distillation.sources import BadImage
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


def parse_flags() -> argparse.Namespace:
    parser = Parser(__doc__)
    parser.add_argument("--cache", type=Path, required=True, help="folder of the feature store")
    parser.add_argument("--draws", type=int, default=1, help="views of each image; epochs go round them")
    parser.add_argument("--trunk-blocks", type=int, default=0, help="also store what enters the last N blocks")
    parser.add_argument("--shard-views", type=int, default=32, help="views in a file; a kill loses at most one file")
    parser.add_argument("--estimate", action="store_true", help="print time and disk, and stop")
    add_teacher_flags(parser)
    add_data_flags(parser)
    return parser.parse_args()


class ViewPixels(Dataset):
    """Pixels of chosen views; `BadImage` comes back as a value."""

    def __init__(self, views: Views, numbers: list[int]):
        self.views, self.numbers = views, numbers

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, i: int) -> tuple[int, Any]:
        try:
            return self.numbers[i], torch.from_numpy(self.views.pixels(self.numbers[i]))
        except BadImage as error:
            return self.numbers[i], error


def main() -> None:
    args = parse_flags()
    state = Accelerator()
    say = state.print
    teacher, teacher_is = build_teacher(args)
    teacher.to(state.device)
    trunk, trunk_is = None, None
    if args.trunk_blocks:
        vision = load_student(args)[1].requires_grad_(False)
        trunk = Student(vision, vision.trunk_end(args.trunk_blocks)).to(state.device)
        trunk_is = describe_trunk(vision, trunk.first_block)

    with state.main_process_first():
        views = build_views(args, teacher.config.patch_size, args.draws)
        made_from = {**views.describe(), "teacher": teacher_is, "trunk": trunk_is}
        store = FeatureStore(args.cache, made_from, len(views), args.shard_views)
        store.create()
    bad = BadImages(args.max_bad_images, say=lambda line: tqdm.write(line))
    if state.is_main_process:
        bad.add(views.bad)
    todo = [shard for shard in range(store.num_shards) if not store.finished(shard)]
    # All have the same list before the first shard is written: a shorter one would be dealt out differently.
    state.wait_for_everyone()
    mine = todo[state.process_index :: state.num_processes]
    numbers = [number for shard in mine for number in store.views_of(shard)]
    cost = {n: pixels_seen(teacher, views.plan(n).size_hw) for shard in todo for n in store.views_of(shard)}
    if not todo:
        return say(f"{args.cache}: all {len(views)} views are there.")

    # What it will take: bytes are known from the sizes, time from the view of median cost.
    grids = [tuple(side // teacher.config.patch_size for side in views.plan(n).size_hw) for n in cost]
    width = teacher.config.projection_dim
    needed = sum(h * w * width * 2 for h, w in grids)
    if trunk:
        prefix, width = trunk.vision.num_prefix_tokens, trunk.vision.config.hidden_size
        needed += sum((prefix + h * w) * width * 2 for h, w in grids)
    typical = min(cost, key=lambda n: abs(cost[n] - statistics.median(cost.values())))
    seconds_per_pixel = time_of(teacher, views.plan(typical).size_hw, state.device) / cost[typical]
    seconds = seconds_per_pixel * sum(cost.values()) / state.num_processes
    say(
        f"{len(cost)} of {len(views)} views to do in {len(todo)} shards: {sum(cost.values()) / 1e6:.0f} megapixels "
        f"with every window counted, about {readable(seconds)} with {state.num_processes} process(es) like this one; "
        f"{needed / 1e9:.3f} GB of disk."
    )
    require_disk(args.cache, needed)
    if args.estimate:
        return

    pixels_of = ViewPixels(views, numbers)
    loader = DataLoader(pixels_of, batch_size=None, num_workers=args.workers, collate_fn=as_it_is)
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
    for number, pixels in loader:
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
                "pixels_crc32": zlib.crc32(pixels.numpy()),
            }
        bar.update(cost[number])
        shard = number // store.shard_views
        if number == store.views_of(shard)[-1]:
            store.write(shard, rows, tensors, unread)
            rows, tensors, unread = {}, {}, {}
    bar.close()
    state.wait_for_everyone()
    say(f"{args.cache}: {len(views)} views; images that could not be read in this run: {len(bad.reasons)}.")


def time_of(teacher: torch.nn.Module, size_hw: tuple[int, int], device: torch.device) -> float:
    """Seconds of one teacher pass at a size, after a first one that is not counted."""
    pixels = torch.zeros(1, *size_hw, 3, dtype=torch.uint8, device=device)
    for _ in range(2):
        start = time.perf_counter()
        teacher_features(teacher, pixels).cpu()
    return time.perf_counter() - start


if __name__ == "__main__":
    run_script(main)
