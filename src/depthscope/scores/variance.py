"""Variance of the residual stream after each layer, and how each layer makes it grow.

For a token, `Var_d(h)` is the unbiased variance over the d features (the mean over the parallel streams, where an
architecture has several). Layer l turns `h_{l-1}` into `h_l = h_{l-1} + u_l`, so that exactly

    v_l - v_{l-1} = Var(u_l) + 2 Cov(h_{l-1}, u_l).

All are means over the tokens of the evaluation blocks; squared activation units. arXiv 2603.15389, section on variance
propagation; the split is the variance of a sum.
"""

import torch
from torch import Tensor

from depthscope.layers.tracing import PARTS
from depthscope.scores.base import Array, Batch, PerToken, Sums, Values, by_chunk, ratio


class Variance(PerToken):
    """Mean over tokens of `Var_d(h_l)` at each layer's output, its growth split, and of attention and MLP outputs."""

    name = "variance"
    parts = True

    def read(self, before: Tensor, after: Tensor) -> dict[str, Tensor]:
        """The variances of each token, and the covariance of stream and update."""
        one, other, update = _centred(before), _centred(after), _centred(after - before)
        return {
            "variance_input": _variance(one).mean(-1),
            "variance": _variance(other).mean(-1),
            "variance_update": _variance(update).mean(-1),
            "variance_covariance": 2 * ((one * update).sum(-1) / (before.shape[-1] - 1)).mean(-1),
        }

    def observe_part(self, batch: Batch, layer: int, part: str, output: Tensor) -> None:
        """Read what a sublayer returned: all tokens in one row, or as the stream has them."""
        found = by_chunk(lambda rows: {"variance": _variance(_centred(rows))}, output.flatten(0, -2))["variance"]
        shape = batch.token_mask.shape
        per_token = found.view(shape[::-1]).T if self.stack.token_first(layer, part) else found.view(shape)
        self.keep(batch, layer, f"{part}_variance", per_token)
        self.keep(batch, layer, f"{part}_tokens", torch.ones_like(per_token))

    def finish(self, sums: Sums) -> Values:
        """Divide by the number of tokens."""
        # A layer without an attention or an MLP has counted no token for it: no value, where one of zeros has 0.
        parts = {f"{part}_variance": sums[f"{part}_tokens"] for part in PARTS if f"{part}_tokens" in sums}
        names = [name for name in sums if name.endswith("variance") or name.startswith("variance_")]
        layers: dict[str, Array] = {name: ratio(sums[name], parts.get(name, sums["tokens"])) for name in names}
        last, first = layers["variance"][-1], layers["variance"][0]
        return Values(scores={"variance": float(last), "variance_growth": float(ratio(last, first))}, layers=layers)


def _centred(vectors: Tensor) -> Tensor:
    """Vectors [..., d] less the mean of their features."""
    return vectors - vectors.mean(-1, keepdim=True)


def _variance(centred: Tensor) -> Tensor:
    """The unbiased variance of the features [..., d], which are centred (`torch.var` takes 20 times as long)."""
    return torch.linalg.vector_norm(centred, dim=-1).square() / (centred.shape[-1] - 1)
