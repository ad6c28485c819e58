"""Repair without training: an affine map over a gap, or other weights in the layer before it.

The target, for a gap from layer a to layer b, is the stream h that the whole model has after layer b; what it is
predicted from is what the cut model makes of the calibration blocks, so that a repair makes up for earlier gaps too.
Least squares in float64; gaps are repaired in the order of the layers.

    map      h ~ x + x V + c,  x the stream before the gap. Over one layer of a model that is whole elsewhere it is the
             map of the usefulness score; over longer gaps that of Ghosted Layers (arXiv 2605.15491).
    weights  h ~ r + W' m,     in layer a - 1: m is what the last matrix W of its MLP gets, r the rest of the stream
             after the layer. What remains is a model of the same class (after ReplaceMe, arXiv 2505.02819, which
             multiplies W by the map, and so leaves out r).
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any, Literal

import torch
from torch import Tensor

from depthscope.layers.least_squares import LeastSquares
from depthscope.layers.precision import precise
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import AffineMap
from depthscope.processes import Processes
from depthscope.scores.usefulness import ACCUMULATOR_BYTES, OnFlat
from depthscope.surgery.plans.gaps import Cut, Repair
from depthscope.surgery.plans.last_matrix import LastMatrix, OtherWeights, last_matrix
from depthscope.text.blocks import Blocks

__all__ = ["Calibration", "How"]

How = Literal["map", "weights"]

# Streams of the whole model on the calibration blocks that are kept; more are computed anew.
STREAMS_BYTES = 2 << 30


class Calibration:
    """The blocks that repairs are fitted on.

    Args:
        stack: the whole model's layers.
        blocks: the blocks.
        batch_size: how many run at once.
        ridge: pulls maps towards the identity, and weights towards what they are; relative to the mean variance of a
            feature.
        processes: that share the blocks.
    """

    def __init__(self, stack: LayerStack, blocks: Blocks, batch_size: int, ridge: float, processes: Processes) -> None:
        self.stack, self.ridge, self.processes = stack, ridge, processes
        rows = processes.share(range(len(blocks)))
        self.batches = [
            blocks.select(torch.tensor(rows[start : start + batch_size])) for start in range(0, len(rows), batch_size)
        ]
        self._matrices: dict[int, LastMatrix | None] = {}
        self._kept: dict[int, list[Tensor]] = {}  # the whole model's streams, by batch

    def repaired(self, removed: Iterable[int], how: How = "map") -> Cut:
        """The cut model with each of its gaps repaired, one after the other."""
        cut = Cut()
        for gap in Cut(frozenset(removed)).gaps:
            [(_, repair)] = self.repairs_of(cut, [gap], how)
            cut = cut.and_without(gap, repair)
        return cut

    def repairs_of(self, cut: Cut, gaps: Iterable[range], how: How = "map") -> Iterator[tuple[range, Repair]]:
        """A repair of each of some gaps, each for the cut model with that gap alone more; empty where there is none."""
        wanted = list(gaps)
        at_once = max(1, ACCUMULATOR_BYTES // (16 * self.stack.width**2))
        for start in range(0, len(wanted), at_once):
            some = wanted[start : start + at_once]
            fits: dict[range, _Fit] = {gap: self._fit(gap, how) for gap in some}
            self._gather(cut, {gap: fit for gap, fit in fits.items() if fit.sums is not None})
            for gap, fit in fits.items():
                yield gap, fit.repair(self.ridge)

    def matrix(self, layer: int) -> LastMatrix | None:
        """The last matrix of a layer's MLP, if all that it makes is added to the stream."""
        if layer not in self._matrices:
            self._matrices[layer] = last_matrix(self.stack, layer)
        return self._matrices[layer]

    def _fit(self, gap: range, how: How) -> "_Fit":
        if how == "map":
            return _MapFit(self.stack, gap)
        return _WeightsFit(self.stack, gap, self.matrix(gap.start - 1) if gap.start else None)

    def _gather(self, cut: Cut, fits: "dict[range, _Fit]") -> None:
        """Add the calibration blocks to fits; of the cut model only those layers run that can matter to them."""
        if not fits:
            return
        stack, replacements = self.stack, cut.replacements()
        first = min([*replacements, *(fit.runs_from for fit in fits.values()), stack.num_layers])
        last = max(gap.start for gap in fits) - 1
        for number, blocks in enumerate(self.batches):
            whole = self.streams(number)
            before = dict(enumerate(whole[: first + 1]))
            if first <= last:
                with ExitStack() as running:
                    running.enter_context(stack.replacing(replacements))
                    for fit in fits.values():
                        running.enter_context(fit.watching())
                    if stack.resumable:
                        running.enter_context(stack.resume_from(first, whole[first]))
                    own = running.enter_context(stack.capture(resid_pre=False, first=first, last=last))
                    stack.run_through(last, blocks.input_ids, blocks.attention_mask)
                before |= {layer + 1: stream for layer, stream in own.resid_post.items()}
            for gap, fit in fits.items():
                fit.add(before[gap.start], whole[gap.stop], blocks.token_mask)
        for fit in fits.values():
            if fit.sums is not None:
                self.processes.add_up(*fit.sums.tensors())

    def streams(self, number: int) -> list[Tensor]:
        """The stream of the whole model before each layer, and after the last, on one batch: kept if there is room."""
        if number not in self._kept:
            stack, blocks = self.stack, self.batches[number]
            with stack.capture() as seen:
                stack.run_through(stack.num_layers - 1, blocks.input_ids, blocks.attention_mask)
            layers = range(stack.num_layers)
            streams = [*(seen.resid_pre[layer] for layer in layers), seen.resid_post[stack.num_layers - 1]]
            size = sum(stream.numel() * stream.element_size() for stream in streams)
            if size * len(self.batches) > STREAMS_BYTES:
                return streams
            self._kept[number] = streams
        return self._kept[number]


class _Fit:
    """The fit of one repair; without sums there is none to be made."""

    def __init__(self, stack: LayerStack, gap: range, sums: LeastSquares | None) -> None:
        self.stack, self.gap, self.sums = stack, gap, sums

    @property
    def runs_from(self) -> int:
        """The first layer that has to run, also where nothing has changed before the gap."""
        return self.gap.start

    def watching(self) -> AbstractContextManager[None]:
        """Watch what the running pass shows beside the stream."""
        return nullcontext()

    def add(self, before: Tensor, target: Tensor, there: Tensor) -> None:
        """Add the tokens of a batch: the stream before the gap, that after it in the whole model, those that count."""
        raise NotImplementedError

    def repair(self, ridge: float) -> Repair:
        """What repairs the gap."""
        raise NotImplementedError


class _MapFit(_Fit):
    sums: LeastSquares

    def __init__(self, stack: LayerStack, gap: range) -> None:
        super().__init__(stack, gap, LeastSquares(stack.width))

    def add(self, before: Tensor, target: Tensor, there: Tensor) -> None:
        x, h = (self.stack.flat(stream) for stream in (before, target))
        keep = there.to(x.device)
        self.sums.add(x[keep], h.to(x.device)[keep])

    def repair(self, ridge: float) -> Repair:
        fit = self.sums.solve(ridge)
        return {self.gap.start: OnFlat(self.stack, AffineMap(fit.weight, fit.bias, residual=True))}


class _WeightsFit(_Fit):
    def __init__(self, stack: LayerStack, gap: range, matrix: LastMatrix | None) -> None:
        sums = None
        if matrix is not None:
            made, given = matrix.weight.shape
            sums = LeastSquares(given, made, has_bias=matrix.bias is not None)
        super().__init__(stack, gap, sums)
        self.matrix = matrix

    @property
    def runs_from(self) -> int:
        """The layer of the matrix."""
        return self.gap.start - 1

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Keep what the matrix gets and makes."""
        assert self.matrix is not None

        def keep(module: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
            self._given, self._made = args[0], result

        handle = self.matrix.module.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def add(self, before: Tensor, target: Tensor, there: Tensor) -> None:
        assert self.matrix is not None
        assert self.sums is not None
        x, h = (self.stack.flat(stream) for stream in (before, target))
        keep = there.to(x.device).flatten()
        given, made = (each.flatten(0, -2)[keep] for each in (self._given, self._made))
        rest = precise(x.flatten(0, 1)[keep]) - precise(made)
        missing = precise(h.to(x.device).flatten(0, 1)[keep]) - rest - precise(self.matrix.made(given))
        self.sums.add(given, missing)

    def repair(self, ridge: float) -> Repair:
        if self.matrix is None or self.sums is None:
            return {}
        fit = self.sums.solve(ridge)
        layer = self.matrix.layer
        parameters = self.matrix.updated(fit.weight, fit.bias)
        return {layer: OtherWeights(self.stack.layers[layer], self.matrix, parameters)}
