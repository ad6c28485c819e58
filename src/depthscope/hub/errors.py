"""Messages for errors of the Hub: the attempted action, the Hub's answer, and what to do next."""

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
    "hub_message",
    "refusal",
    "require_repository_name",
    "status_of",
    "why_no_repository",
]

AGAIN = "The Hub holds complete commits only; run the same command again to continue."
LOG_IN = "Log in with `hf auth login`, or set HF_TOKEN to a token that may write"
# The error after `http_backoff` of another thread closed the shared connections.
CLOSED = "client has been closed"
TOKEN = re.compile(r"hf_[A-Za-z0-9]{8,}|(?i:bearer)\s+\S+")
MAX_MESSAGE = 300  # characters of the Hub's message


def why_no_repository(name: str) -> str | None:
    """Why the Hub would refuse a repository's name, in its own words; None if it is valid."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        return str(error)
    return None


def require_repository_name(name: str, what: str) -> None:
    """Refuse a name that the Hub would refuse for a repository.

    Args:
        name: the name.
        what: the name's description in a message.

    Raises:
        SettingsError: the name is refused; the message says why.
    """
    if why := why_no_repository(name):
        raise SettingsError(f"The Hub does not accept {what} as a name: {one_line(ValueError(why))}")


def hide_tokens(text: str, api: HfApi | None = None) -> str:
    """Remove the tokens of this process, and everything that looks like a token, from a text."""
    for token in (api.token if api else None, get_token()):
        if isinstance(token, str) and len(token) > 4:
            text = text.replace(token, "***")
    return TOKEN.sub("***", text)


def cause_of(error: BaseException | None) -> BaseException | None:
    """The error of the Hub or of the connection behind an error; None if there is none."""
    while error is not None:
        if isinstance(error, HTTPError | LocalTokenNotFoundError | OfflineModeIsEnabled):
            return error
        if isinstance(error, RuntimeError) and CLOSED in str(error):
            return error
        error = error.__cause__ or error.__context__
    return None


def status_of(cause: BaseException) -> int | None:
    """The HTTP status of the Hub's answer; None without an answer."""
    return cause.response.status_code if isinstance(cause, HfHubHTTPError) else None


def hub_message(cause: BaseException) -> str:
    """The Hub's message on one line, without tokens."""
    if isinstance(cause, HfHubHTTPError):
        reason = cause.server_message or cause.response.reason_phrase
        text = f"{cause.response.status_code} {reason}"
    else:
        text = f"{type(cause).__name__}: {cause}"
    text = " ".join(text.split()).rstrip(".:")
    return hide_tokens(text if len(text) <= MAX_MESSAGE else text[: MAX_MESSAGE - 1] + "…")


def refusal(doing: str, cause: BaseException) -> HubError:
    """The error for a request that the Hub refuses: why, and what to do next."""
    status, reason = status_of(cause), hub_message(cause)
    if isinstance(cause, LocalTokenNotFoundError):
        return HubError(f"Cannot {doing} without a token. {LOG_IN}.")
    if isinstance(cause, OfflineModeIsEnabled):
        return HubError(f"Cannot {doing}: huggingface_hub is offline (HF_HUB_OFFLINE). Unset it to push.")
    if status == 401:
        return HubError(
            f"Cannot {doing}: the Hub does not accept the token; it has expired or was revoked ({reason}). {LOG_IN}, "
            f"then continue: {_lower(AGAIN)}"
        )
    if status == 403:
        return HubError(
            f"Cannot {doing}: the token may not ({reason}). Use a token that may write there, or another namespace, "
            f"then continue: {_lower(AGAIN)}"
        )
    if isinstance(cause, RepositoryNotFoundError):
        return HubError(f"Cannot {doing}: there is no such repository, or the token does not see it ({reason}).")
    return HubError(f"Cannot {doing}: the Hub refuses it ({reason}). {AGAIN}")


def _lower(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]
