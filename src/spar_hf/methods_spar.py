"""The table of methods: training-free ways to get one text-aligned vector per patch out of CLIP, one row each.

Adding a method is adding a row. The command line, the tests, the docs and the menus read this table; nothing else in
the code knows a method's name. Recipes were written from the papers. `reported` holds the authors' mean IoU in per
cent with CLIP ViT-B/16, each under its own protocol.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from .dense_spar import Recipe, Term

BENCHMARKS = ("voc21", "context60", "coco_object", "voc20", "context59", "coco_stuff", "cityscapes", "ade20k")


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: the method's own name.
        paper: where it was published.
        recipe: its last block.
        position_interpolation: the rule its authors ran with.
        stride_px: step of the sliding window its authors evaluated with; the window is the network's native size.
        branch: branch of the field (arXiv 2505.22209): "clip", "vfm" or "generative".
        kind: "feature" (can be a teacher) or "label".
        needs: further networks, none for the CLIP branch.
        reported: mean IoU in per cent by benchmark, as published.
    """

    title: str
    paper: str
    recipe: Recipe
    position_interpolation: str = "offset"
    stride_px: int = 112
    branch: str = "clip"
    kind: str = "feature"
    needs: tuple[str, ...] = ()
    reported: dict[str, float] = field(default_factory=dict)


def _reported(*values: float | None) -> dict[str, float]:
    return {name: value for name, value in zip(BENCHMARKS, values, strict=True) if value is not None}


METHODS: dict[str, Method] = {
    "clip": Method(
        "CLIP",
        "Radford et al., ICML 2021",
        Recipe((Term("qk"),)),
        position_interpolation="size",
        reported=_reported(16.4, 8.4, 5.6, 41.9, 9.2, 4.4, 5.0, 2.9),
    ),
    "maskclip": Method(
        "MaskCLIP, the last block of SPAR's CLIP",
        "Zhou et al., ECCV 2022; Kombol et al., CVPR 2026",
        Recipe((Term("identity"),)),
        stride_px=24,
        reported=_reported(43.4, 23.2, 20.6, 74.9, 26.4, 16.7, 24.9, 11.9),
    ),
    "sclip": Method(
        "SCLIP",
        "Wang et al., ECCV 2024",
        Recipe((Term("qq"), Term("kk"))),  # a sum, not a mean: rows of the map add to 2 in the authors' code as well
        reported=_reported(59.6, 31.7, 33.5, 81.5, 34.5, 22.8, 32.3, 16.5),
    ),
    "clearclip": Method(
        "ClearCLIP",
        "Lan et al., ECCV 2024",
        Recipe((Term("qq"),), residual=False, feed_forward=False),
        reported=_reported(51.8, 32.6, 33.0, 80.9, 35.9, 23.9, 30.0, 16.7),
    ),
    "naclip": Method(
        "NACLIP",
        "Hajimiri et al., WACV 2025",
        Recipe((Term("kk", sigma_patches=5.0),), residual=False, feed_forward=False),
        reported=_reported(58.9, 32.2, 33.2, 79.7, 35.2, 23.3, 35.5, 17.4),
    ),
    "cliptrase": Method(
        "CLIPtrase",
        "Shao et al., ECCV 2024",
        Recipe((Term("qq"), Term("kk"), Term("vv"))),
        reported=_reported(53.0, 30.8, 44.8, 81.2, 34.9, 24.1, None, 17.0),
    ),
    "clip_surgery": Method(
        "CLIP Surgery",
        "Li et al., Pattern Recognition 2025",
        Recipe((Term("vv"),), feed_forward=False, blocks=6),
        position_interpolation="bilinear",
    ),
    "itaclip": Method(
        "ITACLIP",
        "Aydın et al., CVPR Workshops 2025",
        Recipe(
            (
                *(Term(scores, weight=1 / 2) for scores in ("qq", "kk")),
                *(Term(scores, weight=1 / 6, block=block) for block in (7, 8, 10) for scores in ("qq", "kk")),
            ),
            feed_forward=False,
        ),
        stride_px=28,
        reported=_reported(67.9, 37.5, 37.7, None, None, 27.0, 40.2, None),
    ),
    "resclip": Method(
        "ResCLIP, without its label-dependent second pass",
        "Yang et al., CVPR 2025",
        # tau ((1 - lambda) softmax(kk + locality) + lambda R), R the mean plain attention of blocks 6 to 9;
        # tau = 2, lambda = 0.4.
        Recipe(
            (
                Term("kk", weight=2 * 0.6, sigma_patches=5.0),
                *(Term("qk", weight=2 * 0.4 / 4, block=block) for block in (6, 7, 8, 9)),
            ),
            residual=False,
            feed_forward=False,
        ),
        reported=_reported(61.1, 33.5, 35.0, 86.0, 36.8, 24.7, 35.9, 18.0),
    ),
}


def find_method(name: str) -> Method:
    """The row called `name`.

    Raises:
        ValueError: there is none; the message lists the rows and the nearest name.
    """
    if name in METHODS:
        return METHODS[name]
    near = difflib.get_close_matches(str(name), METHODS, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise ValueError(f"there is no method {name!r}; choose one of {', '.join(METHODS)}.{hint}")
