"""`VarianceCallback`: how the variance of the residual stream grows through the layers while a model trains.

All are means over the real tokens of the measured training passes since the last log, read at the output of each
decoder layer, before the final norm (arXiv 2603.15389). With `h` the stream before layer l, `u` its update, `Var` the
unbiased variance over the features of a token (the mean over parallel streams, where there are several):

    variance              Var(h + u)                         v_l
    variance_update       Var(u)                             its own part of the growth v_l - v_(l-1)
    variance_covariance   2 Cov(h, u)                        the other part: how far it goes along with the stream
    update_norm           sum ||u|| / sum ||h||              how long the update is beside the stream
    attention_variance    Var(what the attention returned)   with `sublayers`; of what the submodule returns, before any
    mlp_variance          Var(what the MLP returned)         norm of its output
    attention_norm        ||what the attention returned||
    mlp_norm              ||what the MLP returned||

With `moments_every`, in the steps so chosen, of the stream after the layer; z are a token's features, standardised:

    skewness              mean of z^3
    kurtosis              mean of z^4 (3 for a normal distribution)
    outliers              share of features with |z| > 3, the paper's threshold (0.0027 for a normal distribution)
    max_activation        the largest |feature| of any token (not a mean)

and the single numbers `variance` (of the last layer), `variance_growth` (last over first layer).
"""

import logging
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from depthscope.anatomy import LayerStack
from depthscope.callbacks.base import Measured, WindowCallback
from depthscope.callbacks.watching import Watch
from depthscope.errors import SettingsError

__all__ = ["VarianceCallback"]

logger = logging.getLogger(__name__)

# What is summed for each layer, each over tokens.
STREAM = ("tokens", "variance", "variance_input", "variance_update", "update_length", "stream_length")
PARTS = ("attention_tokens", "attention_variance", "attention_norm", "mlp_tokens", "mlp_variance", "mlp_norm")
MOMENTS = ("moment_tokens", "skewness", "kurtosis", "outliers")
SUMMED = STREAM + PARTS + MOMENTS
OUTLIER = 3.0
NEVER = float("inf")


class VarianceCallback(WindowCallback):
    """Tracks each layer's variance in any Trainer script: `Trainer(..., callbacks=[VarianceCallback()])`.

    Values are logged with the training loss, as `layers/<metric>/<layer>`, to whatever the Trainer reports to and to
    `state.log_history`, and appended to `layer_stats.jsonl` in the output directory. The file of this class says what
    each metric is.

    Args:
        every: measure every n-th optimiser step.
        sublayers: measure what attention and MLP return too.
        moments_every: measure skewness, kurtosis, outliers and the largest activation every n-th optimiser step.
        log: "layers" logs every layer, "summary" the first, the last and the quartiles over layers, "none" only single
            numbers; the history has every layer in any case.
        history: keep `layer_stats.jsonl`.

    Raises:
        NoLayerStackError: (when the Trainer is built) the model has no plain stack of decoder layers.
        SettingsError: an argument is not allowed.
    """

    kind = "variance"

    def __init__(
        self,
        every: int = 1,
        sublayers: bool = True,
        moments_every: int | None = None,
        log: str = "layers",
        history: bool = True,
    ) -> None:
        super().__init__(every, log, history)
        if moments_every is not None and (not isinstance(moments_every, int) or moments_every < 1):
            raise SettingsError(f"moments_every is {moments_every!r}; give a number of steps, at least 1, or None.")
        self.sublayers = sublayers
        self.moments_every = moments_every
        self._watch: Watch | None = None
        self._steps: dict[torch.device, Tensor] = {}
        self._sums: list[_LayerSums] = []
        self._previous: tuple[Tensor, Tensor, Tensor] | None = None
        self._moments = False
        self._told = False

    def options(self) -> dict[str, Any]:
        """The arguments of this callback."""
        return {**super().options(), "sublayers": self.sublayers, "moments_every": self.moments_every}

    def attach(self, stack: LayerStack) -> None:
        """Put the hooks on."""
        devices = [_device_of(layer, stack.device) for layer in stack.layers]
        exact = {device: torch.float32 if device.type == "mps" else torch.float64 for device in devices}
        self._steps = {device: torch.zeros((), dtype=dtype, device=device) for device, dtype in exact.items()}
        self._sums = [_LayerSums(device, self._steps[device]) for device in devices]
        self._watch = Watch(stack, self._on_layer, self._on_part if self.sublayers else None)

    def detach(self) -> None:
        """Take the hooks off."""
        if self._watch is not None:
            self._watch.remove()
        self._watch, self._sums, self._previous = None, [], None

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every n-th step."""
        super().on_step_begin(args, state, control, **kwargs)
        self._moments = self.moments_every is not None and state.global_step % self.moments_every == 0
        for step in self._steps.values():
            step.fill_(state.global_step + 1)

    def measure(self, on: bool) -> None:
        """Switch measuring on or off."""
        if self._watch is not None:
            self._watch.measuring = on

    def fetch(self) -> None:
        """One transfer of [L, metrics]."""
        if not self._sums:
            return
        device = self._sums[0].sums.device
        table = torch.stack([sums.table().to(device) for sums in self._sums])
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            count = len(SUMMED)
            added, largest, earliest = table[:, :count], table[:, count].contiguous(), table[:, count + 1].contiguous()
            added = added.contiguous()
            dist.all_reduce(added)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            dist.all_reduce(earliest, op=dist.ReduceOp.MIN)
            table = torch.cat([added, largest[:, None], earliest[:, None]], 1)
        fetched = table.cpu().double().numpy()
        for sums in self._sums:
            sums.clear()
        if fetched[:, : len(SUMMED)].any() or np.isfinite(fetched[:, -1]).any():
            self.window = _merged(self.window, fetched)

    def finish(self, window: dict[str, Any]) -> Measured:
        """Divide sums by numbers of tokens."""
        sums = {name: np.array([row[i] for row in window["sums"]]) for i, name in enumerate(SUMMED)}
        layers = {name: _ratio(sums[name], sums["tokens"]) for name in ("variance", "variance_update")}
        growth = layers["variance"] - _ratio(sums["variance_input"], sums["tokens"])
        layers["variance_covariance"] = growth - layers["variance_update"]
        layers["update_norm"] = _ratio(sums["update_length"], sums["stream_length"])
        for part in ("attention", "mlp") if self.sublayers else ():
            for metric in ("variance", "norm"):
                layers[f"{part}_{metric}"] = _ratio(sums[f"{part}_{metric}"], sums[f"{part}_tokens"])
        if sums["moment_tokens"].any():
            layers |= {name: _ratio(sums[name], sums["moment_tokens"]) for name in MOMENTS[1:]}
            layers["max_activation"] = np.array(window["largest"])
        variance = layers["variance"]
        values = {"variance": float(variance[-1]), "variance_growth": float(_ratio(variance[-1:], variance[:1])[0])}
        extra = {"tokens": int(sums["tokens"].max()), **self._not_finite(window, values)}
        return Measured(values, {name: column.tolist() for name, column in layers.items()}, extra)

    def _not_finite(self, window: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
        """Where activations first were NaN or infinite, for the log, the history and, once, the console."""
        steps = [(step, layer) for layer, step in enumerate(window["not_finite"]) if step is not None]
        if not steps:
            return {}
        step, layer = min(steps)
        values |= {"not_finite_step": float(step), "not_finite_layer": float(layer)}
        if not self._told:
            logger.warning(
                "Activations are not finite: first after layer %d, in step %d. Passes with such activations are left "
                "out of the layer's values.",
                layer,
                int(step),
            )
            self._told = True
        return {"not_finite": {"step": int(step), "layer": layer}}

    def _on_layer(self, index: int, before: Tensor, after: Tensor, mask: Tensor | None) -> None:
        assert self._stack is not None
        before_view, after_view = self._stack.features(before), self._stack.features(after)  # [B, T, S, d]
        if self._previous is not None and self._previous[0] is before:
            _, variance_input, length_input = self._previous
        else:
            variance_input, length_input = _spread(before_view)
        variance, length = _spread(after_view)
        variance_update, length_update = _spread(after_view.float() - before_view.float())
        self._previous = (after, variance, length) if index + 1 < len(self._sums) else None
        values = [variance, variance_input, variance_update, length_update, length_input]
        self._sums[index].add(STREAM, values, mask)
        if self._moments:
            self._sums[index].add(MOMENTS, _moments(after_view), mask)
            self._sums[index].raise_largest(after_view.abs().amax((-2, -1)), mask)

    def _on_part(self, index: int, part: str, output: Tensor, mask: Tensor | None) -> None:
        if output.dim() == 2:  # some mixtures of experts return their tokens in one row
            output = output.view(*(mask.shape if mask is not None else (1, output.shape[0])), output.shape[-1])
        names = (f"{part}_tokens", f"{part}_variance", f"{part}_norm")
        self._sums[index].add(names, list(_spread(output[..., None, :])), mask)


class _LayerSums:
    """The sums of one layer, on its device, and what cannot be summed: a maximum, and a first step.

    Nothing here looks at a value: that would wait for the device in every pass.
    """

    def __init__(self, device: torch.device, step: Tensor) -> None:
        self.step = step  # the step that runs now
        self.sums = torch.zeros(len(SUMMED), dtype=step.dtype, device=device)
        self.largest = torch.zeros((), dtype=step.dtype, device=device)
        self.not_finite = torch.full((), NEVER, dtype=step.dtype, device=device)

    def add(self, names: tuple[str, ...], values: list[Tensor], mask: Tensor | None) -> None:
        """Add values [B, T] each to the sums called `names[1:]`, and the number of tokens to `names[0]`."""
        stacked = _masked(torch.stack([torch.ones_like(values[0]), *values]), mask)
        total = stacked.sum((1, 2), dtype=self.sums.dtype)
        # A pass with NaN or infinity in it is left out of the layer's sums, and noted.
        finite = torch.isfinite(total).all()
        start = SUMMED.index(names[0])
        self.sums[start : start + len(names)] += torch.where(finite, total, 0)
        self.not_finite.copy_(torch.where(finite, self.not_finite, torch.minimum(self.not_finite, self.step)))

    def raise_largest(self, values: Tensor, mask: Tensor | None) -> None:
        """Keep the largest of values [B, T]."""
        highest = torch.nan_to_num(_masked(values[None], mask), nan=0.0, posinf=0.0).max()
        self.largest.copy_(torch.maximum(self.largest, highest.to(self.largest.dtype)))

    def table(self) -> Tensor:
        """All of it in one tensor: the sums, the maximum, the step."""
        return torch.cat([self.sums, self.largest[None], self.not_finite[None]])

    def clear(self) -> None:
        """Begin anew."""
        self.sums.zero_()
        self.largest.zero_()
        self.not_finite.fill_(NEVER)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    """Values [K, B, T] with zeros where there is no real token."""
    if mask is None or mask.shape != values.shape[1:]:
        return values
    return torch.where(mask.to(values.device, torch.bool), values, 0)


def _spread(view: Tensor) -> tuple[Tensor, Tensor]:
    """Variance over the features (the mean over streams) and length of each token: [B, T, S, d] -> [B, T] twice."""
    width = view.shape[-1]
    variance, mean = torch.var_mean(view.float(), -1)
    squares = (width - 1) * variance + width * mean.square()
    return variance.mean(-1), squares.sum(-1).sqrt()


def _moments(view: Tensor) -> list[Tensor]:
    """Skewness, kurtosis and share of outliers of each token: [B, T, S, d] -> [B, T] each."""
    values = view.float()
    variance, mean = torch.var_mean(values, -1, keepdim=True, correction=0)
    z = (values - mean) * torch.where(variance == 0, 1.0, variance).rsqrt()
    squares = z.square()
    return [(squares * z).mean((-2, -1)), squares.square().mean((-2, -1)), (z.abs() > OUTLIER).float().mean((-2, -1))]


def _merged(window: dict[str, Any] | None, fetched: np.ndarray) -> dict[str, Any]:
    """A window with what was fetched [L, sums + 2] added to it, in numbers that JSON has."""
    count = len(SUMMED)
    sums, largest, first = fetched[:, :count], fetched[:, count], fetched[:, count + 1]
    if window is not None:
        sums = sums + np.array(window["sums"])
        largest = np.maximum(largest, window["largest"])
        first = np.minimum(first, [NEVER if step is None else step for step in window["not_finite"]])
    return {
        "sums": sums.tolist(),
        "largest": largest.tolist(),
        "not_finite": [int(step) if np.isfinite(step) else None for step in first],
    }


def _ratio(above: np.ndarray, below: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(below != 0, above / np.where(below != 0, below, 1), np.nan)


def _device_of(layer: nn.Module, otherwise: torch.device) -> torch.device:
    weight = next(layer.parameters(), None)
    return otherwise if weight is None or weight.device.type == "meta" else weight.device
