"""Upsampling of patch features: what each output pixel takes of the patches near it, tile by tile.

Every upsampler here is linear in what it upsamples: an output pixel is a weighted mean of the patches near it, and the
weights come from the image (and for AnyUp from the features too), never from the words. So score maps can go through
instead of features, A (F t) = (A F) t, and nothing of size pixels x patches is ever held.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TILE_PX = 32  # side of a tile of output pixels
EPS = 1e-12  # the least length, as in `F.normalize`


class Tile(NamedTuple):
    """Weights of a rectangle of output pixels.

    Attributes:
        key_rows, key_columns: the rectangle of patches that these pixels see.
        weights: (pixels, patches of the rectangle), both row by row; rows add up to 1.
    """

    key_rows: slice
    key_columns: slice
    weights: Tensor


class LocalWeights:
    """What each pixel of an output takes of each patch of one image; made when asked for, a tile at a time.

    Attributes:
        size_hw: rows and columns of the output.
        grid_hw: rows and columns of the patches.
    """

    size_hw: tuple[int, int]
    grid_hw: tuple[int, int]

    def tile(self, rows: slice, columns: slice) -> Tile:
        """The weights of a rectangle of output pixels."""
        raise NotImplementedError

    def tiles(self, rows: slice) -> Iterator[tuple[slice, slice, Tile]]:
        """The tiles of some rows of the output: their rows and columns, and their weights."""
        for y in runs(rows.start, rows.stop):
            for x in runs(0, self.size_hw[1]):
                yield y, x, self.tile(y, x)

    def apply(self, values: Tensor, rows: slice | None = None) -> Tensor:
        """The values of the patches (h, w, C) at some rows of the output, all by default: (rows, W, C)."""
        rows = rows or slice(0, self.size_hw[0])
        out = values.new_empty(rows.stop - rows.start, self.size_hw[1], values.shape[-1])
        for y, x, tile in self.tiles(rows):
            seen = values[tile.key_rows, tile.key_columns].flatten(0, 1)
            part = tile.weights @ seen.to(tile.weights.dtype)
            out[y.start - rows.start : y.stop - rows.start, x] = part.to(out.dtype).unflatten(0, (-1, width(x)))
        return out

    def scores(self, features: Tensor, text: Tensor, rows: slice, cosine: bool = True) -> Tensor:
        """Scores of the upsampled features at some rows of the output, without more channels than it takes.

        The upsampled feature is f = Σ a F over the n patches in sight. With fewer names than channels, f·t = Σ a (F·t)
        goes through as K channels, and |f|² = aᵀ (F Fᵀ) a costs n numbers a pixel; else f itself is made.

        Args:
            features: (h, w, D).
            text: (K, D).
            rows: of the output.
            cosine: divide by the length of f.

        Returns:
            (K, rows, W).
        """
        (num_names, depth), (height, out_width) = text.shape, (rows.stop - rows.start, self.size_hw[1])
        out = features.new_empty(num_names, height, out_width)
        patch_scores = features @ text.T  # (h, w, K)
        for y, x, (key_rows, key_columns, weights) in self.tiles(rows):
            seen = features[key_rows, key_columns].flatten(0, 1).to(weights.dtype)  # (n, D)
            if num_names + (len(seen) if cosine else 0) < depth:
                part = weights @ patch_scores[key_rows, key_columns].flatten(0, 1).to(weights.dtype)
                if cosine:
                    squares = ((weights @ (seen @ seen.T)) * weights).sum(1, keepdim=True)
                    part = part / squares.clamp_(min=0).sqrt_().clamp_(min=EPS)
            else:
                made = weights @ seen
                part = (F.normalize(made, dim=1) if cosine else made) @ text.T.to(weights.dtype)
            part = part.T.unflatten(1, (-1, width(x))).to(out.dtype)  # (K, rows, columns)
            out[:, y.start - rows.start : y.stop - rows.start, x] = part
        return out


class Upsampler(nn.Module):
    """(image, features, output size) -> features."""

    def weights(self, image: Tensor, features: Tensor, size_hw: tuple[int, int]) -> LocalWeights:
        """What each output pixel takes of each patch.

        Args:
            image: (3, H, W), RGB from 0 to 1, exactly what the patches cover.
            features: (h, w, D).
            size_hw: rows and columns of the output; any.
        """
        raise NotImplementedError

    def forward(self, image: Tensor, features: Tensor, size_hw: tuple[int, int]) -> Tensor:
        """The features at another size.

        Args:
            image: (B, 3, H, W), RGB from 0 to 1, exactly what the patches cover.
            features: (B, h, w, D).
            size_hw: rows and columns of the output; any.

        Returns:
            (B, rows, columns, D) in the type of the features.

        Raises:
            ValueError: the shapes do not fit together.
        """
        check_inputs(image, features, size_hw)
        pairs = zip(image, features, strict=True)
        return torch.stack([self.weights(*pair, size_hw).apply(pair[1]) for pair in pairs])


def check_inputs(image: Tensor, features: Tensor, size_hw: tuple[int, int]) -> None:
    """Raises a `ValueError` unless the image is (B, 3, H, W), the features (B, h, w, D) and the size positive."""
    if image.ndim != 4 or image.shape[1] != 3 or features.ndim != 4 or len(image) != len(features):
        raise ValueError(
            f"the image is {tuple(image.shape)} and the features {tuple(features.shape)}; an upsampler takes "
            "(batch, 3, height, width) and (batch, rows, columns, channels)."
        )
    if min(size_hw) < 1:
        raise ValueError(f"the output size is {size_hw[0]} x {size_hw[1]}; both must be at least 1.")


def runs(start: int, stop: int, step: int = TILE_PX) -> Iterator[slice]:
    """`start` to `stop` in runs of a length."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))


def width(run: slice) -> int:
    return run.stop - run.start
