"""The problems of visitors: one exception with a kind for programs and a message for people."""

import errno
from typing import Literal, get_args

__all__ = ["KINDS", "NO_ROOM", "Kind", "Problem", "deserted", "no_room", "stopped", "too_large", "too_long"]

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
    """A problem that the visitor or the Space's owner can solve; the message says how.

    Attributes:
        kind: one of `KINDS`.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def too_long(kind: Kind, what: str, most_bytes: int) -> Problem:
    """A problem for a file that is larger than the limit for its type."""
    return Problem(kind, f"{what} is larger than {most_bytes / 2**20:g} MiB, the limit of this Space.")


def too_large(what: str, most_bytes: int) -> Problem:
    """A problem for a model that is larger than the limit."""
    return Problem(
        "too_large",
        f"{what} is larger than {most_bytes / 2**30:.3g} GiB, the limit of this Space. Analyse the model on "
        "your own machine: pip install depthscope.",
    )


def stopped() -> Problem:
    """The problem of a visitor who pressed Stop."""
    return Problem("stopped", "Stopped, as you asked.")


def no_room() -> Problem:
    """The problem if the disk of the Space is full."""
    return Problem(
        "crashed",
        "This Space has no room left on its disk for the model. Try again later, or analyse it on your own machine: "
        "pip install depthscope.",
    )


def deserted(seconds: float) -> Problem:
    """The problem of a program that returns for its answer after it has not read for so many seconds."""
    return Problem(
        "stopped",
        f"Nobody read the answer for {seconds:g} seconds, so the analysis was stopped. Start it again, and read while "
        "it runs.",
    )
