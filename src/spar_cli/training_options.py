"""Flags that both scripts share: data, augmentation, teacher. A wrong one is a single line and exit status 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn

from spar_hf.distillation.sources import PictureBookScenes, Source, hub_dataset, image_folder, tar_files
from spar_hf.distillation.views import EXTENDED, SCALE_LAWS, Augmentation, Views
from spar_hf.reach_spar import REACHES


class Parser(argparse.ArgumentParser):
    """A parser that knows no abbreviations and whose mistakes are `ValueError`s of one line.

    Args:
        docstring: of the script; becomes the help.
    """

    def __init__(self, docstring: str):
        super().__init__(
            description=docstring, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
        )

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message}; see --help")


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data (no labels are read)")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--images", metavar="FOLDER", help="a folder of images, with its sub-folders")
    which.add_argument("--tars", metavar="TAR", nargs="+", help="tars or folders of tars: WebDataset, SA-1B")
    which.add_argument("--dataset", metavar="ID", help="a Hugging Face data set: Hub id or folder")
    which.add_argument("--picture-book", metavar="N", type=int, help="N training scenes of the picture book")
    group.add_argument("--dataset-split", default="train")
    group.add_argument("--image-column", help="of --dataset; the first image column when not given")
    group.add_argument(
        "--stream-to", metavar="FOLDER", help="stream --max-images of --dataset there once, not all of it"
    )
    group.add_argument("--max-images", type=int, help="take the first so many (SPAR: the first 25000 of SA-1B)")
    group.add_argument("--max-bad-images", type=int, default=100, help="stop when more are unreadable")
    group.add_argument("--workers", type=int, default=2, help="processes that read images, for each training process")

    group = parser.add_argument_group("augmentation (defaults: SPAR, section 4)")
    default = Augmentation()
    group.add_argument("--long-side-px", type=int, help=f"at scale 1 ({default.long_side_px})")
    group.add_argument("--short-side-px", type=int, help=f"at scale 1 ({default.short_side_px})")
    group.add_argument("--scale-law", choices=SCALE_LAWS, default=default.scale_law, help="how the scale is drawn")
    group.add_argument("--scale-range", type=float, nargs=2, metavar=("LOW", "HIGH"), help="(0.5 1)")
    group.add_argument("--extended", action="store_true", help="SPAR-ALL's: long and short side 2560, scale 0.2 to 1")
    group.add_argument("--crop-probability", type=float, default=default.crop_probability)
    group.add_argument("--crop-range", type=float, nargs=2, default=list(default.crop_range), metavar=("LOW", "HIGH"))
    group.add_argument("--min-side-px", type=int, default=default.min_side_px)
    group.add_argument("--flip-probability", type=float, default=default.flip_probability)
    group.add_argument("--multiple-px", type=int, help="floor sides to a multiple of it; the patch when not given")
    group.add_argument("--augmentation-seed", type=int, default=0)


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher (default: the student's starting weights in a sliding window)")
    group.add_argument("--student", required=True, help="checkpoint to start from: tiny, a folder, a Hub id")
    group.add_argument("--student-method", metavar="NAME", help="last block of the student, a row of `spar methods`")
    group.add_argument(
        "--student-reach",
        choices=REACHES,
        help="how far the student's attention reaches: image, or window, not in SPAR (default: the checkpoint's)",
    )
    group.add_argument("--teacher-reach", choices=REACHES, help="the same of the teacher")
    group.add_argument("--teacher-model", help="checkpoint of the teacher; the student's when not given")
    group.add_argument(
        "--teacher-method",
        nargs="+",
        help="rows of `spar methods`, several: their mean; the checkpoint's when not given",
    )
    group.add_argument("--teacher-network", metavar="ID", help="second network of a method that needs one")
    group.add_argument("--window-px", type=int, help="the method's own when not given; 0: the whole image in one pass")
    group.add_argument(
        "--stride-px", type=int, nargs="+", help="the method's own when not given (SPAR, section 3: 24)"
    )
    group.add_argument(
        "--teacher-short-side-px",
        type=int,
        nargs="+",
        metavar="N",
        help="sizes at which the teacher sees every picture, 0 the student's; several: their mean (default: 0)",
    )
    group.add_argument("--window-batch", type=int, default=64, help="windows at once; bounds the memory")
    group.add_argument("--teacher-dtype", choices=("float32", "bfloat16", "float16"), default="float32")


def build_source(args: argparse.Namespace) -> Source:
    """The images that the flags ask for."""
    if args.images:
        return image_folder(args.images, args.max_images)
    if args.tars:
        return tar_files(args.tars, args.max_images)
    if args.dataset:
        return hub_dataset(args.dataset, args.dataset_split, args.image_column, args.max_images, args.stream_to)
    return PictureBookScenes(args.picture_book, args.augmentation_seed)


def build_augmentation(args: argparse.Namespace, patch_px: int) -> Augmentation:
    """The augmentation that the flags ask for."""
    multiple_px = args.multiple_px or patch_px
    if multiple_px % patch_px:
        raise ValueError(f"--multiple-px is {multiple_px}; it must be a multiple of the patch ({patch_px} px).")
    sizes: dict[str, Any] = dict(EXTENDED) if args.extended else {}
    for name in ("long_side_px", "short_side_px", "scale_range"):
        if getattr(args, name) is not None:
            sizes[name] = tuple(getattr(args, name)) if name == "scale_range" else getattr(args, name)
    return Augmentation(
        crop_probability=args.crop_probability,
        crop_range=tuple(args.crop_range),
        min_side_px=args.min_side_px,
        flip_probability=args.flip_probability,
        scale_law=args.scale_law,
        multiple_px=multiple_px,
        **sizes,
    )


def build_views(args: argparse.Namespace, patch_px: int, draws: int) -> Views:
    """The views that the flags ask for."""
    views = Views(build_source(args), build_augmentation(args, patch_px), draws, args.augmentation_seed)
    if not views.images:
        raise ValueError(
            f"none of the {len(views.bad)} images can be read; the first: {next(iter(views.bad.items()))}"
        )
    return views


class RunStopped(Exception):
    """The run cannot go on; the message says why and what to do."""


class BadImages:
    """Images that could not be read: reported once each, counted, too many end the run.

    Args:
        allowed: how many may be bad.
        say: where to report.
    """

    def __init__(self, allowed: int, say: Callable[[str], None]):
        self.allowed, self.say = allowed, say
        self.reasons: dict[str, str] = {}

    def add(self, bad: dict[str, str]) -> None:
        """Raises `RunStopped` past the limit."""
        for name, reason in bad.items():
            if name not in self.reasons:
                self.reasons[name] = reason
                self.say(f"skipped an unreadable image, {name}: {reason}")
        if len(self.reasons) > self.allowed:
            raise RunStopped(
                f"{len(self.reasons)} images cannot be read and --max-bad-images is {self.allowed}; the last is "
                f"{list(self.reasons)[-1]}. Repair the data or allow more."
            )


def run_script(main: Callable[[], None]) -> None:
    """Runs a script; what the user or the machine did wrong becomes one line and exit status 2."""
    try:
        main()
    except (ValueError, OSError, RunStopped) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
