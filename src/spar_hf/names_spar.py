"""What is said about a name that is none of the allowed ones. Imports no PyTorch, so that commands answer at once."""

import difflib
import reprlib
from collections.abc import Iterable
from typing import Any


def unknown(what: str, name: object, allowed: Iterable[str]) -> str:
    """The sentence about a name that is none of the allowed ones: what they are, and which was probably meant."""
    allowed = list(allowed)
    near = difflib.get_close_matches(str(name)[:100], allowed, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"there is no {what} {shown(name)}; choose one of {', '.join(allowed)}.{hint}"


def shown(value: Any) -> str:
    """Any value in one line of a message, however large, deep or strange it is; words in quotes."""
    brief = reprlib.Repr()
    brief.maxstring = brief.maxother = 120
    return " ".join(brief.repr(value).split())


def one_of(name: str, value: str, allowed: Iterable[str]) -> None:
    """Raises the `ValueError` that every named choice shares: what came and what is allowed."""
    if value not in allowed:
        raise ValueError(f"{name} is {shown(value)}; choose one of {', '.join(map(repr, allowed))}.")
