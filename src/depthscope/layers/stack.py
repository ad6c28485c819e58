"""The decoder layers of any causal language model: find them, watch them, and let something else stand in for them.

`LayerStack` finds the layers by tracing one small forward pass, so it needs no list of architectures. Every experiment
puts a stand-in module in a layer's place, inside a context manager that restores the model whatever happens inside. No
forward pass is re-implemented: masks, positions, caches, final norm, head and loss stay the model's own code.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property, partial
from math import prod
from typing import Any

import torch
from torch import Tensor, nn

from depthscope.errors import AnalysisError, NoLayerStackError
from depthscope.layers.compiled import as_written, class_name, is_compiled
from depthscope.layers.modes import evaluating
from depthscope.layers.offloaded import is_offloaded
from depthscope.layers.stand_ins import (
    Feed,
    PassThrough,
    StandIn,
    StopForward,
    Stopper,
    hidden_among,
    hidden_of,
    with_hidden,
)
from depthscope.layers.tracing import MODEL_FAILURES, PARTS, Trace, input_device, run, text_config, trace_layers
from depthscope.wording.messages import counted

__all__ = ["Capture", "LayerStack"]


@dataclass
class Capture:
    """What `LayerStack.capture` saw in the last forward pass: tensors by layer, as the model passed them.

    `resid_pre` and `resid_post` hold the residual stream before and after each layer, `attn_out` and `mlp_out` the
    output of its attention (or other token mixer) and MLP where the layer has such a submodule.
    """

    resid_pre: dict[int, Tensor] = field(default_factory=dict)
    resid_post: dict[int, Tensor] = field(default_factory=dict)
    attn_out: dict[int, Tensor] = field(default_factory=dict)
    mlp_out: dict[int, Tensor] = field(default_factory=dict)


class LayerStack:
    """The stack of decoder layers of a causal language model, found by tracing.

        model                      any causal LM of transformers, PEFT-wrapped or split over devices
        └── layers: ModuleList     .path is its name, e.g. "model.layers"
            ├── 0: layer           h_0 (embeddings) -> h_1; `h` is [B, T, d], for some architectures [B, T, streams, d]
            ├── ...
            └── L-1: layer         its output goes to the final norm and the head

    Layers count from 0. All context managers restore the model on the way out, also after an exception or Ctrl-C, and
    nest. The model is neither copied nor changed otherwise. One that `torch.compile` compiled is run as it was written,
    because compiled code does not call hooks that came later.

    Args:
        model: a causal language model. Its weights must be loaded (not on `meta`, unless offloaded by accelerate).
        head: whether it must have a language-modelling head. With False any model with a plain stack of layers over
            token ids will do (a reward model, a classifier, an encoder): its layers can be watched, but `logits` and
            what needs them cannot be had.

    Raises:
        NoLayerStackError: no list of layers is called once each and in order; the message says what was found.
        NotCausalError: the model sees the tokens that it should predict.
        BatchDependentError: what it says of a text depends on the other texts of the batch, or on chance.
    """

    def __init__(self, model: nn.Module, *, head: bool = True) -> None:
        self.model = model
        self._trace: Trace = trace_layers(model, head=head)
        self.path: str = self._trace.path
        self.layers: nn.ModuleList = self._trace.layers
        self._written = False  # whether passes run as the model is written now
        self._is_aside = False  # whether a layer is run for something else than the model's own pass
        self._awaited: list[Callable[[int], list[int]]] = []  # each names the layers up to one that it did not see

    def __len__(self) -> int:
        return len(self.layers)

    def __repr__(self) -> str:
        return f"LayerStack({class_name(self.model)}, {self.path!r}, {counted(self.num_layers, 'layer')})"

    @property
    def num_layers(self) -> int:
        """The number of decoder layers, L."""
        return len(self.layers)

    @property
    def entry(self) -> nn.Module:
        """The module that takes the token ids: the model, or without `head` the language model in a wrapper."""
        return self._trace.entry

    @property
    def around(self) -> tuple[nn.Module, ...]:
        """The modules that the layers are in, from the model down to the one that runs through them."""
        names = self.path.split(".")[:-1]
        return tuple(self.model.get_submodule(".".join(names[:depth])) for depth in range(len(names) + 1))

    @property
    def layer_types(self) -> tuple[Hashable, ...]:
        """The type of each layer; only layers of equal type can be swapped."""
        return self._trace.layer_types

    @property
    def layer_type_names(self) -> tuple[str, ...]:
        """A readable name of each layer's type, such as `Gemma2DecoderLayer/sliding_attention`."""
        return self._trace.layer_type_names

    @cached_property
    def resumable(self) -> bool:
        """Whether `resume_from` gives the baseline's output here, as tried on a small example.

        It does not where later layers read what earlier ones left behind (shared keys and values, say).
        """
        places = sorted({min(1, self.num_layers - 1), self.num_layers // 2, self.num_layers - 1})
        with evaluating(self.model), torch.no_grad():
            with self.capture(resid_post=False) as capture:
                baseline = self.logits(self.example_ids)
            kept = dict(capture.resid_pre)
            return all(self._resumes(index, kept[index], baseline) for index in places)

    @cached_property
    def unskippable(self) -> dict[int, str]:
        """Layers that the model does not run without, with what it raised when they were skipped."""
        if self.resumable:  # tried with all layers but the last left out
            return {}
        found = {}
        with evaluating(self.model), torch.no_grad():
            for index in range(self.num_layers):
                try:
                    with self.skipping(index):
                        self.logits(self.example_ids)
                except MODEL_FAILURES as error:
                    found[index] = f"{type(error).__name__}: {error}"
        return found

    @property
    def example_ids(self) -> Tensor:
        """The token ids of the small example that the layers were found with, [B, T]."""
        return self._trace.example

    @property
    def example_logits(self) -> Tensor:
        """The logits of the small example that the layers were found with, [B, T, V]."""
        return self._require_logits(self._trace.logits)

    @cached_property
    def is_offloaded(self) -> bool:
        """Whether layers fetch their weights when they run."""
        return is_offloaded(self.layers)

    @property
    def vocabulary(self) -> int:
        """The number of logits of a token, V."""
        return self.example_logits.shape[-1]

    @property
    def batch_axis(self) -> int:
        """The axis of the residual stream that holds the sequences of a batch."""
        return self._trace.axes.batch

    @property
    def changes_in_place(self) -> bool:
        """Whether a layer writes into the tensor that it is given."""
        return self._trace.changes_in_place

    @property
    def virtual_tokens(self) -> int:
        """How many tokens the model puts before the text by itself (prompt tuning); the stream begins with them."""
        return self._trace.virtual_tokens

    @property
    def batch_effect(self) -> float:
        """How far the logits of a text move with the other texts of its batch, beside their spread: rounding."""
        return self._trace.batch_effect

    @property
    def width(self) -> int:
        """The number of features of a token's residual stream, S * d."""
        return prod(self._trace.axes.sizes)

    @property
    def device(self) -> torch.device:
        """The device that token ids go to."""
        return input_device(self.entry)

    def features(self, hidden: Tensor) -> Tensor:
        """View a residual stream as [B, T, S, d], S parallel streams (1 in all but a few architectures)."""
        return self._trace.axes.features(hidden)

    def flat(self, hidden: Tensor) -> Tensor:
        """View a residual stream as [B, T, S * d]."""
        return self.features(hidden).flatten(2)

    def unflat(self, flat: Tensor) -> Tensor:
        """Undo `flat`: [B, T, S * d] back to the model's own layout of the stream."""
        return self._trace.axes.restore(flat)

    def token_first(self, index: int | None = None, part: str = "") -> bool:
        """Whether tokens stand before sequences, [T, B, d], in the stream, or in what a sublayer of a layer returns."""
        return self._trace.axes.token_first if index is None else self._trace.token_first[index][part]

    def select(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """Pick sequences out of a batch: the residual stream of `rows`, in the model's own layout."""
        return hidden.index_select(self._trace.axes.batch, rows.to(hidden.device))

    def logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Run the model as it stands: ids [B, T] -> logits [B, T, V]; gradients as the caller has set them."""
        self._require_logits(self._trace.logits)
        with self.as_written():
            logits: Tensor = run(self.entry, input_ids, attention_mask).logits
        self._require_seen(self.num_layers - 1)
        return logits

    def run_through(self, last: int, input_ids: Tensor, attention_mask: Tensor | None = None) -> None:
        """Run the model up to and including layer `last` and stop there: no later layer, no final norm, no head."""
        with self.stopping_after(last), suppress(StopForward):
            run(self.entry, input_ids, attention_mask)
        self._require_seen(last)

    @contextmanager
    def replacing(self, replacements: Mapping[int, nn.Module]) -> Iterator[None]:
        """Put modules in the place of layers: each gets the hidden state first and returns the new one.

        A plain module (`nn.Linear`, `nn.Identity`, ...) is wrapped so that it takes the layer's other arguments,
        returns the layer's shape of result and still has the layer's attributes.
        """
        for index in replacements:
            self._check(index)
        before = {index: self.layers[index] for index in replacements}
        try:
            for index, module in replacements.items():
                self.layers[index] = self.bound(module, index)
            with self.as_written():
                yield
        finally:
            for index, layer in before.items():
                self.layers[index] = layer

    @contextmanager
    def skipping(self, *indices: int) -> Iterator[None]:
        """Skip layers: the output of each is its input."""
        with self.replacing({index: PassThrough() for index in indices}):
            yield

    @contextmanager
    def swapped(self, first: int, second: int) -> Iterator[None]:
        """Let two layers of equal type change places.

        What belongs to a place and not to a layer stays where it is: the attributes that the layer's class names in
        `positional_attributes` (DepthLM's LayerNorm Scaling factor, for one).

        Raises:
            NoLayerStackError: the two are of different types, so that the model would give each the other's mask.
        """
        self._check(first)
        self._check(second)
        if self.layer_types[first] != self.layer_types[second]:
            one, other = self.layer_type_names[first], self.layer_type_names[second]
            raise NoLayerStackError(
                f"Layers {first} ({one}) and {second} ({other}) are of different types and cannot change places; swap "
                "layers whose entries in `layer_types` are equal."
            )
        at_first, at_second = self.layers[first], self.layers[second]
        try:
            self.layers[first], self.layers[second] = at_second, at_first
            _exchange_positional(at_first, at_second)
            with self.as_written():
                yield
        finally:
            self.layers[first], self.layers[second] = at_first, at_second
            _exchange_positional(at_first, at_second)

    @contextmanager
    def resume_from(self, index: int, hidden: Tensor) -> Iterator[None]:
        """Let layer `index` get `hidden`; the layers before it become pass-throughs that cost nothing.

        `index` may be L: then `hidden` goes to the final norm. What the model does between embedding and layers is
        still the model's own code, and the ids given to the model must be those that `hidden` was computed from.
        """
        if not 0 <= index <= self.num_layers:
            raise IndexError(f"Layer {index} was asked for; layers count from 0 and {self.num_layers} is the output.")
        if index == self.num_layers:
            with self.resume_after(index - 1, hidden):
                yield
            return
        with self.skipping(*range(index)), self._giving(index, hidden):
            yield

    @contextmanager
    def giving(self, index: int, hidden: Tensor) -> Iterator[None]:
        """Let layer `index` get `hidden` by whatever way the model allows: resuming there, or running up to there."""
        self._check(index)
        with self.resume_from(index, hidden) if self.resumable else self._giving(index, hidden):
            yield

    @contextmanager
    def resume_after(self, index: int, hidden: Tensor) -> Iterator[None]:
        """Let `hidden` be the output of layer `index`; that layer and those before it cost nothing."""
        self._check(index)
        replacements: dict[int, nn.Module] = {i: PassThrough() for i in range(index)}
        with self.replacing({**replacements, index: Feed(hidden)}):
            yield

    @contextmanager
    def stopping_after(self, index: int) -> Iterator[None]:
        """End each forward pass, by raising `StopForward`, when layer `index` has returned."""
        self._check(index)
        if index + 1 < self.num_layers:
            with self.replacing({index + 1: Stopper()}):
                yield
            return
        handle = self.layers[index].register_forward_hook(_stop)
        try:
            with self.as_written():
                yield
        finally:
            handle.remove()

    @contextmanager
    def capture(
        self,
        *,
        resid_pre: bool = True,
        resid_post: bool = True,
        sublayers: Callable[[Tensor], Tensor] | bool = False,
        first: int = 0,
        last: int | None = None,
    ) -> Iterator[Capture]:
        """Keep what passes layers `first`..`last` (or L-1) in the forward passes inside; the last pass counts.

        Of layers that something stands in for, what passes that. Tensors are kept as they are, without a copy, unless
        the model changes them in place. With `sublayers`, the outputs of each layer's attention (or other token mixer)
        and MLP are kept too, where there are such submodules; a function given there is applied to them at once, so
        that what it returns is kept instead.
        """
        capture = Capture()
        keep = torch.clone if self._trace.changes_in_place else _as_is
        with ExitStack() as stack:
            for index in range(first, self.num_layers if last is None else last + 1):
                layer = self.layers[index]
                if resid_pre:
                    handle = layer.register_forward_pre_hook(
                        self._unless_aside(_keep_input(capture.resid_pre, index, keep)), with_kwargs=True
                    )
                    stack.callback(handle.remove)
                if resid_post:
                    stack.callback(
                        layer.register_forward_hook(
                            self._unless_aside(_keep_output(capture.resid_post, index, keep))
                        ).remove
                    )
                if sublayers:
                    self._capture_sublayers(capture, index, stack, torch.clone if sublayers is True else sublayers)
            watched = list(self.layers)
            kept = [
                store for store, wanted in ((capture.resid_pre, resid_pre), (capture.resid_post, resid_post)) if wanted
            ]

            def missed(last: int) -> list[int]:
                there = [index for index in range(first, last + 1) if self.layers[index] is watched[index]]
                return [index for index in there if any(index not in store for store in kept)]

            stack.enter_context(self._awaiting(missed))
            stack.enter_context(self.as_written())
            yield capture

    @contextmanager
    def observing(
        self,
        on_layer: Callable[[int, Tensor, Tensor], None],
        on_part: Callable[[int, str, Tensor], None] | None = None,
    ) -> Iterator[None]:
        """Call back for each layer in the forward passes inside, when it has returned; nothing is kept.

        Args:
            on_layer: gets a layer's index, and the residual stream before it and after it, as the model passed them.
            on_part: gets a layer's index, "attention" or "mlp", and what that returned, where there is such a part.
        """
        before: dict[int, Tensor] = {}
        seen: set[int] = set()
        keep = torch.clone if self._trace.changes_in_place else _as_is

        def returned(index: int, after: Tensor) -> None:
            seen.add(index)
            on_layer(index, before.pop(index), after)

        with ExitStack() as stack:
            for index, layer in enumerate(self.layers):
                into = self._unless_aside(_keep_input(before, index, keep))
                stack.callback(layer.register_forward_pre_hook(into, with_kwargs=True).remove)
                out = self._unless_aside(_tell_output(partial(returned, index)))
                stack.callback(layer.register_forward_hook(out).remove)
                for part in PARTS if on_part is not None else ():
                    if on_part is not None and (module := self.sublayer(index, part)) is not None:
                        tell = self._unless_aside(_tell_output(partial(on_part, index, part)))
                        stack.callback(module.register_forward_hook(tell).remove)
            watched = list(self.layers)
            stack.enter_context(
                self._awaiting(
                    lambda last: [i for i in range(last + 1) if self.layers[i] is watched[i] and i not in seen]
                )
            )
            stack.enter_context(self.as_written())
            yield

    def sublayer(self, index: int, part: str) -> nn.Module | None:
        """The "attention" (or other token mixer) or the "mlp" of a layer, where it has such a `part`."""
        name = self._trace.sublayers[index].get(part)
        return self.layers[index].get_submodule(name) if name else None

    def _capture_sublayers(
        self, capture: Capture, index: int, stack: ExitStack, keep: Callable[[Tensor], Tensor]
    ) -> None:
        for part, store in (("attention", capture.attn_out), ("mlp", capture.mlp_out)):
            module = self.sublayer(index, part)
            if module is not None:
                hook = self._unless_aside(_keep_output(store, index, keep))
                stack.callback(module.register_forward_hook(hook).remove)

    def _unless_aside(self, hook: Callable[..., None]) -> Callable[..., None]:
        return lambda *args: None if self._is_aside else hook(*args)

    def bound(self, module: nn.Module, index: int) -> nn.Module:
        """A module in the place of a layer: it takes the layer's arguments and returns its shape of result."""
        if any(module is layer for layer in self._trace.originals):
            return module  # a decoder layer already speaks the model's language
        stand_in = module if isinstance(module, StandIn) else StandIn(module)
        return stand_in.bound_to(self._trace.originals[index], self._trace.as_result[index])

    @contextmanager
    def _giving(self, index: int, hidden: Tensor) -> Iterator[None]:
        given: list[int] = []
        handle = self.layers[index].register_forward_pre_hook(
            _replace_input(hidden, lambda: given.append(index)), with_kwargs=True, prepend=True
        )
        try:
            with self._awaiting(lambda last: [] if given or last < index else [index]), self.as_written():
                yield
        finally:
            handle.remove()

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Run layers without `capture` taking notice: for what is run beside the model's own pass."""
        before, self._is_aside = self._is_aside, True
        try:
            yield
        finally:
            self._is_aside = before

    @contextmanager
    def as_written(self) -> Iterator[None]:
        """Run the model as it is written in all passes inside, whatever of it is compiled, so that layers are seen."""
        # Of itself, flex_attention is compiled, and hardly usable otherwise.
        flexible = getattr(text_config(self.entry), "_attn_implementation", None) == "flex_attention"
        if self._written or (flexible and not is_compiled(self.model)):
            yield
            return
        self._written = True
        try:
            with as_written():
                yield
        finally:
            self._written = False

    @contextmanager
    def _awaiting(self, missed: Callable[[int], list[int]]) -> Iterator[None]:
        """Have each run that is made inside checked: `missed` gets the last layer that should have been called."""
        self._awaited.append(missed)
        try:
            yield
        finally:
            self._awaited.remove(missed)

    def _require_seen(self, last: int) -> None:
        """Refuse a run in which hooks were not called: what it gave would be empty or of another run."""
        unseen = sorted({layer for missed in self._awaited for layer in missed(last)})
        if unseen:
            raise AnalysisError(
                f"{class_name(self.model)} ran, but layers {', '.join(map(str, unseen))} were not seen: their hooks "
                "were not called. Either other layers have taken their place since they were found, or something runs "
                "what is in them without calling them (an exported form of the model, say); find the layers anew with "
                "LayerStack(model), of the model as it was written."
            )

    def _resumes(self, index: int, hidden: Tensor, baseline: Tensor) -> bool:
        try:
            with self.resume_from(index, hidden):
                resumed = self.logits(self.example_ids)
        except MODEL_FAILURES:
            return False
        return self.is_close(resumed, baseline)

    def is_close(self, logits: Tensor, expected: Tensor) -> bool:
        """Whether two ways to the same logits agree: one that does not fit the model is far off."""
        # Half precision and kernels that depend on what ran before leave rounding.
        scale = expected[torch.isfinite(expected)].abs().max().item() if torch.isfinite(expected).any() else 0.0
        return torch.allclose(logits.float(), expected.float(), rtol=1e-2, atol=1e-3 * scale, equal_nan=True)

    def _require_logits(self, logits: Tensor | None) -> Tensor:
        if logits is None:
            raise NoLayerStackError(
                f"{class_name(self.model)} was taken without a language-modelling head, so it has no logits; a "
                "causal language model as AutoModelForCausalLM loads it has them: LayerStack(model)."
            )
        return logits

    def _check(self, index: int) -> None:
        if not 0 <= index < self.num_layers:
            raise IndexError(f"Layer {index} was asked for; this model has layers 0 to {self.num_layers - 1}.")


def _exchange_positional(one: nn.Module, other: nn.Module) -> None:
    """Give each of two layers the other's values of what belongs to the place in the stack."""
    for name in getattr(one, "positional_attributes", ()):
        ours, theirs = getattr(one, name), getattr(other, name)
        setattr(one, name, theirs)
        setattr(other, name, ours)


def _replace_input(hidden: Tensor, called: Callable[[], None]) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
    def hook(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        called()
        return with_hidden(args, kwargs, hidden)

    return hook


def _stop(module: nn.Module, args: Any, result: Any) -> None:
    raise StopForward


def _as_is(hidden: Tensor) -> Tensor:
    return hidden


def _keep_input(store: dict[int, Tensor], index: int, keep: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        store[index] = keep(hidden_among(args, kwargs))

    return hook


def _tell_output(function: Callable[[Tensor], None]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, result: Any) -> None:
        function(hidden_of(result))

    return hook


def _keep_output(store: dict[int, Tensor], index: int, keep: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, result: Any) -> None:
        store[index] = keep(hidden_of(result))

    return hook
