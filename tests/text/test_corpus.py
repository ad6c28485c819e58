"""The corpus: text of every kind becomes the same blocks every time, and what cannot become blocks is said clearly."""

import copy
import json
import logging
import os
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from depthscope.errors import CorpusError, SettingsError
from depthscope.text.blocks import Blocks, load_blocks
from depthscope.text.stdlib import python_stdlib
from forks import new_python

SHARED_DATA = Path(os.environ.get("DEPTHSCOPE_DATA", Path(__file__).parents[3] / "shared" / "data"))
SENTENCE = "the layer of a model that héld naïve tokens, in Straße 42 and said: 'depth' — 模型 — (was) useful... again"


def prose(words: int, seed: int = 0) -> str:
    """Lines of random words, with umlauts, Chinese characters, punctuation and runs of spaces among them."""
    chance, vocabulary = random.Random(seed), SENTENCE.split(" ")
    lines = (" ".join(chance.choices(vocabulary, k=chance.randint(1, 15))) for _ in range(words // 8))
    return "\n".join(line + " " * chance.choice((0, 0, 0, 5)) for line in lines) + "\n"


def train(model: object, pre_tokenizer: object, trainer: object, normalizer: object = None) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder = normalizer, pre_tokenizer, decoders.ByteLevel()
    tokenizer.train_from_iterator(prose(4000, seed=1).splitlines(), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", model_max_length=16
    )


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE that puts nothing before a text."""
    return train(
        models.BPE(),
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<s>", "</s>", "<unk>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )


@pytest.fixture(scope="module")
def spaceless_tokenizer() -> PreTrainedTokenizerFast:
    """A BPE without a pre-tokenizer, as Llama 2 has: the whole text is one word."""
    return train(
        models.BPE(unk_token="<unk>"),
        None,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"], show_progress=False),
        normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]),
    )


def ids_of(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, verbose=False).input_ids


def flat(blocks: Blocks) -> list[int]:
    return blocks.input_ids.flatten().tolist()


# Blocks


def test_equal_tokens_have_equal_fingerprints_whatever_they_came_as() -> None:
    as_lists = [[1, 2, 3], [4, 5, 6]]
    kinds = [
        as_lists,
        torch.tensor(as_lists),
        torch.tensor(as_lists, dtype=torch.int32),
        np.array(as_lists, dtype="u1"),
    ]
    assert len({Blocks.from_ids(kind).fingerprint for kind in kinds}) == 1
    assert all(Blocks.from_ids(kind).input_ids.dtype == torch.int64 for kind in kinds)


def test_the_fingerprint_is_sixteen_hex_digits_and_does_not_change_between_versions() -> None:
    assert Blocks.from_ids([[1, 2, 3], [4, 5, 6]]).fingerprint == "844e795539039798"


def test_ids_shape_and_mask_each_change_the_fingerprint() -> None:
    variants = [
        Blocks.from_ids([[1, 2, 3, 4], [5, 6, 7, 8]]),
        Blocks.from_ids([[1, 2, 3, 4], [5, 6, 7, 9]]),
        Blocks.from_ids([[1, 2], [3, 4], [5, 6], [7, 8]]),
        Blocks.from_ids([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 1, 1, 1], [1, 1, 1, 0]]),
        Blocks.from_ids([[1, 2, 3, 4], [5, 6, 7, 8]], [[1, 1, 1, 1], [0, 1, 1, 1]]),
    ]
    assert len({blocks.fingerprint for blocks in variants}) == len(variants)


def test_a_mask_that_masks_nothing_is_no_mask() -> None:
    blocks = Blocks.from_ids([[1, 2]], [[1, 1]])
    assert blocks.attention_mask is None
    assert blocks.fingerprint == Blocks.from_ids([[1, 2]]).fingerprint


def test_a_slice_keeps_the_name_and_has_its_own_fingerprint() -> None:
    blocks = Blocks.from_ids([[1, 2], [3, 4], [5, 0]], [[1, 1], [1, 1], [1, 1]], name="mine", special_ids=[1])
    part = blocks[1:3]
    assert (len(blocks), len(part), part.name, part.special_ids) == (3, 2, "mine", frozenset({1}))
    assert part.fingerprint == Blocks.from_ids([[3, 4], [5, 0]]).fingerprint != blocks.fingerprint


def test_blocks_do_not_change_with_the_array_they_came_from() -> None:
    for array in (np.array([[1, 2], [3, 4]]), torch.tensor([[1, 2], [3, 4]])):
        blocks = Blocks.from_ids(array)
        array[0, 0] = 99
        assert flat(blocks) == [1, 2, 3, 4]


def test_padding_and_leading_special_tokens_do_not_count() -> None:
    blocks = Blocks.from_ids(
        [[0, 0, 5, 0, 6], [9, 9, 0, 5, 6], [5, 6, 7, 9, 9]],
        attention_mask=[[1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1, 1, 1, 0, 0]],
        special_ids=[0],
    )
    assert blocks.token_mask.int().tolist() == [[0, 0, 1, 1, 1], [0, 0, 0, 1, 1], [1, 1, 1, 0, 0]]


def test_without_mask_and_special_ids_every_token_counts() -> None:
    assert Blocks.from_ids([[0, 1, 2]]).token_mask.all()


@pytest.mark.parametrize(
    ("ids", "says"),
    [
        ([1, 2, 3], "1 dimensions"),
        ([[1, 2], [3]], "rows of equal length"),
        ([[1.0, 2.0]], "integers"),
        ([[True, False]], "integers"),
        ([["a", "b"]], "matrix"),
        (torch.zeros(0, 4, dtype=torch.int64), "0 x 4"),
        ([[1], [2]], "2 x 1"),
        ([[1, -100]], "-100"),
    ],
)
def test_ids_that_are_no_blocks_are_refused(ids: object, says: str) -> None:
    with pytest.raises(CorpusError, match=says):
        Blocks.from_ids(ids)


@pytest.mark.parametrize(("mask", "says"), [([[1, 1, 1]], r"\[1, 3\]"), ([[1, 1], [1, 0]], "1 token beside padding")])
def test_masks_that_do_not_fit_are_refused(mask: object, says: str) -> None:
    with pytest.raises(CorpusError, match=says):
        Blocks.from_ids([[1, 2], [3, 4]], mask)


def test_ids_beyond_the_vocabulary_are_refused() -> None:
    blocks = Blocks.from_ids([[1, 2], [3, 4]])
    blocks.check_vocabulary(5)
    with pytest.raises(CorpusError, match="token id 4"):
        blocks.check_vocabulary(4)


# Text files


@pytest.mark.parametrize("words", [800, 4000, 60_000])
@pytest.mark.parametrize("kind", ["tokenizer", "spaceless_tokenizer"])
def test_the_blocks_of_a_file_are_its_tokens_from_the_start(
    kind: str, words: int, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    tokenizer = request.getfixturevalue(kind)
    (path := tmp_path / "text.txt").write_text(prose(words), encoding="utf-8")
    expected = ids_of(tokenizer, path.read_text(encoding="utf-8"))
    for num_blocks, block_size in ((1, 2), (7, 31), (len(expected) // 64, 64), (1, len(expected))):
        blocks = load_blocks(path, tokenizer, num_blocks=num_blocks, block_size=block_size)
        assert blocks.input_ids.shape == (num_blocks, block_size)
        assert flat(blocks) == expected[: num_blocks * block_size]
        assert blocks.name == "text.txt"


@pytest.mark.parametrize(
    "text", ["a" * 300_000, "ab" * 150_000, "\u00e9" * 200_000, "a b" * 100_000, "a" + "\n" * 200_000]
)
def test_text_without_boundaries_is_cut_where_the_whole_would_be(
    text: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (path := tmp_path / "text.txt").write_text(text, encoding="utf-8")
    blocks = load_blocks(path, tokenizer, num_blocks=10, block_size=50)
    assert flat(blocks) == ids_of(tokenizer, text)[:500]


def test_a_large_file_is_not_tokenized_whole(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (path := tmp_path / "text.txt").write_text(prose(200_000), encoding="utf-8")
    seen = []

    def counting(text: str, **options: object) -> object:
        seen.append(len(text))
        return tokenizer(text, **options)

    load_blocks(path, counting, num_blocks=4, block_size=64)
    assert 0 < sum(seen) < path.stat().st_size / 4


def test_a_tokenizer_whose_choices_reach_far_gets_the_whole_text() -> None:
    class Numbering:
        """Every token depends on how long the text is, so that no prefix tells the tokens of the whole."""

        def __call__(self, text: str, **options: object) -> object:
            ids = [len(text) % 997] * len(text)
            return type("Encoding", (), {"input_ids": ids})

    blocks = load_blocks(["x" * 777_777], Numbering(), num_blocks=2, block_size=8)
    assert flat(blocks) == [777_777 % 997] * 16


def test_real_text_is_cut_like_its_whole(tokenizer: PreTrainedTokenizerFast) -> None:
    path = SHARED_DATA / "wikitext2" / "test.txt"
    if not path.is_file():
        pytest.skip(f"the WikiText-2 test file is not at {path}; set DEPTHSCOPE_DATA to its folder's parent")
    expected = ids_of(tokenizer, path.read_text(encoding="utf-8"))
    assert flat(load_blocks(path, tokenizer, num_blocks=100, block_size=128)) == expected[: 100 * 128]


def test_no_special_tokens_are_added_and_no_length_is_warned_about(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    beginning = copy.deepcopy(tokenizer)
    beginning.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    assert beginning("a b").input_ids[0] == beginning.bos_token_id
    (path := tmp_path / "text.txt").write_text(prose(100), encoding="utf-8")
    with caplog.at_level(logging.WARNING):
        logging.getLogger("transformers").propagate = True
        blocks = load_blocks(path, beginning, num_blocks=2, block_size=32, bos="no")
    assert tokenizer.bos_token_id not in flat(blocks)
    assert not caplog.records
    assert blocks.token_mask.all()
    assert blocks.special_ids == {tokenizer.bos_token_id, tokenizer.eos_token_id}


def test_documents_are_tokenized_one_by_one_and_joined(tokenizer: PreTrainedTokenizerFast) -> None:
    documents = ["the model", " held", "", "naïve tokens — 模型"]
    expected = [index for document in documents for index in ids_of(tokenizer, document)]
    assert flat(load_blocks(documents, tokenizer, num_blocks=1, block_size=len(expected))) == expected


def test_a_stream_is_read_only_as_far_as_needed(tokenizer: PreTrainedTokenizerFast) -> None:
    served = []

    def stream():
        for index in range(10**9):
            served.append(index)
            yield "the layer of a model "

    load_blocks(stream(), tokenizer, num_blocks=2, block_size=8)
    assert len(served) < 20


def test_a_folder_gives_its_text_files_in_sorted_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    for name, text in {
        "b.txt": "tokens",
        "a/z.md": "layer",
        "a.py": "model",
        ".git/x.txt": "no",
        "c.bin": "\0",
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    expected = [index for text in ("layer", "model", "tokens") for index in ids_of(tokenizer, text)]
    assert flat(load_blocks(tmp_path, tokenizer, num_blocks=1, block_size=len(expected))) == expected


def test_a_list_of_paths_is_read_in_its_own_order(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "a.txt").write_text("layer", encoding="utf-8")
    (tmp_path / "b.txt").write_text("model", encoding="utf-8")
    expected = ids_of(tokenizer, "model") + ids_of(tokenizer, "layer")
    paths = [tmp_path / "b.txt", tmp_path / "a.txt"]
    for given in (paths, [str(path) for path in paths]):
        blocks = load_blocks(given, tokenizer, num_blocks=1, block_size=len(expected))
        assert flat(blocks) == expected
        assert blocks.name == "b.txt and 1 more"


# Datasets


def test_every_kind_of_dataset_gives_the_blocks_of_its_column(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    datasets = pytest.importorskip("datasets")
    texts = [prose(40, seed) for seed in range(5)]
    table = datasets.Dataset.from_dict({"title": ["x"] * 5, "text": texts, "n": list(range(5))})
    table.to_json(tmp_path / "t.jsonl")
    table.to_csv(tmp_path / "t.csv")
    table.to_parquet(tmp_path / "t.parquet")
    (tmp_path / "t.json").write_text(json.dumps([{"text": text} for text in texts]), encoding="utf-8")
    expected = load_blocks(texts, tokenizer, num_blocks=4, block_size=16)
    files = [tmp_path / name for name in ("t.jsonl", "t.csv", "t.parquet", "t.json")]
    for source in (table, table.to_iterable_dataset(), datasets.DatasetDict({"train": table}), *files):
        blocks = load_blocks(source, tokenizer, num_blocks=4, block_size=16)
        assert blocks.fingerprint == expected.fingerprint
    titles = load_blocks(table, tokenizer, num_blocks=1, block_size=5, column="title")
    assert flat(titles) == ids_of(tokenizer, "x") * 5


def test_a_dataset_folder_is_read_by_split(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    datasets = pytest.importorskip("datasets")
    for split, word in (("train", "layer"), ("test", "model")):
        datasets.Dataset.from_dict({"text": [word] * 20}).to_parquet(tmp_path / f"{split}.parquet")
    for split, word in (("test", "model"), (None, "layer")):
        blocks = load_blocks(None, tokenizer, dataset=str(tmp_path), split=split, num_blocks=1, block_size=8)
        assert flat(blocks) == (ids_of(tokenizer, word) * 20)[:8]
        assert blocks.name == f"{tmp_path.name} ({split or 'train'})"
    with pytest.raises(CorpusError, match="no split 'dev'; it has: train, test"):
        load_blocks(None, tokenizer, dataset=str(tmp_path), split="dev", num_blocks=1, block_size=8)


def test_columns_that_cannot_be_read_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_dict({"question": ["a"], "answer": ["b"], "n": [1]})
    for column, says in ((None, "not clear.*question, answer, n"), ("text", "no column 'text'"), ("n", "holds int")):
        with pytest.raises(CorpusError, match=says):
            load_blocks(table, tokenizer, column=column, num_blocks=1, block_size=2)


class Recorder(logging.Handler):
    """Keeps what is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


@pytest.mark.parametrize(
    ("name", "content"), [("t.jsonl", '{"text": '), ("t.csv", 'text\n"'), ("t.parquet", "PAR1 no")]
)
def test_a_damaged_table_is_one_message_and_nothing_else(
    name: str, content: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    pytest.importorskip("datasets")
    (tmp_path / name).write_text(content, encoding="utf-8")
    logging.getLogger("datasets").addHandler(recorder := Recorder())
    try:
        with pytest.raises(CorpusError, match=f"{name}' cannot be read"):
            load_blocks(tmp_path / name, tokenizer, num_blocks=1, block_size=2)
    finally:
        logging.getLogger("datasets").removeHandler(recorder)
    assert recorder.messages == []


@pytest.mark.parametrize("setting", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_a_dataset_out_of_reach_is_one_message(setting: dict[str, str]) -> None:
    pytest.importorskip("datasets")
    script = """
from depthscope.text import blocks as corpus
try:
    corpus.load_blocks(None, len, dataset="no-one/nothing:config", num_blocks=1, block_size=2)
except corpus.CorpusError as error:
    print(error)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_HUB_OFFLINE", "HF_ENDPOINT")}
    done = new_python("-c", script, env=environment | setting)
    assert done.returncode == 0, done.stderr
    assert "'no-one/nothing' is not on this machine, and the Hugging Face Hub cannot be reached" in done.stdout
    assert done.stderr == ""


# What cannot become blocks


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "t.txt holds no text"),
        (b"the", "holds 1 token, but 2 blocks of 16 .32 tokens. were asked for. Lower the block size"),
        (b"the layer of a model that held tokens " * 2, "Lower the number of blocks to 1 "),
        ("Straße".encode("latin-1") * 99, "not UTF-8"),
        ("the model".encode("utf-16"), "not UTF-8"),
        (b"\x00\x01\x02" * 99, "binary"),
        (b"\x89PNG\r\n\x1a\n" * 99, "not UTF-8"),
    ],
)
def test_text_that_cannot_fill_the_blocks_is_refused(
    content: bytes, says: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (path := tmp_path / "t.txt").write_bytes(content)
    with pytest.raises(CorpusError, match=says):
        load_blocks(path, tokenizer, num_blocks=2, block_size=16)


@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("no/such/file.txt", "no file or folder 'no/such/file.txt'"),
        (["no-such-file.txt"], "no file or folder 'no-such-file.txt'"),
        ("a text\nof two lines", "To give the text itself"),
        ([], "holds no text"),
        (7, "not int"),
        (b"bytes", "not bytes"),
        ({"text": "a"}, "not dict"),
        (["a text", 7], "item 1 is int"),
    ],
)
def test_sources_that_are_no_text_are_refused(source: object, says: str, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CorpusError, match=says):
        load_blocks(source, tokenizer, num_blocks=1, block_size=9)


def test_a_folder_without_text_says_what_it_holds(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "picture.png").write_bytes(b"")
    with pytest.raises(CorpusError, match=r"no text file.*found: \.png"):
        load_blocks(tmp_path, tokenizer, num_blocks=1, block_size=2)


def test_tokens_beyond_the_vocabulary_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(CorpusError, match="vocabulary ends at 9"):
        load_blocks(["the layer of a model"], tokenizer, num_blocks=1, block_size=2, vocab_size=10)


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(CorpusError, match="needs a tokenizer"):
        load_blocks(None, None, num_blocks=1, block_size=2)


@pytest.mark.parametrize(
    "options",
    [
        {"num_blocks": 0},
        {"block_size": 1},
        {"column": "text"},
        {"split": "train"},
        {"source": "a.txt", "dataset": "org/name"},
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(SettingsError):
        load_blocks(**{"tokenizer": tokenizer, "num_blocks": 1, "block_size": 2, **options})


# The embedded corpus


def test_the_embedded_corpus_is_the_standard_library_and_the_same_every_time(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    first, second = (load_blocks(None, tokenizer, num_blocks=8, block_size=64) for _ in range(2))
    assert first.fingerprint == second.fingerprint
    assert first.name == f"python-stdlib-{sys.version_info.major}.{sys.version_info.minor}"


def test_the_embedded_corpus_has_enough_for_large_analyses(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(load_blocks(None, tokenizer, num_blocks=500, block_size=1024)) == 500


def fake_stdlib(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text.encode("latin-1"))
    return root


def test_modules_come_slice_by_slice_in_turn_and_only_public_ones(tmp_path: Path) -> None:
    line = "x" * 99 + "\n"
    root = fake_stdlib(
        tmp_path,
        {
            "ast.py": line.replace("x", "a") * 100,
            "bisect.py": line.replace("x", "b") * 10,
            "json/__init__.py": line.replace("x", "j") * 50,
            "json/decoder.py": "def decode(): ...\n",
            "json/_private.py": "no\n",
            "unittest/test/test_it.py": "no\n",
            "idlelib/editor.py": "no\n",
            "encodings/cp037.py": "no\n",
            "_private.py": "no\n",
            "site-packages/numpy/__init__.py": "no\n",
            "notstdlib.py": "no\n",
            "cmd.py": "# in Latin-1: \xe9\n",
        },
    )
    texts = [document.read(None) for document in python_stdlib(root).documents]
    assert [(text[0], len(text)) for text in texts] == [
        ("a", 4000),
        ("b", 1000),
        ("j", 4000),
        ("d", 18),
        ("a", 4000),
        ("j", 1000),
        ("a", 2000),
    ]


def test_a_python_without_its_source_is_said_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: PreTrainedTokenizerFast
) -> None:
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "python311.zip"))
    with pytest.raises(CorpusError, match="does not have it"):
        load_blocks(None, tokenizer, num_blocks=1, block_size=2)
