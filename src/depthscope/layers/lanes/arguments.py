"""How the arguments that a model hands to its layers grow with the batch, learnt by handing it two sizes of one.

Masks, position embeddings, ALiBi biases or inputs of a layer's own have the batch along some axis, or several entries a
sequence, or none at all; which, differs from model to model. Both passes go through no layer, so they cost next to
nothing.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from depthscope.errors import AnalysisError
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import LayerResult, PassThrough
from depthscope.layers.tracing import MODEL_FAILURES

__all__ = ["Arguments", "learn_arguments"]


@dataclass(frozen=True)
class _Grows:
    """A tensor with `each` entries a sequence along an axis."""

    axis: int
    each: int
    size: int  # of the axis, for the batch that it was learnt with


CONSTANT = None  # the same for every batch


@dataclass(frozen=True)
class Arguments:
    """How the arguments of one layer grow with the batch, the residual stream left out.

    Attributes:
        by_position: of each argument by position after the residual stream.
        by_name: of each argument by name.
    """

    by_position: tuple[Any, ...]
    by_name: Mapping[str, Any]

    def of_rows(
        self, args: tuple[Any, ...], kwargs: Mapping[str, Any], rows: Tensor
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The arguments for other rows of the same batch, [R], which may repeat."""
        if len(args[1:]) != len(self.by_position) or kwargs.keys() - {"hidden_states"} != self.by_name.keys():
            raise AnalysisError("A layer got other arguments than in the pass before; run the analysis again.")
        chosen = [_of_rows(value, how, rows) for value, how in zip(args[1:], self.by_position, strict=True)]
        named = {name: _of_rows(value, self.by_name.get(name), rows) for name, value in kwargs.items()}
        return (*args[:1], *chosen), named


class _Recorder(PassThrough):
    """Passes the residual stream on, and keeps the layer's other arguments."""

    def forward(self, *args: Any, **kwargs: Any) -> LayerResult:
        """Keep the arguments."""
        named = {name: value for name, value in kwargs.items() if name != "hidden_states"}
        self.arguments: tuple[tuple[Any, ...], dict[str, Any]] = args[1:], named
        return super().forward(*args, **kwargs)


class _Unlike(Exception):
    """Two arguments differ in a way that is not understood."""


def learn_arguments(stack: LayerStack, input_ids: Tensor, attention_mask: Tensor | None) -> list[Arguments] | None:
    """How each layer's arguments grow from a batch [B, T] to one with a row more; None where that is not clear."""
    count = len(input_ids)
    recorders = [_Recorder() for _ in stack.layers]
    seen = []
    try:
        for rows in (torch.arange(count), torch.arange(count + 1) % count):
            with stack.replacing(dict(enumerate(recorders))):
                mask = None if attention_mask is None else attention_mask[rows]
                stack.run_through(stack.num_layers - 1, input_ids[rows], mask)
            seen.append([recorder.arguments for recorder in recorders])
        return [
            Arguments(
                tuple(_growth(one, other, count) for one, other in zip(args, more_args, strict=True)),
                {name: _growth(value, more_kwargs[name], count) for name, value in kwargs.items()},
            )
            for (args, kwargs), (more_args, more_kwargs) in zip(*seen, strict=True)
        ]
    except (_Unlike, *MODEL_FAILURES):
        return None


def _growth(one: Any, other: Any, count: int) -> Any:
    """How a value for `count` sequences becomes that for one more."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        axes = [axis for axis, sizes in enumerate(zip(one.shape, other.shape, strict=False)) if sizes[0] != sizes[1]]
        if one.dim() != other.dim() or len(axes) > 1:
            raise _Unlike
        if not axes:
            return CONSTANT
        each = other.shape[axes[0]] - one.shape[axes[0]]
        if each < 1 or one.shape[axes[0]] != each * count:
            raise _Unlike
        return _Grows(axes[0], each, each * count)
    if isinstance(one, tuple | list) and type(one) is type(other) and len(one) == len(other):
        parts = [_growth(a, b, count) for a, b in zip(one, other, strict=True)]
        return CONSTANT if all(part is CONSTANT for part in parts) else parts
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        named = {name: _growth(value, other[name], count) for name, value in one.items()}
        return CONSTANT if all(part is CONSTANT for part in named.values()) else named
    if one is other or (isinstance(one, bool | int | float | str) and one == other):
        return CONSTANT
    raise _Unlike


def _of_rows(value: Any, how: Any, rows: Tensor) -> Any:
    if how is CONSTANT:
        return value
    if isinstance(how, _Grows):
        if not isinstance(value, Tensor) or value.shape[how.axis] != how.size:
            raise AnalysisError("A layer got other arguments than in the pass before; run the analysis again.")
        if how.size == 1:  # a view will do
            sizes = [-1] * value.dim()
            sizes[how.axis] = len(rows)
            return value.expand(sizes)
        index = rows if how.each == 1 else (rows[:, None] * how.each + torch.arange(how.each)).flatten()
        return value.index_select(how.axis, index.to(value.device))
    if isinstance(how, dict):
        return {name: _of_rows(part, how[name], rows) for name, part in value.items()}
    parts = [_of_rows(part, each, rows) for part, each in zip(value, how, strict=True)]
    return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
