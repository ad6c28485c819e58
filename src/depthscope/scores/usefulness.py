"""Usefulness: what the loss becomes when a layer is replaced by the best affine map of its input.

Fit `h_l ~ h_{l-1} W_l + b_l` by least squares over the tokens of the fitting blocks; with M_l the model that has the
affine map in layer l's place,

    r_l = loss(M_l) / loss(M),

and usefulness is the share of layers with `r_l` above a threshold (1.1 in the paper). Losses in nats over the
evaluation blocks. arXiv 2603.15389, usefulness score.

The sums that the fits of all layers need are gathered in one pass over the fitting blocks (`least_squares.py`).
"""

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from depthscope.layers.lanes.lane import Lane
from depthscope.layers.least_squares import Fit, LeastSquares
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import AffineMap
from depthscope.scores.base import Array, Batch, Score, Sums, Values, effective_depth, mean, ratio
from depthscope.text.blocks import Blocks

# The sums of a fit take 16 d^2 bytes per layer; more layers than fit in here take another pass.
ACCUMULATOR_BYTES = 2 << 30


class OnFlat(nn.Module):
    """Applies a map of [B, T, S * d] to a residual stream in the model's own layout."""

    def __init__(self, stack: LayerStack, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner
        self._flat, self._unflat = stack.flat, stack.unflat

    def forward(self, hidden: Tensor) -> Tensor:
        """Map a stream to a stream of the same layout."""
        return self._unflat(self.inner(self._flat(hidden)))


class StoredMap(nn.Module):
    """An affine map that lies in a file and is read when it is applied."""

    def __init__(self, affine: AffineMap, path: Path) -> None:
        super().__init__()
        self.path, self.residual = path, affine.residual
        save_file({name: value.contiguous() for name, value in affine.state_dict().items()}, path)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map [..., d] to [..., d]."""
        stored = load_file(self.path)
        affine = AffineMap(stored["weight"], stored["bias"], residual=self.residual)
        mapped: Tensor = affine(hidden)
        return mapped


class Usefulness(Score):
    """The loss ratio of linearising each layer, and the share of layers where it exceeds the threshold."""

    name = "usefulness"
    experiments = True

    def fit(self, batches: Callable[[], Iterable[Blocks]], add_up: Callable[..., None]) -> None:
        """Fit the affine maps of all layers: one pass over the fitting blocks for as many layers as memory holds.

        Args:
            batches: gives this process's fitting blocks, a batch at a time, each time it is called.
            add_up: adds tensors up over all processes, in place.
        """
        layers = [layer for layer in range(self.stack.num_layers) if layer not in self.stack.unskippable]
        at_once = max(1, ACCUMULATOR_BYTES // (16 * self.stack.width**2))
        self.maps: dict[int, nn.Module] = {}
        self.undetermined: list[int] = []
        if self.stack.is_offloaded:
            self._fit_in_one_pass(layers, batches(), add_up)
            return
        for start in range(0, len(layers), at_once):
            self._fit_some(layers[start : start + at_once], batches(), add_up)

    def lanes(self, rows: Array) -> Iterable[Lane]:
        """Each layer linearised."""
        return [
            Lane(("linear", layer), {layer: OnFlat(self.stack, affine)}, logits=True)
            for layer, affine in self.maps.items()
        ]

    def measure_loss(self, batch: Batch, lane: Lane, loss: Array) -> None:
        """Add the loss of one linearised layer."""
        self.table("loss")[batch.rows] = batch.loss
        self.table("linear_loss", self.stack.num_layers)[batch.rows, lane.start] = loss

    def _fit_some(self, layers: list[int], batches: Iterable[Blocks], add_up: Callable[..., None]) -> None:
        sums = {layer: LeastSquares(self.stack.width) for layer in layers}
        with self.stack.capture(first=layers[0], last=layers[-1]) as capture:
            for blocks in batches:
                self.stack.run_through(layers[-1], blocks.input_ids, blocks.attention_mask)
                for layer in layers:
                    before, after = (
                        self.stack.flat(capture.resid_pre[layer]),
                        self.stack.flat(capture.resid_post[layer]),
                    )
                    mask = blocks.token_mask.to(before.device)
                    sums[layer].add(before[mask], after[mask])
        for layer in layers:
            self._solve(layer, sums.pop(layer), add_up)

    def _fit_in_one_pass(self, layers: list[int], batches: Iterable[Blocks], add_up: Callable[..., None]) -> None:
        """Fit each layer as it runs, on all fitting blocks at once: its weights are read once, and no sums are kept."""
        folder = TemporaryDirectory(prefix="depthscope-maps-")
        weakref.finalize(self, folder.cleanup)

        def solve(layer: int, sums: LeastSquares) -> None:
            self._solve(layer, sums, add_up)
            affine = self.maps[layer]
            assert isinstance(affine, AffineMap)
            self.maps[layer] = StoredMap(affine, Path(folder.name) / f"{layer}.safetensors")

        blocks = next(iter(batches), None)
        if blocks is None:  # this process has none, but the others wait for its sums
            for layer in layers:
                solve(layer, LeastSquares(self.stack.width))
            return

        def on_layer(layer: int, before: Tensor, after: Tensor) -> None:
            if layer in layers:
                mask, sums = blocks.token_mask.to(before.device), LeastSquares(self.stack.width)
                sums.add(self.stack.flat(before)[mask], self.stack.flat(after)[mask])
                solve(layer, sums)

        with self.stack.observing(on_layer):
            self.stack.run_through(self.stack.num_layers - 1, blocks.input_ids, blocks.attention_mask)

    def _solve(self, layer: int, sums: LeastSquares, add_up: Callable[..., None]) -> None:
        add_up(*sums.tensors())
        fit = sums.solve(self.settings.ridge)
        self.maps[layer] = self._affine(fit)
        if not fit.determined:
            self.undetermined.append(layer)

    def _affine(self, fit: Fit) -> AffineMap:
        if not self.settings.paper_code:
            return AffineMap(fit.weight, fit.bias, residual=True)
        # The released code hands the solution of `X W = Y` to nn.Linear, which multiplies by its transpose.
        whole = fit.weight + torch.eye(len(fit.bias), dtype=fit.weight.dtype, device=fit.weight.device)
        return AffineMap(whole.T, fit.bias)

    def finish(self, sums: Sums) -> Values:
        """Divide by the baseline's loss; count the layers above the threshold."""
        ratios = ratio(sums["linear_loss"], sums["loss"])
        for layer in self.stack.unskippable:
            ratios[layer] = np.nan
        defined = ratios[~np.isnan(ratios)]
        return Values(
            scores={
                "usefulness": mean((defined > self.settings.threshold).astype(float)),
                "usefulness_ratio": mean(ratios),
                "usefulness_excess": float((defined - 1).sum()) if defined.size else float("nan"),
                "effective_depth_linear": effective_depth(ratios),
            },
            layers={"usefulness_ratio": ratios},
        )
