"""`spar segment`: label maps, overlays and areas of classes named in the user's own words."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import raster
from .options import (
    add_image_arguments,
    add_model_options,
    add_refine_option,
    check_images,
    open_image,
    open_model,
    read_labels,
)
from .output import Batch, check_outputs, command_line, say, shorten, table
from .parser import check_one_of, fraction
from .picture_options import asked_of_pictures
from .result_options import add_result_options, asked_of_results, check_result_options

if TYPE_CHECKING:
    from spar_hf.prompts_spar import Labels

BACKENDS = ("pytorch", "onnx")
EXPORTED = "export.json"  # spar_onnx.folder.RECORD, which takes a moment to import
# Options that an exported folder has settled.
FIXED_BY_EXPORT = (
    "method", "network", "attention_reach", "window_px", "stride_px", "upsample", "upsample_factor", "refine"
)  # fmt: skip
HELP = "Segment pictures into classes that you name; writes an overlay and a label map for each."
EPILOG = """examples:
  spar segment street.jpg --labels "road; car, automobile; sky"
      three classes, the second with two names; results go to spar-output/
  spar segment photos/*.jpg --labels "dog; cat; sofa; other, background" --output results --json results/all.json
  spar segment street.jpg --labels "road; car; sky" --model openai/clip-vit-base-patch16 --method naclip
      real photographs need a real checkpoint; 'tiny' knows drawings only
  spar segment street.jpg --labels "road; car; sky" --refine pamr
      edges that follow the picture; 'spar methods' lists the refinements
  spar segment street.jpg --labels "road; car; sky" --method textregion --masks masks
      regions from masks/street.png or masks/street.json; --network regions=slic: superpixels; else SAM 2
  spar segment street.jpg --labels car --background-threshold 0.5
      only what is surely a car; the rest has no class
  spar segment street.jpg --labels "road; car; sky" --window-px native --stride-px 24
      slow: a window slides over the picture, SPAR's teacher

files:
  NAME-overlay.png  the picture tinted by class, with a legend
  NAME-labels.png   the label map: the value of a pixel is the position of its class in --labels, from 0; a pixel
                    without a class has the highest value, 255 or 65535"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "--labels",
        required=True,
        metavar="TEXT|@FILE",
        help="what to look for: classes split by ';', synonyms by ','; or a file: a class a line, JSON or CSV",
    )
    group = parser.add_argument_group("what counts as nothing (default: every pixel belongs to a class)")
    group.add_argument(
        "--background-threshold",
        type=fraction,
        metavar="P",
        help="pixels whose best class has a lower probability have no class; a single class competes with everyday "
        "words, as it has nothing else to lose against",
    )
    group.add_argument(
        "--score-threshold", type=float, metavar="S", help="pixels whose best score (cosine) is lower have no class"
    )
    group.add_argument(
        "--area-threshold",
        type=fraction,
        metavar="F",
        help="classes with at most this fraction of the pixels are masked out",
    )
    group.add_argument(
        "--not",
        dest="against",
        metavar="TEXT",
        help="names split by ';' that compete with the classes and are never reported, such as 'shadow; reflection'",
    )
    group.add_argument(
        "--background", metavar="NAME", help="the class that such pixels become, one of --labels (default: no class)"
    )
    add_result_options(parser)
    add_refine_option(parser)
    add_model_options(parser)
    raster.add_raster_options(parser)
    parser.add_argument(
        "--backend",
        metavar="pytorch|onnx",
        help="what runs the model (default: onnx, without PyTorch, where --model is a folder of 'spar export', whose "
        "--dtype may be int8; else pytorch)",
    )


def on_onnx(args: argparse.Namespace) -> bool:
    """Whether onnxruntime runs, and PyTorch is not imported."""
    return args.backend == "onnx" or (args.backend is None and (Path(args.model) / EXPORTED).is_file())


@dataclass(frozen=True)
class Ready:
    """What segments pictures, in PyTorch or without it.

    Attributes:
        open: a file to its picture, upright RGB.
        segment: a picture to the pipeline's result.
        facts: what runs and how, for the JSON output.
    """

    open: Callable[[Path], Any]
    segment: Callable[[Any], dict[str, Any]]
    facts: dict[str, Any]


def run(args: argparse.Namespace) -> int:
    from spar_hf.files import write_json
    from spar_hf.outputs import Writer

    if args.backend is not None:
        check_one_of("backend", args.backend, BACKENDS)
    check_result_options(args)
    if raster.asked(args):
        return raster.run(args, competing, report)
    labels = read_labels(args.labels)
    thresholds = {name: getattr(args, name) for name in ("background_threshold", "score_threshold", "area_threshold")}
    options: dict[str, Any] = {name: value for name, value in thresholds.items() if value is not None}
    if args.background is not None:
        check_one_of("class", args.background, labels.class_names)
        options["background_class"] = labels.class_names.index(args.background)
        labels = replace(labels, background=options["background_class"])
    check_outputs(args)
    check_images(args.images)
    batch, results = Batch(args.images), []
    asked, of_pipeline = asked_of_results(args)
    options |= of_pipeline
    ready = (_on_onnx if on_onnx(args) else _on_pytorch)(args, competing(labels, args), batch, options)
    with Writer(args.output, labels, asked) as writer:
        for path, stem in batch:
            with batch.may_fail(path):
                image = ready.open(path)
                started = time.perf_counter()
                found = ready.segment(image)
                seconds = round(time.perf_counter() - started, 4)
                results.append({**writer.add(stem, image, found, path), "seconds": seconds})
                say(report(results[-1]))
    if args.json is not None:
        facts = {"command": command_line(args), **ready.facts, **thresholds}
        write_json(args.json, {**facts, "images": results, "failed": batch.as_json()})
    return batch.status()


def _on_pytorch(args: argparse.Namespace, labels: Labels, batch: Batch, options: dict[str, Any]) -> Ready:
    from spar_hf.pipeline_spar import OpenVocabularySegmentationPipeline

    if (Path(args.model) / EXPORTED).is_file():
        raise ValueError(f"{args.model} is an exported model, which PyTorch does not run; leave --backend out")
    opened = open_model(args, args.refine)
    segmenter = opened.segmenter(args.refine)
    pipeline = OpenVocabularySegmentationPipeline(
        model=opened.model, processor=opened.processor, device=opened.model.device
    )

    def unlabelled() -> Iterator[Any]:
        for path in args.images:
            with batch.may_fail(path, count=False):
                yield opened.processor(images=open_image(path, opened), return_tensors="pt")["pixel_values"]

    encoded = segmenter.encode_labels(labels, unlabelled=unlabelled())  # once, for all pictures

    def segment(image: Any) -> dict[str, Any]:
        return pipeline(image, candidate_labels=encoded, segmenter=segmenter, **options)

    return Ready(lambda path: open_image(path, opened), segment, opened.facts)


def _on_onnx(args: argparse.Namespace, labels: Labels, batch: Batch, options: dict[str, Any]) -> Ready:
    import spar_onnx

    fixed = {f"--{name.replace('_', '-')}": getattr(args, name) for name in FIXED_BY_EXPORT}
    fixed["--set"] = args.settings
    for flag, value in fixed.items():
        if value:
            raise ValueError(f"{flag} is for PyTorch, and an exported model is fixed; leave it out, or export another")
    if args.device not in ("auto", "cpu"):
        raise ValueError(f"--device is {args.device!r}; exported models run on the CPU; leave it out")
    pipeline = spar_onnx.load(args.model, args.dtype)
    pictures = asked_of_pictures(args)
    limits = {} if args.max_pixels is None else {"max_pixels": args.max_pixels}
    pipeline.reading = replace(pipeline.reading, **pictures, **limits)
    if args.max_pixels is not None:
        pipeline.pixels = replace(pipeline.pixels, max_input_pixels=args.max_pixels)
    encoded = pipeline.encode_labels(labels)  # once, for all pictures
    facts = {
        "model": args.model,
        "backend": "onnx",
        **{name: pipeline.exported.record.get(name) for name in ("method", "attention_reach")},
        "dtype": pipeline.dtype,
        **pictures,
    }
    return Ready(pipeline.open_rgb, lambda image: pipeline(image, encoded, size=args.short_side, **options), facts)


def competing(labels: Labels, args: argparse.Namespace) -> Labels:
    """The vocabulary with the names that only compete."""
    from spar_hf.prompts_spar import EVERYDAY_WORDS

    if args.against is not None:
        return labels.against(name for name in args.against.split(";") if name.strip())
    return labels.against(EVERYDAY_WORDS) if len(labels) == 1 and args.background_threshold is not None else labels


def report(result: dict[str, Any]) -> str:
    """One image's table: its classes, largest first; those not found share the last line."""
    from spar_hf.visualize import percent_text, plain_text

    (height, width), (rows, columns) = result["size_hw"], result["grid_hw"]
    name = plain_text(result["image"])
    lines = [f"{name}: {width} x {height} px, {columns} x {rows} patches, {result['seconds']:.2f} s"]
    classes = sorted(result["classes"], key=lambda entry: -entry["area_fraction"])
    found = [
        (shorten(plain_text(entry["label"])), percent_text(entry["area_fraction"]))
        for entry in classes
        if entry["area_fraction"]
    ]
    if result["no_class"]:
        found.append(("(no class)", percent_text(result["no_class"])))
    lines.append(table([("class", "area"), *found], "<>", indent="  "))
    absent = [plain_text(entry["label"]) for entry in classes if not entry["area_fraction"]]
    if absent:
        lines.append(f"  not found: {shorten(', '.join(absent), 100)}")
    lines.append(
        table([(what.replace("_", " "), plain_text(path)) for what, path in result["files"].items()], "<<", "  ")
    )
    return "\n".join(lines) + "\n"
