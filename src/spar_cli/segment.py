"""`spar segment`: label maps, overlays and areas of classes named in the user's own words."""

from __future__ import annotations

import argparse
import time
from typing import Any

from .options import add_image_arguments, add_model_options, add_refine_option, check_images, open_image, open_model
from .output import check_outputs, command_line, output_stems, progress, say, shorten, table

HELP = "Segment pictures into classes that you name; writes an overlay and a label map for each."
EPILOG = """examples:
  spar segment street.jpg --labels "road; car, automobile; sky"
      three classes, the second with two names; results go to spar-output/
  spar segment photos/*.jpg --labels "dog; cat; sofa; other, background" --output results --json results/all.json
  spar segment street.jpg --labels "road; car; sky" --model openai/clip-vit-base-patch16 --method naclip
      real photographs need a real checkpoint; 'tiny' knows drawings only
  spar segment street.jpg --labels "road; car; sky" --refine pamr
      edges that follow the picture; 'spar methods' lists the label options
  spar segment street.jpg --labels "road; car; sky" --window-px native --stride-px 24
      slow: a window slides over the picture, SPAR's teacher

files:
  NAME-overlay.png  the picture tinted by class, with a legend
  NAME-labels.png   the label map: the value of a pixel is the position of its class in --labels, from 0"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_image_arguments(parser)
    parser.add_argument(
        "--labels", required=True, metavar="TEXT", help="what to look for: classes split by ';', synonyms by ','"
    )
    add_refine_option(parser)
    add_model_options(parser)


def run(args: argparse.Namespace) -> None:
    from spar_hf.files import whole_files, write_json
    from spar_hf.pipeline_spar import OpenVocabularySegmentationPipeline
    from spar_hf.prompts_spar import Labels
    from spar_hf.visualize import label_map_image, overlay

    labels = Labels.parse(args.labels)
    check_outputs(args)
    check_images(args.images)
    opened = open_model(args, args.refine)
    segment = OpenVocabularySegmentationPipeline(
        model=opened.model, processor=opened.processor, device=opened.model.device
    )
    opened.processor.encode_labels(opened.model, labels)  # cached: the first image's seconds are its own
    if opened.refinement is not None:
        unlabelled = (
            opened.processor(images=open_image(path, opened), return_tensors="pt")["pixel_values"]
            for path in args.images
        )
        opened.refinement.fit(opened.encoder, opened.processor, labels, unlabelled)
    results = []
    for path, stem in progress(list(zip(args.images, output_stems(args.images), strict=True))):
        image = open_image(path, opened)
        started = time.perf_counter()
        found = segment(image, candidate_labels=labels, encoder=opened.encoder, refinement=opened.refinement)
        seconds = time.perf_counter() - started
        overlay_path, label_map_path = args.output / f"{stem}-overlay.png", args.output / f"{stem}-labels.png"
        with whole_files(overlay_path, label_map_path) as (overlay_partial, label_map_partial):
            overlay(image, found["segmentation"], labels).save(overlay_partial, format="PNG")
            label_map_image(found["segmentation"]).save(label_map_partial, format="PNG")
        areas = {entry["id"]: entry["area_fraction"] for entry in found["segments"]}
        results.append(
            {
                "image": str(path),
                "size_hw": [image.height, image.width],
                "input_hw": list(found["size_hw"]),
                "grid_hw": list(found["grid_hw"]),
                "seconds": round(seconds, 4),
                "classes": [
                    {"id": index, "label": title, "area_fraction": areas.get(index, 0.0)}
                    for index, title in enumerate(labels.class_names)
                ],
                "overlay": str(overlay_path),
                "label_map": str(label_map_path),
            }
        )
        say(report(results[-1]))
    if args.json is not None:
        write_json(args.json, {"command": command_line(args), **opened.facts, "images": results})


def report(result: dict[str, Any]) -> str:
    """One image's table: its classes, largest first; those not found share the last line."""
    from spar_hf.visualize import percent_text, plain_text

    (height, width), (rows, columns) = result["size_hw"], result["grid_hw"]
    name = plain_text(result["image"])
    lines = [f"{name}: {width} x {height} px, {columns} x {rows} patches, {result['seconds']:.2f} s"]
    classes = sorted(result["classes"], key=lambda entry: -entry["area_fraction"])
    found = [
        (shorten(plain_text(entry["label"])), percent_text(entry["area_fraction"]))
        for entry in classes
        if entry["area_fraction"]
    ]
    lines.append(table([("class", "area"), *found], "<>", indent="  "))
    absent = [plain_text(entry["label"]) for entry in classes if not entry["area_fraction"]]
    if absent:
        lines.append(f"  not found: {shorten(', '.join(absent), 100)}")
    lines.append(f"  overlay    {plain_text(result['overlay'])}")
    lines.append(f"  label map  {plain_text(result['label_map'])}")
    return "\n".join(lines) + "\n"
