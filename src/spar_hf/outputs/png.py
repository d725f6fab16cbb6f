"""Pictures of results: the overlay, the label map and the best probabilities."""

from __future__ import annotations

from functools import partial

from ..visualize import label_map_image, overlay, scores_image
from .picture import File, PictureResult


def png(found: PictureResult) -> dict[str, File]:
    """The overlay with its legend, the label map, and the scores where they are asked for."""
    result = found.result
    made = {
        "overlay": ("overlay", overlay(found.image, result["segmentation"], result["labels"])),
        "label_map": ("labels", label_map_image(result["segmentation"])),
    }
    if found.options.scores:
        made["scores"] = ("scores", scores_image(result["scores"]))
    return {
        what: File(f"{found.stem}-{suffix}.png", partial(picture.save, format="PNG"))
        for what, (suffix, picture) in made.items()
    }
