"""Documents -> blocks of tokens [N, T], with a fingerprint.

Text is tokenized without special tokens, document after document, and cut into consecutive blocks from its start, so
that the same text, tokenizer and sizes always give the same blocks.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from depthscope.documents import Document
from depthscope.errors import CorpusError, SettingsError
from depthscope.quiet import quiet
from depthscope.sources import find_source

__all__ = ["Blocks", "load_blocks"]

# A document of up to this many characters is tokenized whole; of a longer one, only as much as is needed.
WHOLE_CHARACTERS = 50_000
CHARACTERS_PER_TOKEN = 6  # a first guess on the high side; English and code have 3 to 5
MARGIN_TOKENS = 64  # tokens this close to a cut are not trusted


@dataclass(frozen=True, eq=False)
class Blocks:
    """Consecutive blocks of tokens, all of the same length.

    `input_ids` is [N, T] int64 on the CPU; `attention_mask` is [N, T] bool, False at padding, or None where nothing is
    padded; `special_ids` are the ids that count as special at the start of a block. `fingerprint` is the first 16 hex
    digits of the SHA-256 over shape, ids and mask: equal fingerprints mean the very same tokens.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    special_ids: frozenset[int] = frozenset()
    name: str = "tokens"
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", _fingerprint(self.input_ids, self.attention_mask))

    @classmethod
    def from_ids(
        cls, ids: Any, attention_mask: Any = None, *, name: str = "tokens", special_ids: Iterable[int] = ()
    ) -> "Blocks":
        """Make blocks from token ids [N, T]: a tensor, a numpy array or nested lists; the mask likewise.

        Raises:
            CorpusError: not a matrix of non-negative integers, no block, or a block of fewer than 2 tokens.
        """
        input_ids = _matrix(ids, "Token ids")
        if input_ids.dtype == torch.bool or input_ids.is_floating_point() or input_ids.is_complex():
            raise CorpusError(
                f"Token ids are integers, but {input_ids.dtype} was given. Give the tokenizer's input_ids."
            )
        if input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
            shape = " x ".join(map(str, input_ids.shape))
            raise CorpusError(f"At least 1 block of at least 2 tokens is needed, but {shape} token ids were given.")
        input_ids = input_ids.to("cpu", torch.int64, copy=True).contiguous()  # what the caller changes later stays out
        if (lowest := int(input_ids.min())) < 0:
            raise CorpusError(
                f"Token ids are not negative, but {lowest} was given. Mark padding in `attention_mask` and put any "
                "valid id in its place."
            )
        mask = None if attention_mask is None else _mask(attention_mask, input_ids.shape)
        return cls(input_ids, mask, frozenset(map(int, special_ids)), name)

    def __len__(self) -> int:
        return self.input_ids.shape[0]

    def __getitem__(self, index: slice) -> "Blocks":
        if not isinstance(index, slice):
            raise TypeError(f"Blocks are taken by slices, blocks[a:b], not by {type(index).__name__}.")
        mask = None if self.attention_mask is None else self.attention_mask[index]
        return Blocks.from_ids(self.input_ids[index], mask, name=self.name, special_ids=self.special_ids)

    def select(self, rows: Tensor) -> "Blocks":
        """The blocks of the given row numbers [n], in that order."""
        mask = None if self.attention_mask is None else self.attention_mask[rows]
        return Blocks(self.input_ids[rows], mask, self.special_ids, self.name)

    def __repr__(self) -> str:
        return f"Blocks({self.name!r}, {len(self)} blocks of {self.block_size} tokens, {self.fingerprint})"

    @property
    def block_size(self) -> int:
        """The number of tokens in a block, T."""
        return self.input_ids.shape[1]

    @cached_property
    def token_mask(self) -> Tensor:
        """The tokens that count, [N, T] bool: neither padding nor special tokens at the start; every score uses it."""
        real = torch.ones_like(self.input_ids, dtype=torch.bool) if self.attention_mask is None else self.attention_mask
        special = torch.isin(self.input_ids, torch.tensor(sorted(self.special_ids), dtype=torch.int64))  # [N, T]
        # Padding before the special tokens does not end the start of a block.
        leading = (special | ~real).int().cumprod(dim=1).bool()  # [N, T]
        return real & ~leading

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a `CorpusError` if a token that the model would read is not among its `vocab_size` tokens."""
        if (highest := int(self.input_ids.max())) >= vocab_size:
            raise CorpusError(
                f"{self.name} holds the token id {highest}, but the model's vocabulary ends at {vocab_size - 1}. "
                "Tokenize the text with the model's own tokenizer."
            )


def load_blocks(
    source: Any = None,
    tokenizer: Any = None,
    *,
    num_blocks: int,
    block_size: int,
    dataset: str | None = None,
    column: str | None = None,
    split: str | None = None,
    name: str | None = None,
    vocab_size: int | None = None,
) -> Blocks:
    """Read text, tokenize it without special tokens and cut it into consecutive blocks from its start.

    Args:
        source: None for the embedded corpus (the Python standard library's source); a path or a list of paths of UTF-8
            text files, of .jsonl, .json, .csv or .parquet files, or of folders (their text files, in sorted order); a
            `datasets` object; or an iterable of documents, each a string.
        tokenizer: a tokenizer of transformers.
        num_blocks: N, how many blocks; never fewer are returned.
        block_size: T, tokens in a block.
        dataset: a dataset of the Hugging Face Hub instead of `source`, as "name" or "name:config"; it is streamed.
        column: the column that holds the text (found by itself where that is clear).
        split: the split of the dataset ("train" where there is one).
        name: what the report calls the text.
        vocab_size: the model's number of tokens, to refuse tokens beyond it.

    Raises:
        CorpusError: the text is missing, unreadable or too short, or does not fit the model's vocabulary.
        SettingsError: sizes or options that make no sense.
    """
    _check_sizes(num_blocks, block_size)
    if tokenizer is None:
        raise CorpusError(
            "Text needs a tokenizer, and none was given. Give the model's tokenizer, or blocks of token ids instead of "
            "text."
        )
    found = find_source(source, dataset=dataset, column=column, split=split)
    name = name or found.name
    with quiet():
        ids = _first_ids(found.documents, tokenizer, num_blocks * block_size)
    if len(ids) < num_blocks * block_size:
        raise CorpusError(_too_short(name, len(ids), num_blocks, block_size))
    blocks = Blocks.from_ids(
        torch.tensor(ids, dtype=torch.int64).view(num_blocks, block_size),
        name=name,
        special_ids=_special_ids(tokenizer),
    )
    if vocab_size is not None:
        blocks.check_vocabulary(vocab_size)
    return blocks


def _check_sizes(num_blocks: int, block_size: int) -> None:
    if num_blocks < 1:
        raise SettingsError(f"At least 1 block is needed, but {num_blocks} were asked for.")
    if block_size < 2:
        raise SettingsError(
            f"A block needs at least 2 tokens (one to predict another), but {block_size} was asked for."
        )


def _too_short(name: str, have: int, num_blocks: int, block_size: int) -> str:
    asked = f"{num_blocks:,} block{'s' * (num_blocks > 1)} of {block_size:,} ({num_blocks * block_size:,} tokens)"
    if have == 0:
        return f"{name} holds no text, but {asked} were asked for. Give a text that is not empty."
    return (
        f"{name} holds {have:,} tokens, but {asked} were asked for. Lower the number of blocks to "
        f"{have // block_size:,} or the block size, or add more text."
        if have >= block_size
        else f"{name} holds {have:,} tokens, but {asked} were asked for. Lower the block size, or add more text."
    )


def _first_ids(documents: Iterable[Document], tokenizer: Any, needed: int) -> list[int]:
    ids: list[int] = []
    for document in documents:
        ids += _document_ids(document, tokenizer, needed - len(ids))
        if len(ids) >= needed:
            break
    return ids


def _document_ids(document: Document, tokenizer: Any, needed: int) -> list[int]:
    """The first `needed` ids of the document tokenized whole (or all, where it has fewer).

    Of a long document, only a prefix is tokenized: one that ends at a line or word boundary and reaches well beyond the
    last token needed. A tokenizer's choices depend on text nearby only, so that they are those of the whole document;
    this is verified with a prefix half as long again, and where the two differ, or the prefix was too short, more is
    taken.
    """
    limit = max(WHOLE_CHARACTERS, CHARACTERS_PER_TOKEN * needed)
    while True:
        text = document.read(limit)
        if len(text) < limit:
            return _encode(tokenizer, text)[:needed]
        ids = _encode(tokenizer, _until_boundary(text))
        if len(ids) >= needed + MARGIN_TOKENS:
            longer = _encode(tokenizer, _until_boundary(document.read(limit + limit // 2)))
            if longer[:needed] == ids[:needed]:
                return ids[:needed]
        limit *= 2


def _until_boundary(text: str) -> str:
    """Cut a prefix back to the end of its last line, or else of its last word, if that is in its last tenth."""
    for boundary in ("\n", " "):
        end = text.rfind(boundary, len(text) - len(text) // 10)
        if end > 0:
            return text[:end]
    return text


def _encode(tokenizer: Any, text: str) -> list[int]:
    # verbose=False: a text is longer than the model's maximum, and that is no reason to warn.
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids if text else []


def _special_ids(tokenizer: Any) -> frozenset[int]:
    """The ids that mark a sequence's start, or pad it; an unknown word is no such mark unless it doubles as one."""
    marks = ("bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "pad_token_id")
    found = {getattr(tokenizer, mark, None) for mark in marks}
    unknown = getattr(tokenizer, "unk_token_id", None)
    others = set(getattr(tokenizer, "all_special_ids", ())) - {unknown}
    return frozenset(int(index) for index in found | others if index is not None)


def _matrix(values: Any, what: str) -> Tensor:
    try:
        matrix = values if isinstance(values, Tensor) else torch.tensor(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CorpusError(f"{what} are a matrix [blocks, tokens] with rows of equal length: {error}.") from error
    if matrix.dim() != 2:
        raise CorpusError(f"{what} are a matrix [blocks, tokens], but {matrix.dim()} dimensions were given.")
    return matrix


def _mask(attention_mask: Any, shape: torch.Size) -> Tensor | None:
    """A mask as bool, or None where it masks nothing, so that both ways to say so give the same fingerprint."""
    mask = _matrix(attention_mask, "Attention masks").to("cpu", torch.bool, copy=True).contiguous()
    if mask.shape != shape:
        raise CorpusError(f"The attention mask is {list(mask.shape)}, but the token ids are {list(shape)}.")
    if (fewest := int(mask.sum(dim=1).min())) < 2:
        raise CorpusError(
            f"A block holds {fewest} tokens beside padding; at least 2 are needed. Leave such blocks out."
        )
    return None if bool(mask.all()) else mask


def _fingerprint(input_ids: Tensor, attention_mask: Tensor | None) -> str:
    digest = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
    digest.update(input_ids.contiguous().numpy().astype("<i8").tobytes())
    if attention_mask is not None:
        digest.update(attention_mask.contiguous().numpy().astype("u1").tobytes())
    return digest.hexdigest()[:16]
