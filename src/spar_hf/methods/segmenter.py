"""What the classes in the files of label methods have in common: a tower, further networks, one image at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..arithmetic_spar import with_fast_products
from ..encoder_spar import check_pixels
from ..segmentation_spar import FromFeatures, ScoreMaps
from .encoder import MethodEncoder, opened, settings_and_name


class MethodParts(FromFeatures):
    """A model with the further networks and the settings of a method.

    The class in a method's file says in `adapters` what its further networks are and has each by its name.

    Args:
        model: has the text tower.
        processor: its `SparProcessor`.
        vision: the vision tower; its configuration gives window and step.
        networks: the further networks by name, each an adapter, a module, or the id or folder to load it from.
        settings: the method's constants, a frozen dataclass. None is the file's `Settings()`.
        method: the row's name; that of the file where it is left out.

    Raises:
        ValueError: the tower has a single block, a network is missing or of another kind, or does not fit.
    """

    encoder_class: ClassVar[type[MethodEncoder]] = MethodEncoder

    def __init__(
        self,
        model: Any,
        processor: Any,
        vision: Any,
        networks: Mapping[str, Any] | None = None,
        settings: Any = None,
        method: str = "",
    ) -> None:
        settings, method = settings_and_name(self, settings, method)
        super().__init__(self.encoder_class(vision, networks, settings, method), model, processor)
        self.further = opened(self.adapters(), networks, vision, method)
        for name, network in self.further.items():
            setattr(self, name, network)
        self.prepare()

    def adapters(self) -> dict[str, Callable[[Any], Any]]:
        """What makes an adapter of each further network that is given, by name."""
        return {}

    def prepare(self) -> None:
        """What is to be checked and set once the networks are there."""

    @property
    def settings(self) -> Any:
        return self.encoder.settings

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (*super().networks, *(part for part in self.further.values() if isinstance(part, nn.Module)))

    def __repr__(self) -> str:
        return f"{self.config.method}({', '.join(map(repr, (self.settings, *self.further.values())))})"


class MethodSegmenter(MethodParts):
    """A segmenter around a vision tower; its `of_one` is the method. See `MethodParts` for the arguments."""

    @torch.no_grad()
    @with_fast_products
    def __call__(self, pixel_values: Tensor, encoded: Any) -> list[ScoreMaps]:
        """See `Segmenter`."""
        check_pixels(pixel_values, self.config.num_channels)
        return [self.of_one(image[None], encoded) for image in pixel_values.to(self.device)]

    def of_one(self, image: Tensor, encoded: Any) -> ScoreMaps:
        """The score maps of one image.

        Args:
            image: (1, 3, H, W), on the tower's device, in the type it came in.
            encoded: what `encode_labels` gave.
        """
        raise NotImplementedError
