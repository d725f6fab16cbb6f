"""SecondNetwork, what the adapters share: loading by id or folder, and pixels normalised for another network."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import nn
from transformers import MODEL_FOR_BACKBONE_MAPPING, AutoConfig, AutoModel
from transformers.utils.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from ..checkpoint_files import naming, read_json
from ..checkpoints import folder_of, resolve
from ..downloads import CONFIG, fetch
from ..encoders.base import column, rgb
from ..pretrained import open_model, read_config

Adapter = TypeVar("Adapter", bound="SecondNetwork")


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


class SecondNetwork(nn.Module):
    """A network of transformers that a method asks beside CLIP. No gradients.

    Args:
        network: the network, or the id or folder to load it from.
        image_mean, image_std: what its pixels are normalised with; None as it was saved with, or else ImageNet's.
    """

    def __init__(
        self,
        network: str | nn.Module,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
    ) -> None:
        super().__init__()
        if isinstance(network, str):
            mean, std = normalisation_of(network)
            image_mean, image_std = image_mean or mean, image_std or std
            network = load_network(network)
        self.network: Any = network.eval()
        self.image_mean = tuple(image_mean or IMAGENET_DEFAULT_MEAN)
        self.image_std = tuple(image_std or IMAGENET_DEFAULT_STD)

    @classmethod
    def of(cls: type[Adapter], network: str | nn.Module) -> Adapter:
        """The adapter itself, or one around a network, its id or its folder."""
        return network if isinstance(network, cls) else cls(network)

    def extra_repr(self) -> str:
        return f"image_mean={self.image_mean}, image_std={self.image_std}"

    @property
    def dtype(self) -> torch.dtype:
        return next(self.network.parameters()).dtype

    @property
    def device(self) -> torch.device:
        return next(self.network.parameters()).device

    def renormalised(self, pixel_values: torch.Tensor, config: Any) -> torch.Tensor:
        """Pixels (B, 3, H, W) normalised by `config` -> as this network wants them, fp32."""
        return renormalise(pixel_values, config, self.image_mean, self.image_std)
