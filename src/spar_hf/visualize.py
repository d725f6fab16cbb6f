"""Pictures of results: overlay with a legend, label map, PCA of patch features."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageColor, ImageDraw, ImageFont

from .prompts_spar import Labels

if TYPE_CHECKING:  # only `pca_picture` needs PyTorch; the others serve without it
    import torch

MIN_SIDE_PX = 480  # smaller pictures are enlarged by a whole factor, so that outlines and legend can be read
MIN_LEGEND_PX = 240
MAX_LEGEND_ROWS = 24  # more classes than this share one last line
BAND_PIXELS = 2**21  # of a picture that is worked on at a time
INK, PAPER, FRAME = (32, 33, 36), (255, 255, 255), (140, 140, 140)

# The seven colours of Okabe and Ito, "Color Universal Design" (2008), without black.
OKABE_ITO = ("#56b4e9", "#e69f00", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2")

# How linear RGB looks to someone without one kind of cone: Machado, Oliveira, Fernandes, "A Physiologically-based
# Model for Simulation of Color Vision Deficiency" (2009), severity 1.
PROTANOPIA = ((0.152286, 1.052583, -0.204868), (0.114503, 0.786281, 0.099216), (-0.003882, -0.048116, 1.051998))
DEUTERANOPIA = ((0.367322, 0.860646, -0.227968), (0.280085, 0.672501, 0.047413), (-0.011820, 0.042940, 0.968881))

# Linear RGB to cone responses to OKLab: Ottosson, "A perceptual color space for image processing" (2020).
RGB_TO_CONES = (
    (0.4122214708, 0.5363325363, 0.0514459929),
    (0.2119034982, 0.6806995451, 0.1073969566),
    (0.0883024619, 0.2817188376, 0.6299787005),
)
CONES_TO_OKLAB = (
    (0.2104542553, 0.7936177850, -0.0040720468),
    (1.9779984951, -2.4285922050, 0.4505937099),
    (0.0259040371, 0.7827717662, -0.8086757660),
)

# Tried in this order for a script that the shipped font does not cover; the system may have none of them.
SYSTEM_FONTS = (
    "NotoSansCJK-Regular.ttc",
    "NotoSans-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "Arial Unicode.ttf",
    "PingFang.ttc",
    "msyh.ttc",
    "Nirmala.ttf",
    "wqy-zenhei.ttc",
    "unifont.otf",
)


JOINERS = "\u200c\u200d"  # zero width non-joiner and joiner
BREAKS = ("Cc", "Cs", "Zl", "Zp")  # Unicode categories: control, surrogate, line and paragraph separator


# --- colours ---------------------------------------------------------------------------------------------------


def _seen_by_each_vision(rgb: np.ndarray) -> np.ndarray:
    """(N, 3) colours of 0..255 to (N, 3 visions, 3) OKLab: full colour vision, protanopia, deuteranopia."""
    srgb = rgb / 255.0
    linear = np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    visions = np.stack([np.eye(3), np.array(PROTANOPIA), np.array(DEUTERANOPIA)])
    seen = np.clip(np.einsum("vij,nj->nvi", visions, linear), 0, 1)  # (N, 3) -> (N, 3 visions, 3)
    return np.cbrt(seen @ np.array(RGB_TO_CONES).T) @ np.array(CONES_TO_OKLAB).T


@lru_cache(maxsize=8)
def palette(num_classes: int) -> np.ndarray:
    """Colours that stay apart from each other, with and without red-green colour blindness.

    Begins with the colours of Okabe and Ito. Each further one is the candidate farthest (in OKLab, under the least
    favourable of the three visions) from all before it, so `palette(n)` is the beginning of `palette(n + 1)`.

    Args:
        num_classes: How many colours; at least 0.

    Returns:
        (num_classes, 3) uint8, read-only.
    """
    levels = np.linspace(0, 255, 16).round()
    candidates = np.stack(np.meshgrid(levels, levels, levels, indexing="ij"), axis=-1).reshape(-1, 3)
    seen = _seen_by_each_vision(candidates)
    lightness = seen[:, 0, 0]
    keep = (lightness > 0.45) & (lightness < 0.93)  # neither lost in shadows nor on white paper
    candidates, seen = candidates[keep], seen[keep]

    colours = [np.array(ImageColor.getrgb(name), dtype=float) for name in OKABE_ITO]
    nearest = np.full(len(candidates), np.inf)
    for chosen in _seen_by_each_vision(np.array(colours)):
        nearest = np.minimum(nearest, np.linalg.norm(seen - chosen, axis=-1).min(axis=-1))
    while len(colours) < num_classes:
        best = int(nearest.argmax())
        colours.append(candidates[best])
        nearest = np.minimum(nearest, np.linalg.norm(seen - seen[best], axis=-1).min(axis=-1))
    table = np.array(colours, dtype=np.uint8)[:num_classes].reshape(num_classes, 3)
    table.setflags(write=False)
    return table


def colours_of(labels: Labels | Sequence[str]) -> np.ndarray:
    """The colour of each class, (C, 3) uint8: its own where it has one, else that of `palette`."""
    colours = palette(len(labels)).copy()
    for index, colour in enumerate(getattr(labels, "colours", ())):
        if colour is not None:
            colours[index] = colour
    return colours


# --- text ------------------------------------------------------------------------------------------------------


@cache
def _font(name: str, size_px: int) -> ImageFont.FreeTypeFont | None:
    """A font by file name, or None where this system has none of that name."""
    try:
        return ImageFont.truetype(name, size_px)
    except OSError:
        return None


def drawable(text: str, otherwise: str, size_px: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """`text` with the first font that has all of its characters; `otherwise` with the shipped font where none has."""
    shipped = _font(str(Path(__file__).parent / "assets" / "fonts" / "DejaVuSans.ttf"), size_px)
    if shipped is None:
        raise OSError("the font DejaVuSans.ttf is missing from the installed package; install spar-hf again")
    candidates = [shipped, *(font for name in SYSTEM_FONTS if (font := _font(name, size_px)))]
    covering = next((font for font in candidates if _covers(font, text)), None)
    return (text, covering) if covering else (otherwise, shipped)


def _covers(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether the font draws no character of `text` as the box that stands for a missing one."""
    missing = bytes(font.getmask("\U0010fffe"))
    shown = {char for char in text if not char.isspace() and char not in JOINERS}
    return all(bytes(font.getmask(char)) != missing for char in shown)


def plain_text(text: str) -> str:
    """`text` on one line: line breaks and control characters become spaces, direction overrides go.

    Zero-width joiners stay, for words of Persian and Indic scripts are written with them.
    """
    kinds = ((char, unicodedata.category(char)) for char in text)
    shown = (" " if kind in BREAKS else char for char, kind in kinds if kind != "Cf" or char in JOINERS)
    return " ".join("".join(shown).split())


def fit_text(text: str, font: ImageFont.FreeTypeFont, width_px: float) -> str:
    """The longest beginning of `text` that, with an ellipsis where cut, is at most `width_px` wide."""
    if font.getlength(text) <= width_px:
        return text
    low, high = 0, len(text)  # text[:low] fits with its ellipsis, text[:high] does not
    while high - low > 1:
        middle = (low + high) // 2
        fits = font.getlength(text[:middle].rstrip() + "…") <= width_px
        low, high = (middle, high) if fits else (low, middle)
    return text[:low].rstrip() + "…"


# --- pictures --------------------------------------------------------------------------------------------------


def label_map_image(segmentation: np.ndarray, labels: Labels | None = None) -> Image.Image:
    """The label map as a picture whose pixel values are the class ids; no class (-1) is the highest value there is.

    Args:
        segmentation: (H, W) class ids, -1 to 65534.
        labels: whose `written_ids` take the place of the positions, and whose colours are shown.

    Returns:
        A palette picture (mode P, colours of `palette`) for ids up to 254, a 16-bit grey one (mode I;16) above.

    Raises:
        ValueError: not two-dimensional, not of whole numbers, or an id outside -1 to 65534.
    """
    segmentation = _class_ids(segmentation)
    if labels is not None:
        segmentation = as_written(segmentation, labels)
    lowest, highest = int(segmentation.min()), int(segmentation.max())
    if lowest < -1 or highest > 65534:
        raise ValueError(f"class ids span {lowest} to {highest}; a PNG holds -1 to 65534.")
    if highest > 254:
        return Image.fromarray(segmentation.astype(np.uint16))  # -1 wraps around to 65535
    picture = Image.fromarray(segmentation.astype(np.uint8))  # and here to 255
    colours = palette(256).copy()
    if labels is not None:
        fits = np.array(labels.written_ids) < 255
        colours[np.array(labels.written_ids)[fits]] = colours_of(labels)[fits]
    colours[255] = 0
    picture.putpalette(colours.tobytes())  # makes it mode P
    return picture


def as_written(segmentation: np.ndarray, labels: Labels) -> np.ndarray:
    """A label map of positions with the classes' `written_ids` in their place; other ids, such as -1, stay."""
    if not labels.ids:
        return segmentation
    ids = np.arange(-1, max(int(segmentation.max()), len(labels) - 1) + 1)
    ids[1 : len(labels) + 1] = labels.ids
    return ids.astype(np.int32)[segmentation + 1]


def scores_image(scores: np.ndarray) -> Image.Image:
    """Probabilities (H, W), 0 to 1, as a grey picture: 0 is black, 1 is white."""
    grey = np.empty(scores.shape, np.uint8)
    for rows in _bands(scores.shape):
        grey[rows] = (255 * scores[rows]).round().clip(0, 255)
    return Image.fromarray(grey)


def overlay(
    image: Image.Image, segmentation: np.ndarray, labels: Labels | Sequence[str], opacity: float = 0.6
) -> Image.Image:
    """The image with each region tinted and outlined in its class's colour, and a legend underneath.

    The legend lists the classes that occur, largest first, with their fraction of the image. Labels are drawn as plain
    text, whatever they contain, and cut with an ellipsis where they do not fit. A picture under 480 px is enlarged.

    Args:
        image: any mode; converted to RGB.
        segmentation: (H, W) class ids, of the image's size. An id without a label (a background of -1 or 255) leaves
            its pixels as they are.
        labels: the classes; `labels[i]` or `labels.class_names[i]` names class i.
        opacity: of the tint, 0 to 1.

    Returns:
        RGB; as wide as the (enlarged) image or the narrowest legend, and higher by the legend.

    Raises:
        ValueError: sizes differ, or opacity is out of range.
    """
    class_names = labels.class_names if isinstance(labels, Labels) else tuple(labels)
    segmentation = _class_ids(segmentation)
    if segmentation.shape != (image.height, image.width):
        raise ValueError(
            f"the segmentation is {segmentation.shape[0]} x {segmentation.shape[1]}, the image {image.height} x "
            f"{image.width} (height x width); give the label map at the image's own size."
        )
    if not 0 <= opacity <= 1:
        raise ValueError(f"opacity is {opacity}; it must be 0 to 1.")

    fractions = np.zeros(len(class_names))
    for rows in _bands(segmentation.shape):
        ids = segmentation[rows]
        fractions += np.bincount(ids[(ids >= 0) & (ids < len(class_names))], minlength=len(class_names))
    fractions /= segmentation.size
    factor = max(1, -(-MIN_SIDE_PX // max(segmentation.shape)))
    if factor > 1:
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)
        segmentation = segmentation.repeat(factor, axis=0).repeat(factor, axis=1)
    colours = colours_of(labels)
    legend = _legend(image.size, class_names, fractions, colours)
    canvas = Image.new("RGB", (legend.width, image.height + legend.height), PAPER)
    for rows, tinted in _tinted(image, segmentation, colours, opacity):
        canvas.paste(tinted, ((canvas.width - image.width) // 2, rows.start))
    canvas.paste(legend, (0, image.height))
    return canvas


def tinted(
    image: Image.Image, segmentation: np.ndarray, labels: Labels | Sequence[str], opacity: float = 0.6
) -> Image.Image:
    """`overlay` without a legend, at the picture's own size, as the frames of a video want it."""
    canvas = Image.new("RGB", image.size)
    for rows, part in _tinted(image, _class_ids(segmentation), colours_of(labels), opacity):
        canvas.paste(part, (0, rows.start))
    return canvas


def _bands(shape: tuple[int, ...]) -> Iterator[slice]:
    """Rows of a picture, about `BAND_PIXELS` at a time."""
    step = max(1, BAND_PIXELS // shape[1])
    for start in range(0, shape[0], step):
        yield slice(start, min(start + step, shape[0]))


def _class_ids(segmentation: np.ndarray) -> np.ndarray:
    segmentation = np.asarray(segmentation)
    if segmentation.ndim != 2 or segmentation.size == 0 or segmentation.dtype.kind not in "iu":
        raise ValueError(
            f"the segmentation has shape {segmentation.shape} and type {segmentation.dtype}; "
            "give one (H, W) array of whole numbers."
        )
    return segmentation


def _tinted(
    image: Image.Image, segmentation: np.ndarray, colours: np.ndarray, opacity: float
) -> Iterator[tuple[slice, Image.Image]]:
    """Regions in their colour at `opacity`, borders in full with a thin dark line between; some rows at a time."""
    unit_px = max(1, round(max(segmentation.shape) / 800))
    margin_px = 2 * unit_px  # how far a border reaches
    for rows in _bands(segmentation.shape):
        above = min(margin_px, rows.start)
        inner = slice(above, above + rows.stop - rows.start)
        ids = segmentation[rows.start - above : rows.stop + margin_px].astype(np.int32)
        ids[(ids < 0) | (ids >= len(colours))] = -1
        borders = _near_a_border(ids, 2 * unit_px)[inner]
        lines = _near_a_border(ids, unit_px, both_sides=False)[inner]
        ids = ids[inner]
        part = image.crop((0, rows.start, image.width, rows.stop)).convert("RGB")
        colour = Image.fromarray(colours[np.maximum(ids, 0)] if len(colours) else np.zeros_like(part))
        picture = Image.blend(part, colour, opacity)
        picture.paste(colour, mask=Image.fromarray(borders))
        picture.paste(INK, mask=Image.fromarray(lines))
        if ids.min() < 0:
            picture.paste(part, mask=Image.fromarray(ids < 0))
        yield rows, picture


def _near_a_border(segmentation: np.ndarray, reach_px: int, both_sides: bool = True) -> np.ndarray:
    """(H, W) bool: pixels with another class within `reach_px` along a row or a column (right and below only)."""
    near = np.zeros(segmentation.shape, dtype=bool)
    for step in range(1, reach_px + 1):
        for ids, out in ((segmentation, near), (segmentation.T, near.T)):
            differs = ids[step:] != ids[:-step]
            out[:-step] |= differs
            if both_sides:
                out[step:] |= differs
    return near


def _legend(
    size: tuple[int, int], class_names: Sequence[str], fractions: np.ndarray, class_colours: np.ndarray
) -> Image.Image:
    """Swatches, class names and fractions, in as many columns as fit under a picture of a (width, height)."""
    text_px = int(np.clip(np.sqrt(size[0] * size[1]) / 44, 14, 72))
    width = max(size[0], MIN_LEGEND_PX, 16 * text_px)
    line_px, gap_px = round(1.6 * text_px), text_px
    present = [int(index) for index in np.argsort(-fractions, kind="stable") if fractions[index] > 0]
    shown, rest = present[:MAX_LEGEND_ROWS], present[MAX_LEGEND_ROWS:]
    colours = class_colours.tolist()
    rows: list[tuple[tuple[int, ...] | None, str, ImageFont.FreeTypeFont, float]] = [
        (tuple(colours[index]), *drawable(plain_text(class_names[index]), f"class {index}", text_px), fractions[index])
        for index in shown
    ]
    _, digits = drawable("0 %", "", text_px)
    if rest:
        rows.append((None, f"and {len(rest)} more", digits, fractions[rest].sum()))
    if fractions.sum() < 1 - 1e-9:
        rows.append((None, "no class", digits, 1 - fractions.sum()))

    fixed_px = 3 * text_px + digits.getlength("100.0 %")  # swatch, fraction and the space before each
    # One very long name gets an ellipsis and does not cost all the others their column.
    name_px = min(max(font.getlength(text) for _, text, font, _ in rows), 12 * text_px)
    wanted_px = min(fixed_px + name_px, width - 2 * gap_px)
    columns = int(np.clip((width - gap_px) // (wanted_px + 2 * gap_px), 1, min(4, len(rows))))
    lines = -(-len(rows) // columns)
    columns = -(-len(rows) // lines)
    column_px = (width - gap_px * (2 + 2 * (columns - 1))) / columns

    panel = Image.new("RGB", (width, lines * line_px + 2 * gap_px), PAPER)
    draw = ImageDraw.Draw(panel)
    for index, (colour, text, font, fraction) in enumerate(rows):
        column, line = divmod(index, lines)
        left = gap_px + column * (column_px + 2 * gap_px)
        middle = gap_px + (line + 0.5) * line_px
        if colour is not None:
            swatch = (left, middle - 0.55 * text_px, left + 1.1 * text_px, middle + 0.55 * text_px)
            draw.rectangle(swatch, fill=colour, outline=FRAME)
        name = fit_text(text, font, column_px - fixed_px)
        draw.text((left + 2 * text_px, middle), name, fill=INK, font=font, anchor="lm")
        draw.text((left + column_px, middle), percent_text(fraction), fill=INK, font=digits, anchor="rm")
    return panel


def percent_text(fraction: float) -> str:
    """A fraction of the image, 0 to 1, in per cent: `12.3 %`; `< 0.1 %` for what rounds to nothing and is not."""
    return "< 0.1 %" if 0 < fraction < 0.0005 else f"{100 * fraction:.1f} %"


def pca_picture(
    patch_embeds: torch.Tensor,
    size_hw: tuple[int, int] | None = None,
    coverage_hw: tuple[float, float] = (1.0, 1.0),
) -> Image.Image:
    """Patch features as colours: their first three principal components as red, green and blue.

    Features are scaled to length 1 first, for only their direction is compared with text. Each component is spread
    from its 1st to its 99th percentile, and its sign chosen so that the same features give the same picture.

    Args:
        patch_embeds: (h, w, D) features of one image.
        size_hw: (height, width) of the picture, bilinear between patches; None is one pixel for each patch.
        coverage_hw: image size divided by the pixels that the grid covers, per axis; see `grid_spar.coverage`.

    Returns:
        RGB of size `size_hw`.

    Raises:
        ValueError: not three-dimensional, or values that are not finite.
    """
    import torch

    from .grid_spar import upsample

    if patch_embeds.ndim != 3 or not patch_embeds.isfinite().all():
        raise ValueError(f"patch_embeds has shape {tuple(patch_embeds.shape)}; give (h, w, D) finite features.")
    height, width, dim = patch_embeds.shape
    features = torch.nn.functional.normalize(patch_embeds.detach().float().cpu(), dim=-1).reshape(-1, dim)
    features = features - features.mean(dim=0)
    directions = torch.linalg.eigh(features.T @ features).eigenvectors.flip(-1)[:, :3]  # (D, 3), largest first
    directions = directions * directions.gather(0, directions.abs().argmax(dim=0, keepdim=True)).sign()
    parts = features @ directions  # (h * w, D) -> (h * w, 3)
    low, high = parts.quantile(0.01, dim=0), parts.quantile(0.99, dim=0)
    flat = high - low < 1e-6  # a component without spread is grey
    colours = torch.where(flat, 0.5, (parts - low) / (high - low).masked_fill(flat, 1)).clamp(0, 1)
    colours = torch.nn.functional.pad(colours, (0, 3 - colours.shape[1]), value=0.5).reshape(height, width, 3)
    if size_hw is not None:
        colours = upsample(colours.movedim(-1, 0), size_hw, coverage_hw).movedim(0, -1)
    return Image.fromarray((255 * colours).round().byte().numpy())
