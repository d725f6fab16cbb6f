"""Reads a foreign checkpoint: files or folders in, plain named tensors out. Nothing in a file is ever run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint_files import check_finite, load_pickle, naming, read_json, refuse

# What open_clip calls its files on the Hub, best first.
HUB_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
# Wrappers around the network: SPAR's Lightning module and its trimmed form, data-parallel training.
WRAPPERS = re.compile(r"^(?:module\.)?(?:segmentor\.net\.model\.|net\.model\.|model\.)?")


@dataclass(frozen=True)
class Source:
    """A checkpoint as it was found.

    Attributes:
        name: its files' names.
        digest: start of the SHA-256 of their bytes.
        weights: name -> tensor, wrappers cut.
        open_clip_config: `model_cfg` and `preprocess_cfg` of an open_clip folder; empty without one.
    """

    name: str
    digest: str
    weights: dict[str, Tensor]
    open_clip_config: dict[str, Any] = field(default_factory=dict)


def read_source(paths: Sequence[Path]) -> Source:
    """Reads and joins the files of one checkpoint.

    Args:
        paths: a file or an open_clip folder; several where a release comes in parts (dino.txt: backbone and rest).

    Raises:
        ValueError: a file is missing, in no known format, or cannot be read without running it; or two files hold the
            same weight.
    """
    weights: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    digest = hashlib.sha256()
    for path in paths:
        file = weights_file(path)
        config |= open_clip_config(file.parent)
        with open(file, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        found = cut_wrappers(tensors_of(file))
        for name, weight in found.items():
            check_finite(file, name, weight)
        if "cls_token" in found and "storage_tokens" in found:  # the backbone of dino.txt, released apart
            found = {f"visual_model.backbone.{name}": weight for name, weight in found.items()}
        if both := sorted(set(found) & set(weights)):
            raise ValueError(
                f"{path} holds {both[0]}, which another file holds too; give the parts of one checkpoint."
            )
        weights |= found
    return Source(" + ".join(path.name for path in paths), digest.hexdigest()[:16], weights, config)


def weights_file(path: Path) -> Path:
    """The file itself, or that of an open_clip folder."""
    if path.is_dir():
        for name in HUB_FILES:
            if (path / name).is_file():
                return path / name
        raise ValueError(f"folder {path} holds none of {', '.join(HUB_FILES)}; name the file itself.")
    if not path.is_file():
        raise ValueError(f"there is no file {path}.")
    return path


def open_clip_config(folder: Path) -> dict[str, Any]:
    """`open_clip_config.json` of a folder; empty without one."""
    path = folder / "open_clip_config.json"
    config = read_json(path) if path.is_file() else {}
    for name in ("model_cfg", "preprocess_cfg"):
        if not isinstance(config.get(name, {}), dict):
            refuse(path, f"{name} must be an object, {{...}}")
    return config


def tensors_of(path: Path) -> dict[str, Tensor]:
    """Named tensors of a file of safetensors or PyTorch."""
    if path.suffix == ".safetensors":
        with naming(path, what="file of safetensors"):
            return load_file(path)
    content = load_pickle(path)
    for key in ("state_dict", "model", "teacher"):  # Lightning, open_clip's training, DINOv3's training
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no named weights; give a state dict or a Lightning checkpoint.")
    return {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}


def cut_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the network itself has them."""
    return {WRAPPERS.sub("", name, count=1): weight for name, weight in weights.items()}
