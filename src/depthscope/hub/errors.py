"""What the Hub refuses, or does not answer, in words: what was to be done, what the Hub said, and what to do next."""

import re

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of the HTTP library that huggingface_hub uses
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from depthscope.errors import HubError, SettingsError
from depthscope.wording.messages import one_line

__all__ = [
    "AGAIN",
    "LOG_IN",
    "cause_of",
    "hide_tokens",
    "in_words",
    "refusal",
    "require_repository_name",
    "status_of",
    "why_no_repository",
]

AGAIN = "The Hub holds complete commits only; run the same command again to continue."
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write"
# What `http_backoff` of another thread leaves behind when it closes the shared connections.
CLOSED = "client has been closed"
TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|(?i:bearer)\s+\S+")
MAX_MESSAGE = 300  # characters of what the Hub says


def why_no_repository(name: str) -> str | None:
    """Why the Hub would not take a name for a repository's, in its own words; None where it would."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error)
    return None


def require_repository_name(name: str, what: str) -> None:
    """Refuse a name that the Hub would not take for a repository's.

    Args:
        name: the name.
        what: what to call it in a message.

    Raises:
        SettingsError: it is refused; the message says why.
    """
    if why := why_no_repository(name):
        raise SettingsError(f"{what} is no name that the Hub takes: {one_line(ValueError(why))}")


def hide_tokens(text: str, api: HfApi | None = None) -> str:
    """A text without the tokens that this process knows, or anything of their form."""
    for token in (api.token if api else None, get_token()):
        if isinstance(token, str) and len(token) > 4:
            text = text.replace(token, "***")
    return TOKEN.sub("***", text)


def cause_of(error: BaseException | None) -> BaseException | None:
    """What is at the bottom of an error, if it is something between us and the Hub."""
    while error is not None:
        if isinstance(error, HTTPError | LocalTokenNotFoundError | OfflineModeIsEnabled):
            return error
        if isinstance(error, RuntimeError) and CLOSED in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def status_of(cause: BaseException) -> int | None:
    """The status of the Hub's answer, None where there is none."""
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None


def in_words(cause: BaseException) -> str:
    """The Hub's own words, on one line and without tokens."""
    if isinstance(cause, HfHubHTTPError):
        words = cause.server_message or cause.response.reason_phrase
        text = f"{cause.response.status_code} {words}"
    else:
        text = f"{type(cause).__name__}: {cause}"
    text = " ".join(text.split()).rstrip(".:")
    return hide_tokens(text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…")


def refusal(doing: str, cause: BaseException) -> HubError:
    """What the Hub will not do, why, and what to do next."""
    status, reason = status_of(cause), in_words(cause)
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
