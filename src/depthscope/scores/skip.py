"""Skip ratio: what the loss becomes when a layer is left out.

`s_l = loss(model without layer l) / loss(model)`, next-token cross-entropy in nats over the evaluation blocks; layer
l's output is its input. It comes for the price of the causal score's pass plus one head. Its participation ratio is the
effective depth (by skipping).

With `Settings.sublayers`, attention and MLP have ratios of their own: what the one returns is zero, and the rest of the
layer runs.
"""

from collections.abc import Iterable

from depthscope.layers.lanes.lane import Lane
from depthscope.layers.lanes.parts import by_part, part_of, without_lanes
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import PassThrough
from depthscope.layers.tracing import PARTS
from depthscope.scores.base import Array, Batch, Score, Sums, Values, effective_depth, mean, ratio


class Skip(Score):
    """The loss ratio of skipping each layer."""

    name = "skip"
    experiments = True

    def lanes(self, rows: Array) -> Iterable[Lane]:
        """Each layer skipped, and each part left out."""
        return [
            *skipping_lanes(self.stack, logits=True),
            *without_lanes(self.stack, self.settings.sublayers, logits=True),
        ]

    def measure_loss(self, batch: Batch, lane: Lane, loss: Array) -> None:
        """Add the loss of one skipped layer, or of one without a part."""
        self.table("loss")[batch.rows] = batch.loss
        self.table(f"{part_of(lane)}skip_loss", self.stack.num_layers)[batch.rows, lane.start] = loss

    def finish(self, sums: Sums) -> Values:
        """Divide by the baseline's loss."""
        parts = {part: ratio(sums[name], sums["loss"]) for part in PARTS if (name := f"{part}_skip_loss") in sums}
        ratios = ratio(sums["skip_loss"], sums["loss"])
        for layer in self.stack.unskippable:
            ratios[layer] = float("nan")
        return Values(
            scores={"skip_ratio": mean(ratios), "effective_depth_skip": effective_depth(ratios)},
            layers={"skip_ratio": ratios, **by_part(self.stack, self.settings.sublayers, "skip_ratio", parts)},
        )


def skipping_lanes(stack: LayerStack, *, logits: bool = False, watched: bool = False) -> Iterable[Lane]:
    """A lane for each layer that can be skipped, with what is wanted of it."""
    layers = (layer for layer in range(stack.num_layers) if layer not in stack.unskippable)
    return [Lane(("skip", layer), {layer: PassThrough()}, logits=logits, watched=watched) for layer in layers]
