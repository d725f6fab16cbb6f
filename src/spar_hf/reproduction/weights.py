"""The weights: where they come from, sizes, licences, and how they are made loadable.

`hub` weights are downloaded by huggingface_hub into its cache; `by_hand` says how to get the others, whose files go
into ROOT/weights/NAME. What does not load as it is goes through `spar_hf.conversion` into ROOT/models/NAME. Sizes are
rough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import constants

from ..conversion import convert
from ..conversion.layouts import Asked
from ..downloads import fetch, fetch_files
from ..files import require_disk
from .archives import Problem

_SPAR = "download it in a browser from {link} (Google Drive, linked from https://github.com/naomikombol/SPAR; that "
_SPAR += "repository has no licence: ask its authors before you pass the weights on)"
_OPEN_CLIP = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
_SIGLIP2_WORDS, _CLIP_WORDS = "google/siglip2-base-patch16-512", "openai/clip-vit-base-patch16"
_SIGLIP2 = {"activation": "gelu", "text_activation": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Weights:
    """Where a network comes from.

    Attributes:
        title: what it is.
        gigabytes: about the size of its files.
        licence: as published.
        hub: its id on the Hub; "" where it is not there.
        files: of the Hub's repository, the first that is there is converted; none where it loads as it is.
        by_hand: how its files are got; "" where it is on the Hub.
        backbone: argument of the conversion, with `asked`; "" where it loads as it is.
        asked: what shapes cannot tell; see `conversion.layouts.Asked`.
        tokenizer: id on the Hub, for the conversion.
        note: what the numbers depend on.
    """

    title: str
    gigabytes: float
    licence: str
    hub: str = ""
    files: tuple[str, ...] = ()
    by_hand: str = ""
    backbone: str = ""
    asked: dict[str, Any] = field(default_factory=dict)
    tokenizer: str = ""
    note: str = ""


def _released(title: str, link: str, backbone: str, tokenizer: str, note: str = "", **asked: Any) -> Weights:
    """One of the files that SPAR's authors released."""
    gigabytes, licence = {"dinov3": 3.3}.get(backbone, 1.0), "none given; and that of the weights it started from"
    how = _SPAR.format(link=f"https://drive.google.com/file/d/{link}/view")
    return Weights(
        title, gigabytes, licence, by_hand=how, backbone=backbone, asked=asked, tokenizer=tokenizer, note=note
    )


WEIGHTS: dict[str, Weights] = {
    "openclip-b16": Weights(
        "OpenCLIP ViT-B/16, LAION-2B",
        0.6,
        "MIT",
        hub="laion/CLIP-ViT-B-16-laion2B-s34B-b88K",
        files=_OPEN_CLIP,
        backbone="clip",
        asked={"activation": "gelu"},
        tokenizer=_CLIP_WORDS,
    ),
    "siglip2-b16": Weights(
        "SigLIP2 ViT-B/16, 512 px, timm's",
        1.5,
        "Apache-2.0",
        hub="timm/ViT-B-16-SigLIP2-512",
        files=_OPEN_CLIP,
        backbone="siglip2",
        asked=_SIGLIP2,
        tokenizer=_SIGLIP2_WORDS,
    ),
    "siglip2-b16-naflex": Weights(
        "SigLIP2 ViT-B/16 NaFlex", 1.5, "Apache-2.0", hub="google/siglip2-base-patch16-naflex"
    ),
    "dinov3txt-l16": Weights(
        "DINOv3.txt ViT-L/16",
        3.3,
        "DINOv3 licence, to be accepted",
        by_hand="ask for it at https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/, accept its "
        "licence, and download dinov3_vitl16_pretrain_lvd1689m-8aa4cbdd.pth and "
        "dinov3_vitl16_dinotxt_vision_head_and_text_encoder-a442d8f5.pth from the links in the answer",
        backbone="dinov3",
        tokenizer=_CLIP_WORDS,
    ),
    "spar-openclip-b16": _released(
        "SPAR MaskCLIP (Legacy), the paper's",
        "11MABz9Dr3ZI7pzP6p-khQf69Wk43NDne",
        "clip",
        _CLIP_WORDS,
        "its authors name another preprocessing for these weights and do not say which; they run with CLIP's mean and "
        "std unless you convert them yourself (spar convert --mean --std) into ROOT/models/spar-openclip-b16",
        activation="gelu",
    ),
    "spar-openclip-b16-new": _released(
        "SPAR MaskCLIP, released after the paper",
        "1wLqX4Pu58f7g8ktOpI83Nj4zam46czyQ",
        "clip",
        _CLIP_WORDS,
        "no numbers of these weights are published",
        activation="gelu",
    ),
    "spar-siglip2-b16": _released(
        "SPAR SigLIP2", "1G6qfZpOZGhkM48NuibA3-S3IEqAWNObB", "siglip2", _SIGLIP2_WORDS, **_SIGLIP2
    ),
    "spar-dinov3txt-l16": _released("SPAR DINOv3-TXT", "1s5G2-qBvPxXwTN61xNDiciYxcG7B3GYH", "dinov3", _CLIP_WORDS),
    "clip-b16": Weights("CLIP ViT-B/16, OpenAI", 0.6, "MIT", hub="openai/clip-vit-base-patch16"),
    "metaclip-b16": Weights("MetaCLIP ViT-B/16, 2.5 B", 0.6, "CC BY-NC 4.0", hub="facebook/metaclip-b16-fullcc2.5b"),
    "c-radio-b": Weights(
        "C-RADIOv3-B with SigLIP2's head and text tower",
        0.55 + 7.5,
        "NVIDIA Open Model License; the text tower Apache-2.0",
        hub="nvidia/C-RADIOv3-B",
        files=("*_half.pth.tar",),
        backbone="radio",
        asked={"adaptor": "siglip2-g"},
    ),
}
# Second networks of the methods by their id on the Hub: gigabytes, licence.
NETWORKS: dict[str, tuple[float, str]] = {
    "facebook/dino-vitb8": (0.35, "Apache-2.0"),
    "facebook/dino-vitb16": (0.35, "Apache-2.0"),
    "facebook/dino-vits8": (0.09, "Apache-2.0"),
    "facebook/dinov2-large": (1.2, "Apache-2.0"),
    "facebook/dinov2-with-registers-large": (1.2, "Apache-2.0"),
    "facebook/sam-vit-base": (0.38, "Apache-2.0"),
    "facebook/sam2-hiera-large": (0.9, "Apache-2.0"),
    "facebook/sam2.1-hiera-large": (0.9, "Apache-2.0"),
    "openai/clip-vit-large-patch14": (1.7, "MIT"),
    "openai/clip-vit-large-patch14-336": (1.7, "MIT"),
    "Salesforce/blip-itm-large-coco": (1.8, "BSD-3-Clause"),
}


def model_folder(name: str, root: Path) -> Path:
    """Where converted weights go."""
    return root / "models" / name


def is_there(name: str, root: Path) -> bool:
    """Whether converted weights are ready."""
    return (model_folder(name, root) / "config.json").is_file()


def get_model(name: str, root: Path) -> str:
    """What `spar_hf.load` takes for weights: an id on the Hub, downloaded, or the folder of a conversion.

    Raises:
        Problem: the files have to be got by hand, or do not convert; the message says what to do.
        OSError: the Hub cannot be read; the message says why, and how a licence is accepted.
    """
    row = WEIGHTS[name]
    if not row.backbone:
        _room(row.hub, row.gigabytes)
        fetch(row.hub)
        return row.hub
    folder = model_folder(name, root)
    if is_there(name, root):
        return str(folder)
    try:
        convert(_sources(name, root), row.backbone, folder, Asked(**row.asked), tokenizer=row.tokenizer or None)
    except ValueError as error:
        raise Problem(f"{row.title} does not convert: {error}") from error
    return str(folder)


def _sources(name: str, root: Path) -> Sequence[Path]:
    """The files, or the folder, to convert."""
    row = WEIGHTS[name]
    if row.hub:
        _room(row.hub, row.gigabytes)
        return [fetch_files(row.hub, ("open_clip_config.json", "config.json"), row.files)]
    place = root / "weights" / name
    files = sorted(path for path in place.glob("*") if path.is_file() and not path.name.startswith("."))
    if not files:
        raise Problem(f"{row.title} has to be got by hand: {row.by_hand}; put what you get into {place}")
    return files


def get_network(where: str) -> None:
    """Downloads a second network that is named by an id on the Hub.

    Raises:
        OSError: it cannot be read.
    """
    if where in NETWORKS:
        _room(where, NETWORKS[where][0])
    fetch(where)


def _room(hub_id: str, gigabytes: float) -> None:
    """Says before a download that the cache's disk can't hold it."""
    if not (Path(constants.HF_HUB_CACHE) / f"models--{hub_id.replace('/', '--')}").exists():
        remedy = "or set HF_HOME to a folder on a larger disk"
        require_disk(Path(constants.HF_HUB_CACHE), int(gigabytes * 1e9), remedy)
