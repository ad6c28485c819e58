"""Appending tokens to files, with a record of the progress, so that tokenizing resumes after an interruption.

    PART/state.json    the record: tokens, documents read, and checksums of both
    PART/train.bin, PART/held_out.bin

Tokenizing resumes only if the written tokens and the text are unchanged, which checksums verify.
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

__all__ = ["HELD_OUT", "SPLIT", "TRAIN", "CannotResume", "TokenStream", "begin", "read_state"]

TRAIN, HELD_OUT = "train", "held_out"
SPLIT = "by document"  # the rule for holding out text; a run with another rule is not resumed
BATCH_CHARACTERS = 2_000_000  # tokenized at once
NOTHING = "0" * 8  # the checksum of nothing


class CannotResume(Exception):
    """Interrupted tokenizing cannot resume: its files are damaged, or the text has changed; the message says which."""


def begin(part: Path, made_from: str) -> None:
    """Keep the files of an interrupted run for the same tokens, or start again.

    Raises:
        CannotResume: the files are damaged.
    """
    state = part / "state.json"
    state_found = read_state(state)
    if state_found.get("made_from") == made_from and state_found.get("split") == SPLIT and "sums" in state_found:
        try:
            resumed = _State.model_validate(state_found)
        except ValidationError as error:
            raise CannotResume(f"{state} is damaged") from error
        resumed.require_whole(part)
        return
    if os.path.lexists(part) and not part.is_dir():
        part.unlink()
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_atomically(state, _State(made_from=made_from).written())


def read_state(file: Path) -> dict[str, Any]:
    """The state in a file; {} if the file is missing or damaged.

    Raises:
        OSError: the file cannot be read; it may be intact.
    """
    try:
        state_found = json.loads(file.read_text())
    except (*MISSING, ValueError):
        return {}
    return state_found if isinstance(state_found, dict) and is_whole(state_found) else {}


class _State(BaseModel):
    """The progress of tokenizing: the tokens in its files, and the documents that were read."""

    made_from: str
    split: str = SPLIT
    dtype: Literal["uint16", "uint32"] = "uint16"
    tokenizer: dict[str, str] | None = None  # checksums of its files, once anything is tokenized with it
    counts: dict[str, int] = {TRAIN: 0, HELD_OUT: 0}
    sums: dict[str, str] = {TRAIN: NOTHING, HELD_OUT: NOTHING}  # checksums of the tokens
    read: dict[str, int] = {TRAIN: 0, HELD_OUT: 0}  # documents read, by the kind that the source fills
    text: dict[str, str] = {TRAIN: NOTHING, HELD_OUT: NOTHING}  # checksums of those documents

    def written(self) -> str:
        return json.dumps(sealed(self.model_dump()))

    def require_whole(self, part: Path) -> None:
        """Check that the files match this state.

        Raises:
            CannotResume: a file is damaged or missing.
        """
        if self.tokenizer is None:  # nothing is tokenized yet, and the tokenizer may be outdated
            shutil.rmtree(part / "tokenizer", ignore_errors=True)
        elif (name := damaged_file(part / "tokenizer", self.tokenizer)) is not None:
            raise CannotResume(f"{part / 'tokenizer' / name} is damaged")
        for kind, count in self.counts.items():
            path, size = part / f"{kind}.bin", count * np.dtype(self.dtype).itemsize
            if size and (not path.is_file() or checksum(path, most=size) != self.sums[kind]):
                raise CannotResume(f"{path} is damaged")


class TokenStream:
    """Appends tokens to files, with a record of the progress, so that it can resume after an interruption."""

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

    def fill(
        self, documents: Iterator[tuple[str, str]], targets: dict[str, int], report: Callable[[str], None]
    ) -> None:
        """Append documents until each kind has its target number of tokens, or no documents are left.

        Raises:
            CannotResume: the documents that were read before an interruption have changed.
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
                self._append(batch, targets, first, report)
                batch, size = [], 0
        self._append(batch, targets, first, report)

    def _read_again(self, documents: Iterator[tuple[str, str]], first: str) -> None:
        total = NOTHING
        for entry in documents:
            total = _text_sum(entry, total)
        if total != self._state.text[first]:
            raise CannotResume("The text has changed since a part of it was tokenized")

    def _append(
        self, batch: list[tuple[str, str]], targets: dict[str, int], first: str, report: Callable[[str], None]
    ) -> None:
        if not batch:
            return
        end = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        ids = self._tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False).input_ids
        state = self._state
        for kind in targets:
            tokens = [token for (own, _), row in zip(batch, ids, strict=True) if own == kind for token in [*row, *end]]
            selected = np.array(tokens[: max(0, targets[kind] - self.counts[kind])], self.dtype)
            with (self._folder / f"{kind}.bin").open("ab") as file:
                selected.tofile(file)
                file.flush()
                os.fsync(file.fileno())
            state.counts[kind] += len(selected)
            state.sums[kind] = f"{zlib.crc32(selected.tobytes(), int(state.sums[kind], 16)):08x}"
        for entry in batch:
            state.text[first] = _text_sum(entry, state.text[first])
        state.read[first] += len(batch)
        write_atomically(self._folder / "state.json", state.written())
        report(f"Tokenized {self.counts[TRAIN]:,} of {targets.get(TRAIN, 0) or self.counts[TRAIN]:,} training tokens")


def _text_sum(entry: tuple[str, str], before: str) -> str:
    """The checksum of a document and of all that were read before it."""
    return f"{zlib.crc32('/'.join(entry).encode('utf-8', 'surrogatepass'), int(before, 16)):08x}"
