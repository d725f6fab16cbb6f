"""The table of label options, in the order in which they run.

Adding an option is adding a row: the command line, the tests and the docs read this table.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .cluster_vote import cluster_vote
from .pamr import pamr
from .scores import key_smoothing, prompt_denoising, redundancy_removal
from .tagclip import reidentification
from .views import FLIPS, IMAGE_ENGINEERING

STAGES = {
    "views": "features averaged over views of the image",
    "templates": "text features",
    "scores": "scores on the patch grid",
    "maps": "score maps at full resolution",
    "labels": "the label map",
}


@dataclass(frozen=True)
class LabelOption:
    """A row of the table.

    Attributes:
        title: what it does, in the paper's words.
        paper: where it was published.
        stage: what it changes, a key of `STAGES`.
        apply: what it does there: a tuple of `View`; for "templates" None, since `Refinement` asks for images first;
            for "scores" (scores, image, text_embeds, class_ids, background) -> scores; for "maps" (maps, guide) ->
            maps; for "labels" (labels, image) -> labels.
        needs: what it takes beside features and text.
        looks_inside: it asks CLIP's own blocks or class token, one more plain pass.
    """

    title: str
    paper: str
    stage: str
    apply: Any
    needs: tuple[str, ...] = ()
    looks_inside: bool = False


LABEL_OPTIONS: dict[str, LabelOption] = {
    "image-engineering": LabelOption(
        "mean over the image, its greyscale and its blur",
        "ITACLIP; Aydın et al., CVPR Workshops 2025",
        "views",
        IMAGE_ENGINEERING,
        needs=("2 more passes",),
    ),
    "flip": LabelOption(
        "mean with the mirrored images, 0.7 to 0.3",
        "ITACLIP; Aydın et al., CVPR Workshops 2025",
        "views",
        FLIPS,
        needs=("2 more passes",),
    ),
    "floss": LabelOption(
        "template experts",
        "FLOSS; Benigmim et al., ICCV 2025",
        "templates",
        None,
        needs=("unlabelled images",),
    ),
    "redundancy-removal": LabelOption(
        "removal of what all names share",
        "CLIP Surgery; Li et al., Pattern Recognition 2025",
        "scores",
        redundancy_removal,
        needs=("class token",),
        looks_inside=True,
    ),
    "prompt-denoising": LabelOption(
        "classes that are sure nowhere are masked out",
        "MaskCLIP; Zhou et al., ECCV 2022",
        "scores",
        prompt_denoising,
    ),
    "tagclip": LabelOption(
        "class re-identification on crops",
        "TagCLIP; Lin et al., AAAI 2024",
        "scores",
        reidentification,
        needs=("attention of all blocks", "a crop per class"),
        looks_inside=True,
    ),
    "key-smoothing": LabelOption(
        "votes weighted by the likeness of keys",
        "MaskCLIP; Zhou et al., ECCV 2022",
        "scores",
        key_smoothing,
        needs=("last keys",),
        looks_inside=True,
    ),
    "pamr": LabelOption(
        "pixel-adaptive mask refinement",
        "PAMR; Araslanov and Roth, CVPR 2020",
        "maps",
        pamr,
    ),
    "cluster-vote": LabelOption(
        "one class for each cluster of patches",
        "CLIPtrase; Shao et al., ECCV 2024",
        "labels",
        cluster_vote,
        needs=("self-correlation of block 11",),
        looks_inside=True,
    ),
}


def find_options(names: Iterable[str]) -> dict[str, LabelOption]:
    """The rows called so, in the table's order, each once.

    Raises:
        ValueError: there is no such row; the message lists the rows and the nearest name.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in LABEL_OPTIONS:
            near = difflib.get_close_matches(str(name), LABEL_OPTIONS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"there is no label option {name!r}; choose among {', '.join(LABEL_OPTIONS)}.{hint}")
    return {name: option for name, option in LABEL_OPTIONS.items() if name in names}
