"""Attention sparsity: how few positions a token attends to, measured without the matrix of all probabilities.

For a query that can see n positions, with probabilities p over them, averaged over heads and sampled queries:

    attention_below_fair    share of visible positions with p < 1 / n, less than an even share
    attention_below_tenth   share of visible positions with p < 0.1 / n
    attention_context       exp(entropy of p): how many positions it attends to, in effect
    attention_context_share the same, over n
    attention_first         probability of the first visible position (the attention sink)

Queries and keys are read where the model hands them to its attention function (transformers' AttentionInterface), and
passed on to it unchanged: what the model computes stays the same, whichever implementation is set. Only the
probabilities of the sampled queries are computed, [B, H, queries, T].
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import text_config
from depthscope.scores.base import Batch, Score, Sums, Values, mean, ratio

__all__ = ["ATTENTION_METRICS", "AttentionProbe", "AttentionSparsity", "probing_attention"]

ATTENTION_METRICS = (
    "attention_below_fair",
    "attention_below_tenth",
    "attention_context",
    "attention_context_share",
    "attention_first",
)
QUERIES = 64  # sampled in a sequence
# What an attention function may be given that this does not account for.
UNKNOWN = ("position_bias", "cache")


class AttentionSparsity(Score):
    """How few positions each layer attends to, on a sample of queries."""

    name = "attention_sparsity"

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Run the batch once more, watching what the attention functions are given."""
        blocks, layers = batch.blocks, self.stack.num_layers
        probe = AttentionProbe(self.stack, batch.token_mask, seed=self.settings.seed)
        with probing_attention(self.stack, probe):
            self.stack.run_through(layers - 1, blocks.input_ids, blocks.attention_mask)
        self.table("attention", layers, len(ATTENTION_METRICS))[batch.rows] = probe.sums.transpose(0, 1).numpy()
        self.table("queries", layers)[batch.rows] = probe.counts.T.numpy()
        tick(len(batch.rows) * self.work())

    def finish(self, sums: Sums) -> Values:
        """Divide by the number of queries."""
        values = ratio(sums["attention"], np.repeat(sums["queries"][:, None], len(ATTENTION_METRICS), 1))
        layers = {name: values[:, index] for index, name in enumerate(ATTENTION_METRICS)}
        return Values(scores={name: mean(column) for name, column in layers.items()}, layers=layers)


class AttentionProbe:
    """Sums by layer and sequence of what was seen in the passes inside `probing_attention`.

    `sums` is [L, B, metrics] and `counts` [L, B], of the last pass; a layer whose attention could not be read (it does
    not go through the interface, or its mask is of a kind that cannot be read) has a count of 0.
    """

    def __init__(self, stack: LayerStack, token_mask: Tensor, seed: int = 0) -> None:
        self._layer_of = {id(module): i for i, layer in enumerate(stack.layers) for module in layer.modules()}
        self._real = token_mask  # [B, T]
        length = token_mask.shape[1]
        order = torch.randperm(length, generator=torch.Generator().manual_seed(seed))
        self._queries = order[: min(QUERIES, length)].sort().values
        shape = (stack.num_layers, len(token_mask))
        self.sums = torch.zeros(*shape, len(ATTENTION_METRICS), dtype=torch.float64)
        self.counts = torch.zeros(*shape, dtype=torch.float64)

    @torch.no_grad()
    def see(self, module: nn.Module, query: Tensor, key: Tensor, mask: Any, options: dict[str, Any]) -> None:
        """Read one call of an attention function."""
        layer = self._layer_of.get(id(module))
        length = self._real.shape[1]
        if layer is None or query.dim() != 4 or query.shape[2] != length or key.shape[2] != length:
            return
        if len(query) != len(self._real) or any(options.get(name) is not None for name in UNKNOWN):
            return
        queries = self._queries.to(query.device)
        # As the attention functions see it: what the call says goes before what the module is.
        causal = options.get("is_causal")
        causal = getattr(module, "is_causal", True) if causal is None else causal
        visible, bias = _visible(mask, queries, key, options.get("sliding_window"), bool(causal))
        if visible is None:
            return
        probabilities = _probabilities(query[:, :, queries], key, visible, bias, options)  # [B, H, Q, T]
        values = _metrics(probabilities, visible)  # [B, H, Q, metrics]
        # A query that sees itself only has no choice.
        counted = (self._real.to(query.device)[:, None, queries] & (visible.sum(-1) > 1)).expand(values.shape[:-1])
        values = torch.where(counted[..., None], values, 0)
        self.sums[layer] = values.sum((1, 2), dtype=torch.float64).cpu()
        self.counts[layer] = counted.sum((1, 2)).double().cpu()


@contextmanager
def probing_attention(stack: LayerStack, probe: AttentionProbe) -> Iterator[None]:
    """Let `probe` see what the model's attention functions are given in the passes inside."""
    names = {_implementation(stack.entry)}
    if "eager" in names and not all(_eager_functions(stack)):
        names.discard("eager")  # an attention that does not ask the interface
    local = ALL_ATTENTION_FUNCTIONS._local_mapping
    before = {name: local.get(name) for name in names}
    for name in names:
        local[name] = _passing_on(probe, None if name == "eager" else ALL_ATTENTION_FUNCTIONS[name])
    try:
        yield
    finally:
        for name, function in before.items():
            if function is None:
                local.pop(name, None)
            else:
                local[name] = function


def _implementation(model: nn.Module) -> str:
    return getattr(text_config(model), "_attn_implementation", None) or "eager"


def _passing_on(probe: AttentionProbe, function: Callable[..., Any] | None) -> Callable[..., Any]:
    def attention(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, *args: Any, **kwargs: Any
    ) -> Any:
        probe.see(module, query, key, attention_mask, kwargs)
        original = function or _eager_function(module)
        return original(module, query, key, value, attention_mask, *args, **kwargs)  # type: ignore[misc]

    return attention


def _eager_function(module: nn.Module) -> Callable[..., Any] | None:
    """The attention function that a module falls back to, from the file that its class is written in."""
    for kind in type(module).__mro__:
        found = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if found is not None:
            return found
    return None


def _eager_functions(stack: LayerStack) -> list[bool]:
    """Whether each layer's attention has such a function."""
    parts = [stack.sublayer(index, "attention") for index in range(stack.num_layers)]
    return [part is None or any(_eager_function(module) for module in part.modules()) for part in parts]


def _visible(mask: Any, queries: Tensor, key: Tensor, window: Any, causal: bool) -> tuple[Tensor | None, Tensor | None]:
    """Which positions the queries see, [B or 1, 1 or H, Q, T], and what is added to their scores if anything is."""
    positions = torch.arange(key.shape[2], device=key.device)
    ahead = positions[None, :] - queries[:, None]
    visible = ahead <= 0 if causal else torch.ones_like(ahead, dtype=torch.bool)
    if isinstance(window, int) and window > 0:
        visible &= ahead.abs() < window
    if mask is None:
        return visible[None, None], None
    if not isinstance(mask, Tensor):
        return None, None
    if mask.dim() == 2:  # padding only, as flash attention is given it
        return visible[None, None] & mask[:, None, None, :].bool(), None
    if mask.dim() != 4 or mask.shape[2] < len(positions):
        return None, None
    chosen = mask[:, :, queries, : len(positions)]
    if chosen.dtype == torch.bool:
        return chosen, None
    return chosen > torch.finfo(chosen.dtype).min / 2, chosen


def _probabilities(query: Tensor, key: Tensor, visible: Tensor, bias: Tensor | None, options: dict[str, Any]) -> Tensor:
    """The attention probabilities of some queries: [B, H, Q, D] and [B, KV heads, T, D] -> [B, H, Q, T], float32."""
    groups = query.shape[1] // key.shape[1]
    scaling = options.get("scaling")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    by_group = query.float().unflatten(1, (key.shape[1], groups))
    scores = (by_group @ key.float()[:, :, None].transpose(-1, -2)).flatten(1, 2) * scaling
    if options.get("softcap") is not None:
        scores = torch.tanh(scores / options["softcap"]) * options["softcap"]
    if bias is not None:
        scores = scores + torch.where(visible, bias.float(), 0)
    scores = scores.masked_fill(~visible, float("-inf"))
    sinks = options.get("s_aux")
    if sinks is None:
        return torch.softmax(scores, -1).nan_to_num(0.0)
    # A learned sink takes its part of the probability, and no position gets it.
    sink = sinks.float().reshape(1, -1, 1, 1).expand(len(scores), -1, scores.shape[2], 1)
    return torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1].nan_to_num(0.0)


def _metrics(probabilities: Tensor, visible: Tensor) -> Tensor:
    """The metrics of each query, in their order: [B, H, Q, metrics]."""
    seen = visible.sum(-1).clamp(min=1)
    entropy = torch.special.entr(probabilities).sum(-1)
    first = visible.int().argmax(-1, keepdim=True).expand(*probabilities.shape[:-1], 1)

    def below(share: float) -> Tensor:
        return ((probabilities < share / seen[..., None]) & visible).sum(-1) / seen

    return torch.stack(
        [below(1.0), below(0.1), entropy.exp(), entropy.exp() / seen, probabilities.gather(-1, first)[..., 0]], -1
    )
