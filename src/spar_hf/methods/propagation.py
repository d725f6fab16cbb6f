"""Label propagation over a sparse graph: (I - alpha W) Z = Y by a fixed number of conjugate-gradient steps.

W = D^-1/2 (A + Aᵀ) D^-1/2 of similarities A without a diagonal, D its row sums (Zhou et al., NeurIPS 2003).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..extras import extra_package
from .encoder import ROW_NUMBERS

# Numbers (nodes x classes) that are solved for at a time: 64 MB of fp64 for each of four vectors.
SOLVER_NUMBERS = 2**23


class Graph:
    """A symmetric graph as one half of it.

    Args:
        half: (N, N) sparse, A; the weights are A + Aᵀ.
    """

    def __init__(self, half: Any) -> None:
        self.half = half
        degree = np.asarray(half.sum(axis=1)).ravel() + np.asarray(half.sum(axis=0)).ravel()
        degree[degree == 0] = 1
        self.scale = 1 / np.sqrt(degree)

    def normalised(self, vectors: np.ndarray) -> np.ndarray:
        """W times (N, K)."""
        scaled = self.scale[:, None] * vectors
        return self.scale[:, None] * (self.half @ scaled + self.half.T @ scaled)

    def propagate(self, scores: Tensor, alpha: float, steps: int, tolerance: float) -> Tensor:
        """Z of the scores Y (N, K), fp32; see `conjugate_gradients`."""
        out = torch.empty_like(scores, dtype=torch.float32)
        step = max(SOLVER_NUMBERS // len(scores), 1)
        for first in range(0, scores.shape[1], step):
            names = slice(first, first + step)
            right = np.ascontiguousarray(scores[:, names].cpu().numpy().astype(np.float64))
            solved = conjugate_gradients(lambda x: x - alpha * self.normalised(x), right, steps, tolerance)
            out[:, names] = torch.from_numpy(solved).to(out)
        return out


def conjugate_gradients(
    multiply: Callable[[np.ndarray], np.ndarray], right: np.ndarray, steps: int, tolerance: float
) -> np.ndarray:
    """Solves for each column apart, from zero.

    Args:
        multiply: (N, K) -> the matrix times it.
        right: (N, K).
        steps: at most so many; the result may be far from converged.
        tolerance: a column stops once its residual is at most this share of its right side's length.

    Returns:
        (N, K).
    """
    solution, residual, direction = np.zeros_like(right), right.copy(), right.copy()
    square = np.einsum("nk,nk->k", residual, residual)
    enough = tolerance**2 * square
    running = square > 0
    for _ in range(steps):
        if not running.any():
            break
        product = multiply(direction)
        curvature = np.einsum("nk,nk->k", direction, product)
        length = np.divide(square, curvature, out=np.zeros_like(square), where=running & (curvature > 0))
        solution += length * direction
        residual -= length * product
        before, square = square, np.einsum("nk,nk->k", residual, residual)
        running &= square > enough
        direction = residual + np.divide(square, before, out=np.zeros_like(square), where=running) * direction
    return solution


def nearest_neighbours(unit: Tensor, places_px: Tensor, neighbours: int, power: float, falloff: float) -> Graph:
    """The graph of the most similar patches.

    Args:
        unit: (N, F), L2-normalised.
        places_px: (N, 2), where each patch lies, pixels.
        neighbours: of each patch, itself included; at most N.
        power: of the cosines, negative ones counting as 0.
        falloff: weights fall with exp(-falloff * distance in pixels).
    """
    sparse = extra_package("scipy.sparse", "vfm")
    count = len(unit)
    neighbours = min(neighbours, count)
    values, columns = [], []
    step = max(ROW_NUMBERS // count, 1)
    for first in range(0, count, step):
        rows = slice(first, first + step)
        cosines, index = (unit[rows] @ unit.T).topk(neighbours, dim=1)
        distance = (places_px[rows, None] - places_px[index]).float().norm(dim=-1)
        weights = cosines.clamp(min=0) ** power * (-falloff * distance).exp()
        at = torch.arange(first, first + len(index), device=index.device)
        values.append(weights.masked_fill_(index == at[:, None], 0).cpu())
        columns.append(index.int().cpu())
    data = torch.cat(values).flatten().double().numpy()
    starts = np.arange(count + 1) * neighbours
    return Graph(sparse.csr_array((data, torch.cat(columns).flatten().numpy(), starts), shape=(count, count)))


def pixel_graph(lab: np.ndarray, reach_px: int, scale: float) -> Graph:
    """The graph of pixels near each other, weights exp(-difference / scale).

    Args:
        lab: (H, W, 3), colours.
        reach_px: neighbours are the (2 reach + 1)² pixels around each.
        scale: colour difference, L2, at which a weight has fallen to 1/e.
    """
    sparse = extra_package("scipy.sparse", "vfm")
    height, width, _ = lab.shape
    # One of each two opposite neighbours; the other one's weight is the same.
    shifts = [(0, x) for x in range(1, reach_px + 1)]
    shifts += [(y, x) for y in range(1, reach_px + 1) for x in range(-reach_px, reach_px + 1)]
    shifts = [(y, x) for y, x in shifts if y < height and abs(x) < width]
    count = height * width
    data = np.zeros((height, width, len(shifts)))
    columns = np.zeros((height, width, len(shifts)), dtype=np.int32)
    numbers = np.arange(count, dtype=np.int32).reshape(height, width)
    for i, (y, x) in enumerate(shifts):
        ours = (slice(0, height - y), slice(max(-x, 0), min(width - x, width)))
        theirs = (slice(y, height), slice(max(x, 0), min(width + x, width)))
        difference = np.sqrt(np.square(lab[ours] - lab[theirs]).sum(axis=-1))
        data[(*ours, i)] = np.exp(-difference / scale)  # what lies outside keeps a weight of 0
        columns[(*ours, i)] = numbers[theirs]
    starts = np.arange(count + 1, dtype=np.int64) * len(shifts)
    return Graph(sparse.csr_array((data.ravel(), columns.ravel(), starts), shape=(count, count)))


def lab_colours(rgb: Tensor) -> np.ndarray:
    """CIE Lab of sRGB colours (3, H, W) from 0 to 1, white point D65: (H, W, 3), fp32."""
    linear = torch.where(rgb > 0.04045, ((rgb.clamp(min=0) + 0.055) / 1.055) ** 2.4, rgb / 12.92)
    to_xyz = torch.tensor(
        [[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]]
    ).to(rgb)
    white = torch.tensor([0.95047, 1.0, 1.08883]).to(rgb)
    xyz = torch.einsum("xc,chw->hwx", to_xyz, linear) / white
    x, y, z = torch.where(xyz > 0.008856, xyz.clamp(min=0.008856) ** (1 / 3), 7.787 * xyz + 4 / 29).unbind(-1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], dim=-1).cpu().numpy()
