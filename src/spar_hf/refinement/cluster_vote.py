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

import torch
from torch import Tensor
from torch.nn import functional as F

from ..segmentation_spar import axis_weights
from .clip_internals import ClipInternals

BLOCK = 11
CELLS, MEDIAN = 4, 7  # cells a patch, and the side of the median filter in cells
SETTINGS = ((14 * 14, 0.7, 3), (21 * 21, 1.1, 7))  # patches, eps, neighbours; 224 and 336 px


def settings(num_patches: int) -> tuple[float, int]:
    """DBSCAN's eps and number of neighbours for so many patches."""
    (n0, eps0, count0), (n1, eps1, count1) = SETTINGS
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


def median(maps: Tensor) -> Tensor:
    """7 x 7 median of (k, H, W), with the border mirrored edge included."""
    reach = MEDIAN // 2

    def mirrored(length: int) -> Tensor:
        index = torch.arange(-reach, length + reach, device=maps.device) % (2 * length)
        return torch.where(index < length, index, 2 * length - 1 - index)

    height, width = maps.shape[1:]
    filtered = []
    for single in maps:  # 49 copies of one map at a time
        padded = single[mirrored(height)][:, mirrored(width)]
        filtered.append(padded.unfold(0, MEDIAN, 1).unfold(1, MEDIAN, 1).flatten(2).median(-1).values)
    return torch.stack(filtered)


def cluster_vote(labels: Tensor, image: ClipInternals) -> Tensor:
    """The label map (H, W) with each cluster in one class."""
    correlation = image.self_correlation(BLOCK)
    rows = (correlation[1:, 1:] - correlation[:1, 1:]).clamp(min=0)  # (N, N)
    cluster = dbscan(rows, *settings(len(rows)))
    count = int(cluster.max()) + 1
    if count == 0:
        return labels
    maps = torch.stack([rows[cluster == number].mean(0) for number in range(count)]).unflatten(1, image.grid_hw)
    fine_hw = (CELLS * image.grid_hw[0], CELLS * image.grid_hw[1])
    maps = median(F.interpolate(maps[None], size=fine_hw, mode="bilinear", align_corners=False)[0])
    down, across = (
        axis_weights(size, fine, covered).to(maps.device)
        for size, fine, covered in zip(labels.shape, fine_hw, image.coverage_hw, strict=True)
    )
    # The clusters one by one, so that only the best of them is held at full resolution.
    best = torch.full(labels.shape, -torch.inf, device=maps.device)
    region = torch.zeros_like(labels, dtype=torch.int64)
    for number, single in enumerate(maps):
        full = down @ (single @ across.T)
        better = full > best
        best, region = torch.where(better, full, best), region.masked_fill_(better, number)

    lowest = int(labels.min())
    num_ids = int(labels.max()) - lowest + 1
    votes = torch.bincount((region * num_ids + labels - lowest).flatten(), minlength=count * num_ids)
    return (votes.view(count, num_ids).argmax(1) + lowest)[region].int()
