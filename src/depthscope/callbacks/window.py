"""The base of the callbacks that measure training passes: windows, logs, the history, and resuming.

A window is the time between two logs. Sums stay on the device while steps run. At the end of a window they are added up
over processes, fetched in one transfer, turned into values, logged and appended to the history. Before a checkpoint is
written, the sums so far are fetched too and saved in its `trainer_state.json`, so that a resumed run completes its
window as without the interruption.
"""

import logging
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from depthscope.callbacks.hooks import Watch
from depthscope.callbacks.trainer_access import (
    PREFIX,
    announce,
    call_on_failure,
    move_before_reporters,
    places_before,
    saved_attributes,
)
from depthscope.errors import SettingsError
from depthscope.layers.compiled import forget_compiled, is_compiled
from depthscope.layers.stack import LayerStack
from depthscope.runs.history import History

__all__ = ["LAYERS", "LOGGED", "Measured", "WindowCallback", "flat_names", "is_over", "numbered"]

logger = logging.getLogger(__name__)

LOGGED = ("layers", "summary", "none")
LAYERS = "layers"


@dataclass
class Measured:
    """The values of a window: global numbers, numbers per layer [L], and further entries of the history."""

    values: dict[str, float] = field(default_factory=dict)
    layers: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def numbered(measured: Measured, before: int) -> Measured:
    """The same values with the suffix `_2` and so on, for a callback with `before` others of its class before it."""
    if not before:
        return measured

    def named(values: dict[str, Any]) -> dict[str, Any]:
        return {f"{name}_{before + 1}": value for name, value in values.items()}

    return Measured(named(measured.values), named(measured.layers), measured.extra)


def flat_names(measured: Measured, logged: str) -> dict[str, float]:
    """The names and values for a log, without undefined values.

    "layers": `layers/<metric>/<layer>` for every layer. "summary": the first and the last layer, and the quartiles over
    layers. "none": no values per layer. All three contain the global numbers, `layers/<name>`.
    """
    named = {PREFIX + name: value for name, value in measured.values.items()}
    for metric, column in measured.layers.items():
        if logged == "layers":
            named |= {f"{PREFIX}{metric}/{layer}": value for layer, value in enumerate(column)}
        elif logged == "summary":
            low, middle, high = _quartiles(column)
            picked = {"first": column[0], "q1": low, "median": middle, "q3": high, "last": column[-1]}
            named |= {f"{PREFIX}{metric}/{place}": value for place, value in picked.items()}
    return {name: float(value) for name, value in named.items() if np.isfinite(value)}


def _quartiles(column: list[float]) -> tuple[float, float, float]:
    defined = [value for value in column if np.isfinite(value)]
    if not defined:
        return (float("nan"),) * 3
    low, middle, high = np.quantile(defined, (0.25, 0.5, 0.75))
    return float(low), float(middle), float(high)


class WindowCallback(TrainerCallback, ExportableState):
    """Base class of the callbacks that measure training passes."""

    kind: str  # the kind of its rows in the history

    def __init__(self, every: int = 1, log: str = "layers", history: bool = True) -> None:
        if not isinstance(every, int) or every < 1:
            raise SettingsError(f"every is {every!r}; give a number of steps, at least 1.")
        if log not in LOGGED:
            raise SettingsError(f"log is {log!r}; choose one of {', '.join(LOGGED)}.")
        self.every = every
        self.log = log
        self.history = history
        self.window: dict[str, Any] | None = None  # the fetched sums of the current window
        self._stack: LayerStack | None = None
        self._file: History | None = None
        self._run: Any = None  # the state of the training that is watched
        self._before = 0  # callbacks of this class before this one
        self._watch: Watch | None = None
        self._compiled = False  # whether the model in training is compiled
        self._steps_watched = 0  # measured steps since the watch began
        self._has_warned_of_watch = False

    # The methods that a callback implements.

    @abstractmethod
    def attach(self, stack: LayerStack) -> None:
        """Begin to watch a model."""

    @abstractmethod
    def detach(self) -> None:
        """Remove everything from the model; may be called twice."""

    @abstractmethod
    def fetch(self) -> None:
        """Add the sums on the device to `window`, in every process, and reset them."""

    @abstractmethod
    def fits(self, window: Any, stack: LayerStack) -> bool:
        """Whether a window from a checkpoint can be continued; it may hold any content."""

    @abstractmethod
    def finish(self, window: dict[str, Any]) -> Measured:
        """Turn a window into values."""

    def measure(self, on: bool) -> None:
        """Switch the measurement of later passes on or off."""
        if self._watch is not None:
            self._watch.measuring = on

    def options(self) -> dict[str, Any]:
        """The arguments that create the same callback; JSON-like."""
        return {"every": self.every, "log": self.log, "history": self.history}

    # Transformers' events, in the order in which they come.

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Move before the reporters, and find the layers before the model is wrapped."""
        move_before_reporters(self)
        call_on_failure(self, self._stop)
        if model is not None and not _is_empty(model):
            self._stack = LayerStack(model, head=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin to watch, and resume from a checkpoint."""
        move_before_reporters(self)
        call_on_failure(self, self._stop)
        self._stop()
        self._run, self._before = state, places_before(self)
        if self._stack is None or self._stack.model is not model:
            self._stack = LayerStack(model, head=False)
        self.window = self._saved_window(state, self._stack) if state.global_step and "late" not in kwargs else None
        self._file = History(args.output_dir) if self.history and state.is_world_process_zero else None
        if self._file is not None:
            self._file.begin(state.global_step, run=state)
            if self.window is not None:
                # An earlier run ended the window at this step; now it continues.
                self._file.drop(state.global_step, self.kind)
        if is_over(state):
            self._end_window(state)
            self._stop()
            return
        self.attach(self._stack)
        self._steps_watched, self._has_warned_of_watch = 0, False
        self._compiled = args.torch_compile or is_compiled(model)
        if self._compiled:
            forget_compiled()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every `every` steps; if the training has already begun, start at this step."""
        if self._run is not state:
            announce(state, self)
            self.on_train_begin(args, state, control, **kwargs, late=True)
        self.measure(state.global_step % self.every == 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fetch before a checkpoint; the default flow, which comes before this callback, has decided on it."""
        self._check_watch()
        if control.should_save or control.should_training_stop:
            self.fetch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fetch before a checkpoint at the end of an epoch."""
        if control.should_save:
            self.fetch()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fetch before a checkpoint that may follow the evaluation."""
        self.fetch()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """End the window at a log of training."""
        if logs is None or "loss" not in logs or self._stack is None:
            return
        self.fetch()
        self._warn_unseen()
        measured = self._end_window(state)
        if measured is not None:
            named = flat_names(measured, self.log)
            logs.update(named)
            if state.log_history:
                state.log_history[-1].update(named)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the values of the last steps, which were not logged, and restore the model."""
        self.fetch()
        self._warn_unseen()
        self._end_window(state)
        self._stop()
        self._run = None

    def state(self) -> dict[str, Any]:
        """The state of this callback for a checkpoint."""
        return {"args": self.options(), "attributes": {"window": self.window}}

    def _check_watch(self) -> None:
        """After a measured step, check that the hooks were called."""
        if self._watch is None or not self._watch.measuring:
            return
        self._steps_watched += 1
        if self._steps_watched == 1 and self._watch.unseen():
            # A part may be compiled without a sign of it, before the hooks were registered.
            self._compiled = True
            forget_compiled()
        elif self._steps_watched == 2 and self._watch.unseen() == "any training pass":
            self._warn_unseen()

    def _warn_unseen(self) -> None:
        if (
            self._watch is None
            or self._has_warned_of_watch
            or not self._steps_watched
            or not (unseen := self._watch.unseen())
        ):
            return
        logger.warning(
            "%s has not seen %s so far and has no values for it, since its hooks were not called. The model may run "
            "without calling its modules (such as in an exported form), in evaluation mode or without gradients. Train "
            "the original model (torch_compile=True works).",
            type(self).__name__,
            unseen,
        )
        self._has_warned_of_watch = True

    def _stop(self) -> None:
        self.detach()
        if self._compiled:
            forget_compiled()  # else later passes would call the removed hooks
            self._compiled = False
        if self._file is not None:
            self._file.close()
            self._file = None

    def _saved_window(self, state: Any, stack: LayerStack) -> dict[str, Any] | None:
        window = saved_attributes(state, self).get("window")
        if window is None:
            return None
        try:
            fits = self.fits(window, stack)
        except (TypeError, ValueError, KeyError, AttributeError, IndexError):
            fits = False
        if not fits:
            logger.warning(
                "%s cannot continue the window in the checkpoint: it does not fit this model and these options. "
                "The next log covers only the steps from here on.",
                type(self).__name__,
            )
            return None
        return dict(window)

    def _end_window(self, state: Any) -> Measured | None:
        if self.window is None:
            return None
        measured = numbered(self.finish(self.window), self._before)
        self.window = None
        if self._file is not None:
            self._file.append(
                {
                    "step": state.global_step,
                    "epoch": state.epoch,
                    "kind": self.kind,
                    **measured.extra,
                    "values": measured.values,
                    "layers": measured.layers,
                }
            )
        return measured


def is_over(state: Any) -> bool:
    """Whether all steps of the run are done.

    Resumed from its last checkpoint in the middle of an epoch, the Trainer takes one more step, which belongs neither
    to the run nor to its history.
    """
    return 0 < state.max_steps <= state.global_step


def _is_empty(model: nn.Module) -> bool:
    """Whether the weights are not loaded yet: large models get them when training begins."""
    return any(weight.device.type == "meta" for weight in model.parameters())
