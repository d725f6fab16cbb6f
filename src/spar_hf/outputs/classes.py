"""The classes as files name them: id, name and colour, the same in every format."""

from __future__ import annotations

import json
from typing import Any

from ..prompts_spar import Labels
from ..visualize import colours_of


def class_table(labels: Labels) -> list[dict[str, Any]]:
    """`{"id", "name", "colour"}` of each class, in the order of the vocabulary; colours as `#rrggbb`."""
    rows = zip(labels.written_ids, labels.class_names, colours_of(labels).tolist(), strict=True)
    return [{"id": index, "name": name, "colour": "#{:02x}{:02x}{:02x}".format(*rgb)} for index, name, rgb in rows]


def class_text(labels: Labels) -> str:
    """`class_table` as JSON, for the metadata of files."""
    return json.dumps(class_table(labels), ensure_ascii=False)


def colour_table(labels: Labels) -> dict[int, tuple[int, int, int, int]]:
    """Id -> red, green, blue and alpha, as rasterio's `write_colormap` takes it."""
    colours = colours_of(labels).tolist()
    return {index: (*rgb, 255) for index, rgb in zip(labels.written_ids, colours, strict=True)}
