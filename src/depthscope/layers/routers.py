"""The routers of a mixture of experts, and what each says: its probabilities, and the experts that it chose.

A router is found by what the model records as `router_logits` (transformers' OutputRecorder: a class, and where in what
it returns the logits are), else by its name. What it returns is then read by its values, because what is recorded is
not the same everywhere:

    logits            of most; made into probabilities as the router's own weights show: by softmax, by sigmoid
                      (DeepSeek-V3, GLM-4) or by the root of softplus, the latter two over their sum
    probabilities     rows that sum to 1 (Gemma 4)
    two sets of keys  [2, tokens, n]: n^2 experts, a pair of keys each (Doge)

The chosen experts are those in its output (integers): biases, groups and hashes may choose others than the largest
logits. Where there are none, they are the k with the largest.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.utils.output_capturing import OutputRecorder

from depthscope.layers.facts import EXPERTS, EXPERTS_PER_TOKEN, whole_number
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import text_config

__all__ = ["Router", "Routing", "find_routers"]

# How logits become scores, the likeliest first.
SCORES = {
    "softmax": lambda logits: torch.softmax(logits, -1),
    "sigmoid": torch.sigmoid,
    "root of softplus": lambda logits: F.softplus(logits).sqrt(),
}
TOLERANCE = 1e-3  # of weights over their sum, in float32


@dataclass(frozen=True)
class Routing:
    """What a router said of each token: its probabilities [tokens, C], and the chosen of them [tokens, k].

    Of the C choices the first `experts` are experts; the others, in few architectures, have no weights.
    """

    probabilities: Tensor
    choice: Tensor
    experts: int


class Router:
    """One router of a layer.

    Args:
        module: what is called.
        index: where in the tuple that it returns the logits are.
        top_k: how many experts a token meets, where the output does not say it.
        experts: the number of experts in the configuration.
    """

    def __init__(self, module: nn.Module, index: int, top_k: int | None, experts: int | None) -> None:
        self.module = module
        self.index = index
        self.top_k = top_k
        self.experts = experts
        self._choice_at: int | None = None  # which part of the output has the chosen experts; -1: none
        self._scores: str | None = None  # of `SCORES`, or "none" for probabilities, once the values have told it

    @torch.no_grad()
    def read(self, output: Any) -> Routing | None:
        """What one call said; None where its output is not understood."""
        parts = list(output) if isinstance(output, tuple | list) else [output]
        if not -len(parts) <= self.index < len(parts):
            return None
        raw = parts.pop(self.index)
        if not isinstance(raw, Tensor) or not raw.is_floating_point() or raw.dim() < 2:
            return None
        logits = self._of_experts(raw.detach()).float()
        by_token = [part.detach().flatten(0, -2) for part in parts if _is_by_token(part, len(logits))]
        # Looking at values waits for the device: only until they have told what they are.
        if self._choice_at is None:
            self._choice_at = next((at for at, part in enumerate(by_token) if _is_choice(part, logits)), -1)
        if self._choice_at >= 0:
            choice = by_token[self._choice_at].long()
        elif self.top_k is not None:
            choice = logits.topk(min(self.top_k, logits.shape[-1]), -1).indices
        else:
            return None
        weights = _weights(by_token, choice, logits)
        experts = logits.shape[-1]
        if self.experts is not None and 0 < self.experts < experts:
            experts = self.experts
            if weights is not None:  # ZAYA gives the choice to skip as expert 0 without weight
                choice = torch.where(weights == 0, experts, choice)
        return Routing(self._probabilities(logits, choice, weights), choice, experts)

    def _of_experts(self, logits: Tensor) -> Tensor:
        """The logits by token and expert, [tokens, C]."""
        keys = getattr(self.module, "num_keys", None)
        if logits.dim() == 3 and len(logits) == 2 and keys == logits.shape[-1]:
            first, second = logits
            return (first[:, :, None] + second[:, None, :]).flatten(1)
        return logits.flatten(0, -2)

    def _probabilities(self, logits: Tensor, choice: Tensor, weights: Tensor | None) -> Tensor:
        kind = self._scores
        if kind is None:
            kind, is_certain = _kind_of_scores(logits, choice, weights)
            self._scores = kind if is_certain else None
        if kind == "none":
            return logits
        scores = SCORES[kind](logits)
        return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def find_routers(stack: LayerStack) -> dict[int, list[Router]]:
    """The routers of each layer that has some."""
    config, recorders = text_config(stack.entry), list(_recorders(stack.model))
    experts = whole_number(config, *EXPERTS)
    found: dict[int, list[Router]] = {}
    for index, layer in enumerate(stack.layers):
        named = dict(layer.named_modules())
        recorded = {
            name: at
            for name, module in named.items()
            if (at := _index_of(module, f"{stack.path}.{index}.{name}", recorders)) is not None
        }
        for name, at in _innermost(recorded, named):
            said = [whole_number(named[owner], "top_k", "topk", *EXPERTS_PER_TOKEN) for owner in _upwards(name)]
            said.append(whole_number(config, *EXPERTS_PER_TOKEN))
            top_k = next((number for number in said if number is not None), None)
            found.setdefault(index, []).append(Router(named[name], at, top_k, experts))
    return found


def _recorders(model: nn.Module) -> Iterator[OutputRecorder]:
    """How the model, or a model in it, records its router logits."""
    for module in model.modules():
        recorded = getattr(type(module), "_can_record_outputs", None) or {}
        specs = recorded.get("router_logits", []) if isinstance(recorded, dict) else []
        for spec in specs if isinstance(specs, list) else [specs]:
            if isinstance(spec, OutputRecorder):
                yield spec
            elif isinstance(spec, type):  # transformers takes element 1 of what has no index
                yield OutputRecorder(spec, 1)
            elif isinstance(spec, str):
                yield OutputRecorder(None, 1, class_name=spec)  # type: ignore[arg-type]


def _index_of(module: nn.Module, path: str, recorders: Iterable[OutputRecorder]) -> int | None:
    """Where the logits are in what a module returns, if the model records it (by the rules of transformers)."""
    for spec in recorders:
        by_class = spec.target_class is not None and isinstance(module, spec.target_class)
        by_name = spec.class_name is not None and path.endswith(spec.class_name)
        if (by_class or by_name) and (spec.layer_name is None or f".{spec.layer_name.strip('.')}." in f"{path}."):
            return spec.index
    return None


def _innermost(recorded: dict[str, int], named: dict[str, nn.Module]) -> list[tuple[str, int]]:
    """Each router once: what is recorded of a whole block says less than the router in it, recorded or not."""
    kinds = {name for name, module in named.items() if type(module).__name__.endswith("Router")}
    every = {**dict.fromkeys(kinds, 0), **recorded}
    return [(name, at) for name, at in every.items() if not any(_is_inside(other, name) for other in every)]


def _is_inside(name: str, other: str) -> bool:
    return name != other and name.startswith(f"{other}." if other else "")


def _upwards(name: str) -> Iterator[str]:
    """A module's name and those of the modules that it is in."""
    while name:
        yield name
        name = name.rpartition(".")[0]
    yield name


def _is_by_token(part: Any, tokens: int) -> bool:
    return isinstance(part, Tensor) and part.dim() > 1 and part.shape[:-1].numel() == tokens and part.shape[-1] > 0


def _is_choice(part: Tensor, logits: Tensor) -> bool:
    """Whether a part of the output [tokens, k] holds the numbers of experts."""
    if part.is_floating_point() or part.dtype == torch.bool or part.shape[-1] > logits.shape[-1]:
        return False
    return not len(part) or bool((part >= 0).all() & (part < logits.shape[-1]).all())


def _weights(by_token: list[Tensor], choice: Tensor, logits: Tensor) -> Tensor | None:
    """What the chosen experts are weighted by, [tokens, k], where the output has it: alone, or among all experts."""
    for part in by_token:
        if part.is_floating_point() and part.shape[-1] in (choice.shape[-1], logits.shape[-1]):
            return part if part.shape[-1] == choice.shape[-1] else part.gather(-1, choice)
    return None


def _kind_of_scores(logits: Tensor, choice: Tensor, weights: Tensor | None) -> tuple[str, bool]:
    """How probabilities come from logits, and whether the values tell it for certain."""
    rounding = torch.finfo(logits.dtype if weights is None else weights.dtype).eps
    tolerance = max(TOLERANCE, 4 * rounding)
    finite = logits[torch.isfinite(logits).all(-1)]
    if len(finite) and bool((finite >= 0).all()) and bool(((finite.sum(-1) - 1).abs() < 10 * tolerance).all()):
        return "none", True
    if weights is None or bool((weights < 0).any()):
        return "softmax", True
    errors = {kind: _distance(score(logits).gather(-1, choice), weights) for kind, score in SCORES.items()}
    fitting = [kind for kind, error in errors.items() if error < tolerance]
    # Where the logits are nearly equal, all kinds fit, and give the same probabilities.
    return min(fitting, key=errors.__getitem__) if fitting else "softmax", len(fitting) < 2


def _distance(scores: Tensor, weights: Tensor) -> float:
    """How far weights [tokens, k] are from scores, both over their sum: of a token, or of all where k is 1."""
    weights = weights.float()
    used = (weights != 0).all(-1) & torch.isfinite(weights).all(-1) & torch.isfinite(scores).all(-1)
    scores, weights = scores[used], weights[used]
    if not len(weights):
        return 0.0
    over = -1 if weights.shape[-1] > 1 else 0
    shares = [each / each.mean(over, keepdim=True).clamp(min=1e-30) for each in (scores, weights)]
    return float((shares[0] - shares[1]).abs().max())
