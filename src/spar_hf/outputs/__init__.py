"""Results in files: a table of formats, a small file each, and the writer that puts them into a folder.

Imports no PyTorch, so that exported models write the same files.
"""

from .options import ResultOptions
from .table import FORMATS, Format
from .writer import Writer

__all__ = ["FORMATS", "Format", "ResultOptions", "Writer"]
