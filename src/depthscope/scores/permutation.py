"""Permutation score: what the loss makes of two layers changing places.

    P[i, j] = |loss(M) - loss(M with layers i and j swapped)| / loss(M)

Losses in nats over the evaluation blocks; the global value is the mean over all pairs i < j, a layer's own is its mean
over partners. arXiv 2603.15389, permutation score. Only layers of equal kind are swapped.

All pairs take about L^3 / 3 layer forwards. A sample takes a share of them: every pair is measured, each on its own
few blocks, all blocks being used equally often. What is lost is only how differently a pair behaves from block to
block, which is little beside how differently pairs behave; the sampling error says how little. Shares too small for
two blocks a pair leave pairs out, at random.
"""

from collections.abc import Callable
from itertools import combinations

import numpy as np
import torch

from depthscope.anatomy import LayerStack
from depthscope.scores.base import (
    Array,
    Batch,
    Explanation,
    Score,
    Sums,
    Values,
    experiment_loss,
    forwards_from,
    mean,
    ratio,
)
from depthscope.settings import Settings


class Permutation(Score):
    """The relative change of the loss when two layers are swapped, [L, L]."""

    explanation = Explanation(
        name="permutation",
        title="Permutation score",
        meaning="How much the loss changes when two layers change places: 0 means that they are interchangeable, so "
        "their order, and with it depth, is not put to use.",
        formula="P[i,j] = |loss - loss(i and j swapped)| / loss;  mean over pairs i < j",
        unit="none",
        source="arXiv 2603.15389",
    )

    def __init__(self, stack: LayerStack, settings: Settings, num_blocks: int) -> None:
        super().__init__(stack, settings, num_blocks)
        self.pairs = swappable_pairs(stack, adjacent=settings.pairs == "adjacent")
        share = settings.pairs if isinstance(settings.pairs, float) else 1.0
        self.cells = sample_cells(len(self.pairs), num_blocks, share, settings.seed)  # [pairs, blocks] bool

    def work(self) -> float:
        """Each pair on each of its blocks: the layers from the first of the two on, and the head."""
        share = self.cells.mean(1) if len(self.pairs) else np.zeros(0)
        each = [forwards_from(self.stack, first) + self.head for first, _ in self.pairs]
        return float(np.dot(share, each))

    def measure(self, batch: Batch, tick: Callable[[float], None]) -> None:
        """Add the loss of the batch with each pair swapped in turn, on the blocks that are the pair's."""
        count = self.stack.num_layers
        base, swapped = self.table("base", count, count), self.table("swapped", count, count)
        for (first, second), cells in zip(self.pairs, self.cells[:, batch.rows], strict=True):
            if not cells.any():
                continue
            rows = None if cells.all() else torch.from_numpy(np.flatnonzero(cells))
            with self.stack.swapped(first, second):
                swapped[batch.rows[cells], first, second] = experiment_loss(self.stack, batch, first, rows)
            base[batch.rows[cells], first, second] = batch.loss[cells]
            tick(int(cells.sum()) * (forwards_from(self.stack, first) + self.head))

    def finish(self, sums: Sums) -> Values:
        """Divide by the baseline's loss on the same blocks; average over the pairs that were measured."""
        changes = ratio(np.abs(sums["base"] - sums["swapped"]), sums["base"])
        symmetric = np.where(np.isnan(changes), changes.T, changes)
        scores: dict[str, Array | float] = {"permutation": mean(changes)}
        return Values(
            scores=scores,
            layers={"permutation": np.array([mean(row) for row in symmetric])},
            pairs={"permutation": symmetric},
        )

    def sampling_error(self) -> float:
        """The standard error of the global score that comes from measuring each pair on some blocks only.

        Two-stage sampling: pairs first (where any were left out), then each pair's blocks, with the corrections for
        drawing from finitely many. 0 where everything was measured.
        """
        if self.cells.all() or not len(self.pairs):
            return 0.0
        base, swapped = self.sums["base"], self.sums["swapped"]
        values, within = [], []
        for (first, second), cells in zip(self.pairs, self.cells, strict=True):
            if cells.any():
                before, after = base[cells, first, second], swapped[cells, first, second]
                value, error = _sampled_ratio(before, after, self.num_blocks)
                values.append(value)
                within.append(error)
        measured, everything = len(values), len(self.pairs)
        between = np.var(values, ddof=1) * (1 - measured / everything) / measured if measured > 1 else 0.0
        return float(np.sqrt(between + np.sum(np.square(within)) / measured / everything))


def swappable_pairs(stack: LayerStack, *, adjacent: bool) -> list[tuple[int, int]]:
    """Pairs of layers i < j of equal kind, in order of i; with `adjacent` only neighbours."""
    pairs = combinations(range(stack.num_layers), 2)
    return [(i, j) for i, j in pairs if stack.kinds[i] == stack.kinds[j] and (j == i + 1 or not adjacent)]


def sample_cells(num_pairs: int, num_blocks: int, share: float, seed: int) -> Array:
    """Which pair is measured on which block, [pairs, blocks] bool: every block for as many pairs, spread evenly.

    Each measured pair gets at least two blocks (where there are two), so that its sampling error can be told.
    """
    if share >= 1 or not num_pairs:
        return np.ones((num_pairs, num_blocks), dtype=bool)
    generator = np.random.default_rng(seed)
    each = min(num_blocks, max(2, round(share * num_blocks)))
    measured = min(num_pairs, max(1, round(share * num_blocks * num_pairs / each)))
    cells = np.zeros((num_pairs, num_blocks), dtype=bool)
    for turn, pair in enumerate(generator.permutation(num_pairs)[:measured]):
        steps = np.arange(each) * num_blocks // each
        cells[pair, (turn + steps) % num_blocks] = True
    return cells


def _sampled_ratio(before: Array, after: Array, num_blocks: int) -> tuple[float, float]:
    """A pair's score on its blocks, and its standard error as an estimate of the score on all blocks."""
    value = abs(before.sum() - after.sum()) / before.sum()
    count = len(before)
    if count < 2 or count == num_blocks:
        return value, 0.0
    signed = (after.sum() - before.sum()) / before.sum()
    residuals = (after - before) - signed * before
    variance = (residuals**2).sum() / (count - 1) / count / before.mean() ** 2
    return value, float(np.sqrt(variance * (1 - count / num_blocks)))
