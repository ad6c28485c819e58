"""`VarianceCallback`: how the variance of the residual stream grows through the layers while a model trains.

All are means over the real tokens of the measured training passes since the last log, at the output of each decoder
layer, before the final norm (arXiv 2603.15389). `h` is the residual stream before layer l, `u` its update, `Var`
the unbiased variance over the features of a token (the mean over parallel streams, if there are several):

    variance              Var(h + u)                         v_l
    variance_update       Var(u)                             the update's part of the growth v_l - v_(l-1)
    variance_covariance   2 Cov(h, u)                        the other part: alignment with the residual stream
    update_norm           sum ||u|| / sum ||h||              the size of the update relative to the residual stream
    attention_variance    Var(output of the attention)       with `sublayers`; before any norm of the output
    mlp_variance          Var(output of the MLP)
    attention_norm        ||output of the attention||
    mlp_norm              ||output of the MLP||

With `moments_every`, at these steps, of the residual stream after the layer; z are a token's standardised features:

    skewness              mean of z^3
    kurtosis              mean of z^4 (3 for a normal distribution)
    outliers              share of features with |z| > 3, the paper's threshold (0.0027 for a normal distribution)
    max_activation        the largest |feature| of any token (not a mean)

and the global numbers `variance` (of the last layer) and `variance_growth` (last over first layer).
"""

import logging
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from depthscope.callbacks.hooks import Watch
from depthscope.callbacks.window import Measured, WindowCallback
from depthscope.errors import SettingsError
from depthscope.layers.stack import LayerStack

__all__ = ["VarianceCallback"]

logger = logging.getLogger(__name__)

# The sums over tokens, per layer.
STREAM = ("tokens", "variance", "variance_input", "variance_update", "update_length", "stream_length")
PARTS = ("attention_tokens", "attention_variance", "attention_norm", "mlp_tokens", "mlp_variance", "mlp_norm")
MOMENTS = ("moment_tokens", "skewness", "kurtosis", "outliers")
SUMMED = STREAM + PARTS + MOMENTS
OUTLIER = 3.0
NEVER = float("inf")


class VarianceCallback(WindowCallback):
    """Tracks each layer's variance in any Trainer script: `Trainer(..., callbacks=[VarianceCallback()])`.

    Values are logged with the training loss, as `layers/<metric>/<layer>`, to the Trainer's reporters and to
    `state.log_history`, and appended to `layer_stats.jsonl` in the output directory. The docstring of this module
    defines each metric.

    Args:
        every: optimiser steps between measurements.
        sublayers: also measure the outputs of attention and MLP.
        moments_every: optimiser steps between measurements of skewness, kurtosis, outliers and largest activation.
        log: "layers" logs every layer; "summary" logs the first, the last and the quartiles over layers; "none" logs
            only global numbers. The history has every layer in any case.
        history: whether to write `layer_stats.jsonl`.

    Raises:
        NoLayerStackError: (when the Trainer is created) the model has no plain stack of decoder layers.
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
        self._sums: _Sums | None = None
        # Of the current pass, by "stream", "attention" and "mlp".
        self._pass_spreads: dict[str, list[_Spreads]] = {}
        self._pass_moments: list[tuple[int, Tensor]] = []
        self._previous: tuple[Tensor, int, _Spread] | None = (
            None  # the last residual stream, its version, and its spread
        )
        self._buffers = _Buffers()
        self._moments = False
        self._has_warned = False

    def options(self) -> dict[str, Any]:
        """The arguments of this callback."""
        return {**super().options(), "sublayers": self.sublayers, "moments_every": self.moments_every}

    def attach(self, stack: LayerStack) -> None:
        """Register the hooks."""
        self._sums = _Sums(stack.num_layers, _device_of(stack))
        on_sublayer = self._on_sublayer if self.sublayers else None
        self._watch = Watch(
            stack, self._on_layer, on_sublayer, begin=self._begin_pass, end=self._end_pass, drop=self._begin_pass
        )

    def detach(self) -> None:
        """Remove the hooks."""
        if self._watch is not None:
            self._watch.remove()
        self._watch, self._sums, self._buffers = None, None, _Buffers()
        self._begin_pass()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Switch on the measurement of the steps chosen by `every` and `moments_every`."""
        super().on_step_begin(args, state, control, **kwargs)
        self._moments = self.moments_every is not None and state.global_step % self.moments_every == 0
        if self._sums is not None:
            self._sums.step.fill_(state.global_step + 1)

    def fetch(self) -> None:
        """Fetch the sums [L, metrics] in one transfer."""
        if self._sums is None:
            return
        fetched = self._sums.fetch()
        if fetched[:, : len(SUMMED)].any() or np.isfinite(fetched[:, -1]).any():
            self.window = _merged(self.window, fetched)

    def fits(self, window: Any, stack: LayerStack) -> bool:
        """Whether a window holds the sums of this model's layers."""
        count = stack.num_layers
        steps = window["not_finite"]
        return (
            np.isfinite(np.array(window["sums"], float)).all()
            and np.array(window["sums"], float).shape == (count, len(SUMMED))
            and np.array(window["largest"], float).shape == (count,)
            and len(steps) == count
            and all(step is None or isinstance(step, int) for step in steps)
        )

    def finish(self, window: dict[str, Any]) -> Measured:
        """Divide the sums by the numbers of tokens."""
        sums = {name: np.array([row[i] for row in window["sums"]]) for i, name in enumerate(SUMMED)}
        layers = {name: _ratio(sums[name], sums["tokens"]) for name in ("variance", "variance_update")}
        growth = layers["variance"] - _ratio(sums["variance_input"], sums["tokens"])
        layers["variance_covariance"] = growth - layers["variance_update"]
        layers["update_norm"] = _ratio(sums["update_length"], sums["stream_length"])
        for sublayer in ("attention", "mlp") if self.sublayers else ():
            for metric in ("variance", "norm"):
                layers[f"{sublayer}_{metric}"] = _ratio(sums[f"{sublayer}_{metric}"], sums[f"{sublayer}_tokens"])
        if sums["moment_tokens"].any():
            layers |= {name: _ratio(sums[name], sums["moment_tokens"]) for name in MOMENTS[1:]}
            layers["max_activation"] = np.array(window["largest"])
        variance = layers["variance"]
        values = {"variance": float(variance[-1]), "variance_growth": float(_ratio(variance[-1:], variance[:1])[0])}
        extra = {"tokens": int(sums["tokens"].max()), **self._not_finite(window, values)}
        return Measured(values, {name: column.tolist() for name, column in layers.items()}, extra)

    def _not_finite(self, window: dict[str, Any], values: dict[str, float]) -> dict[str, Any]:
        """The first step and layer with NaN or infinite activations, for the log and the history; warn of it once."""
        steps = [(step, layer) for layer, step in enumerate(window["not_finite"]) if step is not None]
        if not steps:
            return {}
        step, layer = min(steps)
        values |= {"not_finite_step": float(step), "not_finite_layer": float(layer)}
        if not self._has_warned:
            logger.warning(
                "Activations are not finite: first after layer %d, in step %d. Passes with such activations are not "
                "included in the layer's values.",
                layer,
                int(step),
            )
            self._has_warned = True
        return {"not_finite": {"step": int(step), "layer": layer}}

    def _begin_pass(self) -> None:
        self._pass_spreads = {"stream": [], "attention": [], "mlp": []}
        self._pass_moments, self._previous = [], None

    def _on_layer(self, index: int, before: Tensor, after: Tensor) -> None:
        assert self._stack is not None
        # A layer's input is the output of the layer before it, which is measured already, unless it was changed in
        # place since then. A compiler removes repeated work itself, and cannot compare the identity of tensors.
        compiling = torch.compiler.is_compiling()
        if (
            not compiling
            and self._previous is not None
            and self._previous[0] is before
            and self._previous[1] == before._version
        ):
            into = self._previous[2]
        else:
            into = _Spread.of(self._stack.features(before), self._buffers, "before")  # [B, T, S, d]
        view = self._stack.features(after)
        out = _Spread.of(view, self._buffers, "after" if into.buffer == "before" else "before")
        self._pass_spreads["stream"].append(_Spreads(index, out, into, out.distance(into, self._buffers)))
        self._previous = None if compiling else (after, after._version, out)
        if self._moments:
            self._pass_moments.append((index, _moments(view)))

    def _on_sublayer(self, index: int, sublayer: str, output: Tensor) -> None:
        # All tokens in one row, since some mixtures of experts return them so.
        spread = _Spread.of(output.reshape(1, -1, 1, output.shape[-1]), self._buffers, "scratch")
        self._pass_spreads[sublayer].append(_Spreads(index, spread, spread, spread.length))

    def _end_pass(self, mask: Tensor | None) -> None:
        """Add the values of a pass to the sums, all layers at once, with as few operations as for one layer."""
        if self._sums is None or self._stack is None or not self._pass_spreads["stream"]:
            return
        shape = self._pass_spreads["stream"][0].length.shape[:2]
        real = mask if mask is not None and mask.shape == shape else None
        for kind, names in (("stream", STREAM), ("attention", PARTS[:3]), ("mlp", PARTS[3:])):
            if self._pass_spreads[kind]:
                spreads = self._pass_spreads[kind]
                values = _stream_values(spreads) if kind == "stream" else _sublayer_values(spreads)
                layers = [each.index for each in spreads]
                # A sublayer's output is in one row, in the model's order of tokens and sequences.
                turned = kind != "stream" and self._stack.token_first(layers[0], kind)
                self._sums.add(names, layers, values, real.T if turned and real is not None else real)
        if self._pass_moments:
            moment_layers, moments = zip(*self._pass_moments, strict=True)
            device = moments[0].device
            values = torch.stack([moment.to(device) for moment in moments], 1)  # [moments, L, B, T]
            self._sums.add(MOMENTS, list(moment_layers), values[:-1], real)
            self._sums.raise_largest(list(moment_layers), values[-1], real)
        self._begin_pass()


class _Spread:
    """The norm of the centred features of a residual stream, and their mean, per token and parallel stream.

    Variance and norm follow from these. On a CPU the features are centred first: `torch.var` takes twenty times as long
    there. Elsewhere `torch.var` reads them once, while centring reads and writes them four times.
    """

    def __init__(self, values: Tensor, buffer: str, buffers: "_Buffers") -> None:
        self.buffer = buffer
        if values.device.type == "cpu":
            self.mean = values.mean(-1, keepdim=True)  # [B, T, S, 1]
            self.values = buffers.difference(buffer, values, self.mean)  # [B, T, S, d], until the buffer is used again
            self.length = torch.linalg.vector_norm(self.values, dim=-1)  # [B, T, S]
        else:
            self.values = values
            self.length, self.mean = _length_and_mean(values)

    @classmethod
    def of(cls, view: Tensor, buffers: "_Buffers", buffer: str) -> "_Spread":
        """The spread of a residual stream [B, T, S, d]."""
        return cls(view.float(), buffer, buffers)

    def distance(self, second: "_Spread", buffers: "_Buffers") -> Tensor:
        """The norm of the centred difference to another residual stream: [B, T, S]."""
        difference = buffers.difference("scratch", self.values, second.values)
        if difference.device.type == "cpu":  # both are centred
            return torch.linalg.vector_norm(difference, dim=-1)
        return _length_and_mean(difference)[0]


def _length_and_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """The norm [...] of centred features [..., d], and their mean [..., 1], in one pass over the features."""
    variance, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
    return (variance[..., 0] * values.shape[-1]).sqrt(), mean


class _Buffers:
    """Memory that all layers share on a CPU.

    Memory that each layer allocates and frees returns to the system and comes back page by page, also for the model's
    own tensors; that costs more than the computation. CUDA caches freed memory itself.
    """

    def __init__(self) -> None:
        self._buffers: dict[str, Tensor] = {}

    def difference(self, name: str, first: Tensor, second: Tensor) -> Tensor:
        """`first - second` in float32, in the buffer called `name`."""
        if first.device.type != "cpu" or torch.compiler.is_compiling():  # a compiler manages its memory itself
            return first - second
        size = first.numel()
        if name not in self._buffers or self._buffers[name].numel() < size:
            self._buffers[name] = first.new_empty(size)  # not torch.empty, whose default dtype may differ
        return torch.sub(first, second, out=self._buffers[name][:size].view(first.shape))


class _Spreads:
    """The values of one layer until its pass ends: no features, only numbers per token [B, T, S]."""

    def __init__(self, index: int, out: _Spread, into: _Spread, update: Tensor) -> None:
        self.index = index
        self.width = out.values.shape[-1]
        self.length, self.mean = out.length, out.mean[..., 0]
        self.into_length, self.into_mean = into.length, into.mean[..., 0]
        self.update_length = update


def _stream_values(spreads: list[_Spreads]) -> Tensor:
    """The values of `STREAM` without the tokens: [values, L, B, T]."""
    width = spreads[0].width
    out, into, update = (_stacked(spreads, name).square() for name in ("length", "into_length", "update_length"))
    mean, into_mean = _stacked(spreads, "mean"), _stacked(spreads, "into_mean")
    return torch.stack(
        [
            (out / (width - 1)).mean(-1),
            (into / (width - 1)).mean(-1),
            (update / (width - 1)).mean(-1),
            (update + width * (mean - into_mean).square()).sum(-1).sqrt(),
            (into + width * into_mean.square()).sum(-1).sqrt(),
        ]
    )


def _sublayer_values(spreads: list[_Spreads]) -> Tensor:
    """Variance and norm of the outputs of attention or MLP, all tokens in one row: [2, L, 1, B * T]."""
    width, squares = spreads[0].width, _stacked(spreads, "length").square()
    lengths = (squares + width * _stacked(spreads, "mean").square()).sum(-1).sqrt()
    return torch.stack([(squares / (width - 1)).mean(-1), lengths])


def _stacked(spreads: list[_Spreads], name: str) -> Tensor:
    """One quantity of all layers on the first layer's device: [L, B, T, S]."""
    values = [getattr(each, name) for each in spreads]
    return torch.stack([value.to(values[0].device) for value in values])


class _Sums:
    """Sums per layer on the device, with a maximum and a first step per layer.

    No method but `fetch` reads a value, which would wait for the device in every pass.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.step = torch.zeros((), dtype=exact, device=device)  # the current step
        self.sums = torch.zeros(num_layers, len(SUMMED), dtype=exact, device=device)
        self.largest = torch.zeros(num_layers, dtype=exact, device=device)
        self.not_finite = torch.full((num_layers,), NEVER, dtype=exact, device=device)

    def add(self, names: tuple[str, ...], layers: list[int], values: Tensor, mask: Tensor | None) -> None:
        """Add values [names - 1, L, B, T] to the sums called `names[1:]`, and the number of tokens to `names[0]`."""
        counted = torch.cat([torch.ones_like(values[:1]), values]).flatten(2)  # [names, L, B * T]
        if mask is not None:
            counted = torch.where(mask.to(counted.device, torch.bool).flatten(), counted, 0)
        total = counted.sum(-1, dtype=self.sums.dtype).T.to(self.sums.device)  # [L, names]
        # A pass with NaN or infinity after a layer is not added to that layer's sums, and its step is kept.
        finite = torch.isfinite(total).all(-1)
        start = SUMMED.index(names[0])
        self.sums[layers, start : start + len(names)] += torch.where(finite[:, None], total, 0)
        earliest = torch.minimum(self.not_finite[layers], self.step)
        self.not_finite[layers] = torch.where(finite, self.not_finite[layers], earliest)

    def raise_largest(self, layers: list[int], values: Tensor, mask: Tensor | None) -> None:
        """Keep the largest of values [L, B, T] for each layer."""
        if mask is not None:
            values = torch.where(mask.to(values.device, torch.bool), values, 0)
        highest = torch.nan_to_num(values, nan=0.0, posinf=0.0).flatten(1).amax(1)
        self.largest[layers] = torch.maximum(self.largest[layers], highest.to(self.largest))

    def fetch(self) -> np.ndarray:
        """Return the sums of all processes in one transfer [L, sums, largest, first step], and reset them."""
        sums, largest, earliest = self.sums.clone(), self.largest.clone(), self.not_finite.clone()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
            dist.all_reduce(largest, op=dist.ReduceOp.MAX)
            dist.all_reduce(earliest, op=dist.ReduceOp.MIN)
        self.sums.zero_()
        self.largest.zero_()
        self.not_finite.fill_(NEVER)
        return torch.cat([sums, largest[:, None], earliest[:, None]], 1).cpu().double().numpy()


def _moments(view: Tensor) -> Tensor:
    """Skewness, kurtosis, share of outliers and largest feature of each token: [B, T, S, d] -> [4, B, T]."""
    values = view.float()
    centred = values - values.mean(-1, keepdim=True)
    variance = centred.square().mean(-1, keepdim=True)
    z = centred * torch.where(variance == 0, 1.0, variance).rsqrt()
    squares = z.square()
    return torch.stack(
        [
            (squares * z).mean((-2, -1)),
            squares.square().mean((-2, -1)),
            (squares > OUTLIER**2).float().mean((-2, -1)),
            values.abs().amax((-2, -1)),
        ]
    )


def _merged(window: dict[str, Any] | None, fetched: np.ndarray) -> dict[str, Any]:
    """Add fetched sums [L, sums + 2] to a window, in numbers that JSON can hold."""
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


def _device_of(stack: LayerStack) -> torch.device:
    weight = next(stack.layers[0].parameters(), None)
    return stack.device if weight is None or weight.device.type == "meta" else weight.device
