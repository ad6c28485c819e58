"""Skip ratio: what the loss becomes when a layer is left out.

`s_l = loss(model without layer l) / loss(model)`, next-token cross-entropy in nats over the evaluation blocks; layer
l's output is its input. It comes for the price of the causal score's pass plus one head. Its participation ratio is the
effective depth (by skipping).
"""

from depthscope.scores.base import Batch, Score, SkippedRun, Sums, Values, effective_depth, mean, ratio


class Skip(Score):
    """The loss ratio of skipping each layer."""

    name = "skip"
    skip_losses = True
    experiments = True

    def measure_skip(self, batch: Batch, run: SkippedRun) -> None:
        """Add the loss of one skipped layer."""
        assert run.loss is not None
        self.table("loss")[batch.rows] = batch.loss
        self.table("skip_loss", self.stack.num_layers)[batch.rows, run.layer] = run.loss

    def finish(self, sums: Sums) -> Values:
        """Divide by the baseline's loss."""
        ratios = ratio(sums["skip_loss"], sums["loss"])
        for layer in self.stack.unskippable:
            ratios[layer] = float("nan")
        return Values(
            scores={"skip_ratio": mean(ratios), "effective_depth_skip": effective_depth(ratios)},
            layers={"skip_ratio": ratios},
        )
