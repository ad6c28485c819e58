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

from depthscope import load_model
from depthscope.errors import ModelLoadError
from depthscope.loading.gguf.header import read_header
from depthscope.loading.gguf.reading import reading_once
from gguf_files import logits, packed, write_gguf

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


def test_versions_with_other_names_are_read_by_their_own_readers(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = load_model(str(plain)).model.state_dict()
    monkeypatch.setattr("depthscope.loading.gguf.reading._replace", lambda: None)
    found = load_model(str(plain)).model.state_dict()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_other_files_are_read_as_before_meanwhile(plain: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "x.gguf", tiny("llama"), {"general.name": "another"})
    with reading_once(read_header(plain)):
        reader = gguf.GGUFReader(str(other))
        assert isinstance(reader, GGUFReader)
        assert reader.get_field("general.name").contents() == "another"


def test_two_threads_read_two_files_at_once(plain: Path, tmp_path: Path) -> None:
    other = write_gguf(tmp_path / "x.gguf", tiny("llama", num_hidden_layers=3))
    before, found, together = gguf.GGUFReader, {}, threading.Barrier(2)

    def read(path: Path) -> None:
        with reading_once(read_header(path)):
            together.wait()
            found[path] = len(gguf.GGUFReader(str(path)).tensors)

    threads = [threading.Thread(target=read, args=(path,)) for path in (plain, other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {plain: 21, other: 30}
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
        (after(b"token_embd.weight", 20, 999, "<I"), "has the GGML type 999"),
    ):
        change(content := bytearray(plain.read_bytes()))
        path.write_bytes(content)
        with pytest.raises(ModelLoadError, match=words):
            load_model(str(path))


def test_a_header_may_be_bounded(plain: Path) -> None:
    with pytest.raises(ModelLoadError, match=r"header of .* is larger than 0.000976562 MiB"):
        read_header(plain, most_bytes=1024)
    assert len(read_header(plain, most_bytes=10**6).tensors) == 21


# The model in the file


def sizes(model_type: str, **more: Any) -> Any:
    return pytest.param(model_type, more, id=model_type)


EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "decoder_sparse_step": 1}
OWN_SHAPE = {"num_key_value_heads": None}
QWEN35 = {
    **{"linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_num_key_heads": 4, "linear_num_value_heads": 4},
    **{"head_dim": 16, "num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1]},
}
TYPES = [
    sizes("llama"),
    sizes("mixtral", num_local_experts=4),
    sizes("qwen2"),
    sizes("qwen2_moe", **EXPERTS, shared_expert_intermediate_size=56),
    sizes("qwen3", head_dim=16),
    sizes("qwen3_moe", **EXPERTS, head_dim=16, norm_topk_prob=True),
    sizes("gemma2", head_dim=16, query_pre_attn_scalar=16, sliding_window=8),
    sizes("gemma3_text", head_dim=16, query_pre_attn_scalar=16, sliding_window=8, num_hidden_layers=7),
    sizes("phi3", sliding_window=8),
    sizes("stablelm"),
    sizes("starcoder2"),
    sizes("nemotron", head_dim=8),
    sizes("falcon", **OWN_SHAPE),
    sizes("bloom", n_layer=2, n_head=4, **OWN_SHAPE),
    sizes("gpt2", n_layer=2, n_head=4, n_embd=32, n_inner=64, n_positions=64, **OWN_SHAPE),
    sizes("mamba", state_size=8, time_step_rank=3, num_attention_heads=None, **OWN_SHAPE),
    sizes("lfm2", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"]),
    sizes("qwen3_5_text", **QWEN35),
]


def loaded_logits(path: Path) -> torch.Tensor:
    return logits(load_model(str(path)).model)


@pytest.mark.parametrize(("model_type", "more"), TYPES)
def test_a_model_written_as_gguf_is_loaded_as_it_was(model_type: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(model_type, **more)
    loaded = load_model(str(write_gguf(tmp_path / "x.gguf", model, tokens="llama")))
    assert torch.allclose(logits(loaded.model), logits(model), rtol=1e-5, atol=1e-4)
    assert loaded.notes == []


def test_layers_that_predict_further_tokens_are_none_of_the_models(tmp_path: Path) -> None:
    model = tiny("qwen3_5_text", **QWEN35)
    more = {"nextn_predict_layers": 1, "block_count": 5}
    tensors = {"blk.4.attn_norm.weight": np.ones(32, np.float32)}
    loaded = load_model(str(write_gguf(tmp_path / "x.gguf", model, more, tensors=tensors, tokens="llama"))).model
    assert torch.allclose(logits(loaded), logits(model), atol=1e-4)


@pytest.mark.parametrize(("biases", "settings"), [("qkvo", {}), ("qkv", {}), ("", {"mlp_bias": True}), ("o", {})])
def test_biases_of_a_llama_are_loaded(biases: str, settings: dict[str, Any], tmp_path: Path) -> None:
    model = tiny("llama", attention_bias=bool(biases), **settings)
    absent = {}
    for layer, block in enumerate(model.model.layers):
        for letter, name in {"q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output"}.items():
            if biases and letter not in biases:
                nn.init.zeros_(getattr(block.self_attn, f"{letter}_proj").bias)
            if letter not in biases:
                absent[f"blk.{layer}.{name}.bias"] = None
    path = write_gguf(tmp_path / "x.gguf", model, tensors=absent)
    assert torch.allclose(loaded_logits(path), logits(model), atol=1e-5)


def test_a_qwen_without_biases_has_none(tmp_path: Path) -> None:
    model = tiny("qwen2")
    absent = {f"blk.{layer}.attn_{letter}.bias": None for layer in range(2) for letter in "qkv"}
    path = write_gguf(tmp_path / "x.gguf", model, tensors=absent)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.zeros_(parameter)
    assert torch.allclose(loaded_logits(path), logits(model), atol=1e-5)


def test_a_bias_that_one_layer_lacks_is_missing(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", tiny("qwen2"), tensors={"blk.1.attn_k.bias": None})
    with pytest.raises(ModelLoadError, match=r"1 .*missing \(model.layers.1.self_attn.k_proj.bias\)"):
        load_model(str(path))


def llama3_factors(base: float, width: int, factor: float) -> np.ndarray:
    """What llama.cpp's converter writes for a Llama 3.1, frequency by frequency."""
    found = []
    for index in range(0, width, 2):
        length = 2 * np.pi * base ** (index / width)
        smooth = (8192 / length - 1) / 3
        found.append(1.0 if length < 2048 else factor if length > 8192 else 1 / ((1 - smooth) / factor + smooth))
    return np.array(found, np.float32)


YARN = {"factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 8.0, "beta_slow": 2.0}
YARN_STORED = {"type": "yarn", "factor": 4.0, "original_context_length": 32}
BETAS = {"yarn_beta_fast": 8.0, "yarn_beta_slow": 2.0}
LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SHORT, LONG = [1.5, 1.0, 2.0, 3.0], [4.0, 5.0, 6.0, 8.0]
LONG_ROPE = {"short_factor": SHORT, "long_factor": LONG, "factor": 1.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
@pytest.mark.parametrize(
    ("rope", "stored", "tensors"),
    [
        ({"rope_type": "linear", "factor": 4.0}, {"type": "linear", "factor": 4.0}, {}),
        ({"rope_type": "linear", "factor": 4.0}, {"factor": 4.0}, {}),
        ({"rope_type": "default"}, {"type": "none", "factor": 4.0}, {}),
        ({"rope_type": "default", "rope_theta": 5e5}, {}, {}),
        ({"rope_type": "yarn", **YARN}, {**YARN_STORED, **BETAS}, {}),
        ({"rope_type": "yarn", **YARN, "beta_fast": 32.0, "beta_slow": 1.0}, YARN_STORED, {}),
        (
            {"rope_type": "yarn", **YARN, "attention_factor": 2 * (1 + 0.1 * np.log(4))},
            {**YARN_STORED, **BETAS, "attn_factor": 2.0},
            {},
        ),
        ({"rope_type": "llama3", **LLAMA3, "rope_theta": 5e5}, {}, {"rope_freqs": llama3_factors(5e5, 8, 8.0)}),
        (
            {"rope_type": "longrope", **LONG_ROPE, "long_factor": SHORT, "attention_factor": 1.0},
            {},
            {"rope_freqs": np.array(SHORT, np.float32)},
        ),
        ({"rope_type": "default"}, {}, {"rope_freqs": np.ones(4, np.float32)}),
    ],
    ids=["linear", "no-type", "none", "base", "yarn", "yarn-usual", "yarn-factor", "llama3", "factors", "ones"],
)
def test_the_scaling_of_positions_is_the_files(
    rope: dict[str, Any], stored: dict[str, Any], tensors: dict[str, np.ndarray], model_type: str, tmp_path: Path
) -> None:
    more = {"head_dim": 8} if model_type == "mixtral" else {}
    model = tiny(model_type, rope_parameters={"rope_theta": 1e4, **rope}, **more)
    settings = {f"rope.scaling.{key}": value for key, value in stored.items()}
    factors = {f"{name}.weight": value for name, value in tensors.items()}
    path = write_gguf(tmp_path / "x.gguf", model, settings, tensors=factors)
    assert torch.allclose(loaded_logits(path), logits(model, 48)[:, :24], atol=2e-5)


def test_phi3_has_its_two_lists_of_factors(tmp_path: Path) -> None:
    long = {"rope_type": "longrope", **LONG_ROPE, "attention_factor": 1.25, "rope_theta": 1e4}
    model = tiny("phi3", rope_parameters=long, original_max_position_embeddings=64)
    stored = {"rope.scaling.attn_factor": 1.25, "rope.scaling.original_context_length": 64}
    factors = {"rope_factors_short.weight": np.array(SHORT, np.float32)}
    factors["rope_factors_long.weight"] = np.array(LONG, np.float32)
    loaded = load_model(str(write_gguf(tmp_path / "x.gguf", model, stored, tensors=factors))).model
    for length in (24, 100):
        assert torch.allclose(logits(loaded, length), logits(model, length), atol=2e-5)


@pytest.mark.parametrize(
    ("model_type", "more"),
    [
        ("stablelm", {"rope_parameters": {"rope_theta": 3e4, "partial_rotary_factor": 0.5}, "layer_norm_eps": 1e-3}),
        ("stablelm", {"use_qkv_bias": True, "use_parallel_residual": True}),
        ("nemotron", {"head_dim": 8, "partial_rotary_factor": 0.25, "norm_eps": 1e-2}),
        ("starcoder2", {"rope_parameters": {"rope_theta": 1e6}, "norm_epsilon": 1e-3, "tie_word_embeddings": False}),
        ("phi3", {"rope_parameters": {"rope_theta": 1e5, "partial_rotary_factor": 0.5}, "tie_word_embeddings": True}),
        ("falcon", {"layer_norm_epsilon": 1e-2, "bias": True, **OWN_SHAPE}),
        ("llama", {"head_dim": 16, "rms_norm_eps": 1e-2, "tie_word_embeddings": True}),
        ("qwen3", {"head_dim": 4, "attention_bias": True}),
        ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "attn_logit_softcapping": 5.0}),
        ("gemma2", {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0}),
        ("gemma3_text", {"head_dim": 16, "query_pre_attn_scalar": 16, "layer_types": ["full_attention"] * 2}),
    ],
)
def test_settings_that_transformers_drops_are_the_files(model_type: str, more: dict[str, Any], tmp_path: Path) -> None:
    model = tiny(model_type, **more)
    windowed = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    settings = {} if windowed or "gemma" not in model_type else {"attention.sliding_window": None}
    assert torch.allclose(
        loaded_logits(write_gguf(tmp_path / "x.gguf", model, settings)), logits(model), rtol=1e-5, atol=1e-5
    )


def test_gemma3_scales_the_positions_of_its_full_layers_only(tmp_path: Path) -> None:
    rope = {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6}}
    rope["sliding_attention"] = {"rope_type": "default", "rope_theta": 1e4}
    shape = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 6}
    model = tiny("gemma3_text", rope_parameters=rope, **shape)
    path = write_gguf(tmp_path / "x.gguf", model, {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})
    assert torch.allclose(loaded_logits(path), logits(model), rtol=1e-5, atol=1e-5)


def test_an_output_matrix_of_its_own_is_not_tied(tmp_path: Path) -> None:
    model = tiny("falcon", tie_word_embeddings=False, **OWN_SHAPE)
    path = write_gguf(tmp_path / "x.gguf", model)
    assert torch.allclose(loaded_logits(path), logits(model), atol=1e-5)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blk.1.attn_q_norm.weight", np.ones(8, np.float32)),
        ("output_norm.bias", np.full(32, 0.1, np.float32)),
        ("blk.0.attn_norm.bias", np.full(32, 0.1, np.float32)),
        ("blk.0.post_attention_norm.weight", np.ones(32, np.float32)),
        ("blk.0.attn_q.scale", np.full(1, 0.5, np.float32)),
        ("blk.2.attn_norm.weight", np.ones(32, np.float32)),
        ("blk.0.ffn_gate_inp.weight", np.ones((4, 32), np.float32)),
        ("cls.weight", np.ones((2, 32), np.float32)),
        ("unheard.of", np.ones(3, np.float32)),
    ],
)
def test_a_tensor_that_has_no_place_is_refused_by_name(name: str, value: np.ndarray, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", tiny("llama"), tensors={name: value})
    with pytest.raises(ModelLoadError, match=rf"LlamaForCausalLM has no place for 1 of the tensors in .* \({name}\)"):
        load_model(str(path))


def test_a_tensor_without_a_place_is_refused_by_the_newer_reader_too(tmp_path: Path) -> None:
    model = tiny("lfm2", block_auto_adjust_ff_dim=False, layer_types=["conv", "full_attention"])
    extra = {"blk.0.ffn_gate.bias": np.ones(64, np.float32)}
    path = write_gguf(tmp_path / "x.gguf", model, tensors=extra, tokens="llama")
    with pytest.raises(ModelLoadError, match=r"has no place for 1 of the tensors in"):
        load_model(str(path))


def test_a_tensor_that_cannot_matter_is_let_pass(tmp_path: Path) -> None:
    model = tiny("llama")
    tensors = {"output_norm.bias": np.zeros(32, np.float32), "blk.0.attn_q.scale": np.ones(1, np.float32)}
    loaded = load_model(str(write_gguf(tmp_path / "x.gguf", model, tensors=tensors)))
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.notes == []


@pytest.mark.parametrize(
    ("model_type", "setting", "value"),
    [
        ("llama", "attention.causal", False),
        ("llama", "attention.sliding_window", 8),
        ("llama", "attention.clamp_kqv", 8.0),
        ("llama", "attention.max_alibi_bias", 8.0),
        ("llama", "attention.scale", 0.5),
        ("llama", "attention.value_length", 4),
        ("llama", "logit_scale", 2.0),
        ("llama", "embedding_scale", 2.0),
        ("llama", "residual_scale", 0.5),
        ("llama", "final_logit_softcapping", 30.0),
        ("llama", "attn_logit_softcapping", 30.0),
        ("llama", "nextn_predict_layers", 1),
        ("llama", "rope.dimension_count", 4),
        ("llama", "rope.scaling.yarn_log_multiplier", 0.1),
        ("llama", "rope.scaling.attn_factor", 2.0),
        ("llama", "expert_used_count", 2),
        ("qwen2", "attention.sliding_window", 8),
        ("qwen3_moe", "expert_weights_scale", 2.5),
        ("qwen3_moe", "expert_gating_func", 2),
        ("qwen3_moe", "expert_group_used_count", 2),
        ("qwen3_moe", "leading_dense_block_count", 1),
        ("mamba", "ssm.dt_b_c_rms", True),
    ],
)
def test_a_setting_that_the_model_does_not_follow_is_refused_by_name(
    model_type: str, setting: str, value: Any, tmp_path: Path
) -> None:
    more = next(parameter.values[1] for parameter in TYPES if parameter.values[0] == model_type)
    path = write_gguf(tmp_path / "x.gguf", tiny(model_type, **more), {setting: value})
    name = "rotary embedding" if setting in ("rope.dimension_count", "rope.scaling.attn_factor") else setting
    name = "queries and keys are scaled" if setting == "attention.scale" else name
    with pytest.raises(ModelLoadError, match=f"with other settings than the file states: .*{name}"):
        load_model(str(path))


def test_settings_that_stand_for_nothing_are_let_pass_and_unknown_ones_are_noted(tmp_path: Path) -> None:
    model = tiny("llama")
    nothing = {"attention.causal": True, "expert_count": 0, "logit_scale": 0.0, "attention.sliding_window": 128}
    loaded = load_model(str(write_gguf(tmp_path / "x.gguf", model, {**nothing, "unheard.of": 3.5})))
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.notes == ["1 of the GGUF file's settings are not known here and were not compared: llama.unheard.of."]


def test_an_adapter_in_gguf_form_is_called_one(tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "x.gguf", tiny("llama"), {"general.type": "adapter"})
    with pytest.raises(ModelLoadError, match=r"is an adapter in GGUF form"):
        load_model(str(path))


# Types of tensors


def test_both_readers_unpack_every_type_as_the_package_does(tmp_path: Path) -> None:
    layers = ["conv", "full_attention"] * 4
    shape = {"hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 8, "layer_types": layers}
    newer = tiny("lfm2", block_auto_adjust_ff_dim=False, **shape)
    older = tiny("qwen2", hidden_size=256, intermediate_size=256, num_hidden_layers=8)
    places = {"gate": ("feed_forward.w1", "mlp.gate_proj"), "up": ("feed_forward.w3", "mlp.up_proj")}
    places["down"] = ("feed_forward.w2", "mlp.down_proj")
    stored = {f"blk.{layer}.ffn_{name}.weight": (layer, names) for layer in range(8) for name, names in places.items()}
    kinds = {name: gguf.GGMLQuantizationType[kind] for name, kind in zip(stored, KINDS, strict=True)}
    for model, which in ((newer, 0), (older, 1)):
        path = write_gguf(tmp_path / f"{which}.gguf", model, kinds=kinds, tokens="llama")
        weights = load_model(str(path)).model.state_dict()
        for name, kind in kinds.items():
            layer, names = stored[name]
            own = weights[f"model.layers.{layer}.{names[which]}.weight"].numpy()
            expected = gguf.dequantize(packed((256, 256), kind), kind)
            assert np.array_equal(own, expected, equal_nan=True), (name, kind.name)


def test_a_type_that_nobody_unpacks_is_refused_by_name(tmp_path: Path) -> None:
    for kind in ("Q8_K", "Q8_1", "I32", "F64"):
        kinds = {"blk.0.ffn_gate.weight": gguf.GGMLQuantizationType[kind]}
        path = write_gguf(tmp_path / "x.gguf", tiny("llama", hidden_size=256), kinds=kinds)
        with pytest.raises(ModelLoadError, match=rf"blk.0.ffn_gate.weight.* has the GGML type {kinds.popitem()[1]},"):
            load_model(str(path))


# Files in parts


@pytest.fixture(params=["llama", "lfm2"])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[nn.Module, list[Path]]:
    """A model, and its file in four parts; one model for each of transformers' two readers."""
    more = {"lfm2": {"block_auto_adjust_ff_dim": False, "layer_types": ["conv", "full_attention"]}, "llama": {}}
    model = tiny(request.param, **more[request.param])
    write_gguf(tmp_path / "m.gguf", model, tokens="llama", together=6)
    return model, sorted(tmp_path.glob("m-*.gguf"))


@pytest.mark.parametrize("given", [0, 2])
def test_parts_that_lie_together_are_read_as_one(given: int, split: tuple[nn.Module, list[Path]]) -> None:
    model, parts = split
    assert len(parts) == 4
    loaded = load_model(str(parts[given]))
    assert torch.allclose(logits(loaded.model), logits(model), atol=1e-6)
    assert loaded.require_tokenizer().tokenize("the an") == ["\u2581the", "\u2581an"]


@pytest.mark.parametrize("given", [0, 2])
def test_parts_that_are_absent_are_named(given: int, split: tuple[nn.Module, list[Path]]) -> None:
    _, parts = split
    parts[1].unlink()
    words = rf"is part {given + 1} of 4 .* not all parts are beside it; missing: m-00002-of-00004.gguf\. .*gguf-split"
    with pytest.raises(ModelLoadError, match=words):
        load_model(str(parts[given]))


def test_a_part_under_another_name_and_a_mixture_are_refused(split: tuple[nn.Module, list[Path]]) -> None:
    _, parts = split
    parts[2].write_bytes(parts[1].read_bytes())
    with pytest.raises(ModelLoadError, match="do not belong together"):
        load_model(str(parts[0]))
    renamed = parts[1].rename(parts[1].with_name("other.gguf"))
    with pytest.raises(ModelLoadError, match=r"is part 2 of 4 .*name does not say so.*NAME-00002-of-00004.gguf"):
        load_model(str(renamed))


@pytest.mark.parametrize("end", [".part00", ".part1of2", ".00", "-split-b", ".split2", "_part_3"])
def test_a_piece_without_a_header_is_to_be_joined(end: str, plain: Path, tmp_path: Path) -> None:
    (path := tmp_path / f"x.gguf{end}").write_bytes(plain.read_bytes()[1000:])
    with pytest.raises(ModelLoadError, match=r"is a piece of a GGUF file that was cut up.* > .*x.gguf"):
        load_model(str(path))


def test_a_gguf_file_under_another_name_is_to_be_renamed(plain: Path, tmp_path: Path) -> None:
    (path := tmp_path / "sha256-abcdef").write_bytes(plain.read_bytes())
    with pytest.raises(ModelLoadError, match=r"Give it a name that ends with .gguf"):
        load_model(str(path))
