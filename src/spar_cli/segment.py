"""`spar segment`: label maps, overlays and areas of classes named in the user's own words."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import raster
from .exported import EXPORTED, on_onnx
from .flow import Picture, Tool, do_all, stacked
from .labels import embeds_of_export, words_to_encode
from .many import EPILOG as MANY
from .many import add_image_arguments, begin, open_pictures, writer_number
from .options import add_model_options, add_refine_option, open_model, read_labels
from .output import check_outputs, say, shorten, table
from .parser import check_one_of, fraction, name_and_value
from .picture_options import asked_of_pictures
from .result_options import add_result_options, asked_of_results, check_result_options
from .video import segment_videos, videos_among

if TYPE_CHECKING:
    from spar_hf.image_values_spar import ReadOptions
    from spar_hf.outputs import Writer
    from spar_hf.prompts_spar import Labels
    from spar_hf.sources import Photographs

BACKENDS = ("pytorch", "onnx")
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
  spar segment street.jpg --labels car --other 0.5
      only what is surely a car; the rest has no class
  spar segment street.jpg --labels "road; car; sky" --window-px native --stride-px 24
      slow: a window slides over the picture, SPAR's teacher
  spar segment photos/*.jpg --labels @classes.csv --format coco --instances --min-area 64
      what other tools read: coco, geojson, geotiff, yolo, score maps (docs/results.md)
  spar segment clip.mp4 --labels "road; car; sky" --smooth 0.8
      a video, frame by frame

files:
  NAME-overlay.png  the picture tinted by class, with a legend
  NAME-labels.png   the label map: the value of a pixel is the position of its class in --labels, from 0, or its id
                    in a file of labels; a pixel without a class has the highest value, 255 or 65535

""" + MANY.replace("COMMAND", "segment")


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
        "--other",
        "--background-threshold",
        dest="background_threshold",
        type=fraction,
        metavar="P",
        help="pixels whose best class has a lower probability are something other and have no class; a single class "
        "competes with everyday words, as it has nothing else to lose against",
    )
    group.add_argument(
        "--class-threshold",
        action="append",
        default=[],
        type=name_and_value,
        metavar="CLASS=P",
        help="the same for one class, in the place of --other; may be given again, and a file of labels may hold it",
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
    parser.add_argument(
        "--smooth",
        type=fraction,
        default=0.0,
        metavar="F",
        help="of a video: the share of the frames before in the scores of a frame, such as 0.8 (default: 0)",
    )
    add_refine_option(parser)
    add_model_options(parser)
    raster.add_raster_options(parser)
    parser.add_argument(
        "--backend",
        metavar="pytorch|onnx",
        help="what runs the model (default: onnx, without PyTorch, where --model is a folder of 'spar export', whose "
        "--dtype may be int8; else pytorch)",
    )


@dataclass
class Ready:
    """What segments pictures, in PyTorch or without it.

    Attributes:
        reading: what is read of a picture, and what is refused.
        prepare: an upright picture to what the network reads, outside of this process; None where `segment` does it.
        segment: pictures of one size to the pipeline's results.
        stream: the share of the past in the scores of a video -> what segments its frames, in order.
        facts: what runs and how, for the JSON output.
        weights: makes a few signs of the weights, by which others are told.
        batch_size: pictures that `segment` takes together.
        network_seconds: that the network took so far.
    """

    reading: ReadOptions
    prepare: Callable[[Any, str], Any] | None
    segment: Callable[[list[Picture]], Sequence[dict[str, Any]]]
    stream: Callable[[float], Callable[[Any], Any]]
    facts: dict[str, Any]
    weights: Callable[[], str]
    batch_size: int = 1
    network_seconds: float = 0.0


def run(args: argparse.Namespace) -> int:
    from spar_hf.outputs import Writer

    if args.backend is not None:
        check_one_of("backend", args.backend, BACKENDS)
    check_result_options(args)
    if raster.asked(args):
        return raster.run(args, competing, report)
    labels = read_labels(args.labels).with_thresholds(dict(args.class_threshold))
    thresholds = {name: getattr(args, name) for name in ("background_threshold", "score_threshold", "area_threshold")}
    options: dict[str, Any] = {name: value for name, value in thresholds.items() if value is not None}
    if args.background is not None:
        check_one_of("class", args.background, labels.class_names)
        options["background_class"] = labels.class_names.index(args.background)
        labels = replace(labels, background=options["background_class"])
    check_outputs(args)
    asked = asked_of_results(args)
    options |= asked.of_pipeline()
    rivalled = competing(labels, args)
    make_ready = _on_onnx if on_onnx(args) else _on_pytorch
    if videos := videos_among(args.images):
        ready = make_ready(args, rivalled, None, options)
        facts = {**ready.facts, **thresholds}
        return segment_videos(videos, partial(ready.stream, args.smooth), args, labels, asked, facts, report)
    if args.smooth:
        raise ValueError("--smooth is for videos, and there is none; leave it out")
    source, called = open_pictures(args)
    ready = make_ready(args, rivalled, source, options)
    source.reading = ready.reading
    open_writer = partial(Writer, args.output, labels, asked)
    writer = open_writer(writer_number(0))

    def decides() -> dict[str, Any]:
        return {"labels": repr(rivalled), "model": [ready.weights(), ready.facts]}

    batch = begin(args, source, called, decides, writer.recorded)

    def tell(record: dict[str, Any]) -> None:
        if batch.one_by_one:
            say(report(record))

    tool = Tool(source, ready.prepare, partial(_writing, open_writer))
    try:
        seconds = do_all(batch, tool, ready.segment, ready.batch_size, tell)
    except BaseException:
        writer.close()  # of what is done
        raise
    return batch.close({**ready.facts, **thresholds}, seconds, ready.network_seconds, writer.close)


def _writing(open_writer: Callable[[int], Writer], number: int) -> Callable[..., dict[str, Any]]:
    """What writes results in the process of a number."""
    return partial(write_result, open_writer(number))


def write_result(writer: Writer, stem: str, picture: Picture, found: dict[str, Any]) -> dict[str, Any]:
    """Writes one result, outside of the process with the network; returns what is to know of it."""
    seconds = found.pop("seconds")
    return {**writer.add(stem, picture.image, found, picture.name), "seconds": seconds}


def _on_pytorch(
    args: argparse.Namespace, labels: Labels, source: Photographs | None, options: dict[str, Any]
) -> Ready:
    import torch

    from spar_hf.files import weights_digest
    from spar_hf.image_file_spar import InvalidImageError
    from spar_hf.pipeline_spar import OpenVocabularySegmentationPipeline
    from spar_hf.segmenters import Smoothed

    if (Path(args.model) / EXPORTED).is_file():
        raise ValueError(f"{args.model} is an exported model, which PyTorch does not run; leave --backend out")
    opened = open_model(args, args.refine)
    segmenter = opened.segmenter(args.refine)
    pipeline = OpenVocabularySegmentationPipeline(
        model=opened.model, processor=opened.processor, device=opened.model.device
    )
    image_processor = opened.processor.image_processor
    if source is not None:
        source.reading = image_processor.read_options

    def unlabelled() -> Iterator[Any]:
        for number, name in enumerate([] if source is None else source.names):
            with suppress(InvalidImageError):  # told when its turn comes
                image = opened.tell_masks(name, source.picture(number))  # type: ignore[union-attr]
                yield opened.processor(images=image, return_tensors="pt")["pixel_values"]

    words = words_to_encode(args, labels, opened)
    encoded = segmenter.encode_labels(words, unlabelled=unlabelled())  # once, for all pictures

    def network(pixel_values: Any, encoded: Any) -> Any:
        started = time.perf_counter()
        maps = segmenter(pixel_values, encoded)
        ready.network_seconds += time.perf_counter() - started
        return maps

    def segment(pictures: list[Picture]) -> Sequence[dict[str, Any]]:
        for picture in pictures:
            opened.tell_masks(picture.name, picture.image)
        started = time.perf_counter()
        pixel_values = torch.from_numpy(stacked(pictures))
        sizes_hw = [(picture.image.height, picture.image.width) for picture in pictures]
        found = pipeline.from_pixels(pixel_values, sizes_hw, encoded, network, **options)
        for result in found:
            result["seconds"] = round((time.perf_counter() - started) / len(pictures), 4)
        return found

    def stream(keep: float) -> Callable[[Any], Any]:
        own = Smoothed(segmenter, keep) if keep else segmenter
        return lambda image: pipeline(image, candidate_labels=encoded, segmenter=own, **options)

    ready = Ready(
        reading=image_processor.read_options,
        prepare=image_processor.input_pixels.values,
        segment=segment,
        stream=stream,
        facts=opened.facts,
        weights=lambda: weights_digest(*segmenter.networks),
        batch_size=opened.batch_size(args.batch_size),
    )
    return ready


def _on_onnx(args: argparse.Namespace, labels: Labels, source: Photographs | None, options: dict[str, Any]) -> Ready:
    import spar_onnx
    from spar_hf.files import digest

    fixed = {f"--{name.replace('_', '-')}": getattr(args, name) for name in FIXED_BY_EXPORT}
    fixed |= {"--set": args.settings, "--smooth": args.smooth}
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
    encoded = embeds_of_export(args, labels, pipeline)  # once, for all pictures
    facts = {
        "model": args.model,
        "backend": "onnx",
        **{name: pipeline.exported.record.get(name) for name in ("method", "attention_reach")},
        "dtype": pipeline.dtype,
        **pictures,
    }

    def one(image: Any) -> Any:
        return pipeline(image, encoded, size=args.short_side, **options)

    def segment(pictures: list[Picture]) -> list[dict[str, Any]]:
        found = []
        for picture in pictures:
            started = time.perf_counter()
            result = one(picture.image)
            seconds = time.perf_counter() - started
            ready.network_seconds += seconds
            result["seconds"] = round(seconds, 4)
            found.append(result)
        return found

    record = json.dumps(pipeline.exported.record, sort_keys=True).encode()
    ready = Ready(pipeline.reading, None, segment, lambda _: one, facts, weights=lambda: digest([record]))
    return ready


def competing(labels: Labels, args: argparse.Namespace) -> Labels:
    """The vocabulary with the names that only compete."""
    from spar_hf.prompts_spar import EVERYDAY_WORDS

    if args.against is not None:
        return labels.against(name for name in args.against.split(";") if name.strip())
    return labels.against(EVERYDAY_WORDS) if labels.wants_rivals(args.background_threshold) else labels


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
