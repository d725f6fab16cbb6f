"""Upsamplers of patch features, one file each, and their table."""

from .table import UPSAMPLERS, UpsamplerRow, load_upsampler

__all__ = ["UPSAMPLERS", "UpsamplerRow", "load_upsampler"]
