"""export(): a model out of PyTorch, as graphs that take any size, checked before they are kept."""

from .export import DTYPES, FORMATS, Export, export

__all__ = ["DTYPES", "FORMATS", "Export", "export"]
