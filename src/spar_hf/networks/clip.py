"""A whole CLIP as a second network: text and image in one space, another one than the model's."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import CLIPModel

from ..checkpoints import convert_stock, load
from ..clip_spar import SparModel


def open_clip(network: str | nn.Module, processor: Any) -> tuple[SparModel, Any]:
    """A CLIP and a processor for it.

    Args:
        network: its id or folder; or a `SparModel` or stock `CLIPModel`, which goes with the tokenizer given.
        processor: a `SparProcessor` of the same family.

    Raises:
        ValueError: it is another network.
    """
    model: Any = network
    if isinstance(network, str):
        model, processor = load(network)
    elif isinstance(network, CLIPModel) and not isinstance(network, SparModel):
        model, processor = convert_stock(network, processor.tokenizer)
    if not isinstance(model, SparModel):
        raise ValueError(
            f"the second network is a {type(network).__name__}; give a whole CLIP, such as "
            "openai/clip-vit-large-patch14."
        )
    return model.eval(), processor
