"""Causal score: how much the later layers' work depends on a layer.

Skip layer s (its output is its input). For each later layer l, with u_l its update and u_l' its update then,

    C[s, l] = mean_t ||u_l' - u_l||_2 / mean_t ||u_l||_2,        s < l.

The global value is the mean over all pairs s < l; a layer's own is its mean over the later layers (none for the last).
No unit. arXiv 2603.15389, causal score. An untrained model already has a high causal score: alone it is no proof of
useful work.
"""

from collections.abc import Callable

import numpy as np
from torch import Tensor

from depthscope.scores.base import Batch, Score, SkippedRun, Sums, Values, mean, ratio


class Causal(Score):
    """The relative change of every later layer's update when a layer is skipped, [L, L]."""

    name = "causal"
    skip_updates = True
    experiments = True

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Keep the baseline's updates, which every skipped layer's run is held against."""
        count = self.stack.num_layers
        self.table("change", count, count)  # stays empty in a model of one layer
        self._updates = [self._update(batch.resid_pre, batch.resid_post, layer) for layer in range(count)]
        for layer, update in enumerate(self._updates):
            self.table("length", count)[batch.rows, layer] = batch.masked_sum(update.norm(dim=-1))

    def measure_skip(self, batch: Batch, run: SkippedRun) -> None:
        """Add the changes of all later layers' updates."""
        count = self.stack.num_layers
        for layer in range(run.layer + 1, count):
            change = self._update(run.resid_pre, run.resid_post, layer).sub_(self._updates[layer])
            self.table("change", count, count)[batch.rows, run.layer, layer] = batch.masked_sum(change.norm(dim=-1))

    def _update(self, inputs: dict[int, Tensor], outputs: dict[int, Tensor], layer: int) -> Tensor:
        """What a layer adds to the stream, [B, T, S * d], in at least float32."""
        return self.stack.flat(outputs[layer].float() - inputs[layer].float())

    def finish(self, sums: Sums) -> Values:
        """Divide, and average over the pairs that are defined."""
        effects = ratio(sums["change"], np.broadcast_to(sums["length"], sums["change"].shape))
        effects[~np.triu(np.ones_like(effects, dtype=bool), 1)] = np.nan
        effects[list(self.stack.unskippable)] = np.nan
        return Values(
            scores={"causal": mean(effects)},
            layers={"causal": np.array([mean(row) for row in effects])},
            pairs={"causal": effects},
        )
