"""Counts what an analysis really ran: forward passes of layers and of the head, and the time spent inside them.

What is left of the wall time is overhead: masks, hooks, statistics, solving, book-keeping.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field

from torch import nn


@dataclass
class Meter:
    """Layer forwards and head passes, in tokens, and the seconds spent in each."""

    layer_tokens: int = 0
    head_tokens: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"layers": 0.0, "head": 0.0})

    def layer_forwards(self, tokens: int) -> float:
        """Forward passes of one layer over `tokens` tokens."""
        return self.layer_tokens / tokens


@contextmanager
def metering(layers: nn.ModuleList, head: nn.Module) -> Iterator[Meter]:
    """Count and time the layers' and the head's own forward passes while the block runs."""
    meter = Meter()
    with ExitStack() as stack:
        for module, name in [*((layer, "layers") for layer in layers), (head, "head")]:
            original = module.forward
            module.forward = _timed(original, meter, name)
            stack.callback(module.__dict__.pop, "forward")
        yield meter


def _timed(forward: Callable[..., object], meter: Meter, name: str) -> Callable[..., object]:
    def timed(*args: object, **kwargs: object) -> object:
        tokens = args[0].shape[:-1].numel()
        if name == "layers":
            meter.layer_tokens += tokens
        else:
            meter.head_tokens += tokens
        start = time.perf_counter()
        try:
            return forward(*args, **kwargs)
        finally:
            meter.seconds[name] += time.perf_counter() - start

    return timed
