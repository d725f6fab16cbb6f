"""Draws the site's pictures into docs/pictures, with `tiny` and scenes of the picture book.

python spaces/docs/pictures.py                    # all
python spaces/docs/pictures.py positions reach    # some of: positions windows reach distillation methods
python spaces/docs/pictures.py methods --methods naclip gem
"""

from __future__ import annotations

import argparse
import io
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

import spar_hf
from spar_hf.files import write_atomically
from spar_hf.grid_spar import resize_positions
from spar_hf.methods.table import METHODS
from spar_hf.picture_book.dataset import CLASSES, PictureBook
from spar_hf.prototypes import Pictures, build_bank
from spar_hf.reach_spar import WindowReach
from spar_hf.visualize import label_map_image, pca_picture

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "pictures"
SCENE, TIMES = 12, 4  # of the test split, drawn at so many times the native side
METHOD_PX = 256  # a side of the methods' pictures
REFERENCES = 150  # scenes of a bank
INK = "#202124"
# What stands in for networks that do not ship.
STAND_INS = {"dino": "tiny", "regions": "slic", "bank_dino": "tiny"}
OUT_OF_REACH = {"sam", "blip", "saliency"}
plt.rcParams.update({"font.family": "DejaVu Sans", "font.size": 9, "text.color": INK, "axes.titlesize": 9})


class Stage:
    """The model, its scene, and label maps of it."""

    def __init__(self) -> None:
        self.model, self.processor = spar_hf.load("tiny")
        self.vision = self.model.vision_model
        side = TIMES * self.vision.config.image_size
        drawn = PictureBook("test", side, side).scene(SCENE)
        self.image, self.truth = Image.fromarray(drawn.image), drawn.mask.astype(np.int32)
        self.pixels = self.processor(images=self.image, do_resize=False, return_tensors="pt")["pixel_values"]
        self.grid = self.pixels.shape[2] // self.vision.config.patch_size

    def label_map(self, segmenter: Any = None, model: Any = None, processor: Any = None) -> np.ndarray:
        """(H, W) class ids of the scene, by the picture book's own words."""
        segment = spar_hf.pipeline(model or self.model, processor=processor or self.processor)
        found = segment(self.image, candidate_labels=CLASSES, segmenter=segmenter, do_resize=False)
        return np.asarray(found["segmentation"])


def coloured(ids: np.ndarray) -> Image.Image:
    """A label map in the colours that every picture here has for a class."""
    return label_map_image(ids).convert("RGB")


def save(figure: Any, name: str) -> None:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, bbox_inches="tight", pad_inches=0.05, metadata={"Software": None})
    plt.close(figure)
    write_small(Image.open(buffer).convert("RGB"), name)


def write_small(picture: Image.Image, name: str) -> None:
    """As a palette PNG: a quarter of the size, and nobody sees the difference in drawings."""
    buffer = io.BytesIO()
    picture.quantize(colors=128, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE).save(
        buffer, "png", optimize=True
    )
    path = FOLDER / name
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, buffer.getvalue())
    print(f"{path.relative_to(FOLDER.parents[1])}: {len(buffer.getvalue()) // 1000} kB")


def row_of(count: int, width: float = 10.0) -> tuple[Any, Any]:
    figure, axes = plt.subplots(1, count, figsize=(width, width / count + 0.3), layout="constrained")
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    return figure, axes


def positions(stage: Stage) -> None:
    """How like one patch's position all others are: learned, then resized by two rules."""
    table = stage.vision.embeddings.position_embedding.weight.detach()[1:]
    native = round(len(table) ** 0.5)
    shown = [("learned: 8 x 8 patches", table, native)]
    shown += [
        (f"resized to 32 x 32, {rule!r}", resize_positions(table, (stage.grid, stage.grid), rule), stage.grid)
        for rule in ("size", "offset")
    ]
    figure, axes = row_of(4)
    for axis, (title, found, side) in zip(axes, shown, strict=False):
        row, column = round(0.375 * side), round(0.625 * side)
        unit = torch.nn.functional.normalize(found - table.mean(0), dim=-1)
        axis.imshow((unit @ unit[row * side + column]).view(side, side), cmap="viridis", vmin=-0.5, vmax=1)
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="white", linewidth=1.5))
        axis.set_title(title)
    differs = (shown[1][1] - shown[2][1]).norm(dim=-1).view(stage.grid, stage.grid)
    axes[3].imshow(differs / table.norm(dim=-1).mean(), cmap="magma", vmin=0)
    axes[3].set_title("what the two rules differ by")
    save(figure, "positions.png")


def windows(stage: Stage) -> None:
    """The teacher's windows over the scene, and the features of one pass beside its own."""
    teacher = spar_hf.SlidingWindow(stage.vision, stride_px=24)
    with torch.inference_mode():
        single = stage.vision(stage.pixels).patch_embeds
        taught = teacher(stage.pixels).patch_embeds
    figure, axes = row_of(3)
    axes[0].imshow(stage.image)
    side, step = stage.vision.config.image_size, 24
    for number, colour in ((0, "white"), (3, "#e69f00"), (6, "#cc79a7")):
        place = (number * step - 0.5, number * step - 0.5)
        axes[0].add_patch(Rectangle(place, side, side, fill=False, edgecolor=colour, linewidth=2))
    axes[0].set_title(f"three of {teacher.num_windows(*stage.pixels.shape[2:])} windows")
    size = (stage.image.height, stage.image.width)
    for axis, found, title in ((axes[1], single, "features of one pass"), (axes[2], taught, "mean over the windows")):
        axis.imshow(pca_picture(found[0], size))
        axis.set_title(title)
    save(figure, "windows.png")


def reach(stage: Stage) -> None:
    """Where one patch looks in an early block: everywhere, and within the window's reach."""
    row, column = 9, 22
    native = stage.vision.config.image_size // stage.vision.config.patch_size
    near = spar_hf.build_encoder(stage.vision, reach="window")
    share = shares(stage.grid, native, (row, column))
    figure, axes = row_of(4)
    axes[0].imshow(stage.image, extent=(-0.5, stage.grid - 0.5, stage.grid - 0.5, -0.5))
    axes[0].set_title("the patch that is asked")
    axes[1].imshow(share, cmap="viridis", vmin=0, vmax=1)
    axes[1].set_title("share of its windows, s")
    for axis, tower, title in ((axes[2], stage.vision, "one pass"), (axes[3], near, "within reach")):
        with torch.inference_mode():
            axis.imshow(pca_picture(tower(stage.pixels).patch_embeds[0], (stage.image.height, stage.image.width)))
        axis.set_title(f"features, {title}")
    for axis in axes[:2]:
        axis.add_patch(Rectangle((column - 0.5, row - 0.5), 1, 1, fill=False, edgecolor="#d55e00", linewidth=2))
    save(figure, "reach.png")


def shares(grid: int, native: int, place: tuple[int, int]) -> np.ndarray:
    """(grid, grid) share of the windows over one patch that are over each of the others as well."""
    reach = WindowReach((grid, grid), native, torch.device("cpu"))
    ask = torch.zeros(1, 1, grid * grid, grid * grid)
    ask[0, 0] = torch.eye(grid * grid)  # values that say which patch they are
    nothing = torch.zeros(1, 1, grid * grid, 1)
    with torch.inference_mode():
        weights = reach.attend(nothing, nothing, ask)[0, 0, place[0] * grid + place[1]]
    return (weights / weights.max()).view(grid, grid).numpy()  # equal scores: the weights are the shares, scaled


def distillation(stage: Stage) -> None:
    """The scene's classes: true, in one pass, by the teacher, by the student."""
    student, processor = spar_hf.load("tiny-spar")
    teacher = spar_hf.build_segmenter(stage.model, stage.processor, window="native", stride_px=24)
    shown = [
        ("the scene", stage.image),
        ("its true classes", coloured(stage.truth)),
        ("one pass", coloured(stage.label_map())),
        ("teacher, 289 passes", coloured(stage.label_map(teacher))),
        ("student, one pass", coloured(stage.label_map(None, student, processor))),
    ]
    figure, axes = row_of(len(shown), 11)
    for axis, (title, picture) in zip(axes, shown, strict=True):
        axis.imshow(picture)
        axis.set_title(title)
    save(figure, "distillation.png")


def methods(stage: Stage, names: list[str]) -> None:
    """The scene's label map by each method that can run with what ships."""

    def small(picture: Image.Image) -> Image.Image:
        return picture.resize((METHOD_PX, METHOD_PX), Image.Resampling.LANCZOS)

    def write_map(ids: np.ndarray, name: str) -> None:
        write_small(coloured(ids).resize((METHOD_PX, METHOD_PX), Image.Resampling.NEAREST), f"methods/{name}.png")

    write_small(small(stage.image), "methods/scene.png")
    write_map(stage.truth, "truth")
    for name in names:
        row = METHODS[name]
        if row.family != "clip" or OUT_OF_REACH & row.needs.keys():
            print(f"{name}: needs {', '.join(row.needs) or row.family}, which does not ship; no picture")
            continue
        networks: dict[str, Any] = {key: STAND_INS[key] for key in (*row.needs, *row.bank) if key != "bank"}
        if "bank" in row.needs:
            if not set(SETTINGS_OF_BANKS).issuperset({name}):
                print(f"{name}: its numbers have no defaults; no picture")
                continue
            networks["bank"] = bank_of(stage, name, networks)
        segmenter = spar_hf.build_segmenter(
            stage.model, stage.processor, name, networks=networks, window="paper", window_batch=8
        )
        write_map(stage.label_map(segmenter), name)


SETTINGS_OF_BANKS = ("reco", "freeda", "corrclip_v2_bank")


def bank_of(stage: Stage, name: str, networks: dict[str, Any]) -> Path:
    """A bank of training scenes, in a folder that stays until the script ends."""
    output = Path(BANKS.name) / f"{name}.safetensors"
    side = TIMES * stage.vision.config.image_size // 2
    given = {key: value for key, value in networks.items() if key != "bank"}
    build_bank(output, name, stage.model, stage.processor, Pictures.of_picture_book(REFERENCES, side), given)
    return output


BANKS = tempfile.TemporaryDirectory()
DRAWN: dict[str, Callable[..., None]] = {
    "positions": positions,
    "windows": windows,
    "reach": reach,
    "distillation": distillation,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="*", choices=[*DRAWN, "methods", []], help="which; all when none is named")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), metavar="NAME")
    args = parser.parse_args()
    stage = Stage()
    for name in args.pictures or [*DRAWN, "methods"]:
        if name == "methods":
            methods(stage, args.methods)
        else:
            DRAWN[name](stage)
    BANKS.cleanup()


if __name__ == "__main__":
    main()
