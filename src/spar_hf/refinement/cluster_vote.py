"""CLIPtrase's cluster vote: patches that correlate alike are one region, and a region takes its commonest class.

Paper: CLIPtrase (Shao et al., ECCV 2024, arXiv 2407.08268). Tokens of block 11 are compared by the mean over q, k, v
and heads of their cosine; from each patch's row the class token's row is subtracted and what is negative is cut off.
DBSCAN on the rows gives clusters; the mean row of a cluster is its map, resized to 4 cells a patch, median-filtered
(7 x 7, mirrored border), resized to the label map; each pixel belongs to the cluster whose map is highest there.

Choices, as the authors' code runs: eps 0.7 and 3 neighbours (the patch itself counts) for 14 x 14 patches, 1.1 and 7
for 21 x 21. For N patches otherwise, the power laws through these two. No cluster, no vote. Equal counts go to the
lower class id. Left out: the product with the class token's logits that they use for VOC20 alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ..grid_spar import upsample
from .clip_internals import ClipInternals


@dataclass(frozen=True)
class Settings:
    """CLIPtrase's numbers.

    Attributes:
        block: whose tokens are compared, of twelve.
        cells: of a cluster's map to a patch.
        median: side of the median filter in cells.
        fitted: (patches, eps, neighbours) of DBSCAN as the authors have them at 224 and 336 px.
    """

    block: int = 11
    cells: int = 4
    median: int = 7
    fitted: tuple[tuple[int, float, int], tuple[int, float, int]] = ((14 * 14, 0.7, 3), (21 * 21, 1.1, 7))

    def dbscan(self, num_patches: int) -> tuple[float, int]:
        """DBSCAN's eps and number of neighbours for so many patches."""
        (n0, eps0, count0), (n1, eps1, count1) = self.fitted
        along = math.log(num_patches / n0) / math.log(n1 / n0)
        return eps0 * (eps1 / eps0) ** along, max(1, round(count0 * (count1 / count0) ** along))


def dbscan(points: Tensor, eps: float, min_neighbours: int) -> Tensor:
    """Cluster of each row (N), numbered by first core point; -1 is noise. As scikit-learn's, Euclidean.

    Neighbours are the rows within eps, the row itself too; a row with `min_neighbours` of them is a core point.
    Connected core points are a cluster; another row joins the first cluster that it neighbours a core point of.
    """
    points = points.double()
    near = torch.cdist(points, points) <= eps
    core = near.sum(1) >= min_neighbours
    none = len(points)
    label = torch.where(core, torch.arange(none, device=points.device), none)
    links = near & core & core[:, None]
    while True:  # the smallest index of a cluster spreads over it
        spread = torch.where(links, label, none).amin(1).minimum(label)
        spread = torch.where(core, spread[spread.clamp(max=none - 1)], none)  # and jumps to that of its own
        if torch.equal(spread, label):
            break
        label = spread
    label = torch.where(core, label, torch.where(near & core, label, none).amin(1))
    _, number = label.unique(return_inverse=True)  # ascending: clusters by first core point, noise last
    return torch.where(label == none, -1, number)


def median(maps: Tensor, side: int) -> Tensor:
    """side x side median of (k, H, W), with the border mirrored edge included."""
    reach = side // 2

    def mirrored(length: int) -> Tensor:
        index = torch.arange(-reach, length + reach, device=maps.device) % (2 * length)
        return torch.where(index < length, index, 2 * length - 1 - index)

    height, width = maps.shape[1:]
    filtered = []
    for single in maps:  # 49 copies of one map at a time
        padded = single[mirrored(height)][:, mirrored(width)]
        filtered.append(padded.unfold(0, side, 1).unfold(1, side, 1).flatten(2).median(-1).values)
    return torch.stack(filtered)


def cluster_vote(labels: Tensor, image: ClipInternals, settings: Settings) -> Tensor:
    """The label map (H, W) with each cluster in one class."""
    correlation = image.self_correlation(settings.block)
    rows = (correlation[1:, 1:] - correlation[:1, 1:]).clamp(min=0)  # (N, N)
    cluster = dbscan(rows, *settings.dbscan(len(rows)))
    count = int(cluster.max()) + 1
    if count == 0:
        return labels
    maps = torch.stack([rows[cluster == number].mean(0) for number in range(count)]).unflatten(1, image.grid_hw)
    fine_hw = (settings.cells * image.grid_hw[0], settings.cells * image.grid_hw[1])
    maps = median(F.interpolate(maps[None], size=fine_hw, mode="bilinear", align_corners=False)[0], settings.median)
    # The clusters one by one, so that only the best of them is held at full resolution.
    best = torch.full(labels.shape, -torch.inf, device=maps.device)
    region = torch.zeros_like(labels, dtype=torch.int64)
    for number, single in enumerate(maps):
        full = upsample(single, (labels.shape[0], labels.shape[1]), image.coverage_hw)
        better = full > best
        best, region = torch.where(better, full, best), region.masked_fill_(better, number)

    lowest = int(labels.min())
    num_ids = int(labels.max()) - lowest + 1
    votes = torch.bincount((region * num_ids + labels - lowest).flatten(), minlength=count * num_ids)
    return (votes.view(count, num_ids).argmax(1) + lowest)[region].int()
