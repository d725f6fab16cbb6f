"""Data: the picture book, and the benchmarks with their vocabularies."""

from .benchmarks import BENCHMARKS, IGNORED, BenchmarkData, Sample, load_benchmark, load_vocabulary
from .picture_book import PictureBook, picture_book_dataset

__all__ = [
    "BENCHMARKS",
    "IGNORED",
    "BenchmarkData",
    "PictureBook",
    "Sample",
    "load_benchmark",
    "load_vocabulary",
    "picture_book_dataset",
]
