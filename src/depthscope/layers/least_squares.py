"""Least squares from sums: the affine map that best predicts what a layer, or a part of it, makes of its input.

With `z = [x, 1]` for each token, `Z^T Z` and `Z^T U` are summed in float64 while batches pass, and solved once. It is
the update `u = h_l - h_{l-1}` that is fitted, `u ~ x V + b`, so that `W = I + V`: the same solution as for the output,
with more digits where the update is small beside the stream. Float32 will not do: a few tokens with massive activations
give condition numbers of 5e3 to 7e4, which the sums square.

What a part of a layer returns is no update of its input, and is fitted as it is.

Where the tokens do not determine the map (fewer distinct inputs than features, as for the first layer on a short text),
the solution is the one of least norm, as `lstsq` gives for the output.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from depthscope.errors import NonFiniteError
from depthscope.layers.precision import precise

# Below this the smallest pivot of the scaled Cholesky factor is mostly rounding.
SMALLEST_PIVOT = 1e-10
# The rounding of float32, squared: a LayerNorm leaves nothing but that in one direction of what it gives.
ROUNDING = 1e-12


@dataclass(frozen=True)
class Fit:
    """The affine update or map `x V + b`: V [F, G], b [G], float64.

    Attributes:
        missing: how many directions of `[x, 1]` the tokens leave undetermined.
    """

    weight: Tensor
    bias: Tensor
    missing: int = 0

    @property
    def determined(self) -> bool:
        """Whether the tokens determined all of it."""
        return not self.missing


class LeastSquares:
    """The sums of one fit.

    Args:
        features: of the input, F.
        targets: features of what is predicted, G, where that is no update of the input; None for an update.
        has_bias: whether the map may add a constant; without, b is 0.
    """

    def __init__(self, features: int, targets: int | None = None, *, has_bias: bool = True) -> None:
        self.features = features
        self.has_bias = has_bias
        self.is_update = targets is None
        self.zz = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.zu = torch.zeros(features + 1, targets or features, dtype=torch.float64)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add tokens: what is given [n, F], and what is returned for it [n, G]."""
        x = precise(before)
        z = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.zz, self.zu = self.zz.to(z.device), self.zu.to(z.device)  # the sums live where the layer is
        self.zz.addmm_(z.T, z)
        self.zu.addmm_(z.T, precise(after) - x if self.is_update else precise(after))

    def tensors(self) -> Iterable[Tensor]:
        """All sums, so that processes can add theirs up."""
        return self.zz, self.zu

    def solve(self, ridge: float = 0.0) -> Fit:
        """Solve for the affine update or map.

        Args:
            ridge: penalty on V, relative to the mean variance of a feature; it pulls a layer's map towards the
                identity, that of a part of a layer towards zero.

        Raises:
            NonFiniteError: the hidden states were not finite.
        """
        if not (torch.isfinite(self.zz).all() and torch.isfinite(self.zu).all()):
            raise NonFiniteError(
                "The linear fit failed: hidden states on the fitting blocks are not finite. Check the model's weights, "
                "or use a wider dtype: float32 or bfloat16."
            )
        if not self.has_bias:
            return self._without_bias(ridge)
        gram = self.zz + torch.diag(self._penalty(ridge))
        scale = gram.diagonal().rsqrt().nan_to_num(posinf=1.0)  # a feature that is always 0 has nothing to scale
        factor, failed = torch.linalg.cholesky_ex(gram * scale * scale[:, None])
        if not failed and (ridge > 0 or factor.diagonal().square().min() > SMALLEST_PIVOT):
            solution = torch.cholesky_solve(self.zu * scale[:, None], factor) * scale[:, None]
            return Fit(solution[:-1], solution[-1])
        return self._least_norm()

    def _without_bias(self, ridge: float) -> Fit:
        """The linear map: the sums without those of the constant."""
        gram, moments = self.zz[:-1, :-1], self.zu[:-1]
        penalty = ridge * float(gram.diagonal().mean())
        values, vectors = torch.linalg.eigh(gram + penalty * torch.eye(len(gram), dtype=gram.dtype).to(gram))
        kept = values > values[-1] * max(len(values) * torch.finfo(torch.float64).eps, ROUNDING)
        weight = vectors @ (torch.where(kept, 1 / values, 0)[:, None] * (vectors.T @ moments))
        return Fit(weight, weight.new_zeros(weight.shape[1]), missing=int((~kept).sum()))

    def _penalty(self, ridge: float) -> Tensor:
        means = self.zz[-1, :-1] / self.zz[-1, -1]
        variance = (self.zz.diagonal()[:-1] / self.zz[-1, -1] - means.square()).mean()
        penalty = torch.full_like(self.zz[-1], ridge * float(variance * self.zz[-1, -1]))
        penalty[-1] = 0  # the bias is free
        return penalty

    def _least_norm(self) -> Fit:
        """The map of least norm to the output, given as an update where one is fitted."""
        eye = torch.zeros_like(self.zu)
        if self.is_update:
            eye.fill_diagonal_(1)
        values, vectors = torch.linalg.eigh(self.zz)
        smallest = len(values) * torch.finfo(torch.float64).eps
        kept = values > values[-1] * (smallest if self.is_update else max(smallest, ROUNDING))
        inverse = torch.where(kept, 1 / values, 0)
        # Z^T Y = Z^T U + Z^T X, and Z^T X is the first part of Z^T Z.
        solution = vectors @ (inverse[:, None] * (vectors.T @ (self.zu + self.zz @ eye))) - eye
        return Fit(solution[:-1], solution[-1], missing=max(1, int((~kept).sum())))
