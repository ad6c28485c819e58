"""The text of a sweep as tokens on disk: tokenized once, read by every point in the same order.

    OUT/data/tokenizer/     the tokenizer, given or trained
    OUT/data/train.bin      the training tokens, one after the other (uint16 or uint32)
    OUT/data/held_out.bin   those that models are measured on
    OUT/data/data.json      what they were made from
    OUT/data/state.json     how far tokenizing was

Documents end with the tokenizer's end-of-text token, where it has one. What is held out to measure on are whole
documents, and whole modules of the standard library; only of a single document, pieces.

Tokenizing that was interrupted goes on where it was. What came before is then read again, a streamed dataset from the
Hub, but not tokenized again.
"""

import json
import math
import os
import shutil
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from depthscope.corpus import Blocks
from depthscope.documents import Source
from depthscope.errors import CorpusError, SettingsError, SweepError
from depthscope.files import write_atomically
from depthscope.messages import one_line
from depthscope.quiet import quiet
from depthscope.sources import find_source
from depthscope.sweep.grid import Grid, digest
from depthscope.sweep.recorded import read_record
from depthscope.sweep.specification import Sweep, Text
from depthscope.sweep.yaml_lines import Path_

__all__ = ["Corpus", "Sequences", "open_corpus", "prepare_corpus", "require_text"]

HELD_OUT_SHARE = 20  # one document in so many
PIECE_CHARACTERS = 50_000  # longer documents are cut at a line, to be tokenized piece by piece
SPLIT = "by document"  # how text is held out; what an interrupted run left by another rule is not gone on with
BATCH_CHARACTERS = 2_000_000  # tokenized at once
END = "<|endoftext|>"
TRAIN, HELD_OUT = "train", "held_out"
DATA, HELD_OUT_DATA = ("data",), ("data", "held_out")  # where the sweep's file says them
FACTS = ("made_from", "name", "dtype", "needed", "fingerprint")


@dataclass(frozen=True)
class Needs:
    """How many tokens a sweep needs."""

    train: int
    held_out: int


@dataclass(frozen=True, eq=False)
class Corpus:
    """The tokens of a sweep; `train` and `held_out` are on disk."""

    name: str
    tokenizer: Any
    train: np.ndarray
    held_out: np.ndarray
    span: int  # tokens that stay together when the order is drawn: the longest sequence
    used: int  # training tokens that are read, the same in every epoch; a multiple of `span`
    fingerprint: str

    def held_out_blocks(self, count: int, block_size: int) -> Blocks:
        """The first blocks [N, T] of the held-out text."""
        ids = torch.from_numpy(self.held_out[: count * block_size].astype(np.int64)).view(count, block_size)
        end = self.tokenizer.eos_token_id
        return Blocks.from_ids(ids, name=f"{self.name}, held out", special_ids=[] if end is None else [end])


class Sequences(Dataset):
    """Training sequences of one point, [T] tokens each, in the order that its seed draws.

    The order is drawn over spans of the longest sequence length in the sweep, so that points with shorter sequences
    read the same tokens at the same time. A further epoch is drawn anew.
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
    """How many tokens the points read, were none read twice, and how many they are measured on."""
    most = max(point.training.steps * point.training.batch_tokens for point in grid.points)
    spans = -(-most // grid.longest)
    scoring = sweep.specification.scoring
    settings = scoring.settings(grid.shortest)
    blocks = settings.fit_blocks + settings.eval_blocks
    return Needs(spans * grid.longest, max(blocks * settings.block_size, scoring.loss_tokens))


def require_text(sweep: Sweep, out: Path) -> None:
    """Look whether the files of the text are there and can be read, before anything is done.

    Datasets are not asked for, and nothing is looked for where the tokens are there already.

    Raises:
        CorpusError: naming the line of what is missing or cannot be read.
    """
    data = sweep.specification.data
    if (out / "data" / "data.json").is_file():
        return
    for where, text in ((DATA, data), (HELD_OUT_DATA, data.held_out)):
        if text is None or text.text is None:
            continue
        source = _source(sweep, text, where)
        try:
            first = next(iter(source.documents), None)
            if first is not None:
                first.read(1)
        except CorpusError as error:
            raise CorpusError(sweep.told((*where, "text"), str(error))) from error


def prepare_corpus(sweep: Sweep, grid: Grid, out: Path, said: Callable[[str], None] = lambda line: None) -> Corpus:
    """Tokenize what a sweep needs, or find that this has been done.

    Args:
        sweep: the sweep.
        grid: its points.
        out: the folder of the sweep; `data` in it is written.
        said: is told what is being done.

    Raises:
        CorpusError: the text is missing, unreadable or too short; the message says by how much.
        SweepError: the folder holds the tokens of other text, or is damaged.
    """
    folder, needed = out / "data", needs(sweep, grid)
    made_from = _made_from(sweep, needed)
    if not (folder / "data.json").is_file():
        part = out / "data.part"
        _make(sweep, grid, part, needed, made_from, said)
        os.replace(part, folder)
    elif not _serves(_facts(folder), sweep, needed):
        raise SweepError(
            f"{folder} holds the tokens of other text, another tokenizer or other amounts than the sweep asks for now. "
            "Choose another --out, or delete the folder to begin anew."
        )
    return open_corpus(out, grid.longest)


def open_corpus(out: Path, longest: int) -> Corpus:
    """The tokens that `prepare_corpus` has left in the folder of a sweep."""
    folder = out / "data"
    facts = _facts(folder)
    with quiet():
        tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    train, held_out = (np.memmap(folder / f"{name}.bin", dtype=facts["dtype"], mode="r") for name in (TRAIN, HELD_OUT))
    used = min(facts["needed"]["train"], len(train) // longest * longest)
    return Corpus(facts["name"], tokenizer, train, held_out, longest, used, facts["fingerprint"])


def _facts(folder: Path) -> dict[str, Any]:
    """What `data.json` says of the tokens beside it."""
    remedy = f"Delete the folder {folder} to have the text tokenized anew."
    facts = read_record(folder / "data.json", remedy)
    missing = [name for name in FACTS if name not in facts]
    if missing:
        raise SweepError(f"{folder / 'data.json'} is damaged: it lacks {', '.join(missing)}. {remedy}")
    return facts


def _left(file: Path) -> dict[str, Any]:
    """What an interrupted run left in a file; nothing where it is missing or damaged."""
    try:
        left = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return left if isinstance(left, dict) else {}


def _made_from(sweep: Sweep, needed: Needs) -> str:
    specification = sweep.specification
    data = specification.data.model_dump(exclude={"name"})  # which changes no token
    return digest([data, specification.tokenizer.model_dump(), asdict(needed)])


def _serves(facts: Mapping[str, Any], sweep: Sweep, needed: Needs) -> bool:
    """Whether these tokens are of the same text for the same training, with as much held out or more."""
    held_out = facts["needed"]["held_out"]
    return facts["made_from"] == _made_from(sweep, Needs(needed.train, held_out)) and held_out >= needed.held_out


def _make(sweep: Sweep, grid: Grid, part: Path, needed: Needs, made_from: str, said: Callable[[str], None]) -> None:
    if _left(part / "data.json").get("made_from") == made_from:
        return
    _begin(part, made_from)
    tokenizer = _tokenizer(sweep, part / "tokenizer", said)
    data = sweep.specification.data
    stream = _Stream(part, tokenizer)
    source = _source(sweep, data, DATA)
    if data.held_out is None:
        targets = {TRAIN: needed.train, HELD_OUT: needed.held_out}
        stream.fill(_split(source, said), targets, said)
    else:
        stream.fill(((TRAIN, text) for _, text in _split(source)), {TRAIN: needed.train}, said)
        held_out = _source(sweep, data.held_out, HELD_OUT_DATA)
        stream.fill(((HELD_OUT, text) for _, text in _split(held_out)), {HELD_OUT: needed.held_out}, said)
    _require_enough(sweep, grid, source.name, stream.counts, needed)
    facts = {
        "made_from": made_from,
        "name": data.name or source.name,
        "vocab_size": len(tokenizer),
        "dtype": stream.dtype,
        "needed": asdict(needed),
        "tokens": stream.counts,
        "fingerprint": stream.fingerprint(),
        "split": SPLIT,
    }
    write_atomically(part / "data.json", json.dumps(facts, indent=1))


def _begin(part: Path, made_from: str) -> None:
    """Keep what an interrupted run left of the same tokens, and nothing else."""
    state = part / "state.json"
    left = _left(state)
    if left.get("made_from") == made_from and left.get("split") == SPLIT:
        return
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    nothing = {TRAIN: 0, HELD_OUT: 0}
    write_atomically(state, json.dumps({"made_from": made_from, "split": SPLIT, "counts": nothing, "read": nothing}))


def _source(sweep: Sweep, text: Text, where: Path_) -> Source:
    """The documents of a text, which stands at `where` in the sweep's file."""
    found: list[Path] | None = None  # not strings, which are texts where there is no such file
    if isinstance(text.text, str):
        found = _files(sweep, text.text, (*where, "text"))
    elif text.text is not None:
        found = [file for index, path in enumerate(text.text) for file in _files(sweep, path, (*where, "text", index))]
    try:
        return find_source(found, dataset=text.dataset, column=text.column, split=text.split)
    except (CorpusError, SettingsError) as error:
        named = "dataset" if text.text is None else "text"
        raise CorpusError(sweep.told((*where, named), str(error))) from error


def _files(sweep: Sweep, path: str, where: Path_) -> list[Path]:
    """The files or folders that a path means."""
    place = sweep.folder / Path(path).expanduser()
    try:
        if "*" in place.name:
            found, what = sorted(place.parent.glob(place.name)), "No file matches"
        else:
            found, what = [place] if place.exists() else [], "There is no file or folder"
    except (OSError, ValueError) as error:  # too long, or with characters that no path has
        raise CorpusError(sweep.told(where, f"{path!r} cannot be the path of a file: {one_line(error)}")) from error
    if not found:
        hint = "Relative paths count from the file that says them; a dataset of the Hub is given as `dataset`."
        raise CorpusError(sweep.told(where, f"{what} {str(place)!r}. {hint}"))
    return found


def _pieces(source: Source) -> Iterator[tuple[str, str]]:
    """The texts of a source, long ones in pieces, each with the name of what it is held out with.

    That is the document; a single document is all there is to divide, so that each of its pieces has a name of its own.
    """
    texts = ((index, document, document.read(None)) for index, document in enumerate(source.documents))
    written = (entry for entry in texts if entry[2].strip())
    beginning = list(islice(written, 2))
    for index, document, text in chain(beginning, written):
        # The modules of the standard library come in many slices, which stay together.
        name = document.whole or str(index)
        for start, piece in _cut(text):
            yield name if start == 0 or len(beginning) > 1 else f"{name}:{start}", piece


def _cut(text: str) -> Iterator[tuple[int, str]]:
    """A text in pieces that end with a line, and where each begins."""
    start = 0
    while len(text) - start > PIECE_CHARACTERS:
        end = text.rfind("\n", start, start + PIECE_CHARACTERS) + 1 or start + PIECE_CHARACTERS
        yield start, text[start:end]
        start = end
    if text[start:].strip():
        yield start, text[start:]


def _split(source: Source, said: Callable[[str], None] = lambda line: None) -> Iterator[tuple[str, str]]:
    """Which documents are trained on and which are held out: by their names, so that it is the same every time.

    Where the names hold out none, as they may in a short text, one of several is held out all the same.
    """
    pieces = _pieces(source)
    first: list[tuple[str, str]] = []
    for name, text in pieces:
        first.append((name, text))
        if ":" in name and len(first) == 2:
            said(f"The text is one document: of its pieces of {PIECE_CHARACTERS:,} characters, a twentieth is held out")
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
    wanted = min(enough, default=max(sizes.values()))
    return [name for name, size in sizes.items() if size == wanted][-1]


def _tokenizer(sweep: Sweep, folder: Path, said: Callable[[str], None]) -> Any:
    """The tokenizer of a sweep, saved in `folder`."""
    wanted = sweep.specification.tokenizer
    if folder.is_dir():
        with quiet():
            return AutoTokenizer.from_pretrained(folder)
    if wanted.name is not None:
        tokenizer = _load_tokenizer(sweep, wanted.name)
    else:
        said(f"Training a tokenizer of {wanted.trained_entries:,} entries")
        tokenizer = _trained(sweep, wanted.trained_entries, wanted.characters)
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
            f"the tokenizer {name!r} cannot be loaded: no such folder, and no such tokenizer on "
            "the Hub, or the Hub cannot be reached.",
        ) from error


def _trained(sweep: Sweep, vocab_size: int, characters: int) -> PreTrainedTokenizerFast:
    from tokenizers import ByteLevelBPETokenizer

    data = sweep.specification.data
    trained = ByteLevelBPETokenizer()
    texts = (text for kind, text in _split(_source(sweep, data, DATA)) if kind == TRAIN or data.held_out is not None)
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


class _Stream:
    """Tokens that are appended to files, with a record of how far it is, so that it can go on after a break."""

    def __init__(self, folder: Path, tokenizer: Any) -> None:
        self._folder, self._tokenizer = folder, tokenizer
        self.dtype = "uint16" if len(tokenizer) <= 2**16 else "uint32"
        kept = json.loads((folder / "state.json").read_text())
        self._made_from: str = kept["made_from"]
        self.counts: dict[str, int] = kept["counts"]
        self._read: dict[str, int] = kept["read"]  # documents read of each source, by what it is filled for
        for kind, count in self.counts.items():
            path = folder / f"{kind}.bin"
            path.touch()
            os.truncate(path, count * np.dtype(self.dtype).itemsize)

    def fill(self, documents: Iterator[tuple[str, str]], targets: dict[str, int], said: Callable[[str], None]) -> None:
        """Append documents until there are as many tokens of each kind as wanted, or no more documents."""
        first = next(iter(targets))
        batch: list[tuple[str, str]] = []
        size = 0
        for kind, text in islice(documents, self._read[first], None):
            if all(self.counts[name] >= count for name, count in targets.items()):
                return
            batch.append((kind, text))
            size += len(text)
            if size >= BATCH_CHARACTERS:
                self._append(batch, targets, first, said)
                batch, size = [], 0
        self._append(batch, targets, first, said)

    def _append(
        self, batch: list[tuple[str, str]], targets: dict[str, int], first: str, said: Callable[[str], None]
    ) -> None:
        if not batch:
            return
        end = [] if self._tokenizer.eos_token_id is None else [self._tokenizer.eos_token_id]
        ids = self._tokenizer([text for _, text in batch], add_special_tokens=False, verbose=False).input_ids
        for kind in targets:
            tokens = [token for (own, _), row in zip(batch, ids, strict=True) if own == kind for token in [*row, *end]]
            wanted = np.array(tokens[: max(0, targets[kind] - self.counts[kind])], self.dtype)
            with (self._folder / f"{kind}.bin").open("ab") as file:
                wanted.tofile(file)
                file.flush()
                os.fsync(file.fileno())
            self.counts[kind] += len(wanted)
        self._read[first] += len(batch)
        kept = {"made_from": self._made_from, "split": SPLIT, "counts": self.counts, "read": self._read}
        write_atomically(self._folder / "state.json", json.dumps(kept))
        said(f"Tokenized {self.counts[TRAIN]:,} of {targets.get(TRAIN, 0) or self.counts[TRAIN]:,} training tokens")

    def fingerprint(self) -> str:
        """A digest of all tokens."""
        total = 0
        for kind in (TRAIN, HELD_OUT):
            with (self._folder / f"{kind}.bin").open("rb") as file:
                while part := file.read(2**24):
                    total = zlib.crc32(part, total)
        return f"{total:08x}"


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
            f"training.tokens, give more text, or let it be read several times with data.epochs: {times:g}."
        )
    if counts[HELD_OUT] == 0:
        raise CorpusError(
            f"No part of {name} is held out to measure on: it is one document of at most {PIECE_CHARACTERS:,} "
            "characters, or the held-out text is empty. Give data.held_out, a text of its own, or more text."
        )
    if counts[HELD_OUT] < needed.held_out:
        raise CorpusError(
            f"{name} has {counts[HELD_OUT]:,} held-out tokens, but measuring takes {needed.held_out:,}. Give "
            f"data.held_out, a text of its own, or lower {_what_to_lower(sweep, grid, counts[HELD_OUT])}."
        )


def _what_to_lower(sweep: Sweep, grid: Grid, held_out: int) -> str:
    """The settings that ask for more held-out tokens than there are."""
    scoring = sweep.specification.scoring
    settings = scoring.settings(grid.shortest)
    blocks, fits = settings.fit_blocks + settings.eval_blocks, held_out // settings.block_size
    loss = [f"scoring.loss_tokens to {held_out:,}"] if scoring.loss_tokens > held_out else []
    size = f"fit_blocks and eval_blocks to {fits:,} together (blocks of {settings.block_size:,} tokens)"
    return " and ".join([*loss, *([f"scoring.{size}"] if blocks > fits else [])])
