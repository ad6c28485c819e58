"""Documents -> blocks of tokens [N, T], with a fingerprint.

Text is tokenized without special tokens, document after document, and cut into consecutive pieces from its start, so
that the same text, tokenizer and sizes always give the same blocks. If it is requested, or if the tokenizer does so by
default, each block begins with the beginning-of-sequence token, BOS; a block of T tokens then holds T - 1 of the text.
"""

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, takewhile
from typing import Any

import torch
from torch import Tensor, nn

from depthscope.console.quiet import quiet
from depthscope.errors import CorpusError, SettingsError
from depthscope.text.choices import bos_choice, require_tokens
from depthscope.text.documents import Document
from depthscope.text.sources import find_source
from depthscope.text.special_tokens import SpecialTokens, encode
from depthscope.wording.messages import counted
from depthscope.wording.numeric import require_whole

__all__ = ["Blocks", "load_blocks"]

# A document of up to this many characters is tokenized whole; of a longer one, only as much as is needed.
WHOLE_CHARACTERS = 50_000
CHARACTERS_PER_TOKEN = 6  # a first guess on the high side; English and code have 3 to 5
BLANKS = "{name} has only blanks in the requested tokens. Give a text with words."
PIECE_TOKENS = 512  # decoded together to look for anything but blanks
MARGIN_TOKENS = 64  # tokens this close to a cut may differ from those of the whole text


@dataclass(frozen=True, eq=False)
class Blocks:
    """Consecutive blocks of tokens, all of the same length.

    `input_ids` is [N, T] int64 on the CPU. `attention_mask` is [N, T] bool, False at padding, or None without padding.
    `special_ids` are the ids that are special tokens at the start of a block. `fingerprint` is the first 16 hex digits
    of the SHA-256 over shape, ids, mask and, if blocks begin with special tokens, `token_mask`: equal fingerprints mean
    that the same tokens are measured.
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None
    special_ids: frozenset[int] = frozenset()
    name: str = "tokens"
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "fingerprint", _fingerprint(self.input_ids, self.attention_mask, self.token_mask))

    @classmethod
    def from_ids(
        cls, ids: Any, attention_mask: Any = None, *, name: str = "tokens", special_ids: Iterable[int] = ()
    ) -> "Blocks":
        """Make blocks from token ids [N, T] and a mask [N, T]: tensors, numpy arrays or nested lists.

        Raises:
            CorpusError: the ids are not a matrix of non-negative integers, or there is no block, or blocks have fewer
                than 2 tokens.
        """
        if ids is None:
            raise CorpusError("Token ids are a matrix [blocks, tokens], but None was given.")
        input_ids = _matrix(ids, "Token ids")
        if input_ids.dtype == torch.bool or input_ids.is_floating_point() or input_ids.is_complex():
            raise CorpusError(
                f"Token ids are integers, but {input_ids.dtype} was given. Give the tokenizer's input_ids."
            )
        if input_ids.shape[0] < 1 or input_ids.shape[1] < 2:
            shape = " x ".join(map(str, input_ids.shape))
            raise CorpusError(f"At least 1 block of at least 2 tokens is needed, but {shape} token ids were given.")
        input_ids = input_ids.to(
            "cpu", torch.int64, copy=True
        ).contiguous()  # so that later changes by the caller have no effect
        if (lowest := int(input_ids.min())) < 0:
            raise CorpusError(
                f"Token ids are not negative, but {lowest} was given. Mark padding in `attention_mask` and put any "
                "valid id in its place."
            )
        mask = None if attention_mask is None else _mask(attention_mask, input_ids.shape)
        return cls(input_ids, mask, frozenset(map(int, special_ids)), name)

    @classmethod
    def given(cls, blocks: Any, tokenizer: Any = None) -> "Blocks":
        """Return blocks unchanged; make blocks from token ids [N, T], with the special ids of the tokenizer.

        With these, ids that begin with BOS are measured like the text that they encode.

        Raises:
            CorpusError: as in `from_ids`.
        """
        if isinstance(blocks, Blocks):
            return blocks
        return cls.from_ids(blocks, special_ids=() if tokenizer is None else SpecialTokens.of(tokenizer).ids)

    def to_dict(self) -> dict[str, Any]:
        """The arguments of `from_ids` that make these blocks, in types of JSON."""
        mask = None if self.attention_mask is None else self.attention_mask.int().tolist()
        special = sorted(self.special_ids)
        return {"ids": self.input_ids.tolist(), "attention_mask": mask, "special_ids": special, "name": self.name}

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

    def behind(self, placeholder: int, count: int) -> "Blocks":
        """The same blocks after `count` placeholders for tokens that a model adds itself; no score includes them."""
        if count == 0:
            return self
        ids, mask = nn.functional.pad(self.input_ids, (count, 0), value=placeholder), self.attention_mask
        mask = None if mask is None else nn.functional.pad(mask, (count, 0), value=True)
        return Blocks(ids, mask, self.special_ids | {placeholder}, self.name)

    def __repr__(self) -> str:
        return f"Blocks({self.name!r}, {len(self)} blocks of {self.block_size} tokens, {self.fingerprint})"

    @property
    def block_size(self) -> int:
        """The number of tokens in a block, T."""
        return self.input_ids.shape[1]

    @cached_property
    def token_mask(self) -> Tensor:
        """The tokens that scores include, [N, T] bool: all but padding and special tokens at the start.

        The model reads a special token at the start, but no score includes its position or the prediction there, of the
        first token of the text.
        """
        return self._real & ~self._leading

    @cached_property
    def start(self) -> tuple[int, ...]:
        """The special tokens that all blocks begin with, such as BOS; empty if there are none."""
        rows = [
            row[kept].tolist()
            for row, kept in zip(self.input_ids, self._real & self._leading, strict=True)  # [T] each
        ]
        return tuple(ids[0] for ids in takewhile(lambda ids: len(set(ids)) == 1, zip(*rows, strict=False)))

    @property
    def _real(self) -> Tensor:  # [N, T] False at padding
        return torch.ones_like(self.input_ids, dtype=torch.bool) if self.attention_mask is None else self.attention_mask

    @property
    def _leading(self) -> Tensor:  # [N, T] special tokens at the start, and padding before and among them
        special = torch.isin(self.input_ids, torch.tensor(sorted(self.special_ids), dtype=torch.int64))
        return (special | ~self._real).int().cumprod(dim=1).bool()

    def check_bos(self, bos: str) -> None:
        """Raise a `SettingsError` if `bos` is "yes" or "no" and these blocks do not agree with it.

        Token ids are measured unchanged: BOS is neither added nor removed.
        """
        if bos == "yes" and not self.start:
            raise SettingsError(
                'bos is "yes", but not all blocks begin with a special token. Put BOS before each block, and give '
                "the tokenizer too or name BOS in Blocks.from_ids(ids, special_ids=[...]); or give the text."
            )
        if bos == "no" and self.start:
            raise SettingsError(
                f'bos is "no", but every block begins with the special token {self.start[0]}. Leave it out of the '
                'blocks, or use bos="auto", which measures blocks unchanged.'
            )

    def check_vocabulary(self, vocab_size: int) -> None:
        """Raise a `CorpusError` if a token id is not below `vocab_size`, the model's number of tokens."""
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
    dataset: Any = None,
    column: str | None = None,
    split: str | None = None,
    bos: str | bool = "auto",
    name: str | None = None,
    vocab_size: int | None = None,
    fewest: int | None = None,
) -> Blocks:
    """Read text, tokenize it without special tokens and cut it into consecutive blocks from its start.

    Chats (a column of messages) are written with the tokenizer's chat template. Documents of token ids are used as they
    are, without a BOS at their start: BOS is at the start of blocks only.

    Args:
        source: None for the embedded corpus (the Python standard library's source); a path or a list of paths of UTF-8
            text files, of .jsonl, .json, .csv, .parquet or .arrow files, of folders (their text files, in sorted
            order), or of a folder written by `save_to_disk`; a `datasets` object; a data frame of pandas, or
            a table of pyarrow; or an iterable of documents, each a string, a chat (a list of messages with role and
            content) or a list of token ids.
        tokenizer: a tokenizer of transformers.
        num_blocks: N, the exact number of blocks; with `fewest`, the most.
        block_size: T, tokens in a block, special tokens at its start included.
        dataset: a dataset of the Hugging Face Hub instead of `source`, as "name" or "name:config"; it is streamed.
        column: the column of text, chats or token ids; None finds it if there is only one candidate.
        split: the split of the dataset; None is "train" if there is one, else the first split.
        bos: whether each block begins with the beginning-of-sequence token: "yes", "no", or "auto", as the tokenizer
            does by default. No score includes this token; see `Blocks.token_mask`.
        name: the name of the text in the report.
        vocab_size: the model's number of tokens; larger token ids are refused.
        fewest: with a text that is too short for `num_blocks`, the number of blocks that will do.

    Raises:
        CorpusError: the text is missing, unreadable or too short, or does not fit the model's vocabulary.
        SettingsError: a size or an option is not allowed, or the tokenizer has no BOS.
    """
    _check_sizes(num_blocks, block_size)
    bos = bos_choice(bos)
    if tokenizer is None:
        raise CorpusError(
            "Text needs a tokenizer, but none was given. Give the model's tokenizer, or token ids instead of text."
        )
    corpus = find_source(source, dataset=dataset, column=column, split=split)
    name = name or corpus.name
    with quiet():
        special = SpecialTokens.of(tokenizer)
        documents = iter(corpus.documents)
        first = next(documents, None)
        start = special.start(bos, first.tokens(tokenizer) if first is not None and first.tokens else ())
        text_tokens = block_size - len(start)  # per block
        if text_tokens < 2:
            raise SettingsError(
                f"Blocks of {block_size} tokens begin with {len(start)} special ones and hold {max(text_tokens, 0)} of "
                f"the text; at least 2 are needed. Raise block_size to {len(start) + 2} or more."
            )
        ids = _first_ids(name, chain([first] if first else [], documents), tokenizer, special, num_blocks * text_tokens)
    fewest = num_blocks if fewest is None else min(fewest, num_blocks)
    if len(ids) < fewest * text_tokens:
        raise CorpusError(_too_short(name, len(ids), fewest, block_size, text_tokens))
    num_blocks = min(num_blocks, len(ids) // text_tokens)
    ids = ids[: num_blocks * text_tokens]
    _refuse_blanks(name, ids, tokenizer)
    text = torch.tensor(ids, dtype=torch.int64).view(num_blocks, text_tokens)
    before = torch.tensor(start, dtype=torch.int64).expand(num_blocks, -1)
    blocks = Blocks.from_ids(torch.cat([before, text], dim=1), name=name, special_ids=special.ids | set(start))
    if vocab_size is not None:
        blocks.check_vocabulary(vocab_size)
    return blocks


def _check_sizes(num_blocks: int, block_size: int) -> None:
    require_whole("num_blocks", num_blocks, 1, "blocks of text")
    require_whole("block_size", block_size, 2, "tokens in a block, one to predict another")
    require_tokens(num_blocks, block_size)


def _refuse_blanks(name: str, ids: list[int], tokenizer: Any) -> None:
    """Refuse a text of only spaces and line ends: scores on it would be meaningless."""
    decode = getattr(tokenizer, "decode", None)
    if decode is None:
        return
    for start in range(0, len(ids), PIECE_TOKENS):
        if decode(ids[start : start + PIECE_TOKENS]).strip():
            return
    raise CorpusError(BLANKS.format(name=name))


def _too_short(name: str, available: int, num_blocks: int, block_size: int, text_tokens: int) -> str:
    besides = "" if text_tokens == block_size else ", without the special ones"
    requested = f"{counted(num_blocks, 'block')} of {block_size:,} ({num_blocks * text_tokens:,} tokens{besides})"
    were = "was" if num_blocks == 1 else "were"
    if available == 0:
        return f"{name} holds no text, but {requested} {were} asked for. Give a text that is not empty."
    return (
        f"{name} holds {counted(available, 'token')}, but {requested} {were} asked for. Lower the number of blocks to "
        f"{available // text_tokens:,} or the block size, or add more text."
        if available >= text_tokens
        else f"{name} holds {counted(available, 'token')}, but {requested} {were} asked for. Lower the block size, or "
        "add more text."
    )


def _first_ids(
    name: str, documents: Iterable[Document], tokenizer: Any, special: SpecialTokens, needed: int
) -> list[int]:
    ids: list[int] = []
    has_words = False
    for document in documents:
        has_words = has_words or document.tokens is not None or bool(document.read(_limit(needed - len(ids))).strip())
        if document.tokens is None:
            ids += _text_ids(document, tokenizer, needed - len(ids))
        else:
            ids += special.without_start(document.tokens(tokenizer))[: needed - len(ids)]
        if len(ids) >= needed:
            break
    if ids and not has_words:
        raise CorpusError(BLANKS.format(name=name))
    return ids


def _limit(needed: int) -> int:
    """A first guess at the number of characters that hold `needed` tokens."""
    return max(WHOLE_CHARACTERS, CHARACTERS_PER_TOKEN * needed)


def _text_ids(document: Document, tokenizer: Any, needed: int) -> list[int]:
    """The first `needed` ids of the document tokenized whole (or all, if it has fewer).

    Of a long document, only a prefix is tokenized, which ends at a line or word boundary well after the last token
    needed. A tokenizer's choices depend on nearby text only, so the ids are those of the whole document. This is
    verified with a prefix that is half as long again; if the two differ, or the prefix is too short, it is doubled.
    """
    limit = _limit(needed)
    while True:
        text = document.read(limit)
        if len(text) < limit:
            return encode(tokenizer, text)[:needed]
        ids = encode(tokenizer, _until_boundary(text))
        if len(ids) >= needed + MARGIN_TOKENS:
            longer = encode(tokenizer, _until_boundary(document.read(limit + limit // 2)))
            if longer[:needed] == ids[:needed]:
                return ids[:needed]
        limit *= 2


def _until_boundary(text: str) -> str:
    """Cut a prefix at the end of its last line, or else of its last word, if that end is in its last tenth."""
    for boundary in ("\n", " "):
        end = text.rfind(boundary, len(text) - len(text) // 10)
        if end > 0:
            return text[:end]
    return text


def _matrix(values: Any, what: str) -> Tensor:
    try:
        matrix = values if isinstance(values, Tensor) else torch.tensor(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise CorpusError(f"{what} are a matrix [blocks, tokens] with rows of equal length: {error}.") from error
    if matrix.dim() != 2:
        raise CorpusError(f"{what} are a matrix [blocks, tokens], but {matrix.dim()} dimensions were given.")
    return matrix


def _mask(attention_mask: Any, shape: torch.Size) -> Tensor | None:
    """The mask as bool, or None if it masks nothing, so that both have the same fingerprint."""
    mask = _matrix(attention_mask, "Attention masks").to("cpu", torch.bool, copy=True).contiguous()
    if mask.shape != shape:
        raise CorpusError(f"The attention mask is {list(mask.shape)}, but the token ids are {list(shape)}.")
    if (fewest := int(mask.sum(dim=1).min())) < 2:
        raise CorpusError(
            f"A block holds {counted(fewest, 'token')} beside padding; at least 2 are needed. Leave such blocks out."
        )
    return None if bool(mask.all()) else mask


def _fingerprint(input_ids: Tensor, attention_mask: Tensor | None, token_mask: Tensor) -> str:
    digest = hashlib.sha256(repr(tuple(input_ids.shape)).encode())
    digest.update(input_ids.contiguous().numpy().astype("<i8").tobytes())
    if attention_mask is not None:
        digest.update(attention_mask.contiguous().numpy().astype("u1").tobytes())
    # Only if there are special tokens, so that other fingerprints are the same as before this part was added.
    if not token_mask.equal(torch.ones_like(token_mask) if attention_mask is None else attention_mask):
        digest.update(b"counted" + token_mask.contiguous().numpy().astype("u1").tobytes())
    return digest.hexdigest()[:16]
