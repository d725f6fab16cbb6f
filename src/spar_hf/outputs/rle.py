"""COCO's run lengths of masks: pixels column by column, lengths of runs of 0 and 1 in turn, as text."""

from __future__ import annotations

import numpy as np


def run_lengths(mask: np.ndarray, top: int, left: int, height: int, width: int) -> list[int]:
    """The lengths of the runs of 0, 1, 0, ... of a picture, down the columns from left to right.

    Args:
        mask: (h, w) bool, the part of the picture outside of which all is 0.
        top, left: where that part lies.
        height, width: of the picture.
    """
    changes = np.diff(np.pad(mask.T.astype(np.int8), ((0, 0), (1, 1))), axis=1)  # (w, h + 1)
    starts, stops = (
        (column + left) * height + row + top for column, row in ((changes == 1).nonzero(), (changes == -1).nonzero())
    )
    # A run that ends with its column and the next that begins with its own are one.
    apart = starts[1:] != stops[:-1]
    starts, stops = starts[np.append(True, apart)[: len(starts)]], stops[np.append(apart, True)[: len(stops)]]
    edges = np.stack([starts, stops], 1).ravel()
    lengths = np.diff(np.concatenate([[0], edges, [height * width]]))
    return lengths[: len(lengths) - (lengths[-1] == 0 and len(lengths) > 1)].tolist()


def as_text(lengths: list[int]) -> str:
    """Run lengths as the text of COCO's compressed masks.

    From the fourth on, a length is written as its difference to the one two before it. Each number goes in groups of
    five bits, the lowest first, as characters from `0` up; 32 in a character says that more follow, 16 in the last
    one that the number is below 0.
    """
    text = bytearray()
    for place, length in enumerate(lengths):
        rest = length - lengths[place - 2] if place > 2 else length
        while True:
            group, rest = rest & 31, rest >> 5
            finished = rest == (-1 if group & 16 else 0)
            text.append(48 + group + (0 if finished else 32))
            if finished:
                break
    return text.decode("ascii")
