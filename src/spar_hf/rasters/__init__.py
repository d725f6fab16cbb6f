"""One picture of any size: read, segmented and written window by window, in constant memory. docs/rasters.md."""

from .segment import RasterResult, segment_raster

__all__ = ["RasterResult", "segment_raster"]
