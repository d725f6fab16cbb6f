"""`spar features`: patch features as safetensors, and a picture of their principal components."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

from .flow import Picture, Tool, do_all, stacked
from .many import EPILOG as MANY
from .many import add_image_arguments, begin, open_pictures
from .options import add_model_options, open_model
from .output import check_outputs, say

if TYPE_CHECKING:
    from numpy.typing import NDArray

HELP = "Write the patch features of pictures, one text-aligned vector for each patch, and a PCA picture of them."
EPILOG = """examples:
  spar features street.jpg --output features
  spar features photos/*.jpg --output features --model openai/clip-vit-base-patch16 --short-side 672
  python -c "from safetensors.torch import load_file; print(load_file('features/street.safetensors'))"

files:
  NAME.safetensors  patch_embeds (h, w, D), not normalised; what made them is in the file's metadata
  NAME-pca.png      the first three principal components as red, green and blue, at the picture's size

""" + MANY.replace("COMMAND", "features")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    add_model_options(parser)


@dataclass
class Found:
    """The features of one picture, as bytes, which go from process to process whatever their type.

    Attributes:
        patch_embeds: (h, w, bytes of D numbers), uint8.
        dtype: of the numbers.
        image_hw, extent_hw: see `SparVisionOutput`.
        seconds: that the network took.
    """

    patch_embeds: NDArray[Any]
    dtype: str
    image_hw: tuple[int, int]
    extent_hw: tuple[int, int]
    seconds: float


def run(args: argparse.Namespace) -> int:
    import torch

    from spar_hf.files import weights_digest

    check_outputs(args)
    source, called = open_pictures(args)
    opened = open_model(args)
    encoder = opened.encoder()
    image_processor = opened.processor.image_processor
    source.reading = image_processor.read_options
    network_seconds = 0.0

    def weights() -> str:
        return weights_digest(*(part for part in (encoder, opened.model) if isinstance(part, torch.nn.Module)))

    batch = begin(args, source, called, lambda: {"model": [weights(), opened.facts]})

    def encode(pictures: list[Picture]) -> list[Found]:
        nonlocal network_seconds
        started = time.perf_counter()
        pixel_values = torch.from_numpy(stacked(pictures))
        with torch.inference_mode():
            outputs = encoder(pixel_values.to(encoder.device, encoder.dtype))
        patch_embeds = outputs.patch_embeds.cpu().contiguous()  # (B, h, w, D)
        seconds = time.perf_counter() - started
        network_seconds += seconds
        dtype = str(patch_embeds.dtype).removeprefix("torch.")
        sizes = tuple(outputs.image_hw), tuple(outputs.extent_hw)
        return [
            Found(of_one.numpy(), dtype, *sizes, round(seconds / len(pictures), 4))
            for of_one in patch_embeds.view(torch.uint8)
        ]

    def tell(record: dict[str, Any]) -> None:
        if batch.one_by_one:
            say(report(record))

    tool = Tool(source, image_processor.input_pixels.values, partial(_writing, args.output, opened.facts))
    seconds = do_all(batch, tool, encode, opened.batch_size(args.batch_size), tell)
    return batch.close(opened.facts, seconds, network_seconds)


def _writing(output: Path, model: dict[str, Any], number: int) -> Callable[..., dict[str, Any]]:
    return partial(write_features, output, model)


def write_features(output: Path, model: dict[str, Any], stem: str, picture: Picture, found: Found) -> dict[str, Any]:
    """Writes the features of one picture and shows them; returns what is to know of them."""
    import torch
    from safetensors.torch import save_file

    from spar_hf.files import whole_files
    from spar_hf.grid_spar import coverage
    from spar_hf.visualize import pca_picture

    size_hw = picture.image.height, picture.image.width
    patch_embeds = torch.from_numpy(found.patch_embeds).view(getattr(torch, found.dtype))  # (h, w, D)
    facts = {
        "image": PurePath(picture.name).name,
        "size_hw": list(size_hw),
        "input_hw": list(found.image_hw),
        "extent_hw": list(found.extent_hw),
        "grid_hw": list(patch_embeds.shape[:2]),
        "dim": patch_embeds.shape[2],
    }
    metadata = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in {**facts, **model}.items()
    }
    features_path, picture_path = output / f"{stem}.safetensors", output / f"{stem}-pca.png"
    with whole_files(features_path, picture_path) as (features_draft, picture_draft):
        save_file({"patch_embeds": patch_embeds}, features_draft, metadata=metadata)
        coverage_hw = coverage(found.image_hw, found.extent_hw)
        pca_picture(patch_embeds, size_hw, coverage_hw).save(picture_draft, format="PNG")
    files = {"features": str(features_path), "picture": str(picture_path)}
    return {**facts, "image": picture.name, "seconds": found.seconds, **files, "files": files}


def report(record: dict[str, Any]) -> str:
    """What one picture has, in a few lines."""
    from spar_hf.visualize import plain_text

    (height, width), (rows, columns) = record["size_hw"], record["grid_hw"]
    return (
        f"{plain_text(record['image'])}: {width} x {height} px, {columns} x {rows} patches of "
        f"{record['dim']} numbers, {record['seconds']:.2f} s\n"
        f"  features  {plain_text(record['features'])}\n"
        f"  picture   {plain_text(record['picture'])}\n"
    )
