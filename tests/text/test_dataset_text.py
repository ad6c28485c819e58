"""Tables of text: whatever holds the rows, and whether they are texts, chats or ids, the blocks are the same."""

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from depthscope.errors import CorpusError, SettingsError
from depthscope.text.blocks import load_blocks
from depthscope.text.sources import find_source

datasets = pytest.importorskip("datasets")
pd = pytest.importorskip("pandas")
pa = pytest.importorskip("pyarrow")

WORDS = ["the", "layers", "of", "a", "model", "pass", "on", "user", "assistant"]
MARKS = {"<s>": 0, "</s>": 1, "<pad>": 2, "<turn>": 3}
TEXTS = ["the layers of a model", "pass on a model", "of the layers pass on the model", "on a layers of pass"]
TURN = "<turn> {{ m.role }} {{ m.content }}{% if m.tool is defined %} of of{% endif %} "
TEMPLATE = "{% for m in messages %}" + TURN + "{% endfor %}"
CHATS = [
    [{"role": "user", "content": "the layers of"}, {"role": "assistant", "content": "a model", "tool": None}],
    [{"role": "user", "content": "pass on"}, {"role": "assistant", "content": "the model"}],
]


def words(template: str = "<s> $A", **options: Any) -> PreTrainedTokenizerFast:
    vocabulary = {**MARKS, **{word: 4 + i for i, word in enumerate(WORDS)}, "?": 13}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(template, special_tokens=list(MARKS.items()))
    marks = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "extra_special_tokens": ["<turn>"]}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **(marks | options))


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of words that begins with BOS, as its chat template does too."""
    return words(chat_template="<s> " + TEMPLATE)


def rows(source: Any, tokenizer: Any, **options: Any) -> list[list[int]]:
    return load_blocks(source, tokenizer, num_blocks=2, block_size=5, **options).input_ids.tolist()


@pytest.fixture(scope="module")
def expected(tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    return rows(TEXTS, tokenizer)


# Text


def test_every_kind_of_string_column_is_text(
    tokenizer: PreTrainedTokenizerFast, expected: list, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    for kind in (pa.string(), pa.large_string(), pa.string_view()):
        table = pa.table({"n": [1] * 4, "title": ["x"] * 4, "text": pa.array(TEXTS, kind)})
        pq.write_table(table, tmp_path / "t.parquet")
        for source in (datasets.Dataset(table), table, tmp_path / "t.parquet"):
            assert rows(source, tokenizer) == expected


@pytest.mark.parametrize("dtype", ["object", "string", "category"])
def test_a_data_frame_is_read_by_its_column_and_not_its_names(
    dtype: str, tokenizer: PreTrainedTokenizerFast, expected: list
) -> None:
    texts = [TEXTS[0], None, *TEXTS[1:]]
    frame = pd.DataFrame({"n": range(5), "text": pd.Series(texts, dtype=dtype), "title": "x"})
    frame.index = [3, 3, 1, 0, 2]
    assert rows(frame, tokenizer) == expected
    assert rows(frame["text"], tokenizer) == expected
    assert rows(frame.rename(columns={"text": "said"}), tokenizer, column="said") == expected
    assert rows(pd.DataFrame(texts), tokenizer) == expected  # its one column has the name 0
    with pytest.raises(CorpusError, match=r"not clear.*n, said, title"):
        rows(frame.rename(columns={"text": "said"}), tokenizer)
    with pytest.raises(CorpusError, match="no column 'txt'; it has: n, text, title"):
        rows(frame, tokenizer, column="txt")
    with pytest.raises(CorpusError, match="holds int, not text"):
        rows(frame, tokenizer, column="n")
    with pytest.raises(SettingsError, match="only a dataset has splits"):
        rows(frame, tokenizer, split="train")
    frame.columns = ["n", "text", "text"]
    with pytest.raises(CorpusError, match="same name"):
        rows(frame, tokenizer)


def test_what_save_to_disk_wrote_is_a_dataset_wherever_it_is_given(
    tokenizer: PreTrainedTokenizerFast, expected: list, tmp_path: Path
) -> None:
    table = datasets.Dataset.from_dict({"text": TEXTS, "title": ["x"] * 4})
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"dev": table.select([1, 1, 1, 1]), "train": table}).save_to_disk(tmp_path / "two")
    for source in (tmp_path / "one", tmp_path / "two", str(tmp_path / "two" / "train"), [tmp_path / "one"]):
        assert rows(source, tokenizer) == expected
        if not isinstance(source, list):
            assert rows(None, tokenizer, dataset=str(source)) == expected
    assert rows([tmp_path / "one", tmp_path / "two"], tokenizer) == expected
    assert rows(next((tmp_path / "one").glob("*.arrow")), tokenizer) == expected
    assert rows(tmp_path / "two", tokenizer, split="dev") == rows([TEXTS[1]] * 4, tokenizer)
    assert find_source(tmp_path / "two").name == "two (train)"
    with pytest.raises(CorpusError, match=r"no split 'test'; it has: dev, train"):
        rows(tmp_path / "two", tokenizer, split="test")
    with pytest.raises(SettingsError, match="a single split already"):
        rows(tmp_path / "one", tokenizer, split="train")


def test_a_dataset_object_may_be_given_as_the_dataset(tokenizer: PreTrainedTokenizerFast, expected: list) -> None:
    assert rows(None, tokenizer, dataset=datasets.Dataset.from_dict({"text": TEXTS})) == expected


def test_the_format_that_a_dataset_is_shown_in_changes_nothing(
    tokenizer: PreTrainedTokenizerFast, expected: list
) -> None:
    ids = [tokenizer(text).input_ids for text in TEXTS]
    table = datasets.Dataset.from_dict({"input_ids": ids})
    for kind in ("numpy", "torch", "pandas", "arrow"):
        assert rows(datasets.Dataset.from_dict({"text": TEXTS}).with_format(kind), tokenizer) == expected
        assert rows(table.with_format(kind), tokenizer) == expected


def test_a_text_longer_than_any_file_name_is_a_text(tokenizer: PreTrainedTokenizerFast) -> None:
    assert rows([" ".join(TEXTS * 5)[:600]], tokenizer)


# Token ids


def test_documents_of_ids_are_taken_as_they_are_but_for_bos_and_padding(
    tokenizer: PreTrainedTokenizerFast, expected: list
) -> None:
    ids = [tokenizer(text).input_ids for text in TEXTS]
    padded = tokenizer(TEXTS, padding=True)
    kinds: list[Any] = [
        datasets.Dataset.from_dict({"input_ids": ids, "labels": ids}),
        datasets.Dataset.from_dict({"input_ids": [row[1:] for row in ids]}),
        datasets.Dataset.from_dict({**padded}),
        datasets.Dataset.from_dict({**padded}).to_iterable_dataset(),
        datasets.Dataset.from_dict({"input_ids": [[], *ids, None]}),
        pd.DataFrame({"input_ids": [np.array(row) for row in ids]}),
        ids,
        [np.array(row) for row in ids],
    ]
    for source in kinds:
        assert rows(source, tokenizer) == expected


def test_ids_that_the_tokenizer_does_not_have_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    for wrong in (14, -100):
        with pytest.raises(CorpusError, match=f"token id {wrong}, but the tokenizer's ids are from 0 to 13"):
            rows(datasets.Dataset.from_dict({"input_ids": [[4, 5, 6], [7, wrong]]}), tokenizer)


def test_what_begins_documents_of_ids_begins_blocks_where_the_tokenizer_says_nothing() -> None:
    silent = words("$A")
    ids = datasets.Dataset.from_dict({"input_ids": [[0, 4, 5, 6, 7, 8], [0, 9, 8, 7, 6, 5]]})
    assert rows(ids, silent) == [[0, 4, 5, 6, 7], [0, 8, 9, 8, 7]]
    assert rows(ids, silent, bos="no") == [[4, 5, 6, 7, 8], [9, 8, 7, 6, 5]]


# Chats


@pytest.mark.parametrize("own_start", [True, False])
def test_chats_are_written_by_the_template_with_one_bos(own_start: bool, tmp_path: Path) -> None:
    tokenizer = words("<s> $A" if own_start else "$A", chat_template="<s> " + TEMPLATE)
    plain = [f"<turn> user {a['content']} <turn> assistant {b['content']}" for a, b in CHATS]
    # The template writes BOS, so that blocks begin with it also where the tokenizer adds none by itself; and once.
    expected = rows(plain, tokenizer, bos="yes")
    assert [row[:2].count(0) for row in expected] == [1, 1]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"id": "a", "messages": chat}) + "\n" for chat in CHATS))
    table = datasets.Dataset.from_list([{"id": "a", "prompt": "x", "messages": chat} for chat in CHATS])
    kinds: list[Any] = [table, table.to_iterable_dataset(), tmp_path / "c.jsonl", table.to_pandas(), CHATS]
    for source in kinds:
        assert rows(source, tokenizer) == expected
    assert rows(table, tokenizer, bos="no") == rows(plain, tokenizer, bos="no")
    # A column that was named is taken; one string beside the chats is no reason to take that.
    assert rows(table.rename_column("messages", "talk"), tokenizer, column="talk") == expected


def test_what_cannot_be_written_as_a_chat_says_what_to_do(tokenizer: PreTrainedTokenizerFast) -> None:
    chats = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS])
    with pytest.raises(CorpusError, match=r"no chat template.* Give the tokenizer of a chat model"):
        rows(chats, words())
    strict = words(chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(CorpusError, match=r"cannot write a chat .* roles must alternate"):
        rows(chats, strict)
    shared = datasets.Dataset.from_list([{"conversations": [{"from": "human", "value": "a"}]}])
    with pytest.raises(CorpusError, match="lists of from and value, not messages with role and content"):
        rows(shared, tokenizer, column="conversations")


def test_a_lone_string_beside_ids_is_not_taken_for_the_text(tokenizer: PreTrainedTokenizerFast) -> None:
    table = datasets.Dataset.from_dict({"id": ["x"], "input_ids": [[4, 5, 6]]})
    with pytest.raises(CorpusError, match=r"not clear.*id, input_ids"):
        rows(table, tokenizer)


def test_reading_makes_no_noise(tokenizer: PreTrainedTokenizerFast, capfd: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "one")
    capfd.readouterr()
    logging.getLogger("datasets").propagate = True
    rows(tmp_path / "one", tokenizer)
    assert capfd.readouterr() == ("", "")
