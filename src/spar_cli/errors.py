"""Mistakes of the user and faults of the machine become one line and an exit status."""

from __future__ import annotations

import io
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .parser import with_flags

MISTAKE = 2


def exit_status(
    run: Callable[[], int | None],
    program: str,
    flags: dict[str, str] | None = None,
    remedy: str = "take a smaller one",
    verbose: bool = False,
) -> int:
    """Runs a command.

    Args:
        run: the command; returns its status, None for 0.
        program: what the line of an error begins with.
        flags: option by the library's name of its value, for messages of the library.
        remedy: what to do when memory runs out.
        verbose: also print the traceback of a mistake.

    Returns:
        The command's status; 2 after a mistake, 130 after Ctrl-C, 0 where the reader of a pipe has seen enough.
    """
    try:
        if isinstance(sys.stdout, io.TextIOWrapper):
            sys.stdout.reconfigure(errors="replace")  # a label or name that the terminal's encoding lacks
        status = run()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return fail(program, "interrupted", 128 + signal.SIGINT)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        return fail(program, f"out of memory; {remedy}", MISTAKE)
    except (ValueError, OSError) as error:
        if verbose:
            traceback.print_exc()
        return fail(program, with_flags(one_line(error), flags or {}), MISTAKE)
    except RuntimeError as error:
        if "out of memory" not in str(error).lower() and "not enough memory" not in str(error).lower():
            raise
        return fail(program, f"out of memory; {remedy}", MISTAKE)
    return status or 0


def one_line(error: BaseException) -> str:
    """The message of an error, line breaks folded; `[Errno 2]` and its like put into words."""
    if isinstance(error, OSError) and error.strerror:
        return clean(f"{error.filename}: {error.strerror}" if error.filename else error.strerror)
    return clean(str(error)) or type(error).__name__


def clean(message: str) -> str:
    """One line without control characters, whatever labels and file names it quotes."""
    from spar_hf.visualize import plain_text

    return plain_text(message)


def fail(program: str, message: str, status: int) -> int:
    """Prints the line of an error and returns the status."""
    print(f"{program}: error: {message}", file=sys.stderr)
    return status


@contextmanager
def caught_signals() -> Iterator[list[int]]:
    """Inside, the first SIGINT or SIGTERM is put into the list instead of ending the process; a second one ends it."""
    caught: list[int] = []
    before: dict[int, Any] = {}

    def catch(number: int, frame: Any) -> None:
        caught.append(number)
        restore()

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, catch)
    try:
        yield caught
    finally:
        restore()
