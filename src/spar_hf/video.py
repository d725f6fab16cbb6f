"""Videos in and out, frame by frame through PyAV. Imports no PyTorch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from PIL import Image

from .extras import extra_package
from .image_file_spar import InvalidImageError

SUFFIXES = (
    ".3gp", ".avi", ".flv", ".h264", ".m2ts", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".mts", ".ogv", ".ts",
    ".webm", ".wmv",
)  # fmt: skip
USUAL_RATE = Fraction(25)  # frames per second where a file does not say
TICKS = 90_000  # of a written video's clock in a second
BICUBIC = Image.Resampling.BICUBIC
CODECS = ("libx264", "libopenh264", "mpeg4")  # the first that PyAV was built with


def is_video(path: Path) -> bool:
    """Whether a file is a video by its suffix."""
    return path.suffix.lower() in SUFFIXES


class Frame(NamedTuple):
    """A frame of a video.

    Attributes:
        image: upright, RGB.
        seconds: when it is shown, from the beginning.
    """

    image: Image.Image
    seconds: Fraction


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a video in order, each at its own size, one at a time.

    Raises:
        InvalidImageError: there is no video in the file; or, after its last whole frame, it breaks off.
    """
    av = extra_package("av", "video")
    count, start, last = 0, None, Fraction(-1)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise InvalidImageError(f"{path} holds no video; give a video file, or a picture.")
            stream = container.streams.video[0]
            rate = stream.guessed_rate or stream.average_rate or USUAL_RATE
            expected = stream.frames
            for frame in _decoded(av, container, stream):
                counted = frame.pts is None or container.format.name == "avi"  # whose times are in the order stored
                seconds = count / rate if counted else frame.pts * (frame.time_base or stream.time_base)
                start = seconds if start is None else start
                last = max(seconds - start, last + Fraction(1, TICKS))  # clocks of broken files run backwards
                count += 1
                yield Frame(_upright(frame), last)
            length = _length(av, container, stream)
    except av.error.FFmpegError as error:
        reason = (error.strerror or str(error)).rstrip(".").lower()
        if not count:
            raise InvalidImageError(f"{path} cannot be read as a video ({reason}). Get the file again.") from error
        raise InvalidImageError(_broken_off(path, count, reason)) from error
    if not count:
        raise InvalidImageError(f"{path} holds a video without a frame. Get the file again.")
    if count < expected:
        raise InvalidImageError(_broken_off(path, count, f"there should be {expected}"))
    if not expected and length > last + 3 / rate + Fraction(1, 10):
        raise InvalidImageError(_broken_off(path, count, f"its length should be {float(length):.1f} s"))


def _decoded(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    """All frames that can be decoded; then the error that stopped it, if one did."""
    try:
        for packet in container.demux(stream):
            yield from packet.decode()
    except av.error.FFmpegError:
        with suppress(av.error.FFmpegError):
            yield from stream.codec_context.decode(None)  # whole frames that wait for their turn
        raise


def _length(av: Any, container: Any, stream: Any) -> Fraction:
    """Seconds of a video in a file that does not count its frames; 0 where it does not say, or says of all streams."""
    if stream.duration:
        return Fraction(stream.duration * stream.time_base)
    if len(container.streams) == 1 and container.duration:
        return Fraction(container.duration, av.time_base)
    return Fraction(0)


def _broken_off(path: Path, count: int, reason: str) -> str:
    return f"{path} breaks off after {count} frames ({reason}). What was made of these is kept; get the file again."


def _upright(frame: Any) -> Image.Image:
    image: Image.Image = frame.to_image()
    return image.rotate(frame.rotation, expand=True) if frame.rotation % 360 else image


class VideoWriter:
    """Writes pictures as an MP4 video; those of another size than the first are fitted into it, with black beside.

    Args:
        path: the file, of any name.

    Raises:
        ValueError: PyAV is not installed.
    """

    def __init__(self, path: Path) -> None:
        self._av = extra_package("av", "video")
        self._container = self._av.open(str(path), "w", format="mp4")
        self._stream: Any = None

    def __enter__(self) -> VideoWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if self._stream is not None:
                self._put(None)
        finally:
            self._container.close()

    def add(self, image: Image.Image, seconds: Fraction) -> None:
        """Appends a picture that is shown from `seconds` on; each later than the one before."""
        if self._stream is None:
            codec = next(name for name in CODECS if name in self._av.codecs_available)
            self._stream = self._container.add_stream(codec, rate=USUAL_RATE)
            # The colours of two neighbours are stored once, so that sides are even.
            self._stream.width, self._stream.height = (side + side % 2 for side in image.size)
            self._stream.pix_fmt = "yuv420p"
            self._stream.codec_context.time_base = Fraction(1, TICKS)
        frame = self._av.VideoFrame.from_image(fitted(image, (self._stream.width, self._stream.height)))
        frame.pts, frame.time_base = round(seconds * TICKS), Fraction(1, TICKS)
        self._put(frame)

    def _put(self, frame: Any) -> None:
        for packet in self._stream.encode(frame):
            self._container.mux(packet)


def fitted(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """A picture on a canvas of (width, height), as large as it fits with its ratio; a missing pixel is padded."""
    if image.size == size:
        return image
    canvas = Image.new("RGB", size)
    if all(0 <= whole - side <= 1 for whole, side in zip(size, image.size, strict=True)):
        canvas.paste(image)
        return canvas
    (width, height), (inner_width, inner_height) = size, image.size
    factor = min(width / inner_width, height / inner_height)
    inner = image.resize((max(1, round(inner_width * factor)), max(1, round(inner_height * factor))), BICUBIC)
    canvas.paste(inner, ((width - inner.width) // 2, (height - inner.height) // 2))
    return canvas
