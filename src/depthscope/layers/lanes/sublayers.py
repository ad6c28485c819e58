"""Attention and MLP of each layer, as parts that something else can stand in for; for which that holds, is tried.

A layer usually computes `h + attention(norm(h))` and adds the MLP of that in the same way, so that what a part returns
can be set to zero, which leaves the part out, or to something computed from what the part is given. Some layers are
built otherwise. Each is tried, at its place in one pass over the small example:

- Leaving a part out must leave the residual stream there. Where a part adds the stream itself (Bloom's attention and
  MLP do), its zeros would cut it. Tried with a random stream, so large that the other part adds little to it: the
  layer's output must still point along it. Random, because the small stream of a trained first layer is lost in what
  the layer adds to it.
- What the part returns must matter: another value must change the layer's output.
- If the MLP is given the same whatever the attention returns, the two are parallel.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from depthscope.layers.modes import evaluating
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import LayerResult, StandIn, hidden_among, hidden_of, with_hidden
from depthscope.layers.tracing import MODEL_FAILURES, PARTS, TRACE_BATCH

__all__ = ["Change", "Part", "Sublayers", "WithPart", "given_to", "sublayers_of", "zeros"]

# How much larger than the example's own stream the random one is.
LOUD = 100.0
# The mean cosine of the random stream with the layer's output, above which the layer carries it on.
CARRIED = 0.2

_TRIED: WeakKeyDictionary[LayerStack, "Sublayers"] = WeakKeyDictionary()


@dataclass(frozen=True)
class Part:
    """The attention or the MLP of one layer.

    Attributes:
        layer: the layer.
        name: "attention" or "mlp".
        module: the submodule.
        features: the widths of what it is given and of what it returns, where both are one vector a token, in the
            same order of tokens; else None, and no map of the one to the other can be made.
        token_first: whether those tokens are in the order [T, B] rather than [B, T].
    """

    layer: int
    name: str
    module: nn.Module
    features: tuple[int, int] | None
    token_first: bool

    def tokens(self, mask: Tensor) -> Tensor:
        """A mask [B, T] in the order of the part's tokens, [B * T]."""
        return (mask.T if self.token_first else mask).flatten()


@dataclass
class Sublayers:
    """The parts of all layers, by what can be done with them.

    Attributes:
        usable: those that can be left out and replaced, in the order of the layers.
        cutting: the layers in which leaving a part out would cut the residual stream, by part.
        failing: the layers in which it fails or changes nothing, by part.
        missing: the layers without such a part, by part.
        parallel: the layers whose attention and MLP do not see each other.
    """

    usable: list[Part] = field(default_factory=list)
    cutting: dict[str, list[int]] = field(default_factory=dict)
    failing: dict[str, list[int]] = field(default_factory=dict)
    missing: dict[str, list[int]] = field(default_factory=dict)
    parallel: list[int] = field(default_factory=list)


Change = Callable[[Tensor | None, Tensor], Tensor]


class WithPart(StandIn):
    """Runs the layer with something else in place of what one of its submodules returns.

    Args:
        part: the submodule.
        change: gets what the submodule is given and what it returns, and gives what it shall return: the first entry
            of its tuple, the others stay.
    """

    layer_forwards = 1

    def __init__(self, part: nn.Module, change: Change) -> None:
        super().__init__(nn.Identity())
        object.__setattr__(self, "_part", part)  # it stays a submodule of the model alone
        object.__setattr__(self, "_change", change)

    def forward(self, *args: Any, **kwargs: Any) -> LayerResult:
        """Run the layer."""
        with _changed(self._part, self._change):
            result: LayerResult = self._layer(*args, **kwargs)
            return result


def given_to(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor | None:
    """The hidden state that a submodule is given: the first argument, or the one of the usual name."""
    given = args[0] if args else kwargs.get("hidden_states")
    return given if isinstance(given, Tensor) else None


@contextmanager
def _changed(module: nn.Module, change: Change) -> Iterator[None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: LayerResult) -> LayerResult:
        changed = change(given_to(args, kwargs), hidden_of(result))
        if isinstance(result, tuple) and hasattr(result, "_fields"):
            return type(result)(changed, *result[1:])
        return type(result)([changed, *result[1:]]) if isinstance(result, tuple | list) else changed

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def sublayers_of(stack: LayerStack) -> Sublayers:
    """The parts of all layers, as tried in one pass over the small example when they are first asked for."""
    if stack not in _TRIED:
        found = Sublayers()
        trials = {index: _Trial(stack, index, found) for index in range(stack.num_layers)}
        with evaluating(stack.model), torch.no_grad(), stack.replacing(dict(trials)):
            stack.run_through(stack.num_layers - 1, stack.example_ids)
        _TRIED[stack] = found
    return _TRIED[stack]


@dataclass
class _Seen:
    """One run of a layer: its output, and what each part was given and returned."""

    output: Tensor
    given: dict[str, Tensor | None]
    returned: dict[str, Tensor]
    changed: set[str]  # the parts that write into what they are given


class _Trial(StandIn):
    """Tries the parts of a layer, and then lets it do its work."""

    def __init__(self, stack: LayerStack, index: int, found: Sublayers) -> None:
        super().__init__(nn.Identity())
        self.stack, self.index, self.found = stack, index, found
        modules = {name: stack.sublayer(index, name) for name in PARTS}
        object.__setattr__(self, "modules_by_name", {name: each for name, each in modules.items() if each is not None})

    def forward(self, *args: Any, **kwargs: Any) -> LayerResult:
        """Return what the layer returns."""
        with self.stack.aside():
            self._try(args, kwargs)
        # Last, so that what a layer leaves behind for later ones is its own.
        result: LayerResult = self._layer(*args, **kwargs)
        return result

    def _try(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for name in PARTS:
            if name not in self.modules_by_name:
                self.found.missing.setdefault(name, []).append(self.index)
        if not self.modules_by_name:
            return
        hidden = hidden_among(args, kwargs)
        noise = self._noise(hidden)
        own = self._run(args, kwargs, hidden)
        for name in self.modules_by_name:
            try:
                other = self._run(args, kwargs, hidden, name, _disturbed)
                without = self._run(args, kwargs, noise, name, zeros)
            except MODEL_FAILURES:
                self.found.failing.setdefault(name, []).append(self.index)
                continue
            if not torch.isfinite(without.output).all() or torch.equal(other.output, own.output):
                self.found.failing.setdefault(name, []).append(self.index)
            elif self._carried(noise, without.output) < CARRIED:
                self.found.cutting.setdefault(name, []).append(self.index)
            else:
                self.found.usable.append(self._part(name, own))
            if name == "attention" and _is_same(own.given.get("mlp"), other.given.get("mlp")):
                self.found.parallel.append(self.index)

    def _run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        hidden: Tensor,
        changed: str | None = None,
        change: Change | None = None,
    ) -> _Seen:
        """Run the layer on a stream, with one part changed."""
        seen = _Seen(hidden, {}, {}, set())
        versions: dict[str, int] = {}
        handles = []

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                given = given_to(args, kwargs)
                seen.given[name] = None if given is None else given.clone()
                versions[name] = 0 if given is None else given._version

            return hook

        def after(name: str) -> Callable[..., LayerResult | None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: LayerResult) -> None:
                given = given_to(args, kwargs)
                seen.returned[name] = hidden_of(result).clone()
                if given is not None and given._version != versions[name]:
                    seen.changed.add(name)

            return hook

        try:
            for name, module in self.modules_by_name.items():
                handles.append(module.register_forward_pre_hook(before(name), with_kwargs=True))
                handles.append(module.register_forward_hook(after(name), with_kwargs=True))
            args, kwargs = with_hidden(args, kwargs, hidden.clone())
            if changed is None or change is None:
                seen.output = hidden_of(self._layer(*args, **kwargs)).clone()
            else:
                with _changed(self.modules_by_name[changed], change):
                    seen.output = hidden_of(self._layer(*args, **kwargs)).clone()
        finally:
            for handle in handles:
                handle.remove()
        return seen

    def _noise(self, hidden: Tensor) -> Tensor:
        """A random stream in the layout of another, much larger, the same at every call."""
        size = float(hidden.double().square().mean().sqrt()) or 1.0
        size = min(LOUD * size, torch.finfo(hidden.dtype).max / 10)
        sequences, tokens, streams, width = self.stack.features(hidden).shape
        drawn = torch.randn((sequences, tokens, 1, width), generator=torch.Generator().manual_seed(0))
        # The same in all parallel streams, so that no mixture of them is another.
        everywhere = drawn.expand(-1, -1, streams, -1).flatten(2)
        return (size * self.stack.unflat(everywhere)).to(hidden)

    def _carried(self, noise: Tensor, output: Tensor) -> float:
        """The mean cosine over tokens of a stream with what the layer made of it."""
        one, other = (self.stack.flat(stream).double() for stream in (noise, output))
        return float(torch.nn.functional.cosine_similarity(one, other, dim=-1).mean())

    def _part(self, name: str, own: _Seen) -> Part:
        given, returned = own.given[name], own.returned[name]
        length = self.stack.example_ids.shape[1]
        flat_order = (length, TRACE_BATCH) if self.stack.token_first() else (TRACE_BATCH, length)
        into, out = (_order(tensor, length, flat_order) for tensor in (given, returned))
        alike = into is not None and into == out and name not in own.changed
        features = (given.shape[-1], returned.shape[-1]) if alike and given is not None else None
        return Part(self.index, name, self.modules_by_name[name], features, into == (length, TRACE_BATCH))


def _order(tensor: Tensor | None, length: int, flat: tuple[int, int]) -> tuple[int, int] | None:
    """The order of the example's tokens in a tensor; None where it is not one vector a token."""
    if tensor is None or not tensor.is_floating_point() or tensor.dim() < 2:
        return None
    if tensor.shape[:-1].numel() != TRACE_BATCH * length:
        return None
    first = tuple(size for size in tensor.shape[:-1] if size != 1)
    return first if first in {(TRACE_BATCH, length), (length, TRACE_BATCH)} else flat


def zeros(given: Tensor | None, returned: Tensor) -> Tensor:
    """Nothing, in place of what a part returns: the part is left out."""
    return torch.zeros_like(returned)


def _disturbed(given: Tensor | None, returned: Tensor) -> Tensor:
    """Something else of about the same size."""
    size = float(returned.double().square().mean().sqrt()) or 1.0
    drawn = torch.randn(returned.shape, generator=torch.Generator().manual_seed(1))
    return returned + (size * drawn).to(returned)


def _is_same(one: Tensor | None, other: Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
