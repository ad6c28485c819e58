"""What can go wrong for a visitor: one exception, a kind for programs and a message for people."""

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
    """Something that the visitor, or else the Space's owner, can mend; the message says how.

    Attributes:
        kind: which of `KINDS`.
    """

    def __init__(self, kind: Kind, message: str) -> None:
        super().__init__(message)
        self.kind = kind


def too_long(kind: Kind, what: str, most_bytes: int) -> Problem:
    """A file of more bytes than are read of one of its kind."""
    return Problem(kind, f"{what} is larger than {most_bytes / 2**20:g} MiB, the most that is read here.")


def too_large(what: str, most_bytes: int) -> Problem:
    """A model of more bytes than are taken."""
    return Problem(
        "too_large",
        f"{what} is larger than {most_bytes / 2**30:.3g} GiB, the most that this Space takes. Analyse the model on "
        "your own machine: pip install depthscope.",
    )


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
