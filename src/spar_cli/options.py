"""The options that say which model runs and how, and opening what they name."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL import Image

    from spar_hf.encoder_spar import DenseModel
    from spar_hf.processing_spar import SparProcessor
    from spar_hf.refinement import Refinement

DTYPES = ("float32", "bfloat16", "float16")


def check_one_of(what: str, word: str, allowed: Iterable[str]) -> str:
    """`word` if it is among the allowed ones.

    Raises:
        ValueError: it is not; the message lists them and suggests the nearest.
    """
    allowed = list(allowed)
    if word not in allowed:
        near = difflib.get_close_matches(word, allowed, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"there is no {what} {word!r}; choose one of {', '.join(allowed)}.{hint}")
    return word


def whole_number(word: str) -> int:
    """An argparse type: a whole number from 1 up."""
    if not re.fullmatch(r"[0-9]{1,15}", word) or int(word) < 1:
        raise argparse.ArgumentTypeError(f"it is {word!r}; give a whole number, at least 1")
    return int(word)


def window_px(word: str) -> int | str:
    """An argparse type: a whole number of pixels, or the word `native` or `paper`."""
    if word not in ("native", "paper") and not re.fullmatch(r"[0-9]{1,15}", word):
        raise argparse.ArgumentTypeError(f"it is {word!r}; give a whole number of pixels, or native, or paper")
    return word if word in ("native", "paper") else int(word)


def add_refine_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--refine",
        action="append",
        default=[],
        metavar="NAME",
        help="a label option, such as pamr; may be given again, they run in the order in which 'spar methods' lists "
        "them (default: none)",
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """The options that `segment`, `features` and `evaluate` have in common."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default="tiny",
        metavar="tiny|ID|FOLDER",
        help="a checkpoint that ships with the package (tiny: drawings only), an id on the Hugging Face Hub such as "
        "openai/clip-vit-base-patch16, or a folder (default: tiny)",
    )
    group.add_argument(
        "--method", metavar="NAME", help="how patch features are made of CLIP; 'spar methods' lists the names"
    )
    group.add_argument(
        "--network",
        metavar="ID|FOLDER",
        help="the second network of a method that needs one: a ViT (default: the one of its authors)",
    )
    group.add_argument(
        "--attention-reach",
        metavar="image|window",
        help="how far attention reaches in one pass: over the whole image, or as far as the native windows around "
        "each patch, for pictures far larger than the native size (default: the checkpoint's)",
    )
    group.add_argument(
        "--window-px",
        type=window_px,
        metavar="N|native|paper",
        help="slide a window of this side over the image and average (slow) instead of one pass; native is the side "
        "the model was trained at, paper the one that the method's authors used",
    )
    group.add_argument(
        "--stride-px", type=int, metavar="N", help="step of the sliding window (default: that of the method's authors)"
    )
    group.add_argument(
        "--short-side", type=whole_number, metavar="N", help="resize the image to this shorter side, keeping its ratio"
    )
    group.add_argument(
        "--max-pixels",
        type=whole_number,
        metavar="N",
        help="refuse larger images (default: 100 million)",
    )
    group.add_argument("--dtype", default="float32", metavar="NAME", help=f"{', '.join(DTYPES)} (default: float32)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes an accelerator if any")


def add_image_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="a picture file; several are fine")
    parser.add_argument(
        "--output", type=Path, default=Path("spar-output"), metavar="FOLDER", help="default: spar-output"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results as JSON")


@dataclass(frozen=True)
class Opened:
    """A model ready to run.

    Attributes:
        encoder: The model's vision tower, a method around it, or a sliding window around either.
        refinement: The label options that are on, if any.
        facts: What was opened and how, for the JSON output.
    """

    model: DenseModel
    processor: SparProcessor
    encoder: Any
    refinement: Refinement | None
    facts: dict[str, Any]


def open_model(args: argparse.Namespace, refine: Sequence[str] = ()) -> Opened:
    """The model, processor and dense encoder that the model options ask for, with the label options of those names.

    Raises:
        ValueError: no such model, method, label option or device, a window or stride out of range.
        OSError: the Hub or the files can't be read.
    """
    import torch

    from spar_hf.build import build_encoder
    from spar_hf.checkpoints import load
    from spar_hf.encoders.sliding_window import SlidingWindow
    from spar_hf.methods.table import METHODS
    from spar_hf.refinement import LABEL_OPTIONS, Refinement

    check_one_of("dtype", args.dtype, DTYPES)
    if args.method is not None:
        check_one_of("method", args.method, METHODS)
    for name in refine:
        check_one_of("label option", name, LABEL_OPTIONS)
    device = _device(args.device)
    model, processor = load(args.model, dtype=getattr(torch, args.dtype))
    model.to(device)
    image_processor = processor.image_processor
    if args.short_side is not None:
        image_processor.size = {"shortest_edge": args.short_side}
        image_processor.do_resize = True
    if args.max_pixels is not None:
        image_processor.max_image_pixels = image_processor.max_input_pixels = args.max_pixels

    fields = {} if args.attention_reach is None else {"attention_reach": args.attention_reach}
    encoder: Any = build_encoder(model.vision_model, args.method, args.network, **fields)
    config = encoder.config
    facts = {"model": args.model, "method": config.method, "attention_reach": config.attention_reach}
    facts |= {"dtype": args.dtype, "device": str(device)}
    if args.network is not None:
        facts["network"] = args.network
    refinement = None
    if refine:
        refinement = Refinement(model, refine, encoder)
        encoder = refinement.encoder  # a window goes around the views, as their authors ran them
        facts["refine"] = list(refinement.names)
    if args.window_px is not None or args.stride_px is not None:
        sides_px = {None: config.window_px, "paper": config.window_px, "native": None}
        side_px = sides_px.get(args.window_px, args.window_px)
        stride_px = config.stride_px if args.stride_px is None else args.stride_px
        encoder = SlidingWindow(encoder, window_px=side_px, stride_px=stride_px)
        facts |= {"window_px": encoder.window_px, "stride_px": encoder.stride_px}
    return Opened(model, processor, encoder, refinement, facts)


def _device(name: str) -> Any:
    import torch

    if name == "auto":
        return torch.accelerator.current_accelerator() or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        available = ["cpu"]
        if accelerator := torch.accelerator.current_accelerator():
            available += [f"{accelerator.type}:{index}" for index in range(torch.accelerator.device_count())]
        raise ValueError(f"--device is {name!r}; this machine has {', '.join(available)}") from None
    return device


def check_images(paths: Sequence[Path]) -> None:
    """Says before a model is loaded that a file is missing or a folder."""
    for path in paths:
        if path.is_dir():
            raise ValueError(f"{path} is a folder; name the pictures in it, for instance {path}/*.jpg")
        if not path.exists():
            raise ValueError(f"there is no file {path}")


def open_image(path: Path, opened: Opened) -> Image.Image:
    """The picture in a file as the model will see it: upright, RGB, at its own size."""
    return opened.processor.image_processor.open_rgb(path)
