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
from typing import Any, Literal

import torch
from torch import Tensor

from depthscope.layers.least_squares import LeastSquares
from depthscope.layers.precision import precise
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import AffineMap
from depthscope.processes import Processes
from depthscope.scores.usefulness import OnFlat
from depthscope.surgery.plans.gaps import Cut, Repair
from depthscope.surgery.plans.last_matrix import LastMatrix, OtherWeights, last_matrix
from depthscope.text.blocks import Blocks

__all__ = ["Calibration", "How"]

How = Literal["map", "weights"]

# The sums of the fits that are gathered at once; those that do not fit in here together take another pass.
ACCUMULATOR_BYTES = 2 << 30


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
        stack = self.stack
        if not fits:
            return
        last = max(gap[-1] for gap in fits)
        for blocks in self.batches:
            ids, mask = blocks.input_ids, blocks.attention_mask
            with stack.capture(resid_pre=False, first=min(gap[-1] for gap in fits), last=last) as whole:
                stack.run_through(last, ids, mask)
            with stack.replacing(cut.replacements()):
                for fit in fits.values():
                    fit.begin()
                try:
                    with stack.capture(resid_post=False, last=max(gap.start for gap in fits)) as own:
                        stack.run_through(max(gap.start for gap in fits), ids, mask)
                finally:
                    for fit in fits.values():
                        fit.end()
            for gap, fit in fits.items():
                fit.add(own.resid_pre[gap.start], whole.resid_post[gap[-1]], blocks.token_mask)
        for fit in fits.values():
            if fit.sums is not None:
                self.processes.add_up(*fit.sums.tensors())


class _Fit:
    """The fit of one repair; without sums there is none to be made."""

    def __init__(self, stack: LayerStack, gap: range, sums: LeastSquares | None) -> None:
        self.stack, self.gap, self.sums = stack, gap, sums

    def begin(self) -> None:
        """Watch what the running pass shows beside the stream."""

    def end(self) -> None:
        """Watch no more."""

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

    def begin(self) -> None:
        assert self.matrix is not None
        self._handle = self.matrix.module.register_forward_hook(self._keep)

    def _keep(self, module: Any, args: tuple[Tensor, ...], result: Tensor) -> None:
        self._given, self._made = args[0], result

    def end(self) -> None:
        self._handle.remove()

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
