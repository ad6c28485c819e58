"""Where a callback stands among a Trainer's callbacks, and how it hears of a training that fails.

`Trainer.log` writes `state.log_history`, then tells the callbacks one after another; the reporters (TensorBoard,
trackio, ...) stand before those that a person passes. A callback that adds values to a log must therefore come before
the reporters. It must come after `DefaultFlowCallback`, which decides at the end of a step whether there will be a log
or a checkpoint. Neither position can be asked for, and events do not name the Trainer: both are read off the calling
frames.
"""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

__all__ = ["PREFIX", "announce", "call_on_failure", "place", "places_before", "saved_attributes"]

# Every value that a callback of ours adds to a log starts with this.
PREFIX = "layers/"
# Those that print each log for people to read.
_PRINTERS = (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK)


_PLACED = "_placed_by_depthscope"
_CLEANED = "_cleaned_after_by_depthscope"


class KeepPrintedLogsShort(TrainerCallback):
    """Takes the values of single layers out of a log once all reporters have it, before it is printed."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Drop them; `state.log_history` has them."""
        for name in [name for name in logs or {} if name.startswith(PREFIX)]:
            del logs[name]  # type: ignore[union-attr]


class EndRemoved(TrainerCallback):
    """Ends the work of callbacks that were taken out of a Trainer while it trains, which nothing tells them."""

    def __init__(self) -> None:
        self.placed: list[TrainerCallback] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """For a callback that has gone, the training is over."""
        handler = _caller(CallbackHandler)
        there = {id(callback) for callback in handler.callbacks} if handler is not None else set()
        for callback in [callback for callback in self.placed if handler is not None and id(callback) not in there]:
            self.placed.remove(callback)
            run: Any = getattr(callback, "_run", None)
            if run is state:  # it may be at work for another Trainer by now
                callback.on_train_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Also where the last step was the last that it saw."""
        self.on_step_begin(args, state, control, **kwargs)


def place(callback: TrainerCallback) -> bool:
    """Put `callback` right after the default flow of the handler that is calling it, and after others so placed.

    Returns False where no handler is calling.
    """
    handler = _caller(CallbackHandler)
    if handler is None:
        return False
    # A new list: the handler is in the middle of its old one.
    others = [other for other in handler.callbacks if other is not callback]
    first = 1 + max((i for i, other in enumerate(others) if isinstance(other, DefaultFlowCallback)), default=-1)
    last = first
    while last < len(others) and getattr(others[last], _PLACED, False):
        last += 1
    setattr(callback, _PLACED, True)
    # The order among those that are placed stays as it is.
    here = next((i for i, other in enumerate(handler.callbacks) if other is callback), last)
    others.insert(max(first, min(last, here)), callback)
    if not any(isinstance(other, KeepPrintedLogsShort) for other in others):
        printers = [i for i, other in enumerate(others) if isinstance(other, _PRINTERS)]
        others.insert(min(printers, default=len(others)), KeepPrintedLogsShort())
    ending = next((other for other in others if isinstance(other, EndRemoved)), None)
    if ending is None:
        ending = EndRemoved()
        others.append(ending)
    if not any(other is callback for other in ending.placed):
        ending.placed.append(callback)
    handler.callbacks = others
    return True


def places_before(callback: TrainerCallback) -> int:
    """How many callbacks of the same class stand before this one in the handler that is calling it."""
    return _same(callback)[1]


def saved_attributes(state: Any, callback: Any) -> dict[str, Any]:
    """What a checkpoint has kept of a callback; several of one class are told apart by their options and their order.

    Of several, transformers keeps a list, to which every checkpoint adds: the newest stand last.
    """
    saved = (state.stateful_callbacks or {}).get(type(callback).__name__)
    if isinstance(saved, list):
        options = _options(callback.state())
        alike = [entry for entry in saved if isinstance(entry, dict) and _options(entry) == options]
        count, before = _same(callback, lambda other: _options(other.state()) == options)
        newest = alike[-count:]
        saved = newest[before] if before < len(newest) else None
    kept = saved.get("attributes") if isinstance(saved, dict) else None
    return kept if isinstance(kept, dict) else {}


def announce(state: Any, callback: Any) -> None:
    """Have a callback that comes during a training in what its checkpoints keep, beside others of its class.

    The Trainer lists at the beginning of a training whose states it will keep, and fails at a checkpoint where it meets
    another.
    """
    name, kept = type(callback).__name__, state.stateful_callbacks
    if name not in kept:
        kept[name] = callback.state()
    elif not isinstance(kept[name], list):
        kept[name] = [kept[name]]


def _same(callback: TrainerCallback, alike: Callable[[Any], bool] = lambda other: True) -> tuple[int, int]:
    """How many callbacks of the same class the calling handler has, and how many of them stand before this one."""
    handler = _caller(CallbackHandler)
    others = handler.callbacks if handler is not None else [callback]
    same = [other for other in others if type(other) is type(callback) and alike(other)]
    return len(same), next((number for number, other in enumerate(same) if other is callback), 0)


def _options(entry: dict[str, Any]) -> Any:
    """The options among what a checkpoint keeps, as JSON has them; blocks of text are large, and none."""
    options = entry.get("args")
    if isinstance(options, dict):
        options = {name: value for name, value in options.items() if name != "blocks"}
    return json.loads(json.dumps(options))


def call_on_failure(owner: TrainerCallback, clean: Callable[[], None]) -> None:
    """Have `clean` called when a training of the calling Trainer fails; once for each owner and Trainer.

    The Trainer has no event for a training that fails, so its `train` is wrapped; where that is running already, its
    `training_step`.
    """
    trainer = _caller(Trainer)
    if trainer is None:
        return
    # Kept with the Trainer: one callback may serve several.
    owners = trainer.__dict__.setdefault(_CLEANED, [])
    if any(other is owner for other in owners):
        return
    owners.append(owner)
    name = "training_step" if trainer.is_in_train else "train"
    original = getattr(trainer, name)

    @functools.wraps(original)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except BaseException:
            clean()
            raise

    setattr(trainer, name, guarded)


def _caller(kind: type) -> Any:
    """The nearest object of a class whose method is calling us."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None
