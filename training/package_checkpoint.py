"""Puts a trained folder into the package, as `spar_hf.load(NAME)` finds it.

    python training/package_checkpoint.py .work/tiny tiny --source "trained from scratch on the picture book"
    python training/package_checkpoint.py runs/tiny-spar/model tiny-spar

Writes src/spar_hf/assets/NAME: configuration, weights (safetensors), tokenizer and processor, without the remote-code
files, which the package has anyway. The model card beside them, README.md, is left alone.
"""

import argparse
import json
import shutil
from pathlib import Path

from spar_hf import SparImageProcessor, SparModel, SparProcessor
from spar_hf.checkpoints import ASSETS, SHIPPED, load_processor
from spar_hf.pretrained import open_model, open_tokenizer, read_config

parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
parser.add_argument("folder", type=Path)
parser.add_argument("name", choices=SHIPPED)
parser.add_argument("--source", help="provenance, kept in the configuration")
args = parser.parse_args()

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
        SparImageProcessor(image_mean=vision.image_mean, image_std=vision.image_std, min_side_px=vision.patch_size),
        tokenizer,
    )

target = ASSETS / args.name
target.mkdir(parents=True, exist_ok=True)
model.save_pretrained(target)
processor.save_pretrained(target)
for code in target.glob("*.py"):
    code.unlink()
for path in target.glob("*.json"):
    content = json.loads(path.read_text())
    for part in (content, content.get("image_processor", {}), content.get("vision_config", {})):
        part.pop("auto_map", None)
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
shutil.rmtree(target / "__pycache__", ignore_errors=True)
size_mb = sum(path.stat().st_size for path in target.iterdir()) / 1e6
print(f"{target.name}: {', '.join(sorted(path.name for path in target.iterdir()))}; {size_mb:.1f} MB")
