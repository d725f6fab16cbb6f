"""`spar features`: patch features as safetensors, and a picture of their principal components."""

from __future__ import annotations

import argparse
import json
import time

from .options import add_image_arguments, add_model_options, check_images, open_image, open_model
from .output import check_outputs, command_line, output_stems, progress, say

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


def run(args: argparse.Namespace) -> None:
    import torch
    from safetensors.torch import save_file

    from spar_hf.files import whole_files, write_json
    from spar_hf.visualize import pca_picture, plain_text

    check_outputs(args)
    check_images(args.images)
    opened = open_model(args)
    results = []
    for path, stem in progress(list(zip(args.images, output_stems(args.images), strict=True))):
        image = open_image(path, opened)
        pixel_values = opened.processor(images=image, return_tensors="pt")["pixel_values"]
        started = time.perf_counter()
        with torch.inference_mode():
            outputs = opened.encoder(pixel_values.to(opened.encoder.device, opened.encoder.dtype))
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
        metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
        metadata |= {key: str(value) for key, value in opened.facts.items()}
        covered = [side / extent for side, extent in zip(outputs.image_hw, outputs.extent_hw, strict=True)]
        features_path, picture_path = args.output / f"{stem}.safetensors", args.output / f"{stem}-pca.png"
        with whole_files(features_path, picture_path) as (features_partial, picture_partial):
            save_file({"patch_embeds": patch_embeds}, features_partial, metadata=metadata)
            picture = pca_picture(patch_embeds, (image.height, image.width), (covered[0], covered[1]))
            picture.save(picture_partial, format="PNG")
        results.append(
            {**facts, "seconds": round(seconds, 4), "features": str(features_path), "picture": str(picture_path)}
        )
        rows, columns = facts["grid_hw"]
        say(
            f"{plain_text(str(path))}: {image.width} x {image.height} px, {columns} x {rows} patches of "
            f"{facts['dim']} numbers, {seconds:.2f} s\n"
            f"  features  {plain_text(str(features_path))}\n"
            f"  picture   {plain_text(str(picture_path))}\n"
        )
    if args.json is not None:
        write_json(args.json, {"command": command_line(args), **opened.facts, "images": results})
