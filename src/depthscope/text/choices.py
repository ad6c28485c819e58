"""What a person chooses of the blocks of a text: how each begins, and how many there are of what size. No torch."""

from typing import Any

from depthscope.errors import SettingsError
from depthscope.wording.numeric import MOST

__all__ = ["BOS_CHOICES", "bos_choice", "require_tokens"]

BOS_CHOICES = ("auto", "yes", "no")


def bos_choice(bos: Any) -> str:
    """One of `BOS_CHOICES`; True and False, as YAML reads a bare yes and no, mean the same.

    Raises:
        SettingsError: anything else.
    """
    chosen = ("yes" if bos else "no") if isinstance(bos, bool) else bos
    if not isinstance(chosen, str) or chosen not in BOS_CHOICES:
        raise SettingsError(
            f"bos is {bos!r}; give yes (each block begins with the beginning-of-sequence token), no, or auto (what the "
            "tokenizer does by itself)."
        )
    return chosen


def require_tokens(num_blocks: int, block_size: int) -> None:
    """Refuse more tokens than any memory holds, before a text is read in vain.

    Raises:
        SettingsError: so many blocks of so many tokens are too many.
    """
    if num_blocks * block_size > MOST:
        raise SettingsError(
            f"{num_blocks:,} blocks of {block_size:,} tokens are {num_blocks * block_size:,} tokens; give at most "
            f"{MOST:,} together: lower the number of blocks or block_size."
        )
