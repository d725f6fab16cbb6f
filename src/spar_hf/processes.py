"""Several processes, on one machine or many, that share a work: who of them this is, as `accelerate launch` says."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

T = TypeVar("T")
# The work of one process may end hours before another's, and waiting for it is no fault.
PATIENCE = timedelta(days=30)


@dataclass(frozen=True)
class Processes:
    """The processes that share a work; alone where nothing else was launched.

    Attributes:
        index: of this process, from 0.
        count: of them all.
    """

    index: int = 0
    count: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this one writes what is about all."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """The part of some items that is this process's; together the parts are all of them, each once."""
        return items[self.index :: self.count]

    def gather(self, part: Any) -> list[Any]:
        """What every process gave, in the order of their numbers; waits for them all."""
        if self.count == 1:
            return [part]
        from accelerate.utils import gather_object

        return gather_object([part])

    def wait(self) -> None:
        """Returns when every process has come here."""
        self.gather(None)


ALONE = Processes()


def launched() -> bool:
    """Whether `accelerate launch`, or torchrun, has started several processes."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes() -> Processes:
    """The processes of this launch, connected."""
    if not launched():
        return ALONE
    state = _state()
    return Processes(state.process_index, state.num_processes)


def own_device() -> Any:
    """This process's device among those of the launch."""
    return _state().device


def _state() -> Any:
    from accelerate import PartialState
    from accelerate.utils import parse_flag_from_env

    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=PATIENCE)


def leave() -> None:
    """Ends the connection to the others, if there is one; the work is done."""
    import torch.distributed

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
