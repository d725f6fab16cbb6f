"""The benchmarks on small trees of their real layouts: which file goes with which, and what a stored value means."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from spar_hf.evaluation import BENCHMARKS, IGNORED, load_benchmark, load_vocabulary

HEIGHT, WIDTH = 6, 8
CLASS_COUNTS = {
    "voc21": 21,
    "voc20": 20,
    "context60": 60,
    "context59": 59,
    "cityscapes": 19,
    "ade20k": 150,
    "coco_object": 81,
    "coco_stuff": 171,
}
# Folder of the data set, image, label map, folder of split lists.
_COCO_IMAGE, _COCO_MASK = "images/val2017/000139.jpg", "annotations/val2017/000139"
_STREET, _STREET_MASK = "leftImg8bit/val/ulm/ulm_1_leftImg8bit.png", "gtFine/val/ulm/ulm_1_gtFine"
TREES = {
    "voc": ("VOCdevkit/VOC2012", "JPEGImages/2007_1.jpg", "SegmentationClass/2007_1.png", "Segmentation"),
    "context": ("VOCdevkit/VOC2010", "JPEGImages/8_2.jpg", "SegmentationClassContext/8_2.png", "SegmentationContext"),
    "cityscapes": ("cityscapes", _STREET, _STREET_MASK + "_labelTrainIds.png", None),
    "cityscapes raw": ("cityscapes", _STREET, _STREET_MASK + "_labelIds.png", None),
    "ade": ("ade/ADEChallengeData2016", "images/validation/val_1.jpg", "annotations/validation/val_1.png", None),
    "object": ("coco_object", _COCO_IMAGE, _COCO_MASK + "_instanceTrainIds.png", None),
    "object in stuff": ("coco_stuff164k", _COCO_IMAGE, _COCO_MASK + "_instanceTrainIds.png", None),
    "stuff": ("coco_stuff164k", _COCO_IMAGE, _COCO_MASK + "_labelTrainIds.png", None),
    "stuff raw": ("coco_stuff164k", _COCO_IMAGE, _COCO_MASK + ".png", None),
}
# Benchmark, tree, stored values, the class ids that they stand for.
CASES = [
    ("voc21", "voc", [0, 1, 20, 255], [0, 1, 20, -1]),
    ("voc20", "voc", [0, 1, 20, 255], [-1, 0, 19, -1]),
    ("context60", "context", [0, 1, 59, 255], [0, 1, 59, -1]),
    ("context59", "context", [0, 1, 59, 255], [-1, 0, 58, -1]),
    ("cityscapes", "cityscapes", [0, 1, 18, 255], [0, 1, 18, -1]),
    ("cityscapes", "cityscapes raw", [7, 11, 33, 3], [0, 2, 18, -1]),
    ("ade20k", "ade", [0, 1, 150, 2], [-1, 0, 149, 1]),
    ("coco_object", "object", [0, 1, 80, 255], [0, 1, 80, -1]),
    ("coco_object", "object in stuff", [0, 1, 80, 255], [0, 1, 80, -1]),
    ("coco_object", "stuff", [0, 79, 80, 255], [1, 80, 0, 0]),
    ("coco_object", "stuff raw", [0, 89, 91, 255], [1, 80, 0, 0]),
    ("coco_stuff", "stuff", [0, 80, 170, 255], [0, 80, 170, -1]),
    ("coco_stuff", "stuff raw", [0, 12, 181, 255], [0, 11, 170, -1]),
]


def write_picture(path: Path, array: np.ndarray, palette: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(array)
    if palette:
        picture = picture.convert("P")
        picture.frombytes(array.tobytes())
        picture.putpalette(np.random.default_rng(0).integers(0, 256, 768, dtype=np.uint8).tobytes())
    picture.save(path)


def stored_mask(values: list[int]) -> np.ndarray:
    """(HEIGHT, WIDTH) with `values` as vertical bands."""
    return np.repeat(np.repeat(np.uint8(values)[None], HEIGHT, 0), WIDTH // len(values), 1)


def write_tree(data: Path, root: str, image: str, mask: str, lists: str | None, values: list[int]) -> None:
    rng = np.random.default_rng(0)
    write_picture(data / root / image, rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    write_picture(data / root / mask, stored_mask(values), palette="VOC" in root)
    if lists is not None:
        # An image that the list does not name, and one of another split.
        write_picture(data / root / "JPEGImages/unlisted.jpg", np.zeros((3, 3, 3), np.uint8))
        folder = data / root / "ImageSets" / lists
        folder.mkdir(parents=True)
        (folder / "val.txt").write_text(Path(image).stem + "\n")
        (folder / "train.txt").write_text("unlisted\n")


@pytest.mark.parametrize(("name", "tree", "values", "expected"), CASES)
@pytest.mark.parametrize("at", ["above", "itself"])
def test_layout_and_label_shift(
    tmp_path: Path, name: str, tree: str, values: list[int], expected: list[int], at: str
) -> None:
    write_tree(tmp_path, *TREES[tree], values)
    data = load_benchmark(name, tmp_path if at == "above" else tmp_path / TREES[tree][0])
    assert len(data) == 1 and len(data.labels) == CLASS_COUNTS[name]
    sample = data.read(0)
    assert sample.image.mode == "RGB" and sample.image.size == (WIDTH, HEIGHT)
    np.testing.assert_array_equal(sample.target, np.repeat(np.repeat([expected], HEIGHT, 0), WIDTH // 4, 1))


def test_every_layout_has_a_case_and_reaches_every_class() -> None:
    assert set(CLASS_COUNTS) == set(BENCHMARKS) - {"picturebook", "custom"}
    for name, count in CLASS_COUNTS.items():
        assert len(load_vocabulary(name)) == count
        for layout in BENCHMARKS[name]:
            assert any(
                case[0] == name and TREES[case[1]][0] == layout.root and fnmatch(TREES[case[1]][2], layout.mask)
                for case in CASES
            )
            assert set(layout.table.values()) | {IGNORED} == {*range(count), IGNORED}


def test_vocabularies_line_up_with_their_neighbours() -> None:
    assert load_vocabulary("voc21").class_names[1] == load_vocabulary("voc20").class_names[0] == "aeroplane"
    assert load_vocabulary("context60").class_names[1:] == load_vocabulary("context59").class_names
    things = load_vocabulary("coco_object").class_names[1:]
    assert things[0] == load_vocabulary("coco_stuff").class_names[0] == "person" and len(things) == 80
    assert load_vocabulary("cityscapes").class_names[-1] == "bicycle"
    assert "bed" in things and "bed" not in load_vocabulary("coco_object").classes[0]


def test_samples_are_sorted_and_keep_their_folders(tmp_path: Path) -> None:
    root, image, mask, _ = TREES["cityscapes"]
    for city, number in (("ulm", 2), ("bonn", 9), ("ulm", 1)):
        paths = [path.replace("ulm/ulm_1", f"{city}/{city}_{number}") for path in (image, mask)]
        write_tree(tmp_path, root, *paths, None, [number, 0, 0, 0])
    data = load_benchmark("cityscapes", tmp_path)
    assert data.sample_names == ("bonn/bonn_9", "ulm/ulm_1", "ulm/ulm_2")
    assert [int(data.read(index).target[0, 0]) for index in range(3)] == [9, 1, 2]


def test_missing_folder_says_the_layout(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"does not hold voc21. Expected .*VOCdevkit/VOC2012/JPEGImages/\*.jpg"):
        load_benchmark("voc21", tmp_path)
    with pytest.raises(
        ValueError, match=r"lacks data; it takes data. Expected layout: ade/ADEChallengeData2016/images"
    ):
        load_benchmark("ade20k")
    with pytest.raises(ValueError, match="there is no benchmark 'voc'; choose one of voc21, voc20"):
        load_benchmark("voc", tmp_path)


def test_missing_label_map_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path, *TREES["ade"], [0, 1, 150, 2])
    write_picture(tmp_path / "ade/ADEChallengeData2016/images/validation/val_2.jpg", np.zeros((2, 2, 3), np.uint8))
    with pytest.raises(ValueError, match=r"1 of the 4 files of ade20k are missing, the first is .*val_2.png"):
        load_benchmark("ade20k", tmp_path)


def test_split_list_stays_in_its_folder(tmp_path: Path) -> None:
    write_tree(tmp_path, *TREES["voc"], [0, 1, 20, 255])
    (tmp_path / "VOCdevkit/VOC2012/ImageSets/Segmentation/val.txt").write_text("../../secret\n")
    with pytest.raises(ValueError, match=r"names '../../secret', which leaves the data folder"):
        load_benchmark("voc21", tmp_path)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (np.zeros((HEIGHT, WIDTH + 1), np.uint8), "is 6 x 9 px and its image 6 x 8"),
        (stored_mask([0, 151, 200, 1]), r"holds the labels 151, 200, outside the vocabulary of 150 classes"),
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), r"is in colour"),
    ],
)
def test_wrong_label_maps_are_refused(tmp_path: Path, mask: np.ndarray, message: str) -> None:
    write_tree(tmp_path, *TREES["ade"], [0, 1, 150, 2])
    write_picture(tmp_path / "ade/ADEChallengeData2016/annotations/validation/val_1.png", mask)
    with pytest.raises(ValueError, match=f"val_1.png {message}"):
        load_benchmark("ade20k", tmp_path).read(0)


def test_broken_picture_is_named(tmp_path: Path) -> None:
    write_tree(tmp_path, *TREES["ade"], [0, 1, 150, 2])
    (tmp_path / "ade/ADEChallengeData2016/images/validation/val_1.jpg").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"val_1.jpg' is not an image that can be read"):
        load_benchmark("ade20k", tmp_path).read(0)


def custom_folders(tmp_path: Path, num_classes: int, mask: np.ndarray) -> dict[str, Path]:
    folders = {"images": tmp_path / "images", "masks": tmp_path / "masks", "classes": tmp_path / "classes.txt"}
    write_picture(folders["images"] / "deep/street.jpeg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    write_picture(folders["masks"] / "deep/street.png", mask)
    folders["classes"].write_text(
        "road\ncar, automobile\n\n" + "".join(f"class {i}\n" for i in range(num_classes - 2))
    )
    return folders


def test_custom_folders(tmp_path: Path) -> None:
    folders = custom_folders(tmp_path, 3, stored_mask([0, 1, 2, 255]))
    data = load_benchmark("custom", **folders)
    assert data.labels.classes == (("road",), ("car", "automobile"), ("class 0",))
    assert data.sample_names == ("deep/street",)
    assert data.read(0).target[0].tolist() == [0, 0, 1, 1, 2, 2, IGNORED, IGNORED]


def test_custom_takes_more_classes_than_a_byte_holds(tmp_path: Path) -> None:
    mask = stored_mask([0, 1, 2, 3]).astype(np.uint16)
    mask[0, :4] = 255, 299, 65535, 0
    data = load_benchmark("custom", **custom_folders(tmp_path, 300, mask))
    assert data.read(0).target[0, :4].tolist() == [255, 299, IGNORED, 0]
    mask[0, 0] = 300
    with pytest.raises(ValueError, match="holds the labels 300, outside the vocabulary of 300 classes"):
        load_benchmark("custom", **custom_folders(tmp_path, 300, mask)).read(0)


def test_custom_says_what_is_missing(tmp_path: Path) -> None:
    folders = custom_folders(tmp_path, 3, stored_mask([0, 1, 2, 255]))
    with pytest.raises(ValueError, match="lacks classes; it takes classes, images, masks"):
        load_benchmark("custom", images=folders["images"], masks=folders["masks"])
    with pytest.raises(ValueError, match="nowhere is no folder"):
        load_benchmark("custom", **{**folders, "masks": tmp_path / "nowhere"})
    with pytest.raises(ValueError, match=r"classes must be a text file"):
        load_benchmark("custom", **{**folders, "classes": tmp_path / "nowhere"})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no images"):
        load_benchmark("custom", **{**folders, "images": tmp_path / "empty"})
    (folders["masks"] / "deep/street.png").unlink()
    with pytest.raises(ValueError, match=r"1 of the 2 files of custom are missing, the first is .*street.png"):
        load_benchmark("custom", **folders)


def test_picture_book_at_a_multiple_of_the_native_side() -> None:
    small, large = (load_benchmark("picturebook", scale=scale, native_px=16) for scale in (1, 2.5))
    assert small.sample_names == large.sample_names and len(small) > 100
    assert large.variant == "test, 2.5x the native side, 40 px"
    assert small.read(3).target.shape == (16, 16) and large.read(3).target.shape == (40, 40)
    assert large.read(3).image.size == (40, 40)
    # The same scene: where the small one shows a class in a whole block, so does the large one, mostly.
    shown = np.asarray(Image.fromarray(large.read(3).target).resize((16, 16), Image.Resampling.NEAREST))
    assert (shown == small.read(3).target).mean() > 0.8
    assert set(np.unique(large.read(3).target)) <= set(range(len(large.labels)))
    other = load_benchmark("picturebook", scale=1, native_px=16, split="validation")
    assert other.variant.startswith("validation") and set(other.sample_names).isdisjoint(small.sample_names)
    assert (other.read(3).target != small.read(3).target).any()


def test_picture_book_arguments() -> None:
    with pytest.raises(ValueError, match="scale is 0; it must be positive"):
        load_benchmark("picturebook", scale=0, native_px=16)
    with pytest.raises(ValueError, match="Pass native_px"):
        load_benchmark("picturebook", scale=2)
    with pytest.raises(ValueError, match="came with data it does not use"):
        load_benchmark("picturebook", data="somewhere", native_px=16)
