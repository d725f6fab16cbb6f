"""Packages of extras, imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any


def extra_package(name: str, extra: str) -> Any:
    """A module of a package that comes with an extra, imported.

    Raises:
        ValueError: it is not installed.
    """
    try:
        return import_module(name)
    except ModuleNotFoundError:
        package = name.partition(".")[0]
        raise ValueError(f'{package} is needed and not installed; run: pip install "spar-hf[{extra}]"') from None
