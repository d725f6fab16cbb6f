"""Evaluation: benchmarks with their vocabularies, protocols, streaming counts, and the run over them.

`mean_iou.MeanIoU` wraps the counts for the evaluate library.
"""

from .benchmarks import BENCHMARKS, BenchmarkData, load_benchmark, load_vocabulary
from .counts import BOUNDARY_RATIO, ConfusionMatrix, Scores, SegmentationCounts, boundary_region
from .evaluate import EvaluationResult, evaluate, markdown_table, peak_memory_mb
from .own import OWN, Own, own_protocol
from .protocols import PROTOCOLS, Protocol, is_clip, load_protocol
from .samples import IGNORED, Sample

__all__ = [
    "BENCHMARKS",
    "BOUNDARY_RATIO",
    "IGNORED",
    "OWN",
    "PROTOCOLS",
    "BenchmarkData",
    "ConfusionMatrix",
    "EvaluationResult",
    "Own",
    "Protocol",
    "Sample",
    "Scores",
    "SegmentationCounts",
    "boundary_region",
    "evaluate",
    "is_clip",
    "load_benchmark",
    "load_protocol",
    "load_vocabulary",
    "markdown_table",
    "own_protocol",
    "peak_memory_mb",
]
