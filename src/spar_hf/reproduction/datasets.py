"""The data sets of the benchmarks: official sources, check sums, sizes and licences, and what must be done by hand.

Sizes are about. A check sum stands here only where somebody has published it; `source` says who.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..evaluation import BenchmarkData, load_benchmark
from .archives import Archive, Problem, download, unpack

_VOC = "http://host.robots.ox.ac.uk/pascal/VOC"
_TORCHVISION, _GLUON = "torchvision", "GluonCV"
_STREETS = "make an account at https://www.cityscapes-dataset.com, then log in and download it (or: pip install "
_STREETS += "cityscapesscripts; csDownload {name})"


@dataclass(frozen=True)
class DataSet:
    """Where a data set comes from.

    Attributes:
        title: its name.
        page: its home.
        licence: what its pictures and label maps may be used for.
        images: the benchmark's pictures, the whole of them.
        archives: to download, or to be put into the folder of downloads.
        by_hand: what else has to be done, as one instruction; "" where nothing has.
        gigabytes: about what is unpacked.
    """

    title: str
    page: str
    licence: str
    images: int
    archives: tuple[Archive, ...]
    by_hand: str = ""
    gigabytes: float = 0.0


def _voc(year: str, name: str, gigabytes: float, md5: str, folders: tuple[str, ...]) -> Archive:
    root = f"VOCdevkit/VOC{year}"
    members = tuple((f"{root}/{folder}", f"{root}/{folder}") for folder in folders)
    return Archive(f"{_VOC}/voc{year}/{name}", name, gigabytes, members, f"md5:{md5}", _TORCHVISION)


def _street(name: str, gigabytes: float, folder: str) -> Archive:
    page = "https://www.cityscapes-dataset.com/downloads/"
    return Archive(page, name, gigabytes, ((folder, f"cityscapes/{folder}"),), login=_STREETS.format(name=name))


_COCO_IMAGES = Archive(
    "http://images.cocodataset.org/zips/val2017.zip",
    "val2017.zip",
    0.82,
    (("val2017", "coco_stuff164k/images/val2017"),),
    "sha1:4950dc9d00dbe1c933ee0170f5797584351d2a41",
    _GLUON,
)
_COCO_MAPS = Archive(
    "http://calvin.inf.ed.ac.uk/wp-content/uploads/data/cocostuffdataset/stuffthingmaps_trainval2017.zip",
    "stuffthingmaps_trainval2017.zip",
    0.69,
    (("val2017", "coco_stuff164k/annotations/val2017"),),
)

DATASETS: dict[str, DataSet] = {
    "voc2012": DataSet(
        "PASCAL VOC 2012",
        f"{_VOC}/voc2012/",
        "pictures from flickr under its terms of use; for research",
        1449,
        (
            _voc(
                "2012",
                "VOCtrainval_11-May-2012.tar",
                2.0,
                "6cd6e144f989b92b3379bac3b3de84fd",
                ("JPEGImages", "SegmentationClass", "ImageSets/Segmentation"),
            ),
        ),
        gigabytes=2.0,
    ),
    "context": DataSet(
        "PASCAL Context",
        "https://cs.stanford.edu/~roozbeh/pascal-context/",
        "pictures from flickr under its terms of use; for research",
        5104,
        (
            _voc(
                "2010",
                "VOCtrainval_03-May-2010.tar",
                1.3,
                "da459979d0c395079b5c75ee67908abb",
                ("JPEGImages",),
            ),
        ),
        by_hand="make its label maps with MMSegmentation: download trainval_merged.json "
        "(https://codalabuser.blob.core.windows.net/public/trainval_merged.json), install "
        "https://github.com/zhanghang1989/detail-api, run 'python tools/dataset_converters/pascal_context.py "
        "{data}/VOCdevkit trainval_merged.json' in a clone of https://github.com/open-mmlab/mmsegmentation",
        gigabytes=1.3,
    ),
    "cityscapes": DataSet(
        "Cityscapes",
        "https://www.cityscapes-dataset.com",
        "not for commercial use; terms of use accepted with the account",
        500,
        (
            _street("leftImg8bit_trainvaltest.zip", 11.6, "leftImg8bit/val"),
            _street("gtFine_trainvaltest.zip", 0.25, "gtFine/val"),
        ),
        gigabytes=1.3,
    ),
    "ade20k": DataSet(
        "ADE20K, SceneParse150",
        "http://sceneparsing.csail.mit.edu",
        "pictures for research and education, not for commercial use",
        2000,
        (
            Archive(
                "http://data.csail.mit.edu/places/ADEchallenge/ADEChallengeData2016.zip",
                "ADEChallengeData2016.zip",
                0.97,
                tuple(
                    (f"ADEChallengeData2016/{folder}", f"ade/ADEChallengeData2016/{folder}")
                    for folder in ("images/validation", "annotations/validation")
                ),
                "sha1:219e1696abb36c8ba3a3afe7fb2f4b4606a897c7",
                _GLUON,
            ),
        ),
        gigabytes=0.1,
    ),
    "coco": DataSet(
        "COCO 2017 and COCO-Stuff",
        "https://github.com/nightrome/cocostuff",
        "annotations CC BY 4.0; pictures from flickr under its terms of use",
        5000,
        (_COCO_IMAGES, _COCO_MAPS),
        gigabytes=0.9,
    ),
}
# Benchmark -> the data set that it is made of.
_OF = {
    "voc21": "voc2012",
    "voc20": "voc2012",
    "context60": "context",
    "context59": "context",
    "cityscapes": "cityscapes",
    "ade20k": "ade20k",
    "coco_object": "coco",
    "coco_stuff": "coco",
}


def data_set_of(benchmark: str) -> str | None:
    """The key in `DATASETS` of what a benchmark is made of; None for the picture book, which needs nothing."""
    return _OF.get(benchmark)


def find_data(benchmark: str, data: Path) -> BenchmarkData | None:
    """The benchmark, if all its files are in the data folder."""
    try:
        return load_benchmark(benchmark, data)
    except ValueError:
        return None


def get_data(benchmark: str, data: Path, downloads: Path, progress: bool = True) -> BenchmarkData:
    """The benchmark, downloaded and unpacked into the data folder where it is not there.

    Args:
        benchmark: one on disk.
        data: folder as MMSegmentation has it.
        downloads: folder of the archives.
        progress: show bars.

    Raises:
        Problem: some of it cannot be had without the user; the message says how.
        OSError: the disk is too small or full.
    """
    if (found := find_data(benchmark, data)) is not None:
        return found
    row = DATASETS[_OF[benchmark]]
    for archive in row.archives:
        if not all((data / target).exists() for _, target in archive.members):
            unpack(download(archive, downloads, progress), archive.members, data, progress)
    try:
        return load_benchmark(benchmark, data)
    except ValueError as error:
        if row.by_hand:
            raise Problem(f"{row.title} is not complete in {data}: {row.by_hand.format(data=data)}") from error
        raise Problem(str(error)) from error
