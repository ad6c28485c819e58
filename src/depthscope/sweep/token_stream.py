"""Tokens that are appended to files, with a record of how far that is, so that it goes on after an interruption.

    PART/state.json    the record: tokens, documents read, and checksums of both
    PART/train.bin, PART/held_out.bin

What is gone on with is what was written, of the text as it was: both are compared by their checksums.
"""

import json
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ValidationError

from depthscope.files.atomic import MISSING, write_atomically
from depthscope.files.checksums import checksum, checksums, damaged_file, is_whole, sealed

__all__ = ["HELD_OUT", "SPLIT", "TRAIN", "CannotGoOn", "TokenStream", "begin", "left_behind"]

TRAIN, HELD_OUT = "train", "held_out"
SPLIT = "by document"  # how text is held out; what an interrupted run left by another rule is not gone on with
BATCH_CHARACTERS = 2_000_000  # tokenized at once
NOTHING = "0" * 8  # the checksum of nothing


class CannotGoOn(Exception):
    """What interrupted tokenizing left is damaged, or of a text that has changed since; the message says which."""


def begin(part: Path, made_from: str) -> None:
    """Keep what an interrupted run left of the same tokens, and nothing else.

    Raises:
        CannotGoOn: it is damaged.
    """
    state = part / "state.json"
    left = left_behind(state)
    if left.get("made_from") == made_from and left.get("split") == SPLIT and "sums" in left:
        try:
            kept = _State.model_validate(left)
        except ValidationError as error:
            raise CannotGoOn(f"{state} is damaged") from error
        kept.require_whole(part)
        return
    if os.path.lexists(part) and not part.is_dir():
        part.unlink()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_atomically(state, _State(made_from=made_from).written())


def left_behind(file: Path) -> dict[str, Any]:
    """What an interrupted run left in a file; nothing where it is missing or damaged.

    Raises:
        OSError: it cannot be read, which is no reason to begin anew.
    """
    try:
        left = json.loads(file.read_text())
    except (*MISSING, ValueError):
        return {}
    return left if isinstance(left, dict) and is_whole(left) else {}


class _State(BaseModel):
    """How far tokenizing is: what the files hold that it has written, and what was read."""

    made_from: str
    split: str = SPLIT
    dtype: Literal["uint16", "uint32"] = "uint16"
    tokenizer: dict[str, str] | None = None  # checksums of its files, once anything is tokenized with it
    counts: dict[str, int] = {TRAIN: 0, HELD_OUT: 0}
    sums: dict[str, str] = {TRAIN: NOTHING, HELD_OUT: NOTHING}  # checksums of the tokens
    read: dict[str, int] = {TRAIN: 0, HELD_OUT: 0}  # documents of each source, by what it is filled for
    text: dict[str, str] = {TRAIN: NOTHING, HELD_OUT: NOTHING}  # checksums of those documents

    def written(self) -> str:
        return json.dumps(sealed(self.model_dump()))

    def require_whole(self, part: Path) -> None:
        """See to it that the files are those of this state.

        Raises:
            CannotGoOn: one is damaged or missing.
        """
        if self.tokenizer is None:  # nothing is tokenized; what the tokenizer was made from may have changed
            shutil.rmtree(part / "tokenizer", ignore_errors=True)
        elif (name := damaged_file(part / "tokenizer", self.tokenizer)) is not None:
            raise CannotGoOn(f"{part / 'tokenizer' / name} is damaged")
        for kind, count in self.counts.items():
            path, size = part / f"{kind}.bin", count * np.dtype(self.dtype).itemsize
            if size and (not path.is_file() or checksum(path, most=size) != self.sums[kind]):
                raise CannotGoOn(f"{path} is damaged")


class TokenStream:
    """Tokens that are appended to files, with a record of how far it is, so that it can go on after a break."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self.vocab_size = len(tokenizer)
        self.dtype = "uint16" if self.vocab_size <= 2**16 else "uint32"
        self._state = _State.model_validate_json((folder / "state.json").read_text())
        self._state = self._state.model_copy(
            update={"dtype": self.dtype, "tokenizer": checksums(folder / "tokenizer")}, deep=True
        )
        for kind, count in self.counts.items():
            path = folder / f"{kind}.bin"
            path.touch()
            os.truncate(path, count * np.dtype(self.dtype).itemsize)

    @property
    def counts(self) -> dict[str, int]:
        """Tokens of each kind."""
        return self._state.counts

    @property
    def sums(self) -> dict[str, str]:
        """Checksums of the tokens of each kind."""
        return self._state.sums

    @property
    def tokenizer_sums(self) -> dict[str, str]:
        """Checksums of the tokenizer's files."""
        return self._state.tokenizer or {}

    def fill(self, documents: Iterator[tuple[str, str]], targets: dict[str, int], said: Callable[[str], None]) -> None:
        """Append documents until there are as many tokens of each kind as wanted, or no more documents.

        Raises:
            CannotGoOn: the documents that were read before an interruption are others now.
        """
        first = next(iter(targets))
        self._read_again(islice(documents, self._state.read[first]), first)
        batch: list[tuple[str, str]] = []
        size = 0
        for kind, text in documents:
            if all(self.counts[name] >= count for name, count in targets.items()):
                return
            batch.append((kind, text))
            size += len(text)
            if size >= BATCH_CHARACTERS:
                self._append(batch, targets, first, said)
                batch, size = [], 0
        self._append(batch, targets, first, said)

    def _read_again(self, documents: Iterator[tuple[str, str]], first: str) -> None:
        total = NOTHING
        for entry in documents:
            total = _text_sum(entry, total)
        if total != self._state.text[first]:
            raise CannotGoOn("The text has changed since a part of it was tokenized")

    def _append(
        self, batch: list[tuple[str, str]], targets: dict[str, int], first: str, said: Callable[[str], None]
    ) -> None:
        if not batch:
            return
        end = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        ids = self._tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False).input_ids
        state = self._state
        for kind in targets:
            tokens = [token for (own, _), row in zip(batch, ids, strict=True) if own == kind for token in [*row, *end]]
            wanted = np.array(tokens[: max(0, targets[kind] - self.counts[kind])], self.dtype)
            with (self._folder / f"{kind}.bin").open("ab") as file:
                wanted.tofile(file)
                file.flush()
                os.fsync(file.fileno())
            state.counts[kind] += len(wanted)
            state.sums[kind] = f"{zlib.crc32(wanted.tobytes(), int(state.sums[kind], 16)):08x}"
        for entry in batch:
            state.text[first] = _text_sum(entry, state.text[first])
        state.read[first] += len(batch)
        write_atomically(self._folder / "state.json", state.written())
        said(f"Tokenized {self.counts[TRAIN]:,} of {targets.get(TRAIN, 0) or self.counts[TRAIN]:,} training tokens")


def _text_sum(entry: tuple[str, str], before: str) -> str:
    """The checksum of a document and of all that were read before it."""
    return f"{zlib.crc32('/'.join(entry).encode('utf-8', 'surrogatepass'), int(before, 16)):08x}"
