"""Puts a trained folder into the package, as `spar_hf.load(NAME)` finds it.

examples:
  python training/package_checkpoint.py .work/tiny/model tiny --source "trained from scratch on the picture book"
  python training/package_checkpoint.py runs/tiny-spar/model tiny-spar

Writes src/spar_hf/assets/NAME: configuration, weights (safetensors), tokenizer and processor, without the remote-code
files, which the package has anyway. The model card beside them, README.md, is left alone.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys

from spar_cli.parser import Parser, path, text
from spar_cli.training_options import run_script, script_parser
from spar_hf import SparImageProcessor, SparModel, SparProcessor
from spar_hf.checkpoints import ASSETS, SHIPPED, load_processor
from spar_hf.files import whole_folder
from spar_hf.pretrained import open_model, open_tokenizer, read_config


def parser() -> Parser:
    parser = script_parser(__doc__, "FOLDER NAME")
    parser.add_argument("folder", type=path, metavar="FOLDER", help="what save_pretrained wrote")
    parser.add_argument("name", choices=SHIPPED, help="under which it ships")
    parser.add_argument("--source", type=text, help="provenance, kept in the configuration")
    return parser


def main(args: argparse.Namespace) -> None:
    overrides = {} if args.source is None else {"source": args.source}
    model = open_model(SparModel, args.folder, **overrides)
    if read_config(args.folder).get("model_type") == model.config.model_type:
        processor = load_processor(args.folder, model.config)
    else:
        vision = model.config.vision_config
        tokenizer = open_tokenizer(args.folder)
        for fixed_length in (tokenizer.backend_tokenizer.no_padding, tokenizer.backend_tokenizer.no_truncation):
            fixed_length()
        processor = SparProcessor(
            SparImageProcessor(
                image_mean=vision.image_mean, image_std=vision.image_std, min_side_px=vision.patch_size
            ),
            tokenizer,
        )

    target = ASSETS / args.name
    with whole_folder(target) as draft:
        model.save_pretrained(draft)
        processor.save_pretrained(draft)
        for code in draft.glob("*.py"):
            code.unlink()
        for file in draft.glob("*.json"):
            content = json.loads(file.read_text())
            for part in (content, content.get("image_processor", {}), content.get("vision_config", {})):
                part.pop("auto_map", None)
            file.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        if (target / "README.md").exists():
            shutil.copy(target / "README.md", draft)
    size_mb = sum(file.stat().st_size for file in target.iterdir()) / 1e6
    print(f"{target.name}: {', '.join(sorted(file.name for file in target.iterdir()))}; {size_mb:.1f} MB")


if __name__ == "__main__":
    sys.exit(run_script(parser(), main))
