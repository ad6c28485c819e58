"""Retrying requests to the Hub that fail temporarily; `depthscope.hub.errors` explains permanent failures.

huggingface_hub retries some of its requests (`http_backoff`: lists, uploads of large files), but not others, such as
commits. This module retries whole steps, so each step must be safe to repeat.
"""

import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of the HTTP library that huggingface_hub uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)

from depthscope.errors import HubError
from depthscope.hub.errors import AGAIN, cause_of, hub_message, refusal, status_of

__all__ = ["Patience", "Stopped"]

Result = TypeVar("Result")

# Timed out, changed by somebody else meanwhile (the next attempt compares again), too early, too many requests.
TEMPORARY = {408, 412, 425, 429}
RESET = re.compile(r"\bt=(\d+)")


class Stopped(HubError):
    """A step was given up because another failed."""


@dataclass
class Patience:
    """How often a step is tried, and how long to wait between attempts.

    Attributes:
        attempts: the number of attempts of one step.
        base: seconds before the second attempt; they double before each further attempt, with some randomness.
        longest: the longest wait in seconds, also if the Hub asks for a longer one.
        stop: set it to give up at once.
        report_wait: called with a message before every wait.
    """

    attempts: int = 6
    base: float = 1.0
    longest: float = 300.0
    stop: threading.Event = field(default_factory=threading.Event)
    report_wait: Callable[[str], None] = lambda line: None

    def carry_out(self, doing: str, step: Callable[[], Result]) -> Result:
        """Do a step, and repeat it while it fails for a temporary reason.

        Args:
            doing: the step's action for messages, such as "write ada/model".
            step: called until it returns; it must be safe to call again.

        Raises:
            HubError: the step fails permanently, or failed in all `attempts`.
        """
        for attempt in range(1, self.attempts + 1):
            if self.stop.is_set():
                raise Stopped(f"Stopped before it could {doing}. {AGAIN}")
            try:
                return step()
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                cause = cause_of(error)
                if cause is None:
                    raise
                reason = hub_message(cause)
                if not _is_temporary(cause):
                    raise refusal(doing, cause) from None  # the chain may contain a header with the token
                if attempt == self.attempts:
                    raise HubError(f"Could not {doing} in {attempt} attempts: {reason}. {AGAIN}") from None
                wait = self._wait(attempt, cause)
            self.report_wait(f"Could not {doing} ({reason}); trying again in {wait:.0f} s.")
            self.stop.wait(wait)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, attempt: int, cause: BaseException) -> float:
        named = _retry_after(cause)
        # Randomised, so that clients that were refused together do not retry together.
        wait = self.base * 2 ** (attempt - 1) * random.uniform(1, 1.5) if named is None else named + self.base / 2
        return min(self.longest, wait)


def _is_temporary(cause: BaseException) -> bool:
    status = status_of(cause)
    if status is not None:
        return status in TEMPORARY or status >= 500
    # No answer at all: dropped, refused or timed out.
    return not isinstance(cause, LocalTokenNotFoundError | OfflineModeIsEnabled)


def _retry_after(cause: BaseException) -> float | None:
    """The seconds that the Hub asks to wait."""
    if not isinstance(cause, HfHubHTTPError):
        return None
    headers = cause.response.headers
    if (stated := headers.get("Retry-After", "")).isdecimal():
        return float(stated)
    reset = RESET.search(headers.get("RateLimit", "")) if cause.response.status_code == 429 else None
    return float(reset[1]) if reset else None
