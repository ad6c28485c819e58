"""The position of a callback among a Trainer's callbacks, and its notice of a training that fails.

`Trainer.log` writes `state.log_history`, then calls the callbacks one after another; the reporters (TensorBoard,
trackio, ...) come before the user's callbacks. A callback that adds values to a log must therefore come before the
reporters. It must come after `DefaultFlowCallback`, which decides at the end of a step whether to log or to save a
checkpoint. transformers offers no way to choose the position, and events do not name the Trainer, so the calling frames
are searched for both.
"""

import functools
import inspect
import json
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

__all__ = ["PREFIX", "announce", "call_on_failure", "move_before_reporters", "places_before", "saved_attributes"]

# The name of every value that our callbacks add to a log starts with this.
PREFIX = "layers/"
# The callbacks that print each log for people.
_PRINTERS = (PrinterCallback, ProgressCallback, DEFAULT_PROGRESS_CALLBACK)


_PLACED = "_placed_by_depthscope"
_CLEANED = "_cleaned_after_by_depthscope"


class KeepPrintedLogsShort(TrainerCallback):
    """Removes the values of single layers from a log before it is printed, once all reporters have it."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Remove the values; `state.log_history` keeps them."""
        for name in [name for name in logs or {} if name.startswith(PREFIX)]:
            del logs[name]  # type: ignore[union-attr]


class EndRemoved(TrainerCallback):
    """Ends the work of callbacks that are removed from a Trainer during training, which get no event for it."""

    def __init__(self) -> None:
        self.placed: list[TrainerCallback] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """End the training for every callback that was removed."""
        handler = _caller(CallbackHandler)
        present = {id(callback) for callback in handler.callbacks} if handler is not None else set()
        for callback in [callback for callback in self.placed if handler is not None and id(callback) not in present]:
            self.placed.remove(callback)
            run: Any = getattr(callback, "_run", None)
            if run is state:  # another Trainer may use it by now
                callback.on_train_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Do the same for a callback that was removed in the last step."""
        self.on_step_begin(args, state, control, **kwargs)


def move_before_reporters(callback: TrainerCallback) -> bool:
    """Move `callback` right after the default flow of the calling handler, and after others moved there.

    Returns False if no handler is calling.
    """
    handler = _caller(CallbackHandler)
    if handler is None:
        return False
    # A new list, since the handler iterates over the old one.
    others = [other for other in handler.callbacks if other is not callback]
    first = 1 + max((i for i, other in enumerate(others) if isinstance(other, DefaultFlowCallback)), default=-1)
    last = first
    while last < len(others) and getattr(others[last], _PLACED, False):
        last += 1
    setattr(callback, _PLACED, True)
    # The order among the moved callbacks stays the same.
    current = next((i for i, other in enumerate(handler.callbacks) if other is callback), last)
    others.insert(max(first, min(last, current)), callback)
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
    """The number of callbacks of the same class before this one in the calling handler."""
    return _position_in_class(callback)[1]


def saved_attributes(state: Any, callback: Any) -> dict[str, Any]:
    """The state of a callback in a checkpoint; several of one class are distinguished by options and order.

    For several, transformers keeps a list to which every checkpoint appends, so the newest states are last.
    """
    saved = (state.stateful_callbacks or {}).get(type(callback).__name__)
    if isinstance(saved, list):
        options = _options(callback.state())
        alike = [entry for entry in saved if isinstance(entry, dict) and _options(entry) == options]
        count, before = _position_in_class(callback, lambda other: _options(other.state()) == options)
        newest = alike[-count:]
        saved = newest[before] if before < len(newest) else None
    attributes = saved.get("attributes") if isinstance(saved, dict) else None
    return attributes if isinstance(attributes, dict) else {}


def announce(state: Any, callback: Any) -> None:
    """Register a callback that is added during a training for its checkpoints, beside others of its class.

    The Trainer lists the states that it will save when a training begins, and fails at a checkpoint with another
    callback.
    """
    name, states = type(callback).__name__, state.stateful_callbacks
    if name not in states:
        states[name] = callback.state()
    elif not isinstance(states[name], list):
        states[name] = [states[name]]


def _position_in_class(callback: TrainerCallback, alike: Callable[[Any], bool] = lambda other: True) -> tuple[int, int]:
    """The number of callbacks of the same class in the calling handler, and how many of them come before this one."""
    handler = _caller(CallbackHandler)
    others = handler.callbacks if handler is not None else [callback]
    callbacks = [other for other in others if type(other) is type(callback) and alike(other)]
    return len(callbacks), next((number for number, other in enumerate(callbacks) if other is callback), 0)


def _options(entry: dict[str, Any]) -> Any:
    """The options in a callback's saved state, as JSON stores them, without the blocks of text, which are large."""
    options = entry.get("args")
    if isinstance(options, dict):
        options = {name: value for name, value in options.items() if name != "blocks"}
    return json.loads(json.dumps(options))


def call_on_failure(owner: TrainerCallback, clean: Callable[[], None]) -> None:
    """Call `clean` when a training of the calling Trainer fails; registered once per owner and Trainer.

    The Trainer has no event for a training that fails, so this wraps its `train`, or its `training_step` if `train` is
    already running.
    """
    trainer = _caller(Trainer)
    if trainer is None:
        return
    # Stored in the Trainer, since one callback may serve several Trainers.
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
    """The nearest calling object of a class."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, kind):
            return owner
        frame = frame.f_back
    return None
