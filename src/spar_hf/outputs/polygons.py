"""Outlines of regions along the edges of their pixels, so that drawing them gives the regions back exactly."""

from __future__ import annotations

import numpy as np

# The sides of a pixel, in the order of a walk around it with its inside at the right hand: top, right, bottom, left.
OUTWARD = np.array([(-1, 0), (0, 1), (1, 0), (0, -1)])  # (y, x) to the pixel across each side
AHEAD = np.array([(0, 1), (1, 0), (0, -1), (-1, 0)])  # to the pixel that the walk along each side comes to
START = np.array([(0, 0), (0, 1), (1, 1), (1, 0)])  # the corner of the pixel where each side begins

Ring = np.ndarray  # (n, 2) int, corners (x, y) in pixels from the top left of the picture, the first not repeated
Polygon = list[Ring]  # its outline, clockwise as seen, then its holes, the other way round


def polygons(numbers: np.ndarray) -> dict[int, Polygon]:
    """The polygon of every region.

    The polygons are valid by the rules of simple features: the rings of one touch in single points at most, and
    never cross. Where two pixels of a region meet in a corner only, the ring runs between them and their neighbours.

    Args:
        numbers: (H, W), the number of each pixel's region, below 0 for none. The pixels of a region hang together by
            their sides; see `regions.components`.

    Returns:
        Number of a region -> its polygon.
    """
    width = numbers.shape[1] + 2
    ids = np.pad(numbers, 1, constant_values=-1).ravel()  # a frame of no region: every neighbour is there
    steps = np.array([width, 1])
    outward, ahead = OUTWARD @ steps, AHEAD @ steps
    inside = np.flatnonzero(ids >= 0)
    pixels = [inside[ids[inside] != ids[inside + outward[side]]] for side in range(4)]  # those with such an edge

    codes = np.concatenate([side * ids.size + at for side, at in enumerate(pixels)])  # of all edges, ascending
    following, turns = [], []
    for side, at in enumerate(pixels):
        beside, across = at + ahead[side], at + ahead[side] + outward[side]
        straight = (ids[beside] == ids[at]) & (ids[across] != ids[at])
        left = ids[across] == ids[at]
        right_turn = (side + 1) % 4 * ids.size + at
        left_turn = (side - 1) % 4 * ids.size + across
        following.append(np.where(straight, side * ids.size + beside, np.where(left, left_turn, right_turn)))
        turns.append(~straight)
    after = np.searchsorted(codes, np.concatenate(following))
    turning = np.concatenate(turns)
    rings = _rings(after, turning)

    found: dict[int, Polygon] = {}
    sides, places = np.divmod(codes, ids.size)
    corners = np.stack(np.divmod(places, width), 1) - 1 + START[sides]  # (y, x) where each edge begins
    for edges in rings:
        ring = corners[edges, ::-1]
        number = int(ids[places[edges[0]]])
        x, y = ring.T
        is_outline = np.dot(x, np.roll(y, -1)) > np.dot(y, np.roll(x, -1))
        found.setdefault(number, []).insert(0 if is_outline else len(found[number]), ring)
    return found


def _rings(after: np.ndarray, turning: np.ndarray) -> list[list[int]]:
    """Edges that begin at a turn, ring by ring.

    Args:
        after: the edge that follows each edge (E); a permutation.
        turning: whether the walk turns at the end of an edge (E).
    """
    last = np.where(turning, np.arange(len(after)), after)  # of the straight run that an edge is on, after doublings
    while not turning[last].all():
        last = last[last]
    leaders = np.sort(after[turning])
    successor = np.searchsorted(leaders, after[last[leaders]]).tolist()
    names = leaders.tolist()
    seen = bytearray(len(names))
    rings = []
    for first in range(len(names)):
        if seen[first]:
            continue
        ring, place = [], first
        while not seen[place]:
            seen[place] = 1
            ring.append(names[place])
            place = successor[place]
        rings.append(ring)
    return rings


def area_of(polygon: Polygon) -> float:
    """Square pixels inside a polygon, its holes left out."""
    doubled = sum(int(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) for x, y in (ring.T for ring in polygon))
    return doubled / 2
