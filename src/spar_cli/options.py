"""The options that say which model runs and how, and opening what they name."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from .parser import check_one_of, name_and_value, whole_number, window_px
from .picture_options import add_picture_options, asked_of_pictures

if TYPE_CHECKING:
    from PIL import Image

    from spar_hf.encoder_spar import DenseModel
    from spar_hf.networks.masks import MaskFolder
    from spar_hf.processing_spar import SparProcessor
    from spar_hf.prompts_spar import Labels
    from spar_hf.segmentation_spar import Segmenter
    from spar_hf.vocabulary import Vocabulary

BATCH_SIZE = 8  # of pictures, on an accelerator
DTYPES = ("float32", "bfloat16", "float16")


def add_refine_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--refine",
        action="append",
        default=[],
        metavar="NAME",
        help="a refinement, such as pamr; may be given again, they run in the order in which 'spar methods' lists "
        "them (default: none)",
    )


def add_model_options(parser: argparse.ArgumentParser, masks: str = "--masks") -> None:
    """The options that `segment`, `features` and `evaluate` have in common; `masks` is what one of them is called."""
    pictures = add_picture_options(parser)
    pictures.add_argument(
        "--max-pixels", type=whole_number, metavar="N", help="refuse larger pictures (default: 100 million)"
    )
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
        action="append",
        default=[],
        type=name_and_value,
        metavar="NAME=ID|FOLDER",
        help="a further network of the method, such as dino=facebook/dino-vitb8; may be given again (default: those "
        "of its authors, which 'spar methods' lists)",
    )
    group.add_argument(
        masks,
        dest="masks_of_regions",
        type=Path,
        metavar="FOLDER",
        help="for a method or refinement that reads regions: NAME.png, a map of region ids, or NAME.json, COCO RLE "
        "masks, of each picture, in the place of the network 'regions'; --network regions=slic needs neither masks "
        "nor a network",
    )
    group.add_argument(
        "--set",
        action="append",
        default=[],
        type=name_and_value,
        dest="settings",
        metavar="NAME=VALUE",
        help="a number of the method (shift=1.1) or of a refinement (pamr.steps=5) that differs from its authors'; "
        "may be given again",
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
        "--upsample",
        metavar="NAME[=ID|FOLDER]",
        help="follow the image's edges on a finer grid: jbu, upsample_anything (slow: fits each image), or "
        "anyup=FOLDER with weights that 'spar convert --backbone anyup' wrote; it can help or hurt (default: none)",
    )
    group.add_argument(
        "--upsample-factor",
        type=whole_number,
        metavar="N",
        help="cells of the finer grid to a patch's side (default: one for each pixel)",
    )
    group.add_argument(
        "--short-side", type=whole_number, metavar="N", help="resize the image to this shorter side, keeping its ratio"
    )
    group.add_argument("--dtype", metavar="NAME", help=f"{', '.join(DTYPES)} (default: float32)")
    group.add_argument("--device", default="auto", help="cpu, cuda, cuda:1, mps; auto takes an accelerator if any")


@dataclass(frozen=True)
class Opened:
    """A model ready to run, and what the builders are told.

    Attributes:
        choices: Arguments of `build_encoder` and `build_segmenter`: method, networks, settings, window, reach,
            upsampler.
        facts: What was opened and how, for the JSON output.
        masks: What regions are read from, to be told of each picture; `tell_masks` does.
    """

    model: DenseModel
    processor: SparProcessor
    choices: dict[str, Any]
    facts: dict[str, Any]
    masks: MaskFolder | None = None

    def encoder(self) -> Any:
        """The dense encoder that the options ask for."""
        from spar_hf.build import build_encoder

        return build_encoder(self.model.vision_model, **self.choices)

    def segmenter(self, refine: Sequence[str] = ()) -> Segmenter:
        """The segmenter that the options ask for, with refinements."""
        from spar_hf.build import build_segmenter

        return build_segmenter(self.model, self.processor, refine=refine, **self.choices)

    def tell_masks(self, name: str, image: Image.Image) -> Image.Image:
        """Says which picture comes next to what reads its regions from a folder; returns the picture."""
        if self.masks is not None:
            self.masks.select(PurePath(name).name, (image.height, image.width))
        return image

    def batch_size(self, asked: int | None) -> int:
        """How many pictures go through the network together: one, where it is told of each."""
        if self.masks is not None:
            return 1
        return asked or (1 if self.model.device.type == "cpu" else BATCH_SIZE)


def open_model(args: argparse.Namespace, refine: Sequence[str] = ()) -> Opened:
    """The model and processor that the model options ask for.

    Raises:
        ValueError: no such model, method, setting, refinement or device.
        OSError: the Hub or the files can't be read.
    """
    import torch

    from spar_hf.build import record, vision_config_of, window_of
    from spar_hf.checkpoints import load
    from spar_hf.upsampling import load_upsampler

    dtype = args.dtype or DTYPES[0]
    check_one_of("dtype", dtype, DTYPES)
    masks = read_masks(args, refine)
    choices = {
        "method": args.method,
        "networks": dict(args.network) if masks is None else {**dict(args.network), "regions": masks},
        "settings": dict(args.settings),
        "window": args.window_px,
        "stride_px": args.stride_px,
        "reach": args.attention_reach,
        "upsample": None if args.upsample is None else load_upsampler(args.upsample),
        "upsample_factor": args.upsample_factor,
    }
    chosen = record(args.method, choices["networks"], choices["settings"], refine)  # mistakes are told before loading
    device = device_of(args.device)
    model, processor = load(args.model, dtype=getattr(torch, dtype))
    model.to(device)
    image_processor = processor.image_processor
    if args.short_side is not None:
        image_processor.size = {"shortest_edge": args.short_side}
        image_processor.do_resize = True
    pictures = asked_of_pictures(args)
    for name, value in pictures.items():
        setattr(image_processor, name, value)
    if args.max_pixels is not None:
        image_processor.max_image_pixels = image_processor.max_input_pixels = args.max_pixels

    vision = model.vision_model.config
    facts = {
        "model": args.model,
        "method": args.method or vision.method,
        "attention_reach": args.attention_reach or vision.attention_reach,
        "dtype": dtype,
        "device": str(device),
        **chosen,
        **pictures,
    }
    if args.upsample is not None:
        facts["upsample"] = {"name": args.upsample, "factor": args.upsample_factor or vision.patch_size}
    if args.window_px is not None or args.stride_px is not None:
        facts["window_px"], facts["stride_px"] = window_of(
            vision_config_of(model.vision_model, args.method), args.window_px, args.stride_px
        )
    return Opened(model, processor, choices, facts, masks)


def read_masks(args: argparse.Namespace, refine: Sequence[str]) -> MaskFolder | None:
    """The folder of masks that the options name.

    Raises:
        ValueError: there is no such folder, nothing reads regions, or they are to come from elsewhere too.
    """
    from spar_hf.methods.table import METHODS, find_method
    from spar_hf.networks.masks import MaskFolder
    from spar_hf.refinement import find_refinements

    folder: Path | None = args.masks_of_regions
    if folder is None:
        return None
    needs = [] if args.method is None else [*find_method(args.method).needs]
    if "regions" not in [*needs, *(name for row in find_refinements(refine).values() for name in row.networks)]:
        readers = ", ".join(name for name, row in METHODS.items() if "regions" in row.needs)
        whose = "the model" if args.method is None else f"method {args.method!r}"
        raise ValueError(f"{whose} reads no regions, which {folder} is for; leave it out, or take --method {readers}")
    if "regions" in dict(args.network):
        raise ValueError(f"regions are to come from {folder} and from --network regions; give one of them")
    return MaskFolder(folder)


def read_labels(text: str, max_labels: int | None = None) -> Labels:
    """The vocabulary of `--labels`: words, or a file after an @."""
    from spar_hf.prompts_spar import MAX_LABELS, Labels

    if (saved := read_vocabulary(text)) is not None:
        return saved.labels
    if text.startswith("@"):
        return Labels.read(text[1:], max_labels or MAX_LABELS)
    if text.strip() and "\n" not in text and len(text) < 200 and Path(text).is_file():
        raise ValueError(f"--labels is {text!r}, which is a file; write --labels @{text} to read the labels in it")
    return Labels.parse(text, max_labels or MAX_LABELS)


def read_vocabulary(text: str) -> Vocabulary | None:
    """The vocabulary with text features of `--labels`, where that names such a file."""
    from spar_hf.vocabulary import Vocabulary, is_vocabulary

    return Vocabulary.read(text[1:]) if text.startswith("@") and is_vocabulary(text[1:]) else None


def device_of(name: str) -> Any:
    """The device of `--device`.

    Raises:
        ValueError: this machine has none of that name.
    """
    import torch

    from spar_hf.processes import launched, own_device

    if name == "auto" and launched():
        return own_device()
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
