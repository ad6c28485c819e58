"""Expert sparsity: how a mixture of experts shares its tokens out.

For one layer with E experts of which each token meets k, over the real tokens:

    expert_load_max      load of the busiest expert, over the mean load (tokens k / E); 1 is even. DeepSeek's MaxVio is
                         this less 1.
    expert_load_min      load of the idlest, likewise
    expert_load_entropy  entropy of the load over log E: 1 is even, 0 is one expert doing all
    experts_dead         share of experts with less than 1% of the mean load
    router_confidence    mean over tokens of the probability that the router gives to the chosen experts together
    router_top1          mean over tokens of its largest probability
    router_entropy       mean over tokens of its entropy over the logarithm of the number of choices

The probabilities are the router's own (`routers.py`): the softmax of its logits, or what it makes of them instead, over
their sum. Choices without weights (ZAYA's skipping, LongCat's zero experts) have probabilities and no load. Of several
routers in one layer (JetMoe routes attention too) the busiest, the idlest and the dead are those of all experts, and
the others means over routers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from depthscope.layers.routers import Router, find_routers
from depthscope.layers.stack import LayerStack
from depthscope.scores.base import Array, Batch, Score, Sums, Values, mean
from depthscope.settings import Settings

__all__ = ["EXPERT_METRICS", "OTHERS", "ExpertLoad", "find_routers", "router_sums", "router_values"]

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


class ExpertLoad(Score):
    """How each layer's router shares its tokens out among the experts."""

    name = "expert_load"

    def __init__(self, stack: LayerStack, settings: Settings, num_blocks: int) -> None:
        super().__init__(stack, settings, num_blocks)
        self.routers = find_routers(stack)
        self.extent = replace(self.extent, has_experts=bool(self.routers))

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Run the batch once more, one block at a time, watching the routers."""
        self.table("blocks")[batch.rows] = 1
        for position, row in enumerate(batch.rows) if self.routers else ():
            block = batch.blocks.select(torch.tensor([position]))
            real = batch.token_mask[position]
            handles = [
                router.module.register_forward_hook(self._keep(f"{layer}.{number}", router, int(row), real))
                for layer, routers in self.routers.items()
                for number, router in enumerate(routers)
            ]
            try:
                self.stack.run_through(self.stack.num_layers - 1, block.input_ids, block.attention_mask)
            finally:
                for handle in handles:
                    handle.remove()
        tick(len(batch.rows) * self.work())

    def finish(self, sums: Sums) -> Values:
        """Turn loads into ratios; without experts there is nothing to say."""
        by_layer: dict[int, list[Array]] = {}
        for name, total in sums.items():
            if name != "blocks":
                by_layer.setdefault(int(name.partition(".")[0]), []).append(total)
        rows = {layer: router_values(totals) for layer, totals in by_layer.items()}
        if not rows:
            return Values()
        empty = dict.fromkeys(EXPERT_METRICS, float("nan"))
        columns = [rows.get(layer, empty) for layer in range(self.stack.num_layers)]
        layers = {name: np.array([row[name] for row in columns]) for name in EXPERT_METRICS}
        return Values(scores={name: mean(values) for name, values in layers.items()}, layers=layers)

    def _keep(self, name: str, router: Router, row: int, real: torch.Tensor) -> Callable[..., None]:
        def hook(module: torch.nn.Module, args: object, output: object) -> None:
            found = router_sums(router, output, real)
            if found is not None:
                self.table(name, len(found))[row] = found.double().cpu().numpy()

        return hook


@torch.no_grad()
def router_sums(router: Router, output: object, mask: Tensor | None = None) -> Tensor | None:
    """What one call of a router adds up to: loads of the experts, then tokens and the sums over them, [E + 4].

    Args:
        router: the router.
        output: what it returned.
        mask: which tokens are real, as many elements in the order in which the router got the tokens.

    Returns None where the output is not understood.
    """
    routing = router.read(output)
    if routing is None:
        return None
    probabilities, choice = routing.probabilities, routing.choice
    real = torch.ones(len(choice), device=choice.device) if mask is None else mask.flatten().to(probabilities)
    if len(real) != len(choice):
        return None
    classes = probabilities.shape[-1]
    loads = torch.zeros(classes, device=choice.device).scatter_add_(
        0, choice.flatten(), real.repeat_interleave(choice.shape[1])
    )
    entropy = torch.special.entr(probabilities).sum(-1) / np.log(max(classes, 2))
    by_token = [torch.ones_like(real), probabilities.gather(-1, choice).sum(-1), probabilities.amax(-1), entropy]
    return torch.cat([loads[: routing.experts], (torch.stack(by_token) * real).sum(-1)])


def router_values(of_routers: Sequence[np.ndarray]) -> dict[str, float]:
    """The metrics of one layer from the sums [E + 4] of its routers; NaN where they saw no token."""
    seen = [sums for sums in of_routers if sums[-OTHERS] > 0 and sums[:-OTHERS].sum() > 0]
    if not seen:
        return dict.fromkeys(EXPERT_METRICS, float("nan"))
    relative = np.concatenate([sums[:-OTHERS] / sums[:-OTHERS].mean() for sums in seen])
    spread = np.mean([_spread(sums[:-OTHERS] / sums[:-OTHERS].sum()) for sums in seen])
    of_tokens = np.mean([sums[-OTHERS + 1 :] / sums[-OTHERS] for sums in seen], axis=0)
    values = (relative.max(), relative.min(), spread, (relative < DEAD).mean(), *of_tokens)
    return dict(zip(EXPERT_METRICS, map(float, values), strict=True))


def _spread(shares: np.ndarray) -> float:
    """The entropy of shares over its largest value."""
    used = shares[shares > 0]
    return -float((used * np.log(used)).sum()) / np.log(max(len(shares), 2))
