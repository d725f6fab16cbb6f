"""A visitor's picture, opened under limits; what is kept of it is at the size that the model or the page needs."""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..image_file_spar import InvalidImageError
from ..image_processing_spar import SparImageProcessor
from .settings import Settings

SHOWN_PX = 1280  # longer side of a picture on the page


class DemoError(ValueError):
    """A request that cannot be fulfilled; the message tells the visitor why and what to do."""


@dataclass(frozen=True)
class Picture:
    """An opened picture.

    Attributes:
        size_hw: Its own height and width, upright.
        shown: RGB, its longer side at most `SHOWN_PX`.
        pixel_values: What the model sees, (1, 3, H, W).
    """

    size_hw: tuple[int, int]
    shown: Image.Image
    pixel_values: torch.Tensor

    @property
    def shown_hw(self) -> tuple[int, int]:
        return (self.shown.height, self.shown.width)

    @property
    def input_hw(self) -> tuple[int, int]:
        return (self.pixel_values.shape[2], self.pixel_values.shape[3])


class Pictures:
    """Opens uploads. One at a time: a full-size picture and its copies are the largest things that a request holds.

    Args:
        settings: Limits.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self._opening = threading.Lock()

    def read(self, path: str | Path | None) -> bytes:
        """The bytes of a file, so that no message can hold its name on the server.

        Raises:
            DemoError: There is none, or it is too large.
        """
        if not path:
            raise DemoError("There is no picture yet. Drop one, paste one, take one, or choose an example.")
        size_mb = Path(path).stat().st_size / 1e6
        if size_mb > self.settings.max_file_mb:
            raise DemoError(f"The file has {size_mb:.0f} MB; at most {self.settings.max_file_mb} MB are taken.")
        return Path(path).read_bytes()

    def open(self, encoded: bytes, processor: Any) -> Picture:
        """A picture, as it will be shown and as the model will see it.

        Args:
            encoded: The file's bytes.
            processor: The model's image processor.

        Raises:
            DemoError: It is no picture, damaged, or over a limit.
        """
        with self._opening:
            try:
                reader = SparImageProcessor(max_image_pixels=self.settings.max_image_pixels)
                image = reader.open_rgb(encoded)
                inputs = processor(images=image, **self._size((image.height, image.width), processor))
            except InvalidImageError as error:
                raise DemoError(_for_visitors(error)) from None
            return Picture((image.height, image.width), _shrunk(image), inputs["pixel_values"])

    def _size(self, size_hw: tuple[int, int], processor: Any) -> dict[str, Any]:
        """A smaller size for the model where the processor's own is over the limit."""
        height, width = processor.input_size_hw(*size_hw)
        limit = self.settings.max_input_pixels
        return {"size": {"max_pixels": limit}, "do_resize": True} if height * width > limit else {}


def _shrunk(image: Image.Image) -> Image.Image:
    scale = SHOWN_PX / max(image.size)
    if scale >= 1:
        return image
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    return image.resize(size, Image.Resampling.BOX)


def _for_visitors(error: InvalidImageError) -> str:
    """The library's sentence, with the remedies that a visitor has."""
    message = re.sub(r",? or (raise|pass) [^.;]*", "", str(error))
    return sentence(message)


def sentence(text: str) -> str:
    """The library's messages follow a name and a colon; alone they begin with a capital."""
    return text[:1].upper() + text[1:]


def resized_ids(ids: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """A label map (h, w) at another size (H, W): each pixel takes the id that lies nearest."""
    rows, columns = (
        ((np.arange(wanted) + 0.5) * given / wanted).astype(np.intp)
        for wanted, given in zip(size_hw, ids.shape, strict=True)
    )
    return ids[rows[:, None], columns]
