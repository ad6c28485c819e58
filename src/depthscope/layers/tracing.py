"""Finding the decoder layers of a language model by watching one small forward pass.

Architectures name and wrap their layers in many ways, but they all walk down one `ModuleList` whose items are called
once each, in order, each handing the very same tensor to the next. That is what is looked for.
"""

import inspect
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import count, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from depthscope.errors import NoLayerStackError
from depthscope.layers.causality import coarsest_epsilon, require_causal
from depthscope.layers.compiled import as_written, class_name, written
from depthscope.layers.modes import evaluating
from depthscope.layers.stand_ins import LayerResult, hidden_among, hidden_of, result_like

# Two sizes that no other axis of a stream is likely to have, so that the shape tells which axis is which.
TRACE_BATCH, TRACE_TOKENS = 3, 13

# Stands in ids for a token that the model puts before the text by itself: a virtual token of prompt tuning.
PLACEHOLDER = -1

# What a model may raise when it is called with too little, or when a layer that it counts on does not do its work.
MODEL_FAILURES = (TypeError, ValueError, RuntimeError, AttributeError, LookupError, NotImplementedError, AssertionError)

# What a layer is made of, by the names that its submodules are known by here.
PARTS = ("attention", "mlp")
ATTENTION_WORDS = ("attn", "attention", "mixer", "mamba", "ssm", "rglru", "recurrent", "temporal", "linear_attention")
MLP_WORDS = ("mlp", "ffn", "feed_forward", "feedforward", "moe", "experts", "glu")
NOT_A_SUBLAYER_WORDS = ("norm", "ln_", "dropout", "drop", "residual", "router", "gate_proj", "rotary")


@dataclass(frozen=True)
class StreamAxes:
    """Where batch and tokens are in a model's residual stream; the last axis holds the features, d."""

    batch: int
    tokens: int
    others: tuple[int, ...]  # axes of parallel streams, features last
    sizes: tuple[int, ...]  # their sizes

    @classmethod
    def of(cls, shape: torch.Size, length: int) -> "StreamAxes | None":
        """Read the axes off a stream traced with `TRACE_BATCH` sequences of `length` tokens."""
        if len(shape) < 3 or TRACE_BATCH not in shape[:-1] or length not in shape[:-1]:
            return None
        batch, tokens = shape.index(TRACE_BATCH), shape.index(length)
        others = tuple(axis for axis in range(len(shape)) if axis not in (batch, tokens))
        return cls(batch, tokens, others, tuple(shape[axis] for axis in others))

    @property
    def token_first(self) -> bool:
        """Whether the tokens stand before the sequences, [T, B, d]."""
        return self.tokens < self.batch

    def features(self, hidden: Tensor) -> Tensor:
        """View a stream as [B, T, S, d], S parallel streams (usually one)."""
        ordered = hidden.permute(self.batch, self.tokens, *self.others)
        return ordered.reshape(*ordered.shape[:2], -1, self.sizes[-1])

    def restore(self, flat: Tensor) -> Tensor:
        """Bring [B, T, S * d] back to the model's own layout."""
        ordered = flat.reshape(*flat.shape[:2], *self.sizes)
        back = [0] * ordered.dim()
        for position, axis in enumerate((self.batch, self.tokens, *self.others)):
            back[axis] = position
        return ordered.permute(*back)


@dataclass(frozen=True)
class Trace:
    """What one small forward pass showed of a model's decoder layers."""

    path: str
    entry: nn.Module  # what takes the token ids: the model, or the one that a wrapper of the model's owner holds
    layers: nn.ModuleList
    originals: tuple[nn.Module, ...]
    as_result: tuple[Callable[[Tensor], LayerResult], ...]  # how each layer's result is shaped
    axes: StreamAxes
    layer_types: tuple[Hashable, ...]
    layer_type_names: tuple[str, ...]
    sublayers: tuple[Mapping[str, str], ...]  # for each layer {"attention": name, "mlp": name}, where found
    token_first: tuple[Mapping[str, bool], ...]  # and whether what they return has its tokens before its sequences
    changes_in_place: bool
    virtual_tokens: int  # that the model puts before the text by itself
    example: Tensor  # [TRACE_BATCH, T] token ids, a placeholder for each virtual token
    logits: Tensor | None  # [TRACE_BATCH, T, V] what the model answered; None where no head was asked for
    batch_effect: float  # how far the logits of a text move with the other texts of its batch, beside their spread


@dataclass
class _Call:
    """One call of a module during the trace."""

    order: int
    into: Any
    version: int  # of the tensor that went in; it rises when the tensor is changed in place
    out: Any = None
    changed: bool = False


def run(model: nn.Module, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
    """Call a model on ids [B, T], without a cache where it knows of one; placeholders at the start are left to it."""
    device = input_device(model)
    if virtual := int((input_ids[0] == PLACEHOLDER).sum()):
        input_ids = input_ids[:, virtual:]
        attention_mask = attention_mask[:, virtual:] if attention_mask is not None else None
    inputs: dict[str, Any] = {"input_ids": input_ids.to(device)}
    inputs |= {name: value for name, value in (("use_cache", False), ("return_dict", True)) if _takes(model, name)}
    if attention_mask is not None:
        inputs["attention_mask"] = attention_mask.to(device)
    return model(**inputs)


def _takes(model: nn.Module, name: str) -> bool:
    """Whether a model's forward pass takes an argument."""
    taken = inspect.signature(model.forward).parameters
    return name in taken or any(parameter.kind is parameter.VAR_KEYWORD for parameter in taken.values())


def input_device(model: nn.Module) -> torch.device:
    """The device that a model takes token ids on, also when it is split over several or offloaded."""
    embeddings = input_embeddings(model)
    for module in (embeddings, model):
        weight = next(module.parameters(), None) if module is not None else None
        if weight is not None and weight.device.type != "meta":
            return weight.device
    hook = getattr(embeddings, "_hf_hook", None)
    return torch.device(getattr(hook, "execution_device", None) or "cpu")


def text_config(model: nn.Module) -> Any:
    """The configuration of the language model proper, where a model has several; None where it has none."""
    config = getattr(model, "config", None)
    return config.get_text_config() if config is not None and hasattr(config, "get_text_config") else config


def input_embeddings(model: nn.Module) -> nn.Module | None:
    """The module that embeds token ids, where the model names it."""
    return _named(model, "get_input_embeddings")


def output_embeddings(model: nn.Module) -> nn.Module | None:
    """The language-modelling head, where the model names it."""
    return _named(model, "get_output_embeddings")


def _named(model: nn.Module, question: str) -> nn.Module | None:
    ask: Any = getattr(model, question, None)
    try:
        return ask() if ask is not None else None
    except NotImplementedError:  # several models in one
        return None


def trace_layers(model: nn.Module, *, head: bool = True) -> Trace:
    """Find the stack of layers of a language model in evaluation mode.

    Args:
        model: a causal language model; without `head`, any model whose layers work on token ids.
        head: whether it must have a language-modelling head. Without one the layers can be watched, but there are no
            logits, what stands behind the layers (a classifier, a reward, a value) is not looked at, and tokens may see
            those that follow.

    Raises:
        NoLayerStackError: the model does not run on plain token ids, is not causal, or has no plain stack.
    """
    if not isinstance(model, nn.Module):
        raise NoLayerStackError(
            f"{type(model).__name__} is not a model; give a torch.nn.Module, such as load_model loads."
        )
    _refuse_other_models(model, head)
    try:
        return _trace(model, model, head)
    except NoLayerStackError:
        if head:
            raise
        # A wrapper that its owner wrote is called in the owner's way; the language model in it has the layers.
        found = dict(_traced(model))
        if len(found) > 1:
            raise NoLayerStackError(
                f"{class_name(model)} holds several models ({', '.join(found)}), and which of them is meant is not "
                "clear. Such a model cannot be watched layer by layer."
            ) from None
        if not found:
            raise
        return found.popitem()[1]


def _traced(model: nn.Module) -> Iterator[tuple[str, Trace]]:
    """The outermost language models inside a module, by name, each traced; those that cannot be are left out."""
    inside = {name: part for name, part in model.named_modules() if name and _is_language_model(part)}
    for name in _outermost(inside):
        with suppress(NoLayerStackError):
            yield name, _trace(model, inside[name], head=False)


def _is_language_model(module: nn.Module) -> bool:
    return getattr(module, "config", None) is not None and input_embeddings(module) is not None


def _trace(model: nn.Module, entry: nn.Module, head: bool) -> Trace:
    """Trace the pass of `entry`, the model itself or a part of it; paths are those in `model`."""
    example = example_ids(entry)
    lists = _module_lists(model)
    calls, logits = _watch(entry, lists, example, head)
    virtual = 0 if logits is None else logits.shape[1] - TRACE_TOKENS
    length = TRACE_TOKENS + virtual
    batch_effect = 0.0 if logits is None else _require_causal(entry, example, logits)
    path, layers = _choose(entry, lists, calls, length)
    ordered = [calls[id(layer)][0] for layer in layers]
    axes = StreamAxes.of(ordered[0].into.shape, length)
    if axes is None:
        raise NoLayerStackError(
            f"The layers of {path!r} pass on tensors of shape {tuple(ordered[0].into.shape)} for {TRACE_BATCH} "
            f"sequences of {length} tokens, so the tokens cannot be told apart; depthscope needs one hidden state a "
            "token."
        )
    names = [_kind_name(layer, entry, index) for index, layer in enumerate(layers)]
    sublayers = tuple(_sublayers(layer, calls, length) for layer in layers)
    return Trace(
        path=path,
        entry=entry,
        layers=layers,
        originals=tuple(layers),
        as_result=tuple(result_like(call.out) for call in ordered),
        axes=axes,
        layer_types=tuple((name, _structure(layer)) for name, layer in zip(names, layers, strict=True)),
        layer_type_names=tuple(names),
        sublayers=sublayers,
        token_first=tuple(
            {
                part: _token_first(calls[id(layer.get_submodule(name))][0].out, axes, length)
                for part, name in found.items()
            }
            for layer, found in zip(layers, sublayers, strict=True)
        ),
        changes_in_place=any(call.changed for call in ordered),
        virtual_tokens=virtual,
        example=torch.cat([torch.full((TRACE_BATCH, virtual), PLACEHOLDER), example], 1),
        logits=logits,
        batch_effect=batch_effect,
    )


def example_ids(model: nn.Module, draw: int = 0, shape: tuple[int, int] = (TRACE_BATCH, TRACE_TOKENS)) -> Tensor:
    """Token ids [B, T] that no special meaning is given to, the same at every call of a draw."""
    size = getattr(text_config(model), "vocab_size", None)
    if not isinstance(size, int):
        size = getattr(input_embeddings(model), "num_embeddings", None)
    if not isinstance(size, int) or size < 1:
        raise NoLayerStackError(f"{class_name(model)} has no vocabulary of token ids; a causal language model has one.")
    special = _special_ids(getattr(model, "config", None))
    plain = [token for token in range(min(size, 4096)) if token not in special] or [0]
    steps = torch.arange(shape[0] * shape[1]) * 7919 + draw  # a prime stride visits the vocabulary unevenly
    return torch.tensor(plain)[steps % len(plain)].view(shape)


def _special_ids(config: Any) -> set[int]:
    """Every id that the configuration names (`pad_token_id`, `image_token_id`, ...), nested configurations included."""
    found: set[int] = set()
    pending = [config.to_dict()] if config is not None else []
    while pending:
        for key, value in pending.pop().items():
            if isinstance(value, dict):
                pending.append(value)
            elif str(key).endswith(("token_id", "token_index")):
                found.update(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))
    return found


def _refuse_other_models(model: nn.Module, head: bool) -> None:
    name = class_name(model)
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise NoLayerStackError(
            f"{name} is an encoder-decoder; depthscope reads decoder-only causal language models. "
            "Give one that AutoModelForCausalLM loads without an encoder."
        )
    if head and output_embeddings(model) is None and not name.endswith(("ForCausalLM", "LMHeadModel")):
        raise NoLayerStackError(
            f"{name} has no language-modelling head, so there is no next-token loss to measure; "
            "load it with AutoModelForCausalLM, or give the language model in it."
        )


def _require_causal(model: nn.Module, example: Tensor, answer: Tensor) -> float:
    """Refuse a model that looks ahead; returns how far the logits of a text move with the other texts of its batch."""
    with evaluating(model), torch.no_grad(), as_written():
        return require_causal(
            class_name(model),
            lambda ids: run(model, ids).logits[:, -TRACE_TOKENS:],
            example,
            answer[:, -TRACE_TOKENS:],
            (example_ids(model, draw) for draw in count(1)),
            epsilon=coarsest_epsilon(model),
        )


def _module_lists(model: nn.Module) -> dict[str, nn.ModuleList]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 0
    }


def _watch(
    model: nn.Module, lists: Mapping[str, nn.ModuleList], example: Tensor, head: bool
) -> tuple[dict[int, list[_Call]], Tensor | None]:
    """Run the example; record for each item of each list, and each of the item's children, what it was called with."""
    calls: dict[int, list[_Call]] = {}
    clock = count()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        into = hidden_among(args, kwargs) if args or "hidden_states" in kwargs else None
        version = into._version if isinstance(into, Tensor) else 0
        calls.setdefault(id(module), []).append(_Call(next(clock), into, version))

    def after(module: nn.Module, args: tuple[Any, ...], result: Any) -> None:
        call = calls[id(module)][-1]
        call.out = result
        call.changed = isinstance(call.into, Tensor) and call.into._version != call.version

    watched = {
        id(module): module
        for items in lists.values()
        for item in items
        for module in (item, *dict(_children(item)).values())
    }
    with ExitStack() as stack:
        for module in watched.values():
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(after).remove)
        stack.enter_context(evaluating(model))
        stack.enter_context(torch.no_grad())
        stack.enter_context(as_written())
        try:
            output = run(model, example)
            return calls, output.logits if head else None
        except MODEL_FAILURES as error:
            if not head and any(_is_walked(items, calls, TRACE_TOKENS) for items in lists.values()):
                return calls, None  # what comes after the layers may want more: labels, a padding token
            raise NoLayerStackError(
                f"{class_name(model)} does not run on plain token ids: {type(error).__name__}: {error}. "
                f"depthscope needs a causal language model that takes `input_ids` alone.{_in_half_precision(model)}"
            ) from error


def _in_half_precision(model: nn.Module) -> str:
    """What else may keep a model from running: some types mix half precision with float32."""
    halves = {weight.dtype for weight in model.parameters()} & {torch.float16, torch.bfloat16}
    if not halves:
        return ""
    return f" It holds weights in {str(halves.pop()).removeprefix('torch.')}: some models run in float32 only."


def _choose(
    model: nn.Module, lists: Mapping[str, nn.ModuleList], calls: Mapping[int, list[_Call]], length: int
) -> tuple[str, nn.ModuleList]:
    """The list that the hidden state walks down: as long as the configuration says, else the longest."""
    expected = getattr(text_config(model), "num_hidden_layers", None)
    found = {name: items for name, items in lists.items() if _is_walked(items, calls, length)}
    if not found:
        raise NoLayerStackError(_nothing_found(model, lists, calls, length))
    if expected is None and len(outer := _outermost(found)) > 1:
        raise NoLayerStackError(
            f"{class_name(model)} has several stacks of layers ({', '.join(outer)}), and its configuration does not "
            "say which is the decoder. Such a model cannot be analysed layer by layer."
        )
    return max(found.items(), key=lambda entry: (len(entry[1]) == expected, len(entry[1])))


def _outermost(names: Iterable[str]) -> list[str]:
    """The names of modules that are inside none of the others."""
    return [name for name in names if not any(name.startswith(f"{other}.") for other in names)]


def _is_walked(items: nn.ModuleList, calls: Mapping[int, list[_Call]], length: int) -> bool:
    """Whether each item was called once, in order, and each got what the one before it returned."""
    each = [calls.get(id(item), []) for item in items]
    if any(len(made) != 1 or not isinstance(made[0].into, Tensor) for made in each):
        return False
    ordered = [made[0] for made in each]
    if any(a.order > b.order for a, b in pairwise(ordered)):
        return False
    if any(_shape(call.out) != call.into.shape for call in ordered):
        return False
    if StreamAxes.of(ordered[0].into.shape, length) is None:
        return False
    return all(_same(hidden_of(a.out), b.into) for a, b in pairwise(ordered))


def _same(given: Tensor, taken: Tensor) -> bool:
    """Whether a stream was handed on as it is; some models take a view of it in between, or rescale it (RWKV)."""
    if given is taken:
        return True
    if given.shape != taken.shape or given.device != taken.device:
        return False
    one, other = given.flatten().double(), taken.flatten().double()
    scale = (one @ other) / (other @ other).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.allclose(one, scale * other, rtol=1e-3, atol=1e-6 * float(one.abs().max()))


def _shape(result: Any) -> torch.Size | None:
    if isinstance(result, tuple | list) and result:
        result = result[0]
    return result.shape if isinstance(result, Tensor) else None


def _nothing_found(
    model: nn.Module, lists: Mapping[str, nn.ModuleList], calls: Mapping[int, list[_Call]], length: int
) -> str:
    seen = []
    for name, items in lists.items():
        counts = sorted({len(calls.get(id(item), [])) for item in items})
        if StreamAxes.of(_first_shape(items, calls), length) is not None or counts == [0]:
            times = "never" if counts == [0] else " or ".join(str(count) for count in counts) + " times"
            seen.append(f"{name or '(root)'}: {len(items)} x {class_name(items[0])}, called {times}")
    found = "; ".join(seen[:6]) if seen else "no list of modules at all"
    return (
        f"{class_name(model)} has no plain stack of decoder layers, each called once, in order, on the hidden state "
        f"of the one before. Found: {found}. Such a model cannot be analysed layer by layer."
    )


def _first_shape(items: nn.ModuleList, calls: Mapping[int, list[_Call]]) -> torch.Size:
    made = [call for item in items for call in calls.get(id(item), []) if isinstance(call.into, Tensor)]
    return made[0].into.shape if made else torch.Size([])


def _kind_name(layer: nn.Module, model: nn.Module, index: int) -> str:
    """The class of a layer, with the type that its configuration or the layer itself states (attention, block)."""
    layer = written(layer)
    types = getattr(text_config(model), "layer_types", None)
    stated = [types[index]] if isinstance(types, list | tuple) and index < len(types) else []
    for module in (layer, *layer.children()):
        for attribute in ("attention_type", "layer_type", "block_type"):
            value = vars(module).get(attribute)
            if isinstance(value, str) and value not in stated:
                stated.append(value)
    return "/".join([type(layer).__name__, *map(str, stated)])


def _structure(layer: nn.Module) -> Hashable:
    """What makes two layers interchangeable: the same tree of modules, and the same switches on them."""
    switches = ("is_sliding", "is_causal", "use_rope", "is_moe_layer", "sliding_window", "is_kv_shared_layer")
    return tuple(
        (
            name.removesuffix("_orig_mod").replace("_orig_mod.", "").rstrip("."),
            type(module).__name__,
            tuple((s, vars(module)[s]) for s in switches if isinstance(vars(module).get(s), bool | int)),
        )
        for name, module in layer.named_modules()
        if written(module) is module  # whether a layer was compiled does not matter
    )


def _sublayers(layer: nn.Module, calls: Mapping[int, list[_Call]], length: int) -> dict[str, str]:
    """The names of a layer's attention (or other token mixer) and MLP: called once, one vector a token out."""
    found: dict[str, str] = {}
    for path, child in _children(layer):
        made = calls.get(id(child), [])
        if len(made) != 1 or not _is_token_wise(_shape(made[0].out), length):
            continue
        name = path.rpartition(".")[2].lower()
        if any(word in name for word in NOT_A_SUBLAYER_WORDS):
            continue
        if kind := _part_of_layer(name, class_name(child).lower()):
            found.setdefault(kind, path)
    return found


def _part_of_layer(name: str, class_name: str) -> str | None:
    """Whether a submodule is an attention or an MLP, by its name, or else by its class."""
    # The class of each has the model's name in it, such as OlmoeAttention; and a mixer may be either.
    for words in (name, class_name) if "mixer" not in name else (class_name,):
        if "attention" in words or "attn" in words:
            return "attention"
        if any(word in words for word in MLP_WORDS):
            return "mlp"
        if any(word in words for word in ATTENTION_WORDS):
            return "attention"
    return "attention" if "mixer" in name else None


def _token_first(result: Any, axes: StreamAxes, length: int) -> bool:
    """Whether a sublayer returns [T, B, d]; where its tokens stand in one row, they are in the order of the stream."""
    shape = _shape(result)
    first = tuple(shape[:2]) if shape is not None else ()
    return axes.token_first if set(first) != {TRACE_BATCH, length} else first == (length, TRACE_BATCH)


def _children(layer: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The parts of a layer by their names in it, also where the layer was compiled and put into a module of its own."""
    own = written(layer)
    place = next(name for name, module in layer.named_modules() if module is own)
    for name, child in own.named_children():
        yield f"{place}.{name}" if place else name, child


def _is_token_wise(shape: torch.Size | None, length: int) -> bool:
    return shape is not None and len(shape) >= 2 and shape[:-1].numel() == TRACE_BATCH * length
