"""build_encoder(): a dense encoder for any method of the table, be it a recipe or a file of this package."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .clip_spar import SparVisionModel
from .encoder_spar import DenseVisionModel
from .encoders.base import DenseEncoder
from .methods.table import find_method


def build_encoder(
    vision: DenseVisionModel, method: str | None = None, network: str | nn.Module | None = None, **fields: Any
) -> DenseEncoder:
    """A dense encoder that runs a method on a vision tower's weights; the tower itself stays as it is.

    Its configuration has the method's own window and step (`window_px`, `stride_px`), scaled to the network as
    `Method.window_for` says: `SlidingWindow(encoder, encoder.config.window_px, encoder.config.stride_px)`.

    Args:
        vision: the tower.
        method: name of a row of `METHODS`; None is the tower itself.
        network: the second network of a method that needs one, as a module, an id or a folder; None is the one its
            authors used.
        fields: of the tower's configuration, to differ from the method's (`position_interpolation="size"`).

    Raises:
        ValueError: no such method, a tower of another family than CLIP, or a second network for a method that takes
            none.
    """
    if method is None:
        if network is not None:
            raise ValueError("a second network is given without a method; name one that needs it (`spar methods`).")
        return reconfigured(vision, **fields) if fields else vision
    row = find_method(method)
    if network is not None and not row.needs:
        raise ValueError(f"method {method!r} takes no second network; leave it out, or choose another method.")
    if not isinstance(vision, SparVisionModel):
        raise ValueError(
            f"method {method!r} is about CLIP's blocks, and this network is a {type(vision).__name__}. Leave the "
            "method out."
        )
    window_px, stride_px = row.window_for(vision.config.image_size, vision.config.patch_size)
    chosen = {"window_px": window_px, "stride_px": stride_px, **fields}
    if row.recipe is not None:
        return reconfigured(vision, method=method, **chosen)
    tower = reconfigured(vision, **{"position_interpolation": row.position_interpolation, **chosen})
    encoder_class = row.module.Encoder
    networks = {name: default if network is None else network for name, default in row.needs.items()}
    return encoder_class(tower, networks, method=method)


def reconfigured(vision: Any, **fields: Any) -> Any:
    """The same weights under another configuration: nothing is copied, and `vision` keeps its own."""
    config = type(vision.config).from_dict(vision.config.to_dict(), **fields)
    config._attn_implementation = vision.config._attn_implementation
    with torch.device("meta"):  # takes no memory; the weights are those of `vision`
        twin = type(vision)(config)
    twin.load_state_dict(vision.state_dict(keep_vars=True), assign=True)
    for name, module in vision.named_modules():  # buffers that are no part of the weights
        twin.get_submodule(name)._buffers.update(module._buffers)
    return twin.train(vision.training)
