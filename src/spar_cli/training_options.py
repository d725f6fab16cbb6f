"""Options that the scripts of training/ share: data, augmentation, student, teacher; and what they ask for."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from spar_hf.distillation.label_teacher import TARGETS
from spar_hf.distillation.label_teacher import Settings as TargetSettings
from spar_hf.distillation.sources import PictureBookScenes, Source
from spar_hf.distillation.specs import DTYPES, StudentSpec, TeacherSpec
from spar_hf.distillation.views import EXTENDED, SCALE_LAWS, Augmentation, Views
from spar_hf.reach_spar import REACHES
from spar_hf.sources import hub_dataset, image_folder, tar_files

from .errors import MISTAKE, exit_status, fail
from .options import read_labels
from .parser import (
    Parser,
    fraction,
    name_and_value,
    path,
    text,
    whole_number,
    whole_number_or_0,
    window_px,
)
from .picture_options import add_picture_options, asked_of_pictures

DATA_USAGE = "--student NAME (--images FOLDER | --tars TAR | --dataset ID | --picture-book N)"


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """The images, and how views are drawn of them."""
    group = parser.add_argument_group("data (no labels are read)")
    which = group.add_mutually_exclusive_group(required=True)
    which.add_argument("--images", metavar="FOLDER", type=text, help="a folder of images, with its sub-folders")
    which.add_argument(
        "--tars", metavar="TAR", nargs="+", type=text, help="tars or folders of tars: WebDataset, SA-1B"
    )
    which.add_argument("--dataset", metavar="ID", type=text, help="a Hugging Face data set: Hub id or folder")
    which.add_argument("--picture-book", metavar="N", type=whole_number, help="N training scenes of the picture book")
    group.add_argument("--dataset-split", metavar="NAME", type=text, help="of --dataset (train)")
    group.add_argument(
        "--image-column", metavar="NAME", type=text, help="of --dataset; the first image column when not given"
    )
    group.add_argument(
        "--stream-to", metavar="FOLDER", type=path, help="stream --max-images of --dataset there once, not all of it"
    )
    group.add_argument(
        "--max-images", metavar="N", type=whole_number, help="take the first so many (SPAR: 25000 of SA-1B)"
    )
    group.add_argument(
        "--max-bad-images",
        metavar="N",
        type=whole_number_or_0,
        default=100,
        help="stop when more are unreadable (100)",
    )
    group.add_argument(
        "--workers", metavar="N", type=whole_number_or_0, default=2, help="reading processes per process (2)"
    )

    add_picture_options(parser)
    group = parser.add_argument_group("augmentation (defaults: SPAR, section 4)")
    default = Augmentation()
    bounds: dict[str, Any] = {"nargs": 2, "type": fraction, "metavar": ("LOW", "HIGH")}
    sides: dict[str, Any] = {"type": whole_number, "metavar": "PX"}
    group.add_argument("--long-side-px", **sides, help=f"at scale 1 ({default.long_side_px})")
    group.add_argument("--short-side-px", **sides, help=f"at scale 1 ({default.short_side_px})")
    group.add_argument("--min-side-px", **sides, default=default.min_side_px, help=f"({default.min_side_px})")
    group.add_argument("--multiple-px", **sides, help="floor sides to a multiple of it; the patch when not given")
    group.add_argument("--scale-law", choices=SCALE_LAWS, default=default.scale_law, help="how the scale is drawn")
    group.add_argument("--scale-range", **bounds, help="(0.5 1)")
    group.add_argument("--extended", action="store_true", help="SPAR-ALL's: long and short side 2560, scale 0.2 to 1")
    group.add_argument(
        "--crop-probability", type=fraction, metavar="P", default=default.crop_probability, help="(0.5)"
    )
    group.add_argument("--crop-range", **bounds, default=list(default.crop_range), help="part of a side (0.4 1)")
    group.add_argument(
        "--flip-probability", type=fraction, metavar="P", default=default.flip_probability, help="(0.5)"
    )
    group.add_argument("--augmentation-seed", type=whole_number_or_0, metavar="N", default=0, help="(0)")


def add_teacher_flags(parser: argparse.ArgumentParser) -> None:
    """The network that learns, and the encoder that teaches."""
    group = parser.add_argument_group("student")
    group.add_argument(
        "--student",
        metavar="NAME",
        type=text,
        required=True,
        help="checkpoint to start from: tiny, a folder, a Hub id",
    )
    group.add_argument("--student-method", metavar="NAME", type=text, help="its last block, a row of 'spar methods'")
    group.add_argument(
        "--student-reach",
        choices=REACHES,
        help="how far its attention reaches: image, or window, not in SPAR (default: the checkpoint's)",
    )

    group = parser.add_argument_group("teacher (default: the student's starting weights in a sliding window)")
    group.add_argument("--teacher-model", metavar="NAME", type=text, help="checkpoint; the student's when not given")
    group.add_argument(
        "--teacher-method",
        nargs="+",
        metavar="NAME",
        type=text,
        default=[],
        help="rows of 'spar methods', several: their mean; the checkpoint's when not given",
    )
    group.add_argument(
        "--teacher-network",
        action="append",
        default=[],
        type=name_and_value,
        metavar="NAME=ID",
        help="a further network of a method, such as dino=facebook/dino-vitb8; may be given again (default: those of "
        "its authors)",
    )
    group.add_argument(
        "--teacher-labels",
        metavar="NAME",
        type=text,
        help="a row of 'spar methods' whose score maps of --labels teach, in the place of features: so label methods "
        "(lposs) teach, and feature methods with refinements",
    )
    group.add_argument(
        "--labels", metavar="TEXT|@FILE", type=text, help="the words of --teacher-labels, as 'spar segment' takes them"
    )
    group.add_argument(
        "--teacher-set",
        action="append",
        default=[],
        type=name_and_value,
        metavar="NAME=VALUE",
        help="a number of the method of --teacher-labels that differs from its authors'; may be given again",
    )
    group.add_argument(
        "--teacher-refine", action="append", default=[], type=text, metavar="NAME", help="refinement of its score maps"
    )
    group.add_argument(
        "--target",
        choices=TARGETS,
        default=TargetSettings.target,
        help="how score maps become features: the network's own moved towards the words, or the words' mean",
    )
    group.add_argument(
        "--teacher-upsample",
        metavar="NAME[=FOLDER]",
        type=text,
        help="an upsampler of its features, as 'spar segment --upsample'; a patch learns the mean of its cells",
    )
    group.add_argument(
        "--teacher-upsample-factor",
        type=whole_number,
        metavar="N",
        help="cells of the finer grid to a patch's side (default: one for each pixel)",
    )
    group.add_argument("--teacher-reach", choices=REACHES, help="how far its attention reaches")
    group.add_argument(
        "--window-px",
        type=window_px,
        metavar="N|native|paper",
        help="side of the window; 0: the whole image in one pass (default: paper)",
    )
    group.add_argument(
        "--stride-px",
        type=whole_number,
        nargs="+",
        default=[],
        metavar="N",
        help="steps of the window; several: their mean (default: the method's own; SPAR, section 3: 24)",
    )
    group.add_argument(
        "--teacher-short-side-px",
        type=whole_number_or_0,
        nargs="+",
        default=[],
        metavar="N",
        help="sizes at which the teacher sees every picture, 0 the student's; several: their mean (default: 0)",
    )
    group.add_argument(
        "--window-batch", type=whole_number, metavar="N", default=64, help="windows at once; bounds the memory (64)"
    )
    group.add_argument(
        "--teacher-dtype",
        choices=DTYPES,
        default="auto",
        help="auto: bfloat16 where the device is fast at it, else float32; with --cache what the store holds",
    )


def student_spec(args: argparse.Namespace) -> StudentSpec:
    """The student that the flags ask for."""
    return StudentSpec(args.student, args.student_method, args.student_reach)


def teacher_spec(args: argparse.Namespace) -> TeacherSpec:
    """The teacher that the flags ask for. Raises a `ValueError` for what can't be."""
    return TeacherSpec(
        model=args.teacher_model,
        methods=tuple(args.teacher_method),
        networks=dict(args.teacher_network),
        reach=args.teacher_reach,
        window_px=args.window_px,
        strides_px=tuple(args.stride_px),
        short_sides_px=tuple(args.teacher_short_side_px),
        window_batch=args.window_batch,
        dtype=args.teacher_dtype,
        label_method=args.teacher_labels,
        labels=None if args.labels is None else read_labels(args.labels),
        settings=dict(args.teacher_set),
        refine=tuple(args.teacher_refine),
        target=TargetSettings(target=args.target),
        upsample=args.teacher_upsample,
        upsample_factor=args.teacher_upsample_factor,
    )


def build_source(args: argparse.Namespace) -> Source:
    """The images that the flags ask for."""
    for name in ("dataset_split", "image_column", "stream_to"):
        if getattr(args, name) is not None and args.dataset is None:
            raise ValueError(f"{name} belongs to --dataset, which is not given; leave it out.")
    if args.stream_to is not None and args.max_images is None:
        raise ValueError("--stream-to needs --max-images: how many images of the stream to take.")
    photographs = None
    if args.images:
        photographs = image_folder(args.images, args.max_images)
    elif args.tars:
        photographs = tar_files(args.tars, args.max_images)
    elif args.dataset:
        split = args.dataset_split or "train"
        photographs = hub_dataset(args.dataset, split, args.image_column, args.max_images, args.stream_to)
    if photographs is not None:
        photographs.read_with(**asked_of_pictures(args))
        return photographs
    if args.max_images is not None:
        raise ValueError("--picture-book N says itself how many scenes to take; leave --max-images out.")
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
    augmentation = build_augmentation(args, patch_px)  # before a data set is fetched
    views = Views(build_source(args), augmentation, draws, args.augmentation_seed)
    if not views.images:
        name, reason = next(iter(views.bad.items()))
        raise ValueError(f"none of the {len(views.bad)} images can be read; the first is {name}: {reason}")
    return views


class RunStopped(ValueError):
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

    def add(self, bad: Mapping[str, str]) -> None:
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


def check_folder(flag: str, folder: Path) -> None:
    """Raises a `ValueError` when what shall be a folder is a file."""
    place = next(part for part in (folder, *folder.absolute().parents) if part.exists())
    if not place.is_dir():
        raise ValueError(f"{flag} is {folder}, and {place} is a file; give a folder.")


def run_script(
    parser: Parser, main: Callable[[argparse.Namespace], int | None], argv: Sequence[str] | None = None
) -> int:
    """Reads the line of a script and runs it; a mistake becomes one line.

    Args:
        parser: of the script.
        main: takes what the parser found, returns the exit status.
        argv: the words after the script's name; None takes those of the process.

    Returns:
        The exit status, see `exit_status`.
    """
    try:
        args = parser.parse_args(argv)
    except ValueError as error:
        return fail(parser.prog, " ".join(str(error).split()), MISTAKE)
    return exit_status(
        lambda: main(args), parser.prog, parser.flags(), "give a smaller --batch-size or --window-batch"
    )


def script_parser(docstring: str, usage: str) -> Parser:
    """The parser of a script: what it is comes first in the help, its examples at the end.

    Args:
        docstring: of the script: a line, an empty line, and the rest.
        usage: the least that the script needs.
    """
    first, _, rest = docstring.partition("\n\n")
    return Parser(usage=f"%(prog)s {usage} [options]", description=first, epilog=rest)
