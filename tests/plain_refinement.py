"""The label options in plain NumPy, float64, one image at a time: what the tests compare with.

Written from the papers and their public codes' constants, from nothing in the package: pixels and patches are loops.
"""

from __future__ import annotations

import math

import numpy as np
from plain_clip import PlainClip, softmax
from scipy import ndimage
from sklearn.cluster import DBSCAN


def unit(x: np.ndarray, axis: int = -1) -> np.ndarray:
    return x / np.sqrt((x**2).sum(axis=axis, keepdims=True))


def softmax_over_names(scores: np.ndarray) -> np.ndarray:
    return np.moveaxis(softmax(np.moveaxis(scores, 0, -1)), -1, 0)


def bilinear(grid: np.ndarray, size: int, covered: float = 1.0) -> np.ndarray:
    """(h, ...) -> (size, ...) along the first axis, `align_corners=False`; `covered`: image over grid extent."""
    out = np.empty((size, *grid.shape[1:]))
    for pixel in range(size):
        place = min(max((pixel + 0.5) / size * covered * len(grid) - 0.5, 0), len(grid) - 1)
        below = min(int(place), len(grid) - 2) if len(grid) > 1 else 0
        share = place - below
        above = min(below + 1, len(grid) - 1)
        out[pixel] = (1 - share) * grid[below] + share * grid[above]
    return out


def resize(maps: np.ndarray, size_hw: tuple[int, int], coverage_hw=(1.0, 1.0)) -> np.ndarray:
    """(K, h, w) -> (K, H, W)."""
    down = bilinear(np.moveaxis(maps, 1, 0), size_hw[0], coverage_hw[0])  # (H, K, w)
    across = bilinear(np.moveaxis(down, 2, 0), size_hw[1], coverage_hw[1])  # (W, H, K)
    return across.transpose(2, 1, 0)


# ------------------------------------------------------------------------------------------------ PAMR


def pamr(maps: np.ndarray, image: np.ndarray, steps: int = 10, dilations=(8, 16)) -> np.ndarray:
    """(K, H, W) refined along the colours of (3, H, W)."""
    height, width = image.shape[1:]

    def at(array: np.ndarray, y: int, x: int) -> np.ndarray:
        return array[:, min(max(y, 0), height - 1), min(max(x, 0), width - 1)]

    around = [(dy, dx) for dy in (-1, 0, 1) for dx in (-1, 0, 1)]
    ring = [(d * dy, d * dx) for d in dilations for dy, dx in around if (dy, dx) != (0, 0)]
    weights = np.empty((height, width, len(ring)))
    for y in range(height):
        for x in range(width):
            places = np.array([at(image, y + d * dy, x + d * dx) for d in dilations for dy, dx in around])
            sigma = places.std(axis=0, ddof=1)  # (3)
            distances = np.array([np.abs(image[:, y, x] - at(image, y + dy, x + dx)) for dy, dx in ring])
            weights[y, x] = softmax((-distances / (1e-8 + 0.1 * sigma)).mean(axis=1))
    for _ in range(steps):
        refined = np.empty_like(maps)
        for y in range(height):
            for x in range(width):
                neighbours = np.array([at(maps, y + dy, x + dx) for dy, dx in ring])  # (16, K)
                refined[:, y, x] = weights[y, x] @ neighbours
        maps = refined
    return maps


# --------------------------------------------------------------------------------------- MaskCLIP, Surgery


def of_classes(probabilities: np.ndarray, class_ids: list[int]) -> np.ndarray:
    """(K, ...) -> (C, ...), the names of a class added up."""
    names_of = [[name for name, c in enumerate(class_ids) if c == label] for label in range(max(class_ids) + 1)]
    return np.stack([sum(probabilities[name] for name in names) for names in names_of])


def prompt_denoising(scores: np.ndarray, class_ids: list[int]) -> np.ndarray:
    confidence = [single.max() for single in of_classes(softmax_over_names(100 * scores), class_ids)]
    out = scores.copy()
    for name, label in enumerate(class_ids):
        if max(confidence) >= 0.5 and confidence[label] < 0.5:
            out[name] = -100
    return out


def key_smoothing(scores: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """`keys` (N, C), after the output projection. Each channel has unit length over the patches, as in the code."""
    names, height, width = scores.shape
    probabilities = softmax_over_names(100 * scores).reshape(names, -1)
    keys = keys / np.sqrt((keys**2).sum(axis=0))
    out = probabilities.copy()
    for i in range(height * width):
        if probabilities[:, i].max() < 1.0:
            out[:, i] = sum((keys[i] @ keys[j]) * probabilities[:, j] for j in range(height * width))
    return out.reshape(names, height, width)


def redundancy_removal(patches: np.ndarray, text: np.ndarray, class_embed: np.ndarray) -> np.ndarray:
    """`patches` (h, w, D), `text` (K, D), `class_embed` (D), all unit; element-wise features, as the paper has it."""
    likely = softmax(2 * (text @ class_embed))
    weights = likely / likely.mean()
    height, width, _ = patches.shape
    out = np.empty((len(text), height, width))
    for y in range(height):
        for x in range(width):
            features = patches[y, x] * text * weights[:, None]  # (K, D)
            out[:, y, x] = (features - features.mean(axis=0)).sum(axis=1)
    return out


# ------------------------------------------------------------------------------------------------- FLOSS


def floss_ranking(images: list[np.ndarray], template_embeds: np.ndarray, class_ids: list[int]) -> list[list[int]]:
    """`images`: unit patches (h, w, D); `template_embeds` (T, K, D). A class's names are one in the ranking."""
    num_templates = len(template_embeds)
    entropies: list = [{label: [] for label in class_ids} for _ in range(num_templates)]
    for patches in images:
        for template in range(num_templates):
            for patch in patches.reshape(-1, patches.shape[-1]):
                p = softmax(100 * template_embeds[template] @ patch)
                entropies[template][class_ids[p.argmax()]].append(-(p * np.log(p + 1e-10)).sum())
    chosen = []
    for label in class_ids:
        means = [(np.mean(entropies[t][label]), t) for t in range(num_templates) if entropies[t][label]]
        chosen.append([t for _, t in sorted(means)][:4] or list(range(num_templates)))
    return chosen


def floss_fusion(patches, experts, default, size_hw, coverage_hw) -> np.ndarray:
    """The fused probabilities (K, H, W); `experts` (K, K, D)."""
    tables = [
        resize(softmax_over_names(100 * np.einsum("kd,ijd->kij", names, patches)), size_hw, coverage_hw)
        for names in [*experts, default]
    ]
    out = np.empty_like(tables[0])
    for y in range(size_hw[0]):
        for x in range(size_hw[1]):
            own = [e for e in range(len(experts)) if tables[e][:, y, x].argmax() == e]
            heard = max(own, key=lambda e: tables[e][e, y, x]) if own else len(experts)
            out[:, y, x] = tables[heard][:, y, x]
    return out


# --------------------------------------------------------------------------------------------- CLIPtrase


def self_correlation(net: PlainClip, states: list[np.ndarray]) -> np.ndarray:
    """Of the block that is 11th of twelve, (1 + N, 1 + N)."""
    block = math.ceil(11 * net.num_layers / 12) - 1
    maps = [unit(head) @ unit(head).T for name in "qkv" for head in net.heads(block, states[block], name)]
    return np.mean(maps, axis=0)


def cluster_vote(labels: np.ndarray, correlation: np.ndarray, grid_hw, eps, neighbours, coverage_hw=(1.0, 1.0)):
    rows = np.maximum(correlation[1:, 1:] - correlation[0, 1:], 0)
    cluster = DBSCAN(eps=eps, min_samples=neighbours).fit_predict(rows)
    if cluster.max() < 0:
        return labels
    maps = np.stack([rows[cluster == n].mean(axis=0).reshape(grid_hw) for n in range(cluster.max() + 1)])
    maps = resize(maps, (4 * grid_hw[0], 4 * grid_hw[1]))
    maps = np.stack([ndimage.median_filter(single, size=7) for single in maps])
    region = resize(maps, labels.shape, coverage_hw).argmax(axis=0)
    out = labels.copy()
    for n in range(len(maps)):
        if (region == n).any():
            ids, counts = np.unique(labels[region == n], return_counts=True)
            out[region == n] = ids[counts.argmax()]
    return out


# ----------------------------------------------------------------------------------------------- TagCLIP


def tagclip(
    net: PlainClip, states, pixels, scores, text, class_ids, logit_scale, native_px, rule, background=None
) -> dict[int, float]:
    """Class -> its score. `pixels` (3, H, W) of whole patches, `scores` (K, h, w) cosines, `text` unit.

    The background is no class: its names take part in the soft-max and in the extremes of the map.
    """
    columns = [("name", n) if c == background else ("class", c) for n, c in enumerate(class_ids)]
    order = sorted(set(columns), key=lambda column: (column[0] == "name", column[1]))  # classes first
    classes = [label for kind, label in order if kind == "class"]

    def by_column(probabilities: np.ndarray) -> np.ndarray:
        return of_classes(probabilities, [order.index(column) for column in columns])

    _, height, width = scores.shape
    layers = net.num_layers
    maps = [net.maps(b, states[b], "q", "k").mean(axis=0)[1:, 1:] for b in range(layers)]
    votes = sum((m > m.mean()).astype(int) for m in maps)
    first = math.ceil(8 * layers / 12)
    attention = np.mean(maps[first : layers - 1], axis=0) * (votes >= layers / 3)

    coarse = by_column(softmax_over_names(logit_scale * scores))
    coarse = coarse.reshape(len(coarse), -1).T  # (N, C)
    once = attention @ coarse
    refined = np.empty_like(once)
    for label in range(coarse.shape[1]):
        box = boxes(once[:, label].reshape(height, width)).reshape(1, -1)
        refined[:, label] = (attention * box) @ coarse[:, label]

    tags = refined.max(axis=0)[: len(classes)]
    threshold = refined.min() + 0.5 * (refined.max() - refined.min())
    for label in np.nonzero(tags > threshold)[0]:
        values = refined[:, label] - refined[:, label].min()
        mask = (values / values.max() > 0.5).reshape(height, width)
        ys, xs = np.nonzero(mask)
        top, left = ys.min(), xs.min()
        bottom, right = min(ys.max() + 1, height - 1), min(xs.max() + 1, width - 1)
        if top == bottom or left == right:
            break
        p = net.patch_px
        crop = resize(pixels[:, top * p : bottom * p, left * p : right * p], (native_px, native_px))
        inside = mask[top:bottom, left:right]
        side = native_px // p
        nearest = [[i * length // side for i in range(side)] for length in inside.shape]
        seen = inside[np.ix_(*nearest)].flatten()
        tokens, _ = net.embed(crop, rule)
        bias = np.zeros((len(tokens), len(tokens)))
        bias[0, 1:][~seen] = -1000
        for block in range(layers):
            attended = net.attend(block, tokens, net.maps(block, tokens, "q", "k", bias))
            tokens = net.feed_forward(block, tokens + attended)
        embed = unit(net.project(tokens[:1]))[0]
        tags[label] = 0.5 * tags[label] + 0.5 * by_column(softmax(logit_scale * text @ embed))[label]
    return dict(zip(classes, tags, strict=True))


def boxes(values: np.ndarray) -> np.ndarray:
    """The union of the components' bounding boxes of what lies above the mean, in 256 steps."""
    values = values - values.min()
    values = values / values.max()
    steps = (values * 255).astype(np.uint8)
    mask = steps > int(values.mean() * steps.max())
    out = np.zeros(mask.shape)
    components, _ = ndimage.label(mask, structure=np.ones((3, 3)))
    for rows, columns in ndimage.find_objects(components):
        out[rows.start : min(rows.stop, len(mask) - 1), columns.start : min(columns.stop, mask.shape[1] - 1)] = 1
    return out
