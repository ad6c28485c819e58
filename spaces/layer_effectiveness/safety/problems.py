"""What can go wrong for a visitor: one exception, a kind for programs and a message for people."""

import errno
from typing import Literal, get_args

__all__ = ["KINDS", "NO_ROOM", "Kind", "Problem", "deserted", "no_room", "stopped"]

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

Kind = Literal[
    "no_such_model",
    "gated",
    "hub_unreachable",
    "too_large",
    "no_safetensors",
    "unknown_architecture",
    "not_causal",
    "broken_config",
    "broken_weights",
    "broken_tokenizer",
    "not_finite",
    "text",
    "upload",
    "report",
    "settings",
    "queue_full",
    "timed_out",
    "out_of_memory",
    "stopped",
    "crashed",
]
KINDS: tuple[Kind, ...] = get_args(Kind)


class Problem(Exception):
    """Something that the visitor, or else the Space's owner, can mend; the message says how.

    Attributes:
        kind: which of `KINDS`.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def stopped() -> Problem:
    """What a visitor is told who pressed Stop."""
    return Problem("stopped", "Stopped, as you asked.")


def no_room() -> Problem:
    """What is told where the Space cannot write what a visitor has sent or asked for."""
    return Problem(
        "crashed",
        "This Space has no room left on its disk for the model. Try again later, or analyse it on your own machine: "
        "pip install depthscope.",
    )


def deserted(seconds: float) -> Problem:
    """What is told to a program that comes back for an answer after it has not read for so many seconds."""
    return Problem(
        "stopped",
        f"Nobody read the answer for {seconds:g} seconds, so the analysis was stopped. Start it again, and read while "
        "it runs.",
    )
