"""The tokens of a sweep: the same for every point in the same order, tokenized once, whatever interrupts it."""

import json
import shutil
import zlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from typer.testing import CliRunner

from depthscope.cli import app
from depthscope.errors import CorpusError, SpecificationError, SweepError
from depthscope.sweep import data as data_module
from depthscope.sweep import token_stream
from depthscope.sweep.data import Corpus, Sequences, open_corpus, prepare_corpus
from depthscope.sweep.grid import expand
from depthscope.sweep.specification import load_sweep
from depthscope.sweep.token_stream import TokenStream
from depthscope.text.documents import Document, Source
from depthscope.text.stdlib import python_stdlib
from sweeps import write_sweep, write_text
from tiny_tokenizer import save_tokenizer


def prepared(folder: Path, out: str = "out", **parts: Any) -> Corpus:
    sweep = load_sweep(write_sweep(folder, **parts))
    return prepare_corpus(sweep, expand(sweep), folder / out)


def files(folder: Path) -> dict[str, bytes]:
    names = ("train.bin", "held_out.bin", "tokenizer/tokenizer.json", "data.json")
    return {name: (folder / "data" / name).read_bytes() for name in names}


def read(corpus: Corpus, length: int, count: int, seed: int = 0) -> list[int]:
    """The tokens of a training, one after the other."""
    sequences = Sequences(corpus, length, count, seed)
    assert len(sequences) == count
    return torch.cat([sequences[index]["input_ids"] for index in range(count)]).tolist()


def test_points_of_every_sequence_length_read_the_same_tokens_in_the_same_order(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, grid={"length": {"sequence_length": [8, 16, 32]}})
    assert corpus.span == 32
    longest = read(corpus, 32, 24)
    assert read(corpus, 16, 48) == longest
    assert read(corpus, 8, 96) == longest
    assert sorted(longest) == sorted(corpus.train[:768].tolist())
    assert longest != corpus.train[:768].tolist()


def test_every_seed_draws_its_own_order_and_the_same_one_every_time(tmp_path: Path) -> None:
    corpus = prepared(tmp_path)
    assert read(corpus, 16, 48, seed=1) == read(corpus, 16, 48, seed=1)
    assert read(corpus, 16, 48, seed=1) != read(corpus, 16, 48, seed=0)
    alone = Sequences(corpus, 16, 48, seed=1)
    assert alone[40]["input_ids"].tolist() == read(corpus, 16, 48, seed=1)[640:656]


def test_the_text_is_called_what_the_file_calls_it_or_by_its_own_name(tmp_path: Path) -> None:
    assert prepared(tmp_path).name == "text"
    named = prepared(tmp_path, "named", data={"name": "my books"})
    assert named.name == "my books"
    assert named.held_out_blocks(1, 16).name == "my books, held out"
    assert prepared(tmp_path, data={"name": "my books"}).train.tolist() == named.train.tolist()


def test_a_further_epoch_reads_all_again_in_another_order(tmp_path: Path) -> None:
    write_text(tmp_path)
    corpus = prepared(tmp_path, training={"tokens": 40_000}, data={"epochs": 9})
    assert 16_000 < corpus.used < 20_000
    sequences, spans = Sequences(corpus, 16, 2500, 0), corpus.used // 16
    one, two = ([sequences[epoch * spans + index]["input_ids"].tolist() for index in range(spans)] for epoch in (0, 1))
    assert sorted(one) == sorted(two)
    assert one != two


def test_more_tokens_than_the_text_has_are_refused_without_epochs(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"has [\d,]+ training tokens, but the sweep reads 24,000") as refused:
        prepared(tmp_path, training={"tokens": 24_000})
    times = float(str(refused.value).rpartition("data.epochs: ")[2].rstrip("."))
    assert prepared(tmp_path, training={"tokens": 24_000}, data={"epochs": times}).used * times >= 23_000
    shown = CliRunner().invoke(
        app,
        ["sweep", "run", str(write_sweep(tmp_path, training={"tokens": 24_000})), "--out", str(tmp_path / "b")],
    )
    assert shown.exit_code == 2
    assert "training tokens, but the sweep reads" in shown.output
    assert not list((tmp_path / "b" / "points").iterdir())


def test_too_little_text_for_measuring_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="held-out tokens, but the measurements need 4,096"):
        prepared(tmp_path, scoring={"loss_tokens": 4096})
    write_text(tmp_path / "short", documents=1)
    with pytest.raises(CorpusError, match="fewer than one sequence"):
        prepared(
            tmp_path,
            data={"text": "short/text", "epochs": 1000, "held_out": {"text": "text"}},
            training={"sequence_length": 512, "batch_tokens": 512},
        )


def test_text_that_is_not_there_is_named_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"line \d+: There is no file or folder"):
        prepared(tmp_path, data={"text": "nowhere"})
    with pytest.raises(CorpusError, match=r"line \d+: No file matches .*\*\.txt"):
        prepared(tmp_path, data={"text": ["text", "*.txt"]})
    with pytest.raises(CorpusError, match=r"line \d+: '.*' cannot be the path of a file"):
        prepared(tmp_path, data={"text": "x" * 5000})


@pytest.mark.parametrize("options", [[], ["--dry-run"]])
@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("text: nowhere/x.txt", "line 3: There is no file or folder"),
        ("text: [a.txt, b.txt]", "line 3: There is no file or folder"),
        ("text: a.txt\n  column: words", "line 3: column='words' was given"),
        ("text: a.txt\n  held_out: {text: empty}", "line 4: The folder"),
        ("text: binary.txt", "line 3: "),
    ],
)
def test_text_is_looked_for_before_anything_is_done(
    tmp_path: Path, data: str, message: str, options: list[str]
) -> None:
    (tmp_path / "a.txt").write_text("some words")
    (tmp_path / "binary.txt").write_bytes(b"\0\0")
    (tmp_path / "empty").mkdir()
    (tmp_path / "a.yaml").write_text(f"name: a\ndata:\n  {data}\ngrid: {{f: {{num_hidden_layers: 2}}}}\n")
    command = ["sweep", "run", str(tmp_path / "a.yaml"), "--out", str(tmp_path / "out"), *options]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 2
    assert message in shown.output
    assert not (tmp_path / "out").exists()


def test_an_attention_without_its_package_is_refused_by_a_run_but_not_by_a_plan(tmp_path: Path) -> None:
    if find_spec("flash_attn") is not None:
        pytest.skip("flash_attn is installed")
    file = write_sweep(tmp_path, grid={"f": {"attention": ["sdpa", "flash_attention_2"]}})
    for options in ([], ["--dry-run"]):
        shown = CliRunner().invoke(app, ["sweep", "run", str(file), "--out", str(tmp_path / "out"), *options])
        assert shown.exit_code == 2
        line = file.read_text().splitlines().index("    - flash_attention_2") + 1
        assert f"line {line}: flash_attention_2 needs the package flash_attn" in shown.output
    assert CliRunner().invoke(app, ["sweep", "plan", str(file)]).exit_code == 0


def test_a_sweep_goes_on_without_the_text_that_it_has_tokenized(tmp_path: Path) -> None:
    prepared(tmp_path)
    sweep = load_sweep(write_sweep(tmp_path))
    shutil.rmtree(tmp_path / "text")
    data_module.require_text(sweep, tmp_path / "out")
    with pytest.raises(CorpusError, match="no file or folder"):
        data_module.require_text(sweep, tmp_path / "new")


def test_the_sweep_file_that_a_run_leaves_makes_the_same_tokens(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    file = write_sweep(tmp_path / "base")
    (tmp_path / "top.yaml").write_text("extends: base/tiny.yaml\n")
    sweep = load_sweep(tmp_path / "top.yaml")
    made = prepare_corpus(sweep, expand(sweep), tmp_path / "out")
    (tmp_path / "out" / "sweep.yaml").write_text(yaml.safe_dump(sweep.specification.model_dump(mode="json")))
    again = load_sweep(tmp_path / "out" / "sweep.yaml")
    for out in ("out", "new"):
        assert prepare_corpus(again, expand(again), tmp_path / out).fingerprint == made.fingerprint
    own = load_sweep(file)
    assert prepare_corpus(own, expand(own), tmp_path / "own").fingerprint == made.fingerprint


def source_of(*texts: str) -> Source:
    return Source("text", [Document.from_text(text, "text") for text in texts])


def held_out(*texts: str) -> list[int]:
    return [index for index, (kind, _) in enumerate(data_module._split(source_of(*texts))) if kind == "held_out"]


def test_something_is_held_out_of_a_short_text() -> None:
    """The names of these documents, their numbers, hold out none of the first of them."""
    assert held_out("a") == []
    assert held_out("a", "a") == [1]
    assert held_out("a" * 50, "b" * 20, "c" * 20, "d") == [2]  # the last of the shortest with a twentieth of the text
    assert held_out("line\n" * 72_000) == [6]  # 8 pieces of 50,000 characters and less, the last with a fifth of that


def test_what_is_held_out_by_name_stays_so(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"text {index}" for index in range(200)]
    by_name = [index for index in range(200) if zlib.crc32(str(index).encode()) % 20 == 0]
    assert len(by_name) > 3
    assert held_out(*texts) == by_name
    assert [text for _, text in data_module._split(source_of(*texts))] == texts


def test_a_long_document_lies_on_one_side_as_a_whole() -> None:
    long = {str(index): f"document {index}\n" * 12_000 for index in range(40)}  # 4 pieces each
    sides: dict[str, set[str]] = {}
    for kind, text in data_module._split(source_of(*long.values())):
        sides.setdefault(text.split()[1], set()).add(kind)
    assert all(len(kinds) == 1 for kinds in sides.values())
    assert {name for name, kinds in sides.items() if kinds == {"held_out"}} == {
        name for name in long if zlib.crc32(name.encode()) % 20 == 0
    }
    # Also where the names hold out none, and one is chosen.
    three = ["a line of it\n" * 30_000, "one of another\n" * 6_000, "one of a third\n" * 10_000]
    found = [(kind, text[:6]) for kind, text in data_module._split(source_of(*three))]
    assert {first for kind, first in found if kind == "held_out"} == {"one of"}
    assert sum(kind == "held_out" for kind, _ in found) == 2  # the shorter one, in its 2 pieces


def test_a_single_document_is_divided_in_pieces_and_that_is_said() -> None:
    said: list[str] = []
    kinds = [kind for kind, _ in data_module._split(source_of("line\n" * 400_000, " \n"), said.append)]
    assert 0 < kinds.count("held_out") < len(kinds) / 5
    assert len(said) == 1
    assert "one document" in said[0]
    said.clear()
    list(data_module._split(source_of("line\n" * 40_000, "another"), said.append))
    assert said == []


def test_modules_of_the_standard_library_are_held_out_by_their_path(tmp_path: Path) -> None:
    names = [f"{package}/__init__.py" for package in ("json", "email", "unittest", "logging", "asyncio", "http", "xml")]
    names += ["ast.py", "json/decoder.py", "http/server.py", *(f"xml/p{index}/__init__.py" for index in range(40))]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(f"# {name}\n" * 800)  # in slices
    sides: dict[str, set[str]] = {}
    for kind, text in data_module._split(python_stdlib(tmp_path)):
        sides.setdefault(text.split()[1], set()).add(kind)
    assert all(len(kinds) == 1 for kinds in sides.values())
    by_path = {name for name in names if zlib.crc32(name.encode()) % 20 == 0}
    assert {name.rpartition("/")[2] for name in by_path} == {"server.py", "__init__.py"}  # some of either
    assert {name for name, kinds in sides.items() if kinds == {"held_out"}} == by_path
    assert {document.name for document in python_stdlib(tmp_path).documents} == set(names)


def test_tokens_from_before_the_split_by_document_are_kept_whole_or_made_anew(tmp_path: Path) -> None:
    corpus = prepared(tmp_path)
    record = tmp_path / "out" / "data" / "data.json"
    facts = json.loads(record.read_text())
    assert facts.pop("split") == "by document"
    for later in ("train_fingerprint", "tokenizer", "check"):
        del facts[later]
    record.write_text(json.dumps(facts))
    assert prepared(tmp_path).fingerprint == corpus.fingerprint  # finished: read as they are
    # Half tokenized by another rule: what is there is not gone on with.
    shutil.copytree(tmp_path / "out" / "data", tmp_path / "new" / "data.part")
    part = tmp_path / "new" / "data.part"
    (part / "data.json").unlink()
    state = json.loads((part / "state.json").read_text())
    del state["split"]
    (part / "state.json").write_text(json.dumps(state))
    (part / "train.bin").write_bytes(b"\0" * (part / "train.bin").stat().st_size)
    assert prepared(tmp_path, "new").train.tolist() == corpus.train.tolist()


@pytest.mark.parametrize(
    "columns", [{"messages": [[{"role": "user", "content": "a"}]] * 3}, {"input_ids": [[1, 2]] * 3}]
)
def test_chats_and_token_ids_are_no_text_to_train_on(tmp_path: Path, columns: dict[str, Any]) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict(columns).to_json(tmp_path / "rows.jsonl")
    with pytest.raises(CorpusError, match="where text is needed"):
        prepared(tmp_path, data={"text": "rows.jsonl"})


def test_a_text_of_which_nothing_can_be_held_out_is_refused_with_what_helps(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("some words, " * 2000)
    with pytest.raises(CorpusError, match=r"No part of one\.txt can be held out: .* as data\.held_out") as refused:
        prepared(tmp_path, data={"text": "one.txt"})
    assert "lower" not in str(refused.value)
    with pytest.raises(CorpusError, match=r"lower scoring\.loss_tokens to [\d,]+\.$"):
        prepared(tmp_path, "b", scoring={"loss_tokens": 4096})
    with pytest.raises(CorpusError, match=r"lower scoring\.fit_blocks and eval_blocks to \d+ together"):
        prepared(tmp_path, "c", scoring={"eval_blocks": 1000})


@pytest.mark.parametrize("damage", ['{"made_from": "', "{}", "[]"])
def test_a_damaged_record_of_the_tokens_is_named_with_what_to_delete(tmp_path: Path, damage: str) -> None:
    prepared(tmp_path)
    record = tmp_path / "out" / "data" / "data.json"
    record.write_text(damage)
    for read_again in (lambda: prepared(tmp_path), lambda: open_corpus(tmp_path / "out", 16)):
        with pytest.raises(SweepError, match=r"data\.json.*Delete the folder .*/out/data"):
            read_again()


def test_held_out_documents_are_not_trained_on(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, training={"tokens": 8000}, scoring={"loss_tokens": 500})
    decode = corpus.tokenizer.decode
    train, held_out = (set(decode(ids).split("<|endoftext|>")) for ids in (corpus.train, corpus.held_out))
    documents = {path.read_text() for path in (tmp_path / "text").iterdir()}
    assert len(train & documents) > 30
    assert held_out & documents
    assert not train & held_out & documents


def test_a_held_out_text_of_its_own_is_measured_on(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "a.txt").write_text("XYZ " * 500)
    corpus = prepared(tmp_path, data={"held_out": {"text": "other/*.txt"}})
    assert set(corpus.tokenizer.decode(corpus.held_out).split()) <= {"XYZ", "X", "XY"}
    assert "XYZ" not in corpus.tokenizer.decode(corpus.train)
    blocks = corpus.held_out_blocks(2, 16)
    assert blocks.input_ids.flatten().tolist() == corpus.held_out[:32].tolist()


def test_a_tokenizer_that_is_given_is_used(tmp_path: Path) -> None:
    save_tokenizer(tmp_path / "tokenizer")
    corpus = prepared(tmp_path, tokenizer={"name": "tokenizer", "vocab_size": 300}, training={"tokens": 1024})
    given = json.loads((tmp_path / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]
    assert corpus.tokenizer.get_vocab().items() >= given.items()
    text = corpus.tokenizer.decode(corpus.train[:50])
    first = [path.read_text() for path in sorted((tmp_path / "text").iterdir())]
    assert any(text[:30] in document for document in first)
    shutil.rmtree(tmp_path / "tokenizer")
    with pytest.raises(SpecificationError, match=r"line \d+: the tokenizer 'tokenizer' cannot be loaded"):
        prepared(tmp_path, "new", tokenizer={"name": "tokenizer", "vocab_size": 300})


def test_every_document_is_read_once_in_its_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_stream, "BATCH_CHARACTERS", 1000)
    corpus = prepared(tmp_path, training={"tokens": 8000}, data={"held_out": {"text": "text"}})
    documents = [path.read_text() for path in sorted((tmp_path / "text").iterdir())]
    *whole, _ = corpus.tokenizer.decode(corpus.train).split("<|endoftext|>")
    assert len(whole) > 30
    assert whole == documents[: len(whole)]


def test_long_documents_are_cut_at_lines_and_nothing_is_lost(tmp_path: Path) -> None:
    lines = [f"line {index} " + "word " * 30 + "\n" for index in range(1000)]
    (tmp_path / "long.txt").write_text("".join(lines))
    source = data_module.find_source(str(tmp_path / "long.txt"))
    pieces = list(data_module._pieces(source))
    assert len(pieces) > 3
    assert "".join(text for _, text in pieces) == "".join(lines)
    assert all(text.endswith("\n") and len(text) <= data_module.PIECE_CHARACTERS for _, text in pieces)
    assert len({name for name, _ in pieces}) == len(pieces)


@pytest.mark.parametrize("held_out", [False, True])
@pytest.mark.parametrize("before", [True, False])
def test_interrupted_tokenizing_goes_on_and_gives_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held_out: bool, before: bool
) -> None:
    monkeypatch.setattr(token_stream, "BATCH_CHARACTERS", 1000)
    data = {"held_out": {"text": "text"}} if held_out else {}
    parts = {"training": {"tokens": 6000}, "data": data, "scoring": {"loss_tokens": 400 if held_out else 64}}
    prepared(tmp_path, "whole", **parts)
    append = TokenStream._append
    calls = 0

    def dying(self: Any, *args: Any) -> None:
        nonlocal calls
        calls += 1
        if calls % 3 == 0 and before:
            raise KeyboardInterrupt
        append(self, *args)
        if calls % 3 == 0:
            # As if killed between the tokens and the record of them.
            with (tmp_path / "out/data.part/train.bin").open("ab") as file:
                file.write(b"12345")
            raise KeyboardInterrupt

    monkeypatch.setattr(TokenStream, "_append", dying)
    interrupted = 0
    while True:
        try:
            prepared(tmp_path, **parts)
        except KeyboardInterrupt:
            interrupted += 1
            continue
        break
    assert interrupted >= 2
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_what_an_interrupted_run_left_of_another_tokenizer_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prepared(tmp_path, "whole")
    monkeypatch.setattr(TokenStream, "fill", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        prepared(tmp_path, tokenizer={"vocab_size": 400})
    assert (tmp_path / "out/data.part/tokenizer").is_dir()
    monkeypatch.undo()
    assert len(prepared(tmp_path).tokenizer) == 280
    assert files(tmp_path / "out") == files(tmp_path / "whole")


def test_the_tokens_of_other_text_or_another_tokenizer_are_refused(tmp_path: Path) -> None:
    prepared(tmp_path)
    prepared(tmp_path)
    for parts in ({"tokenizer": {"vocab_size": 300}}, {"training": {"tokens": 1024}}, {"data": {"epochs": 2}}):
        with pytest.raises(SweepError, match="holds tokens of another text"):
            prepared(tmp_path, **parts)


def test_tokens_are_counted_written_and_opened_as_they_are(tmp_path: Path) -> None:
    corpus = prepared(tmp_path)
    facts = json.loads((tmp_path / "out/data/data.json").read_text())
    assert facts["tokens"] == {"train": len(corpus.train), "held_out": len(corpus.held_out)}
    assert (facts["dtype"], facts["vocab_size"]) == ("uint16", 280)
    assert np.array_equal(corpus.train, np.fromfile(tmp_path / "out/data/train.bin", np.uint16))
    again = open_corpus(tmp_path / "out", corpus.span)
    assert (again.used, again.fingerprint) == (corpus.used, corpus.fingerprint)


def test_the_embedded_corpus_is_read_where_no_text_is_named(tmp_path: Path) -> None:
    corpus = prepared(tmp_path, data={"text": None}, tokenizer={"characters": 20_000})
    assert corpus.name.startswith("python-stdlib-")
    assert "def " in corpus.tokenizer.decode(corpus.train)
