"""`spar convert`: released and foreign checkpoints into `save_pretrained` form, with a report of what was checked."""

from __future__ import annotations

import argparse
from pathlib import Path

from .output import table
from .parser import check_one_of, whole_number

BACKBONES = ("clip", "metaclip2", "siglip2", "eva", "dinov3", "radio", "anyup")
ACTIVATIONS = ("gelu", "gelu_pytorch_tanh", "quick_gelu")
HELP = "Convert SPAR's released weights, or those of open_clip, timm, dino.txt or C-RADIO, and check the result."
EPILOG = """examples:
  spar convert spar_siglip2.pth --backbone siglip2 --activation gelu --text-activation gelu_pytorch_tanh \\
      --output spar-siglip2
      SPAR's release, or a Lightning .ckpt of its training
  spar convert open_clip_model.safetensors --backbone clip --activation gelu --output my-clip
  spar convert dinov3_vitl16_pretrain.pth dinov3_vitl16_dinotxt.pth --backbone dinov3 --output dinov3-txt \\
      --tokenizer bpe_simple_vocab_16e6.txt.gz
      dino.txt comes in two files
  spar convert c-radio_v3-b_half.pth.tar --backbone radio --adaptor siglip2-g --output c-radio
      NVIDIA's file, with the text tower of google/siglip2-giant-opt-patch16-384; --text names another place
  spar convert anyup_multi_backbone.pth --backbone anyup --output anyup
      an upsampler, for --upsample anyup=anyup

docs/checkpoints.md lists what there is. Files are read without running anything in them."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", nargs="+", type=Path, metavar="SOURCE", help="a file, a folder, or the parts of a release"
    )
    parser.add_argument(
        "--backbone",
        required=True,
        metavar="|".join(BACKBONES),
        help="siglip2 reads SigLIP too, eva EVA-02-CLIP and PE-Core",
    )
    parser.add_argument("--output", required=True, type=Path, metavar="FOLDER", help="a folder that is not there yet")
    parser.add_argument("--activation", metavar="NAME", help=f"{', '.join(ACTIVATIONS)}, where it cannot be seen")
    parser.add_argument("--text-activation", metavar="NAME", help="the same for the text tower, where it differs")
    parser.add_argument("--heads", type=whole_number, metavar="N", help="of the vision tower, where its width is rare")
    parser.add_argument("--text-heads", type=whole_number, metavar="N", help="of the text tower")
    parser.add_argument(
        "--tokenizer", metavar="FOLDER|ID|FILE", help="default: the family's on the Hub; FILE is CLIP's BPE, .txt.gz"
    )
    parser.add_argument("--adaptor", metavar="NAME", help="RADIO: the text teacher whose head is taken; none: no head")
    parser.add_argument("--text", metavar="FOLDER|ID", help="RADIO: that teacher's checkpoint, for its text tower")
    parser.add_argument("--mean", type=float, nargs=3, metavar=("R", "G", "B"), help="normalisation of the pixels")
    parser.add_argument("--std", type=float, nargs=3, metavar=("R", "G", "B"), help="normalisation of the pixels")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="NAME",
        help="accept an unused weight, or a missing single number; * and ? are patterns; may be repeated",
    )


def run(args: argparse.Namespace) -> None:
    check_one_of("backbone", args.backbone, BACKBONES)
    for activation in (args.activation, args.text_activation):
        if activation is not None:
            check_one_of("activation", activation, ACTIVATIONS)
    from spar_hf.conversion import convert, convert_anyup
    from spar_hf.conversion.layouts import Asked

    if args.backbone == "anyup":
        if args.text or args.adaptor:
            raise ValueError("--text and --adaptor are RADIO's; with --backbone anyup leave them out.")
        if len(args.source) > 1:
            raise ValueError(f"an AnyUp is one file, and {len(args.source)} are given; give one.")
        done = convert_anyup(args.source[0], args.output, args.allow)
    else:
        done = convert(
            args.source,
            args.backbone,
            args.output,
            Asked(args.activation, args.text_activation, args.heads, args.text_heads, args.adaptor),
            args.tokenizer,
            args.mean,
            args.std,
            args.allow,
            args.text,
        )
    print(f"{done.source} (SHA-256 {done.digest}...): {done.layout}\n")
    print(table([("used", "from"), *((ours, ", ".join(theirs)) for ours, theirs in done.used.items())], "<<"))
    print(f"\nunused or missing: {', '.join(done.allowed) or 'none'}")
    if done.left_out:
        print("\n" + table([("left out", "why"), *done.left_out.items()], "<<"))
    rows = [("checked against the source's own forward pass", "largest difference", "features' size")]
    rows += [(c.what, f"{c.max_difference:.1e}", f"{c.magnitude:.2g}") for c in done.comparisons]
    print("\n" + table(rows, "<>>"))
    print(f"\nwrote {args.output}")
