"""Released and foreign checkpoints into `save_pretrained` form, checked against a forward pass of the source."""

from .anyup import convert_anyup
from .convert import Converted, convert

__all__ = ["Converted", "convert", "convert_anyup"]
