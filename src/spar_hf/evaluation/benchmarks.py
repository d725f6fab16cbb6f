"""The benchmarks: where their files lie, what a stored label means, and the names of their classes.

A row of `BENCHMARKS` names the folder layouts that MMSegmentation's data guide describes
(https://github.com/open-mmlab/mmsegmentation/blob/main/docs/en/user_guides/2_dataset_prepare.md) and, for each, the
table from stored value to class id. Two benchmarks need no row: the picture book draws its scenes, and "custom" reads
two folders and a list of classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ..image_values_spar import DEFAULTS, ReadOptions
from ..names_spar import one_of, unknown
from ..picture_book.dataset import CLASSES as PICTURE_BOOK_CLASSES
from ..picture_book.dataset import PictureBook
from ..prompts_spar import Labels
from .samples import IGNORED, MASK_ORIENTATIONS, LabelTable, Sample, read_sample

_VOCABULARIES = Path(__file__).parent / "vocabularies"
_IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")


@dataclass(frozen=True)
class Layout:
    """One way in which a benchmark lies on disk. `*` in a pattern is the sample's name, which may hold folders.

    Attributes:
        root: Folder of the data set, as MMSegmentation has it below its data folder.
        image: Pattern of the images below `root`.
        mask: Pattern of the label maps below `root`.
        table: What a stored value means; any other value is an error.
        split: List of sample names below `root`; None takes all images.
    """

    root: str
    image: str
    mask: str
    table: LabelTable
    split: str | None = None

    def find_root(self, data: Path) -> Path | None:
        """The folder of the data set if `data` is that folder or one above it, else None."""
        parts = PurePosixPath(self.root).parts
        folders = [data.joinpath(*parts[skipped:]) for skipped in range(len(parts) + 1)]
        image_folder = self.image.split("*")[0]
        return next((folder for folder in folders if (folder / image_folder).is_dir()), None)

    def names(self, root: Path) -> list[str]:
        """The names of the samples: those in the split list, or of all images, sorted."""
        if self.split is None:
            folder, suffix = self.image.split("*")
            found = (path.relative_to(root / folder).as_posix() for path in (root / folder).rglob("*" + suffix))
            return sorted(name.removesuffix(suffix) for name in found)
        names = [line.strip() for line in (root / self.split).read_text(encoding="utf-8").splitlines()]
        for name in names:
            if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
                raise ValueError(
                    f"{root / self.split} names {name!r}, which leaves the data folder. Correct the list."
                )
        return [name for name in names if name]

    def __str__(self) -> str:
        return ", ".join(f"{self.root}/{pattern}" for pattern in (self.image, self.mask, self.split) if pattern)


def _same(count: int) -> LabelTable:
    """Stored values are class ids; 255 is ignored."""
    return {**{label: label for label in range(count)}, 255: IGNORED}


def _shifted(count: int) -> LabelTable:
    """0 and 255 are ignored, the first class is 1 ("reduce_zero_label" in MMSegmentation)."""
    return {0: IGNORED, **{label + 1: label for label in range(count)}, 255: IGNORED}


# The ids of Cityscapes' own label maps that are scored, in the order of the train ids.
_CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
_CITYSCAPES_TABLE = {**{label: IGNORED for label in range(34)}, 255: IGNORED}
_CITYSCAPES_TABLE |= {label: class_id for class_id, label in enumerate(_CITYSCAPES_IDS)}
# COCO-Stuff's own label maps have 182 values, of which 11 are never used; the others are the 171 classes in order.
_COCO_IDS = [label for label in range(182) if label not in (11, 25, 28, 29, 44, 65, 67, 68, 70, 82, 90)]
_COCO_TABLE = {**{label: class_id for class_id, label in enumerate(_COCO_IDS)}, 255: IGNORED}
_NUM_COCO_THINGS = 80


def _things(table: LabelTable) -> LabelTable:
    """COCO-Object from COCO-Stuff: things from 1, everything else, unlabelled pixels too, is background (0).

    So do the published conversions (GroupViT's, used by SCLIP and its successors).
    """
    return {label: class_id + 1 if 0 <= class_id < _NUM_COCO_THINGS else 0 for label, class_id in table.items()}


_voc = partial(
    Layout,
    "VOCdevkit/VOC2012",
    "JPEGImages/*.jpg",
    "SegmentationClass/*.png",
    split="ImageSets/Segmentation/val.txt",
)
_context = partial(
    Layout,
    "VOCdevkit/VOC2010",
    "JPEGImages/*.jpg",
    "SegmentationClassContext/*.png",
    split="ImageSets/SegmentationContext/val.txt",
)
_cityscapes = partial(Layout, "cityscapes", "leftImg8bit/val/*_leftImg8bit.png")
_coco = partial(Layout, "coco_stuff164k", "images/val2017/*.jpg")

# Name -> the layouts that are accepted, in the order in which they are tried.
BENCHMARKS: dict[str, tuple[Layout, ...]] = {
    "voc21": (_voc(table=_same(21)),),
    "voc20": (_voc(table=_shifted(20)),),
    "context60": (_context(table=_same(60)),),
    "context59": (_context(table=_shifted(59)),),
    "cityscapes": (
        _cityscapes(mask="gtFine/val/*_gtFine_labelTrainIds.png", table=_same(19)),
        _cityscapes(mask="gtFine/val/*_gtFine_labelIds.png", table=_CITYSCAPES_TABLE),
    ),
    "ade20k": (
        Layout("ade/ADEChallengeData2016", "images/validation/*.jpg", "annotations/validation/*.png", _shifted(150)),
    ),
    "coco_object": (
        Layout("coco_object", "images/val2017/*.jpg", "annotations/val2017/*_instanceTrainIds.png", _same(81)),
        _coco(mask="annotations/val2017/*_instanceTrainIds.png", table=_same(81)),
        _coco(mask="annotations/val2017/*_labelTrainIds.png", table=_things(_same(171))),
        _coco(mask="annotations/val2017/*.png", table=_things(_COCO_TABLE)),
    ),
    "coco_stuff": (
        _coco(mask="annotations/val2017/*_labelTrainIds.png", table=_same(171)),
        _coco(mask="annotations/val2017/*.png", table=_COCO_TABLE),
    ),
    "picturebook": (),
    "custom": (),
}


@dataclass(frozen=True)
class BenchmarkData:
    """A benchmark ready to be read: `len(data)`, `data.read(index)`.

    Attributes:
        name: Its name in `BENCHMARKS`.
        variant: What else tells it from another of that name ("test, 4x the native side, 512 px"), or "".
        labels: The vocabulary; class ids index it.
        sample_names: One name a sample.
        read: Reads or draws a sample by its index.
    """

    name: str
    variant: str
    labels: Labels
    sample_names: tuple[str, ...]
    read: Callable[[int], Sample]

    def __len__(self) -> int:
        return len(self.sample_names)


def load_benchmark(
    name: str,
    data: str | Path | None = None,
    *,
    scale: float | None = None,
    native_px: int | None = None,
    split: str | None = None,
    images: str | Path | None = None,
    masks: str | Path | None = None,
    classes: str | Path | None = None,
    reading: ReadOptions = DEFAULTS,
    mask_orientation: str | None = None,
) -> BenchmarkData:
    """Finds a benchmark's files, or prepares the picture book.

    Args:
        name: A key of `BENCHMARKS`.
        data: Folder of the data set, or one above it as MMSegmentation has it; for the benchmarks on disk.
        scale: For "picturebook": draws the scenes at this many times the native side; 1 when None.
        native_px: For "picturebook": the model's native side.
        split: For "picturebook": "validation", to choose by, or "test", to report; "test" when None.
        images: For "custom": folder of images.
        masks: For "custom": folder of label maps, `<name of the image>.png`; value k is line k + 1 of `classes`,
            255 (65535 in 16-bit files) is ignored.
        classes: For "custom": text file, one class a line, synonyms split by commas.
        reading: What is read of the images, and what is refused.
        mask_orientation: Of images that EXIF turns: the label maps are "upright", or lie as the image is "stored";
            None tells by the size, and refuses a label map whose size does not tell.

    Raises:
        ValueError: For an unknown name, a missing or superfluous argument, or files that are not where they should be.
    """
    if name not in BENCHMARKS:
        raise ValueError(unknown("benchmark", name, BENCHMARKS))
    given = {"data": data, "scale": scale, "split": split, "images": images, "masks": masks, "classes": classes}
    wanted = {"picturebook": {"scale", "split"}, "custom": {"images", "masks", "classes"}}.get(name, {"data"})
    superfluous = [argument for argument, value in given.items() if value is not None and argument not in wanted]
    missing = [argument for argument in sorted(wanted - {"scale", "split"}) if given[argument] is None]
    if superfluous or missing:
        expected = f" Expected layout: {_layouts(name)}." if missing == ["data"] else ""
        raise ValueError(
            f"benchmark {name} came with {', '.join(superfluous) or 'nothing'} it does not use and lacks "
            f"{', '.join(missing) or 'nothing'}; it takes {', '.join(sorted(wanted))}.{expected}"
        )
    pair = partial(read_sample, reading=reading, mask_orientation=mask_orientation)
    if mask_orientation is not None:
        one_of("mask_orientation", mask_orientation, MASK_ORIENTATIONS)
    if name == "picturebook":
        return _picture_book(1.0 if scale is None else scale, native_px, split or "test")
    if images is not None and masks is not None and classes is not None:
        return _custom(Path(images), Path(masks), Path(classes), pair)
    return _on_disk(name, Path(str(data)), pair)


def load_vocabulary(name: str) -> Labels:
    """The class list of a benchmark, from the package's data.

    COCO-Object's published list has "bed" both as a class and among the names of the background. Equal scores go to
    the lower id, so that class could never win; a name that is also a class is therefore left out of class 0.

    Raises:
        ValueError: For a name without a list.
    """
    if name not in (listed := sorted(path.stem for path in _VOCABULARIES.glob("*.json"))):
        raise ValueError(unknown("vocabulary", name, listed))
    classes = json.loads((_VOCABULARIES / f"{name}.json").read_text(encoding="utf-8"))
    elsewhere = {entry for names in classes[1:] for entry in names}
    return Labels.parse([[entry for entry in classes[0] if entry not in elsewhere], *classes[1:]])


def _on_disk(name: str, data: Path, pair: Callable[..., Sample]) -> BenchmarkData:
    """The first layout of which a label map is there."""
    for layout in BENCHMARKS[name]:
        root = layout.find_root(data)
        if root is None or (layout.split is not None and not (root / layout.split).is_file()):
            continue
        names = layout.names(root)
        images, masks = (
            [root / pattern.replace("*", entry) for entry in names] for pattern in (layout.image, layout.mask)
        )
        if any(mask.is_file() for mask in masks):
            pair = partial(pair, table=layout.table)
            return _from_files(name, layout.mask, load_vocabulary(name), names, images, masks, pair)
    raise ValueError(f"{data} does not hold {name}. Expected layout below that folder: {_layouts(name)}.")


def _layouts(name: str) -> str:
    return "; or ".join(str(layout) for layout in BENCHMARKS[name])


def _custom(images: Path, masks: Path, classes: Path, pair: Callable[..., Sample]) -> BenchmarkData:
    for folder in (images, masks):
        if not folder.is_dir():
            raise ValueError(f"{folder} is no folder; images and masks must be. Give the folders that hold the files.")
    if not classes.is_file():
        raise ValueError(f"{classes} is no file; classes must be a text file, one class a line, synonyms by commas.")
    labels = Labels.parse([line for line in classes.read_text(encoding="utf-8").splitlines() if line.strip()])
    paths = [path for path in sorted(images.rglob("*")) if path.suffix.lower() in _IMAGE_SUFFIXES]
    names = [path.relative_to(images).with_suffix("").as_posix() for path in paths]
    if not names:
        raise ValueError(f"{images} holds no images; there must be one at least ({', '.join(_IMAGE_SUFFIXES)}).")
    # With more than 255 classes, 255 is a class.
    table = {255: IGNORED, **{label: label for label in range(len(labels))}, 65535: IGNORED}
    mask_paths = [masks / f"{name}.png" for name in names]
    pair = partial(pair, table=table)
    return _from_files("custom", f"{len(labels)} classes", labels, names, paths, mask_paths, pair)


def _from_files(
    name: str,
    variant: str,
    labels: Labels,
    names: list[str],
    images: list[Path],
    masks: list[Path],
    pair: Callable[..., Sample],
) -> BenchmarkData:
    """A benchmark of image and label map files, all of which must be there."""
    absent = [path for path in (*images, *masks) if not path.is_file()]
    if absent:
        raise ValueError(
            f"{len(absent)} of the {2 * len(names)} files of {name} are missing, the first is {absent[0]}. "
            "Each image needs its label map; complete the folder."
        )

    def read(index: int) -> Sample:
        return pair(names[index], images[index], masks[index])

    return BenchmarkData(name, variant, labels, tuple(names), read)


def _picture_book(scale: float, native_px: int | None, split: str) -> BenchmarkData:
    if native_px is None:
        raise ValueError("the picture book is drawn in units of the model's native side. Pass native_px.")
    side_px = round(scale * native_px)
    if not scale > 0 or side_px < 1:
        raise ValueError(f"scale is {scale}; it must be positive, such as 4 for 4 times the {native_px} px.")
    book = PictureBook(split, side_px, side_px)

    def draw(index: int) -> Sample:
        scene = book.scene(index)
        return Sample(f"{split}-{index}", Image.fromarray(scene.image), scene.mask.astype(np.int32))

    return BenchmarkData(
        name="picturebook",
        variant=f"{split}, {scale:g}x the native side, {side_px} px",
        labels=Labels.parse(PICTURE_BOOK_CLASSES),
        sample_names=tuple(f"{split}-{index}" for index in range(len(book))),
        read=draw,
    )
