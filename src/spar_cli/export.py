"""`spar export`: a model out of PyTorch, as a folder of ONNX graphs or of torch.export programs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .output import table
from .parser import check_one_of, name_and_value, whole_number

HELP = "Export a model for one pass at any size: ONNX graphs, or programs of torch.export, checked against PyTorch."
FORMATS = ("onnx", "torch-export")
DTYPES = ("float32", "float16", "int8", "int8-static")
EPILOG = """examples:
  spar export tiny --format onnx --output tiny-onnx --dtype float32 --dtype int8
  spar segment street.jpg --labels "road; car; sky" --model tiny-onnx
      runs without PyTorch, and starts within a second
  spar export openai/clip-vit-base-patch16 --format onnx --method naclip --output naclip-onnx
  spar publish tiny-onnx --repo-id you/tiny-onnx

docs/export.md says what the folder holds and what int8 costs."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="tiny, tiny-spar, an id on the Hugging Face Hub or a folder")
    parser.add_argument("--format", required=True, metavar="|".join(FORMATS), help="what is written")
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="not there yet, or an export")
    parser.add_argument(
        "--dtype",
        action="append",
        metavar="|".join(DTYPES),
        help="arithmetic of the graphs; int8-static has activations scaled on --calibrate, int8 as they come; may be "
        "given again (default: float32)",
    )
    parser.add_argument(
        "--calibrate",
        nargs="+",
        type=Path,
        default=[],
        metavar="IMAGE",
        help="a few pictures like those to come, on which int8-static finds its scales (default: drawings)",
    )
    parser.add_argument("--method", metavar="NAME", help="one that is a last block; 'spar methods' lists the names")
    parser.add_argument(
        "--set", action="append", default=[], type=name_and_value, dest="settings", metavar="NAME=VALUE",
        help="a number of the method that differs from its authors'; may be given again",
    )  # fmt: skip
    parser.add_argument("--attention-reach", metavar="image|window", help="default: the checkpoint's")
    parser.add_argument("--size-rule", metavar="floor|pad|stretch", help="default: the checkpoint's")
    parser.add_argument(
        "--plain", action="store_true", help="ONNX's own operators only, for other runtimes than onnxruntime; slower"
    )
    parser.add_argument("--opset", type=whole_number, default=20, metavar="N", help="of ONNX (default: 20)")


def run(args: argparse.Namespace) -> None:
    check_one_of("format", args.format, FORMATS)
    dtypes = args.dtype or ["float32"]
    for dtype in dtypes:
        check_one_of("dtype", dtype, DTYPES)
    from spar_hf.checkpoints import load
    from spar_hf.exporting import export
    from spar_hf.sources import pictures

    calibration = pictures(args.calibrate)[0] if args.calibrate else None

    model, processor = load(args.model, **({} if args.size_rule is None else {"size_rule": args.size_rule}))
    seen: list[Any] = []
    if calibration is not None:
        calibration.reading = processor.image_processor.read_options
        seen = [calibration.picture(number) for number in range(len(calibration.names))]
    done = export(
        model,
        processor,
        args.output,
        args.format,
        dtypes=dtypes,
        method=args.method,
        settings=dict(args.settings),
        reach=args.attention_reach,
        opset=args.opset,
        fused=not args.plain,
        calibration=seen,
    )
    rows = [("arithmetic", "features", "words", "equal labels", "picture book, mIoU", "in PyTorch")]
    for dtype, measured in done.record["dtypes"].items():
        if args.format == "onnx":
            book = measured["picture_book"]
            rows.append(
                (
                    dtype,
                    f"{max(measured['vision_difference'].values()):.1e}",
                    f"{measured['text_difference']:.1e}",
                    f"{100 * book['equal_labels']:.2f} %",
                    f"{100 * book['mean_iou']:.1f}",
                    f"{100 * book['pytorch_mean_iou']:.1f}",
                )
            )
    if len(rows) > 1:
        print("largest difference from PyTorch, relative, at the native size, larger, oblong and off the grid:\n")
        print(table(rows, "<>>>>>") + "\n")
    print(f"wrote {args.output}")
