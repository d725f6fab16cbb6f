"""`spar labels`: reads a vocabulary, says what is in it, and saves it with its text features."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from .exported import on_onnx
from .options import DTYPES, Opened, device_of, read_labels, read_vocabulary
from .output import shorten, table
from .parser import check_one_of, path, whole_number

if TYPE_CHECKING:
    from spar_hf.prompts_spar import Labels
    from spar_onnx import LabelEmbeds, OnnxPipeline

MOST_SHOWN = 40
HELP = "Show the classes of a vocabulary; save it with its text features, so that large ones start at once."
EPILOG = """examples:
  spar labels --labels @classes.csv
      the classes of a file: id, name, names that the text tower reads
  spar labels --labels @classes.csv --model openai/clip-vit-base-patch16 --save classes.safetensors
  spar segment street.jpg --labels @classes.safetensors --model openai/clip-vit-base-patch16
      reads words and text features; a file that another model made is refused"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        required=True,
        metavar="TEXT|@FILE",
        help="classes split by ';', synonyms by ','; or a file: a class a line, JSON or CSV with id, name, synonyms, "
        "colour, threshold",
    )
    parser.add_argument("--save", type=path, metavar="FILE.safetensors", help="encode the names and write this file")
    parser.add_argument(
        "--model", default="tiny", metavar="tiny|ID|FOLDER", help="whose text tower encodes them (default: tiny)"
    )
    parser.add_argument("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)} (default: float32)")
    parser.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes an accelerator if any")
    parser.add_argument(
        "--max-labels", type=whole_number, metavar="N", help="refuse vocabularies of more names (default: 10000)"
    )
    parser.set_defaults(backend=None)


def run(args: argparse.Namespace) -> int:
    from spar_hf.files import readable
    from spar_hf.vocabulary import Vocabulary, is_vocabulary

    if args.save is not None and not is_vocabulary(args.save):
        raise ValueError(f"--save is {args.save}; give a file that ends in .safetensors, by which it is known again")
    labels = read_labels(args.labels, args.max_labels)
    if args.save is None:
        print(listing(labels))
        return 0
    started = time.perf_counter()
    embeds, text_side = (_on_onnx if on_onnx(args) else _on_pytorch)(args, labels)
    Vocabulary(labels, embeds, text_side, args.model).save(args.save)
    size, took = args.save.stat().st_size / 1e6, readable(time.perf_counter() - started)
    print(f"{args.save}: {len(labels)} classes, {len(labels.names)} names, {size:.1f} MB, {took}")
    return 0


def _on_pytorch(args: argparse.Namespace, labels: Labels) -> tuple[Any, str]:
    import torch

    from spar_hf.checkpoints import load
    from spar_hf.vocabulary import text_side_of

    dtype = args.dtype or DTYPES[0]
    check_one_of("dtype", dtype, DTYPES)
    device = device_of(args.device)
    model, processor = load(args.model, dtype=getattr(torch, dtype))
    model.to(device)
    return processor.encode_labels(model, labels).text_embeds.cpu().numpy(), text_side_of(model, processor)


def _on_onnx(args: argparse.Namespace, labels: Labels) -> tuple[Any, str]:
    import spar_onnx
    from spar_hf.vocabulary import text_side_of_export

    pipeline = spar_onnx.load(args.model, args.dtype)
    return pipeline.encode_labels(labels).text_embeds, text_side_of_export(pipeline)


def words_to_encode(args: argparse.Namespace, labels: Labels, opened: Opened) -> Any:
    """The labels, or where `--labels` is a file with their text features, both.

    Raises:
        ValueError: the file was made by another model.
    """
    import torch

    from spar_hf.processing_spar import LabelFeatures
    from spar_hf.vocabulary import text_side_of

    saved = read_vocabulary(args.labels)
    if saved is None:
        return labels
    model, processor = opened.model, opened.processor
    saved.check_made_by(text_side_of(model, processor), args.labels[1:], args.model)

    def encode(more: Labels) -> Any:
        return processor.encode_labels(model, more).text_embeds.cpu().numpy()

    return LabelFeatures(labels, torch.from_numpy(saved.embeds_of(labels, encode)).to(model.device))


def embeds_of_export(args: argparse.Namespace, labels: Labels, pipeline: OnnxPipeline) -> LabelEmbeds:
    """The labels with their text features, read where `--labels` is a file with them, for an exported model.

    Raises:
        ValueError: the file was made by another model.
    """
    from spar_hf.vocabulary import text_side_of_export
    from spar_onnx import LabelEmbeds

    saved = read_vocabulary(args.labels)
    if saved is None:
        return pipeline.encode_labels(labels)
    saved.check_made_by(text_side_of_export(pipeline), args.labels[1:], args.model)
    return LabelEmbeds(labels, saved.embeds_of(labels, lambda more: pipeline.encode_labels(more).text_embeds))


def listing(labels: Labels) -> str:
    """The first classes as a table: id, what each is called, its names, colour and threshold where it has them."""
    from spar_hf.outputs.classes import class_table
    from spar_hf.visualize import plain_text

    thresholds = labels.thresholds or (None,) * len(labels)
    rows = [("id", "class", "names", "colour", "threshold")]
    for row, names, threshold in list(zip(class_table(labels), labels.classes, thresholds, strict=True))[:MOST_SHOWN]:
        words = shorten(plain_text(", ".join(names)))
        least = "" if threshold is None else f"{threshold:g}"
        rows.append((str(row["id"]), shorten(plain_text(row["name"])), words, row["colour"], least))
    more = len(labels) - MOST_SHOWN
    return table(rows, "><<<>") + (f"\nand {more} more" if more > 0 else "")
