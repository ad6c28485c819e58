"""GGUF files: the header is read once, and what is loaded is what transformers loads, or what the file means."""

import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf.gguf_reader import GGUFReader
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoTokenizer

from depthscope import ModelLoadError, load_model
from depthscope.gguf_header import read_header
from depthscope.gguf_reading import reading_once
from gguf_files import packed, write_gguf

KINDS = [
    *("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "BF16", "F16", "TQ1_0", "TQ2_0"),
    *("MXFP4", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ1_S", "IQ1_M", "IQ4_NL", "IQ4_XS"),
]
VOCABULARY = 300


def tiny(model_type: str, **settings: Any) -> nn.Module:
    """A small random model of one type, all of whose weights matter."""
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "vocab_size": VOCABULARY, "max_position_embeddings": 128}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(CONFIG_MAPPING[model_type](**(sizes | special | settings)))
    for parameter in model.parameters():
        nn.init.normal_(parameter, mean=0.0 if parameter.dim() > 1 else 0.5, std=0.3)
    return model.eval()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", tiny("llama"), tokens="llama")


# The header, read once


def test_no_reader_but_ours_parses_the_header(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_reader(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the header is read again")

    monkeypatch.setattr(gguf, "GGUFReader", no_reader)
    monkeypatch.setattr("transformers.integrations.gguf.reader._read_metadata", no_reader)
    loaded = load_model(str(plain))
    assert loaded.require_tokenizer().tokenize("the an") == ["\u2581the", "\u2581an"]


@pytest.mark.parametrize("tokens", ["llama", "gpt2"])
def test_weights_and_tokenizer_are_those_that_transformers_reads(tokens: str, tmp_path: Path) -> None:
    model = tiny("llama", hidden_size=256, intermediate_size=512)
    names = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
    places = [f"blk.{layer}.{name}.weight" for layer in range(2) for name in names]
    kinds = {place: gguf.GGMLQuantizationType[kind] for place, kind in zip(places, KINDS, strict=False)}
    path = write_gguf(tmp_path / "x.gguf", model, kinds=kinds, tokens=tokens)
    loaded = load_model(str(path))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=str(path))
    ours, expected = loaded.model.state_dict(), theirs.state_dict()
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, gguf_file=str(path))
    mine = loaded.require_tokenizer()
    assert mine.backend_tokenizer.to_str() == tokenizer.backend_tokenizer.to_str()
    assert (type(mine), mine.special_tokens_map) == (type(tokenizer), tokenizer.special_tokens_map)
    assert mine("the thane 17").input_ids == tokenizer("the thane 17").input_ids


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_unpacked_together_are_those_unpacked_row_by_row(kind: str, plain: Path) -> None:
    chosen = gguf.GGMLQuantizationType[kind]
    for shape in ((1, 768), (700, 768), (2, 3, 256)):
        content = packed(shape, chosen)
        expected = gguf.dequantize(content, chosen)
        with reading_once(read_header(plain)):
            assert np.array_equal(gguf.dequantize(content, chosen), expected, equal_nan=True)


def test_the_readers_are_as_before_after_loading(plain: Path, tmp_path: Path) -> None:
    from transformers import modeling_gguf_pytorch_utils as older

    def state() -> tuple[Any, ...]:
        return gguf.GGUFReader, gguf.dequantize, gguf.get_tensor_name_map, older._gguf_parse_value

    before = state()
    load_model(str(plain))
    assert state() == before
    with pytest.raises(ModelLoadError):
        load_model(str(write_gguf(tmp_path / "x.gguf", tiny("llama"), {"block_count": 7})))
    assert state() == before


def test_other_files_are_read_as_before_meanwhile(plain: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "x.gguf", tiny("llama"), {"general.name": "another"})
    with reading_once(read_header(plain)):
        reader = gguf.GGUFReader(str(other))
        assert isinstance(reader, GGUFReader)
        assert reader.get_field("general.name").contents() == "another"


def test_two_threads_load_two_files_at_once(plain: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "x.gguf", tiny("llama", num_hidden_layers=3), tokens="gpt2")
    before, layers = gguf.GGUFReader, {}
    threads = [
        threading.Thread(target=lambda path=path: layers.update({path: len(load_model(str(path)).model.model.layers)}))
        for path in (plain, other)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert layers == {plain: 2, other: 3}
    assert gguf.GGUFReader is before


def test_nothing_of_the_file_stays_mapped(plain: Path) -> None:
    maps = Path("/proc/self/maps")
    if not maps.exists():
        pytest.skip("this system does not list what a process has mapped")
    loaded = load_model(str(plain))
    assert loaded.model is not None
    assert str(plain) not in maps.read_text()


# Headers that lie


def number(place: int, value: int, form: str = "<Q") -> Callable[[bytearray], None]:
    def change(content: bytearray) -> None:
        struct.pack_into(form, content, place, value)

    return change


def after(text: bytes, skip: int, value: int, form: str = "<Q") -> Callable[[bytearray], None]:
    """Write a number behind the first place of a text."""

    def change(content: bytearray) -> None:
        struct.pack_into(form, content, content.index(text) + len(text) + skip, value)

    return change


@pytest.mark.parametrize(
    "change",
    [
        number(8, 2**60),
        number(8, 99_999),
        number(16, 2**60),
        number(24, 2**62),
        number(24, 2**64 - 1),
        after(b"tokenizer.ggml.tokens", 8, 2**40),
        after(b"tokenizer.ggml.tokens", 8, 3_999_999),
        after(b"tokenizer.ggml.tokens", 16, 2**63),
        after(b"tokenizer.ggml.scores", 8, 3_999_999),
        after(b"tokenizer.ggml.scores", 4, 77, "<I"),
        after(b"llama.block_count", 0, 77, "<I"),
        after(b"token_embd.weight", 0, 2**31, "<I"),
        after(b"token_embd.weight", 4, 2**62),
        after(b"token_embd.weight", 24, 2**63),
    ],
    ids=range(14),
)
def test_a_header_that_lies_is_refused_at_once(
    change: Callable[[bytearray], None], plain: Path, tmp_path: Path
) -> None:
    change(content := bytearray(plain.read_bytes()))
    (path := tmp_path / "x.gguf").write_bytes(content)
    with pytest.raises(ModelLoadError, match="is damaged: its header or its weights end early or are garbled"):
        load_model(str(path))


def test_a_file_cut_anywhere_is_refused(plain: Path, tmp_path: Path) -> None:
    content, path = plain.read_bytes(), tmp_path / "x.gguf"
    for length in [*range(4, 200, 7), *range(200, len(content), 997), len(content) - 1]:
        path.write_bytes(content[:length])
        with pytest.raises(ModelLoadError, match="is damaged"):
            read_header(path)


def test_other_versions_types_and_byte_orders_are_named(plain: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for change, words in (
        (number(4, 1, "<I"), "of GGUF version 1"),
        (number(4, 3 << 24, "<I"), "big-endian"),
        (after(b"token_embd.weight", 20, 999, "<I"), "of the GGML type 999"),
    ):
        change(content := bytearray(plain.read_bytes()))
        path.write_bytes(content)
        with pytest.raises(ModelLoadError, match=words):
            load_model(str(path))


def test_a_header_may_be_bounded(plain: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"header of .* is larger than 0.000976562 MiB"):
        read_header(plain, most_bytes=1024)
    assert len(read_header(plain, most_bytes=10**6).tensors) == 21
