"""Whether a command runs an exported model, without PyTorch."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPORTED = "export.json"  # spar_onnx.folder.RECORD, which takes a moment to import


def on_onnx(args: argparse.Namespace) -> bool:
    """Whether onnxruntime runs, and PyTorch is not imported."""
    return args.backend == "onnx" or (args.backend is None and (Path(args.model) / EXPORTED).is_file())
