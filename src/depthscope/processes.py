"""The processes that share an analysis: one by itself, or those that `torchrun` started."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from depthscope.scores.base import Array


@dataclass(frozen=True)
class Processes:
    """Which process this is, of how many."""

    rank: int
    count: int
    device: torch.device

    @classmethod
    def here(cls) -> "Processes":
        """The processes of this run, joined if `torchrun` (or accelerate) started several."""
        # Without being told, accelerate does not join processes that have no accelerator.
        state = PartialState(cpu=not torch.accelerator.is_available())
        return cls(state.process_index, state.num_processes, state.device)

    @property
    def is_main(self) -> bool:
        """Whether this process shows progress and writes files."""
        return self.rank == 0

    def share(self, rows: Sequence[int]) -> list[int]:
        """This process's share of some rows: every `count`-th."""
        return list(rows)[self.rank :: self.count]

    def add_up(self, tensor: Tensor) -> None:
        """Add a tensor up over all processes, in place."""
        if self.count > 1:
            moved = tensor.to(self.device)
            dist.all_reduce(moved)
            tensor.copy_(moved)

    def add_up_tables(self, tables: dict[str, Array]) -> None:
        """Add named arrays up over all processes, in place; a process that had nothing to do starts from zeros."""
        if self.count == 1:
            return
        shapes: list[dict[str, tuple[int, ...]]] = [{} for _ in range(self.count)]
        dist.all_gather_object(shapes, {name: table.shape for name, table in tables.items()})
        for name, shape in sorted({name: shape for known in shapes for name, shape in known.items()}.items()):
            self.add_up(torch.from_numpy(tables.setdefault(name, np.zeros(shape))))
