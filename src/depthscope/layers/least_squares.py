"""Least squares from sums: the affine map that best predicts a layer's update from its input.

With `z = [x, 1]` for each token, `Z^T Z` and `Z^T U` are summed in float64 while batches pass, and solved once. It is
the update `u = h_l - h_{l-1}` that is fitted, `u ~ x V + b`, so that `W = I + V`: the same solution as for the output,
with more digits where the update is small beside the stream. Float32 will not do: a few tokens with massive activations
give condition numbers of 5e3 to 7e4, which the sums square.

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


@dataclass(frozen=True)
class Fit:
    """The affine update `x V + b`: weight V [F, F], bias b [F], float64; and whether the tokens determined it."""

    weight: Tensor
    bias: Tensor
    determined: bool


class LeastSquares:
    """The sums of one layer's fit over F features."""

    def __init__(self, features: int) -> None:
        self.features = features
        self.zz = torch.zeros(features + 1, features + 1, dtype=torch.float64)
        self.zu = torch.zeros(features + 1, features, dtype=torch.float64)

    def add(self, before: Tensor, after: Tensor) -> None:
        """Add tokens: streams [n, F] before and after the layer."""
        x = precise(before)
        z = torch.cat([x, x.new_ones(len(x), 1)], 1)
        self.zz, self.zu = self.zz.to(z.device), self.zu.to(z.device)  # the sums live where the layer is
        self.zz.addmm_(z.T, z)
        self.zu.addmm_(z.T, precise(after) - x)

    def tensors(self) -> Iterable[Tensor]:
        """All sums, so that processes can add theirs up."""
        return self.zz, self.zu

    def solve(self, ridge: float = 0.0) -> Fit:
        """Solve for the affine update.

        Args:
            ridge: penalty on V, relative to the mean variance of a feature; it pulls the map towards the identity.

        Raises:
            NonFiniteError: the hidden states were not finite.
        """
        if not (torch.isfinite(self.zz).all() and torch.isfinite(self.zu).all()):
            raise NonFiniteError(
                "The linear fit failed: hidden states on the fitting blocks are not finite. Check the model's weights, "
                "or use a wider dtype: float32 or bfloat16."
            )
        gram = self.zz + torch.diag(self._penalty(ridge))
        scale = gram.diagonal().rsqrt().nan_to_num(posinf=1.0)  # a feature that is always 0 has nothing to scale
        factor, failed = torch.linalg.cholesky_ex(gram * scale * scale[:, None])
        if not failed and (ridge > 0 or factor.diagonal().square().min() > SMALLEST_PIVOT):
            solution = torch.cholesky_solve(self.zu * scale[:, None], factor) * scale[:, None]
            return Fit(solution[:-1], solution[-1], determined=True)
        return self._least_norm()

    def _penalty(self, ridge: float) -> Tensor:
        means = self.zz[-1, :-1] / self.zz[-1, -1]
        variance = (self.zz.diagonal()[:-1] / self.zz[-1, -1] - means.square()).mean()
        penalty = torch.full_like(self.zz[-1], ridge * float(variance * self.zz[-1, -1]))
        penalty[-1] = 0  # the bias is free
        return penalty

    def _least_norm(self) -> Fit:
        """The map of least norm to the layer's output, given as an update."""
        eye = torch.eye(self.features + 1, self.features, dtype=self.zz.dtype, device=self.zz.device)
        values, vectors = torch.linalg.eigh(self.zz)
        kept = values > values[-1] * len(values) * torch.finfo(torch.float64).eps
        inverse = torch.where(kept, 1 / values, 0)
        # Z^T Y = Z^T U + Z^T X, and Z^T X is the first part of Z^T Z.
        solution = vectors @ (inverse[:, None] * (vectors.T @ (self.zu + self.zz @ eye))) - eye
        return Fit(solution[:-1], solution[-1], determined=False)
