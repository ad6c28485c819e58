"""Layers whose weights lie elsewhere (on the disk, in main memory) and come to the device when the layer runs.

accelerate's hooks bring them: each part of a layer fetches its own weights at every call, and lets go of them after it.
Here a layer's weights are held for as many calls as there are experiments, so that they are read once for all of them;
and what is tried on a small example before an analysis borrows the weights of the first layer of its shape, because it
asks how the model's code works, not what its weights are.
"""

from collections.abc import Hashable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

__all__ = ["borrowing_weights", "holding_weights", "is_offloaded"]


def is_offloaded(module: nn.Module) -> bool:
    """Whether some of a module's weights are fetched when it runs."""
    return any(_is_hooked(part) for part in module.modules())


@contextmanager
def holding_weights(module: nn.Module) -> Iterator[None]:
    """Fetch a module's weights once for all calls inside; nothing happens where they are there already."""
    with ExitStack() as stack:
        for part in module.modules():
            if _fetches(part):
                hook: Any = part._hf_hook
                stack.callback(hook.post_forward, part, None)
                hook.pre_forward(part)
                stack.enter_context(_calling_directly(part))
        yield


@contextmanager
def borrowing_weights(model: nn.Module) -> Iterator[None]:
    """Let each layer whose weights are elsewhere work with those of the first layer of equal shape, held meanwhile.

    What comes out is not what the model says, but is computed in the same way.
    """
    lists = [items for items in model.modules() if isinstance(items, nn.ModuleList)]
    outermost = [items for items in lists if not any(items is not other and _is_in(items, other) for other in lists)]
    with ExitStack() as stack:
        for items in outermost:
            lenders: dict[Hashable, nn.Module] = {}
            for layer in items:
                if not is_offloaded(layer):
                    continue
                lender = lenders.setdefault(_shape(layer), layer)
                if lender is layer:
                    stack.enter_context(holding_weights(layer))
                else:
                    stack.enter_context(_borrowing(layer, lender))
        yield


@contextmanager
def _borrowing(layer: nn.Module, lender: nn.Module) -> Iterator[None]:
    with ExitStack() as stack:
        for part, its in zip(layer.modules(), lender.modules(), strict=True):
            if _fetches(part):
                for name, weight in part._parameters.items():
                    stack.callback(part._parameters.__setitem__, name, weight)
                    part._parameters[name] = its._parameters[name]
                stack.enter_context(_calling_directly(part))
        yield


@contextmanager
def _calling_directly(part: nn.Module) -> Iterator[None]:
    """Call a module without the hook that accelerate put before its forward pass."""
    hooked = part.__dict__["forward"]
    part.__dict__["forward"] = part._old_forward
    try:
        yield
    finally:
        part.__dict__["forward"] = hooked


def _fetches(part: nn.Module) -> bool:
    """Whether a module's own weights are elsewhere at this moment."""
    own = next(part.parameters(recurse=False), None)
    return own is not None and own.is_meta and _is_hooked(part)


def _is_hooked(part: nn.Module) -> bool:
    hook = getattr(part, "_hf_hook", None)
    return any(getattr(each, "offload", False) for each in getattr(hook, "hooks", (hook,)))


def _is_in(items: nn.Module, other: nn.Module) -> bool:
    return any(items is part for part in other.modules())


def _shape(layer: nn.Module) -> Hashable:
    """What two layers have in common that may lend each other their weights."""
    weights = tuple((name, tuple(weight.shape), weight.dtype) for name, weight in layer.named_parameters())
    return tuple((name, type(part).__name__) for name, part in layer.named_modules()), weights
