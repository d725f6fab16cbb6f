"""The library's files that need no PyTorch, without the rest of it: importing spar_hf imports PyTorch for seconds."""

import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

OWN = f"{__package__}.shared"  # stands in for the package where that is not imported


def library(name: str) -> Any:
    """A module of spar_hf that imports no PyTorch, such as `prompts_spar`.

    Where spar_hf is imported it is that package's own, so that its classes are the same; else the same file under
    another name.
    """
    package = "spar_hf" if "spar_hf" in sys.modules else OWN
    if package not in sys.modules:
        _put_empty(package)
    return import_module(f"{package}.{name}")


def without_pytorch() -> None:
    """Lets a whole process, the command line's, import such modules of spar_hf by their names.

    Does nothing where spar_hf is imported already.
    """
    if "spar_hf" not in sys.modules:
        _put_empty("spar_hf")


def _put_empty(package: str) -> None:
    """A package of that name with spar_hf's files, which import each other relatively; its `__init__` does not run."""
    spec = find_spec("spar_hf")
    if spec is None or spec.origin is None:
        raise ValueError('spar_hf is not installed; run: pip install "spar-hf[onnx]"')
    empty = ModuleType(package)
    empty.__path__ = [str(Path(spec.origin).parent)]
    sys.modules[package] = empty
