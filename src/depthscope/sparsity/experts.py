"""Expert sparsity: how a mixture of experts shares its tokens out.

For one layer with E experts of which each token meets k, over the real tokens:

    expert_load_max      load of the busiest expert, over the fair share (tokens k / E); 1 is even. DeepSeek's MaxVio is
                         this less 1.
    expert_load_min      load of the idlest, likewise
    expert_load_entropy  entropy of the load over log E: 1 is even, 0 is one expert doing all
    experts_dead         share of experts with less than 1% of the fair share
    router_confidence    mean over tokens of the probability that the router gives to the chosen experts together
    router_top1          mean over tokens of its largest probability
    router_entropy       mean over tokens of its entropy over log E
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from depthscope.anatomy import LayerStack
from depthscope.facts import EXPERTS_PER_TOKEN
from depthscope.tracing import text_config

__all__ = ["EXPERT_METRICS", "find_routers", "router_sums", "router_values"]

EXPERT_METRICS = (
    "expert_load_max",
    "expert_load_min",
    "expert_load_entropy",
    "experts_dead",
    "router_confidence",
    "router_top1",
    "router_entropy",
)
DEAD = 0.01
# Beside the loads: tokens, sums over them of confidence, of the largest probability, of the entropy.
OTHERS = 4


def find_routers(stack: LayerStack) -> dict[int, nn.Module]:
    """The router of each layer that has one, by the class that the model records router logits from."""
    kinds = tuple(_router_classes(stack.model))
    found: dict[int, nn.Module] = {}
    for index, layer in enumerate(stack.layers):
        routers = [module for module in layer.modules() if kinds and isinstance(module, kinds)]
        if len(routers) == 1:
            found[index] = routers[0]
    return found


def _router_classes(model: nn.Module) -> list[type]:
    classes = []
    for module in model.modules():
        recorded = getattr(type(module), "_can_record_outputs", None) or {}
        specs = recorded.get("router_logits", []) if isinstance(recorded, dict) else []
        for spec in specs if isinstance(specs, list) else [specs]:
            kind = getattr(spec, "target_class", spec)
            if isinstance(kind, type):
                classes.append(kind)
    return classes


def chosen_per_token(model: nn.Module) -> int | None:
    """How many experts a token meets, as the configuration says it."""
    config = text_config(model)
    values = (getattr(config, name, None) for name in EXPERTS_PER_TOKEN)
    return next((value for value in values if isinstance(value, int)), None)


@torch.no_grad()
def router_sums(output: Any, top_k: int | None, mask: Tensor | None = None) -> Tensor | None:
    """What one call of a router adds up to: loads of the experts, then tokens and the sums over them, [E + 4].

    Args:
        output: what the router returned: its logits [tokens, E], or a tuple with them first. Where the tuple has the
            chosen experts too (integers), those are taken, otherwise the `top_k` of the largest logits.
        top_k: experts that a token meets.
        mask: which tokens are real, of any shape with as many elements as there are tokens.

    Returns None where the output is not understood.
    """
    parts = output if isinstance(output, tuple | list) else (output,)
    logits = parts[0]
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or logits.dim() < 2:
        return None
    logits = logits.detach().flatten(0, -2).float()
    experts = logits.shape[-1]
    choice = next((part for part in parts if isinstance(part, Tensor) and _is_choice(part, len(logits))), None)
    if choice is None:
        if top_k is None:
            return None
        choice = logits.topk(min(top_k, experts), -1).indices
    choice = choice.detach().reshape(len(logits), -1)
    real = torch.ones(len(logits), device=logits.device) if mask is None else mask.flatten().to(logits)
    if len(real) != len(logits):
        return None
    probabilities = torch.softmax(logits, -1)
    loads = torch.zeros(experts, device=logits.device).scatter_add_(
        0, choice.flatten(), real.repeat_interleave(choice.shape[1])
    )
    entropy = torch.special.entr(probabilities).sum(-1) / np.log(max(experts, 2))
    by_token = [torch.ones_like(real), probabilities.gather(-1, choice).sum(-1), probabilities.amax(-1), entropy]
    return torch.cat([loads, (torch.stack(by_token) * real).sum(-1)])


def router_values(sums: np.ndarray) -> dict[str, float]:
    """The metrics of one layer from its sums [E + 4]; NaN where it saw no token."""
    loads, (tokens, confidence, top1, entropy) = sums[:-OTHERS], sums[-OTHERS:]
    if tokens <= 0 or loads.sum() <= 0:
        return dict.fromkeys(EXPERT_METRICS, float("nan"))
    shares = loads / loads.sum()
    relative = shares * len(loads)
    spread = -float((shares[shares > 0] * np.log(shares[shares > 0])).sum()) / np.log(max(len(loads), 2))
    values = (relative.max(), relative.min(), spread, (relative < DEAD).mean())
    return dict(
        zip(EXPERT_METRICS, (*map(float, values), confidence / tokens, top1 / tokens, entropy / tokens), strict=True)
    )


def _is_choice(part: Tensor, tokens: int) -> bool:
    return not part.is_floating_point() and part.dtype != torch.bool and part.numel() % tokens == 0
