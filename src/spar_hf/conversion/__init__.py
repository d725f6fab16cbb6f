"""Released and foreign checkpoints into `save_pretrained` form, checked against a forward pass of the source."""

from .convert import Converted, convert

__all__ = ["Converted", "convert"]
