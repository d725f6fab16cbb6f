"""`spar evaluate`: mean IoU of a model on a benchmark under a named protocol."""

from __future__ import annotations

import argparse
from pathlib import Path

from .compare import run_methods
from .options import add_model_options, add_refine_option, open_model
from .output import check_outputs, command_line
from .parser import check_one_of, positive, whole_number

HELP = "Measure mean IoU, seconds per image and peak memory on a benchmark."
EPILOG = """examples:
  spar evaluate --benchmark picturebook --scale 4
      the drawn test split at four times the model's native side; needs no data
  spar evaluate --benchmark picturebook --scale 4 --window-px native --stride-px 24
      the same in a sliding window, SPAR's teacher
  spar evaluate --benchmark picturebook --scale 4 --refine pamr --refine prompt-denoising
      with refinements, which 'spar methods' lists
  spar evaluate --benchmark ade20k --data data --model openai/clip-vit-base-patch16 --json ade20k.json
      a data set laid out as MMSegmentation's data guide describes
  spar evaluate --benchmark picturebook --scale 4 --limit 32 --methods all --json-dir methods
      every method of 'spar methods', and one table; may be stopped and started again
  spar evaluate --images photos --masks masks --classes classes.txt --model FOLDER

A long evaluation that may be stopped: --state FILE keeps what is done, and the same command goes on from there.
accelerate launch -m spar_hf evaluate ... shares the images among processes and machines; the scores are the same."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--benchmark",
        metavar="NAME",
        help="picturebook, or a benchmark on disk: voc21, voc20, context60, context59, cityscapes, ade20k, "
        "coco_object, coco_stuff; custom (the default with --images)",
    )
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="the data set, or a folder above it")
    parser.add_argument("--scale", type=positive, metavar="K", help="picturebook: draw at K times the native side")
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="custom: the pictures")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="custom: their label maps, PNG")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="custom: one class a line, synonyms by ','")
    parser.add_argument(
        "--mask-orientation",
        metavar="upright|stored",
        help="of pictures that EXIF turns: their label maps are upright, or lie as the picture is stored (default: "
        "told by the size)",
    )
    parser.add_argument(
        "--protocol",
        metavar="NAME",
        help="spar, sclip, or own: sizes and thresholds of the method's authors (default: the benchmark's first)",
    )
    parser.add_argument("--limit", type=whole_number, metavar="N", help="N images, spread evenly over the benchmark")
    parser.add_argument("--state", type=Path, metavar="FILE", help="keep what is done here, and go on from it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")
    parser.add_argument(
        "--methods",
        metavar="all|NAME,NAME",
        help="evaluate many methods under one protocol, each in a process of its own, and compare them in one table; "
        "--network METHOD.NAME=ID and --set METHOD.NAME=VALUE are for one of them alone",
    )
    parser.add_argument(
        "--json-dir",
        type=Path,
        metavar="FOLDER",
        help="of --methods: results, table.md, and what is done so far; the same command goes on from there",
    )
    add_refine_option(parser)
    add_model_options(parser, masks="--region-masks")


def run(args: argparse.Namespace) -> int | None:
    from spar_hf.evaluation import BENCHMARKS, evaluate, is_clip, load_benchmark, load_protocol, own_protocol
    from spar_hf.processes import processes

    check_outputs(args)
    if args.benchmark is None:
        if args.images is None:
            raise ValueError(
                "there is nothing to evaluate on; give --benchmark NAME, or --images, --masks, --classes."
            )
        args.benchmark = "custom"
    check_one_of("benchmark", args.benchmark, BENCHMARKS)
    team = processes()
    if args.methods is not None:
        if team.count > 1:
            raise ValueError("--methods runs each method in a process of its own; leave 'accelerate launch' out")
        return run_methods(args)
    if args.json_dir is not None:
        raise ValueError("--json-dir is for --methods; give --json FILE for one result")
    own = args.protocol == "own"
    protocol = own_protocol(args.method, args.benchmark) if own else load_protocol(args.protocol, args.benchmark)
    opened = open_model(args, args.refine)
    segmenter = opened.segmenter(args.refine)
    if not own:
        protocol = load_protocol(args.protocol, args.benchmark, clip=is_clip(segmenter.config))
    benchmark = load_benchmark(
        args.benchmark,
        args.data,
        scale=args.scale,
        native_px=segmenter.config.image_size,
        images=args.images,
        masks=args.masks,
        classes=args.classes,
        reading=opened.processor.image_processor.read_options,
        mask_orientation=args.mask_orientation,
    )
    if args.short_side is not None:
        protocol = protocol.replace(short_side_px=args.short_side)
    if "window_px" in opened.facts and protocol.window_px is not None:
        protocol = protocol.replace(window_px=None, stride_px=None)  # the window of the command line, not both
    result = evaluate(
        segmenter,
        opened.processor,
        benchmark,
        protocol=protocol,
        limit=args.limit,
        record=opened.facts,
        state_path=args.state,
        command=command_line(args),
        masks=opened.masks,
        processes=team,
    )
    if not team.is_main:
        return None
    print(result.table())
    if args.json is not None:
        result.save(args.json)
    return None
