"""Dense encoders around dense encoders: sliding windows, other sizes and grids, ensembles."""

from .base import DenseEncoder, EncoderWrapper
from .composition import Ensemble, Regridded, Resized
from .sliding_window import SlidingWindow

__all__ = ["DenseEncoder", "EncoderWrapper", "Ensemble", "Regridded", "Resized", "SlidingWindow"]
