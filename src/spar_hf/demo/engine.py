"""What the page asks for, on the package's public API: segment, compare, look at features.

Nothing here knows of a web page. Every message of a `DemoError` is a sentence for a visitor, without a path of the
server. Limits are checked before work: words and names first, then the picture's header, then its pixels. What is kept
of a picture is at the size that is shown; only the label map has the picture's own, in the fewest bytes for its ids.
"""

from __future__ import annotations

import hashlib
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..build import record
from ..grid_spar import coverage, upsample
from ..methods.table import METHODS
from ..names_spar import unknown
from ..prompts_spar import EVERYDAY_WORDS, Labels
from ..results_spar import NO_CLASS
from ..segmentation_spar import GridScores, ScoreMaps, label_map
from ..visualize import pca_picture
from .models import Models, Watch, is_label_method
from .pictures import DemoError, Picture, Pictures, resized_ids, sentence
from .settings import Settings

CHARACTERS_PER_LABEL = 200  # times max_labels: the longest text of words that is looked at
KEPT_FEATURES = 6  # pictures whose features stay in memory, so that a click costs no pass


@dataclass(frozen=True)
class Answer:
    """A segmented picture.

    Attributes:
        picture: The picture.
        segmentation: Class ids at the picture's own size (H, W), -1 for no class; int8 or int16.
        segments: `{"id", "label", "area_fraction"}` of each class that occurs, largest first.
        labels: The vocabulary.
        grid_hw: Rows and columns of patches.
        windows: Forward passes of a window; 1 is a single pass.
        encode_ms: Milliseconds of the network, from pixels to scores.
        made_with: Model, method, networks, settings, refinements and thresholds, as JSON.
    """

    picture: Picture
    segmentation: np.ndarray
    segments: list[dict[str, Any]]
    labels: Labels
    grid_hw: tuple[int, int]
    windows: int
    encode_ms: float
    made_with: dict[str, Any]


@dataclass(frozen=True)
class Features:
    """Patch features of a picture, and where they lie in it.

    Attributes:
        shown: RGB of the size that is shown.
        patch_embeds: (h, w, D), normalised.
        coverage_hw: Image size over the pixels that the grid covers, per axis; see `grid_spar.coverage`.
        pca: RGB of the size that is shown.
    """

    shown: Image.Image
    patch_embeds: torch.Tensor
    coverage_hw: tuple[float, float]
    pca: Image.Image


class Engine:
    """The requests. Safe to call from several threads.

    Args:
        settings: Models and limits.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.models = Models(settings)
        self.pictures = Pictures(settings)
        self._features: OrderedDict[tuple, Features] = OrderedDict()
        self._caching = threading.Lock()

    def read_labels(self, words: str | None) -> Labels:
        """A vocabulary as it is typed: classes split by `;`, synonyms by `,`, a line break is a `;`.

        Raises:
            DemoError: There is none, it is malformed or too long.
        """
        most = CHARACTERS_PER_LABEL * self.settings.max_labels
        if len(words or "") > most:
            raise DemoError(f"The words have {len(words or '')} characters; at most {most} are read.")
        text = (words or "").strip().strip(";")
        if not text:
            raise DemoError("There are no words yet. Type what you look for, such as: road; car, automobile; sky")
        lines = [part for line in text.splitlines() for part in line.strip().strip(";").split(";") if line.strip()]
        try:
            return Labels.parse(lines, max_labels=self.settings.max_labels)
        except ValueError as error:
            message = str(error).replace("Pass fewer, or raise max_labels if this is meant.", "Take some out.")
            raise DemoError(sentence(message)) from error

    def segment(
        self,
        path: str | Path | None,
        words: str | None,
        model: str,
        method: str | None = None,
        *,
        background_threshold: float = 0.0,
        refine: Sequence[str] = (),
        watch: Watch | None = None,
        timed: bool = False,
    ) -> Answer:
        """Segments a picture.

        Args:
            path: The picture's file.
            words: The vocabulary.
            model: An entry of the menu.
            method: Row of the table of methods; None is the model's own.
            background_threshold: Pixels whose best class is less probable have no class, 0 to 1; see
                `segmentation_spar.segment`. A single class competes with everyday words.
            refine: Refinements of the menu, for one pass.
            watch: Slides a window over the picture instead of one pass. Told of each batch of windows; may raise
                `Stopped`.
            timed: Runs the network twice and times the second pass: the first one of a size also pays for choosing
                kernels and memory.

        Raises:
            DemoError: Something in the request is not as it must be.
        """
        labels = self.read_labels(words)
        threshold = number("The threshold", background_threshold) or None
        if threshold is not None and len(labels) == 1:
            labels = labels.against(EVERYDAY_WORDS)
        self.models.check_method(method)
        refinements = tuple(name for name in self.settings.refinement_menu if name in refine)
        if unheard := set(refine) - set(refinements):
            raise DemoError(sentence(unknown("refinement on the menu", min(unheard), self.settings.refinement_menu)))
        encoded_picture = self.pictures.read(path)
        opened = self.models.open(model)
        picture = self.pictures.open(encoded_picture, opened.processor.image_processor)
        windows = 1 if watch is None else self.models.num_windows(picture.input_hw, model, method)
        segmenter = self.models.segmenter(opened, method, watch, refinements)
        encoded = opened.encode(segmenter, labels, method)
        networks = self.models.networks_of(method, refinements)
        with opened.passing if networks else nullcontext():
            for _ in range(1 + timed):
                started = self._now()
                (maps,) = segmenter(picture.pixel_values, encoded)
                seconds = self._now() - started
            segmentation = own_label_map(maps, labels, picture.size_hw, threshold)
        made_with = {
            "model": model,
            "method": method,
            **record(method, networks, None, refinements),
            "networks": {
                name: Path(origin).name if Path(origin).is_dir() else origin for name, origin in networks.items()
            },
            "background_threshold": threshold,
        }
        return Answer(
            picture,
            segmentation,
            areas(segmentation, labels),
            labels,
            maps.grid_hw,
            windows,
            1000 * seconds,
            made_with,
        )

    def _now(self) -> float:
        if self.models.device.type != "cpu":
            torch.accelerator.synchronize()  # the pass is queued; only then is it done
        return time.perf_counter()

    def features(self, path: str | Path | None, model: str, method: str | None = None) -> Features:
        """Patch features of a picture and their PCA picture; those of the last pictures are kept.

        Raises:
            DemoError: Something in the request is not as it must be.
        """
        self.models.check_method(method)
        if is_label_method(method):
            raise DemoError(f"{METHODS[str(method)].title} gives score maps and no features. Choose another method.")
        encoded = self.pictures.read(path)
        key = (hashlib.sha256(encoded).digest(), model, method)
        with self._caching:
            if key in self._features:
                self._features.move_to_end(key)
                return self._features[key]
        opened = self.models.open(model)
        encoder = self.models.built(opened, method)
        picture = self.pictures.open(encoded, opened.processor.image_processor)
        with opened.passing if self.models.networks_of(method) else nullcontext(), torch.inference_mode():
            outputs = encoder(picture.pixel_values.to(encoder.device, encoder.dtype))
        coverage_hw = coverage(outputs.image_hw, outputs.extent_hw)
        patch_embeds = F.normalize(outputs.patch_embeds[0].float().cpu(), dim=-1)
        pca = pca_picture(patch_embeds, picture.shown_hw, coverage_hw)
        found = Features(picture.shown, patch_embeds, coverage_hw, pca)
        with self._caching:
            self._features[key] = found
            if len(self._features) > KEPT_FEATURES:
                self._features.popitem(last=False)
        return found

    def similarity(self, features: Features, y: float, x: float) -> tuple[np.ndarray, tuple[int, int]]:
        """Cosine of the patch at a place with all patches.

        Args:
            features: Of `features`.
            y: Place in the picture, 0 at its top to 1 at its bottom.
            x: The same from left to right.

        Returns:
            Cosines (H, W) at the size that is shown, bilinear between patches, and the (row, column) of the patch.

        Raises:
            DemoError: A place outside the picture.
        """
        grid_hw = features.patch_embeds.shape[:2]
        row, column = (
            min(int(number(name, place) * covered * side), side - 1)
            for name, place, covered, side in zip("yx", (y, x), features.coverage_hw, grid_hw, strict=True)
        )
        cosines = features.patch_embeds @ features.patch_embeds[row, column]  # (h, w, D) @ (D) -> (h, w)
        return upsample(cosines, (features.shown.height, features.shown.width), features.coverage_hw).numpy(), (
            row,
            column,
        )


def number(name: str, value: Any) -> float:
    """A number from 0 to 1.

    Raises:
        DemoError: It is none: a word, NaN, outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise DemoError(f"{name} is {value!r:.40}; give a number from 0 to 1.")
    return float(value)


def own_label_map(
    maps: ScoreMaps, labels: Labels, size_hw: tuple[int, int], background_threshold: float | None
) -> np.ndarray:
    """The label map (H, W) at the picture's own size, in the fewest bytes for its ids.

    Scores on a grid are enlarged tile by tile. Others are made whole, and never larger than the pixels that the model
    saw; from there the label map is enlarged.
    """
    tiled = isinstance(maps, GridScores) and not maps.corrections
    made_hw = size_hw if tiled or math.prod(size_hw) < math.prod(maps.size_hw) else maps.size_hw
    class_ids = torch.tensor(labels.class_ids)
    ids = label_map(maps.at(made_hw), class_ids, background_threshold=background_threshold)
    small = ids.cpu().numpy().astype(np.min_scalar_type(-len(labels)))
    return small if made_hw == size_hw else resized_ids(small, size_hw)


def areas(segmentation: np.ndarray, labels: Labels) -> list[dict[str, Any]]:
    """The classes that occur, largest first, each with its fraction of the picture."""
    counts = np.zeros(len(labels) + 1, dtype=np.int64)
    for part in np.array_split(
        segmentation.reshape(-1), max(1, segmentation.size // 2**20)
    ):  # bincount works on 8 bytes a pixel
        counts += np.bincount(part.astype(np.intp) + 1, minlength=len(counts))
    names = ("no class", *labels.class_names)
    order = [int(place) for place in np.argsort(-counts, kind="stable") if counts[place]]
    return [
        {"id": place + NO_CLASS, "label": names[place], "area_fraction": float(counts[place] / segmentation.size)}
        for place in order
    ]
