"""The names of a sweep's models and of the steps of a training on the Hub."""

import hashlib
import re

__all__ = ["model_repository", "step_branch"]

MOST_CHARACTERS = 88  # the Hub allows 96; the suffix of an export must fit too


def model_repository(namespace: str, sweep: str, point: str) -> str:
    """The repository of a point of a sweep, `namespace/sweep-point`, in characters that the Hub allows.

    A name that is too long is cut, and ends with a digest of the full name.
    """
    name = re.sub(r"[^A-Za-z0-9._-]", "-", f"{sweep}-{point}")
    name = re.sub(r"([-.])[-.]+", r"\1", name).strip("-._")
    if len(name) > MOST_CHARACTERS:
        digest = hashlib.sha256(name.encode()).hexdigest()[:8]
        name = f"{name[: MOST_CHARACTERS - 9].rstrip('-._')}-{digest}"
    return f"{namespace}/{name.removesuffix('.git')}"


def step_branch(step: int) -> str:
    """The branch with the weights at a step of the training."""
    return f"step{step}"
