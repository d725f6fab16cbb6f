"""What the adapters share: loading by id or folder, and pixels normalised for another network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, AutoModel
from transformers.image_processing_base import ImageProcessingMixin

from ..checkpoints import resolve
from ..encoders.base import column, rgb


def load_network(name: str) -> nn.Module:
    """A network of transformers by id or folder; a backbone where it was saved as one. Runs no code of a checkpoint.

    Raises:
        ValueError: there is no such network, or transformers does not know its kind.
        OSError: the Hub or the files cannot be read.
    """
    name = resolve(name)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if (config.architectures or [""])[0].endswith("Backbone"):
        backbone: Any = MODEL_FOR_BACKBONE_MAPPING[type(config)]  # AutoBackbone itself reads no folders
        return backbone.from_pretrained(name)
    return AutoModel.from_pretrained(name, trust_remote_code=False)


def normalisation_of(name: str) -> tuple[Any, Any]:
    """Mean and standard deviation in a checkpoint's preprocessor_config.json; None where it has none."""
    try:
        stored, _ = ImageProcessingMixin.get_image_processor_dict(resolve(name))
    except OSError:
        return None, None
    return stored.get("image_mean"), stored.get("image_std")


def renormalise(pixel_values: torch.Tensor, config: Any, mean: Sequence[float], std: Sequence[float]) -> torch.Tensor:
    """Pixels (B, 3, H, W) normalised by `config` -> by another mean and standard deviation, fp32."""
    return (rgb(pixel_values, config) - column(mean, pixel_values)) / column(std, pixel_values)
