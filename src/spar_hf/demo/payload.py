"""What the page's viewers and the downloads are given: pictures as data, words as text, files under fixed names."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import is_running
from ..visualize import label_map_image, overlay, palette, percent_text, plain_text
from .engine import Answer, Features
from .pictures import resized_ids

MIN_SHOWN_PX = 480  # smaller pictures are enlarged by a whole factor
NO_CLASS = 65535  # of a pixel in the viewer
HEAT = ((24, 30, 84), (86, 180, 233), (240, 228, 66), (213, 94, 0))  # from the lowest similarity to the highest
GONE_AFTER_S = 120  # files that Gradio has copied into its own cache by then


def data_url(image: Image.Image, format: str) -> str:
    """A picture as text."""
    encoded = io.BytesIO()
    image.save(encoded, format=format, **({"quality": 90} if format == "JPEG" else {}))
    return f"data:image/{format.lower()};base64,{base64.b64encode(encoded.getvalue()).decode()}"


def shown_hw(image: Image.Image) -> tuple[int, int]:
    """Height and width of a picture on the page."""
    factor = max(1, round(MIN_SHOWN_PX / max(image.size)))
    return (factor * image.height, factor * image.width)


def ids_as_colours(ids: np.ndarray) -> Image.Image:
    """A label map whose red and green are the low and the high byte of the class id."""
    ids = np.where((ids < 0) | (ids >= NO_CLASS), NO_CLASS, ids.astype(np.int32)).astype(np.uint16)
    return Image.fromarray(np.stack([ids & 255, ids >> 8, np.zeros_like(ids)], axis=-1).astype(np.uint8))


def milliseconds(value: float) -> str:
    return f"{value / 1000:.1f} s" if value >= 10_000 else f"{value:.0f} ms"


def message(text: str) -> dict[str, Any]:
    """A viewer that shows a sentence instead of pictures."""
    return {"message": plain_text(text)}


def view(panels: Sequence[dict[str, Any]], answers: Sequence[Answer], key: str) -> dict[str, Any]:
    """The value of a viewer.

    Args:
        panels: For each picture its `title`, `note` and `answer` (an `Answer`), or `wait`, what it waits for.
        answers: All answers, for the legend; their classes in the order of the last one's areas.
        key: Tells one request from the next: the isolated class stays where it is the same.
    """
    last = answers[-1]
    class_names, names = last.labels.class_names, last.labels.classes
    colours = [*palette(len(class_names)).tolist(), None]  # the last for -1, no class
    areas = [{segment["id"]: segment["area_fraction"] for segment in answer.segments} for answer in answers]
    present = sorted({index for found in areas for index in found}, key=lambda index: -areas[-1].get(index, 0.0))
    classes = [
        {
            "id": index if index >= 0 else NO_CLASS,
            "label": plain_text(class_names[index]) if index >= 0 else "no class",
            "names": plain_text(", ".join(names[index])) if index >= 0 else "no word names these pixels well enough",
            "colour": colours[index],
            "area": " · ".join(percent_text(found.get(index, 0.0)) for found in areas),
            "fraction": areas[-1].get(index, 0.0),
        }
        for index in present
    ]
    image = last.picture.shown
    size_hw = shown_hw(image)
    shown = []
    for panel in panels:
        answer = panel.pop("answer", None)
        if answer is not None:
            panel["labels"] = data_url(ids_as_colours(resized_ids(answer.segmentation, size_hw)), "PNG")
            found = ", ".join(
                f"{segment['label']} {percent_text(segment['area_fraction'])}" for segment in answer.segments[:8]
            )
            panel["description"] = plain_text(f"{panel['title']}: {found}")
        shown.append(panel)
    photo = image.resize(size_hw[::-1], Image.Resampling.BICUBIC)
    return {
        "key": key,
        "image": data_url(photo, "JPEG"),
        "panels": shown,
        "classes": classes,
        "bars": len(panels) == 1,
    }


def feature_view(features: Features, model: str, cosines: np.ndarray, place: tuple[float, float]) -> dict[str, Any]:
    """The value of the features' viewer; `place` is (x, y), each 0 to 1."""
    size = shown_hw(features.shown)[::-1]
    pictures = []
    for title, picture in (
        ("Principal components of the features", features.pca),
        ("Similarity to the chosen patch", heat(features.shown, cosines)),
    ):
        source = data_url(picture.resize(size, Image.Resampling.BICUBIC), "JPEG")
        pictures.append({"title": title, "source": source, "width": size[0], "height": size[1]})
    height, width, dim = features.patch_embeds.shape
    reach = f"{cosines.min():.2f} to {cosines.max():.2f}"
    note = f"{width} × {height} patches of {dim} numbers, from {model} in one pass. Cosine: {reach}."
    return {"pictures": pictures, "place": list(place), "grid": [height, width], "note": plain_text(note)}


def heat(image: Image.Image, cosines: np.ndarray) -> Image.Image:
    """The picture in grey, warm where the cosine is high: from its lowest value to its highest."""
    low, high = float(cosines.min()), float(cosines.max())
    strength = (cosines - low) / (high - low) if high > low else np.zeros_like(cosines)
    stops = np.array(HEAT, dtype=np.float32)
    position = strength * (len(stops) - 1)
    index = np.clip(position.astype(int), 0, len(stops) - 2)
    rest = (position - index)[..., None]
    colours = (1 - rest) * stops[index] + rest * stops[index + 1]
    grey = np.asarray(image.convert("L"), dtype=np.float32)[..., None]
    return Image.fromarray((0.4 * grey + 0.6 * colours).clip(0, 255).astype(np.uint8))


def facts(answer: Answer) -> dict[str, Any]:
    """An answer as JSON: classes in the order of the vocabulary with their areas, and what it was made with."""
    areas = {segment["id"]: segment["area_fraction"] for segment in answer.segments}
    return {
        **answer.made_with,
        "size_hw": list(answer.picture.size_hw),
        "input_hw": list(answer.picture.input_hw),
        "grid_hw": list(answer.grid_hw),
        "windows": answer.windows,
        "encode_ms": round(answer.encode_ms, 1),
        "classes": [
            {
                "id": index,
                "label": title,
                "names": list(answer.labels.classes[index]),
                "area_fraction": areas.get(index, 0.0),
            }
            for index, title in enumerate(answer.labels.class_names)
        ],
        "no_class": areas.get(-1, 0.0),
    }


def own_folder() -> Path:
    """A new folder for temporary files; those that killed pages left are removed."""
    for place in Path(tempfile.gettempdir()).glob("spar-demo-*"):
        process = place.name.split("-")[2]
        if process.isdigit() and not is_running(int(process)):
            shutil.rmtree(place, ignore_errors=True)
    return Path(tempfile.mkdtemp(prefix=f"spar-demo-{os.getpid()}-"))


class Downloads:
    """Files for the visitor, under names that no visitor chose; Gradio copies them to its cache, and ours go soon."""

    def __init__(self) -> None:
        self.folder = own_folder()

    def write(self, answer: Answer, opacity: float = 0.6) -> tuple[str, str, str]:
        """Paths of overlay, at the size that is shown, label map, at the picture's own size, and classes."""
        self.tidy(GONE_AFTER_S)
        place = Path(tempfile.mkdtemp(dir=self.folder))
        picture = answer.picture
        small = resized_ids(answer.segmentation, picture.shown_hw)
        overlay(picture.shown, small, answer.labels, opacity).save(place / "overlay.png")
        label_map_image(answer.segmentation).save(place / "label-map.png")
        (place / "classes.json").write_text(json.dumps(facts(answer), indent=2, ensure_ascii=False) + "\n", "utf-8")
        return str(place / "overlay.png"), str(place / "label-map.png"), str(place / "classes.json")

    def save(self, name: str, picture: Image.Image) -> str:
        self.tidy(GONE_AFTER_S)
        path = Path(tempfile.mkdtemp(dir=self.folder)) / name
        picture.save(path)
        return str(path)

    def tidy(self, older_than_s: float = 0) -> None:
        for place in self.folder.iterdir():
            if time.time() - place.stat().st_mtime > older_than_s:
                shutil.rmtree(place, ignore_errors=True)
