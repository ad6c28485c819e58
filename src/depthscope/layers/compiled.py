"""Models that `torch.compile` has compiled, whole or in parts.

Compiled code holds the hooks that were there when it was compiled, and no others: a hook that comes later is never
called, and one that has gone still is. So whoever only looks at a model runs it as it is written, and who trains it
compiled has the code made anew after hooks came or went.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch._dynamo import OptimizedModule

__all__ = ["as_written", "class_name", "forget_compiled", "is_compiled", "written"]


def written(module: nn.Module) -> nn.Module:
    """The module as its author wrote it, taken out of what `torch.compile(module)` returns."""
    while isinstance(module, OptimizedModule):
        module = module._orig_mod
    return module


def class_name(module: nn.Module) -> str:
    """The name of the class that a module was written as."""
    return type(written(module)).__name__


def is_compiled(model: nn.Module) -> bool:
    """Whether a model or any of its modules was given to `torch.compile`, in whatever way."""
    return any(
        isinstance(module, OptimizedModule)
        or getattr(module, "_compiled_call_impl", None) is not None
        or hasattr(module.forward, "_torchdynamo_orig_callable")
        for module in model.modules()
    )


@contextmanager
def as_written() -> Iterator[None]:
    """Run everything inside as it is written, compiled or not, so that every hook is called."""
    with torch.compiler.set_stance("force_eager"):
        yield


def forget_compiled() -> None:
    """Have everything compiled anew when it is called next, with the hooks that are there then."""
    torch.compiler.reset()
