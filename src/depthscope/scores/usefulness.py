"""Usefulness: what the loss becomes when a layer is replaced by the best affine map of its input.

Fit `h_l ~ h_{l-1} W_l + b_l` by least squares over the tokens of the fitting blocks; with M_l the model that has the
affine map in layer l's place,

    r_l = loss(M_l) / loss(M),

and usefulness is the share of layers with `r_l` above a threshold (1.1 in the paper). Losses in nats over the
evaluation blocks. arXiv 2603.15389, usefulness score.

The fit is of the layer's update, `u_l ~ h_{l-1} (W_l - I) + b_l`, which has the same solution and keeps its digits
where the update is small beside the stream. `X^T X` and `X^T U` of all layers are summed in one pass, in float64, and
solved by Cholesky: a few tokens with massive activations make float32 fits worthless (condition numbers of 5e3 to
7e4).
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from depthscope.anatomy import LayerStack
from depthscope.corpus import Blocks
from depthscope.errors import NonFiniteError
from depthscope.scores.base import (
    Batch,
    Explanation,
    Score,
    Sums,
    Values,
    effective_depth,
    experiment_loss,
    forwards_from,
    mean,
    precise,
    ratio,
)
from depthscope.standins import AffineMap

# The sums of a fit take 16 d^2 bytes a layer; more layers than fit in here take another pass.
ACCUMULATOR_BYTES = 2 << 30


@dataclass
class FitSums:
    """What a least-squares fit of one layer's update needs, over tokens: count, sum x, sum u, X^T X, X^T U."""

    count: Tensor  # []
    x: Tensor  # [F]
    u: Tensor  # [F]
    xx: Tensor  # [F, F]
    xu: Tensor  # [F, F]

    @classmethod
    def zeros(cls, features: int) -> "FitSums":
        """Nothing summed yet."""
        shapes = ((), (features,), (features,), (features, features), (features, features))
        return cls(*(torch.zeros(shape, dtype=torch.float64) for shape in shapes))

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add tokens: streams [n, F] before and after the layer."""
        x = precise(before)
        u = precise(after) - x
        if self.xx.device != x.device:  # the sums live where the layer is
            self.count, self.x, self.u, self.xx, self.xu = (tensor.to(x.device) for tensor in self.tensors())
        self.count += len(x)
        self.x += x.sum(0)
        self.u += u.sum(0)
        self.xx.addmm_(x.T, x)
        self.xu.addmm_(x.T, u)

    def solve(self, ridge: float) -> tuple[Tensor, Tensor]:
        """The affine map of the update: weight [F, F] and bias [F], float64.

        `ridge` is relative to the mean eigenvalue of the inputs' covariance; it is raised tenfold until the Cholesky
        factorisation exists, which takes more where there are fewer tokens than features.
        """
        mean_x, mean_u = self.x / self.count, self.u / self.count
        covariance = self.xx - self.count * torch.outer(mean_x, mean_x)
        cross = self.xu - self.count * torch.outer(mean_x, mean_u)
        scale = covariance.diagonal().mean().clamp_min(torch.finfo(torch.float64).tiny)
        eye = torch.eye(len(mean_x), dtype=torch.float64, device=covariance.device)
        for attempt in range(16):
            factor, failed = torch.linalg.cholesky_ex(covariance + max(ridge, 1e-15) * 10**attempt * scale * eye)
            if not failed:
                weight = torch.cholesky_solve(cross, factor)
                return weight, mean_u - mean_x @ weight
        raise NonFiniteError(
            "The linear fit failed: hidden states on the fitting blocks are not finite. Check the model's weights, or "
            "use a wider dtype: float32 or bfloat16."
        )

    def tensors(self) -> Iterable[Tensor]:
        """All sums, so that processes can add theirs up."""
        return (self.count, self.x, self.u, self.xx, self.xu)


class OnFlat(nn.Module):
    """Applies a map of [B, T, S * d] to a residual stream in the model's own layout."""

    def __init__(self, stack: LayerStack, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._flat, self._unflat = stack.flat, stack.unflat

    def forward(self, hidden: Tensor) -> Tensor:
        """Map a stream to a stream of the same layout."""
        return self._unflat(self.inner(self._flat(hidden)))


class Usefulness(Score):
    """The loss ratio of linearising each layer, and the share of layers where it exceeds the threshold."""

    explanation = Explanation(
        name="usefulness",
        title="Usefulness",
        meaning="By what the loss is multiplied when a layer is replaced by the best affine map of its input: 1 means "
        "that the layer does nothing that a matrix could not do. Usefulness is the share of layers above the "
        "threshold; the ratios carry the information.",
        formula="r_l = loss(layer l linearised) / loss;  usefulness = share of layers with r_l > 1.1",
        unit="ratio of losses in nats; share of layers",
        source="arXiv 2603.15389",
    )

    def work(self) -> float:
        """Each layer: the layers after it, and the head."""
        return sum(forwards_from(self.stack, layer + 1) + self.head for layer in range(self.stack.num_layers))

    def fit(self, batches: Callable[[], Iterable[Blocks]], add_up: Callable[[Tensor], None]) -> None:
        """Fit the affine maps of all layers: one pass over the fitting blocks for as many layers as memory holds.

        Args:
            batches: gives this process's fitting blocks, a batch at a time, each time it is called.
            add_up: adds a tensor up over all processes, in place.
        """
        layers = [layer for layer in range(self.stack.num_layers) if layer not in self.stack.unskippable]
        at_once = max(1, ACCUMULATOR_BYTES // (16 * self.stack.width**2))
        self.maps: dict[int, AffineMap] = {}
        for start in range(0, len(layers), at_once):
            self._fit_some(layers[start : start + at_once], batches(), add_up)

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Add the loss of the batch with each layer linearised in turn."""
        self.table("loss")[batch.rows] = batch.loss
        for layer, affine in self.maps.items():
            with self.stack.standing_in({layer: OnFlat(self.stack, affine)}):
                loss = experiment_loss(self.stack, batch, layer)
            self.table("linear_loss", self.stack.num_layers)[batch.rows, layer] = loss
            tick(len(batch.rows) * (forwards_from(self.stack, layer + 1) + self.head))

    def _fit_some(self, layers: list[int], batches: Iterable[Blocks], add_up: Callable[[Tensor], None]) -> None:
        sums = {layer: FitSums.zeros(self.stack.width) for layer in layers}
        with self.stack.capturing() as capture:
            for blocks in batches:
                self.stack.run_through(layers[-1], blocks.input_ids, blocks.attention_mask)
                for layer in layers:
                    before, after = self.stack.flat(capture.inputs[layer]), self.stack.flat(capture.outputs[layer])
                    mask = blocks.token_mask.to(before.device)
                    sums[layer].add(before[mask], after[mask])
        for layer in layers:
            for tensor in sums[layer].tensors():
                add_up(tensor)
            self.maps[layer] = self._affine(*sums[layer].solve(self.settings.ridge))
            del sums[layer]

    def _affine(self, weight: Tensor, bias: Tensor) -> AffineMap:
        if not self.settings.paper_code:
            return AffineMap(weight, bias, residual=True)
        # The released code hands the solution of `X W = Y` to nn.Linear, which multiplies by its transpose.
        whole = weight + torch.eye(len(bias), dtype=weight.dtype, device=weight.device)
        return AffineMap(whole.T, bias)

    def finish(self, sums: Sums) -> Values:
        """Divide by the baseline's loss; count the layers above the threshold."""
        ratios = ratio(sums["linear_loss"], sums["loss"])
        for layer in self.stack.unskippable:
            ratios[layer] = np.nan
        defined = ratios[~np.isnan(ratios)]
        return Values(
            scores={
                "usefulness": mean((defined > self.settings.threshold).astype(float)),
                "usefulness_ratio": mean(ratios),
                "usefulness_excess": float((defined - 1).sum()) if defined.size else float("nan"),
                "effective_depth_linear": effective_depth(ratios),
            },
            layers={"usefulness_ratio": ratios},
        )
