"""Jacobian distance: how far a layer's derivative is from the identity.

`J_l` is the mean over tokens t of the sum over t' of `d h_l[t'] / d h_{l-1}[t]`, a d x d matrix (all streams of a token
taken as one vector), and

    D_l = ||J_l - I||_F / d.

The global value is the mean over layers. No unit. arXiv 2603.15389, Jacobian distance.

For a vector z, one backward pass with z as the gradient at every t' gives `J^T z` for all tokens at once. With random
signs, `E ||(J - I)^T z||^2 = ||J - I||_F^2` (Hutchinson), so a few probes replace d backward passes; with the d unit
vectors the value is exact. The same probes serve all layers and blocks.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from depthscope.anatomy import LayerStack
from depthscope.modes import frozen
from depthscope.scores.base import Array, Batch, Explanation, Score, Sums, Values, mean
from depthscope.settings import Settings

# Products with probes are kept for groups of blocks, so that standard errors can be told: as many as fit in here.
GROUP_BYTES = 256 << 20
MOST_GROUPS = 16
# A backward pass with respect to the input costs about as much as a forward pass.
BACKWARD_WORK = 1.2


class Jacobian(Score):
    """`||J_l - I||_F / d` of each layer, estimated with random probes or exact."""

    explanation = Explanation(
        name="jacobian",
        title="Jacobian distance",
        meaning="How far a layer's derivative is from the identity: near 0, the layer hardly transforms what passes.",
        formula="D_l = ||J_l - I||_F / d,  J_l = mean over t of sum over t' of d h_l[t'] / d h_(l-1)[t]",
        unit="none",
        source="arXiv 2603.15389; probes: Hutchinson's estimator",
    )

    def __init__(self, stack: LayerStack, settings: Settings, num_blocks: int) -> None:
        super().__init__(stack, settings, num_blocks)
        self.probes = _probes(stack.width, settings)  # [P, F]
        group_bytes = stack.num_layers * self.probes.numel() * 8
        groups = max(1, min(num_blocks, MOST_GROUPS, GROUP_BYTES // group_bytes))
        self.group_of = np.arange(num_blocks) * groups // num_blocks
        self.groups = groups

    def work(self) -> float:
        """Each layer: one forward pass and a backward pass a probe."""
        return sum(self._layer_work(layer) for layer in range(self.stack.num_layers))

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Add the batch's products of every layer's transposed Jacobian with the probes."""
        products = self.table("products", self.stack.num_layers, *self.probes.shape, rows=self.groups)
        tokens = self.table("tokens", rows=self.groups)
        # Each block is a batch of its own in its group's sum, so groups need not follow batches.
        np.add.at(tokens, self.group_of[batch.rows], batch.token_mask.sum(1).cpu().numpy())
        with frozen(self.stack.model), torch.enable_grad():
            for layer in range(self.stack.num_layers):
                for probe, product in enumerate(self._products(batch, layer)):
                    np.add.at(products[:, layer, probe], self.group_of[batch.rows], product)
                tick(len(batch.rows) * self._layer_work(layer))

    def finish(self, sums: Sums) -> Values:
        """Hold the mean products against the probes themselves."""
        squares = self._squares(sums)
        distance = np.sqrt(squares.mean(1) if self.settings.probes != "exact" else squares.sum(1)) / self.stack.width
        return Values(scores={"jacobian": mean(distance)}, layers={"jacobian": distance})

    def probe_error(self) -> float | None:
        """The standard error of the global value that random probes bring: 0 if exact, None for one probe."""
        if self.settings.probes == "exact":
            return 0.0
        squares = self._squares({name: table.sum(0) for name, table in self.sums.items()})
        count = squares.shape[1]
        if count < 2:
            return None
        # The same probes serve all layers, so the errors of the layers do not average out as if independent.
        roots = np.sqrt(squares.mean(1, keepdims=True))
        shifts = (squares / (2 * roots)).mean(0) / self.stack.width
        return float(shifts.std(ddof=1) / np.sqrt(count))

    def _squares(self, sums: Sums) -> Array:
        """`||(J_l - I)^T z||^2` of each layer and probe, [L, P]."""
        return np.square(sums["products"] / sums["tokens"] - self.probes.numpy()).sum(-1)

    def _products(self, batch: Batch, layer: int) -> list[Array]:
        """For each probe the sum over tokens of `J^T z` of each block: P arrays [B, F]."""
        leaf = batch.inputs[layer].detach().clone().requires_grad_()
        with self.stack.capturing(inputs=False, first=layer) as capture, self.stack.giving(layer, leaf.clone()):
            self.stack.run_through(layer, batch.blocks.input_ids, batch.blocks.attention_mask)
        out = capture.outputs[layer]
        mask = batch.token_mask.to(leaf.device)
        products = []
        for probe in self.probes:
            (gradient,) = torch.autograd.grad(out, leaf, self._everywhere(probe, out, mask), retain_graph=True)
            kept = torch.where(mask[..., None], self.stack.flat(gradient), 0)
            products.append(kept.float().sum(1).cpu().numpy())
        return products

    def _everywhere(self, probe: Tensor, like: Tensor, mask: Tensor) -> Tensor:
        """A probe at every token that counts, in the layout of the stream `like`."""
        return self.stack.unflat(mask[..., None].to(like.dtype) * probe.to(like))

    def _layer_work(self, layer: int) -> float:
        before = 0 if self.stack.resumable else layer
        return before + 1 + BACKWARD_WORK * len(self.probes)


def _probes(features: int, settings: Settings) -> Tensor:
    """Random signs [P, F], the same for a seed everywhere, or the F unit vectors."""
    if settings.probes == "exact":
        return torch.eye(features)
    generator = torch.Generator().manual_seed(settings.seed)
    return torch.randint(0, 2, (int(settings.probes), features), generator=generator).float() * 2 - 1
