"""`spar features`: patch features as safetensors, and a picture of their principal components."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from .options import Opened, add_image_arguments, add_model_options, check_images, open_image, open_model
from .output import Batch, check_outputs, command_line, say

HELP = "Write the patch features of pictures, one text-aligned vector for each patch, and a PCA picture of them."
EPILOG = """examples:
  spar features street.jpg --output features
  spar features photos/*.jpg --output features --model openai/clip-vit-base-patch16 --short-side 672
  python -c "from safetensors.torch import load_file; print(load_file('features/street.safetensors'))"

files:
  NAME.safetensors  patch_embeds (h, w, D), not normalised; what made them is in the file's metadata
  NAME-pca.png      the first three principal components as red, green and blue, at the picture's size"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> int:
    from spar_hf.files import write_json

    check_outputs(args)
    check_images(args.images)
    opened = open_model(args)
    encoder = opened.encoder()
    batch, results = Batch(args.images), []
    for path, stem in batch:
        with batch.may_fail(path):
            results.append(write_features(path, stem, args.output, opened, encoder))
    if args.json is not None:
        content = {"command": command_line(args), **opened.facts, "images": results, "failed": batch.as_json()}
        write_json(args.json, content)
    return batch.status()


def write_features(path: Path, stem: str, output: Path, opened: Opened, encoder: Any) -> dict[str, Any]:
    """Writes the features of one picture and shows them; returns what is to know of them."""
    import torch
    from safetensors.torch import save_file

    from spar_hf.files import whole_files
    from spar_hf.grid_spar import coverage
    from spar_hf.visualize import pca_picture, plain_text

    image = open_image(path, opened)
    pixel_values = opened.processor(images=image, return_tensors="pt")["pixel_values"]
    started = time.perf_counter()
    with torch.inference_mode():
        outputs = encoder(pixel_values.to(encoder.device, encoder.dtype))
    patch_embeds = outputs.patch_embeds[0].cpu().contiguous()  # (h, w, D)
    seconds = time.perf_counter() - started
    facts = {
        "image": path.name,
        "size_hw": [image.height, image.width],
        "input_hw": list(outputs.image_hw),
        "extent_hw": list(outputs.extent_hw),
        "grid_hw": list(patch_embeds.shape[:2]),
        "dim": patch_embeds.shape[2],
    }
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in {**facts, **opened.facts}.items()
    }
    features_path, picture_path = output / f"{stem}.safetensors", output / f"{stem}-pca.png"
    with whole_files(features_path, picture_path) as (features_draft, picture_draft):
        save_file({"patch_embeds": patch_embeds}, features_draft, metadata=metadata)
        coverage_hw = coverage(outputs.image_hw, outputs.extent_hw)
        pca_picture(patch_embeds, (image.height, image.width), coverage_hw).save(picture_draft, format="PNG")
    rows, columns = facts["grid_hw"]
    say(
        f"{plain_text(str(path))}: {image.width} x {image.height} px, {columns} x {rows} patches of "
        f"{facts['dim']} numbers, {seconds:.2f} s\n"
        f"  features  {plain_text(str(features_path))}\n"
        f"  picture   {plain_text(str(picture_path))}\n"
    )
    return {**facts, "seconds": round(seconds, 4), "features": str(features_path), "picture": str(picture_path)}
