"""Usefulness: what the loss becomes when a layer is replaced by the best affine map of its input.

Fit `h_l ~ h_{l-1} W_l + b_l` by least squares over the tokens of the fitting blocks; with M_l the model that has the
affine map in layer l's place,

    r_l = loss(M_l) / loss(M),

and usefulness is the share of layers with `r_l` above a threshold (1.1 in the paper). Losses in nats over the
evaluation blocks. arXiv 2603.15389, usefulness score.

With `Settings.sublayers`, attention and MLP are linearised too, each alone: what it returns is fitted from what it is
given, which for most models is the normalised stream.

The sums that the fits of all layers need are gathered in one pass over the fitting blocks (`least_squares.py`).
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from depthscope.errors import AnalysisError
from depthscope.layers.lanes.lane import Lane
from depthscope.layers.lanes.parts import by_part, named, part_of, parts_of
from depthscope.layers.lanes.sublayers import Change, Part, WithPart, given_to
from depthscope.layers.least_squares import Fit, LeastSquares
from depthscope.layers.stack import LayerStack
from depthscope.layers.stand_ins import AffineMap, LayerResult, hidden_of
from depthscope.layers.tracing import PARTS
from depthscope.scores.base import Array, Batch, Score, Sums, Values, effective_depth, mean, ratio
from depthscope.text.blocks import Blocks

# The sums of a fit take 16 d^2 bytes; those that do not fit in here together take another pass.
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


@dataclass(frozen=True)
class _LayerFit:
    """The fit of a layer."""

    layer: int
    width: int

    @property
    def size(self) -> int:
        """The bytes of its sums."""
        return 16 * self.width**2

    def begin(self) -> LeastSquares:
        """Empty sums."""
        return LeastSquares(self.width)


@dataclass(frozen=True)
class _PartFit:
    """The fit of a part of a layer."""

    part: Part
    features: tuple[int, int]

    @property
    def size(self) -> int:
        """The bytes of its sums."""
        return 8 * self.features[0] * sum(self.features)

    def begin(self) -> LeastSquares:
        """Empty sums."""
        return LeastSquares(*self.features)


def _adding(part: Part, sums: Mapping[Part, LeastSquares], mask: list[Tensor]) -> Callable[..., None]:
    """A hook that adds what a part is given and returns to its sums, by the mask [B, T] in the list."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: LayerResult) -> None:
        given, returned = given_to(args, kwargs), hidden_of(result)
        if given is not None:
            there = part.tokens(mask[0]).to(given.device)
            sums[part].add(given.flatten(0, -2)[there], returned.flatten(0, -2)[there])

    return hook


def _made(affine: nn.Module) -> Change:
    """What a part returns, made by an affine map of what it is given."""

    def change(given: Tensor | None, returned: Tensor) -> Tensor:
        if given is None:
            raise AnalysisError("A sublayer was not given what it was fitted on; run the analysis again.")
        mapped: Tensor = affine(given.flatten(0, -2))
        return mapped.reshape(returned.shape).to(returned)

    return change


class Usefulness(Score):
    """The loss ratio of linearising each layer, and the share of layers where it exceeds the threshold."""

    name = "usefulness"
    experiments = True

    @property
    def waits(self) -> bool:
        """Maps that are fitted on the evaluation blocks need all of them."""
        return self.settings.fits_in_sample

    def fit(self, batches: Callable[[], Iterable[Blocks]], add_up: Callable[..., None]) -> None:
        """Fit all affine maps: one pass over the fitting blocks for as many as memory holds.

        Args:
            batches: gives this process's fitting blocks, a batch at a time, each time it is called.
            add_up: adds tensors up over all processes, in place.
        """
        self.maps: dict[int, nn.Module] = {}
        self.part_maps: dict[Part, nn.Module] = {}
        self.undetermined: list[int] = []
        self.undetermined_parts: list[Part] = []
        if self.stack.is_offloaded:
            self._fit_in_one_pass([fit for fits in self._groups() for fit in fits], batches(), add_up)
            return
        for fits in self._groups():
            self._fit_some(fits, batches(), add_up)

    def lanes(self, rows: Array) -> Iterable[Lane]:
        """Each layer linearised, and each part."""
        layers = [
            Lane(("linear", layer), {layer: OnFlat(self.stack, affine)}, logits=True)
            for layer, affine in self.maps.items()
        ]
        parts = [
            Lane(("linear", part.layer, part.name), {part.layer: WithPart(part.module, _made(affine))}, logits=True)
            for part, affine in self.part_maps.items()
        ]
        return [*layers, *parts]

    def measure_loss(self, batch: Batch, lane: Lane, loss: Array) -> None:
        """Add the loss with one layer linearised, or one part."""
        self.table("loss")[batch.rows] = batch.loss
        self.table(f"{part_of(lane)}linear_loss", self.stack.num_layers)[batch.rows, lane.start] = loss

    def notes(self) -> list[str]:
        """Which parts have no map, or none that the text determines."""
        notes = []
        if unmapped := [part for part in parts_of(self.stack, self.settings.sublayers) if part.features is None]:
            notes.append(
                f"sublayers: {named(unmapped)}: what it is given is not one vector a token, or is written into, so no "
                "affine map can be fitted; those usefulness ratios are empty."
            )
        if self.undetermined_parts:
            notes.append(
                f"The fitting text does not determine the linear map of the {named(self.undetermined_parts)} (too few "
                "distinct inputs); the one of least norm was taken. Raise fit_blocks."
            )
        return notes

    def _groups(self) -> Iterator[list["_LayerFit | _PartFit"]]:
        """All fits in the order of the layers, as many at a time as memory holds."""
        group: list[_LayerFit | _PartFit] = []
        room = ACCUMULATOR_BYTES
        for layer in range(self.stack.num_layers):
            fits: list[_LayerFit | _PartFit] = []
            if layer not in self.stack.unskippable:
                fits.append(_LayerFit(layer, self.stack.width))
            for part in parts_of(self.stack, self.settings.sublayers):
                if part.layer == layer and part.features is not None:
                    fits.append(_PartFit(part, part.features))
            for fit in fits:
                if group and room < fit.size:
                    yield group
                    group, room = [], ACCUMULATOR_BYTES
                group.append(fit)
                room -= fit.size
        if group:
            yield group

    def _fit_some(
        self, fits: list["_LayerFit | _PartFit"], batches: Iterable[Blocks], add_up: Callable[..., None]
    ) -> None:
        whole = {fit.layer: fit.begin() for fit in fits if isinstance(fit, _LayerFit)}
        parts = {fit.part: fit.begin() for fit in fits if isinstance(fit, _PartFit)}
        last = max([*whole, *(part.layer for part in parts)])
        with ExitStack() as watching:
            mask: list[Tensor] = [torch.empty(0)]  # of the running batch
            for part in parts:
                hook = part.module.register_forward_hook(_adding(part, parts, mask), with_kwargs=True)
                watching.callback(hook.remove)
            first = min(whole, default=last)
            capture = watching.enter_context(self.stack.capture(first=first, last=max(whole, default=last)))
            for blocks in batches:
                mask[0] = blocks.token_mask
                self.stack.run_through(last, blocks.input_ids, blocks.attention_mask)
                for layer, sums in whole.items():
                    before, after = (
                        self.stack.flat(stream[layer]) for stream in (capture.resid_pre, capture.resid_post)
                    )
                    there = blocks.token_mask.to(before.device)
                    sums.add(before[there], after[there])
        for layer in list(whole):
            self._solve(layer, whole.pop(layer), add_up)
        for part in list(parts):
            self._solve_part(part, parts.pop(part), add_up)

    def _fit_in_one_pass(
        self, fits: list["_LayerFit | _PartFit"], batches: Iterable[Blocks], add_up: Callable[..., None]
    ) -> None:
        """Fit each layer as it runs, on all fitting blocks at once: its weights are read once, and no sums are kept."""
        folder = TemporaryDirectory(prefix="depthscope-maps-")
        weakref.finalize(self, folder.cleanup)
        blocks = next(iter(batches), None)  # None: this process has none, but the others wait for its sums
        mask = [torch.empty(0) if blocks is None else blocks.token_mask]
        parts = {fit.part: fit.begin() for fit in fits if isinstance(fit, _PartFit)}
        layers = {fit.layer for fit in fits if isinstance(fit, _LayerFit)}

        def stored(affine: nn.Module, name: str) -> nn.Module:
            assert isinstance(affine, AffineMap)
            return StoredMap(affine, Path(folder.name) / f"{name}.safetensors")

        def solve(layer: int, sums: LeastSquares) -> None:
            if layer in layers:
                self._solve(layer, sums, add_up)
                self.maps[layer] = stored(self.maps[layer], str(layer))
            for part in [part for part in parts if part.layer == layer]:
                self._solve_part(part, parts.pop(part), add_up)
                self.part_maps[part] = stored(self.part_maps[part], f"{layer}-{part.name}")

        def on_layer(layer: int, before: Tensor, after: Tensor) -> None:
            there, sums = mask[0].to(before.device), LeastSquares(self.stack.width)
            if layer in layers:
                sums.add(self.stack.flat(before)[there], self.stack.flat(after)[there])
            solve(layer, sums)

        if blocks is None:
            for layer in range(self.stack.num_layers):
                solve(layer, LeastSquares(self.stack.width))
            return
        with ExitStack() as watching:
            for part in parts:
                hook = part.module.register_forward_hook(_adding(part, parts, mask), with_kwargs=True)
                watching.callback(hook.remove)
            watching.enter_context(self.stack.observing(on_layer))
            self.stack.run_through(self.stack.num_layers - 1, blocks.input_ids, blocks.attention_mask)

    def _solve(self, layer: int, sums: LeastSquares, add_up: Callable[..., None]) -> None:
        add_up(*sums.tensors())
        fit = sums.solve(self.settings.ridge)
        self.maps[layer] = self._affine(fit)
        if not fit.determined:
            self.undetermined.append(layer)

    def _solve_part(self, part: Part, sums: LeastSquares, add_up: Callable[..., None]) -> None:
        add_up(*sums.tensors())
        fit = sums.solve(self.settings.ridge)
        self.part_maps[part] = AffineMap(fit.weight, fit.bias)
        # A LayerNorm before the part takes one direction away, on any text.
        self.undetermined_parts += [part] * (fit.missing > 1)

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
        parts = {part: ratio(sums[name], sums["loss"]) for part in PARTS if (name := f"{part}_linear_loss") in sums}
        for part in parts_of(self.stack, self.settings.sublayers):
            if part.features is None and part.name in parts:
                parts[part.name][part.layer] = np.nan
        return Values(
            scores={
                "usefulness": mean((defined > self.settings.threshold).astype(float)),
                "usefulness_ratio": mean(ratios),
                "usefulness_excess": float((defined - 1).sum()) if defined.size else float("nan"),
                "effective_depth_linear": effective_depth(ratios),
            },
            layers={
                "usefulness_ratio": ratios,
                **by_part(self.stack, self.settings.sublayers, "usefulness_ratio", parts),
            },
        )
