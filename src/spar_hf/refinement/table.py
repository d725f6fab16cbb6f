"""The table of refinements, in the order in which they run.

Adding one is adding a row: the command line, the tests and the docs read this table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from ..names_spar import unknown
from . import closing, cluster_vote, definitions, floss, mask_vote, pamr, sam_prompts, tagclip, views
from .scores import (
    DenoisingSettings,
    RedundancySettings,
    SmoothingSettings,
    key_smoothing,
    prompt_denoising,
    redundancy_removal,
)

STAGES = {
    "views": "features averaged over views of the image",
    "texts": "text features",
    "templates": "prompt templates",
    "scores": "scores on the patch grid",
    "maps": "score maps at full resolution",
    "labels": "the label map",
}


@dataclass(frozen=True)
class Refinement:
    """A row of the table.

    Attributes:
        title: what it does, in the paper's words.
        paper: where it was published.
        stage: what it changes, a key of `STAGES`.
        apply: what it does there, given the settings last: for "views" () -> a tuple of `View`; for "texts" (encode,
            labels, text features) -> text features, not of length one; for "templates" None, since `Refined` asks for
            images first; for "scores" (scores, scene) -> scores; for "maps" (maps, guide) -> what makes the maps of
            some names; for "labels" (labels, image) -> labels.
        settings: its numbers, a frozen dataclass; the authors' unless others are asked for.
        needs: what it takes beside features and text.
        looks_inside: it asks CLIP's own blocks or class token, one more plain pass.
        networks: the further networks it takes: what each is called -> the id of the one its authors used. Only for
            "labels"; `apply` then also takes each by its name, and `maps` and `class_ids`.
    """

    title: str
    paper: str
    stage: str
    apply: Any
    settings: Any
    needs: tuple[str, ...] = ()
    looks_inside: bool = False
    networks: dict[str, str] = field(default_factory=dict)


REFINEMENTS: dict[str, Refinement] = {
    "image-engineering": Refinement(
        "mean over the image, its greyscale and its blur",
        "ITACLIP; Aydın et al., CVPR Workshops 2025",
        "views",
        views.image_engineering,
        views.EngineeringSettings(),
        needs=("2 more passes",),
    ),
    "flip": Refinement(
        "mean with the mirrored images, 0.7 to 0.3",
        "ITACLIP; Aydın et al., CVPR Workshops 2025",
        "views",
        views.flips,
        views.FlipSettings(),
        needs=("2 more passes",),
    ),
    "definitions": Refinement(
        "a text about each class mixed into its names",
        "ITACLIP; Aydın et al., CVPR Workshops 2025",
        "texts",
        definitions.with_definitions,
        definitions.Settings(),
        needs=("a definition of each class",),
    ),
    "floss": Refinement(
        "template experts",
        "FLOSS; Benigmim et al., ICCV 2025",
        "templates",
        None,
        floss.Settings(),
        needs=("unlabelled images",),
    ),
    "redundancy-removal": Refinement(
        "removal of what all names share",
        "CLIP Surgery; Li et al., Pattern Recognition 2025",
        "scores",
        redundancy_removal,
        RedundancySettings(),
        needs=("class token",),
        looks_inside=True,
    ),
    "prompt-denoising": Refinement(
        "classes that are sure nowhere are masked out",
        "MaskCLIP; Zhou et al., ECCV 2022",
        "scores",
        prompt_denoising,
        DenoisingSettings(),
    ),
    "tagclip": Refinement(
        "class re-identification on crops",
        "TagCLIP; Lin et al., AAAI 2024",
        "scores",
        tagclip.reidentification,
        tagclip.Settings(),
        needs=("attention of all blocks", "a crop per class"),
        looks_inside=True,
    ),
    "key-smoothing": Refinement(
        "votes weighted by the likeness of keys",
        "MaskCLIP; Zhou et al., ECCV 2022",
        "scores",
        key_smoothing,
        SmoothingSettings(),
        needs=("last keys",),
        looks_inside=True,
    ),
    "pamr": Refinement(
        "pixel-adaptive mask refinement",
        "PAMR; Araslanov and Roth, CVPR 2020",
        "maps",
        pamr.pamr,
        pamr.Settings(),
    ),
    "cluster-vote": Refinement(
        "one class for each cluster of patches",
        "CLIPtrase; Shao et al., ECCV 2024",
        "labels",
        cluster_vote.cluster_vote,
        cluster_vote.Settings(),
        needs=("self-correlation of block 11",),
        looks_inside=True,
    ),
    "mask-vote": Refinement(
        "one class for each region",
        "CorrCLIP; Zhang et al., ICCV 2025",
        "labels",
        mask_vote.mask_vote,
        mask_vote.Settings(),
        needs=("regions",),
        networks={"regions": "facebook/sam2-hiera-large"},
    ),
    "closing": Refinement(
        "closing of the class ids",
        "ITACLIP; Aydın et al., CVPR Workshops 2025",
        "labels",
        closing.closing,
        closing.Settings(),
    ),
    "sam": Refinement(
        "regions drawn anew by SAM",
        "Trident; Shi et al., ICCV 2025",
        "labels",
        sam_prompts.redrawn,
        sam_prompts.Settings(),
        needs=("SAM",),
        networks={"sam": "facebook/sam-vit-base"},
    ),
}


def find_refinements(names: Iterable[str], settings: Mapping[str, Any] | None = None) -> dict[str, Refinement]:
    """The rows called so, in the table's order, each once.

    Args:
        names: keys of `REFINEMENTS`.
        settings: settings of a refinement by its name; those left out are its authors'.

    Raises:
        ValueError: there is no such row; the message lists the rows and the nearest name.
    """
    names = [names] if isinstance(names, str) else list(names)
    for name in names:
        if name not in REFINEMENTS:
            raise ValueError(unknown("refinement", name, REFINEMENTS))
    chosen = {name: row for name, row in REFINEMENTS.items() if name in names}
    return {name: replace(row, settings=(settings or {}).get(name, row.settings)) for name, row in chosen.items()}
