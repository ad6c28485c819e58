"""Permutation score: what the loss makes of two layers changing places.

    P[i, j] = |loss(M) - loss(M with layers i and j swapped)| / loss(M)

Losses in nats over the evaluation blocks; the global value is the mean over all pairs i < j, a layer's own is its mean
over partners. arXiv 2603.15389, permutation score. Only layers of equal kind are swapped.

All pairs take about L^3 / 3 layer forwards. A sample takes a share of them: every pair is measured, each on its own
few blocks, all blocks being used equally often. What is lost is only how differently a pair behaves from block to
block, which is little beside how differently pairs behave; the sampling error says how little. Shares of little
more than one block a pair, or less, leave pairs out, at random.
"""

from collections.abc import Iterable

import numpy as np
import torch

from depthscope.layers.lanes.lane import Lane
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import Moved
from depthscope.scores.base import Array, Batch, Score, Sums, Values, mean, ratio
from depthscope.scores.work import forwards_from, head_of_experiment, swappable_pairs
from depthscope.settings import Settings


class Permutation(Score):
    """The relative change of the loss when two layers are swapped, [L, L]."""

    name = "permutation"
    experiments = True

    def __init__(self, stack: LayerStack, settings: Settings, num_blocks: int) -> None:
        super().__init__(stack, settings, num_blocks)
        self.pairs = swappable_pairs(self.extent, adjacent=settings.pairs == "adjacent")
        share = settings.pairs if isinstance(settings.pairs, float) else 1.0
        self.cells = sample_cells(len(self.pairs), num_blocks, share, settings.seed)  # [pairs, blocks] bool

    @property
    def waits(self) -> bool:
        """A sample is drawn of the pairs on all blocks."""
        return isinstance(self.settings.pairs, float)

    def work(self) -> float:
        """Each pair on the blocks that it was given: the layers from the first of the two on, and the head."""
        share = self.cells.mean(1) if len(self.pairs) else np.zeros(0)
        head = head_of_experiment(self.extent, self.settings)
        each = [forwards_from(self.extent, first) + head for first, _ in self.pairs]
        return float(np.dot(share, each))

    def lanes(self, rows: Array) -> Iterable[Lane]:
        """Each pair swapped, on the blocks that are the pair's."""
        layers, count = self.stack.layers, self.stack.num_layers
        self.table("base", count, count)  # stays empty where there are no pairs
        self.table("swapped", count, count)
        for (first, second), cells in zip(self.pairs, self.cells[:, rows], strict=True):
            if cells.any():
                swapped = {first: Moved(layers[second]), second: Moved(layers[first])}
                some = None if cells.all() else torch.from_numpy(np.flatnonzero(cells))
                yield Lane(("swap", first, second), swapped, some, logits=True)

    def measure_loss(self, batch: Batch, lane: Lane, loss: Array) -> None:
        """Add the loss of one swapped pair, and the baseline's on the same blocks."""
        count, (first, second) = self.stack.num_layers, lane.replacements
        cells = slice(None) if lane.rows is None else lane.rows.numpy()
        self.table("base", count, count)[batch.rows[cells], first, second] = batch.loss[cells]
        self.table("swapped", count, count)[batch.rows[cells], first, second] = loss

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
        sampled = [
            _sampled_ratio(base[cells, first, second], swapped[cells, first, second])
            for (first, second), cells in zip(self.pairs, self.cells, strict=True)
            if cells.any()
        ]
        values, spreads, counts = (np.array(column, dtype=float) for column in zip(*sampled, strict=True))
        # A pair that was measured on one block tells nothing of its spread: it gets that of the others.
        known = ~np.isnan(spreads)
        spreads = np.where(known, spreads, np.sqrt(np.square(spreads[known]).mean()) if known.any() else np.nan)
        within = np.square(spreads) / counts * (1 - counts / self.num_blocks)
        measured, everything = len(values), len(self.pairs)
        between = np.var(values, ddof=1) * (1 - measured / everything) / measured if measured > 1 else 0.0
        return float(np.sqrt(between + within.sum() / measured / everything))


def sample_cells(num_pairs: int, num_blocks: int, share: float, seed: int) -> Array:
    """Which pair is measured on which block, [pairs, blocks] bool: every block for about as many pairs.

    Every pair gets one block or more while that leaves some pairs with two, from which the sampling error is told;
    smaller shares leave pairs out, at random, and give the others two.
    """
    if share >= 1 or not num_pairs:
        return np.ones((num_pairs, num_blocks), dtype=bool)
    generator = np.random.default_rng(seed)
    order, cells = generator.permutation(num_pairs), np.zeros((num_pairs, num_blocks), dtype=bool)
    each = share * num_blocks
    if each < 1.25:
        measured = max(1, round(each * num_pairs / 2))
        counts = np.where(np.arange(num_pairs) < measured, min(2, num_blocks), 0)
    else:
        counts = np.where(np.arange(num_pairs) < round((each % 1) * num_pairs), int(each) + 1, int(each))
    for turn, (pair, count) in enumerate(zip(order, counts, strict=True)):
        cells[pair, (turn + np.arange(count) * num_blocks // max(count, 1)) % num_blocks] = True
    return cells


def _sampled_ratio(before: Array, after: Array) -> tuple[float, float, int]:
    """A pair's score on its blocks, how much it spreads from block to block (NaN from one block), and their number."""
    signed, count = (after.sum() - before.sum()) / before.sum(), len(before)
    if count < 2:
        return abs(signed), float("nan"), count
    residuals = (after - before) - signed * before
    return abs(signed), float(np.sqrt(np.square(residuals).sum() / (count - 1)) / before.mean()), count
