"""What the page asks for, on the package's public API: open a picture, segment, compare, look at features.

Nothing here knows of a web page. Every message of a `DemoError`, like those of the package's own `ValueError`s, is a
sentence for a visitor.
"""

from __future__ import annotations

import hashlib
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from ..build import build_encoder
from ..checkpoints import load
from ..encoders.base import DenseEncoder, EncoderWrapper
from ..encoders.sliding_window import SlidingWindow
from ..grid_spar import coverage, upsample
from ..image_file_spar import InvalidImageError
from ..image_processing_spar import SparImageProcessor
from ..methods.table import METHODS
from ..pipeline_spar import OpenVocabularySegmentationPipeline
from ..processing_spar import Labels
from ..visualize import pca_picture
from .settings import Settings

CHARACTERS_PER_LABEL = 200  # times max_labels: the longest text of words that is looked at
KEPT_FEATURES = 6  # pictures whose features stay in memory, so that a click costs no pass
KEPT_VOCABULARIES = 8  # of a model; 10 000 names of 512 numbers take 20 MB

Watch = Callable[[int], None]  # called with the number of windows just done; may raise `Stopped`


class DemoError(ValueError):
    """A request that cannot be fulfilled; the message tells the visitor why and what to do."""


class Stopped(Exception):
    """The visitor asked to stop."""


@dataclass(frozen=True)
class Opened:
    """A model in memory, with the lock under which its words are encoded, and the vocabularies asked for last."""

    name: str
    model: Any
    processor: Any
    lock: threading.Lock
    encoded: OrderedDict[Labels, Any] = field(default_factory=OrderedDict)

    def encode(self, labels: Labels) -> Any:
        """The text features of a vocabulary; the weights of a model on the menu never change."""
        with self.lock:
            if labels not in self.encoded:
                self.encoded[labels] = self.processor.encode_labels(self.model, labels)
                if len(self.encoded) > KEPT_VOCABULARIES:
                    self.encoded.popitem(last=False)
            self.encoded.move_to_end(labels)
            return self.encoded[labels]


@dataclass(frozen=True)
class Answer:
    """A segmented picture.

    Attributes:
        image: RGB, upright, at its own size (H, W).
        segmentation: Class ids (H, W).
        segments: `{"id", "label", "area_fraction"}` of each class that occurs, largest first.
        labels: The vocabulary.
        grid_hw: Rows and columns of patches.
        input_hw: Height and width of the pixels that the model saw.
        windows: Forward passes of a window; 1 is a single pass.
        encode_ms: Milliseconds of the vision encoder alone.
    """

    image: Image.Image
    segmentation: np.ndarray
    segments: list[dict[str, Any]]
    labels: Labels
    grid_hw: tuple[int, int]
    input_hw: tuple[int, int]
    windows: int
    encode_ms: float


@dataclass(frozen=True)
class Features:
    """Patch features of a picture, and where they lie in it.

    Attributes:
        size_hw: Height and width of the picture.
        patch_embeds: (h, w, D), normalised.
        coverage_hw: Image size over the pixels that the grid covers, per axis; see `grid_spar.coverage`.
        pca: RGB of the picture's size.
    """

    image: Image.Image
    size_hw: tuple[int, int]
    patch_embeds: torch.Tensor
    coverage_hw: tuple[float, float]
    pca: Image.Image


class Watched(EncoderWrapper):
    """A dense encoder that reports what it has done and times itself."""

    def __init__(self, encoder: DenseEncoder, watch: Watch | None = None) -> None:
        self.encoder = encoder
        self.watch = watch
        self.seconds = 0.0

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        started = self._now()
        outputs = self.encoder(pixel_values)
        self.seconds += self._now() - started
        if self.watch is not None:
            self.watch(len(pixel_values))
        return outputs

    def _now(self) -> float:
        if self.device.type != "cpu":
            torch.accelerator.synchronize()  # the pass is queued; only then is it done
        return time.perf_counter()


def sliding(encoder: DenseEncoder, stride_px: int | None = None) -> SlidingWindow:
    """The teacher around an encoder: its own window, its own step or another."""
    return SlidingWindow(encoder, encoder.config.window_px, stride_px or encoder.config.stride_px, batch_size=16)


class Engine:
    """Models in memory and the requests to them. Safe to call from several threads.

    Args:
        settings: Models and limits.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        accelerator = torch.accelerator.current_accelerator() if settings.device == "auto" else settings.device
        self.device = torch.device(accelerator or "cpu")
        self._models: OrderedDict[str, Opened] = OrderedDict()
        self._features: OrderedDict[tuple, Features] = OrderedDict()
        self._loading = threading.Lock()
        self._caching = threading.Lock()

    @property
    def methods(self) -> list[str]:
        """Rows of the table that run on the model alone."""
        return [name for name, row in METHODS.items() if row.kind == "feature" and not row.needs]

    def open_model(self, name: str) -> Opened:
        """The model of that name on the menu, loaded once.

        Raises:
            DemoError: It is not on the menu or cannot be loaded.
        """
        if name not in self.settings.models:
            menu = ", ".join(self.settings.models)
            raise DemoError(f"There is no model {name!r} on the menu; choose one of {menu}.")
        with self._loading:
            if name not in self._models:
                try:
                    model, processor = load(name)
                except OSError as error:
                    raise DemoError(
                        f"The model {name} could not be fetched: the Hugging Face Hub cannot be reached from here, or "
                        "has no such model. Choose another model."
                    ) from error
                placed: Any = model  # its `to` has a wrapper that hides its signature
                self._models[name] = Opened(name, placed.to(self.device), processor, threading.Lock())
                if len(self._models) > self.settings.models_in_memory:
                    self._models.popitem(last=False)
            self._models.move_to_end(name)
            return self._models[name]

    def encoder(self, opened: Opened, method: str | None = None) -> DenseEncoder:
        """A model's vision tower, running its own last block or a method's.

        Raises:
            DemoError: The method is not on the menu or not for this model.
        """
        if method is not None and method not in self.methods:
            raise DemoError(f"There is no method {method!r} on the menu; choose one of {', '.join(self.methods)}.")
        try:
            return build_encoder(opened.model.vision_model, method)
        except ValueError as error:
            raise DemoError(str(error)) from error

    def open_image(self, path: str | Path | None) -> Image.Image:
        """A picture file as 8-bit RGB, upright.

        Raises:
            DemoError: There is none, it is too large or it is not a picture.
        """
        if not path:
            raise DemoError("There is no picture yet. Drop one, paste one, take one, or choose an example.")
        size_mb = Path(path).stat().st_size / 1e6
        if size_mb > self.settings.max_file_mb:
            raise DemoError(f"The file has {size_mb:.0f} MB; at most {self.settings.max_file_mb} MB are taken.")
        try:
            return SparImageProcessor(max_image_pixels=self.settings.max_image_pixels).open_rgb(path)
        except InvalidImageError as error:
            raise DemoError(self._about_the_picture(error, path)) from error

    def _about_the_picture(self, error: InvalidImageError, path: str | Path) -> str:
        """The library's message without the name that the file has on the server, and with a visitor's remedy."""
        limit = self.settings.max_image_pixels / 1e6
        message = str(error).replace(f"image '{path}'", "the picture")
        message = message.replace("Shrink it, or raise max_image_pixels.", "Shrink it first.")
        if "damaged" not in message and f"at most {limit:.4g} million" not in message:
            message = "this file is no picture that can be read. Choose a PNG, JPEG, WebP, GIF, BMP, TIFF or AVIF."
        return message[0].upper() + message[1:]

    def read_labels(self, words: str | None) -> Labels:
        """A vocabulary as it is typed: classes split by `;`, synonyms by `,`, a line break is a `;`.

        Raises:
            DemoError: There is none, it is malformed or too long.
        """
        text = (words or "").strip().strip(";")
        if not text:
            raise DemoError("There are no words yet. Type what you look for, such as: road; car, automobile; sky")
        if len(text) > 200 * self.settings.max_labels:
            raise DemoError(
                f"The words have {len(text)} characters; at most {200 * self.settings.max_labels} are read."
            )
        lines = [part for line in text.splitlines() for part in line.strip().strip(";").split(";") if line.strip()]
        try:
            return Labels.parse(lines, max_labels=self.settings.max_labels)
        except ValueError as error:
            message = str(error).replace("Pass fewer, or raise max_labels if this is meant.", "Take some out.")
            raise DemoError(message[0].upper() + message[1:]) from error

    def segment(
        self,
        path: str | Path | None,
        words: str | None,
        model: str,
        method: str | None = None,
        window: bool = False,
        watch: Watch | None = None,
        stride_px: int | None = None,
    ) -> Answer:
        """Segments a picture.

        Args:
            path: The picture's file.
            words: The vocabulary.
            model: An entry of the menu.
            method: Row of the table of methods; None is the model's own.
            window: Slide a window over the picture instead of one pass.
            watch: Told of each batch of windows; may raise `Stopped`.
            stride_px: Step of the window; None is the model's own.

        Raises:
            DemoError: Something in the request is not as it must be.
        """
        image, labels = self.open_image(path), self.read_labels(words)
        opened = self.open_model(model)
        watched = Watched(self.encoder(opened, method), watch)
        encoder: Any = watched
        windows = 1
        if window:
            encoder = sliding(watched, stride_px)
            windows = encoder.num_windows(*self.input_size_hw(image, opened))
            if windows > self.settings.max_windows:
                raise DemoError(
                    f"This picture needs {windows} windows; at most {self.settings.max_windows} are run. "
                    "Take a smaller picture."
                )
        segment = OpenVocabularySegmentationPipeline(
            model=opened.model, processor=opened.processor, device=self.device
        )
        encoded = opened.encode(labels)
        try:
            found = segment(image, candidate_labels=encoded, encoder=encoder, **self._size(image, opened))
        except ValueError as error:
            raise DemoError(str(error)) from error
        return Answer(
            image, found["segmentation"], found["segments"], labels, found["grid_hw"], found["size_hw"], windows,
            1000 * watched.seconds,
        )  # fmt: skip

    def num_windows(self, path: str | Path | None, model: str, method: str | None = None) -> int:
        """Windows that a sliding-window pass over a picture takes."""
        image, opened = self.open_image(path), self.open_model(model)
        return sliding(self.encoder(opened, method)).num_windows(*self.input_size_hw(image, opened))

    def _size(self, image: Image.Image, opened: Opened) -> dict[str, Any]:
        """A smaller size for the model where the processor's own is over the limit."""
        height, width = opened.processor.image_processor.input_size_hw(image.height, image.width)
        limit = self.settings.max_input_pixels
        return {"size": {"max_pixels": limit}, "do_resize": True} if height * width > limit else {}

    def input_size_hw(self, image: Image.Image, opened: Opened) -> tuple[int, int]:
        """Height and width of the pixels that the model sees."""
        processor = opened.processor.image_processor
        if size := self._size(image, opened):
            processor = SparImageProcessor(min_side_px=processor.min_side_px, **size)
        height, width = processor.input_size_hw(image.height, image.width)
        return height, width

    def teacher_of(self, name: str) -> str | None:
        """The checkpoint on the menu that a distilled model learned from; None for one that was not distilled."""
        teacher = self.open_model(name).model.config.vision_config.teacher
        origin = (teacher or {}).get("model")
        return origin if origin in self.settings.models else None

    def student_of(self, name: str) -> str | None:
        """A shipped model that was distilled from that one, if there is any."""
        shipped = [other for other in self.settings.models if "/" not in other and other != name]
        return next((other for other in shipped if self.teacher_of(other) == name), None)

    def features(self, path: str | Path | None, model: str, method: str | None = None) -> Features:
        """Patch features of a picture and their PCA picture; those of the last pictures are kept.

        Raises:
            DemoError: Something in the request is not as it must be.
        """
        image = self.open_image(path)
        key = (hashlib.sha1(image.tobytes()).digest(), image.size, model, method)
        with self._caching:
            if key in self._features:
                self._features.move_to_end(key)
                return self._features[key]
        opened = self.open_model(model)
        encoder = self.encoder(opened, method)
        try:
            inputs = opened.processor(images=image, return_tensors="pt", **self._size(image, opened))
            with torch.inference_mode():
                outputs = encoder(inputs["pixel_values"].to(encoder.device, encoder.dtype))
        except ValueError as error:
            raise DemoError(str(error)) from error
        coverage_hw = coverage(outputs.image_hw, outputs.extent_hw)
        patch_embeds = F.normalize(outputs.patch_embeds[0].float().cpu(), dim=-1)
        pca = pca_picture(patch_embeds, (image.height, image.width), coverage_hw)
        found = Features(image, (image.height, image.width), patch_embeds, coverage_hw, pca)
        with self._caching:
            self._features[key] = found
            if len(self._features) > KEPT_FEATURES:
                self._features.popitem(last=False)
        return found

    def similarity(
        self, features: Features, row_share: float, column_share: float
    ) -> tuple[np.ndarray, tuple[int, int]]:
        """Cosine of the patch at a place with all patches.

        Args:
            features: Of `features`.
            row_share: Place in the picture, 0 at its top to 1 at its bottom.
            column_share: The same from left to right.

        Returns:
            Cosines (H, W) at the picture's size, bilinear between patches, and the (row, column) of the patch.
        """
        grid_hw = features.patch_embeds.shape[:2]
        places = (row_share, column_share)
        row, column = (
            min(int(min(max(place, 0.0), 1.0) * covered * side), side - 1)
            for place, covered, side in zip(places, features.coverage_hw, grid_hw, strict=True)
        )
        cosines = features.patch_embeds @ features.patch_embeds[row, column]  # (h, w, D) @ (D) -> (h, w)
        return upsample(cosines, features.size_hw, features.coverage_hw).numpy(), (row, column)
