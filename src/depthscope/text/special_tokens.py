"""Special tokens of a tokenizer: which ids are, and which begin a sequence.

A model is used to sequences that begin as in its training. Some (Gemma's) are far off where the beginning-of-sequence
token, BOS, is missing; others (GPT-2's, SmolLM2's) were trained without one, though their tokenizers have its name.
What tells the two apart is what the tokenizer puts before a text by itself: BOS from a post-processor or
`add_bos_token`, [CLS], several tokens, or nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from depthscope.errors import SettingsError

__all__ = ["SpecialTokens", "encode"]

# Texts whose tokens with and without special ones are held against each other.
PROBES = ("a", "The layers of a model", "\n12")
MARKS = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")


@dataclass(frozen=True)
class SpecialTokens:
    """What a tokenizer has of special tokens.

    `ids` are those that mark a sequence's start or end, or pad it. `own_start` is what the tokenizer puts before every
    text by itself, None where that depends on the text; `bos` is its beginning-of-sequence token, None without one.
    """

    ids: frozenset[int]
    own_start: tuple[int, ...] | None
    bos: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Ask a tokenizer of transformers."""
        bos, own_start = getattr(tokenizer, "bos_token_id", None), _own_start(tokenizer)
        marks = {getattr(tokenizer, mark, None) for mark in MARKS}
        # An unknown word is no mark of a sequence, unless it doubles as one.
        others = set(getattr(tokenizer, "all_special_ids", ())) - {getattr(tokenizer, "unk_token_id", None)}
        ids = frozenset(int(index) for index in marks | others | set(own_start or ()) if index is not None)
        return cls(ids, own_start, None if bos is None else int(bos))

    def start(self, bos: str, first: Sequence[int] = ()) -> tuple[int, ...]:
        """Choose the ids that every block begins with.

        Args:
            bos: "no" for none; "auto" for what the tokenizer puts before a text by itself; "yes" for the same, or for
                its BOS where it puts none.
            first: the ids of the first document where they do not come from plain text: "auto" is BOS also where these
                begin with it, as what a chat template writes may.

        Raises:
            SettingsError: "yes" without a BOS, or "auto" where what the tokenizer adds depends on the text.
        """
        named = () if self.bos is None else (self.bos,)
        if bos == "no":
            return ()
        if bos == "yes":
            if not (found := self.own_start or named):
                raise SettingsError(
                    'bos is "yes", but the tokenizer has no beginning-of-sequence token. Set its bos_token, or take '
                    '"no".'
                )
            return found
        if self.own_start is None:
            raise SettingsError(
                'bos is "auto", but what the tokenizer puts before a text depends on the text. Take "yes" or "no" (on '
                "the command line --bos yes or --bos no)."
            )
        return self.own_start or (named if tuple(first[:1]) == named else ())

    def without_start(self, ids: list[int]) -> list[int]:
        """Leave out the special tokens that ids begin with: the tokenizer's own start, or else BOS."""
        for start in (list(self.own_start or ()), [self.bos]):
            if start and ids[: len(start)] == start:
                return ids[len(start) :]
        return ids


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Tokenize a text, without special tokens unless they are asked for."""
    # verbose=False: a text is longer than the model's maximum, and that is no reason to warn.
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids) if text else []


def _own_start(tokenizer: Any) -> tuple[int, ...] | None:
    """What stands before every probe's own ids; None where it is not always the same, or the ids are not there."""
    pairs = [(encode(tokenizer, text), encode(tokenizer, text, special=True)) for text in PROBES]
    starts = {_before(plain, whole) for plain, whole in pairs if plain}  # without ids, a start is not told from an end
    if not starts:
        bos = getattr(tokenizer, "bos_token_id", None)
        starts = {(bos,) if bos is not None and all(whole[:1] == [bos] for _, whole in pairs) else ()}
    return starts.pop() if len(starts) == 1 else None


def _before(plain: list[int], whole: list[int]) -> tuple[int, ...] | None:
    for count in range(len(whole) - len(plain) + 1):
        if whole[count : count + len(plain)] == plain:
            return tuple(whole[:count])
    return None
