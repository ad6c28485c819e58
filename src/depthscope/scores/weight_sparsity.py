"""Weight sparsity of a layer: how many of its weights hardly matter, beside the others in their matrix.

Over the matrices with which a layer acts (of two dimensions; of three, each expert's is one; adapters merged in and
masks applied, see `acting.py`), weighted by size:

    weights_below_<p>pct   share of weights below p% of the matrix's own root mean square, p = 1, 10, 50
                           (0.8%, 8% and 38% for normally distributed weights)
    weight_hoyer           (sqrt(n) - l1 / l2) / (sqrt(n) - 1) (Hoyer 2004): 0 where all n weights are equal in size, 1
                           where all but one are zero; about 0.2 for normally distributed weights

A matrix of zeros is the sparsest there is: 1 in all of them.

Weight decay makes weights small together, which this does not count: what is sparse is a matrix whose weights differ.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from depthscope.layers.acting_weights import NoWeightsError, acting_weights, adapters_in
from depthscope.layers.stack import LayerStack
from depthscope.scores.base import Batch, Score, Sums, Values, mean
from depthscope.settings import Settings
from depthscope.wording.messages import ranges

__all__ = ["WEIGHT_METRICS", "WeightSparsity", "weight_sparsity"]

THRESHOLDS = {"weights_below_1pct": 0.01, "weights_below_10pct": 0.1, "weights_below_50pct": 0.5}
WEIGHT_METRICS = (*THRESHOLDS, "weight_hoyer")


class WeightSparsity(Score):
    """How many weights of each layer hardly matter beside the others in their matrix."""

    name = "weight_sparsity"

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


@torch.no_grad()
def weight_sparsity(layer: nn.Module) -> dict[str, float]:
    """The metrics above for one layer; NaN for all of them where it has no matrix of weights.

    Sharded weights (FSDP) are gathered one at a time, by all processes together.

    Raises:
        NoWeightsError: not all of its weights can be had (codes of a quantisation, an adapter that cannot be merged).
    """
    totals = dict.fromkeys(WEIGHT_METRICS, 0.0)
    count = 0
    for weight in acting_weights(layer):
        if weight.dim() < 2 or not weight.is_floating_point() or weight.device.type == "meta":
            continue
        whole = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        matrices = whole.flatten()[None] if weight.dim() == 2 else whole.flatten(0, -3).flatten(1)
        for name, value in _of_matrices(matrices.float().abs()).items():
            totals[name] += value.item() * weight.numel()
        count += weight.numel()
    return {name: total / count if count else float("nan") for name, total in totals.items()}


def _of_matrices(sizes: Tensor) -> dict[str, Tensor]:
    """The metrics of matrices of equal size, absolute weights [matrices, n], averaged over them."""
    n = sizes.shape[-1]
    # Over the largest, since squares of what weight decay leaves would be rounded to 0.
    sizes = sizes / sizes.amax(-1, keepdim=True).clamp(min=torch.finfo(sizes.dtype).tiny)
    length = torch.linalg.vector_norm(sizes, dim=-1)
    rms = length[:, None] / n**0.5
    # A matrix of zeros is as sparse as one can be, and has no direction.
    found = {name: ((sizes < share * rms) | (rms == 0)).float().mean() for name, share in THRESHOLDS.items()}
    ratio = torch.where(length > 0, sizes.sum(-1) / torch.where(length > 0, length, 1), 1.0)
    found["weight_hoyer"] = ((n**0.5 - ratio) / (n**0.5 - 1)).mean() if n > 1 else ratio.mean()
    return found
