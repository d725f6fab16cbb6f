"""From an upright 8-bit RGB picture to what the network reads: its size, and normalised values. Imports no PyTorch."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .image_file_spar import InvalidImageError

SIZE_KEYS = ("shortest_edge", "longest_edge", "max_pixels")


@dataclass(frozen=True)
class InputPixels:
    """The rules of `SparImageProcessor`, whose arguments have these names and say what they mean."""

    size: dict[str, int] | None
    do_resize: bool
    resample: int
    image_mean: list[float]
    image_std: list[float]
    min_side_px: int
    max_input_pixels: int

    def size_hw(self, height_px: int, width_px: int) -> tuple[int, int]:
        """The size (height, width) that an image of this size is resized to."""
        height, width = self._wanted_size_hw(height_px, width_px) if self.do_resize else (height_px, width_px)
        return max(height, self.min_side_px), max(width, self.min_side_px)

    def _wanted_size_hw(self, height_px: int, width_px: int) -> tuple[int, int]:
        if self.size is None:
            return height_px, width_px
        (rule, value), *_ = self.size.items()
        if rule == "max_pixels":
            scale = min(1.0, math.sqrt(value / (height_px * width_px)))
            return max(1, int(height_px * scale)), max(1, int(width_px * scale))
        ruling_px = (min if rule == "shortest_edge" else max)(height_px, width_px)
        # The ruling side is exact and the other rounded down, as in CLIP's processor.
        return max(1, value * height_px // ruling_px), max(1, value * width_px // ruling_px)

    def values(self, rgb: Image.Image, name: str = "the image") -> np.ndarray:
        """The picture at the network's size, as normalised float32 (3, H, W).

        Raises:
            InvalidImageError: It would have too many pixels there; it is not resized.
        """
        values = np.asarray(self._resize(rgb, name), dtype=np.float32)
        values /= 255
        values -= np.asarray(self.image_mean, dtype=np.float32)
        values /= np.asarray(self.image_std, dtype=np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)

    def _resize(self, rgb: Image.Image, name: str) -> Image.Image:
        height, width = self.size_hw(rgb.height, rgb.width)
        if height * width > self.max_input_pixels:
            raise InvalidImageError(
                f"{name} would be {height}x{width} pixels ({height * width / 1e6:.4g} million) for the model; at most "
                f"{self.max_input_pixels / 1e6:.4g} million are allowed. Pass a smaller size, "
                "or raise max_input_pixels."
            )
        if (height, width) == (rgb.height, rgb.width):
            return rgb
        return rgb.resize((width, height), resample=Image.Resampling(self.resample))


def check_size(size: int | dict[str, int] | None) -> dict[str, int] | None:
    """A `size` in its one form; raises a `ValueError` for one that is none."""
    if size is None:
        return None
    size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    if len(size) != 1 or next(iter(size)) not in SIZE_KEYS:
        raise ValueError(
            f"size is {size}; allowed are None, a number, or one of "
            f"{', '.join(f'{{{rule!r}: n}}' for rule in SIZE_KEYS)}. The ratio is always kept."
        )
    return {rule: positive(f"size[{rule!r}]", value) for rule, value in size.items()}


def positive(name: str, value: object) -> int:
    """`value` if it is a whole number above 0; else raises a `ValueError` that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, 1 or more.")
    return value
