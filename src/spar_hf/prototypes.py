"""build_bank(): a bank of references for a method that looks things up in one, from pictures of one's own.

The pictures have label maps, lie in folders of their class, or have no labels; what is made of them is up to the
method (`Prototypes` in its file). What is done is kept beside the output, so that a run that was stopped goes on.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from .build import method_class_arguments
from .evaluation.benchmarks import BenchmarkData
from .evaluation.samples import IGNORED, Sample
from .files import digest, read_state, write_state
from .image_io_spar import read_image
from .image_values_spar import DEFAULTS, ReadOptions
from .methods.bank import Bank, Reference, Rows, joined, network_digest
from .methods.table import METHODS, find_method
from .networks.diffusion import Diffusion
from .networks.drawing import Drawing, draw
from .networks.masks import MaskFolder, nearest
from .picture_book.dataset import CLASSES, EDITION, PictureBook
from .prompts_spar import Labels

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
SAVE_EVERY = 20  # items between two parts on disk


@dataclass(frozen=True)
class Pictures:
    """Pictures to make entries of.

    Attributes:
        labels: their vocabulary; None where they have no labels.
        names: one a picture.
        read: a picture and its class ids (`IGNORED` for none) by its number.
        identity: what else they are, for the fingerprint: sizes and times of files, ...
    """

    labels: Labels | None
    names: tuple[str, ...]
    read: Callable[[int], Sample]
    identity: str = ""

    @classmethod
    def of_benchmark(cls, data: BenchmarkData) -> Pictures:
        """The pictures of a benchmark, with its label maps."""
        return cls(data.labels, data.sample_names, data.read, f"{data.name}, {data.variant}")

    @classmethod
    def of_picture_book(cls, count: int, side_px: int) -> Pictures:
        """The first training scenes of the picture book, with their masks."""
        book = PictureBook("train", side_px, side_px)

        def draw(number: int) -> Sample:
            scene = book.scene(number)
            return Sample(f"train-{number}", Image.fromarray(scene.image), scene.mask.astype(np.int32))

        names = tuple(f"train-{number}" for number in range(count))
        return cls(Labels.parse(CLASSES), names, draw, f"picture book, edition {EDITION}, {side_px} px")

    @classmethod
    def drawn(cls, diffusion: Diffusion, labels: Labels, count: int, settings: Drawing) -> Pictures:
        """Pictures that a diffusion model draws, so many of each class; where it attended to the name is the class.

        The picture of a number is the same whenever it is drawn. A class with several names has pictures of each.

        Raises:
            ValueError: a name fits into no prompt.
        """
        chosen = [
            (class_id, names[number % len(names)], number)
            for class_id, names in enumerate(labels.classes)
            for number in range(count)
        ]
        for _, name, _ in chosen:
            settings.prompt_of(diffusion, name)

        def read(number: int) -> Sample:
            class_id, name, own = chosen[number]
            image, inside = draw(diffusion, name, settings, settings.seed + number)
            target = np.where(inside, class_id, IGNORED).astype(np.int32)
            return Sample(f"{name} {own}", image, target)

        names = tuple(f"{name} {own}" for _, name, own in chosen)
        return cls(labels, names, read, f"drawn by {network_digest(diffusion)}, {settings}")

    @classmethod
    def of_folder(cls, folder: Path, labels: Labels | None, reading: ReadOptions = DEFAULTS) -> Pictures:
        """The pictures of a folder and its sub-folders. Those in a sub-folder called as a class are all of it.

        Raises:
            ValueError: there are none.
        """
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; give one that holds pictures.")
        paths = [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES]
        if not paths:
            raise ValueError(f"{folder} holds no pictures ({', '.join(SUFFIXES)}); give a folder that does.")
        names = [path.relative_to(folder).as_posix() for path in paths]
        known = {} if labels is None else {n.casefold(): i for i, names_ in enumerate(labels.classes) for n in names_}
        ids = [known.get(Path(name).parts[0].casefold(), IGNORED) if "/" in name else IGNORED for name in names]

        def read(number: int) -> Sample:
            image = read_image(paths[number], reading)
            return Sample(names[number], image, np.full((image.height, image.width), ids[number], np.int32))

        stats = ((path.stat().st_size, path.stat().st_mtime_ns) for path in paths)
        return cls(labels, tuple(names), read, digest(f"{size} {time}\n".encode() for size, time in stats))


class Steps:
    """Work done item by item, kept in a folder of parts; what is there is not done again.

    Args:
        folder: of the parts.
        fingerprint: of all that decides them.
        progress: shows a bar.

    Raises:
        ValueError: the folder has parts of another run.
    """

    def __init__(self, folder: Path, fingerprint: str, progress: bool = True) -> None:
        self.folder, self.fingerprint, self.progress = folder, fingerprint, progress

    def __call__(self, title: str, count: int, work: Callable[[int, list[Rows]], Rows]) -> list[Rows]:
        """What `work(number, rows so far)` makes of each item, in their order."""
        done = self._done(title)
        first = len(done)
        with tqdm(total=count, initial=first, desc=title, disable=not self.progress) as bar:
            for number in range(first, count):
                done.append(work(number, done))
                bar.update()
                if len(done) - first == SAVE_EVERY or number + 1 == count:
                    self._save(title, first, done[first:])
                    first = len(done)
        return done

    def _done(self, title: str) -> list[Rows]:
        done: list[Rows] = []
        for path in sorted(self.folder.glob(f"{title}-*.safetensors")):
            record, tensors = read_state(path)
            if record["fingerprint"] != self.fingerprint:
                raise ValueError(
                    f"{self.folder} holds what another run has done; delete it to start anew, or name another file."
                )
            split = {name: tensor.split(record["counts"][name]) for name, tensor in tensors.items()}
            done += [dict(zip(split, row, strict=True)) for row in zip(*split.values(), strict=True)]
        return done

    def _save(self, title: str, first: int, rows: list[Rows]) -> None:
        counts = {name: [len(row[name]) for row in rows] for name in rows[0]}
        record = {"fingerprint": self.fingerprint, "counts": counts}
        path = self.folder / f"{title}-{first:08}.safetensors"
        write_state(path, joined(rows), record, failed="a picture gives no finite features")


def build_bank(
    output: Path,
    method: str,
    model: Any,
    processor: Any,
    pictures: Pictures,
    networks: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    masks: MaskFolder | None = None,
    progress: bool = True,
) -> Bank:
    """Makes a method's bank of references, or gives the one that is there if it is of the same pictures and networks.

    Args:
        output: the file; parts grow in a folder beside it, called as it is with `.parts`.
        method: the name of a row that needs a bank.
        model: a `SparModel`.
        processor: its `SparProcessor`; makes pixels of the pictures.
        pictures: to make entries of.
        networks, settings: see `build_segmenter`; without the bank.
        masks: what regions are read from, to be told of each picture.
        progress: shows bars.

    Raises:
        ValueError: the method takes no bank, the pictures have no labels that it wants, or `output` is of another run.
    """
    row = find_method(method)
    if not hasattr(row.module, "Prototypes"):
        taking = ", ".join(name for name, other in METHODS.items() if "bank" in other.needs)
        raise ValueError(f"method {method!r} looks nothing up in a bank of references; those that do: {taking}.")
    vision, arguments = method_class_arguments(model.vision_model, method, networks, settings, without="bank")
    builder = row.module.Prototypes(model, processor, vision, **arguments)
    labels = pictures.labels
    known = {name: network_digest(network) for name, network in builder.made_with.items()}
    record = {
        "method": method,
        "networks": known,
        "settings": json.loads(json.dumps(asdict(builder.settings))),
        "parts": digest([network_digest(part).encode() for part in builder.networks]),
        "repr": digest([repr(builder).encode(), processor.to_json_string().encode()]),
        "pictures": digest(f"{name}\n".encode() for name in (pictures.identity, *pictures.names)),
        "vocabulary": [] if labels is None else [list(names) for names in labels.classes],
    }
    fingerprint = digest([json.dumps(record).encode()])
    if output.exists():
        found = Bank.read(output)
        if found.record.get("fingerprint") == fingerprint:
            return found
        raise ValueError(f"{output} is a bank of other pictures, networks or settings; delete it or name another one.")

    @torch.no_grad()
    def read(number: int) -> Reference:
        sample = pictures.read(number)
        if masks is not None:
            masks.select(sample.name, (sample.image.height, sample.image.width))
        return reference_of(sample.image, sample.target, processor, model.device)

    parts = output.with_name(f"{output.name}.parts")
    steps = Steps(parts, fingerprint, progress)
    with torch.inference_mode():
        rows = steps("pictures", len(pictures.names), lambda number, before: builder.of_picture(read(number)))
        tensors, names = builder.gathered(rows, read, labels, steps)
    if not len(tensors["features"]):
        raise ValueError(
            f"nothing in {len(pictures.names)} pictures makes an entry: none has a labelled pixel, or a region."
        )
    bank = Bank(output, tensors, {**record, "fingerprint": fingerprint, "names": names})
    bank.write()
    shutil.rmtree(parts, ignore_errors=True)
    return bank


def reference_of(image: Image.Image, target: np.ndarray, processor: Any, device: torch.device) -> Reference:
    """A picture as the processor makes pixels of it, and its class ids at that size."""
    pixels: Tensor = processor(images=image, return_tensors="pt")["pixel_values"]
    ids = torch.from_numpy(target.astype(np.int64))
    return Reference(pixels.to(device), nearest(ids, (pixels.shape[2], pixels.shape[3])))
