"""Modules that take a decoder layer's place for a while: skip it, replace its map, feed the next one, stop there.

A stand-in takes whatever arguments the layer would get, returns the layer's shape of result (a tensor, or a tuple or
list that starts with one) and lets the model read the layer's attributes (`attention_type`, `block_type`, ...) off it.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

LayerResult = Tensor | tuple[Any, ...] | list[Any]


def hidden_of(result: LayerResult) -> Tensor:
    """The residual stream in what a decoder layer returned."""
    return result[0] if isinstance(result, tuple | list) else result


def hidden_among(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The residual stream among a decoder layer's arguments: the first by position, or by its usual name."""
    return args[0] if args else kwargs["hidden_states"]


def with_hidden(
    args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A decoder layer's arguments with another residual stream among them."""
    if args:
        return (hidden, *args[1:]), kwargs
    return args, {**kwargs, "hidden_states": hidden}


def result_like(example: LayerResult) -> Callable[[Tensor], LayerResult]:
    """A function that gives a hidden state the shape of the layer's own result: its container, other entries empty."""
    if isinstance(example, tuple | list):
        container, length = type(example), len(example)
        return lambda hidden: container([hidden, *[None] * (length - 1)])
    return lambda hidden: hidden


class StandIn(nn.Module):
    """Stands in for a decoder layer: applies `inner` to the hidden state, ignores the layer's other arguments.

    It is bound to a layer's place by `bound_to`, which `LayerStack.replacing` calls.

    Class attribute:
        layer_forwards: how many layers it runs, for estimates of the work.
    """

    layer_forwards = 0

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def bound_to(self, layer: nn.Module, as_result: Callable[[Tensor], LayerResult]) -> "StandIn":
        """Bind to a layer: read its attributes, return its shape of result."""
        # Not registered as a submodule: the layer's parameters do not belong to what replaces it.
        object.__setattr__(self, "_layer", layer)
        object.__setattr__(self, "_as_result", as_result)
        return self

    def forward(self, *args: Any, **kwargs: Any) -> LayerResult:
        """Map the hidden state [B, T, d] and return it in the layer's shape of result."""
        return self._as_result(self.inner(hidden_among(args, kwargs)))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name.startswith("__") or "_layer" not in self.__dict__:
                raise
            return getattr(self.__dict__["_layer"], name)


class PassThrough(StandIn):
    """Returns the hidden state as it came: the layer is skipped."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())


class Moved(StandIn):
    """A layer of the model at the place of another, with what belongs to that place and not to a layer.

    That is what the layer's class names in `positional_attributes` (DepthLM's LayerNorm Scaling factor, for one).
    """

    layer_forwards = 1

    def __init__(self, layer: nn.Module) -> None:
        super().__init__(nn.Identity())
        layer = layer._moved if isinstance(layer, Moved) else layer
        object.__setattr__(self, "_moved", layer)  # it stays a submodule of the model alone

    def forward(self, *args: Any, **kwargs: Any) -> LayerResult:
        """Run the layer as if it had been here all the time."""
        names = getattr(self._moved, "positional_attributes", ())
        own = {name: getattr(self._moved, name) for name in names}
        try:
            for name in names:
                setattr(self._moved, name, getattr(self._layer, name))
            return self._moved(*args, **kwargs)
        finally:
            for name, value in own.items():
                setattr(self._moved, name, value)


class Feed(StandIn):
    """Returns a hidden state that was kept earlier, whatever comes in."""

    def __init__(self, hidden: Tensor) -> None:
        super().__init__(nn.Identity())
        self._hidden = hidden

    def forward(self, *args: Any, **kwargs: Any) -> LayerResult:
        """Return the kept hidden state in the layer's shape of result."""
        return self._as_result(self._hidden)


class StopForward(Exception):
    """Raised to leave a forward pass where nothing more of it is needed."""


class Stopper(StandIn):
    """Ends the forward pass when it is reached."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def forward(self, *args: Any, **kwargs: Any) -> LayerResult:
        """Raise `StopForward`."""
        raise StopForward


class AffineMap(nn.Module):
    """The affine map `h W + b`, or with `residual` the affine update `h + (h W + b)`.

    The residual form keeps the precision of the stream where the update is small beside it.

    Args:
        weight: [d, d], acts on row vectors from the right.
        bias: [d].
        residual: add the map's result to the hidden state.
        dtype: what to compute in; the result has the hidden state's own dtype.
    """

    def __init__(
        self, weight: Tensor, bias: Tensor, *, residual: bool = False, dtype: torch.dtype = torch.float32
    ) -> None:
        super().__init__()
        self.weight: Tensor
        self.bias: Tensor
        self.register_buffer("weight", weight.to(dtype))
        self.register_buffer("bias", bias.to(dtype))
        self.residual = residual

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., d] to [..., d]."""
        weight = self.weight.to(hidden.device)
        mapped = hidden.to(weight.dtype) @ weight + self.bias.to(hidden.device)
        return (hidden + mapped if self.residual else mapped).to(hidden.dtype)
