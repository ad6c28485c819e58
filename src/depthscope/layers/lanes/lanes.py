"""Many experiments in one pass over the layers: each is a lane beside the model's own pass.

An experiment changes some layers and leaves the others as they are. Until its first changed layer it does what the
model does, so it begins there, with the model's own state:

    layer        0    1    2    3    4    -> final norm, head
    model        o -- o -- o -- o -- o
    lane A            x -- o -- o -- o       layer 1 skipped
    lane B                 x -- o -- x       layers 2 and 4 swapped

A stand-in at every layer runs the model's own rows, and then all lanes that have begun, many in one batch: the weights
of a layer are read once for all of them. The model's own code makes masks and positions; how each of a layer's
arguments grows with the batch is learnt from two passes over the embeddings alone. Where a layer cannot take a larger
batch, its lanes run in turn. Where a lane would not be what the experiment is alone (layers that read what earlier ones
left behind), each experiment has a pass of its own. Which of the three is right is tried on a small example.
"""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Literal

import torch
from torch import Tensor

from depthscope.layers.lanes.lane import Lane, Limits, Step
from depthscope.layers.lanes.passes import LanePass, OneByOne
from depthscope.layers.memory import is_out_of_memory
from depthscope.layers.modes import evaluating
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import PassThrough
from depthscope.layers.tracing import MODEL_FAILURES

__all__ = ["Lanes", "Way"]

Way = Literal["batched", "in turn", "alone"]


class Lanes:
    """Runs experiments on a layer stack, as many at a time as the model and the memory allow.

    Args:
        stack: the layers.
        way: "batched", "in turn" or "alone"; by default the first of them that is right on a small example.

    Attributes:
        limits: how much is done at once.
    """

    def __init__(self, stack: LayerStack, way: Way | None = None) -> None:
        self.stack = stack
        self.limits = Limits.of(stack.device.type, offloaded=stack.is_offloaded)
        self._way = way

    @property
    def way(self) -> Way:
        """How experiments run here: all at once, in turn at each layer, or each in a pass of its own."""
        if self._way is None:
            with evaluating(self.stack.model), torch.no_grad():
                self._way = self._right_way()
        return self._way

    def prepare(self) -> None:
        """Try now, on the small example, what the model allows, and not when it is first asked for."""
        _ = self.way, self.stack.unskippable

    def over(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        lanes: Iterable[Lane],
        *,
        observe: Callable[[Step], None] | None = None,
        tick: Callable[[float], None] | None = None,
    ) -> "LanePass":
        """Prepare lanes over a batch.

        Args:
            input_ids: the batch, [B, T].
            attention_mask: [B, T], or None where all tokens are there.
            lanes: the experiments.
            observe: gets the residual streams of the lanes that are watched.
            tick: counts the work as it is done, in passes of one sequence through one layer.
        """
        experiments = list(lanes)
        kind = OneByOne if experiments and self.way == "alone" else LanePass
        batch = (input_ids, attention_mask)
        is_batched = self.way == "batched" if experiments else False
        return kind(self.stack, self.limits, batch, experiments, observe, tick, is_batched=is_batched)

    def _right_way(self) -> Way:
        expected = {}
        for index in self._places():
            with suppress(*MODEL_FAILURES), self.stack.skipping(index):
                expected[Lane(index, {index: PassThrough()}, logits=True)] = self.stack.logits(self.stack.example_ids)
        ways: tuple[Way, ...] = ("batched", "in turn")
        return next((way for way in ways if Lanes(self.stack, way)._gives(expected)), "alone")

    def _places(self) -> list[int]:
        """Layers to try: the second, one in the middle, and wherever another type of layer begins."""
        types, count = self.stack.layer_types, self.stack.num_layers
        first_of_type = {kind: index for index, kind in reversed(list(enumerate(types))) if index}
        return sorted({min(1, count - 1), count // 2, *first_of_type.values()})

    def _gives(self, expected: Mapping[Lane, Tensor]) -> bool:
        """Whether lanes give what each experiment gives alone, and leave the model's own pass as it is."""
        stack, ids = self.stack, self.stack.example_ids
        self.limits.state_bytes = stack.width * ids.numel() * 4 * max(1, len(expected) - 1)  # two passes
        try:
            lanes = self.over(ids, None, expected)
            with lanes.beside():
                own = stack.logits(ids)
            if self.way == "batched" and not lanes.is_batched:
                return False
            results = dict(lanes.logits())
            return stack.is_close(own, stack.example_logits) and all(
                stack.is_close(results[lane], logits) for lane, logits in expected.items()
            )
        except MODEL_FAILURES as error:
            if is_out_of_memory(error):
                raise
            return False
