"""Dense encoders around dense encoders: sliding windows, other sizes and grids, ensembles, finer grids."""

from ..encoder_spar import EncoderWrapper
from .base import DenseEncoder
from .composition import Ensemble, Regridded, Resized
from .sliding_window import SlidingWindow
from .upsampled import FromUpsampled, Upsampled

__all__ = [
    "DenseEncoder",
    "EncoderWrapper",
    "Ensemble",
    "FromUpsampled",
    "Regridded",
    "Resized",
    "SlidingWindow",
    "Upsampled",
]
