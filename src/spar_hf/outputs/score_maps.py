"""Score maps: the likeliest classes of each pixel and their probabilities, as NumPy or safetensors files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ..visualize import as_written
from .classes import class_text
from .picture import File, PictureResult


def _arrays(found: PictureResult) -> dict[str, np.ndarray]:
    """`ids` (k, H, W), the likeliest class of each pixel first, and `probabilities` (k, H, W), fp16."""
    ids = as_written(found.result["top_classes"], found.labels)
    wide = max(found.labels.written_ids) > 255
    probabilities = found.result["top_probabilities"].astype(np.float16)
    return {"ids": ids.astype(np.uint16 if wide else np.uint8), "probabilities": probabilities}


def npz(found: PictureResult) -> dict[str, File]:
    """`ids` and `probabilities`, and in `classes` ids, names and colours as JSON."""

    def save(path: Path) -> None:
        with open(path, "wb") as file:
            arrays: Any = _arrays(found)
            np.savez_compressed(file, **arrays, classes=np.array(class_text(found.labels)))

    return {"score_maps": File(f"{found.stem}-scores.npz", save)}


def safetensors(found: PictureResult) -> dict[str, File]:
    """`ids` and `probabilities`, and in the metadata `classes` ids, names and colours as JSON."""
    from safetensors.numpy import save_file

    def save(path: Path) -> None:
        arrays = {name: np.ascontiguousarray(array) for name, array in _arrays(found).items()}
        save_file(arrays, path, metadata={"classes": class_text(found.labels)})

    return {"score_tensors": File(f"{found.stem}-scores.safetensors", save)}
