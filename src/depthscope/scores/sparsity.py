"""Weight, attention and expert sparsity of each layer as scores of an analysis.

The functions behind them stand in `weight_sparsity`, `attention_sparsity` and `expert_load`.
"""

from collections.abc import Callable

import numpy as np
import torch

from depthscope.layers.acting_weights import NoWeightsError, adapters_in
from depthscope.layers.routers import Router
from depthscope.layers.stack import LayerStack
from depthscope.report.summary import ranges
from depthscope.scores.attention_sparsity import ATTENTION_METRICS, AttentionProbe, probing_attention
from depthscope.scores.base import Array, Batch, Explanation, Score, Sums, Values, mean, ratio
from depthscope.scores.expert_load import EXPERT_METRICS, find_routers, router_sums, router_values
from depthscope.scores.weight_sparsity import WEIGHT_METRICS, weight_sparsity
from depthscope.settings import Settings


class WeightSparsity(Score):
    """How many weights of each layer hardly matter beside the others in their matrix."""

    explanation = Explanation(
        name="weight_sparsity",
        title="Weight sparsity",
        meaning="The share of a layer's weights that are small beside the others in their matrix, and Hoyer's measure "
        "of how unequal they are. Weights drawn from a normal distribution give 0.8%, 8% and 38%.",
        formula="share of |w| < p RMS(W), p = 1%, 10%, 50%;  (sqrt(n) - l1/l2) / (sqrt(n) - 1)",
        unit="none, 0 to 1",
        source="Hoyer 2004; implicit sparsity, arXiv 2603.15389",
    )

    def __init__(self, stack: LayerStack, settings: Settings, num_blocks: int) -> None:
        super().__init__(stack, settings, num_blocks)
        self.lost: dict[str, list[int]] = {}  # layers whose weights cannot be had, by the reason

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Weights are the same for every block; their errors come out as 0."""
        if "weights" not in self.sums:
            found = [self._of_layer(layer) for layer in range(self.stack.num_layers)]
            self._values = np.array([[row[name] for row in found] for name in WEIGHT_METRICS])
        self.table("weights", len(WEIGHT_METRICS), self.stack.num_layers)[batch.rows] = self._values
        self.table("blocks")[batch.rows] = 1

    def _of_layer(self, layer: int) -> dict[str, float]:
        try:
            return weight_sparsity(self.stack.layers[layer])
        except NoWeightsError as error:
            self.lost.setdefault(str(error), []).append(layer)
            return dict.fromkeys(WEIGHT_METRICS, float("nan"))

    def notes(self) -> list[str]:
        """Whose weights were measured, and of which layers they cannot be had."""
        said = [
            f"weight_sparsity has no values in layer {ranges(layers)}: {reason}. Give a model with plain weights."
            for reason, layers in self.lost.items()
        ]
        acting, idle = adapters_in(self.stack.layers)
        if acting or idle:
            merged = f"those of the base with adapter {', '.join(acting)} merged in" if acting else "the base's own"
            left = f"; adapter {', '.join(idle)} does not act" if idle else ""
            said.append(f"weight_sparsity is of the weights that act: {merged}{left}.")
        return said

    def finish(self, sums: Sums) -> Values:
        """The mean over blocks, all alike."""
        layers = dict(zip(WEIGHT_METRICS, sums["weights"] / np.maximum(sums["blocks"], 1), strict=True))
        return Values(scores={name: mean(values) for name, values in layers.items()}, layers=layers)


class AttentionSparsity(Score):
    """How few positions each layer attends to, on a sample of queries."""

    explanation = Explanation(
        name="attention_sparsity",
        title="Attention sparsity",
        meaning="The share of the positions that a token sees which get less than an even share of its attention (and "
        "less than a tenth of that), how many positions it attends to in effect, and how much goes to the first.",
        formula="share of p < 1/n and p < 0.1/n over the n visible positions;  exp(entropy of p);  p of the first",
        unit="none; positions for the context",
        source="implicit sparsity, arXiv 2603.15389; attention sinks, arXiv 2309.17453",
    )

    def work(self) -> float:
        """One pass through the layers."""
        return float(self.stack.num_layers)

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


class ExpertLoad(Score):
    """How each layer's router shares its tokens out among the experts."""

    explanation = Explanation(
        name="expert_load",
        title="Expert load",
        meaning="How evenly a layer's experts are used (1 is the fair share), how many are hardly used at all, and how "
        "sure the router is of its choice.",
        formula="load / (tokens k / E), largest and smallest;  entropy of the load / log E;  sum of p of the chosen",
        unit="none",
        source="MaxVio: DeepSeek, arXiv 2408.15664",
    )

    def __init__(self, stack: LayerStack, settings: Settings, num_blocks: int) -> None:
        super().__init__(stack, settings, num_blocks)
        self.routers = find_routers(stack)

    def work(self) -> float:
        """One pass through the layers, where there are experts."""
        return float(self.stack.num_layers) if self.routers else 0.0

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
