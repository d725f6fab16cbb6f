"""From patch features to a label map: cosine, bilinear upsampling and arg-max, in tiles so that memory stays small."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

# Numbers (names x pixels) that are upsampled at a time: 2 MB of fp32 stay in a CPU's cache, 256 MB fill a GPU.
TILE_NUMBERS = {"cpu": 2**19, "cuda": 2**26}
# Names that `_max_over_names` reduces together: the fast reduction first, the slow one with indices on what is left.
GROUP_NAMES = 8


def label_map(
    patch_embeds: Tensor,
    text_embeds: Tensor,
    class_ids: Tensor,
    size_hw: tuple[int, int],
    coverage_hw: tuple[float, float] = (1.0, 1.0),
    logit_scale: float = 40.0,
    background_threshold: float | None = None,
    background_class: int = 0,
    area_threshold: float | None = None,
) -> Tensor:
    """The class of every pixel of one image (SPAR, arXiv 2604.02252; thresholds as in SCLIP's evaluation).

    Equals: soft-max of `logit_scale * bilinear(cosine)` over all names, maximum over the names of each class, arg-max
    over classes. Both maxima commute with the soft-max, so it is computed only where a threshold asks for it.

    Args:
        patch_embeds: Features of one image (h, w, D), any floating dtype.
        text_embeds: One row per name (K, D), on the same device.
        class_ids: The class of each name (K), on the same device.
        size_hw: Height and width of the label map, pixels.
        coverage_hw: Image size divided by the pixels the grid covers, per axis; see `axis_weights`.
        logit_scale: Factor on the cosine before the soft-max.
        background_threshold: Pixels whose best probability is below it become `background_class`.
        background_class: Class id of the background; may lie outside the vocabulary (say -1 or 255).
        area_threshold: Foreground classes with at most this share of the foreground pixels are masked out, and
            the arg-max is taken again among the others.

    Returns:
        Class ids (H, W), int32.
    """
    patches, names = F.normalize(patch_embeds.float(), dim=-1), F.normalize(text_embeds.float(), dim=-1) * logit_scale
    rows = axis_weights(size_hw[0], patches.shape[0], coverage_hw[0]).to(patches.device)
    columns = axis_weights(size_hw[1], patches.shape[1], coverage_hw[1]).to(patches.device)
    labels = torch.full(size_hw, background_class, dtype=torch.int32, device=patches.device)
    running = torch.ones_like(class_ids, dtype=torch.bool)

    if area_threshold is not None:
        for tile, logits in _upsampled_tiles(patches, names, rows, columns):
            labels[tile] = class_ids[_max_over_names(logits)[1]].int()
        running = foreground_left(labels, class_ids, background_class, area_threshold)
        if not running.any():
            return labels.fill_(background_class)

    running_ids = class_ids[running].int()
    if background_threshold is None:
        for tile, logits in _upsampled_tiles(patches, names[running], rows, columns):
            labels[tile] = running_ids[_max_over_names(logits)[1]]
        return labels
    for tile, logits in _upsampled_tiles(patches, names, rows, columns):
        best, winner = _max_over_names(logits[running])
        probability = (best - logits.logsumexp(0)).exp()  # of all names: masking one out does not help the others
        labels[tile] = running_ids[winner].masked_fill_(probability < background_threshold, background_class)
    return labels


def foreground_left(labels: Tensor, class_ids: Tensor, background_class: int, area_threshold: float) -> Tensor:
    """Which names (K) are in the running after foreground classes of too small a share are masked out."""
    area = torch.bincount(labels.flatten(), minlength=int(class_ids.max()) + 1)
    is_foreground = torch.arange(len(area), device=area.device) != background_class
    masked_out = is_foreground & (area <= area_threshold * area[is_foreground].sum())
    return ~masked_out[class_ids]


def axis_weights(size_px: int, grid: int, covered: float = 1.0) -> Tensor:
    """Bilinear weights of the `grid` patches for each of `size_px` pixels along one axis (`align_corners=False`).

    Pixel y lies at `(y + 0.5) / size_px * covered * grid - 0.5` in units of patches, clamped to the outer patch
    centres. `covered` is the image's extent over the extent of the grid: above 1 where a remainder was cut off
    (`floor`), below 1 where the image was padded (`pad`), 1 where the grid fits the image.

    Returns:
        Weights (size_px, grid), each row sums to 1.
    """
    centres = (torch.arange(size_px, dtype=torch.float64) + 0.5) / size_px
    position = (centres * covered * grid - 0.5).clamp(0, grid - 1)
    distance = (position[:, None] - torch.arange(grid, dtype=torch.float64)).abs()
    return (1 - distance).clamp(min=0).float()


def _upsampled_tiles(
    patches: Tensor, names: Tensor, rows: Tensor, columns: Tensor
) -> Iterator[tuple[tuple[slice, slice], Tensor]]:
    """The logits of all names at full resolution, tile by tile: pixels (rows, columns), logits (K, height, width).

    Args:
        patches: (h, w, D), L2-normalised.
        names: (K, D), L2-normalised times the logit scale.
        rows: Weights (H, h).
        columns: Weights (W, w).
    """
    numbers = TILE_NUMBERS.get(patches.device.type, TILE_NUMBERS["cpu"])
    tile_px = max(16, int((numbers / len(names)) ** 0.5))
    for y, i in _tiles(rows, tile_px):
        band = torch.einsum("kd,ijd->kij", names, patches[i])  # (K, patch rows of the band, w)
        for x, j in _tiles(columns, tile_px):
            yield (y, x), rows[y, i] @ (band[:, :, j] @ columns[x, j].T)


def _tiles(weights: Tensor, tile_px: int) -> Iterator[tuple[slice, slice]]:
    """Runs of `tile_px` pixels along one axis, each with the run of patches that carry weight there."""
    for start in range(0, len(weights), tile_px):
        pixels = slice(start, start + tile_px)
        touched = weights[pixels].any(0).nonzero()
        yield pixels, slice(int(touched[0]), int(touched[-1]) + 1)


def _max_over_names(logits: Tensor) -> tuple[Tensor, Tensor]:
    """`logits.max(0)` of (K, H, W), but faster on a CPU, whose arg-max over a leading axis is not vectorised."""
    if len(logits) < 4 * GROUP_NAMES:
        return logits.max(0)
    groups = F.pad(logits, (0, 0, 0, 0, 0, -len(logits) % GROUP_NAMES), value=-torch.inf)
    groups = groups.unflatten(0, (-1, GROUP_NAMES))  # (groups, GROUP_NAMES, H, W)
    best, group = groups.amax(1).max(0)
    members = torch.take_along_dim(groups, group[None, None], dim=0)[0]  # (GROUP_NAMES, H, W)
    return best, group * GROUP_NAMES + members.max(0).indices
