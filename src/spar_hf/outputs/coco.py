"""COCO: run-length masks for pycocotools and panoptic pictures, each with one JSON file about all pictures."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageColor

from ..files import whole_files
from ..prompts_spar import Labels
from .classes import class_table
from .picture import File, PictureResult
from .regions import Region
from .rle import as_text, run_lengths

INSTANCES, PANOPTIC = "coco-instances.json", "coco-panoptic.json"


def annotation(region: Region, labels: Labels, size_hw: tuple[int, int]) -> dict[str, Any]:
    """A region as COCO has it, but for the numbers of itself and of its picture."""
    left, top, right, bottom = region.xyxy
    counts = as_text(run_lengths(region.mask, top, left, *size_hw))
    entry: dict[str, Any] = {
        "category_id": labels.written_ids[region.class_index],
        "segmentation": {"size": list(size_hw), "counts": counts},
        "area": region.area,
        "bbox": [left, top, right - left, bottom - top],
        "iscrowd": 0,
    }
    return entry if region.score is None else {**entry, "score": round(region.score, 4)}


def categories(labels: Labels, instances: bool) -> list[dict[str, Any]]:
    """The classes as COCO's categories."""
    return [
        {
            "id": row["id"],
            "name": row["name"],
            "supercategory": "",
            "isthing": int(instances),
            "color": list(ImageColor.getrgb(row["colour"])),
        }
        for row in class_table(labels)
    ]


def coco(found: PictureResult) -> dict[str, File]:
    """The panoptic picture: the number of a region, from 1, as red + 256 green + 65536 blue; 0 is none."""
    numbers = found.regions.numbers + 1
    if int(numbers.max()) >= 2**24:
        raise ValueError(f"{found.source} has {numbers.max()} regions, and a panoptic PNG holds 2^24; give --min-area")
    rgb = np.stack([numbers & 255, numbers >> 8 & 255, numbers >> 16], -1).astype(np.uint8)

    def save(path: Path) -> None:
        Image.fromarray(rgb).save(path, format="PNG")

    return {"panoptic": File(panoptic_name(found.stem), save)}


def panoptic_name(stem: str) -> str:
    return f"{stem}-panoptic.png"


def record(found: PictureResult) -> dict[str, Any]:
    """What both files say of a picture, before pictures and annotations are numbered."""
    height, width = found.size_hw
    return {
        "image": {"file_name": found.source, "height": height, "width": width},
        "instances": found.instances,
        "panoptic": panoptic_name(found.stem),
        "annotations": [annotation(region, found.labels, found.size_hw) for region in found.regions],
    }


def write_all(folder: Path, labels: Labels, records: Callable[[], Iterable[dict[str, Any]]]) -> None:
    """Both files anew, of the records of all pictures; they take their places together."""
    instances = any(picture["instances"] for picture in records())
    head = {"info": {"description": "spar segment"}, "licenses": [], "categories": categories(labels, instances)}
    with whole_files(folder / INSTANCES, folder / PANOPTIC) as drafts:
        for draft, entries in zip(drafts, (_instances, _panoptic), strict=True):
            with open(draft, "w", encoding="utf-8") as file:
                file.write(json.dumps(head, ensure_ascii=False)[:-1])
                _write_list(file, "images", ({"id": n, **picture["image"]} for n, picture in enumerate(records(), 1)))
                _write_list(file, "annotations", entries(records()))
                file.write("}\n")


def _write_list(file: Any, key: str, entries: Iterable[dict[str, Any]]) -> None:
    """A member that is a list, entry by entry, so that no list of all is ever held."""
    file.write(f",\n{json.dumps(key)}: [")
    for number, entry in enumerate(entries):
        file.write(",\n" if number else "\n")
        file.write(json.dumps(entry, ensure_ascii=False))
    file.write("]")


def _instances(records: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    number = 0
    for image_id, picture in enumerate(records, 1):
        for entry in picture["annotations"]:
            number += 1  # from 1: pycocotools takes 0 for no match
            yield {"id": number, "image_id": image_id, **entry}


def _panoptic(records: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
    for image_id, picture in enumerate(records, 1):
        segments = [
            {"id": number, **{key: entry[key] for key in ("category_id", "area", "bbox", "iscrowd")}}
            for number, entry in enumerate(picture["annotations"], 1)
        ]
        yield {"image_id": image_id, "file_name": picture["panoptic"], "segments_info": segments}
