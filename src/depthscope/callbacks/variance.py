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
from torch import Tensor

from depthscope.callbacks.hooks import Watch
from depthscope.callbacks.window import Measured, WindowCallback
from depthscope.errors import SettingsError
from depthscope.layers.stack import LayerStack

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
        self._sums: _Sums | None = None
        self._seen: dict[str, list[_Spreads]] = {}  # of the pass that is running: by "stream", "attention", "mlp"
        self._seen_moments: list[tuple[int, Tensor]] = []
        self._previous: tuple[Tensor, int, _Spread] | None = None  # the last stream, its version, and its spread
        self._rooms = _Rooms()
        self._moments = False
        self._told = False

    def options(self) -> dict[str, Any]:
        """The arguments of this callback."""
        return {**super().options(), "sublayers": self.sublayers, "moments_every": self.moments_every}

    def attach(self, stack: LayerStack) -> None:
        """Put the hooks on."""
        self._sums = _Sums(stack.num_layers, _device_of(stack))
        on_part = self._on_part if self.sublayers else None
        self._watch = Watch(
            stack, self._on_layer, on_part, begin=self._begin_pass, end=self._end_pass, drop=self._begin_pass
        )

    def detach(self) -> None:
        """Take the hooks off."""
        if self._watch is not None:
            self._watch.remove()
        self._watch, self._sums, self._rooms = None, None, _Rooms()
        self._begin_pass()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every n-th step."""
        super().on_step_begin(args, state, control, **kwargs)
        self._moments = self.moments_every is not None and state.global_step % self.moments_every == 0
        if self._sums is not None:
            self._sums.step.fill_(state.global_step + 1)

    def fetch(self) -> None:
        """One transfer of [L, metrics]."""
        if self._sums is None:
            return
        fetched = self._sums.fetch()
        if fetched[:, : len(SUMMED)].any() or np.isfinite(fetched[:, -1]).any():
            self.window = _merged(self.window, fetched)

    def fits(self, window: Any, stack: LayerStack) -> bool:
        """Whether a window holds the sums of as many layers."""
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

    def _begin_pass(self) -> None:
        self._seen = {"stream": [], "attention": [], "mlp": []}
        self._seen_moments, self._previous = [], None

    def _on_layer(self, index: int, before: Tensor, after: Tensor) -> None:
        assert self._stack is not None
        # A layer's input is the output of the one before it, which has been measured already, unless it was changed in
        # place since then. A compiler does not compute the same twice, and cannot ask whether two tensors are one.
        compiling = torch.compiler.is_compiling()
        if (
            not compiling
            and self._previous is not None
            and self._previous[0] is before
            and self._previous[1] == before._version
        ):
            into = self._previous[2]
        else:
            into = _Spread.of(self._stack.features(before), self._rooms, "before")  # [B, T, S, d]
        view = self._stack.features(after)
        out = _Spread.of(view, self._rooms, "after" if into.room == "before" else "before")
        self._seen["stream"].append(_Spreads(index, out, into, out.distance(into, self._rooms)))
        self._previous = None if compiling else (after, after._version, out)
        if self._moments:
            self._seen_moments.append((index, _moments(view)))

    def _on_part(self, index: int, part: str, output: Tensor) -> None:
        # All tokens in one row, as some mixtures of experts return them.
        spread = _Spread.of(output.reshape(1, -1, 1, output.shape[-1]), self._rooms, "scratch")
        self._seen[part].append(_Spreads(index, spread, spread, spread.length))

    def _end_pass(self, mask: Tensor | None) -> None:
        """Turn what was kept of a pass into sums, all layers at once: as many operations as one layer would take."""
        if self._sums is None or self._stack is None or not self._seen["stream"]:
            return
        shape = self._seen["stream"][0].length.shape[:2]
        real = mask if mask is not None and mask.shape == shape else None
        for kind, names in (("stream", STREAM), ("attention", PARTS[:3]), ("mlp", PARTS[3:])):
            if self._seen[kind]:
                values = _stream_values(self._seen[kind]) if kind == "stream" else _part_values(self._seen[kind])
                layers = [seen.index for seen in self._seen[kind]]
                # What a sublayer returns lies in one row, in whichever order the model has tokens and sequences.
                turned = kind != "stream" and self._stack.token_first(layers[0], kind)
                self._sums.add(names, layers, values, real.T if turned and real is not None else real)
        if self._seen_moments:
            seen_layers, moments = zip(*self._seen_moments, strict=True)
            device = moments[0].device
            values = torch.stack([moment.to(device) for moment in moments], 1)  # [moments, L, B, T]
            self._sums.add(MOMENTS, list(seen_layers), values[:-1], real)
            self._sums.raise_largest(list(seen_layers), values[-1], real)
        self._begin_pass()


class _Spread:
    """The length of a stream's features less their mean, and that mean, by token and parallel stream.

    From these come variance and norm. On a CPU the features are centred first: `torch.var` takes twenty times as long
    there. Elsewhere it reads them once, where centring reads and writes them four times.
    """

    def __init__(self, values: Tensor, room: str, rooms: "_Rooms") -> None:
        self.room = room
        if values.device.type == "cpu":
            self.mean = values.mean(-1, keepdim=True)  # [B, T, S, 1]
            self.values = rooms.difference(room, values, self.mean)  # [B, T, S, d], until the room is used again
            self.length = torch.linalg.vector_norm(self.values, dim=-1)  # [B, T, S]
        else:
            self.values = values
            self.length, self.mean = _length_and_mean(values)

    @classmethod
    def of(cls, view: Tensor, rooms: "_Rooms", room: str) -> "_Spread":
        """The spread of a stream [B, T, S, d]."""
        return cls(view.float(), room, rooms)

    def distance(self, other: "_Spread", rooms: "_Rooms") -> Tensor:
        """The length of the difference to another stream, less its mean: [B, T, S]."""
        difference = rooms.difference("scratch", self.values, other.values)
        if difference.device.type == "cpu":  # both are centred
            return torch.linalg.vector_norm(difference, dim=-1)
        return _length_and_mean(difference)[0]


def _length_and_mean(values: Tensor) -> tuple[Tensor, Tensor]:
    """The length [...] of features [..., d] less their mean, and that mean [..., 1], read in one go."""
    variance, mean = torch.var_mean(values, -1, correction=0, keepdim=True)
    return (variance[..., 0] * values.shape[-1]).sqrt(), mean


class _Rooms:
    """Memory that every layer uses again on a CPU.

    Allocated and freed in each layer, so much memory goes back to the system and comes again page by page, for the
    model's own tensors too: that cost more than computing what goes into it. CUDA keeps what is freed by itself.
    """

    def __init__(self) -> None:
        self._rooms: dict[str, Tensor] = {}

    def difference(self, name: str, one: Tensor, other: Tensor) -> Tensor:
        """`one - other` in float32, in the room called `name`."""
        if one.device.type != "cpu" or torch.compiler.is_compiling():  # a compiler sees to its memory
            return one - other
        size = one.numel()
        if name not in self._rooms or self._rooms[name].numel() < size:
            self._rooms[name] = one.new_empty(size)  # not torch.empty: the default type may be another
        return torch.sub(one, other, out=self._rooms[name][:size].view(one.shape))


class _Spreads:
    """What is kept of one layer until its pass ends: no features, only numbers by token [B, T, S]."""

    def __init__(self, index: int, out: _Spread, into: _Spread, update: Tensor) -> None:
        self.index = index
        self.width = out.values.shape[-1]
        self.length, self.mean = out.length, out.mean[..., 0]
        self.into_length, self.into_mean = into.length, into.mean[..., 0]
        self.update_length = update


def _stream_values(seen: list[_Spreads]) -> Tensor:
    """The values of `STREAM`, less the tokens: [values, L, B, T]."""
    width = seen[0].width
    out, into, update = (_stacked(seen, name).square() for name in ("length", "into_length", "update_length"))
    mean, into_mean = _stacked(seen, "mean"), _stacked(seen, "into_mean")
    return torch.stack(
        [
            (out / (width - 1)).mean(-1),
            (into / (width - 1)).mean(-1),
            (update / (width - 1)).mean(-1),
            (update + width * (mean - into_mean).square()).sum(-1).sqrt(),
            (into + width * into_mean.square()).sum(-1).sqrt(),
        ]
    )


def _part_values(seen: list[_Spreads]) -> Tensor:
    """Variance and norm of what attention or MLP returned, all tokens in one row: [2, L, 1, B * T]."""
    width, squares = seen[0].width, _stacked(seen, "length").square()
    lengths = (squares + width * _stacked(seen, "mean").square()).sum(-1).sqrt()
    return torch.stack([(squares / (width - 1)).mean(-1), lengths])


def _stacked(seen: list[_Spreads], name: str) -> Tensor:
    """One quantity of all layers on the first one's device: [L, B, T, S]."""
    values = [getattr(one, name) for one in seen]
    return torch.stack([value.to(values[0].device) for value in values])


class _Sums:
    """Sums by layer on the device, and what cannot be summed: a maximum, and a first step.

    Nothing here looks at a value: that would wait for the device in every pass.
    """

    def __init__(self, num_layers: int, device: torch.device) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.step = torch.zeros((), dtype=exact, device=device)  # the one that runs now
        self.sums = torch.zeros(num_layers, len(SUMMED), dtype=exact, device=device)
        self.largest = torch.zeros(num_layers, dtype=exact, device=device)
        self.not_finite = torch.full((num_layers,), NEVER, dtype=exact, device=device)

    def add(self, names: tuple[str, ...], layers: list[int], values: Tensor, mask: Tensor | None) -> None:
        """Add values [names - 1, L, B, T] to the sums called `names[1:]`, and the number of tokens to `names[0]`."""
        counted = torch.cat([torch.ones_like(values[:1]), values]).flatten(2)  # [names, L, B * T]
        if mask is not None:
            counted = torch.where(mask.to(counted.device, torch.bool).flatten(), counted, 0)
        total = counted.sum(-1, dtype=self.sums.dtype).T.to(self.sums.device)  # [L, names]
        # A pass with NaN or infinity after a layer is left out of that layer's sums, and noted.
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
        """All of it, of all processes, in one transfer [L, sums, largest, first step]; begins anew."""
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


def _device_of(stack: LayerStack) -> torch.device:
    weight = next(stack.layers[0].parameters(), None)
    return stack.device if weight is None or weight.device.type == "meta" else weight.device
