"""Variance of the residual stream after each layer, and how each layer makes it grow.

For a token, `Var_d(h)` is the unbiased variance over the d features (the mean over the parallel streams, where an
architecture has several). Layer l turns `h_{l-1}` into `h_l = h_{l-1} + u_l`, so that exactly

    v_l - v_{l-1} = Var(u_l) + 2 Cov(h_{l-1}, u_l).

All are means over the tokens of the evaluation blocks; squared activation units. arXiv 2603.15389, section on variance
propagation; the split is the variance of a sum.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from depthscope.layers.precision import wide
from depthscope.scores.base import Array, Batch, Score, Sums, Values, ratio

PARTS = ("attention", "mlp")


class Variance(Score):
    """Mean over tokens of `Var_d(h_l)` at each layer's output, its growth split, and of attention and MLP outputs."""

    name = "variance"

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Add the batch's variances, read off its baseline pass."""
        stack, count = self.stack, self.stack.num_layers
        self.table("tokens")[batch.rows] = batch.token_mask.sum(1).cpu().numpy()
        for layer in range(count):
            before = wide(stack.features(batch.resid_pre[layer]))  # [B, T, S, d]
            after = wide(stack.features(batch.resid_post[layer]))
            update = after - before
            covariance = 2 * _covariance(before, update)
            for name, per_token in (
                ("variance_input", before.var(-1).mean(-1)),
                ("variance", after.var(-1).mean(-1)),
                ("variance_update", update.var(-1).mean(-1)),
                ("variance_covariance", covariance.mean(-1)),
            ):
                self.table(name, count)[batch.rows, layer] = batch.masked_sum(per_token)
            for part, kept in zip(PARTS, (batch.attn_variance, batch.mlp_variance), strict=True):
                if layer in kept:
                    per_token = kept[layer].reshape(batch.token_mask.shape)
                    if stack.token_first(layer, part):
                        per_token = kept[layer].reshape(batch.token_mask.T.shape).T
                    self.table(f"{part}_variance", count)[batch.rows, layer] = batch.masked_sum(per_token)
                    self.table(f"{part}_tokens", count)[batch.rows, layer] = self.sums["tokens"][batch.rows]

    def finish(self, sums: Sums) -> Values:
        """Divide by the number of tokens."""
        # A layer without an attention or an MLP has counted no token for it: no value, where one of zeros has 0.
        parts = {f"{part}_variance": sums[f"{part}_tokens"] for part in PARTS if f"{part}_tokens" in sums}
        names = [name for name in sums if name.endswith("variance") or name.startswith("variance_")]
        layers: dict[str, Array] = {name: ratio(sums[name], parts.get(name, sums["tokens"])) for name in names}
        last, first = layers["variance"][-1], layers["variance"][0]
        return Values(scores={"variance": float(last), "variance_growth": float(ratio(last, first))}, layers=layers)


def token_variance(hidden: Tensor) -> Tensor:
    """The unbiased variance over the features of each vector [..., d] -> [...], in at least float32."""
    return hidden.float().var(-1)


def _covariance(first: Tensor, second: Tensor) -> Tensor:
    """The unbiased covariance over the last axis."""
    centred = (first - first.mean(-1, keepdim=True)) * (second - second.mean(-1, keepdim=True))
    return centred.sum(-1) / (torch.tensor(first.shape[-1]) - 1)
