"""The cost of leaving out several layers together: the measured loss without a run of layers near the identity."""

from dataclasses import dataclass

import torch

from depthscope import Blocks, LayerReport, LayerStack
from depthscope.loading.loaded import LoadedModel
from depthscope.scores.base import block_losses

__all__ = ["Drop", "measure_drop", "run_to_drop"]

MOST_OF_THE_LAYERS = 0.34
EDGES = 1  # the first and the last layer are never in a run: models rarely work without them


@dataclass(frozen=True)
class Drop:
    """Layers `first` to `last` left out together: the loss is multiplied by `ratio`."""

    first: int
    last: int
    ratio: float

    def in_words(self) -> str:
        """A sentence with the layers and the cost."""
        layers = f"layer {self.first}" if self.first == self.last else f"layers {self.first}-{self.last}"
        return f"Dropping {layers} together multiplies the loss by {self.ratio:.4f}, measured on the same text."


def run_to_drop(report: LayerReport) -> tuple[int, int] | None:
    """Choose the longest run of neighbouring layers near the identity, of several the cheapest; None without one."""
    near = report.near_identity()
    ratios = report.column("skip_ratio")
    if near is None or len(near.layers) < 2:
        return None
    longest = max(2, int(len(ratios) * MOST_OF_THE_LAYERS))
    inner = [layer for layer in near.layers if EDGES <= layer < len(ratios) - EDGES]
    runs = [
        (first, last)
        for first in inner
        for last in range(first + 1, first + longest)
        if all(layer in inner for layer in range(first, last + 1))
    ]
    if not runs:
        return None
    most = max(last - first for first, last in runs)
    return min(
        (run for run in runs if run[1] - run[0] == most),
        key=lambda run: sum((ratios[layer] or 1.0) - 1 for layer in range(run[0], run[1] + 1)),
    )


def measure_drop(loaded: LoadedModel, blocks: Blocks, report: LayerReport) -> Drop | None:
    """Measure the loss without the layers of `run_to_drop`, divided by the loss with them, on the same blocks."""
    run = run_to_drop(report)
    if run is None:
        return None
    fitted = report.data.get("fit_blocks", 0)
    measured = blocks[fitted : fitted + report.data.get("eval_blocks", len(blocks))]
    with torch.no_grad():
        stack = LayerStack(loaded.model)
        whole = _loss(stack, measured)
        with stack.skipping(*range(run[0], run[1] + 1)):
            without = _loss(stack, measured)
    return Drop(run[0], run[1], without / whole)


def _loss(stack: LayerStack, blocks: Blocks) -> float:
    """The sum of the next-token losses in nats, computed one block at a time."""
    total = 0.0
    for index in range(len(blocks)):
        block = blocks[index : index + 1]
        counted = block.token_mask[:, :-1] & block.token_mask[:, 1:]
        total += float(block_losses(stack.logits(block.input_ids), block.input_ids, counted).sum())
    return total
