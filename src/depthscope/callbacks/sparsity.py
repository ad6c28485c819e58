"""`SparsityCallback`: the sparsity of each layer during training.

If the model has experts: their load and the routers' confidence, over the real tokens of all training passes since the
last log (`depthscope.scores.expert_load` defines each metric). At the first log after every `every` steps, for the
current weights:

    weights_below_<p>pct, weight_hoyer              see `depthscope.scores.weight_sparsity`
    attention_below_fair, attention_below_tenth,    see `depthscope.scores.attention_sparsity`; on the first `sequences`
    attention_context, attention_context_share,     sequences of the last batch, in an extra pass without gradients; not
    attention_first                                 logged if the attention cannot be read

and the global numbers `kv_sharing` (query heads per key and value head), `aux_loss` and `z_loss` (the losses that the
model adds to its own, if it returns them).
"""

import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from depthscope.callbacks.hooks import Watch, argument
from depthscope.callbacks.trainer_access import move_before_reporters, saved_attributes
from depthscope.callbacks.window import Measured, WindowCallback, is_over
from depthscope.errors import SettingsError
from depthscope.layers.acting_weights import NoWeightsError
from depthscope.layers.modes import evaluating
from depthscope.layers.routers import Router
from depthscope.layers.stack import LayerStack
from depthscope.layers.tracing import text_config
from depthscope.scores.attention_sparsity import ATTENTION_METRICS, AttentionProbe, probing_attention
from depthscope.scores.expert_load import EXPERT_METRICS, OTHERS, find_routers, router_sums, router_values
from depthscope.scores.weight_sparsity import WEIGHT_METRICS, weight_sparsity

__all__ = ["SparsityCallback"]

logger = logging.getLogger(__name__)

LOSSES = ("aux_loss", "z_loss")
MEASURED = "measured"  # in a window: weights and attention at the last step


class SparsityCallback(WindowCallback):
    """Tracks weight, attention and expert sparsity in any Trainer script: `callbacks=[SparsityCallback()]`.

    Values are logged with the training loss, as `layers/<metric>/<layer>`, and appended to `layer_stats.jsonl`. The
    docstring of this module defines each metric.

    Args:
        every: optimiser steps between two measurements of weights and attention; expert load is counted in every step.
        sequences: sequences of the last batch, per process, that attention is measured on; 0 measures no attention.
        weights: whether to measure the weights.
        log: "layers" logs every layer; "summary" logs the first, the last and the quartiles over layers; "none" logs
            only global numbers. The history has every layer in any case.
        history: whether to write `layer_stats.jsonl`.

    Raises:
        NoLayerStackError: (when the Trainer is created) the model has no plain stack of decoder layers.
        SettingsError: an argument is not allowed.
    """

    kind = "sparsity"

    def __init__(
        self, every: int = 100, sequences: int = 2, weights: bool = True, log: str = "layers", history: bool = True
    ) -> None:
        super().__init__(every, log, history)
        if not isinstance(sequences, int) or sequences < 0:
            raise SettingsError(f"sequences is {sequences!r}; give a number of sequences, 0 for no attention.")
        self.sequences = sequences
        self.weights = weights
        self._handles: list[Any] = []
        self._routers: dict[str, Router] = {}  # by "layer", or "layer.number" from a layer's second router on
        self._pass_outputs: dict[str, Any] = {}  # the routers' outputs in the current pass
        self._sums: dict[str, Tensor] = {}
        self._losses: Tensor | None = None
        self._sample: tuple[Tensor, Tensor | None] | None = None
        self._sampled = False  # whether the sample of the current pass is taken
        self._passes = 0  # training passes since the last fetch
        self._has_warned = False
        self._has_warned_of_weights = False
        self._measured_at = 0
        self._step = 0
        self._last = False  # whether this is the last step of the training

    def options(self) -> dict[str, Any]:
        """The arguments of this callback."""
        return {**super().options(), "sequences": self.sequences, "weights": self.weights}

    def attach(self, stack: LayerStack) -> None:
        """Watch the routers, and keep a sample of the last batch."""
        self._routers = {
            f"{layer}.{number}" if number else str(layer): router
            for layer, routers in find_routers(stack).items()
            for number, router in enumerate(routers)
        }
        outputs = self._pass_outputs
        modules = {router.module: partial(outputs.__setitem__, name) for name, router in self._routers.items()}
        self._watch = Watch(stack, extra_modules=modules, begin=outputs.clear, end=self._end_pass, drop=self._drop_pass)
        self._handles = [
            owner.register_forward_pre_hook(self._sample_hook(owner), with_kwargs=True) for owner in stack.around
        ]
        self._handles.append(stack.entry.register_forward_hook(self._keep_losses))

    def detach(self) -> None:
        """Remove the hooks."""
        if self._watch is not None:
            self._watch.remove()
        for handle in self._handles:
            handle.remove()
        self._watch, self._handles, self._sample, self._sampled = None, [], None, False
        self._pass_outputs, self._sums, self._losses, self._passes = {}, {}, None, 0

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin to watch; the first log contains a measurement of weights and attention."""
        move_before_reporters(self)
        saved = (
            saved_attributes(state, self).get("_measured_at") if state.global_step and "late" not in kwargs else None
        )
        self._measured_at = saved if isinstance(saved, int) else -self.every
        self._step = state.global_step
        self._last = False
        super().on_train_begin(args, state, control, model=model, **kwargs)
        if self.window is not None:
            self.window.pop(MEASURED, None)  # left by a run that had ended and now continues

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count expert load in every step."""
        super().on_step_begin(args, state, control, **kwargs)
        self.measure(True)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note whether this is the last step, whose checkpoint must hold the final measurement."""
        self._step, self._last = state.global_step, is_over(state)
        super().on_step_end(args, state, control, **kwargs)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """End the window at a log of training."""
        self._step = state.global_step
        super().on_log(args, state, control, logs, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the values of the last steps, which were not logged."""
        self._step = state.global_step
        super().on_train_end(args, state, control, **kwargs)

    def state(self) -> dict[str, Any]:
        """The state of this callback for a checkpoint."""
        saved = super().state()
        saved["attributes"]["_measured_at"] = self._measured_at
        return saved

    def fetch(self) -> None:
        """Fetch the sums, with one transfer per layer with experts."""
        if self._watch is None or not self._passes:
            return
        window = self.window or {"experts": {}, "losses": [0.0] * (len(LOSSES) + 1)}
        for name, sums in self._sums.items():
            total = _added_up(sums).cpu().double().numpy()
            before = window["experts"].get(name)
            window["experts"][name] = (total if before is None else total + np.array(before)).tolist()
        if self._losses is not None:
            window["losses"] = (np.array(window["losses"]) + self._losses.cpu().double().numpy()).tolist()
        self._sums, self._losses, self._passes = {}, None, 0
        if self._last:  # a finished run that is resumed from this checkpoint has no batch to measure attention on
            window[MEASURED] = self._measurement()
        self.window = window

    def fits(self, window: Any, stack: LayerStack) -> bool:
        """Whether a window holds the sums of this model's routers."""
        routers = {
            f"{layer}.{number}" if number else str(layer)
            for layer, layer_routers in find_routers(stack).items()
            for number in range(len(layer_routers))
        }
        sums = [np.array(row, float) for row in window["experts"].values()]
        return (
            set(window["experts"]) <= routers
            and all(row.ndim == 1 and np.isfinite(row).all() and len(row) > OTHERS for row in sums)
            and np.array(window["losses"], float).shape == (len(LOSSES) + 1,)
            and all(np.array(row, float).shape == (stack.num_layers,) for row in window.get(MEASURED, {}).values())
        )

    def finish(self, window: dict[str, Any]) -> Measured:
        """The expert load of the window, and, every `every` steps, the current weights and attention."""
        assert self._stack is not None
        columns: dict[str, list[float]] = {}
        count = self._stack.num_layers
        if window["experts"]:
            by_layer: dict[int, list[np.ndarray]] = {}
            for name, sums in window["experts"].items():
                by_layer.setdefault(int(name.partition(".")[0]), []).append(np.array(sums))
            rows = {layer: router_values(totals) for layer, totals in by_layer.items()}
            for name in EXPERT_METRICS:
                columns[name] = [rows[layer][name] if layer in rows else float("nan") for layer in range(count)]
        columns |= window[MEASURED] if MEASURED in window else self._measurement()
        if self._step - self._measured_at >= self.every:
            self._measured_at = self._step
        values = {name: _mean(column) for name, column in columns.items()}
        values |= _kv_sharing(self._stack.entry)
        passes = window["losses"][-1]
        if passes:
            values |= {name: window["losses"][index] / passes for index, name in enumerate(LOSSES)}
        return Measured(values, columns)

    def _measurement(self) -> dict[str, list[float]]:
        """The current weights and attention, if `every` steps have passed."""
        if self._stack is None or self._step - self._measured_at < self.every:
            return {}
        return (self._weights(self._stack) if self.weights else {}) | self._attention()

    def _weights(self, stack: LayerStack) -> dict[str, list[float]]:
        """Sparsity of the weights; NaN and one warning where they are not available."""
        rows = []
        for layer in stack.layers:
            try:
                rows.append(weight_sparsity(layer))
            except NoWeightsError as error:
                rows.append(dict.fromkeys(WEIGHT_METRICS, float("nan")))
                if not self._has_warned_of_weights:
                    logger.warning("The sparsity of weights is not measured everywhere: %s.", error)
                    self._has_warned_of_weights = True
        return {name: [row[name] for row in rows] for name in WEIGHT_METRICS}

    def _attention(self) -> dict[str, list[float]]:
        """Attention sparsity on the sample, in an extra pass; {} if there is no sample of token ids."""
        if self._stack is None or not self.sequences:
            return {}
        if self._sample is None:
            if not self._has_warned:
                logger.warning("The sparsity of attention is not measured: the model is not called with token ids.")
                self._has_warned = True
            return {}
        ids, mask = self._sample
        real = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
        probe = AttentionProbe(self._stack, real)
        devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
        with (
            evaluating(self._stack.model),
            torch.no_grad(),
            torch.random.fork_rng(devices=devices),
            probing_attention(self._stack, probe),
        ):
            self._stack.run_through(self._stack.num_layers - 1, ids, mask)
        sums, counts = probe.sums.sum(1), probe.counts.sum(1)
        table = torch.cat([sums, counts[:, None]], 1).to(next(self._stack.layers.parameters()).device)
        table = _added_up(table.float() if table.device.type == "mps" else table).cpu().double()
        values = torch.where(table[:, -1:] > 0, table[:, :-1] / table[:, -1:].clamp(min=1), float("nan"))
        return {name: values[:, index].tolist() for index, name in enumerate(ATTENTION_METRICS)}

    def _drop_pass(self) -> None:
        self._sampled = False
        self._pass_outputs.clear()

    def _end_pass(self, mask: Tensor | None) -> None:
        self._passes += 1
        self._sampled = False
        # Routers get their tokens in the order of the residual stream.
        real = mask.T if mask is not None and self._stack is not None and self._stack.token_first() else mask
        for name, output in self._pass_outputs.items():
            sums = router_sums(self._routers[name], output, real)
            if sums is not None:
                exact = sums.float() if sums.device.type == "mps" else sums.double()
                self._sums[name] = self._sums[name] + exact if name in self._sums else exact
        self._pass_outputs.clear()

    def _sample_hook(self, owner: nn.Module) -> Callable[..., None]:
        """Keep some sequences of a training pass, from the first module that gets them as token ids."""
        find_ids, find_mask = argument(owner, "input_ids"), argument(owner, "attention_mask")

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Inner modules may get the mask in another form.
            if self._sampled or not (module.training and torch.is_grad_enabled()):
                return
            ids, mask = find_ids(args, kwargs), find_mask(args, kwargs)
            if isinstance(ids, Tensor) and ids.dim() == 2:
                rows = slice(0, self.sequences)
                real = mask[rows].detach() if isinstance(mask, Tensor) and mask.shape == ids.shape else None
                self._sample, self._sampled = (ids[rows].detach(), real), True

        return hook

    def _keep_losses(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        """Add the router losses of a training pass, if the model returns them; the last entry counts the passes."""
        if not (module.training and torch.is_grad_enabled()):
            return
        parts = [getattr(output, name, None) for name in LOSSES]
        if isinstance(parts[0], Tensor):
            zero = torch.zeros_like(parts[0])
            values = [loss.detach().float() if isinstance(loss, Tensor) else zero for loss in parts]
            losses = torch.stack([*values, torch.ones_like(values[0])])
            self._losses = losses if self._losses is None else self._losses + losses


def _added_up(sums: Tensor) -> Tensor:
    """Add sums over all processes."""
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        sums = sums.clone()
        dist.all_reduce(sums)
    return sums


def _kv_sharing(model: nn.Module) -> dict[str, float]:
    config = text_config(model)
    heads, shared = getattr(config, "num_attention_heads", None), getattr(config, "num_key_value_heads", None)
    return {"kv_sharing": heads / shared} if isinstance(heads, int) and isinstance(shared, int) and shared else {}


def _mean(column: list[float]) -> float:
    defined = [value for value in column if np.isfinite(value)]
    return float(np.mean(defined)) if defined else float("nan")
