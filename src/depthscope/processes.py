"""The processes that share an analysis: one by itself, or those that `torchrun` started.

Work that one process does alone may fail in that process only, while the others wait in the next exchange of tensors
until it times out. So before each exchange all processes report whether they failed, and all stop if one did.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

import depthscope.errors
from depthscope.errors import DepthscopeError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many that share the work.

    `in_step` is for work that each process does in whole, as with a sharded model, but that must go on or end in all.
    """

    rank: int
    count: int
    device: torch.device
    in_step: bool = False

    @classmethod
    def here(cls) -> "Processes":
        """The processes of this run, joined if `torchrun` (or accelerate) started several."""
        # Without `cpu=True`, accelerate does not join processes that have no accelerator.
        state = PartialState(cpu=not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process shows progress and writes files."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """This process's share of some rows: every `count`-th."""
        return list(rows)[self.rank :: self.count]

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run work that may fail in one process; if it does, all processes raise an error.

        Every process must enter it and call `add_up` and `add_up_tables` inside it equally often.

        Raises:
            DepthscopeError: another process failed; of the class that it raised, if that is one of ours.
        """
        try:
            yield
        except BaseException as error:
            if not getattr(error, "of_peer", False):  # the other processes know of that failure
                self._exchange_failures(error)
            raise
        self._raise_failures()

    def add_up(self, *tensors: Tensor) -> None:
        """Add tensors up over all processes, in place; see `together`."""
        if self.count > 1:
            self._raise_failures()
            for tensor in tensors:
                self._reduce(tensor)

    def add_up_tables(self, tables: dict[str, np.ndarray]) -> None:
        """Add named arrays up over all processes, in place; a process that has no such array starts from zeros."""
        if self.count == 1:
            return
        self._raise_failures()
        shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(self.count)]
        dist.all_gather_object(shapes, {name: table.shape for name, table in tables.items()})
        for name, shape in sorted({name: shape for each in shapes for name, shape in each.items()}.items()):
            self._reduce(torch.from_numpy(tables.setdefault(name, np.zeros(shape))))

    def agreed(self, decision: T) -> T:
        """What the main process has decided, in all processes; see `together`."""
        if self.count > 1:
            self._raise_failures()
        if (self.count > 1 or self.in_step) and dist.is_available() and dist.is_initialized():
            decided = [decision]
            dist.broadcast_object_list(decided, 0, device=self.device)
            return decided[0]
        return decision

    def _reduce(self, tensor: Tensor) -> None:
        moved = tensor.to(self.device)
        dist.all_reduce(moved)
        tensor.copy_(moved)

    def _raise_failures(self) -> None:
        """Raise an error if a process failed; every process calls this at the same points."""
        for rank, failure in enumerate(self._exchange_failures(None)):
            if failure is not None:
                name, text = failure
                kind = getattr(depthscope.errors, name, DepthscopeError)
                error = kind(f"Process {rank} of {self.count} failed, so all of them left: {name}: {text}")
                error.of_peer = True
                raise error

    def _exchange_failures(self, error: BaseException | None) -> list[tuple[str, str] | None]:
        """Exchange failures: for each process the class and the message of its error, or None."""
        failures: list[tuple[str, str] | None] = [None] * self.count
        if self.count > 1:
            dist.all_gather_object(failures, None if error is None else (type(error).__name__, str(error)))
        return failures
