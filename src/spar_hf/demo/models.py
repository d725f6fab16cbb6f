"""The models of the menu in memory, with the methods as they are built around them."""

from __future__ import annotations

import logging
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from ..build import build_encoder, build_segmenter, window_of
from ..checkpoints import SHIPPED, load
from ..encoder_spar import EncoderWrapper
from ..encoders.sliding_window import SlidingWindow, window_starts
from ..methods.table import FAMILIES, METHODS
from ..names_spar import unknown
from ..prompts_spar import Labels
from ..refinement.table import REFINEMENTS
from ..segmentation_spar import FromFeatures, ScoreMaps, Segmenter
from ..segmenters import SegmenterWrapper, SlidingScores
from .pictures import DemoError, sentence
from .settings import Settings

KEPT_VOCABULARIES = 8  # of a model; 10 000 names of 512 numbers take 20 MB
KEPT_BUILDS = 8  # of a model: methods with their second networks
WINDOW_BATCH = 16

Watch = Callable[[int], None]  # called with the number of windows just done; may raise `Stopped`
logger = logging.getLogger(__name__)


class Stopped(Exception):
    """The visitor asked to stop."""


@dataclass(frozen=True)
class Opened:
    """A model in memory: its methods as they are built, and the vocabularies asked for last.

    Attributes:
        lock: Held while words are encoded and methods are built.
        passing: Held while a method with a second network runs, whose layers are listened to.
    """

    name: str
    model: Any
    processor: Any
    lock: threading.Lock = field(default_factory=threading.Lock)
    passing: threading.Lock = field(default_factory=threading.Lock)
    built: OrderedDict[Any, Any] = field(default_factory=OrderedDict)
    encoded: OrderedDict[Any, Any] = field(default_factory=OrderedDict)

    def encode(self, segmenter: Segmenter, labels: Labels, method: str | None) -> Any:
        """What a segmenter wants of a vocabulary; the weights of a model on the menu never change."""
        key = (labels, method if is_label_method(method) else None)  # text features are the same for every method
        with self.lock:
            if key not in self.encoded:
                self.encoded[key] = segmenter.encode_labels(labels)
                if len(self.encoded) > KEPT_VOCABULARIES:
                    self.encoded.popitem(last=False)
            self.encoded.move_to_end(key)
            return self.encoded[key]


class Watched(EncoderWrapper):
    """A dense encoder that reports the windows that it has done."""

    def __init__(self, encoder: Any, watch: Watch) -> None:
        self.encoder = encoder
        self.watch = watch

    def __call__(self, pixel_values: torch.Tensor) -> Any:
        outputs = self.encoder(pixel_values)
        self.watch(len(pixel_values))
        return outputs


class WatchedScores(SegmenterWrapper):
    """A segmenter that reports the windows that it has done."""

    def __init__(self, segmenter: Segmenter, watch: Watch) -> None:
        self.segmenter = segmenter
        self.watch = watch

    def __call__(self, pixel_values: torch.Tensor, encoded: Any) -> list[ScoreMaps]:
        maps = self.segmenter(pixel_values, encoded)
        self.watch(len(pixel_values))
        return maps


class Models:
    """Models that visitors may choose, loaded when first asked for. Safe to call from several threads.

    Args:
        settings: The menu and limits.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        accelerator = torch.accelerator.current_accelerator() if settings.device == "auto" else settings.device
        self.device = torch.device(accelerator or "cpu")
        self._models: OrderedDict[str, Opened] = OrderedDict()
        self._loading = threading.Lock()

    def open(self, name: str) -> Opened:
        """The model of that name on the menu, loaded once.

        Raises:
            DemoError: It is not on the menu or cannot be loaded.
        """
        if name not in self.settings.menu:
            raise DemoError(sentence(unknown("model on the menu", name, self.settings.models)))
        with self._loading:
            if name not in self._models:
                try:
                    model, processor = load(self.settings.menu[name])
                except Exception as error:  # broken files make the libraries below raise almost anything
                    logger.warning("the model %s cannot be loaded: %s", self.settings.menu[name], error)
                    raise DemoError(
                        f"The model {name} could not be loaded: it cannot be fetched from the Hugging Face Hub, or "
                        "its files are broken. Choose another model."
                    ) from error
                placed: Any = model  # its `to` has a wrapper that hides its signature
                self._models[name] = Opened(name, placed.to(self.device), processor)
                if len(self._models) > self.settings.models_in_memory:
                    self._models.popitem(last=False)
            self._models.move_to_end(name)
            return self._models[name]

    def built(self, opened: Opened, method: str | None, refine: tuple[str, ...] = ()) -> Any:
        """A model with a method, built once: a dense encoder; for a label method or with refinements a segmenter.

        Raises:
            DemoError: The method is not on the menu, or what is asked is not for this model or its networks cannot be
                loaded.
        """
        if method is None and not refine:
            return opened.model.vision_model
        self.check_method(method)
        networks, key = self.networks_of(method, refine), (method, *refine)
        with opened.lock:
            if key not in opened.built:
                try:
                    opened.built[key] = (
                        build_segmenter(opened.model, opened.processor, method, networks=networks, refine=refine)
                        if is_label_method(method) or refine
                        else build_encoder(opened.model.vision_model, method, networks=networks)
                    )
                except Exception as error:
                    logger.warning("%s cannot be built on %s: %s", key, opened.name, error)
                    asked = " with ".join([*([METHODS[method].title] if method else []), *refine])
                    family = FAMILIES[METHODS[method].family if method else "clip"]
                    needs = " and needs a second network, which must load" if networks else ""
                    raise DemoError(
                        f"{asked} does not run on {opened.name}: it is for {family} models{needs}. "
                        f"Choose {'other refinements' if refine else 'another method'}."
                    ) from error
                if len(opened.built) > KEPT_BUILDS:
                    opened.built.popitem(last=False)
            opened.built.move_to_end(key)
            return opened.built[key]

    def check_method(self, method: str | None) -> None:
        """Raises a `DemoError` where the method is not on the menu."""
        if method is not None and method not in self.settings.methods:
            raise DemoError(sentence(unknown("method on the menu", method, self.settings.methods)))

    def networks_of(self, method: str | None, refine: tuple[str, ...] = ()) -> dict[str, str]:
        """The second networks of a method and of refinements, by name."""
        rows = [*([METHODS[method].networks] if method else []), *(REFINEMENTS[name].networks for name in refine)]
        taken = [name for row in rows for name in row if name in self.settings.second_networks]
        return {name: self.settings.second_networks[name] for name in taken}

    def segmenter(
        self, opened: Opened, method: str | None = None, watch: Watch | None = None, refine: tuple[str, ...] = ()
    ) -> Segmenter:
        """A model's segmenter, in one pass.

        Args:
            opened: The model.
            method: Row of the table of methods; None is the model's own.
            watch: Slides the method's window over the picture instead, and is told of each batch of windows.
            refine: Refinements, for one pass.
        """
        built = self.built(opened, method, refine)
        if is_label_method(method) or refine:
            if watch is None:
                return built
            return SlidingScores(WatchedScores(built, watch), *window_of(built.config, None, None), WINDOW_BATCH)
        if watch is not None:
            window_px, stride_px = window_of(built.config, None, None)
            built = SlidingWindow(Watched(built, watch), window_px, stride_px, batch_size=WINDOW_BATCH)
        return FromFeatures(built, opened.model, opened.processor)

    def num_windows(self, input_hw: tuple[int, int], model: str, method: str | None = None) -> int:
        """Windows that a pass over pixels of this height and width takes.

        Raises:
            DemoError: There are more than allowed, or the method makes its own.
        """
        if method is not None and METHODS[method].whole_image:
            raise DemoError(f"{METHODS[method].title} looks at the whole picture; no window slides over it.")
        built = self.built(self.open(model), method)
        window_px, stride_px = window_of(built.config, None, None)
        if is_label_method(method):
            windows = math.prod(len(window_starts(side, window_px, stride_px)) for side in input_hw)
        else:
            windows = SlidingWindow(built, window_px, stride_px).num_windows(*input_hw)
        if windows > self.settings.max_windows:
            raise DemoError(
                f"This picture needs {windows} windows; at most {self.settings.max_windows} are run. "
                "Take a smaller picture."
            )
        return windows

    def teacher_of(self, name: str) -> str | None:
        """The checkpoint on the menu that a distilled model learned from; None for one that was not distilled."""
        teacher = self.open(name).model.config.vision_config.teacher
        origin = (teacher or {}).get("model")
        return origin if origin in self.settings.models else None

    def student_of(self, name: str) -> str | None:
        """A shipped model that was distilled from that one, if there is any."""
        shipped = [other for other in self.settings.models if other in SHIPPED and other != name]
        return next((other for other in shipped if self.teacher_of(other) == name), None)


def is_label_method(method: str | None) -> bool:
    """Whether a method gives score maps and no features."""
    return method is not None and METHODS[method].kind == "label"
