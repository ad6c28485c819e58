"""Checks of the settings of blocks: the BOS choice, and the number and size of blocks. No torch."""

from typing import Any

from depthscope.errors import SettingsError
from depthscope.wording.numeric import MOST

__all__ = ["BOS_CHOICES", "bos_choice", "require_tokens"]

BOS_CHOICES = ("auto", "yes", "no")


def bos_choice(bos: Any) -> str:
    """Return one of `BOS_CHOICES`; True and False, as YAML reads a bare yes and no, mean "yes" and "no".

    Raises:
        SettingsError: the value is not allowed.
    """
    chosen = ("yes" if bos else "no") if isinstance(bos, bool) else bos
    if not isinstance(chosen, str) or chosen not in BOS_CHOICES:
        raise SettingsError(
            f"bos is {bos!r}; give yes (each block begins with the beginning-of-sequence token), no, or auto (as the "
            "tokenizer does by default)."
        )
    return chosen


def require_tokens(num_blocks: int, block_size: int) -> None:
    """Refuse more tokens than any memory holds, before the text is read.

    Raises:
        SettingsError: there are too many tokens in total.
    """
    if num_blocks * block_size > MOST:
        raise SettingsError(
            f"{num_blocks:,} blocks of {block_size:,} tokens are {num_blocks * block_size:,} tokens; give at most "
            f"{MOST:,} together: lower the number of blocks or block_size."
        )
