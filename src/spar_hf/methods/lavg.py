"""LaVG: objects are found without words, by normalised cuts of DINO's patches, and then named by SCLIP.

Paper: "In Defense of Lazy Visual Grounding for Open-Vocabulary Semantic Segmentation", Kang and Cho, ECCV 2024. A
label method: it names masks, and gives no features.
1. The image, squashed to a square of 640 px, goes through DINO. Patches whose keys have a cosine above 0.3 are tied
   with 1, the others with 1e-5. Up to eight times, the second generalised eigenvector u of (D - A, D) cuts the patches
   that are free: those above its mean, or, where three corners of the image are among them or its largest |u| is not,
   the others. The connected part (4 neighbours) around the largest one is a mask, and no longer free.
2. A DenseCRF draws each mask anew on the square's pixels; holes are filled; a mask that changed too much is dropped.
   What lies in no mask is the last one.
3. In each window of the image SCLIP's patches, of length one, come to the pixels bilinearly; a mask's score is the
   product of its mean feature with the names, earlier masks over later ones. Where windows overlap, the mean.
The graph is N x N, held as a sparse matrix beside a constant; the eigenvector is exact, by Lanczos's method. A mask's
mean feature is a weighting of patches: no pixel's feature is made. The masks share the lattices of the DenseCRF.
Deviations: the eigenvector has its largest |u| positive (the authors' sign is random, and their solver approximate);
masks are cut at the pixels that CLIP sees, theirs at the file's.
To reach: the numbers in `spar_hf.published`, with CLIP ViT-B/16 and DINO ViT-B/8, the shorter side at 336 px
(Stuff 448, Cityscapes 560). The factor on cosines is 65 on VOC21 and 50 on Context60 and COCO-Object.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ..encoders.base import column, rgb
from ..encoders.sliding_window import window_starts
from ..extras import extra_package
from ..grid_spar import axis_block
from ..networks.vit import ViT
from ..refinement.dense_crf import Lattice
from ..results_spar import NO_CLASS
from ..segmentation_spar import FullScores, ScoreMaps
from .encoder import ROW_NUMBERS
from .lposs import resize
from .segmenter import MethodSegmenter

# Up to so many free patches the eigenvector comes from a dense matrix.
DENSE_PATCHES = 512


@dataclass(frozen=True)
class Settings:
    """LaVG's constants (section 4 and the authors' code).

    Attributes:
        side_px: of the square that is cut.
        cuts: most masks.
        min_cosine: above it patches are tied.
        loose: how much the others are.
        steps: of the DenseCRF's mean field.
        near_weight, near_px: of its kernel of places, weight and standard deviation.
        alike_weight, alike_px, alike_colour: of its kernel of places and colours (0 to 255).
        min_iou: of a mask with itself before the DenseCRF.
        empty_rest: no name but the background's in the last mask, VOC21; the vocabulary must have a background.
        window_batch: windows run at once; bounds the memory.
    """

    side_px: int = 640
    cuts: int = 8
    min_cosine: float = 0.3
    loose: float = 1e-5
    steps: int = 10
    near_weight: float = 7.0
    near_px: float = 3.0
    alike_weight: float = 10.0
    alike_px: float = 50.0
    alike_colour: float = 5.0
    min_iou: float = 0.5
    empty_rest: bool = False
    window_batch: int = 32


class Segmenter(MethodSegmenter):
    """LaVG; see the head of the file.

    Args:
        model: has the text tower.
        processor: its `SparProcessor`.
        vision: CLIP's vision tower; its configuration gives window and step.
        networks: "dino": an adapter, a module, or the id or folder to load it from.
        settings: the method's constants.
        method: the row's name.

    Raises:
        ValueError: the network is missing or of another kind, or the square no whole number of its patches.
    """

    dino: ViT

    def adapters(self) -> dict[str, Any]:
        return {"dino": ViT.of}

    def prepare(self) -> None:
        side_px, patch_px = self.settings.side_px, self.dino.patch_px
        if side_px % patch_px or side_px < 3 * patch_px:
            raise ValueError(
                f"side_px of method {self.config.method!r} is {side_px}; it must be a multiple of the second "
                f"network's patch ({patch_px} px), at least 3 patches."
            )

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """See `MethodSegmenter`; `encoded` are `LabelFeatures`."""
        image = image.to(self.dtype)
        text = F.normalize(encoded.text_embeds.float(), dim=-1).to(self.device)
        foreground = None
        if self.settings.empty_rest:
            if encoded.labels.background is None:
                raise ValueError(
                    "setting empty_rest is for a vocabulary with a background; name one, or leave it out."
                )
            ids = torch.tensor(encoded.labels.class_ids, device=text.device)
            foreground = (ids != encoded.labels.background) & (ids != NO_CLASS)
        image_hw = (image.shape[2], image.shape[3])
        masks = self.masks(image)
        covered = torch.cat([masks, ~masks.any(dim=0, keepdim=True)])  # (R, H, W)
        first = covered.int().argmax(dim=0)  # earlier masks win
        places, window_hw, scores = self.scores(image, text, covered)
        if foreground is not None:
            for (y, x), single in zip(places, scores, strict=True):
                visible = first[y : y + window_hw[0], x : x + window_hw[1]].unique()
                single[-1, foreground] = single[visible].min()

        def make(names: slice, size_hw: tuple[int, int]) -> Tensor:
            count = torch.zeros(image_hw, device=text.device)
            total = torch.zeros(len(text[names]), *image_hw, device=text.device)
            for (y, x), single in zip(places, scores, strict=True):
                inside = (slice(y, y + window_hw[0]), slice(x, x + window_hw[1]))
                total[(slice(None), *inside)] += single[:, names].T[:, first[inside]]
                count[inside] += 1
            return resize(total / count, size_hw)

        return FullScores(make=make, size_hw=image_hw, num_names=len(text), device=text.device)

    def scores(
        self, image: Tensor, text: Tensor, masks: Tensor
    ) -> tuple[list[tuple[int, int]], tuple[int, int], Tensor]:
        """Top and left of the windows of an image (1, 3, H, W), their height and width, and the scores (windows, R, K)
        of masks (R, H, W) in each; 0 of those that a window does not show."""
        config = self.config
        sides = (image.shape[2], image.shape[3])
        window_px, stride_px = config.window_px or config.image_size, config.stride_px
        window_hw = (min(sides[0], window_px), min(sides[1], window_px))
        starts = [window_starts(side, window_px, stride_px) for side in sides]
        places = [(y, x) for y in starts[0] for x in starts[1]]
        features: list[Tensor] = []
        for start in range(0, len(places), self.settings.window_batch):
            chunk = places[start : start + self.settings.window_batch]
            crops = torch.stack([image[0, :, y : y + window_hw[0], x : x + window_hw[1]] for y, x in chunk])
            tokens, grid_hw, _ = self.encoder.embed(crops)
            found = self.encoder.by_recipe("sclip", self.encoder.run_to_last(tokens, grid_hw), grid_hw)
            features += F.normalize(found.float(), dim=-1)
        down, across = (
            axis_block(slice(0, side), side, count, 1.0, image.device)[1]  # (pixels, patches)
            for side, count in zip(window_hw, grid_hw, strict=True)
        )
        scores = []
        for (y, x), single in zip(places, features, strict=True):
            shown = masks[:, y : y + window_hw[0], x : x + window_hw[1]].float()
            weights = torch.einsum("ru,ux->rx", (down.T @ shown).flatten(0, 1), across)
            weights = weights.view(len(masks), -1)  # (R, h * w), the share of each patch in a mask's pixels
            scores.append(weights / shown.sum(dim=(1, 2)).clamp(min=1)[:, None] @ single @ text.T)
        return places, window_hw, torch.stack(scores)

    def masks(self, image: Tensor) -> Tensor:
        """Masks of an image (1, 3, H, W): (M, H, W) bool; some may be empty."""
        settings, config = self.settings, self.config
        side = (settings.side_px, settings.side_px)
        colours = (rgb(image, config)[0].clamp(0, 1) * 255).round().byte().permute(1, 2, 0).cpu().numpy()
        square = np.array(Image.fromarray(colours).resize(side, Image.Resampling.LANCZOS))
        tints = torch.from_numpy(square).to(image.device).float()  # (S, S, 3)
        pixels = tints.permute(2, 0, 1)[None] / 255
        pixels = (pixels - column(config.image_mean, pixels)) / column(config.image_std, pixels)
        keys = self.dino(pixels.to(self.dtype), config, heads="k").heads["k"][0].float()  # (C, h, w)
        cut = cuts(F.normalize(keys.flatten(1).T, dim=-1).cpu(), (keys.shape[1], keys.shape[2]), settings)
        coarse = torch.from_numpy(cut).to(image.device)
        large = F.interpolate(coarse[None].float(), size=side, mode="nearest")[0] > 0.5
        return self.at_pixels(drawn_anew(large, tints, settings), large, (image.shape[2], image.shape[3]))

    def at_pixels(self, masks: Tensor, before: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """Masks of the square (M, S, S) with holes filled, at the image's size; empty where too unlike `before`."""
        ndimage = extra_package("scipy.ndimage", "vfm")
        found = []
        for mask, old in zip(masks.cpu().numpy(), before.cpu().numpy(), strict=True):
            filled = ndimage.binary_fill_holes(mask)
            if (filled & old).sum() < self.settings.min_iou * (filled | old).sum():
                filled = np.zeros_like(filled)
            grey = Image.fromarray(filled.astype(np.uint8) * 255).resize(size_hw[::-1], Image.Resampling.BICUBIC)
            resized = np.asarray(grey)
            found.append(resized > resized.max() / 2)
        return torch.from_numpy(np.stack(found)).to(masks.device)


def cuts(unit: Tensor, grid_hw: tuple[int, int], settings: Settings) -> np.ndarray:
    """Masks of patches, one after the other: (M, h, w) bool, none of which shares a patch with another.

    Args:
        unit: (N, C), keys of length one.
        grid_hw: rows and columns of patches.
        settings: the method's.
    """
    ndimage = extra_package("scipy.ndimage", "vfm")
    sparse = extra_package("scipy.sparse", "vfm")
    rows = unit.split(max(ROW_NUMBERS // len(unit), 1))
    ties = sparse.vstack([sparse.csr_array((part @ unit.T > settings.min_cosine).numpy()) for part in rows], "csr")
    free = np.ones(len(unit), dtype=bool)
    masks: list[np.ndarray] = []
    while len(masks) < settings.cuts and (not masks or free.sum() > 5):
        second = second_eigenvector(ties[free][:, free], settings.loose)
        values = np.full(len(unit), np.abs(second).min())
        values[free] = second
        above = np.zeros(len(unit), dtype=bool)
        above[free] = second > second.mean()
        corners = above.reshape(grid_hw)[[0, 0, -1, -1], [0, -1, 0, -1]].sum()
        if corners >= 3 or not above[np.abs(values).argmax()]:
            values, above = -values, ~above & free
        parts, _ = ndimage.label(above.reshape(grid_hw))
        masks.append(parts == parts.flat[values.argmax()])
        free &= ~masks[-1].ravel()
    return np.stack(masks)


def second_eigenvector(ties: Any, loose: float) -> np.ndarray:
    """Of (D - A, D) for A = 1 where `ties`, a sparse (N, N) bool, else `loose`; its largest number is positive.

    With x = D^(1/2) u it is the second largest eigenvector of D^(-1/2) A D^(-1/2), whose largest is D^(1/2) 1.
    """
    count, ties = ties.shape[0], ties.astype(np.float64)
    degree = loose * count + (1 - loose) * ties.sum(axis=1)
    root = np.sqrt(degree)
    if count <= DENSE_PATCHES:
        graph = (loose + (1 - loose) * ties.toarray()) / np.outer(root, root)
        eigh = extra_package("scipy.linalg", "vfm").eigh
        vector = eigh(graph, subset_by_index=[count - 2, count - 2])[1][:, 0]
    else:
        solver = extra_package("scipy.sparse.linalg", "vfm")
        largest = root / np.linalg.norm(root)

        def times(x: np.ndarray) -> np.ndarray:
            x = x.ravel()
            scaled = x / root
            return ((1 - loose) * (ties @ scaled) + loose * scaled.sum()) / root - largest * (largest @ x)

        graph = solver.LinearOperator((count, count), matvec=times, dtype=np.float64)
        start = np.random.default_rng(0).standard_normal(count)
        vector = solver.eigsh(graph, k=1, which="LA", v0=start, ncv=40, maxiter=100 * count)[1][:, 0]
    second = vector / root
    return second * np.sign(second[np.abs(second).argmax()])


def drawn_anew(masks: Tensor, colours: Tensor, settings: Settings) -> Tensor:
    """Masks (M, S, S) bool after a DenseCRF of two labels each; see `refinement.dense_crf`.

    The soft-max of two labels is the sigmoid of their difference, which the kernels, linear, act on: a step is
    q <- sigmoid(u + sum of w N F N (2 q - 1)), with u = 1 inside the mask and -1 outside, as the soft-max of (0, 1).
    """
    _, height, width = masks.shape
    odds = 2 * masks.flatten(1).T.float() - 1  # (N, M)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x, y], dim=-1).flatten(0, 1).to(odds)
    alike = torch.cat([places / settings.alike_px, colours.flatten(0, 1) / settings.alike_colour], dim=1)
    kernels = [(settings.near_weight, Lattice(places / settings.near_px)), (settings.alike_weight, Lattice(alike))]
    inside = odds.sigmoid()
    for _ in range(settings.steps):
        inside = (odds + sum(weight * kernel.normalised(2 * inside - 1) for weight, kernel in kernels)).sigmoid()
    return (inside > 0.5).T.reshape(masks.shape)
