"""Any image, from any source and of any size, to pixel values: upright, RGB, ratio kept, normalised."""

import inspect
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from .image_file_spar import MAX_FILE_BYTES, InvalidImageError
from .image_io_spar import name_of, read_image
from .image_values_spar import MAX_IMAGE_PIXELS, MAX_RATIO, ReadOptions
from .input_pixels_spar import InputPixels, check_size, positive


class SparImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values`, with the ratio kept and nothing cropped.

    Works on Pillow and NumPy. Resizing is Pillow's on 8-bit RGB, as in CLIP's Pillow image processor, so that equal
    sizes give equal pixels. `read_image` has the rules for what is not 8-bit RGB.

    Args:
        size: `{"shortest_edge": px}` or `{"longest_edge": px}` (that side gets this length), `{"max_pixels": n}`
            (shrunk to at most n pixels, never enlarged), a number (the shortest edge) or None (own size).
        do_resize: False keeps every image's own size, whatever `size` says.
        resample: Pillow's filter, 3 is bicubic.
        image_mean, image_std: Normalisation the weights were trained with, RGB, for values in 0 to 1.
        min_side_px: One patch. A side that would be shorter becomes this long; only there is the ratio not kept.
        bands, alpha, value_range: What is read of a picture; see `ReadOptions`.
        max_image_pixels, max_image_ratio, max_file_bytes: Larger images, longer ones and larger files are refused
            before they are decoded.
        max_input_pixels: Images with more pixels after resizing are refused before they are resized.

    Raises:
        ValueError: An argument is out of its range.
    """

    model_input_names = ["pixel_values"]

    def __init__(
        self,
        size: int | dict[str, int] | None = {"max_pixels": 2048 * 2048},  # noqa: B006 (copied, never changed)
        do_resize: bool = True,
        resample: int = Image.Resampling.BICUBIC,
        image_mean: Iterable[float] = OPENAI_CLIP_MEAN,
        image_std: Iterable[float] = OPENAI_CLIP_STD,
        min_side_px: int = 16,
        bands: Iterable[int] | None = None,
        alpha: str = "auto",
        value_range: str | Iterable[float] | None = None,
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        max_image_ratio: int = MAX_RATIO,
        max_file_bytes: int = MAX_FILE_BYTES,
        max_input_pixels: int = 4096 * 4096,
        **kwargs: Any,
    ) -> None:
        if unknown := sorted(set(kwargs) - _STORED_BESIDE):
            raise ValueError(
                f"SparImageProcessor does not know {', '.join(unknown)}; allowed are {', '.join(_FIELDS)}."
            )
        super().__init__(**kwargs)
        self.size = check_size(size)
        self.do_resize = bool(do_resize)
        if resample not in list(Image.Resampling):
            filters = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in Image.Resampling)
            raise ValueError(f"resample is {resample!r}; allowed are Pillow's filters {filters}.")
        self.resample = int(resample)
        self.image_mean = [float(value) for value in image_mean]
        self.image_std = [float(value) for value in image_std]
        self.min_side_px = positive("min_side_px", min_side_px)
        self.bands = None if bands is None else list(bands)
        self.alpha = alpha
        self.value_range = value_range if value_range is None or isinstance(value_range, str) else list(value_range)
        self.max_image_pixels = positive("max_image_pixels", max_image_pixels)
        self.max_image_ratio = positive("max_image_ratio", max_image_ratio)
        self.max_file_bytes = positive("max_file_bytes", max_file_bytes)
        self.max_input_pixels = positive("max_input_pixels", max_input_pixels)
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean is {self.image_mean} and image_std {self.image_std}; each needs three numbers, "
                "and those of image_std must be above 0."
            )
        _ = self.read_options  # checks them

    @classmethod
    def from_dict(cls, image_processor_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Also takes a plain CLIP processor's file: its mean, std and filter, not its native size and centre crop."""
        if image_processor_dict.get("image_processor_type") != cls.__name__:
            kept = ("image_mean", "image_std", "resample")
            image_processor_dict = {key: image_processor_dict[key] for key in kept if key in image_processor_dict}
        return_unused = kwargs.pop("return_unused_kwargs", False)
        overrides = {key: kwargs.pop(key) for key in list(kwargs) if key in _FIELDS}
        processor = cls(**{**image_processor_dict, **overrides})
        return (processor, kwargs) if return_unused else processor

    def to_dict(self) -> dict[str, Any]:
        """All fields; the base class would drop `size=None`, which would come back as the default."""
        return {**super().to_dict(), "size": self.size}

    def fetch_images(self, image_url_or_urls: Any) -> Any:
        """Leaves opening files to `preprocess`, which checks their size first."""
        return image_url_or_urls

    def preprocess(
        self, images: Any, return_tensors: str = "pt", input_data_format: str | None = None, **overrides: Any
    ) -> BatchFeature:
        """Pixel values of one image or several.

        Args:
            images: Anything that `read_image` reads, a batch of arrays (B, ...), or a list of any of them.
            return_tensors: `"pt"` or `"np"`.
            input_data_format: `"channels_first"` or `"channels_last"`, where an array's shape does not tell.
            **overrides: Any argument of the constructor, for this call.

        Returns:
            `pixel_values`, float32: (B, 3, H, W) where sizes agree, else a list of (3, H, W).
            `original_sizes`, int64 (B, 2): height and width of each image, rotated; the size of its label map.

        Raises:
            InvalidImageError: An image cannot be read, is over a limit or holds NaN.
            ValueError: Unknown or wrong arguments.
        """
        if overrides:
            own = {name: getattr(self, name) for name in _FIELDS}
            return type(self)(**{**own, **overrides}).preprocess(images, return_tensors, input_data_format)
        if return_tensors not in ("pt", "np"):
            raise ValueError(f"return_tensors is {return_tensors!r}; allowed are 'pt' and 'np'.")

        pixel_values, original_sizes = [], []
        for image, name in _one_by_one(images):
            rgb = read_image(image, self.read_options, name, input_data_format)
            original_sizes.append((rgb.height, rgb.width))
            pixel_values.append(self.input_pixels.values(rgb, name))
        agree = len({values.shape for values in pixel_values}) == 1
        if return_tensors == "np":
            arrays = np.stack(pixel_values) if agree else pixel_values
            return BatchFeature({"pixel_values": arrays, "original_sizes": np.array(original_sizes, dtype=np.int64)})
        tensors = [torch.from_numpy(values) for values in pixel_values]
        values = torch.stack(tensors) if agree else tensors
        return BatchFeature({"pixel_values": values, "original_sizes": torch.tensor(original_sizes)})

    def open_rgb(self, image: Any) -> Image.Image:
        """One image as `preprocess` reads it, before it is resized: upright, 8-bit RGB, at its own size.

        Raises:
            InvalidImageError: It cannot be read, is over the limit or holds NaN.
        """
        return read_image(image, self.read_options)

    @property
    def read_options(self) -> ReadOptions:
        """How pictures are read."""
        return ReadOptions(
            bands=self.bands,
            alpha=self.alpha,
            value_range=self.value_range,
            max_pixels=self.max_image_pixels,
            max_ratio=self.max_image_ratio,
            max_file_bytes=self.max_file_bytes,
        )

    @property
    def input_pixels(self) -> InputPixels:
        """How pictures become pixels."""
        return InputPixels(
            size=self.size,
            do_resize=self.do_resize,
            resample=self.resample,
            image_mean=self.image_mean,
            image_std=self.image_std,
            min_side_px=self.min_side_px,
            max_input_pixels=self.max_input_pixels,
        )

    def input_size_hw(self, height_px: int, width_px: int) -> tuple[int, int]:
        """The size (height, width) that an image of this size is resized to."""
        return self.input_pixels.size_hw(height_px, width_px)


_FIELDS = tuple(name for name in inspect.signature(SparImageProcessor).parameters if name != "kwargs")
# What transformers writes into the same file.
_STORED_BESIDE = {"image_processor_type", "processor_class", "auto_map"}


def _one_by_one(images: Any) -> Iterator[tuple[Any, str]]:
    """Each image with the name it has in messages."""
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    if not is_batch and not isinstance(images, (list, tuple)):
        yield images, name_of(images, "the image")
        return
    if len(images) == 0:
        raise InvalidImageError("there are no images; at least one is needed.")
    for number, image in enumerate(images, start=1):
        yield image, name_of(image, f"image {number} of {len(images)}")
