"""Upsamplers of patch features, one file each, and their table."""

from .table import UPSAMPLERS, UpsamplerRow, check_upsampler, load_upsampler

__all__ = ["UPSAMPLERS", "UpsamplerRow", "check_upsampler", "load_upsampler"]
