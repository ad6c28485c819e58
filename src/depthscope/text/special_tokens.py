"""The special tokens of a tokenizer, and those at the start of a sequence.

Sequences must begin as in the model's training. Some models (Gemma) have a far higher loss without the
beginning-of-sequence token, BOS; others (GPT-2, SmolLM2) were trained without it, although their tokenizers have one.
The difference shows in the tokens that the tokenizer adds before a text by default: BOS from a post-processor or
`add_bos_token`, [CLS], several tokens, or none.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from depthscope.errors import SettingsError

__all__ = ["SpecialTokens", "encode"]

# Texts that are tokenized with and without special tokens, for comparison.
PROBES = ("a", "The layers of a model", "\n12")
MARKS = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")


@dataclass(frozen=True)
class SpecialTokens:
    """The special tokens of a tokenizer.

    `ids` are the tokens that mark the start or end of a sequence, or pad it. `own_start` are the tokens that the
    tokenizer adds before every text by default, None if they depend on the text. `bos` is its beginning-of-sequence
    token, None without one.
    """

    ids: frozenset[int]
    own_start: tuple[int, ...] | None
    bos: int | None

    @classmethod
    def of(cls, tokenizer: Any) -> "SpecialTokens":
        """Find the special tokens of a tokenizer of transformers."""
        bos, own_start = getattr(tokenizer, "bos_token_id", None), _own_start(tokenizer)
        marks = {getattr(tokenizer, mark, None) for mark in MARKS}
        # The unknown token is not included, unless it is also one of the marks.
        others = set(getattr(tokenizer, "all_special_ids", ())) - {getattr(tokenizer, "unk_token_id", None)}
        ids = frozenset(int(index) for index in marks | others | set(own_start or ()) if index is not None)
        return cls(ids, own_start, None if bos is None else int(bos))

    def start(self, bos: str, first: Sequence[int] = ()) -> tuple[int, ...]:
        """Choose the ids at the start of every block.

        Args:
            bos: "no" for none; "auto" for the tokens that the tokenizer adds before a text by default; "yes" for these,
                or for its BOS if it adds none.
            first: the ids of the first document if it is not plain text. If they begin with BOS, as those of a chat
                template may, "auto" is BOS too.

        Raises:
            SettingsError: "yes" without a BOS, or "auto" if the added tokens depend on the text.
        """
        named = () if self.bos is None else (self.bos,)
        if bos == "no":
            return ()
        if bos == "yes":
            if not (chosen := self.own_start or named):
                raise SettingsError(
                    'bos is "yes", but the tokenizer has no beginning-of-sequence token. Set its bos_token, or use '
                    '"no".'
                )
            return chosen
        if self.own_start is None:
            raise SettingsError(
                'bos is "auto", but the tokens that the tokenizer adds before a text depend on the text. Use "yes" or '
                '"no" (on the command line: --bos yes or --bos no).'
            )
        return self.own_start or (named if tuple(first[:1]) == named else ())

    def without_start(self, ids: list[int]) -> list[int]:
        """Remove the special tokens at the start of ids: the tokenizer's own start, or else BOS."""
        for start in (list(self.own_start or ()), [self.bos]):
            if start and ids[: len(start)] == start:
                return ids[len(start) :]
        return ids


def encode(tokenizer: Any, text: str, special: bool = False) -> list[int]:
    """Tokenize a text, by default without special tokens."""
    # verbose=False: no warning about a text that is longer than the model's maximum.
    return list(tokenizer(text, add_special_tokens=special, verbose=False).input_ids) if text else []


def _own_start(tokenizer: Any) -> tuple[int, ...] | None:
    """The tokens before the ids of every probe; None if they differ, or if the ids of a probe are not found."""
    pairs = [(encode(tokenizer, text), encode(tokenizer, text, special=True)) for text in PROBES]
    starts = {
        _before(plain, whole) for plain, whole in pairs if plain
    }  # without ids, start and end tokens look the same
    if not starts:
        bos = getattr(tokenizer, "bos_token_id", None)
        starts = {(bos,) if bos is not None and all(whole[:1] == [bos] for _, whole in pairs) else ()}
    return starts.pop() if len(starts) == 1 else None


def _before(plain: list[int], whole: list[int]) -> tuple[int, ...] | None:
    for count in range(len(whole) - len(plain) + 1):
        if whole[count : count + len(plain)] == plain:
            return tuple(whole[:count])
    return None
