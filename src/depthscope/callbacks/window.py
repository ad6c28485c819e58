"""What the callbacks that measure training passes share: windows, logs, the history, and going on from a checkpoint.

Between two logs lies a window. Sums are kept on the device while steps run; at the end of a window they are added up
over processes and fetched in one transfer, turned into values, put into the log and appended to the history. Before a
checkpoint is written, what has been summed so far is fetched too and goes into its `trainer_state.json`, so that a run
that goes on from there ends its window as if nothing had happened.
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
    place,
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
    """What a window came to: single numbers, numbers by layer [L], and what else the history keeps."""

    values: dict[str, float] = field(default_factory=dict)
    layers: dict[str, list[float]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)


def numbered(measured: Measured, before: int) -> Measured:
    """The same under names of its own, `<name>_2` and so on, where callbacks of its class stand before a callback."""
    if not before:
        return measured

    def named(values: dict[str, Any]) -> dict[str, Any]:
        return {f"{name}_{before + 1}": value for name, value in values.items()}

    return Measured(named(measured.values), named(measured.layers), measured.extra)


def flat_names(measured: Measured, logged: str) -> dict[str, float]:
    """The names and values that go into a log; undefined values are left out.

    "layers": `layers/<metric>/<layer>` for every layer. "summary": the first and the last layer, and the quartiles over
    layers. "none": nothing by layer. Single numbers, `layers/<name>`, in all of them.
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
    """Base of the callbacks that measure training passes."""

    kind: str  # what the history calls its rows

    def __init__(self, every: int = 1, log: str = "layers", history: bool = True) -> None:
        if not isinstance(every, int) or every < 1:
            raise SettingsError(f"every is {every!r}; give a number of steps, at least 1.")
        if log not in LOGGED:
            raise SettingsError(f"log is {log!r}; choose one of {', '.join(LOGGED)}.")
        self.every = every
        self.log = log
        self.history = history
        self.window: dict[str, Any] | None = None  # what the current window has come to, as far as it is fetched
        self._stack: LayerStack | None = None
        self._file: History | None = None
        self._run: Any = None  # the state of the training that is watched
        self._before = 0  # callbacks of this class before this one
        self._watch: Watch | None = None
        self._compiled = False  # whether what is trained is compiled
        self._looked = 0  # measured steps since the watch began
        self._told_unseen = False

    # What a callback is made of.

    @abstractmethod
    def attach(self, stack: LayerStack) -> None:
        """Begin to watch a model."""

    @abstractmethod
    def detach(self) -> None:
        """Leave nothing behind on the model; may be called twice."""

    @abstractmethod
    def fetch(self) -> None:
        """Add what lies on the device to `window`, on every process alike, and begin anew there."""

    @abstractmethod
    def fits(self, window: Any, stack: LayerStack) -> bool:
        """Whether a window that a checkpoint has kept can be gone on with; whatever stands there may be asked."""

    @abstractmethod
    def finish(self, window: dict[str, Any]) -> Measured:
        """Turn a window into values."""

    def measure(self, on: bool) -> None:
        """Switch measuring on or off for the passes to come."""
        if self._watch is not None:
            self._watch.measuring = on

    def options(self) -> dict[str, Any]:
        """The arguments that make another callback like this one; JSON-like."""
        return {"every": self.every, "log": self.log, "history": self.history}

    # Transformers' events, in the order in which they come.

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Take the place, and find the layers while the model is still whole."""
        place(self)
        call_on_failure(self, self._let_go)
        if model is not None and not _is_empty(model):
            self._stack = LayerStack(model, head=False)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Begin to watch, and go on where a checkpoint left off."""
        place(self)
        call_on_failure(self, self._let_go)
        self._let_go()
        self._run, self._before = state, places_before(self)
        if self._stack is None or self._stack.model is not model:
            self._stack = LayerStack(model, head=False)
        self.window = self._saved_window(state, self._stack) if state.global_step and "late" not in kwargs else None
        self._file = History(args.output_dir) if self.history and state.is_world_process_zero else None
        if self._file is not None:
            self._file.begin(state.global_step, run=state)
            if self.window is not None:
                # A row of this step ended the window at the end of an earlier run; it has not ended yet.
                self._file.drop(state.global_step, self.kind)
        if is_over(state):
            self._end_window(state)
            self._let_go()
            return
        self.attach(self._stack)
        self._looked, self._told_unseen = 0, False
        self._compiled = args.torch_compile or is_compiled(model)
        if self._compiled:
            forget_compiled()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Measure every n-th step; begin with the first one that comes, where the training has begun already."""
        if self._run is not state:
            announce(state, self)
            self.on_train_begin(args, state, control, **kwargs, late=True)
        self.measure(state.global_step % self.every == 0)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fetch before a checkpoint; the default flow, which comes before this callback, has decided on it by now."""
        self._look()
        if control.should_save or control.should_training_stop:
            self.fetch()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fetch before a checkpoint at the end of an epoch."""
        if control.should_save:
            self.fetch()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Fetch before a checkpoint that the evaluation may bring about."""
        self.fetch()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """End the window at a log of training."""
        if logs is None or "loss" not in logs or self._stack is None:
            return
        self.fetch()
        self._tell_unseen()
        measured = self._end_window(state)
        if measured is not None:
            named = flat_names(measured, self.log)
            logs.update(named)
            if state.log_history:
                state.log_history[-1].update(named)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep what the last, unlogged steps came to, and leave the model as it was."""
        self.fetch()
        self._tell_unseen()
        self._end_window(state)
        self._let_go()
        self._run = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps of this callback."""
        return {"args": self.options(), "attributes": {"window": self.window}}

    def _look(self) -> None:
        """After a measured step, see to it that there was something to see."""
        if self._watch is None or not self._watch.measuring:
            return
        self._looked += 1
        if self._looked == 1 and self._watch.unseen():
            # Something may be compiled that does not look it: then it was compiled before the hooks came.
            self._compiled = True
            forget_compiled()
        elif self._looked == 2 and self._watch.unseen() == "any training pass":
            self._tell_unseen()

    def _tell_unseen(self) -> None:
        if self._watch is None or self._told_unseen or not self._looked or not (unseen := self._watch.unseen()):
            return
        logger.warning(
            "%s has not seen %s so far, and has no values for it: its hooks were not called. Something runs the model "
            "without calling its modules (an exported form, say), in evaluation mode or without gradients; train it as "
            "it was written (torch_compile=True is fine).",
            type(self).__name__,
            unseen,
        )
        self._told_unseen = True

    def _let_go(self) -> None:
        self.detach()
        if self._compiled:
            forget_compiled()  # or the hooks that have gone are called in passes to come
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
                "%s does not go on with the window that the checkpoint has kept: it is not one of this model and these "
                "options. The next log is of the steps from here on.",
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

    Gone on from its last checkpoint in the middle of an epoch, the Trainer takes one step more, which is no part of the
    run and of its history.
    """
    return 0 < state.max_steps <= state.global_step


def _is_empty(model: nn.Module) -> bool:
    """Whether the weights are not there yet: large models get theirs when training begins."""
    return any(weight.device.type == "meta" for weight in model.parameters())
