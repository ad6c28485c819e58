"""Causal score: how much the later layers' work depends on a layer.

Skip layer s (its output is its input). For each later layer l, with u_l its update and u_l' its update then,

    C[s, l] = mean_t ||u_l' - u_l||_2 / mean_t ||u_l||_2,        s < l.

The global value is the mean over all pairs s < l; a layer's own is its mean over the later layers (none for the last).
No unit. arXiv 2603.15389, causal score. An untrained model already has a high causal score: alone it is no proof of
useful work.

With `Settings.sublayers`, attention and MLP have a score of their own: what the one returns is zero in layer s, the
rest of the layer runs, and C is averaged over the later layers.
"""

from collections.abc import Iterable

import numpy as np
from torch import Tensor

from depthscope.layers.lanes.lane import Lane, Step
from depthscope.layers.lanes.parts import by_part, part_of, without_lanes
from depthscope.layers.tracing import PARTS
from depthscope.scores.base import Array, Batch, Score, Sums, Values, mean, ratio
from depthscope.scores.skip import skipping_lanes


class Causal(Score):
    """The relative change of every later layer's update when a layer is skipped, [L, L]."""

    name = "causal"
    experiments = True

    def lanes(self, rows: Array) -> Iterable[Lane]:
        """Each layer skipped, and each part left out, and the later layers watched."""
        return [
            *skipping_lanes(self.stack, watched=True),
            *without_lanes(self.stack, self.settings.sublayers, watched=True),
        ]

    def observe(self, batch: Batch, layer: int, before: Tensor, after: Tensor) -> None:
        """Add the length of the baseline's update."""
        count = self.stack.num_layers
        self.table("change", count, count)  # stays empty in a model of one layer
        length = self._update(before, after).norm(dim=-1)
        self.table("length", count)[batch.rows, layer] = batch.masked_sum(length)

    def measure_step(self, batch: Batch, step: Step) -> None:
        """Add the changes of a later layer's update."""
        count = self.stack.num_layers
        changed = self._update(step.resid_pre, step.resid_post).unflatten(0, (len(step.lanes), -1))
        change = (changed - self._update(step.model_pre, step.model_post)).norm(dim=-1)  # [K, B, T]
        for lane, sums in zip(step.lanes, batch.masked_sum(change), strict=True):
            self.table(f"{part_of(lane)}change", count, count)[batch.rows, lane.start, step.layer] = sums

    def _update(self, before: Tensor, after: Tensor) -> Tensor:
        """What a layer adds to the stream, [B, T, S * d], in at least float32."""
        return self.stack.flat(after.float() - before.float())

    def finish(self, sums: Sums) -> Values:
        """Divide, and average over the pairs that are defined."""
        effects = self._effects(sums, "change")
        parts = {part: _rows(self._effects(sums, name)) for part in PARTS if (name := f"{part}_change") in sums}
        effects[list(self.stack.unskippable)] = np.nan
        return Values(
            scores={"causal": mean(effects)},
            layers={"causal": _rows(effects), **by_part(self.stack, self.settings.sublayers, "causal", parts)},
            pairs={"causal": effects},
        )

    def _effects(self, sums: Sums, name: str) -> Array:
        """The changes of later updates over their lengths, [L, L], NaN but for later ones."""
        effects = ratio(sums[name], np.broadcast_to(sums["length"], sums[name].shape))
        effects[~np.triu(np.ones_like(effects, dtype=bool), 1)] = np.nan
        return effects


def _rows(effects: Array) -> Array:
    """The mean of each row, [L]."""
    return np.array([mean(row) for row in effects])
