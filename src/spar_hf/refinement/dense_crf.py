"""DenseCRF: a fully connected conditional random field over pixels, solved by mean-field steps.

Paper: Krähenbühl and Koltun, NeurIPS 2011, with the permutohedral lattice of Adams et al., Eurographics 2010, as the
authors' own code has it (which pydensecrf wraps): the filter is the lattice's approximation of a Gaussian, not the
Gaussian itself, and its results are part of what the methods that use it report. With U = -log p, p at least 1e-5,
and Q = softmax(-U) at first, each step is Q <- softmax(-U + sum of w N F N Q), where F filters over a kernel's
features and N = (F 1)^-1/2. One kernel has the pixels' places, the other their places and colours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LOWEST = 1e-5  # of a probability (pydensecrf's `unary_from_softmax`)


@dataclass(frozen=True)
class Settings:
    """Numbers of the field.

    Attributes:
        steps: of mean field.
        near_weight: of the kernel of places.
        near_px: its standard deviation.
        alike_weight: of the kernel of places and colours.
        alike_px: its standard deviation in places.
        alike_colour: its standard deviation in colours, from 0 to 255.
    """

    steps: int = 10
    near_weight: float = 3.0
    near_px: float = 1.0
    alike_weight: float = 4.0
    alike_px: float = 67.0
    alike_colour: float = 3.0


def dense_crf(probabilities: Tensor, colours: Tensor, settings: Settings) -> Tensor:
    """The field's own probabilities.

    Args:
        probabilities: (K, H, W); they need not add to one.
        colours: (H, W, 3) from 0 to 255.
        settings: of the field.

    Returns:
        (K, H, W), fp32.
    """
    count, height, width = probabilities.shape
    logs = probabilities.float().clamp(min=LOWEST).log().flatten(1).T  # (N, K)
    y, x = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([x, y], dim=-1).flatten(0, 1).to(logs)
    tints = colours.flatten(0, 1).to(logs)
    alike = torch.cat([places / settings.alike_px, tints / settings.alike_colour], dim=1)
    kernels = [(settings.near_weight, Lattice(places / settings.near_px)), (settings.alike_weight, Lattice(alike))]
    current = logs.softmax(dim=1)
    for _ in range(settings.steps):
        energy = logs.clone()
        for weight, lattice in kernels:
            energy += weight * lattice.normalised(current)
        current = energy.softmax(dim=1)
    return current.T.reshape(count, height, width)


class Lattice:
    """A permutohedral lattice over some points: splat, blur along each of its axes, slice.

    Args:
        features: (N, d), in standard deviations of the Gaussian.
    """

    def __init__(self, features: Tensor) -> None:
        count, dims = features.shape
        remainder, rank, weights = simplex(elevated(features))
        # The corners' keys: those of the nearest remainder-0 point, moved along the simplex's walls.
        walls = torch.arange(dims + 1, device=features.device)
        moves = walls[:, None].expand(-1, dims + 1) - (dims + 1) * (walls > dims - walls[:, None])
        keys = remainder[:, None, :dims] + moves[:, rank].permute(1, 0, 2)[..., :dims]  # (N, d + 1, d)
        packed = Keys(keys.flatten(0, 1))
        self.points, index = packed.of(keys.flatten(0, 1)).unique(return_inverse=True)
        self.index = index.view(count, dims + 1)
        self.weights = weights[..., None]
        corners = torch.zeros(len(self.points), dims, dtype=keys.dtype, device=keys.device)
        corners[index] = keys.flatten(0, 1)
        self.neighbours = []
        for axis in range(dims + 1):
            step = torch.full((dims,), -1, device=keys.device)
            if axis < dims:
                step[axis] = dims
            self.neighbours.append([self._find(packed, corners + step), self._find(packed, corners - step)])
        self.scale = 1 / (1 + 2.0**-dims)
        self.norm = torch.ones(1)
        self.norm = (self.filtered(features.new_ones(count, 1)) + 1e-20).rsqrt()

    def _find(self, packed: Keys, keys: Tensor) -> Tensor:
        """Number of each lattice point; those that hold nothing have the one past the last."""
        wanted = packed.of(keys)
        at = torch.searchsorted(self.points, wanted).clamp(max=len(self.points) - 1)
        return torch.where((self.points[at] == wanted) & packed.inside(keys), at, len(self.points))

    def filtered(self, values: Tensor) -> Tensor:
        """F times (N, K)."""
        held = values.new_zeros(len(self.points) + 1, values.shape[1])
        for corner in range(self.index.shape[1]):
            held.index_add_(0, self.index[:, corner], self.weights[:, corner] * values)
        for before, after in self.neighbours:
            moved = held[before] + held[after]
            held[:-1] += 0.5 * moved
        out = torch.zeros_like(values)
        for corner in range(self.index.shape[1]):
            out += self.weights[:, corner] * held[self.index[:, corner]]
        return self.scale * out

    def normalised(self, values: Tensor) -> Tensor:
        """N F N times (N, K)."""
        return self.norm * self.filtered(self.norm * values)


class Keys:
    """Lattice points as single numbers, so that they can be sorted and found.

    Args:
        keys: (M, d) int64, all there are.
    """

    def __init__(self, keys: Tensor) -> None:
        low, high = keys.amin(0) - keys.shape[1] - 1, keys.amax(0) + keys.shape[1] + 1  # and their neighbours
        self.low, self.sizes = low, (high - low + 1).tolist()

    def of(self, keys: Tensor) -> Tensor:
        """(M, d) -> (M)."""
        total = torch.zeros(len(keys), dtype=torch.int64, device=keys.device)
        for column, size in zip((keys - self.low).unbind(1), self.sizes, strict=True):
            total = total * size + column
        return total

    def inside(self, keys: Tensor) -> Tensor:
        """Whether the numbers are theirs alone, (M)."""
        offset = keys - self.low
        return ((offset >= 0) & (offset < torch.tensor(self.sizes, device=keys.device))).all(dim=1)


def elevated(features: Tensor) -> Tensor:
    """Points (N, d) on the lattice's hyperplane, (N, d + 1), so that its blur has the standard deviation one."""
    dims = features.shape[1]
    axes = torch.arange(dims, device=features.device, dtype=torch.float32)
    scaled = features * ((2 / 3) ** 0.5 * (dims + 1) / ((axes + 1) * (axes + 2)).sqrt())
    # Coordinate 0 is the sum of all; coordinate j is the sum of those from j on, less j times number j - 1.
    sums = scaled.flip(1).cumsum(1).flip(1)
    later = torch.cat([sums[:, 1:], torch.zeros_like(sums[:, :1])], dim=1)
    return torch.cat([sums[:, :1], later - (axes + 1) * scaled], dim=1)


def simplex(points: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The simplex around each point (N, d + 1) of the hyperplane.

    Returns:
        Its remainder-0 corner (N, d + 1), the rank of each coordinate (N, d + 1), both int64, and the point's
        barycentric weights at the corners of remainder 0 to d, (N, d + 1).
    """
    size = points.shape[1]
    multiple = (points / size).round()
    corner, total = multiple * size, multiple.sum(1, keepdim=True).long()
    offset = points - corner
    rank = offset.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    # Brought back onto the hyperplane: corners whose coordinates do not add to zero are moved.
    rank = rank + total
    under, over = rank < 0, rank >= size
    corner = corner + size * (under.to(corner.dtype) - over.to(corner.dtype))
    rank = rank + size * (under.long() - over.long())
    share = (points - corner) / size
    weights = torch.zeros(len(points), size + 1, device=points.device)
    weights.scatter_add_(1, size - 1 - rank, share)
    weights.scatter_add_(1, size - rank, -share)
    weights[:, 0] += 1 + weights[:, size]
    return corner.long(), rank, weights[:, :size]
