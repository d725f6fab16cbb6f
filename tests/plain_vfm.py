"""Methods with a second network in plain NumPy, float64, one image at a time; beside plain_clip.py."""

from __future__ import annotations

import math

import numpy as np
from plain_clip import PlainClip, softmax, unit


def line_weights(n_in: int, n_out: int, scale: float | None = None, origin: float = 0.0) -> np.ndarray:
    """(n_out, n_in): bilinear weights of input samples, half-pixel centres, clamped at the border.

    `scale` is input samples per output sample and `origin` where the first output begins, in input samples.
    """
    scale = n_in / n_out if scale is None else scale
    table = np.zeros((n_out, n_in))
    for i in range(n_out):
        place = min(max((i + 0.5) * scale + origin - 0.5, 0.0), n_in - 1.0)
        below = math.floor(place)
        table[i, below] += 1 - (place - below)
        if below + 1 < n_in:
            table[i, below + 1] += place - below
    return table


def bilinear(image: np.ndarray, size_hw: tuple[int, int]) -> np.ndarray:
    """(..., H, W) -> (..., h, w)."""
    down, across = line_weights(image.shape[-2], size_hw[0]), line_weights(image.shape[-1], size_hw[1])
    return down @ image @ across.T


def starts(length: int, window: int, stride: int) -> list[int]:
    """The usual starts, the last one shifted back."""
    count = max(length - window + stride - 1, 0) // stride + 1
    return [max(min(i * stride + window, length) - window, 0) for i in range(count)]


def proxy_map(net: PlainClip, pixels: np.ndarray, features: np.ndarray, mean: float) -> np.ndarray:
    """Trident's step in one window: (h * w, C) of `features` (h, w, F), given the mean similarity of all windows."""
    rows, columns, _ = features.shape
    tokens, grid_hw = net.embed(pixels, "offset")
    x = net.inputs(tokens)[-2]
    vectors = unit(features.reshape(rows * columns, -1))
    scores = 3.0 * (vectors @ vectors.T - 1.2 * mean)
    weights = softmax(np.where(scores < 0, -np.inf, scores))
    last = net.num_layers - 1
    heads = []
    for v in net.heads(last, x[1:], "v"):  # ln_1 is a token's own: the class token may go first
        image = bilinear(v.T.reshape(-1, *grid_hw), (rows, columns)).reshape(v.shape[1], -1).T
        heads.append(weights @ image)
    return net.linear(f"vision_model.encoder.layers.{last}.self_attn.out_proj", np.concatenate(heads, axis=-1))


def sam_average(
    canvas: np.ndarray, attention: np.ndarray, values: np.ndarray, reach: float, negative: float | None
) -> np.ndarray:
    """(C, rows, columns) averaged by SAM: attention (H, n, n, n, n), values (H, n, n, d), both cut to h x w before."""
    num_heads, rows, columns, _ = values.shape
    count = rows * columns
    cosine = np.stack([unit(v.reshape(count, -1)) @ unit(v.reshape(count, -1)).T for v in values])
    threshold = reach * cosine.mean(axis=0).mean(axis=1)
    if negative is not None:
        threshold = np.where(threshold < 0, negative, threshold)
    threshold = np.minimum(threshold, 0.9)
    maps = attention.reshape(num_heads, count, count) * (cosine > threshold[None, :, None])
    weights = maps.mean(axis=0)
    weights = weights / weights.sum(axis=1, keepdims=True)
    return weights @ bilinear(canvas, (rows, columns)).reshape(len(canvas), -1).T


def cass(
    net: PlainClip,
    inputs: list[np.ndarray],
    grid_hw: tuple[int, int],
    dino_keys: np.ndarray,
    chosen: list[tuple[int, int]],
    stretch: bool = True,
    transposed: bool = True,
) -> np.ndarray:
    """(N, C) before the final norm; `dino_keys` (H, d, rows, columns) of the square image.

    Of the best assignments, which may be many, the one `chosen` is taken; it must be one of them.
    """
    from itertools import permutations

    from plain_clip import gaussian

    last, x = net.num_layers - 1, inputs[-2]
    count = grid_hw[0] * grid_hw[1]
    keys = np.stack([k[1:] for k in net.heads(last, x, "k")])
    values = np.stack([v[1:] for v in net.heads(last, x, "v")])
    heads, _, width = keys.shape
    theirs = bilinear(dino_keys, grid_hw).reshape(heads, -1, count).transpose(0, 2, 1)
    theirs = (theirs - theirs.min()) / (theirs.max() - theirs.min()) * (keys.max() - keys.min()) + keys.min()
    clip_graphs, dino_graphs = (k @ k.transpose(0, 2, 1) / math.sqrt(width) for k in (keys, theirs))

    def spectrum(graph: np.ndarray) -> np.ndarray:
        largest = unit(np.sort(np.linalg.eigvalsh(graph))[::-1][:20])
        return np.sort(largest / np.abs(largest).sum())

    distance = np.array([[np.abs(spectrum(d) - spectrum(c)).sum() for c in clip_graphs] for d in dino_graphs])
    best = max(sum(distance[i, j] for i, j in enumerate(p)) for p in permutations(range(heads)))
    assert sorted(j for _, j in chosen) == list(range(heads))
    assert sum(distance[i, j] for i, j in chosen) > best - 1e-6
    out = np.zeros_like(values)
    for i, j in chosen:
        d, c = (j, i) if transposed else (i, j)
        u, sizes, vt = np.linalg.svd(dino_graphs[d])
        u, sizes, vt = u[:, :10], sizes[:10], vt[:10]
        if stretch:
            low, high = sizes.min(), sizes.max()
            sizes = (sizes - low) / (high - low) * (1.5 * high - 0.5 * low) + 0.5 * low
        graph = u @ np.diag(sizes) @ vt
        np.fill_diagonal(graph, 0)
        clip = clip_graphs[c]
        graph = (graph - graph.min()) / (graph.max() - graph.min()) * (clip.max() - clip.min()) + clip.min()
        weight = 10 * distance[i, j]
        scores = (weight * graph + clip) / (weight + 1) + gaussian(grid_hw, 5.0)[1:, 1:]
        out[c] = softmax(scores) @ values[c]
    return net.linear(f"vision_model.encoder.layers.{last}.self_attn.out_proj", np.concatenate(out, axis=-1))
