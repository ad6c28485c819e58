"""The losses of many changed models at once, each with other modules in some places, paired by block."""

from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from depthscope.analysis.measure import measure
from depthscope.console.progress import Progress
from depthscope.layers.lanes.lane import Lane
from depthscope.layers.lanes.lanes import Lanes
from depthscope.layers.stack import LayerStack
from depthscope.processes import Processes
from depthscope.scores.base import Array, Batch, Score, Sums, Values
from depthscope.settings import Settings
from depthscope.text.blocks import Blocks

__all__ = ["Losses", "losses_of"]


@dataclass(frozen=True)
class Losses:
    """Sums of next-token losses over each block, nats.

    Attributes:
        predictions: how many were made in each block, [n].
        model: of the model as it stands, [n].
        trials: of each changed model, [n].
        notes: how they were measured.
    """

    predictions: Array
    model: Array
    trials: Mapping[Hashable, Array]
    notes: list[str]

    def of(self, key: Hashable) -> float:
        """The mean loss of a changed model, nats per token."""
        return float(self.trials[key].sum() / self.predictions.sum())

    def error(self, key: Hashable) -> float:
        """The standard error of the difference to the model as it stands, over blocks, nats per token."""
        return paired_error(self.trials[key] - self.model, self.predictions)

    def error_of_model(self) -> float:
        """The standard error of the loss of the model as it stands, over blocks, nats per token."""
        return paired_error(self.model, self.predictions)


def paired_error(differences: Array, predictions: Array) -> float:
    """The standard error of a ratio of sums over blocks, from the residuals of each block; NaN from one block."""
    count = len(differences)
    if count < 2:
        return float("nan")
    residuals = differences - differences.sum() / predictions.sum() * predictions
    return float(np.sqrt(count / (count - 1) * np.square(residuals).sum()) / predictions.sum())


def losses_of(
    lanes: Lanes,
    trials: Mapping[Any, Mapping[int, nn.Module]],
    blocks: Blocks,
    settings: Settings,
    processes: Processes,
    shown: Progress,
) -> Losses:
    """Measure changed models on blocks.

    Args:
        lanes: of the model, in whose layers' places others may stand already.
        trials: what is put in the places of which layers, by name.
        blocks: all of them are measured.
        settings: of losses (exact or not, seed, batch size).
        processes: that share the blocks.
        shown: counts the work.
    """
    sized = settings.with_(fit_blocks=0, eval_blocks=len(blocks), scores=("skip",))
    score = _Trials(lanes.stack, sized, trials)
    baseline, notes = measure(lanes, {score.name: score}, blocks, sized, processes, shown)
    table = score.table("loss", len(trials))
    return Losses(
        baseline["targets"],
        baseline["loss"],
        {key: table[:, column] for column, key in enumerate(trials)},
        notes,
    )


class _Trials(Score):
    """Gathers the losses of changed models."""

    name = "trials"
    experiments = True

    def __init__(self, stack: LayerStack, settings: Settings, trials: Mapping[Any, Mapping[int, nn.Module]]) -> None:
        super().__init__(stack, settings, settings.eval_blocks)
        self.trials = trials
        self.columns = {key: column for column, key in enumerate(trials)}

    def lanes(self, rows: Array) -> Iterable[Lane]:
        """Each changed model."""
        self.table("loss", len(self.trials))
        return [Lane(key, replacements, logits=True) for key, replacements in self.trials.items()]

    def measure_loss(self, batch: Batch, lane: Lane, loss: Array) -> None:
        """Add its losses."""
        self.table("loss", len(self.trials))[batch.rows, self.columns[lane.key]] = loss

    def finish(self, sums: Sums) -> Values:
        """No value of a layer comes of it."""
        return Values()
