"""Reads a foreign checkpoint: files or folders in, plain named tensors out. Nothing in a file is ever run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from ..checkpoint_files import check_finite, load_pickle, naming, read_json, refuse

# What open_clip and NVIDIA call their files on the Hub, best first.
HUB_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
    "*_half.pth.tar",
    "model.safetensors",
)
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
        args: of the training, where a file holds them or a `config.json` beside it does (RADIO).
        text: fields of the text configuration, where the text tower comes from another checkpoint (RADIO).
    """

    name: str
    digest: str
    weights: dict[str, Tensor]
    open_clip_config: dict[str, Any] = field(default_factory=dict)
    args: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] = field(default_factory=dict)


def read_source(paths: Sequence[Path]) -> Source:
    """Reads and joins the files of one checkpoint.

    Args:
        paths: a file, or a folder of open_clip or NVIDIA; several where a release comes in parts (dino.txt: backbone
            and rest).

    Raises:
        ValueError: a file is missing, in no known format, or cannot be read without running it; or two files hold the
            same weight.
    """
    weights: dict[str, Tensor] = {}
    config: dict[str, Any] = {}
    args: dict[str, Any] = {}
    digest = hashlib.sha256()
    for path in paths:
        file = weights_file(path)
        config |= open_clip_config(file.parent)
        with open(file, "rb") as stream:
            for block in iter(lambda: stream.read(1 << 20), b""):
                digest.update(block)
        content = read_weights(file)
        args |= args_of(content, file.parent)
        found = cut_wrappers(tensors_of(content, file))
        for name, weight in found.items():
            check_finite(file, name, weight)
        if "cls_token" in found and "storage_tokens" in found:  # the backbone of dino.txt, released apart
            found = {f"visual_model.backbone.{name}": weight for name, weight in found.items()}
        if both := sorted(set(found) & set(weights)):
            raise ValueError(
                f"{path} holds {both[0]}, which another file holds too; give the parts of one checkpoint."
            )
        weights |= found
    return Source(" + ".join(path.name for path in paths), digest.hexdigest()[:16], weights, config, args)


def weights_file(path: Path) -> Path:
    """The file itself, or that of a folder of open_clip or NVIDIA."""
    if path.is_dir():
        for name in HUB_FILES:
            if found := sorted(path.glob(name)):
                return found[0]
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


def read_weights(path: Path) -> Any:
    """What a file of safetensors or PyTorch holds: plain data and tensors, and the arguments of a command line."""
    if path.suffix == ".safetensors":
        with naming(path, what="file of safetensors"):
            return load_file(path)
    return load_pickle(path, plain={"argparse.Namespace": SimpleNamespace})


def args_of(content: Any, folder: Path) -> dict[str, Any]:
    """The training's arguments: in the file (timm, RADIO), or in a `config.json` beside it (RADIO on the Hub)."""
    if isinstance(content, dict) and isinstance(content.get("args"), SimpleNamespace):
        return dict(vars(content["args"]))
    path = folder / "config.json"
    args = read_json(path).get("args") if path.is_file() else None
    return args if isinstance(args, dict) else {}


def tensors_of(content: Any, path: Path) -> dict[str, Tensor]:
    """Named tensors of what a file held."""
    # RADIO and timm, whose averaged weights are the released ones; Lightning; open_clip's and DINOv3's training.
    for key in ("state_dict_ema", "state_dict", "model", "teacher"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict) or not any(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"{path} holds no named weights; give a state dict or a Lightning checkpoint.")
    return {name: value for name, value in content.items() if isinstance(value, Tensor) and isinstance(name, str)}


def cut_wrappers(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as the network itself has them."""
    return {WRAPPERS.sub("", name, count=1): weight for name, weight in weights.items()}
