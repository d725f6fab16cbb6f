"""Every block of Python and shell in the README and the docs runs as it stands; those that can't say why above it.

They run in a folder that has what the pages name: pictures, masks, lists of classes, small benchmarks, and under
`openai/clip-vit-base-patch16` a small CLIP with random weights, which is found there before the Hub is asked.
"""

from __future__ import annotations

import ast
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from spar_cli.main import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- not run: (?P<why>.+?) -->\n)?^```(?P<language>python|bash)\n(?P<code>.*?)^```", re.S | re.M
)
# Run by others: what installs (`make release`), the make targets and the test runs (CI).
ELSEWHERE = ("pip", "make", "pytest", "apt-get")
# What a command of many scenes is cut to, so that it takes seconds.
FEW = {"--limit": "1", "--scale": "1", "--methods": "maskclip"}
QUICK = ("docs/own-classes.md",)  # README's first block and the notebook run by default as well


class Block(NamedTuple):
    page: str
    language: str
    code: str
    why: str | None

    def __str__(self) -> str:
        return f"{self.page}: {self.code.splitlines()[0]}"


def blocks_of(page: Path) -> list[Block]:
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    name = page.relative_to(ROOT).as_posix()
    return [Block(name, match["language"], match["code"], match["why"]) for match in found]


def commands(code: str) -> Iterator[list[str]]:
    for line in code.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield words


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PAGES_THAT_RUN = list(dict.fromkeys(block.page for block in BLOCKS if block.why is None))


def picture(path: Path, seed: int, height: int = 70, width: int = 96) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (height // 10 + 1, width // 10 + 1, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC).save(path)


def mask(path: Path, classes: int, height: int = 70, width: int = 96) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    ids = np.arange(height * width).reshape(height, width) * classes // (height * width)
    Image.fromarray(ids.astype(np.uint8)).save(path)


def write_pictures(world: Path) -> None:
    for number, name in enumerate(("street", "beach", "photos/a", "photos/b/c", "images/one", "images/two")):
        picture(world / f"{name}.jpg", number)
    for name in ("masks/one", "masks/two", "masks/a", "masks/b/c", "masks/street"):
        mask(world / f"{name}.png", 3)
    (world / "list.txt").write_text("street.jpg\nbeach.jpg\n")
    (world / "words.txt").write_text("road\ncar, automobile\nsky\n")
    (world / "classes.txt").write_text("road\ncar\nsky\n")
    (world / "classes.csv").write_text("name,synonyms\nroad,street\ncar,automobile\nsky,\n")
    picture(world / "ADEChallengeData2016/images/validation/one.jpg", 1)
    mask(world / "ADEChallengeData2016/annotations/validation/one.png", 3)
    voc = world / "VOCdevkit/VOC2012"
    picture(voc / "JPEGImages/one.jpg", 1)
    mask(voc / "SegmentationClass/one.png", 3)
    (voc / "ImageSets/Segmentation").mkdir(parents=True)
    (voc / "ImageSets/Segmentation/val.txt").write_text("one\n")


def write_others(world: Path) -> None:
    """A tar, a data set, a raster and a video, where what writes them is there."""
    import tarfile

    from datasets import Dataset, DatasetDict
    from datasets import Image as ImageFeature

    (world / "shards").mkdir()
    with tarfile.open(world / "shards/0.tar", "w") as tar:
        tar.add(world / "street.jpg", "street.jpg")
    data = Dataset.from_dict({"photo": [str(world / "street.jpg")]}).cast_column("photo", ImageFeature())
    DatasetDict({"test": data}).save_to_disk(str(world / "you/photos"))
    rasterio = pytest.importorskip("rasterio")
    from rasterio.transform import from_origin

    pixels = np.asarray(Image.open(world / "street.jpg")).transpose(2, 0, 1)
    place = {"crs": "EPSG:32633", "transform": from_origin(500000, 5000000, 1, 1)}
    with rasterio.open(
        world / "scene.tif", "w", driver="GTiff", count=3, height=70, width=96, dtype="uint8", **place
    ) as raster:
        raster.write(pixels)
    av = pytest.importorskip("av")
    with av.open(str(world / "clip.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=5)
        stream.width, stream.height, stream.pix_fmt = 96, 70, "yuv420p"
        for _ in range(2):
            video.mux(stream.encode(av.VideoFrame.from_ndarray(np.asarray(Image.open(world / "street.jpg")))))
        video.mux(stream.encode(None))


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any, make_clip: Any, clip_tokenizer: Any) -> Path:
    from transformers import ViTConfig, ViTModel

    world = tmp_path_factory.mktemp("world")
    for folder in ("src", "examples", "docs"):
        (world / folder).symlink_to(ROOT / folder)
    write_pictures(world)
    clip = make_clip()
    clip.save_pretrained(world / "openai/clip-vit-base-patch16")
    clip_tokenizer.save_pretrained(world / "openai/clip-vit-base-patch16")
    own = {"hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    for name, patch in (("dino-vitb8", 8), ("dino-vits16", 16)):
        vit = ViTModel(ViTConfig(**own, image_size=64, patch_size=patch), add_pooling_layer=False)
        vit.save_pretrained(world / "facebook" / name)
    return world


def given(world: Path) -> dict[str, Any]:
    """What pages take as given: they go on where another page ended."""
    import spar_hf
    from spar_hf.evaluation import load_benchmark

    model, processor = spar_hf.load("tiny")
    return {
        "spar_hf": spar_hf,
        "model": model,
        "processor": processor,
        "segment": spar_hf.pipeline(model, processor=processor),
        "pixel_values": torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(0)),
        "height": 70,
        "width": 96,
        "images": [Image.open(world / "street.jpg")],
        "benchmark": load_benchmark(
            "custom", images=world / "images", masks=world / "masks", classes=world / "classes.txt"
        ),
    }


@pytest.mark.parametrize(
    "page", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in PAGES_THAT_RUN]
)
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
def test_the_blocks_of_a_page_run_one_after_the_other(page: str, world: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.chdir(world)
    blocks = [block for block in BLOCKS if block.page == page and block.why is None]
    others = any(name in block.code for block in blocks for name in ("scene.tif", "clip.mp4", "shards/"))
    if others and not (world / "shards").exists():
        write_others(world)
    names = given(world) if any(block.language == "python" for block in blocks) else {}
    for block in blocks:
        if block.language == "python":
            exec(compile(block.code, str(block), "exec"), names)
            continue
        for words in commands(block.code):
            if words[0] in ELSEWHERE or "--version" in words:
                continue
            assert main(globbed(cut(words[1:]))) == 0, f"{shlex.join(words)}: {capsys.readouterr().err}"


def cut(words: list[str]) -> list[str]:
    """The command on fewer scenes, at their smallest."""
    return [FEW.get(before, word) for before, word in zip(["", *words], words, strict=False)]


def globbed(words: list[str]) -> list[str]:
    """As the shell gives patterns that no quotes hold; those of the pages without quotes end in a suffix."""
    found: list[str] = []
    for word in words:
        paths = sorted(map(str, Path().glob(word))) if re.fullmatch(r"[\w/]+/\*\.\w+", word) else []
        found += paths or [word]
    return found


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.why is not None], ids=str)
def test_what_is_not_run_is_written_rightly(block: Block) -> None:
    """Their options and files are checked by test_docs.py, as all are."""
    if block.language == "python":
        ast.parse(block.code)
    else:
        assert list(commands(re.sub(r"\{0,1,2\}|\$\w+", "x", block.code)))
    assert re.search(r"\b(needs?|training|hours|quarter|server|sketch)\b", block.why or "")


def test_every_block_that_is_no_command_of_ours_says_why_it_does_not_run() -> None:
    strange = [
        shlex.join(words)
        for block in BLOCKS
        if block.language == "bash" and block.why is None
        for words in commands(block.code)
        if words[0] not in ("spar", *ELSEWHERE)
    ]
    assert strange == []
    assert sum(block.why is None for block in BLOCKS) > 30


# ----------------------------------------------------------------------------------------------- the notebook


def notebook() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    return found


def test_the_notebook_is_clean_and_its_code_runs() -> None:
    """The cells one after the other in this process; the slow test starts a kernel as Jupyter does."""
    names: dict[str, Any] = {}
    for cell in notebook()["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [] and cell["execution_count"] is None, "clear the outputs before committing"
        exec(compile("".join(cell["source"]), cell["id"], "exec"), names)
    assert {found["label"] for found in names["result"]["segments"]} >= {"apple", "car", "sky", "sand"}
    assert names["maps"].keys() == {"one pass", "window", "student"}
    assert (names["fruit"]["segmentation"] == -1).mean() > 0.5


@pytest.mark.slow
def test_the_notebook_runs_in_a_kernel_without_a_network(tmp_path: Path) -> None:
    nbclient = pytest.importorskip("nbclient")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    read = nbformat.read(ROOT / "examples" / "quickstart.ipynb", as_version=4)
    nbformat.validate(read)
    nbclient.NotebookClient(read, timeout=600, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [
        output for cell in read.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(pictures) >= 5
