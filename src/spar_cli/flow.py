"""The way of pictures through a command: read ahead, by sizes through the network, written behind."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .many import Batch, workers_of, writer_number

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

    from spar_hf.sources import Photographs

BATCHES_AHEAD = 4  # read before they are needed, waiting for others of their size, and waiting to be written
MEMORY_BYTES = 2**29  # of pictures that wait at each of these places


@dataclass
class Picture:
    """A picture that is read.

    Attributes:
        number: in its source.
        name: in its source.
        image: upright, RGB, at its own size.
        pixel_values: (3, H, W), what the network reads; None where it makes that itself.
    """

    number: int
    name: str
    image: Image.Image
    pixel_values: np.ndarray | None


def stacked(pictures: Sequence[Picture]) -> np.ndarray:
    """(B, 3, H, W), what the network reads of pictures of one size."""
    return np.stack([picture.pixel_values for picture in pictures if picture.pixel_values is not None])


@dataclass
class Tool:
    """What the processes beside the network do.

    Attributes:
        source: of the pictures.
        prepare: an upright picture to what the network reads; None where that is made elsewhere.
        writing: number of a process -> what writes results there: stem, picture and what was found -> the record.
    """

    source: Photographs
    prepare: Callable[[Image.Image, str], np.ndarray] | None
    writing: Callable[[int], Callable[[str, Picture, Any], dict[str, Any]]]

    def begin(self, number: int) -> None:
        """In a process, before all else."""
        self.write = self.writing(writer_number(number))

    def read(self, number: int) -> Picture:
        """Raises an `InvalidImageError` that names the picture."""
        name = self.source.names[number]
        image = self.source.picture(number)
        pixels = None if self.prepare is None else self.prepare(image, f"image '{name}'")
        return Picture(number, name, image, pixels)


@dataclass
class Room:
    """How many pictures may wait at each place: a number of them, fewer where they are large.

    Attributes:
        most: pictures.
        largest: picture so far, bytes.
    """

    most: int
    largest: int = 1

    def see(self, picture: Picture) -> None:
        """Makes a picture count."""
        pixels = 0 if picture.pixel_values is None else picture.pixel_values.nbytes
        self.largest = max(self.largest, 3 * picture.image.width * picture.image.height + pixels)

    def __call__(self) -> int:
        return max(1, min(self.most, MEMORY_BYTES // self.largest))


@dataclass
class Buckets:
    """Pictures gathered by the size of their pixels.

    Attributes:
        size: of a batch.
        room: for those that wait.
    """

    size: int
    room: Room
    waiting: dict[Any, list[Picture]] = field(default_factory=dict)

    def add(self, picture: Picture) -> list[Picture]:
        """The batch that is full with this picture, or the fullest one when too many wait; else none."""
        key = picture.number if picture.pixel_values is None else picture.pixel_values.shape
        self.waiting.setdefault(key, []).append(picture)
        if len(self.waiting[key]) == self.size:
            return self.waiting.pop(key)
        if sum(map(len, self.waiting.values())) >= self.room():
            return self.waiting.pop(max(self.waiting, key=lambda key: len(self.waiting[key])))
        return []

    def rest(self) -> Iterator[list[Picture]]:
        """What is left, size by size."""
        while self.waiting:
            yield self.waiting.pop(next(iter(self.waiting)))


def do_all(
    batch: Batch,
    tool: Tool,
    infer: Callable[[list[Picture]], Sequence[Any]],
    batch_size: int,
    report: Callable[..., None],
) -> float:
    """Does every picture of a batch.

    Args:
        batch: the pictures.
        tool: reads and writes them.
        infer: pictures of one size -> what was found in each.
        batch_size: of them at once.
        report: told of each record that is written.

    Returns:
        The seconds that it took.

    Raises:
        OSError, ValueError: the disk is full, a process has died, there are too many bad pictures. What is written
            by then is in the journal.
    """
    from tqdm import tqdm

    from spar_hf.workers import Workers

    started = time.perf_counter()
    count = workers_of(batch.args, len(batch.todo))
    writing: deque[tuple[int, Future[Any]]] = deque()
    room = Room(BATCHES_AHEAD * max(batch_size, count))
    buckets = Buckets(batch_size, room)
    alone = len(batch.stems) < 2 or not batch.processes.is_main
    with (
        Workers(tool, count) as workers,
        tqdm(total=len(batch.todo), unit="image", disable=True if alone else None) as bar,
    ):

        def finish(most: int) -> None:
            """Waits until at most so many pictures are being written."""
            while len(writing) > most or (writing and writing[0][1].done()):
                number, future = writing.popleft()
                record = workers.result(future)
                batch.finish(number, record)
                report(record)
            bar.update(batch.done + len(batch.failed) - bar.n)

        def through(pictures: list[Picture]) -> None:
            if not pictures:
                return
            with batch.may_fail(*(picture.number for picture in pictures)):
                for picture, found in zip(pictures, infer(pictures), strict=True):
                    stem = batch.stems[picture.number]
                    picture.pixel_values = None
                    writing.append((picture.number, workers.submit("write", stem, picture, found)))
            finish(room() if count else 0)

        try:
            for number, future in workers.ahead("read", batch.todo, room):
                ready: list[Picture] = []
                with batch.may_fail(number):
                    picture = workers.result(future)
                    room.see(picture)
                    ready = buckets.add(picture)
                through(ready)
            for pictures in buckets.rest():
                through(pictures)
            finish(0)
        except BaseException:
            _keep(batch, writing)
            raise
    return time.perf_counter() - started


def _keep(batch: Batch, writing: deque[tuple[int, Future[Any]]]) -> None:
    """Enters what is being written while the command fails for another reason."""
    for number, future in writing:
        if not future.cancel():
            with suppress(Exception):
                batch.finish(number, future.result())
