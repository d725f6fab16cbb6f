"""Mean field over a permutohedral lattice, point by point, with a dictionary for the lattice; fp64."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np


def corners(point: np.ndarray) -> list[tuple[tuple[int, ...], float]]:
    """The lattice points around a point of the hyperplane, as sorted remainders have them, and their weights."""
    size = len(point)
    nearest = np.round(point / size) * size
    rank = [sum((point - nearest)[j] > (point - nearest)[i] or ((point - nearest)[j] == (point - nearest)[i] and j < i)
                for j in range(size)) for i in range(size)]  # fmt: skip
    excess = int(nearest.sum() / size)
    for i in range(size):
        rank[i] += excess
        if rank[i] < 0:
            rank[i], nearest[i] = rank[i] + size, nearest[i] + size
        elif rank[i] >= size:
            rank[i], nearest[i] = rank[i] - size, nearest[i] - size
    ordered = np.zeros(size)  # differences to the remainder-0 corner, largest first
    for i in range(size):
        ordered[rank[i]] = (point - nearest)[i] / size
    weights = [1 + ordered[size - 1] - ordered[0]]
    weights += [ordered[size - 1 - k] - ordered[size - k] for k in range(1, size)]
    found = []
    for k, weight in enumerate(weights):
        moved = [int(n) + (k if r < size - k else k - size) for n, r in zip(nearest, rank, strict=True)]
        found.append((tuple(moved), weight))
    return found


def on_hyperplane(feature: np.ndarray) -> np.ndarray:
    """E f with E's columns orthogonal, of the length that makes the lattice's blur a standard deviation of one."""
    dims = len(feature)
    out = np.zeros(dims + 1)
    for axis, value in enumerate(feature, start=1):
        value = value * math.sqrt(2 / 3) * (dims + 1) / math.sqrt(axis * (axis + 1))
        out[:axis] += value
        out[axis] -= axis * value
    return out


def lattice_filter(features: np.ndarray):
    """(N, d) -> the function that filters (N, K), normalised on both sides."""
    splat = [corners(on_hyperplane(feature)) for feature in features]
    keys = {key for found in splat for key, _ in found}
    dims = features.shape[1]
    axes = [np.full(dims + 1, -1) + (dims + 1) * np.eye(dims + 1, dtype=int)[j] for j in range(dims + 1)]

    def raw(values: np.ndarray) -> np.ndarray:
        held = defaultdict(lambda: np.zeros(values.shape[1]))
        for found, value in zip(splat, values, strict=True):
            for key, weight in found:
                held[key] = held[key] + weight * value
        nothing = np.zeros(values.shape[1])
        for axis in axes:
            held = {
                key: held[key] + 0.5 * sum(held.get(tuple(np.array(key) + sign * axis), nothing) for sign in (-1, 1))
                for key in keys
            }
        return np.array([sum(w * held[key] for key, w in found) for found in splat]) / (1 + 2.0**-dims)

    norm = 1 / np.sqrt(raw(np.ones((len(features), 1))) + 1e-20)
    return lambda values: norm * raw(norm * values)


def plain_crf(shares: np.ndarray, colours: np.ndarray, settings) -> np.ndarray:
    """(K, H, W) and (H, W, 3) -> (K, H, W)."""
    count, height, width = shares.shape
    logs = np.log(np.maximum(shares, 1e-5)).reshape(count, -1).T
    places = np.array([(x, y) for y in range(height) for x in range(width)], dtype=float)
    near = lattice_filter(places / settings.near_px)
    tints = colours.reshape(-1, 3) / settings.alike_colour
    alike = lattice_filter(np.concatenate([places / settings.alike_px, tints], axis=1))

    def normalised(energy: np.ndarray) -> np.ndarray:
        powers = np.exp(energy - energy.max(axis=1, keepdims=True))
        return powers / powers.sum(axis=1, keepdims=True)

    current = normalised(logs)
    for _ in range(settings.steps):
        current = normalised(logs + settings.near_weight * near(current) + settings.alike_weight * alike(current))
    return current.T.reshape(count, height, width)
