"""Evaluation: benchmarks with their vocabularies, protocols, streaming counts, and the run over them.

`mean_iou.MeanIoU` wraps the counts for the evaluate library.
"""

from .benchmarks import BENCHMARKS, BenchmarkData, load_benchmark, load_vocabulary
from .counts import BOUNDARY_RATIO, ConfusionMatrix, Scores, SegmentationCounts, boundary_region
from .evaluate import EvaluationResult, evaluate, markdown_table, peak_memory_mb
from .protocols import PROTOCOLS, Protocol, load_protocol
from .samples import IGNORED, Sample

__all__ = [
    "BENCHMARKS",
    "BOUNDARY_RATIO",
    "IGNORED",
    "PROTOCOLS",
    "BenchmarkData",
    "ConfusionMatrix",
    "EvaluationResult",
    "Protocol",
    "Sample",
    "Scores",
    "SegmentationCounts",
    "boundary_region",
    "evaluate",
    "load_benchmark",
    "load_protocol",
    "load_vocabulary",
    "markdown_table",
    "peak_memory_mb",
]
