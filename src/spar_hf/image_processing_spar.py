"""Any image, from any source and of any size, to pixel values: upright, RGB, ratio kept, normalised."""

import inspect
import io
import math
import os
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

# Raster formats only: Pillow hands EPS to Ghostscript, which runs programs, and SVG is no raster.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TGA", "TIFF", "WEBP")
SIZE_KEYS = ("shortest_edge", "longest_edge", "max_pixels")

# 300 MB as RGB.
MAX_IMAGE_PIXELS = 100_000_000

_PILLOW_LIMIT = threading.Lock()


class InvalidImageError(ValueError):
    """An image cannot be read or is too large; the message names the image, the reason and what to do."""


class SparImageProcessor(BaseImageProcessor):
    """Turns images into `pixel_values`, with the ratio kept and nothing cropped.

    Works on Pillow and NumPy. Resizing is Pillow's on 8-bit RGB, as in CLIP's Pillow image processor, so that equal
    sizes give equal pixels. Rules for what is not 8-bit RGB: EXIF rotation is applied; alpha is composed over white;
    16-bit values are divided by 257; floats are read as 0 to 1, or as 0 to 255 where one exceeds 1; of an animation
    the first frame counts.

    Args:
        size: `{"shortest_edge": px}` or `{"longest_edge": px}` (that side gets this length), `{"max_pixels": n}`
            (shrunk to at most n pixels, never enlarged), a number (the shortest edge) or None (own size).
        do_resize: False keeps every image's own size, whatever `size` says.
        resample: Pillow's filter, 3 is bicubic.
        image_mean, image_std: Normalisation the weights were trained with, RGB, for values in 0 to 1.
        min_side_px: One patch. A side that would be shorter becomes this long; only there is the ratio not kept.
        max_image_pixels: Images with more pixels are refused before they are decoded.
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
        max_image_pixels: int = MAX_IMAGE_PIXELS,
        max_input_pixels: int = 4096 * 4096,
        **kwargs: Any,
    ) -> None:
        if unknown := sorted(set(kwargs) - _STORED_BESIDE):
            raise ValueError(
                f"SparImageProcessor does not know {', '.join(unknown)}; allowed are {', '.join(_FIELDS)}."
            )
        super().__init__(**kwargs)
        self.size = _check_size(size)
        self.do_resize = bool(do_resize)
        if resample not in list(Image.Resampling):
            filters = ", ".join(f"{filter.value} ({filter.name.lower()})" for filter in Image.Resampling)
            raise ValueError(f"resample is {resample!r}; allowed are Pillow's filters {filters}.")
        self.resample = int(resample)
        self.image_mean = [float(value) for value in image_mean]
        self.image_std = [float(value) for value in image_std]
        self.min_side_px = _positive("min_side_px", min_side_px)
        self.max_image_pixels = _positive("max_image_pixels", max_image_pixels)
        self.max_input_pixels = _positive("max_input_pixels", max_input_pixels)
        if len(self.image_mean) != 3 or len(self.image_std) != 3 or min(self.image_std) <= 0:
            raise ValueError(
                f"image_mean is {self.image_mean} and image_std {self.image_std}; each needs three numbers, "
                "and those of image_std must be above 0."
            )

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
            images: A path, encoded bytes, a `PIL.Image`, a NumPy array or tensor (H, W), (H, W, C) or (C, H, W) with 1
                to 4 channels, a batch of these (B, ...), or a list of any of them.
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
            rgb = load_image(image, self.max_image_pixels, name, input_data_format)
            original_sizes.append((rgb.height, rgb.width))
            pixel_values.append(self._to_values(self._resize(rgb, name)))
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
        return load_image(image, self.max_image_pixels)

    def input_size_hw(self, height_px: int, width_px: int) -> tuple[int, int]:
        """The size (height, width) an image of this size is resized to."""
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

    def _resize(self, rgb: Image.Image, name: str) -> Image.Image:
        height, width = self.input_size_hw(rgb.height, rgb.width)
        if height * width > self.max_input_pixels:
            raise InvalidImageError(
                f"{name} would be {height}x{width} pixels ({height * width / 1e6:.4g} million) for the model; at most "
                f"{self.max_input_pixels / 1e6:.4g} million are allowed. Pass a smaller size, "
                "or raise max_input_pixels."
            )
        if (height, width) == (rgb.height, rgb.width):
            return rgb
        return rgb.resize((width, height), resample=Image.Resampling(self.resample))

    def _to_values(self, rgb: Image.Image) -> np.ndarray:
        """8-bit RGB to normalised float32 (3, H, W)."""
        values = np.asarray(rgb, dtype=np.float32)
        values /= 255
        values -= np.asarray(self.image_mean, dtype=np.float32)
        values /= np.asarray(self.image_std, dtype=np.float32)
        return np.ascontiguousarray(values.transpose(2, 0, 1))  # (H, W, 3) -> (3, H, W)


_FIELDS = tuple(name for name in inspect.signature(SparImageProcessor).parameters if name != "kwargs")
# What transformers writes into the same file.
_STORED_BESIDE = {"image_processor_type", "processor_class", "auto_map"}


def load_image(
    image: Any, max_image_pixels: int = MAX_IMAGE_PIXELS, name: str = "", input_data_format: str | None = None
) -> Image.Image:
    """An image from any source as 8-bit RGB, upright; see `SparImageProcessor` for the rules.

    The size is checked on the header, before any pixel is decoded. JPEG's draft mode, which decodes at a fraction of
    the size, is not used: it changes the pixels.

    Args:
        image: A path, encoded bytes, a `PIL.Image`, a NumPy array or tensor (H, W), (H, W, C) or (C, H, W).
        max_image_pixels: Larger images are refused.
        name: What messages call the image.
        input_data_format: `"channels_first"` or `"channels_last"`, where an array's shape does not tell.

    Raises:
        InvalidImageError: The image cannot be read, is over the limit or holds NaN.
    """
    name = name or _name_of(image, "the image")
    if isinstance(image, (str, os.PathLike, bytes, bytearray)):
        with _open_file(image, name) as opened:
            return load_image(opened, max_image_pixels, name)
    if isinstance(image, (np.ndarray, torch.Tensor)):
        height, width, _ = _layout(image, name, input_data_format)
    elif isinstance(image, Image.Image):
        height, width = image.height, image.width
    else:
        raise InvalidImageError(
            f"{name} is a {type(image).__name__}; allowed are a path, bytes, PIL.Image, NumPy array or tensor."
        )
    if height * width == 0:
        raise InvalidImageError(f"{name} is empty ({height}x{width} pixels, height x width).")
    if height * width > max_image_pixels:
        raise InvalidImageError(
            f"{name} has {height}x{width} pixels ({height * width / 1e6:.4g} million); at most "
            f"{max_image_pixels / 1e6:.4g} million are read. Shrink it, or raise max_image_pixels."
        )
    if not isinstance(image, Image.Image):
        return _array_to_rgb(image, name, input_data_format)
    try:
        image.load()
        upright = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged file makes Pillow's decoders raise almost anything
        raise InvalidImageError(f"{name} is damaged and cannot be decoded ({error}). Save it anew.") from error
    return _pil_to_rgb(upright, name)


def _check_size(size: int | dict[str, int] | None) -> dict[str, int] | None:
    if size is None:
        return None
    size = {"shortest_edge": size} if isinstance(size, int) else dict(size)
    if len(size) != 1 or next(iter(size)) not in SIZE_KEYS:
        raise ValueError(
            f"size is {size}; allowed are None, a number, or one of "
            f"{', '.join(f'{{{rule!r}: n}}' for rule in SIZE_KEYS)}. The ratio is always kept."
        )
    return {rule: _positive(f"size[{rule!r}]", value) for rule, value in size.items()}


def _positive(name: str, value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a whole number, 1 or more.")
    return value


def _one_by_one(images: Any) -> Iterator[tuple[Any, str]]:
    """Each image with the name it has in messages."""
    is_batch = isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    if not is_batch and not isinstance(images, (list, tuple)):
        yield images, _name_of(images, "the image")
        return
    if len(images) == 0:
        raise InvalidImageError("there are no images; at least one is needed.")
    for number, image in enumerate(images, start=1):
        yield image, _name_of(image, f"image {number} of {len(images)}")


def _name_of(image: Any, otherwise: str) -> str:
    if isinstance(image, (str, os.PathLike)):
        return f"image '{os.fspath(image)}'"
    return f"image '{image.filename}'" if getattr(image, "filename", "") else otherwise


def _open_file(source: str | os.PathLike[str] | bytes | bytearray, name: str) -> Image.Image:
    """Opens a file or encoded bytes; reads the header only."""
    if isinstance(source, str) and source.startswith(("http://", "https://", "data:")):
        raise InvalidImageError(f"{name[:80]} is a URL; only files are read. Download it and pass the path.")
    Image.init()
    formats = [name for name in FORMATS if name in Image.OPEN]
    file = io.BytesIO(source) if isinstance(source, (bytes, bytearray)) else os.fspath(source)
    try:
        # Pillow has a limit of its own, global, with a warning below it; ours is checked next, still before decoding.
        with _PILLOW_LIMIT:
            pillow_limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
            try:
                return Image.open(file, formats=formats)
            finally:
                Image.MAX_IMAGE_PIXELS = pillow_limit
    except FileNotFoundError as error:
        raise InvalidImageError(f"{name} does not exist. Check the path.") from error
    except UnidentifiedImageError as error:
        raise InvalidImageError(
            f"{name} is not an image that can be read; allowed formats are {', '.join(formats)}."
        ) from error
    except (OSError, ValueError, SyntaxError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        raise InvalidImageError(f"{name} cannot be opened ({reason}).") from error


def _pil_to_rgb(image: Image.Image, name: str) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":  # I, I;16, I;16B, F: more than 8 bits, one channel
        return _array_to_rgb(_widen(np.asarray(image)), name)
    if image.mode in ("LA", "La", "PA", "RGBA", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _widen(array: np.ndarray) -> np.ndarray:
    """Pillow's 32-bit "I" holds 16-bit files; reading it as 16 bits gives both of Pillow's modes one meaning."""
    fits = array.dtype == np.int32 and array.size and array.min() >= 0 and array.max() <= 65535
    return array.astype(np.uint16) if fits else array


def _layout(array: np.ndarray | torch.Tensor, name: str, input_data_format: str | None) -> tuple[int, int, bool]:
    """Height, width, and whether the channels come first; where both could be, only a tensor's do."""
    if input_data_format not in (None, "channels_first", "channels_last"):
        raise ValueError(
            f"input_data_format is {input_data_format!r}; allowed are 'channels_first' and 'channels_last'."
        )
    shape = tuple(array.shape)
    if len(shape) == 2:
        return shape[0], shape[1], False
    first = len(shape) == 3 and shape[0] in (1, 2, 3, 4) and input_data_format != "channels_last"
    last = len(shape) == 3 and shape[-1] in (1, 2, 3, 4) and input_data_format != "channels_first"
    if not (first or last):
        raise InvalidImageError(
            f"{name} has shape {shape}; allowed are (H, W), (H, W, C) and (C, H, W) with 1 to 4 channels."
        )
    if first and (not last or isinstance(array, torch.Tensor)):
        return shape[1], shape[2], True
    return shape[0], shape[1], False


def _array_to_rgb(array: np.ndarray | torch.Tensor, name: str, input_data_format: str | None = None) -> Image.Image:
    """An array of any allowed shape and type as 8-bit RGB."""
    height, width, channels_first = _layout(array, name, input_data_format)
    if isinstance(array, torch.Tensor):
        array = array.detach().cpu()
        array = (array.float() if array.is_floating_point() else array).numpy()  # NumPy has no bfloat16
    if channels_first:
        array = array.transpose(1, 2, 0)
    array = _to_8_bit(array, name).reshape(height, width, -1)
    return _pil_to_rgb(Image.fromarray(array.squeeze(-1) if array.shape[-1] == 1 else array), name)


def _to_8_bit(array: np.ndarray, name: str) -> np.ndarray:
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool:
        return array.astype(np.uint8) * 255
    if array.dtype.kind == "u" and array.dtype.itemsize == 2:  # of either byte order
        return np.rint(array / 257).astype(np.uint8)
    if array.dtype.kind not in "iuf":
        raise InvalidImageError(f"{name} holds {array.dtype} values; allowed are 8 and 16-bit integers and floats.")
    if not np.isfinite(array).all():
        raise InvalidImageError(f"{name} holds NaN or infinite pixels. Replace them, for example by np.nan_to_num.")
    low, high = array.min(), array.max()
    if low < 0 or high > 255:
        raise InvalidImageError(
            f"{name} holds values from {low:g} to {high:g}; allowed are 0 to 255 (or 0 to 1 as floats). "
            "Pass pixels that are not normalised yet."
        )
    scale = 255 if array.dtype.kind == "f" and high <= 1 else 1
    return np.rint(array * scale).astype(np.uint8)
