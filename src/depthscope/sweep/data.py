"""The text of a sweep as tokens on the disk: tokenized once, read by every point in the same order.

    OUT/data/tokenizer/     the tokenizer, existing or trained
    OUT/data/train.bin      the training tokens, one after the other (uint16 or uint32)
    OUT/data/held_out.bin   the held-out tokens, for the measurements
    OUT/data/data.json      the record of both, with checksums
    OUT/data/state.json     the progress of tokenizing

Documents end with the tokenizer's end-of-text token, if it has one. Complete documents are held out, and complete
modules of the standard library; only a single document is divided into pieces.

Interrupted tokenizing resumes. The text before the interruption is read again (a dataset is streamed again from the
Hub) but not tokenized again. If the text has changed, or the files are damaged, tokenizing starts again.

The checksums in data.json are checked once per run, before any point starts.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from depthscope.console.quiet import quiet
from depthscope.errors import CorpusError, SettingsError, SweepError
from depthscope.files.atomic import is_access_error, reason, write_atomically
from depthscope.files.checksums import checksum, damaged_file, sealed
from depthscope.files.validation import first_problem
from depthscope.runs.layout import DATA, DATA_PART, DATA_RECORD
from depthscope.sweep.grid import Grid, digest
from depthscope.sweep.recorded import Tokens, read_record
from depthscope.sweep.specification import Sweep, Text
from depthscope.sweep.token_stream import HELD_OUT, SPLIT, TRAIN, CannotResume, TokenStream, begin, read_state
from depthscope.sweep.yaml_source import Path_
from depthscope.text.blocks import Blocks
from depthscope.text.documents import Source
from depthscope.text.sources import find_source
from depthscope.wording.messages import one_line

__all__ = ["Corpus", "Sequences", "open_corpus", "prepare_corpus", "require_text"]

HELD_OUT_SHARE = 20  # one document in 20
PIECE_CHARACTERS = 50_000  # longer documents are cut at a line and tokenized in pieces
END = "<|endoftext|>"
OF_DATA, OF_HELD_OUT = ("data",), ("data", "held_out")  # their paths in the sweep's file


@dataclass(frozen=True)
class Needs:
    """The numbers of tokens that a sweep needs."""

    train: int
    held_out: int


class _Facts(BaseModel):
    """The content of `data.json`; fields that older versions did not write are None."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    made_from: str
    name: str
    dtype: Literal["uint16", "uint32"]
    needed: Needs
    fingerprint: str = Field(pattern="^[0-9a-f]{8}$")  # of the training tokens followed by the held-out ones
    train_fingerprint: str | None = None
    vocab_size: int | None = None
    tokens: dict[str, int] | None = None
    tokenizer: dict[str, str] | None = None  # checksums of its files


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens of a sweep; `train` and `held_out` are on disk."""

    name: str
    tokenizer: Any
    train: np.ndarray
    held_out: np.ndarray
    span: int  # tokens that stay together when the order is drawn; the longest sequence length
    used: int  # training tokens read in each epoch; a multiple of `span`
    fingerprint: str
    train_fingerprint: str | None  # None for tokens from older versions

    @property
    def tokens(self) -> Tokens:
        """The fingerprints of the tokens."""
        return Tokens(train=self.train_fingerprint, train_and_held_out=self.fingerprint)

    def held_out_blocks(self, count: int, block_size: int) -> Blocks:
        """The first blocks [N, T] of the held-out text."""
        ids = torch.from_numpy(self.held_out[: count * block_size].astype(np.int64)).view(count, block_size)
        end = self.tokenizer.eos_token_id
        return Blocks.from_ids(ids, name=f"{self.name}, held out", special_ids=[] if end is None else [end])


class Sequences(Dataset):
    """The training sequences of one point, [T] tokens each, in the order drawn with its seed.

    The order is drawn over spans of the longest sequence length in the sweep, so that points with shorter sequences
    read the same tokens at the same time. Each further epoch is drawn again.
    """

    def __init__(self, corpus: Corpus, sequence_length: int, count: int, seed: int) -> None:
        self._tokens = corpus.train
        self._length, self._count = sequence_length, count
        self._span = corpus.span
        self._spans = corpus.used // corpus.span
        self._seed = seed
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, int))

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < self._count:
            raise IndexError(index)
        span, offset = divmod(index * self._length, self._span)
        epoch, place = divmod(span, self._spans)
        if self._order[0] != epoch:
            self._order = epoch, np.random.default_rng([self._seed, epoch]).permutation(self._spans)
        start = int(self._order[1][place]) * self._span + offset
        ids = torch.from_numpy(self._tokens[start : start + self._length].astype(np.int64))
        return {"input_ids": ids, "labels": ids}


def needs(sweep: Sweep, grid: Grid) -> Needs:
    """The numbers of tokens that the points read, without repetition, and that they are measured on."""
    most = max(point.training.steps * point.training.batch_tokens for point in grid.points)
    spans = -(-most // grid.longest)
    scoring = sweep.specification.scoring
    settings = scoring.settings(grid.shortest)
    blocks = settings.fit_blocks + settings.eval_blocks
    return Needs(spans * grid.longest, max(blocks * settings.block_size, scoring.loss_tokens))


def require_text(sweep: Sweep, out: Path) -> None:
    """Check that the files of the text exist and can be read, before any work is done.

    Datasets are not checked, nor is anything if the tokens already exist.

    Raises:
        CorpusError: a file is missing or cannot be read; the message names the line.
    """
    data = sweep.specification.data
    if (out / DATA / DATA_RECORD).is_file():
        return
    for where, text in ((OF_DATA, data), (OF_HELD_OUT, data.held_out)):
        if text is None or text.text is None:
            continue
        source = _source(sweep, text, where)
        try:
            first = next(iter(source.documents), None)
            if first is not None:
                first.read(1)
        except CorpusError as error:
            raise CorpusError(sweep.locate((*where, "text"), str(error))) from error


def prepare_corpus(sweep: Sweep, grid: Grid, out: Path, report: Callable[[str], None] = lambda line: None) -> Corpus:
    """Tokenize the text of a sweep, unless this has been done.

    Args:
        sweep: the sweep.
        grid: its points.
        out: the folder of the sweep; its subfolder `data` is written.
        report: called with a message about the current work.

    Raises:
        CorpusError: the text is missing, unreadable or too short; the message says by how much.
        SweepError: the folder holds the tokens of other text, or is damaged.
    """
    folder, needed = out / DATA, needs(sweep, grid)
    made_from = _origin_digest(sweep, needed)
    if not os.path.lexists(folder) or (folder.is_dir() and not any(folder.iterdir())):
        part = out / DATA_PART
        _make(sweep, grid, part, needed, made_from, report)
        os.replace(part, folder)
    facts = _facts(folder)
    if not _serves(facts, sweep, needed):
        raise SweepError(
            f"{folder} holds tokens of another text, another tokenizer or other amounts than the sweep needs. "
            "Choose another --out, or delete the folder to start again."
        )
    _require_whole(folder, facts)
    return open_corpus(out, grid.longest)


def open_corpus(out: Path, longest: int) -> Corpus:
    """Open the tokens that `prepare_corpus` has written and checked.

    Raises:
        SweepError: a file is missing, has another length or cannot be read.
    """
    folder = out / DATA
    facts = _facts(folder)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True)
        matches = facts.vocab_size in (None, len(tokenizer))
    except Exception as error:  # damaged files can make the libraries raise anything
        if is_access_error(error):
            raise _unreadable(folder / "tokenizer", error) from error
        raise _damaged(folder / "tokenizer", f"it cannot be loaded ({one_line(error).rstrip('.')})") from error
    if not matches:
        raise _damaged(folder / "tokenizer", f"it has {len(tokenizer):,} entries, expected {facts.vocab_size:,}")
    train, held_out = (_tokens(folder, kind, facts) for kind in (TRAIN, HELD_OUT))
    used = min(facts.needed.train, len(train) // longest * longest)
    return Corpus(facts.name, tokenizer, train, held_out, longest, used, facts.fingerprint, facts.train_fingerprint)


def _tokens(folder: Path, kind: str, facts: _Facts) -> np.ndarray:
    """The tokens in a file, mapped from the disk."""
    path, size = folder / f"{kind}.bin", np.dtype(facts.dtype).itemsize
    try:
        length = path.stat().st_size
        expected = length if facts.tokens is None else facts.tokens.get(kind, 0) * size
        if length != expected or not length or length % size:
            raise _damaged(path, f"it has {length:,} bytes, expected {expected or size:,}")
        return np.memmap(path, dtype=facts.dtype, mode="r")
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error


def _require_whole(folder: Path, facts: _Facts) -> None:
    """Compare the tokens and the tokenizer with their checksums.

    Raises:
        SweepError: a file is damaged or missing; the message names it and says what to do.
    """
    for kind in (TRAIN, HELD_OUT):
        _tokens(folder, kind, facts)
    train, held_out = (folder / f"{kind}.bin" for kind in (TRAIN, HELD_OUT))
    try:
        first = checksum(train)
        both = checksum(held_out, before=first)
    except OSError as error:
        raise _unreadable(train, error) from error
    if facts.train_fingerprint not in (None, first):
        raise _damaged(train, f"its checksum is {first}, expected {facts.train_fingerprint}")
    if both != facts.fingerprint:
        path = held_out if facts.train_fingerprint else train.with_name(f"{train.name} or {held_out.name}")
        raise _damaged(path, f"the checksum of all tokens is {both}, expected {facts.fingerprint}")
    try:
        name = damaged_file(folder / "tokenizer", facts.tokenizer or {})
    except OSError as error:
        raise _unreadable(folder / "tokenizer", error) from error
    if name is not None:
        raise _damaged(folder / "tokenizer" / name, "it is missing or has changed")


def _remedy(folder: Path) -> str:
    return f"Delete the folder {folder} to tokenize the text again; trained models are kept."


def _damaged(path: Path, how: str) -> SweepError:
    folder = next(parent for parent in path.parents if parent.name == DATA)
    return SweepError(f"{path} is damaged: {how}. {_remedy(folder)}")


def _unreadable(path: Path, error: Exception) -> SweepError:
    """The error for a file that cannot be read; only for a missing file does it advise to delete the folder."""
    if isinstance(error, OSError) and is_access_error(error):
        return SweepError(f"{error.filename or path} cannot be read: {reason(error)}.")
    why = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return SweepError(f"{path} cannot be read: {why}. {_remedy(path.parent)}")


def _facts(folder: Path) -> _Facts:
    path = folder / DATA_RECORD
    if folder.is_dir() and not path.exists():
        raise SweepError(f"{folder} is damaged: it has no {DATA_RECORD}. {_remedy(folder)}")
    content = read_record(path, _remedy(folder))
    try:
        return _Facts.model_validate(content)
    except ValidationError as error:
        raise SweepError(
            f"{path} is damaged, or of another version of depthscope: {first_problem(error)}. {_remedy(folder)}"
        ) from error


def _origin_digest(sweep: Sweep, needed: Needs) -> str:
    specification = sweep.specification
    data = specification.data.model_dump(exclude={"name"})  # the name changes no token
    return digest([data, specification.tokenizer.model_dump(), asdict(needed)])


def _serves(facts: _Facts, sweep: Sweep, needed: Needs) -> bool:
    """Whether the tokens belong to the same text and training, with at least as many held-out tokens."""
    held_out = facts.needed.held_out
    return facts.made_from == _origin_digest(sweep, Needs(needed.train, held_out)) and held_out >= needed.held_out


def _make(sweep: Sweep, grid: Grid, part: Path, needed: Needs, made_from: str, report: Callable[[str], None]) -> None:
    if read_state(part / DATA_RECORD).get("made_from") == made_from:
        return
    try:
        stream, name = _tokenize(sweep, part, needed, made_from, report)
    except CannotResume as error:
        report(f"{error}, so tokenizing starts again")
        shutil.rmtree(part)
        stream, name = _tokenize(sweep, part, needed, made_from, report)
    _require_enough(sweep, grid, name, stream.counts, needed)
    facts = {
        "made_from": made_from,
        "name": sweep.specification.data.name or name,
        "vocab_size": stream.vocab_size,
        "dtype": stream.dtype,
        "needed": asdict(needed),
        "tokens": stream.counts,
        "fingerprint": checksum(part / f"{HELD_OUT}.bin", before=stream.sums[TRAIN]),
        "train_fingerprint": stream.sums[TRAIN],
        "tokenizer": stream.tokenizer_sums,
        "split": SPLIT,
    }
    write_atomically(part / DATA_RECORD, json.dumps(sealed(facts), indent=1))


def _tokenize(
    sweep: Sweep, part: Path, needed: Needs, made_from: str, report: Callable[[str], None]
) -> tuple[TokenStream, str]:
    """Fill the files in `part`, and return their stream and the name of the text."""
    begin(part, made_from)
    tokenizer = _tokenizer(sweep, part / "tokenizer", report)
    data = sweep.specification.data
    stream = TokenStream(part, tokenizer)
    source = _source(sweep, data, OF_DATA)
    if data.held_out is None:
        targets = {TRAIN: needed.train, HELD_OUT: needed.held_out}
        stream.fill(_split(source, report), targets, report)
    else:
        stream.fill(((TRAIN, text) for _, text in _split(source)), {TRAIN: needed.train}, report)
        held_out = _source(sweep, data.held_out, OF_HELD_OUT)
        stream.fill(((HELD_OUT, text) for _, text in _split(held_out)), {HELD_OUT: needed.held_out}, report)
    return stream, source.name


def _source(sweep: Sweep, text: Text, where: Path_) -> Source:
    """The documents of a text at the path `where` in the sweep's file."""
    paths: list[Path] | None = None  # not strings, which `find_source` may take for texts
    if isinstance(text.text, str):
        paths = _files(sweep, text.text, (*where, "text"))
    elif text.text is not None:
        paths = [file for index, path in enumerate(text.text) for file in _files(sweep, path, (*where, "text", index))]
    try:
        return find_source(paths, dataset=text.dataset, column=text.column, split=text.split)
    except (CorpusError, SettingsError) as error:
        named = "dataset" if text.text is None else "text"
        raise CorpusError(sweep.locate((*where, named), str(error))) from error


def _files(sweep: Sweep, path: str, where: Path_) -> list[Path]:
    """The files or folders of a path, which may contain `*`."""
    place = sweep.folder / Path(path).expanduser()
    try:
        if "*" in place.name:
            matches, problem = sorted(place.parent.glob(place.name)), "No file matches"
        else:
            matches, problem = [place] if place.exists() else [], "There is no file or folder"
    except (OSError, ValueError) as error:  # too long, or with invalid characters
        raise CorpusError(sweep.locate(where, f"{path!r} cannot be the path of a file: {one_line(error)}")) from error
    if not matches:
        hint = "Relative paths start at the folder of the sweep file; use `dataset` for a dataset of the Hub."
        raise CorpusError(sweep.locate(where, f"{problem} {str(place)!r}. {hint}"))
    return matches


def _pieces(source: Source) -> Iterator[tuple[str, str]]:
    """The texts of a source, long ones in pieces, each with the name of the unit that is held out together.

    The unit is the document; if there is only one document, each of its pieces is a unit.
    """
    texts = ((index, document, document.read(None)) for index, document in enumerate(source.documents))
    written = (entry for entry in texts if entry[2].strip())
    beginning = list(islice(written, 2))
    for index, document, text in chain(beginning, written):
        # The slices of one module of the standard library stay together.
        name = document.whole or str(index)
        for start, piece in _cut(text):
            yield name if start == 0 or len(beginning) > 1 else f"{name}:{start}", piece


def _cut(text: str) -> Iterator[tuple[int, str]]:
    """Cut a text into pieces that end with a line; each with its start."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        yield start, text[start:end]
        start = end
    if text[start:].strip():
        yield start, text[start:]


def _split(source: Source, report: Callable[[str], None] = lambda line: None) -> Iterator[tuple[str, str]]:
    """Assign documents to training or to the held-out text by their names, so that the split is reproducible.

    If the names hold out no document, as in a short text, one document is held out nevertheless.
    """
    pieces = _pieces(source)
    first: list[tuple[str, str]] = []
    for name, text in pieces:
        first.append((name, text))
        if ":" in name and len(first) == 2:
            report(
                f"The text is one document: of its pieces of {PIECE_CHARACTERS:,} characters, a twentieth is held out"
            )
        if _kind(name) == HELD_OUT:
            break
    else:
        chosen = _one_to_hold_out(first)
        yield from ((HELD_OUT if name == chosen else TRAIN, text) for name, text in first)
        return
    yield from ((_kind(name), text) for name, text in chain(first, pieces))


def _kind(name: str) -> str:
    return HELD_OUT if zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0 else TRAIN


def _one_to_hold_out(pieces: list[tuple[str, str]]) -> str | None:
    """Choose the shortest document that is a twentieth of the text, the last of several, or else the longest."""
    sizes: dict[str, int] = {}
    for name, text in pieces:
        sizes[name] = sizes.get(name, 0) + len(text)
    if len(sizes) < 2:
        return None
    enough = [size for size in sizes.values() if size * HELD_OUT_SHARE >= sum(sizes.values())]
    chosen = min(enough, default=max(sizes.values()))
    return [name for name, size in sizes.items() if size == chosen][-1]


def _tokenizer(sweep: Sweep, folder: Path, report: Callable[[str], None]) -> Any:
    """The tokenizer of a sweep, loaded from or saved to `folder`."""
    chosen = sweep.specification.tokenizer
    if folder.is_dir():
        with quiet():
            return AutoTokenizer.from_pretrained(folder)
    if chosen.name is not None:
        tokenizer = _load_tokenizer(sweep, chosen.name)
    else:
        report(f"Training a tokenizer of {chosen.trained_entries:,} entries")
        tokenizer = _trained(sweep, chosen.trained_entries, chosen.characters)
    unfinished = folder.with_name("tokenizer.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    tokenizer.save_pretrained(unfinished)
    os.replace(unfinished, folder)
    return tokenizer


def _load_tokenizer(sweep: Sweep, name: str) -> Any:
    beside = sweep.folder / Path(name).expanduser()
    try:
        with quiet():
            return AutoTokenizer.from_pretrained(beside if beside.is_dir() else name)
    except (OSError, ValueError) as error:
        raise sweep.error(
            ("tokenizer", "name"),
            f"the tokenizer {name!r} cannot be loaded: there is no such folder or tokenizer on "
            "the Hub, or the Hub cannot be reached.",
        ) from error


def _trained(sweep: Sweep, vocab_size: int, characters: int) -> PreTrainedTokenizerFast:
    from tokenizers import ByteLevelBPETokenizer

    data = sweep.specification.data
    trained = ByteLevelBPETokenizer()
    texts = (text for kind, text in _split(_source(sweep, data, OF_DATA)) if kind == TRAIN or data.held_out is not None)
    trained.train_from_iterator(
        _first(texts, characters), vocab_size=vocab_size, special_tokens=[END], show_progress=False
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=trained._tokenizer, bos_token=END, eos_token=END, clean_up_tokenization_spaces=False
    )


def _first(texts: Iterator[str], characters: int) -> Iterator[str]:
    for text in texts:
        if characters <= 0:
            return
        characters -= len(text)
        yield text


def _require_enough(sweep: Sweep, grid: Grid, name: str, counts: dict[str, int], needed: Needs) -> None:
    epochs = sweep.specification.data.epochs
    if counts[TRAIN] < grid.longest:
        raise CorpusError(
            f"{name} has {counts[TRAIN]:,} training tokens, fewer than one sequence of {grid.longest:,}. Give more "
            "text."
        )
    if counts[TRAIN] * epochs < needed.train:
        times = math.ceil(10 * needed.train / counts[TRAIN]) / 10
        raise CorpusError(
            f"{name} has {counts[TRAIN]:,} training tokens, but the sweep reads {needed.train:,}. Lower "
            f"training.tokens, give more text, or read it several times with data.epochs: {times:g}."
        )
    if counts[HELD_OUT] == 0:
        raise CorpusError(
            f"No part of {name} can be held out: it is one document of at most {PIECE_CHARACTERS:,} "
            "characters, or the held-out text is empty. Give another text as data.held_out, or more text."
        )
    if counts[HELD_OUT] < needed.held_out:
        raise CorpusError(
            f"{name} has {counts[HELD_OUT]:,} held-out tokens, but the measurements need {needed.held_out:,}. Give "
            f"another text as data.held_out, or lower {_settings_to_lower(sweep, grid, counts[HELD_OUT])}."
        )


def _settings_to_lower(sweep: Sweep, grid: Grid, held_out: int) -> str:
    """The settings that need more held-out tokens than there are, with their largest values."""
    scoring = sweep.specification.scoring
    settings = scoring.settings(grid.shortest)
    blocks, fits = settings.fit_blocks + settings.eval_blocks, held_out // settings.block_size
    loss = [f"scoring.loss_tokens to {held_out:,}"] if scoring.loss_tokens > held_out else []
    size = f"fit_blocks and eval_blocks to {fits:,} together (blocks of {settings.block_size:,} tokens)"
    return " and ".join([*loss, *([f"scoring.{size}"] if blocks > fits else [])])
