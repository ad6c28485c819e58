"""Trying again what the Hub could not do just now; `depthscope.hub.errors` says what it will not do at all.

huggingface_hub tries some of its requests again by itself (`http_backoff`: lists, uploads of large files), others, such
as commits, not. Whole steps are tried again here, so that each must be one that may be done twice.
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
from depthscope.hub.errors import AGAIN, cause_of, in_words, refusal, status_of

__all__ = ["Patience", "Stopped"]

Made = TypeVar("Made")

# Too slow, changed by somebody else meanwhile (we look again), too many requests.
PASSING = {408, 412, 425, 429}
RESET = re.compile(r"\bt=(\d+)")


class Stopped(HubError):
    """Given up because something else failed."""


@dataclass
class Patience:
    """How often a step is tried, and how long to wait in between.

    Attributes:
        attempts: of one step.
        base: seconds before the second attempt; twice as many before each further one, with some chance in it.
        longest: seconds at most, also where the Hub names a time.
        stop: set to give up at once.
        said: is told of every wait.
    """

    attempts: int = 6
    base: float = 1.0
    longest: float = 300.0
    stop: threading.Event = field(default_factory=threading.Event)
    said: Callable[[str], None] = lambda line: None

    def carry_out(self, doing: str, step: Callable[[], Made]) -> Made:
        """Do a step, again while it fails for a reason that passes.

        Args:
            doing: what the step is to do, for messages, as in "write ada/model".
            step: is called until it returns; must do no harm when called again.

        Raises:
            HubError: it will not work, or did not in `attempts`.
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
                reason = in_words(cause)
                if not _passes(cause):
                    raise refusal(doing, cause) from None  # the chain may show a header with the token
                if attempt == self.attempts:
                    raise HubError(f"Could not {doing} in {attempt} attempts: {reason}. {AGAIN}") from None
                wait = self._wait(attempt, cause)
            self.said(f"Could not {doing} ({reason}); trying again in {wait:.0f} s.")
            self.stop.wait(wait)
        raise AssertionError("the last attempt returns or raises")

    def _wait(self, attempt: int, cause: BaseException) -> float:
        named = _retry_after(cause)
        # Spread, so that those who were refused together do not come back together.
        wait = self.base * 2 ** (attempt - 1) * random.uniform(1, 1.5) if named is None else named + self.base / 2
        return min(self.longest, wait)


def _passes(cause: BaseException) -> bool:
    status = status_of(cause)
    if status is not None:
        return status in PASSING or status >= 500
    # No answer at all: dropped, refused or timed out.
    return not isinstance(cause, LocalTokenNotFoundError | OfflineModeIsEnabled)


def _retry_after(cause: BaseException) -> float | None:
    """The seconds that the Hub asks for."""
    if not isinstance(cause, HfHubHTTPError):
        return None
    headers = cause.response.headers
    if (given := headers.get("Retry-After", "")).isdecimal():
        return float(given)
    found = RESET.search(headers.get("RateLimit", "")) if cause.response.status_code == 429 else None
    return float(found[1]) if found else None
