"""Exported models without PyTorch: onnxruntime, NumPy, Pillow and tokenizers run what `spar export` wrote.

    >>> import spar_onnx
    >>> segment = spar_onnx.load("exported")
    >>> segment("street.jpg", "road; car, automobile; sky")["segments"]

Reading pictures, words and results is the library's own code (`library`), so both give the same.
"""

from .folder import Exported
from .pipeline import LabelEmbeds, OnnxPipeline, load

__all__ = ["Exported", "LabelEmbeds", "OnnxPipeline", "load"]
