"""Jacobian distance: how far a layer's derivative is from the identity.

`J_l` is the mean over tokens t of the sum over t' of `d h_l[t'] / d h_{l-1}[t]`, a d x d matrix (all streams of a token
taken as one vector), and

    D_l = ||J_l - I||_F / d.

The global value is the mean over layers. No unit. arXiv 2603.15389, Jacobian distance.

For a vector z, one backward pass with z as the gradient at every t' gives `J^T z` for all tokens at once; the value is
exact with d orthonormal vectors ("exact", or as many probes as features). With P < d probes each block gets P of K
orthonormal vectors, drawn at random once for all layers, other blocks others, so that all d are measured where the
number of blocks allows it, each on two blocks or more. With y_b = (J_b - I)^T q a block's product with its vector,

    ||J - I||_F^2 = d m (1/n + (1 - 1/n) r),    m = mean of ||y_b||^2,   r = sum of y_b . y_c / sum of ||y_b||^2,

n the number of blocks and r over all pairs of blocks b, c that measured the same vector: the square of a mean over n
blocks, of which r is common to them. It is unbiased, for as many backward passes as P probes on all blocks would take.

Standard errors are those of leaving a block with its vectors out, which have in them that each vector was measured on
some blocks only; a layer's also has that of measuring K of d vectors, `jacobian_probe_se` in the global value.
"""

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from depthscope.layers.modes import frozen
from depthscope.layers.stack import LayerStack
from depthscope.scores.base import Array, Batch, Score, Sums, Values, jackknife, mean, ratio
from depthscope.scores.work import jacobian_work, vectors_of_block
from depthscope.settings import Settings

# Products with probes are kept for groups of blocks, so that standard errors can be told: as many as fit in here.
GROUP_BYTES = 256 << 20
MOST_GROUPS = 16
LEAST_BLOCKS = 2  # that measure a vector, where not all do


class Jacobian(Score):
    """`||J_l - I||_F / d` of each layer, estimated with random orthonormal vectors or exact."""

    name = "jacobian"
    experiments = True
    states = True

    def __init__(self, stack: LayerStack, settings: Settings, num_blocks: int) -> None:
        super().__init__(stack, settings, num_blocks)
        features = stack.width
        each = vectors_of_block(features, settings)
        group_bytes = stack.num_layers * each * features * 8
        self.groups = max(1, min(num_blocks, MOST_GROUPS, GROUP_BYTES // group_bytes))
        self.group_of = np.arange(num_blocks) * self.groups // num_blocks
        generator = np.random.default_rng(settings.seed)
        wanted = min(features, max(each, self.groups * each // LEAST_BLOCKS))
        # [K, F]: the axes where all are measured, which is exact; else of length sqrt(F), as half precision likes it.
        self.vectors, self.weight = torch.eye(features), float(features)
        if each < features:
            self.vectors, self.weight = _orthonormal(wanted, features, generator), 1.0
        self._probe_error = float("nan")
        self.chosen = _shared_out(self.groups, each, wanted, generator)  # [groups, P] which of them each group measures

    @property
    def waits(self) -> bool:
        """The vectors are shared out among all blocks."""
        return True

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Add the batch's products of every layer's transposed Jacobian with the vectors of each block."""
        shape = (self.stack.num_layers, self.chosen.shape[1], self.stack.width)
        products, tokens = self.table("products", *shape, rows=self.groups), self.table("tokens", rows=self.groups)
        # As the model's own dtype has them, since they are taken off again from what comes out.
        self.vectors = self.vectors.to(batch.resid_pre[0].dtype).float()
        # Each block is a batch of its own in its group's sum, so groups need not follow batches.
        np.add.at(tokens, self.group_of[batch.rows], batch.token_mask.sum(1).cpu().numpy())
        with frozen(self.stack.model), torch.enable_grad():
            for layer in range(self.stack.num_layers):
                for probe, product in enumerate(self._products(batch, layer)):
                    np.add.at(products[:, layer, probe], self.group_of[batch.rows], product)
                tick(len(batch.rows) * jacobian_work(self.extent, self.settings, layer))

    def finish(self, sums: Sums) -> Values:
        """The distances from the sums of all groups."""
        squares = np.array([self._squares(sums, layer)[0] for layer in range(self.stack.num_layers)])
        return self._values(squares)

    def values_with_errors(self) -> tuple[Values, Values]:
        """The values from all groups, and their standard errors: see the head of this file."""
        every = [self._squares(self.sums, layer) for layer in range(self.stack.num_layers)]
        values = self._values(np.array([square for square, _, _ in every]))
        without = [self._values(squares) for squares in np.transpose([each for _, each, _ in every])]
        errors = Values(
            scores={"jacobian": jackknife([each.scores["jacobian"] for each in without], values.scores["jacobian"])},
            layers={"jacobian": jackknife([each.layers["jacobian"] for each in without], values.layers["jacobian"])},
        )
        # What each vector says of each layer's distance, to first order, [L, K].
        by_vector = np.array([each for _, _, each in every])
        distance = np.broadcast_to(values.layers["jacobian"][:, None], by_vector.shape)
        shifts = np.nan_to_num(ratio(by_vector, 2 * distance)) / self.stack.width**2
        errors.layers["jacobian"] = np.hypot(errors.layers["jacobian"], self._of_sample(shifts))
        # The same vectors serve all layers, so the errors of the layers do not average out as if independent.
        self._probe_error = float(self._of_sample(shifts.mean(0, keepdims=True))[0])
        return values, errors

    def probe_error(self) -> float | None:
        """The standard error of the global value that comes of measuring K of F vectors; None where it is not known."""
        return self._probe_error if np.isfinite(self._probe_error) else None

    def _values(self, squares: Array) -> Values:
        distance = np.sqrt(np.maximum(squares, 0)) / self.stack.width
        return Values(scores={"jacobian": mean(distance)}, layers={"jacobian": distance})

    def _of_sample(self, shifts: Array) -> Array:
        """The standard error of the means of [rows, K] drawn from F without replacement."""
        count = shifts.shape[1]
        if count == self.stack.width:
            return np.zeros(len(shifts))
        spread = shifts.std(1, ddof=1) if count > 1 else np.full(len(shifts), np.nan)
        return spread * np.sqrt((1 - count / self.stack.width) / count)

    def _squares(self, sums: Sums, layer: int) -> tuple[float, Array, Array]:
        """`||J_l - I||_F^2`, the same without each group [groups], and what it would be by each vector alone [K]."""
        tokens, vectors = sums["tokens"], self.vectors.double().numpy()
        groups, count = len(tokens), len(vectors)
        together = np.zeros((count, self.stack.width))
        alone, times, own, common = np.zeros(count), np.zeros(count), np.zeros(groups), np.zeros((groups, count))
        each = []
        for group, which in enumerate(self.chosen):
            y = sums["products"][group, layer] - tokens[group] * vectors[which]  # [P, F]
            squares = np.square(y).sum(-1)
            together[which] += y
            alone[which] += squares
            times[which] += 1
            own[group] = squares.sum()
            common[group, which] = squares
            each.append(y)
        whole = np.square(together).sum(-1)

        def square(left_out: int | None) -> float:
            """The formula at the head of this file."""
            kept, sums_of, squares_of, times_of = groups, whole, alone, times
            total, seen = own.sum(), tokens.sum()
            if left_out is not None:
                which = self.chosen[left_out]
                sums_of = whole.copy()
                sums_of[which] = np.square(together[which] - each[left_out]).sum(-1)
                squares_of, times_of = alone - common[left_out], times.copy()
                times_of[which] -= 1
                kept, total, seen = groups - 1, total - own[left_out], seen - tokens[left_out]
            alike = ratio((sums_of - squares_of).sum(), ((times_of - 1) * squares_of)[times_of > 0].sum())
            by_block = 1 / kept + (1 - 1 / kept) * float(np.nan_to_num(alike))
            return self.weight * total / (kept * len(self.chosen[0])) * by_block * (kept / seen) ** 2

        by_vector = alone / np.maximum(times, 1)
        of_all = square(None)
        without = [square(group) for group in range(groups)] if groups > 1 else []
        return of_all, np.array(without), by_vector * (of_all / by_vector.mean() if by_vector.any() else 0.0)

    def _products(self, batch: Batch, layer: int) -> Iterator[Array]:
        """For each of P probes the sum over tokens of `J^T z` of each block, z the block's own: [B, F]."""
        leaf = batch.resid_pre[layer].detach().clone().requires_grad_()
        with (
            self.stack.capture(resid_pre=False, first=layer, last=layer) as capture,
            self.stack.giving(layer, leaf.clone()),
        ):
            self.stack.run_through(layer, batch.blocks.input_ids, batch.blocks.attention_mask)
        out = capture.resid_post[layer]
        mask = batch.token_mask.to(leaf.device)
        for probe in self.chosen[self.group_of[batch.rows]].T:
            vectors = self._everywhere(self.vectors[probe], out, mask)
            (gradient,) = torch.autograd.grad(out, leaf, vectors, retain_graph=True)
            kept = torch.where(mask[..., None], self.stack.flat(gradient), 0)
            yield kept.float().sum(1).cpu().numpy()

    def _everywhere(self, vectors: Tensor, like: Tensor, mask: Tensor) -> Tensor:
        """The vector of each block [B, F] at all of its tokens that count, in the layout of the stream `like`."""
        return self.stack.unflat(mask[..., None].to(like.dtype) * vectors.to(like)[:, None])


def _orthonormal(count: int, features: int, generator: np.random.Generator) -> Tensor:
    """Orthogonal vectors [count, F] of length sqrt(F), in random directions."""
    basis, triangle = np.linalg.qr(generator.standard_normal((features, count)))
    # Without the signs a decomposition prefers some directions.
    return torch.from_numpy((basis * np.sign(np.diag(triangle))).T * features**0.5)


def _shared_out(groups: int, each: int, count: int, generator: np.random.Generator) -> Array:
    """Which of `count` vectors each group measures, [groups, each]: all as often as the others, at random."""
    times, chosen = np.zeros(count), np.zeros((groups, each), dtype=int)
    for group in range(groups):
        chosen[group] = np.lexsort((generator.random(count), times))[:each]
        times[chosen[group]] += 1
    return chosen
