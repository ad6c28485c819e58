"""Trying again what the Hub could not do just now, and saying in one message what it will not do at all.

huggingface_hub tries some of its requests again by itself (`http_backoff`: lists, uploads of large files), others, such
as commits, not. Whole steps are tried again here, so that each must be one that may be done twice.
"""

import random
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # of the HTTP library that huggingface_hub uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from depthscope.errors import HubError

__all__ = ["LOG_IN", "Patience", "Stopped", "hide_tokens"]

Made = TypeVar("Made")

AGAIN = "What is on the Hub is whole; run the same command again to go on."
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write"
# Too slow, changed by somebody else meanwhile (we look again), too many requests.
PASSING = {408, 412, 425, 429}
# What `http_backoff` of another thread leaves behind when it closes the shared connections.
CLOSED = "client has been closed"
TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|(?i:bearer)\s+\S+")
RESET = re.compile(r"\bt=(\d+)")
MOST_SAID = 300  # characters of what the Hub says


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
                cause = _cause(error)
                if cause is None:
                    raise
                reason = hide_tokens(_said(cause))
                if not _passes(cause):
                    raise _refusal(doing, cause, reason) from None  # the chain may show a header with the token
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


def hide_tokens(text: str, api: HfApi | None = None) -> str:
    """A text without the tokens that this process knows, or anything of their form."""
    for token in (api.token if api else None, get_token()):
        if isinstance(token, str) and len(token) > 4:
            text = text.replace(token, "***")
    return TOKEN.sub("***", text)


def _cause(error: BaseException | None) -> BaseException | None:
    """What is at the bottom of an error, if it is something between us and the Hub."""
    while error is not None:
        if isinstance(error, HTTPError | LocalTokenNotFoundError | OfflineModeIsEnabled):
            return error
        if isinstance(error, RuntimeError) and CLOSED in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def _status(cause: BaseException) -> int | None:
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None


def _passes(cause: BaseException) -> bool:
    status = _status(cause)
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


def _said(cause: BaseException) -> str:
    """The Hub's own words, on one line."""
    if isinstance(cause, HfHubHTTPError):
        words = cause.server_message or cause.response.reason_phrase
        text = f"{cause.response.status_code} {words}"
    else:
        text = f"{type(cause).__name__}: {cause}"
    text = " ".join(text.split()).rstrip(".:")
    return text if len(text) <= MOST_SAID else text[: MOST_SAID - 1] + "…"


def _refusal(doing: str, cause: BaseException, reason: str) -> HubError:
    status = _status(cause)
    if isinstance(cause, LocalTokenNotFoundError):
        return HubError(f"Cannot {doing} without a token. {LOG_IN}.")
    if isinstance(cause, OfflineModeIsEnabled):
        return HubError(f"Cannot {doing}: huggingface_hub is offline (HF_HUB_OFFLINE). Unset it to push.")
    if status == 401:
        return HubError(
            f"Cannot {doing}: the Hub does not accept the token; it has expired or was revoked ({reason}). {LOG_IN}, "
            f"then go on: {_lower(AGAIN)}"
        )
    if status == 403:
        return HubError(
            f"Cannot {doing}: the token may not ({reason}). Use one that may write there, or another namespace, then "
            f"go on: {_lower(AGAIN)}"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return HubError(f"Cannot {doing}: there is no such repository, or the token does not see it ({reason}).")
    return HubError(f"Cannot {doing}: the Hub refuses it ({reason}). {AGAIN}")


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
