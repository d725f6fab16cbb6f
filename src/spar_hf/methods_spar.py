"""The table of methods: training-free ways to get one text-aligned vector per patch out of CLIP, one row each.

Adding a method is adding a row, or a row and a file of `spar_hf.methods`. The command line, the tests, the docs and
the menus read this table; nothing else in the code knows a method's name. Recipes were written from the papers.
`reported` holds the authors' mean IoU in per cent with CLIP ViT-B/16, each under its own protocol.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field

from .dense_spar import Recipe, Term

BENCHMARKS = ("voc21", "context60", "coco_object", "voc20", "context59", "coco_stuff", "cityscapes", "ade20k")


# The network that the methods' windows, strides and block numbers were chosen for: CLIP ViT-B/16.
AUTHORS_NATIVE_PX, AUTHORS_PATCH_PX = 224, 16


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        title: the method's own name.
        paper: where it was published.
        recipe: its last block; None for a method that is more than a last block.
        file: for such a method, the module of `spar_hf.methods` that holds it.
        position_interpolation: the rule its authors ran with.
        window_px: side of the sliding window its authors evaluated with; None is the network's native size.
        stride_px: step of that window. Where the authors ran whole images: the field's common window, see
            `window_for`.
        branch: branch of the field (arXiv 2505.22209): "clip", "vfm" or "generative".
        kind: "feature" (can be a teacher) or "label".
        needs: the further networks it takes, as the ids of those its authors used.
        reported: mean IoU in per cent by benchmark, as published.
        note: what `reported` had beside the features, where that is more than the protocol.
    """

    title: str
    paper: str
    recipe: Recipe | None = None
    file: str | None = None
    position_interpolation: str = "offset"
    window_px: int | None = None
    stride_px: int = 112
    branch: str = "clip"
    kind: str = "feature"
    needs: tuple[str, ...] = ()
    reported: dict[str, float] = field(default_factory=dict)
    note: str = ""

    def window_for(self, native_px: int, patch_px: int) -> tuple[int, int]:
        """Side and step in pixels of the method's window for any network.

        Lengths that are whole patches of the authors' network (112 and 336 of 224) keep their share of the native
        size, rounded to whole patches: 64 and 192 of 128. Lengths that are not (SPAR's 24, ITACLIP's 28) stay as
        they are: there, where in the patch a window begins is the point. No step is longer than its window.
        """

        def scaled(length_px: int) -> int:
            if length_px % AUTHORS_PATCH_PX:
                return length_px
            return max(round(length_px * native_px / AUTHORS_NATIVE_PX / patch_px), 1) * patch_px

        window_px = native_px if self.window_px is None else scaled(self.window_px)
        return window_px, min(scaled(self.stride_px), window_px)


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
    "gem": Method(
        "GEM",
        "Bousselham et al., CVPR 2024",
        Recipe(
            tuple(Term(scores, weight=1 / 3, iterations=1) for scores in ("qq", "kk", "vv")),
            feed_forward=False,
            blocks=6,
        ),
        position_interpolation="antialias",
        reported=_reported(46.2, 32.6, None, 79.9, 35.9, 23.7, 30.8, 15.7),
    ),
    "itaclip": Method(
        "ITACLIP, without its text and image ensembles",
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
        note="with image and text ensembles, PAMR and a closing of the label map",
    ),
    "resclip": Method(
        "ResCLIP, without its label-dependent second pass",
        "Yang et al., CVPR 2025",
        # tau ((1 - lambda) softmax(kk + locality) + lambda R), R the mean plain attention of blocks 6 to 9;
        # tau = 2, lambda = 0.4, the authors' for three of their eight data sets (0.2 to 0.6).
        Recipe(
            (
                Term("kk", weight=2 * 0.6, sigma_patches=5.0),
                *(Term("qk", weight=2 * 0.4 / 4, block=block) for block in (6, 7, 8, 9)),
            ),
            residual=False,
            feed_forward=False,
        ),
        reported=_reported(61.1, 33.5, 35.0, 86.0, 36.8, 24.7, 35.9, 18.0),
        note="with the second pass, lambda chosen for each data set",
    ),
    "sc_clip": Method(
        "SC-CLIP",
        "Bai et al., arXiv 2411.15869",
        file="sc_clip",
        reported=_reported(64.6, 36.8, 37.7, 84.3, 40.1, 26.6, 41.0, 20.1),
    ),
    "cliper": Method(
        "CLIPer, without diffusion",
        "Sun et al., ICCV 2025",
        file="cliper",
        position_interpolation="bilinear",
        reported=_reported(62.1, 35.7, 37.5, 85.0, 39.6, 26.4, 38.3, 20.6),
        note="with the maps of all blocks in the labels",
    ),
    "proxyclip": Method(
        "ProxyCLIP",
        "Lan et al., ECCV 2024",
        file="proxyclip",
        window_px=336,
        branch="vfm",
        needs=("facebook/dino-vitb8",),
        reported=_reported(61.3, 35.3, 37.5, 80.3, 39.1, 26.5, 38.1, 20.2),
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


def find_recipe(name: str) -> Recipe:
    """The last block of the row called `name`.

    Raises:
        ValueError: there is no such row, or its method is more than a last block.
    """
    recipe = find_method(name).recipe
    if recipe is None:
        raise ValueError(
            f"method {name!r} is more than a last block, so a model cannot be loaded with it; load the model without "
            f"and wrap its vision tower: spar_hf.build_encoder(vision, {name!r})."
        )
    return recipe
