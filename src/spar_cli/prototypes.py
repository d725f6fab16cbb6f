"""`spar prototypes`: a bank of references for the methods that look things up in one."""

from __future__ import annotations

import argparse
from pathlib import Path

from .options import add_model_options, open_model, read_labels
from .parser import positive, whole_number, whole_number_or_0

HELP = "Make a bank of references, from pictures of your own, for a method that needs one (--network bank=FILE)."
EPILOG = """examples:
  spar prototypes --method freeda --images photos --masks masks --classes classes.txt --output freeda.safetensors \\
      --model openai/clip-vit-large-patch14
      pictures with label maps, as spar evaluate takes them
  spar prototypes --method reco --images photos --labels "cat; dog, puppy; sky" --network dino=facebook/dino-vits16 \\
      --output reco.safetensors
      pictures without labels; each name looks for its own among them, or in a folder of its name
  spar prototypes --method corrclip_v2_bank --images photos --short-side 448 --output regions.safetensors
      regions of pictures without labels
  spar prototypes --method freeda --generate 20 --labels "cat; dog, puppy; sky" --output drawn.safetensors \\
      --model openai/clip-vit-large-patch14
      pictures that Stable Diffusion draws of each class; it is not needed afterwards
  spar segment street.jpg --labels "cat; dog; sky" --method reco --network bank=reco.safetensors \\
      --network dino=facebook/dino-vits16

A run that was stopped goes on with the same command. A bank is of one model and network, and says so."""
EXAMPLE = "stable-diffusion-v1-5/stable-diffusion-v1-5"
NOT_HERE = ("window_px", "stride_px", "upsample", "upsample_factor")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="the pictures")
    parser.add_argument("--masks", type=Path, metavar="FOLDER", help="their label maps, PNG, of --classes")
    parser.add_argument("--classes", type=Path, metavar="FILE", help="one class a line, synonyms by ','")
    parser.add_argument(
        "--labels",
        metavar="WORDS|@FILE",
        help="without --masks: the names to make prototypes for; what lies in a folder of a class's name is of it",
    )
    parser.add_argument(
        "--generate",
        type=whole_number,
        metavar="N",
        help="draw N pictures of each class of --labels with Stable Diffusion, whose attention says where it is",
    )
    parser.add_argument("--diffusion", metavar="ID|FOLDER", default=EXAMPLE, help=f"that draws ({EXAMPLE})")
    parser.add_argument("--draw-steps", type=whole_number, metavar="N", default=50, help="UNet passes a picture (50)")
    parser.add_argument("--draw-seed", type=whole_number_or_0, metavar="N", default=0, help="of the pictures (0)")
    parser.add_argument("--picture-book", type=whole_number, metavar="N", help="N training scenes of the picture book")
    parser.add_argument("--scale", type=positive, default=1.0, metavar="K", help="their side, in native sides")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="the bank, .safetensors")
    add_model_options(parser, masks="--region-masks")


def run(args: argparse.Namespace) -> None:
    from spar_hf.evaluation import load_benchmark
    from spar_hf.networks.diffusion import Diffusion
    from spar_hf.networks.drawing import Drawing
    from spar_hf.prototypes import Pictures, build_bank

    if args.output.is_dir():
        raise ValueError(f"--output is {args.output}, which is a folder; give a file")
    if args.method is None:
        raise ValueError(
            "--method is missing; name the method that the bank is for (spar methods says which need one)"
        )
    for name in NOT_HERE:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} is not for prototypes; leave it out")
    labelled = args.masks is not None or args.classes is not None
    if sum(source is not None for source in (args.images, args.picture_book, args.generate)) != 1:
        raise ValueError("give --images FOLDER, --picture-book N or --generate N, one of them")
    if args.labels is not None and (labelled or args.picture_book is not None):
        raise ValueError("--labels are for pictures without label maps; leave them out")
    if args.picture_book is not None and labelled:
        raise ValueError("--masks and --classes are for --images; leave them out")
    if args.generate is not None and (labelled or args.labels is None):
        raise ValueError("--generate draws what --labels name; give these, and no --masks and --classes")
    opened = open_model(args)
    reading = opened.processor.image_processor.read_options
    if args.picture_book is not None:
        side_px = round(args.scale * opened.model.vision_model.config.image_size)
        pictures = Pictures.of_picture_book(args.picture_book, side_px)
    elif args.generate is not None:
        settings = Drawing(steps=args.draw_steps, seed=args.draw_seed)
        diffusion = Diffusion(args.diffusion).to(opened.model.device, opened.model.dtype)
        pictures = Pictures.drawn(diffusion, read_labels(args.labels), args.generate, settings)
    elif labelled:
        files = {"images": args.images, "masks": args.masks, "classes": args.classes}
        pictures = Pictures.of_benchmark(load_benchmark("custom", reading=reading, **files))
    else:
        labels = None if args.labels is None else read_labels(args.labels)
        pictures = Pictures.of_folder(args.images, labels, reading)
    bank = build_bank(
        args.output,
        args.method,
        opened.model,
        opened.processor,
        pictures,
        networks=opened.choices["networks"],
        settings=opened.choices["settings"],
        masks=opened.masks,
    )
    size_mb = args.output.stat().st_size / 1e6
    print(f"{len(bank)} entries from {len(pictures.names)} pictures: {args.output}, {size_mb:.1f} MB")
