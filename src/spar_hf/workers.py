"""Processes that read pictures ahead of the network and write results behind it. Imports no PyTorch.

with Workers(tool, 2) as workers:
    for number, future in workers.ahead("read", numbers, lambda: 8):
        picture = workers.result(future)
        ...
        written = workers.submit("write", result)
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from types import TracebackType
from typing import Any, TypeVar

T = TypeVar("T")
NICENESS = 5  # of the processes: on a CPU that is busy with the network they take what it leaves
DIED = (
    "a process that reads and writes pictures has died, perhaps for want of memory. What was written is intact; run "
    "the same command again with --resume, and fewer --workers"
)
_tool: Any = None  # in a worker: what it works with


class Workers:
    """Calls methods of a tool in processes, each of which has a copy of its own.

    Args:
        tool: what has the methods, and `begin`, which is called first in each process with a number from 0.
        count: of processes; with 0, calls run in this process, at once.
    """

    def __init__(self, tool: Any, count: int) -> None:
        self.tool, self.count = tool, count
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> Workers:
        if self.count:
            # Words are read before: what tokenizers says about forks, and does after them, is of no concern.
            os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
            # Where processes fork they start at once, and with what this one has imported.
            forks = sys.platform == "linux"
            context = multiprocessing.get_context("fork" if forks else "spawn")
            numbers = context.SimpleQueue()
            for number in range(self.count):
                numbers.put(number)
            self._pool = ProcessPoolExecutor(self.count, context, _begin, (self.tool, os.getpid(), numbers))
        else:
            self.tool.begin(0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        """Begins a call."""
        if self._pool is not None:
            try:
                return self._pool.submit(_call, method, *arguments)
            except BrokenProcessPool:
                raise OSError(DIED) from None
        future: Future[Any] = Future()
        try:
            future.set_result(getattr(self.tool, method)(*arguments))
        except Exception as error:
            future.set_exception(error)
        return future

    def ahead(self, method: str, items: Iterable[T], depth: Callable[[], int]) -> Iterator[tuple[T, Future[Any]]]:
        """Each item and the call with it, in order; the calls of the `depth()` items after it have begun."""
        waiting: deque[tuple[T, Future[Any]]] = deque()
        for item in items:
            waiting.append((item, self.submit(method, item)))
            while len(waiting) > (depth() if self.count else 0):
                yield waiting.popleft()
        yield from waiting

    @staticmethod
    def result(future: Future[Any]) -> Any:
        """What a call has given.

        Raises:
            OSError: the process has died.
            Exception: what the call has raised.
        """
        try:
            return future.result()
        except BrokenProcessPool:
            raise OSError(DIED) from None


def _begin(tool: Any, parent: int, numbers: Any) -> None:
    """The start of a worker: signals are its parent's to handle, whose end is its own."""
    global _tool
    _tool = tool
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if hasattr(os, "nice"):
        os.nice(NICENESS)
    if "torch" in sys.modules:  # OpenMP's threads do not survive a fork
        sys.modules["torch"].set_num_threads(1)

    def end_with_parent() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    tool.begin(numbers.get())


def _call(method: str, *arguments: Any) -> Any:
    return getattr(_tool, method)(*arguments)
