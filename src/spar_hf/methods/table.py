"""The table of methods: training-free ways to get one text-aligned vector per patch out of a network, a row each.

Adding a method is adding a row, and beside it a recipe (`methods_spar.RECIPES`) or a file of `spar_hf.methods`. The
command line, the tests, the docs and the menus read this table; nothing else in the code knows a method's name.
What their authors published is in `spar_hf.published`. Most rows are about CLIP's blocks; `family` says which network
a row is for.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import Any

from ..methods_spar import RECIPES, Recipe
from ..names_spar import unknown
from ..published import method_rows

# The networks that the methods' windows, strides and block numbers were chosen for: CLIP ViT-B/16, C-RADIOv3-B.
AUTHORS_NATIVE_PX, AUTHORS_PATCH_PX = {"clip": 224, "radio": 512}, 16
FAMILIES = {"clip": "CLIP", "radio": "RADIO"}


@dataclass(frozen=True)
class Method:
    """A row of the table.

    Attributes:
        name: what it is called everywhere: a key of `RECIPES`, or the file of `spar_hf.methods` that holds it.
        title: the method's own name.
        paper: where it was published.
        positions: the position rule its authors ran with, for a method with a file; a recipe brings its own.
        window_px: side of the sliding window its authors evaluated with; None is the network's native size.
        stride_px: step of that window. Where the authors ran whole images: the field's common window, see
            `window_for`.
        whole_image: it makes its own windows and its features or scores have a grid of their own, so it runs on whole
            images: `window="paper"` slides none around it, and a teacher's grid is brought to the student's.
        family: whose blocks it is about, a key of `FAMILIES`.
        branch: branch of the field (arXiv 2505.22209): "clip", "vfm" or "generative".
        needs: the further networks it takes: what each is called -> the id of the one its authors used; "" where that
            is none of transformers, or is one's own (a bank of references), so that it has to be given.
        takes: those that it takes where they are given, and else does with the model: likewise.
        bank: those that its bank of references is made with beside them: likewise.
        extra: the extra of the package that must be installed for it, if any.
        licence: of the authors' code; "" where none is given. No line of any of them is here.
        note: what `reported` had beside the features, where that is more than the protocol.
    """

    name: str
    title: str
    paper: str
    positions: str = "offset"
    window_px: int | None = None
    stride_px: int = 112
    whole_image: bool = False
    family: str = "clip"
    branch: str = "clip"
    needs: dict[str, str] = field(default_factory=dict)
    takes: dict[str, str] = field(default_factory=dict)
    bank: dict[str, str] = field(default_factory=dict)
    extra: str = ""
    licence: str = ""
    note: str = ""

    @property
    def reported(self) -> dict[str, float]:
        """Mean IoU in per cent by benchmark, as published with CLIP ViT-B/16, under its authors' own protocol."""
        row = method_rows().get(self.name)
        return {} if row is None else dict(row.miou)

    @property
    def networks(self) -> dict[str, str]:
        """All further networks that can be given, by name."""
        return {**self.needs, **self.takes, **self.bank}

    @property
    def defaults(self) -> dict[str, str]:
        """The further networks that are taken where none is given."""
        return {name: default for name, default in self.needs.items() if default}

    @property
    def recipe(self) -> Recipe | None:
        """Its last block; None for a method that is more than a last block, and so has a file."""
        return RECIPES[self.name].recipe if self.name in RECIPES else None

    @property
    def position_interpolation(self) -> str:
        """The rule its authors ran with; see `resize_positions`."""
        return RECIPES[self.name].position_interpolation if self.name in RECIPES else self.positions

    @property
    def module(self) -> Any:
        """Its file, imported; None for a recipe."""
        return None if self.recipe is not None else import_module(f"{__package__}.{self.name}")

    @property
    def kind(self) -> str:
        """`feature` (a dense encoder, and so a teacher) or `label` (a segmenter), as its file has it."""
        return "label" if hasattr(self.module, "Segmenter") else "feature"

    def to_dict(self) -> dict[str, Any]:
        """JSON form, for `spar methods --json`."""
        recipe = None if self.recipe is None else self.recipe.to_dict()
        return {**asdict(self), "reported": self.reported, "kind": self.kind, "recipe": recipe}

    def window_for(self, native_px: int, patch_px: int) -> tuple[int, int]:
        """Side and step in pixels of the method's window for any network.

        Lengths that are whole patches of the authors' network (112 and 336 of 224) keep their share of the native
        size, rounded to whole patches: 64 and 192 of 128. Lengths that are not (SPAR's 24, ITACLIP's 28) stay as
        they are: there, where in the patch a window begins is the point. No step is longer than its window.
        """

        def scaled(length_px: int) -> int:
            if length_px % AUTHORS_PATCH_PX:
                return length_px
            return max(round(length_px * native_px / AUTHORS_NATIVE_PX[self.family] / patch_px), 1) * patch_px

        window_px = native_px if self.window_px is None else scaled(self.window_px)
        return window_px, min(scaled(self.stride_px), window_px)


_ROWS = (
    Method(
        "clip",
        "CLIP",
        "Radford et al., ICML 2021",
    ),
    Method(
        "maskclip",
        "MaskCLIP, the last block of SPAR's CLIP",
        "Zhou et al., ECCV 2022; Kombol et al., CVPR 2026",
        stride_px=24,
    ),
    Method(
        "sclip",
        "SCLIP",
        "Wang et al., ECCV 2024",
    ),
    Method(
        "clearclip",
        "ClearCLIP",
        "Lan et al., ECCV 2024",
    ),
    Method(
        "naclip",
        "NACLIP",
        "Hajimiri et al., WACV 2025",
    ),
    Method(
        "cliptrase",
        "CLIPtrase",
        "Shao et al., ECCV 2024",
    ),
    Method(
        "clip_surgery",
        "CLIP Surgery",
        "Li et al., Pattern Recognition 2025",
    ),
    Method(
        "gem",
        "GEM",
        "Bousselham et al., CVPR 2024",
    ),
    Method(
        "itaclip",
        "ITACLIP; its ensembles are refinements",
        "Aydın et al., CVPR Workshops 2025",
        stride_px=28,
        note="with the refinements image-engineering, flip, definitions (or synonyms), PAMR and closing",
    ),
    Method(
        "resclip",
        "ResCLIP, without its label-dependent second pass",
        "Yang et al., CVPR 2025",
        note="the authors report it with the second pass alone: `resclip_feedback`",
    ),
    Method(
        "sc_clip",
        "SC-CLIP",
        "Bai et al., arXiv 2411.15869",
    ),
    Method(
        "cliper",
        "CLIPer, without diffusion",
        "Sun et al., ICCV 2025",
        positions="bilinear",
        note="with the maps of all blocks in the labels",
    ),
    Method(
        "proxyclip",
        "ProxyCLIP",
        "Lan et al., ECCV 2024",
        window_px=336,
        branch="vfm",
        needs={"dino": "facebook/dino-vitb8"},
    ),
    Method(
        "trident",
        "Trident",
        "Shi et al., ICCV 2025",
        window_px=336,
        stride_px=224,
        whole_image=True,
        branch="vfm",
        needs={"dino": "facebook/dino-vitb16", "sam": "facebook/sam-vit-base"},
        licence="Apache-2.0",
        note="with the refinement by SAM, settings chosen for each data set",
    ),
    Method(
        "cass",
        "CASS, without its text side",
        "Kim et al., CVPR 2025",
        branch="vfm",
        needs={"dino": "facebook/dino-vitb8"},
        extra="vfm",
        note="the authors report it with its text side alone: `cass_text`",
    ),
    Method(
        "cass_text",
        "CASS",
        "Kim et al., CVPR 2025",
        whole_image=True,
        branch="vfm",
        needs={"dino": "facebook/dino-vitb8"},
        extra="vfm",
        note="with PAMR, settings chosen for each data set",
    ),
    Method(
        "lposs",
        "LPOSS",
        "Stojnić et al., CVPR 2025",
        positions="size",
        whole_image=True,
        branch="vfm",
        needs={"dino": "facebook/dino-vitb16"},
        extra="vfm",
        licence="MIT",
        note="with OpenCLIP ViT-B/16 of LAION-2B",
    ),
    Method(
        "lposs_plus",
        "LPOSS+",
        "Stojnić et al., CVPR 2025",
        positions="size",
        whole_image=True,
        branch="vfm",
        needs={"dino": "facebook/dino-vitb16"},
        extra="vfm",
        licence="MIT",
        note="with OpenCLIP ViT-B/16 of LAION-2B",
    ),
    Method(
        "textregion",
        "TextRegion",
        "Xiao et al., TMLR 2025",
        window_px=336,
        stride_px=336,
        whole_image=True,
        branch="vfm",
        needs={"regions": "facebook/sam2.1-hiera-large"},
        licence="MIT",
    ),
    Method(
        "corrclip",
        "CorrCLIP",
        "Zhang et al., ICCV 2025",
        window_px=336,
        whole_image=True,
        branch="vfm",
        needs={"dino": "facebook/dino-vitb8", "regions": "facebook/sam2-hiera-large"},
        note="with MetaCLIP ViT-B/16 and the vote of regions on the label map",
    ),
    Method(
        "corrclip_v2",
        "CorrCLIP v2, without its memory bank",
        "Zhang et al., extension of ICCV 2025",
        window_px=336,
        whole_image=True,
        branch="vfm",
        needs={"dino": "facebook/dinov2-with-registers-large", "regions": "facebook/sam2-hiera-large"},
        note="the authors report it with its memory bank: `corrclip_v2_bank`",
    ),
    Method(
        "lavg",
        "LaVG",
        "Kang and Cho, ECCV 2024",
        whole_image=True,
        branch="vfm",
        needs={"dino": "facebook/dino-vitb8"},
        extra="vfm",
    ),
    Method(
        "cliper_labels",
        "CLIPer's labels, without windows and diffusion",
        "Sun et al., ICCV 2025",
        positions="bilinear",
        whole_image=True,
        note="as the authors' configuration files have it, settings chosen for each data set",
    ),
    Method(
        "resclip_feedback",
        "ResCLIP",
        "Yang et al., CVPR 2025",
        note="settings chosen for each data set",
    ),
    Method(
        "car",
        "CaR, CLIP as RNN",
        "Sun et al., CVPR 2024",
        positions="bilinear",
        whole_image=True,
        takes={"judge": "openai/clip-vit-large-patch14"},
        extra="vfm",
        licence="Apache-2.0",
        note="with CLIP ViT-L/14 as the judge, settings and words of the background chosen for each data set",
    ),
    Method(
        "pnp_ovss",
        "PnP-OVSS, without the choice of names by GPT-4o",
        "Luo et al., CVPR 2024",
        whole_image=True,
        branch="vfm",
        needs={"blip": "Salesforce/blip-itm-large-coco"},
        extra="vfm",
    ),
    Method(
        "clip_diy",
        "CLIP-DIY",
        "Wysoczańska et al., WACV 2024",
        whole_image=True,
        branch="vfm",
        needs={"saliency": ""},
        takes={"dino": "facebook/dino-vits8"},
    ),
    Method(
        "reco",
        "ReCo",
        "Shin et al., NeurIPS 2022",
        whole_image=True,
        branch="vfm",
        needs={"dino": "", "bank": ""},
        takes={"retriever": "openai/clip-vit-large-patch14-336"},
    ),
    Method(
        "knn_clip",
        "kNN-CLIP, around a recipe of CLIP",
        "Gui et al., TMLR 2024",
        whole_image=True,
        branch="vfm",
        needs={"dino": "", "regions": "facebook/sam2.1-hiera-large", "bank": ""},
    ),
    Method(
        "corrclip_v2_bank",
        "CorrCLIP v2, without its second CLIP",
        "Zhang et al., extension of ICCV 2025",
        window_px=336,
        whole_image=True,
        branch="vfm",
        needs={
            "dino": "facebook/dinov2-with-registers-large",
            "regions": "facebook/sam2-hiera-large",
            "bank": "",
        },
        bank={"bank_dino": "facebook/dino-vitb8"},
        note="with MetaCLIP ViT-B/16, DFN ViT-B/16, C-RADIOv3-L, regions of COCO and the vote of regions",
    ),
    Method(
        "freeda",
        "FreeDA, over references of one's own",
        "Barsellotti et al., CVPR 2024",
        window_px=448,
        stride_px=224,
        whole_image=True,
        branch="generative",
        needs={"dino": "facebook/dinov2-large", "bank": ""},
        extra="vfm",
    ),
    Method(
        "diffsegmenter",
        "DiffSegmenter, without BLIP's captions",
        "Wang et al., TIP 2025",
        whole_image=True,
        branch="generative",
        needs={"diffusion": "stable-diffusion-v1-5/stable-diffusion-v1-5"},
        extra="diffusion",
    ),
    Method(
        "iseg",
        "iSeg",
        "Sun et al., arXiv 2409.03209",
        whole_image=True,
        branch="generative",
        needs={"diffusion": "stabilityai/stable-diffusion-2-1-base"},
        extra="diffusion",
        note="with Stable Diffusion 2.1 and classes chosen by TagCLIP, settings chosen for each data set",
    ),
    Method(
        "maskdiffusion",
        "MaskDiffusion, on the UNet's own features",
        "Kawano and Aoki, IEEE Access 2024",
        whole_image=True,
        branch="generative",
        needs={"diffusion": "CompVis/stable-diffusion-v1-4"},
        extra="diffusion",
    ),
    Method(
        "diffcut",
        "DiffCut, named by the model's CLIP",
        "Couairon et al., NeurIPS 2024",
        whole_image=True,
        branch="generative",
        needs={"diffusion": "segmind/SSD-1B"},
        extra="diffusion",
        licence="MIT",
    ),
    Method(
        "freeseg_diff",
        "FreeSeg-Diff, without BLIP's captions",
        "Corradini et al., arXiv 2403.20105",
        whole_image=True,
        branch="generative",
        needs={"diffusion": "CompVis/stable-diffusion-v1-4"},
        extra="diffusion",
    ),
    Method(
        "cliper_sd",
        "CLIPer's labels with Stable Diffusion, without windows",
        "Sun et al., ICCV 2025",
        positions="bilinear",
        whole_image=True,
        branch="generative",
        needs={"diffusion": "stabilityai/stable-diffusion-2-1-base"},
        extra="diffusion",
        note="settings chosen for each data set",
    ),
    Method(
        "scra",
        "RADSeg's last block alone",
        "Alama et al., arXiv 2511.19704",
        positions="square",
        window_px=336,
        stride_px=224,
        family="radio",
        branch="vfm",
        licence="MIT",
    ),
    Method(
        "radseg",
        "RADSeg, without RADIO-SAM",
        "Alama et al., arXiv 2511.19704",
        positions="square",
        window_px=336,
        stride_px=224,
        whole_image=True,
        family="radio",
        branch="vfm",
        licence="MIT",
    ),
)

METHODS: dict[str, Method] = {row.name: row for row in _ROWS}


def for_method(method: str, pairs: Iterable[tuple[str, str]]) -> dict[str, str]:
    """Of networks or settings by NAME or METHOD.NAME, those for one method; its own go before the common ones."""
    common: dict[str, str] = {}
    own: dict[str, str] = {}
    for name, value in pairs:
        whose, dot, rest = name.partition(".")
        if not (dot and whose in METHODS):
            common[name] = value
        elif whose == method:
            own[rest] = value
    return {**common, **own}


def find_method(name: str) -> Method:
    """The row called `name`.

    Raises:
        ValueError: there is none; the message lists the rows and the nearest name.
    """
    if name not in METHODS:
        raise ValueError(unknown("method", name, METHODS))
    return METHODS[name]
