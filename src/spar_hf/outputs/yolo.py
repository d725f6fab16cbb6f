"""YOLO: a text file a picture, a line a component: its class, and its outline in shares of the picture's sides."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from ..files import write_atomically
from ..prompts_spar import Labels
from .classes import class_table
from .picture import File, PictureResult
from .polygons import Polygon, Ring


def yolo(found: PictureResult) -> dict[str, File]:
    """Lines of `class x1 y1 x2 y2 ...`; the class is its position in the vocabulary, for YOLO counts from 0.

    A format of single rings has no holes: a slit of no width leads from the outline to each and back.
    """
    height, width = found.size_hw
    lines = []
    for region in found.regions:
        for polygon in found.regions.outlines[region.number]:
            points = (one_ring(polygon) / (width, height)).ravel().tolist()
            lines.append(f"{region.class_index} " + " ".join(f"{value:.7g}" for value in points))

    def save(path: Path) -> None:
        path.write_text("".join(f"{line}\n" for line in lines), encoding="ascii")

    return {"yolo": File(f"labels/{found.stem}.txt", save)}


def one_ring(polygon: Polygon) -> Ring:
    """The outline with its holes joined to it by slits between near corners."""
    ring = polygon[0]
    for hole in polygon[1:]:
        distances = np.abs(ring[:, None] - hole[None]).sum(-1) if len(ring) * len(hole) < 10**7 else None
        place, corner = (0, 0) if distances is None else np.unravel_index(distances.argmin(), distances.shape)
        around = np.roll(hole, -int(corner), axis=0)
        ring = np.concatenate([ring[: place + 1], around, around[:1], ring[place:]])
    return ring


def write_names(folder: Path, labels: Labels, records: Iterable[Any]) -> None:
    """`data.yaml`: what the classes are called, and beside YOLO's keys the ids and colours of their own."""
    table = class_table(labels)
    names = [f"  {index}: {json.dumps(row['name'], ensure_ascii=False)}" for index, row in enumerate(table)]
    more = [
        f"{key}: {json.dumps([row[name] for row in table])}" for key, name in (("ids", "id"), ("colours", "colour"))
    ]
    write_atomically(folder / "data.yaml", "\n".join(["names:", *names, *more, ""]).encode())
