"""A sample of a benchmark: an image and its label map, read by one rule and never turned apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..image_io_spar import StoredPixels, read_header, read_image, read_stored, turn
from ..image_values_spar import DEFAULTS, ReadOptions

IGNORED = -1  # the class id of a pixel that is not scored
MASK_ORIENTATIONS = ("upright", "stored")
_UNKNOWN = -2

LabelTable = Mapping[int, int]  # stored value -> class id or IGNORED


@dataclass(frozen=True)
class Sample:
    """One image of a benchmark: the RGB picture, and its class ids (H, W) int32, `IGNORED` where not scored."""

    name: str
    image: Image.Image
    target: np.ndarray


def read_sample(
    name: str,
    image_path: Path,
    mask_path: Path,
    table: LabelTable,
    reading: ReadOptions = DEFAULTS,
    mask_orientation: str | None = None,
) -> Sample:
    """Reads an image and its label map, upright both, and turns stored values into class ids.

    Raises:
        ValueError: If a file is no picture, the sizes differ, the label map is in colour, or `table` lacks a value.
    """
    image = read_image(image_path, reading)
    mask = read_stored(mask_path, reading, f"label map '{mask_path}'")
    if mask.values.ndim != 2:
        raise ValueError(
            f"{mask_path} is in colour; a label map is a grey or palette PNG of class indices. "
            "Convert the colours to indices."
        )
    stored = _upright_mask(mask, mask_path, image_path, reading, mask_orientation)
    if stored.shape != (image.height, image.width):
        height, width = stored.shape
        raise ValueError(
            f"{mask_path} is {height} x {width} px and its image {image.height} x {image.width}; both must "
            "have one size. Use the label map that belongs to the image."
        )
    lookup = np.full(2**16, _UNKNOWN, dtype=np.int32)
    lookup[list(table)] = list(table.values())
    in_range = (stored >= 0) & (stored < len(lookup))
    target = np.where(in_range, lookup[np.where(in_range, stored, 0)], _UNKNOWN)
    if (target == _UNKNOWN).any():
        unknown = np.unique(stored[target == _UNKNOWN])
        shown = ", ".join(map(str, unknown[:5].tolist())) + (", ..." if len(unknown) > 5 else "")
        raise ValueError(
            f"{mask_path} holds the labels {shown}, outside the vocabulary of {max(table.values()) + 1} classes. "
            "Check that the label map and the benchmark belong together."
        )
    return Sample(name, image, target.astype(np.int32))


def _upright_mask(
    mask: StoredPixels, mask_path: Path, image_path: Path, reading: ReadOptions, mask_orientation: str | None
) -> np.ndarray:
    """The label map as it lies on the upright image.

    Annotation tools that show images as stored, without EXIF, write label maps that must be turned with them. A label
    map that has an orientation of its own says how it lies.
    """
    header = read_header(image_path, reading)
    if mask.orientation != 1:
        return turn(mask.values, mask.orientation)
    if header.orientation == 1:
        return mask.values
    if mask_orientation is None:
        if header.stored_hw == header.size_hw:
            raise ValueError(
                f"{image_path} is turned by its EXIF orientation ({header.orientation}), and the size of "
                f"{mask_path} does not tell whether that is upright or as stored. Say which: mask_orientation."
            )
        mask_orientation = "stored" if mask.values.shape == header.stored_hw else "upright"
    return turn(mask.values, header.orientation) if mask_orientation == "stored" else mask.values
