"""What the adapters share: loading by id or folder, and pixels normalised for another network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, AutoModel

from ..checkpoint_files import naming, read_json
from ..checkpoints import folder_of, resolve
from ..downloads import CONFIG, fetch
from ..encoders.base import column, rgb
from ..pretrained import open_model, read_config


def load_network(name: str, **options: Any) -> nn.Module:
    """A second network, of any class of transformers; a backbone where it was saved as one.

    Args:
        name: a folder or a Hub id.
        options: arguments of `from_pretrained`.

    Raises:
        ValueError: there is no such network, transformers does not know its kind, or a file is broken.
        OSError: the Hub or the files cannot be read.
    """
    folder = folder_of(name, options)
    read_config(folder)
    with naming(folder / CONFIG):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        is_backbone = (config.architectures or [""])[0].endswith("Backbone")
        model_class: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)] if is_backbone else AutoModel
    network: nn.Module = open_model(model_class, folder, **options)
    return network


def normalisation_of(name: str) -> tuple[Any, Any]:
    """Mean and standard deviation in a checkpoint's preprocessor_config.json; None where it has none."""
    path = fetch(resolve(name), weights=False) / "preprocessor_config.json"
    stored = read_json(path) if path.is_file() else {}
    return stored.get("image_mean"), stored.get("image_std")


def renormalise(pixel_values: torch.Tensor, config: Any, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Pixels (B, 3, H, W) normalised by `config` -> by another mean and standard deviation, fp32."""
    return (rgb(pixel_values, config) - column(mean, pixel_values)) / column(std, pixel_values)
