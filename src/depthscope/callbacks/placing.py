"""Where a callback stands among a Trainer's callbacks, and how it hears of a training that fails.

`Trainer.log` writes `state.log_history`, then tells the callbacks one after another; the reporters (TensorBoard,
trackio, ...) stand before those that a person passes. A callback that adds values to a log must therefore come before
the reporters. It must come after `DefaultFlowCallback`, which decides at the end of a step whether there will be a log
or a checkpoint. Neither position can be asked for, and events do not name the Trainer: both are read off the calling
frames.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

__all__ = ["PREFIX", "call_on_failure", "place"]

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
    handler.callbacks = others
    return True


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
