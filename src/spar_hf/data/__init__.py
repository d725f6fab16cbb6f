"""Data: the picture book, the benchmarks with their vocabularies, and the protocols that evaluate on them."""

from .benchmarks import BENCHMARKS, IGNORED, BenchmarkData, Sample, load_benchmark, load_vocabulary
from .picture_book import PictureBook, picture_book_dataset
from .protocols import PROTOCOLS, Protocol, load_protocol

__all__ = [
    "BENCHMARKS",
    "IGNORED",
    "PROTOCOLS",
    "BenchmarkData",
    "PictureBook",
    "Protocol",
    "Sample",
    "load_benchmark",
    "load_protocol",
    "load_vocabulary",
    "picture_book_dataset",
]
