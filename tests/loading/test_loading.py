"""Loading: every form of a model is loaded whole and safely, and every cause of failure has its own message."""

import importlib.util
import json
import os
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForMaskedLM,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
    ViTConfig,
    ViTModel,
)

from depthscope.errors import ModelLoadError, SettingsError
from depthscope.loading.checkpoint import find_checkpoint
from depthscope.loading.failures import load_errors
from depthscope.loading.load import load_model, model_facts
from forks import new_python
from hub import LocalHub

VOCABULARY = 260


def tokenizer() -> PreTrainedTokenizerFast:
    alphabet = {letter: index for index, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    bytes_only = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return PreTrainedTokenizerFast(tokenizer_object=bytes_only, eos_token="<eos>")


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**shape | {"num_attention_heads": 4, "num_key_value_heads": 2} | changes))


def mixtral() -> MixtralForCausalLM:
    experts = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "architectures": None}
    torch.manual_seed(0)
    return MixtralForCausalLM(MixtralConfig(**llama().config.to_dict() | experts))


def bert(**changes: Any) -> BertConfig:
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return BertConfig(**shape, vocab_size=VOCABULARY, **changes)


def save(model: PreTrainedModel, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def edit(folder: Path, filename: str = "config.json", **changes: Any) -> None:
    path = folder / filename
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(llama(), tmp_path_factory.mktemp("models") / "saved")


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A fresh copy of a whole model, to be damaged."""
    return shutil.copytree(saved, tmp_path / "model")


def logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(20)[None] * 7 % VOCABULARY).logits


def refusal(name: Any, **options: Any) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_model(str(name), **options)
    return str(caught.value)


# What can be loaded


def test_a_folder_gives_the_model_its_tokenizer_and_the_facts(saved: Path) -> None:
    loaded = load_model(str(saved))
    assert torch.equal(logits(loaded.model), logits(llama().eval()))
    assert not loaded.model.training
    assert loaded.require_tokenizer()("a").input_ids == tokenizer()("a").input_ids
    assert loaded.notes == []
    assert loaded.facts == {
        "name": saved.name,
        "revision": None,
        "source": "folder",
        "model_type": "llama",
        "architecture": "LlamaForCausalLM",
        "num_layers": 2,
        "hidden_size": 16,
        "num_parameters": sum(parameter.numel() for parameter in llama().parameters()),
        "vocab_size": VOCABULARY,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": None,
        "num_experts_per_tok": None,
        "tied_embeddings": False,
        "quantization": None,
        "dtype": "float32",
    }


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(lambda: llama(tie_word_embeddings=True), id="tied"),
        pytest.param(lambda: GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=260)), id="gpt2"),
        pytest.param(lambda: BertLMHeadModel(bert(is_decoder=True)), id="bert-decoder"),
        pytest.param(mixtral, id="experts"),
    ],
)
def test_tied_heads_buffers_and_experts_are_loaded_whole(model: Callable[[], PreTrainedModel], tmp_path: Path) -> None:
    original = model().eval()
    loaded = load_model(str(save(original, tmp_path / "model")))
    assert torch.equal(logits(loaded.model), logits(original))
    assert loaded.notes == []


def test_shards_are_loaded_like_one_file(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model", max_shard_size="5KB")
    assert len(list((tmp_path / "model").glob("*.safetensors"))) > 2
    assert torch.equal(logits(load_model(str(tmp_path / "model")).model), logits(llama().eval()))


def test_on_a_cpu_weights_are_float32_unless_another_dtype_is_asked_for(tmp_path: Path) -> None:
    name = str(save(llama().to(torch.bfloat16), tmp_path / "half"))
    for asked, expected in (("auto", "float32"), ("bfloat16", "bfloat16"), (torch.float16, "float16")):
        loaded = load_model(name, dtype=asked, device="cpu")
        assert loaded.facts["dtype"] == expected
        assert {str(parameter.dtype) for parameter in loaded.model.parameters()} == {f"torch.{expected}"}


def test_device_auto_spreads_the_model_over_what_there_is(saved: Path) -> None:
    assert torch.isfinite(logits(load_model(str(saved), device="auto", dtype="float32").model).cpu()).all()


def test_loading_says_nothing_on_the_terminal(folder: Path, capfd: pytest.CaptureFixture) -> None:
    save_file(load_file(folder / "model.safetensors") | {"v_head.weight": torch.ones(1)}, folder / "model.safetensors")
    assert load_model(str(folder)).notes
    assert capfd.readouterr() == ("", "")


def test_logging_and_progress_bars_are_as_before_afterwards(saved: Path) -> None:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    library = transformers.utils.logging

    def state() -> tuple:
        return library.get_verbosity(), library.is_progress_bar_enabled(), are_progress_bars_disabled(), sys.stderr

    verbosity = library.get_verbosity()
    for switch_bars in (enable_progress_bars, disable_progress_bars):
        library.set_verbosity_info()
        library.enable_progress_bar()
        switch_bars()
        before = state()
        load_model(str(saved))
        refusal(saved / "nothing")
        assert state() == before
    library.set_verbosity(verbosity)
    enable_progress_bars()


# Facts


def test_the_facts_of_a_model_object_need_no_loading() -> None:
    facts = model_facts(mixtral(), name="mine")
    assert (facts["name"], facts["source"], facts["num_experts"], facts["num_experts_per_tok"]) == (
        "mine",
        "object",
        4,
        2,
    )
    json.dumps(facts)


def test_shared_parameters_are_counted_once() -> None:
    tied, untied = llama(tie_word_embeddings=True), llama()
    counts = [model_facts(model)["num_parameters"] for model in (tied, untied)]
    assert counts[1] - counts[0] == VOCABULARY * 16
    tied.model.layers[1] = tied.model.layers[0]
    per_layer = sum(parameter.numel() for parameter in tied.model.layers[0].parameters())
    assert model_facts(tied)["num_parameters"] == counts[0] - per_layer


def test_a_module_without_a_config_has_facts_too() -> None:
    facts = model_facts(torch.nn.Linear(3, 2, dtype=torch.float64))
    assert (facts["architecture"], facts["num_parameters"], facts["dtype"]) == ("Linear", 8, "float64")


# Names and paths


@pytest.mark.parametrize(
    "name", ["./no-such", "/no/such/model", "~/no-such", "a/b/c", "no-such.gguf", "a/no-such.gguf"]
)
def test_a_path_that_does_not_exist_is_called_a_path(name: str) -> None:
    assert f"There is no file or folder {name!r}" in refusal(name)


@pytest.mark.parametrize("name", ["", "  ", "a model", "models--x"])
def test_a_name_that_can_be_nothing_is_said_so(name: str) -> None:
    assert "neither a path nor the id of a model" in refusal(name)


def test_a_single_file_points_to_its_folder(saved: Path) -> None:
    assert f"Give the folder instead: {str(saved)!r}" in refusal(saved / "model.safetensors")


def test_a_folder_of_checkpoints_points_to_the_last(folder: Path) -> None:
    message = refusal(folder.parent)
    assert "has no config.json" in message
    assert f"Did you mean {str(folder)!r}?" in message


@pytest.mark.parametrize("device", ["cuda:99", "tpu", "gpu0", "meta"])
def test_a_device_that_is_not_here_is_refused_with_those_that_are(device: str, saved: Path) -> None:
    assert "choose from cpu" in refusal(saved, device=device)


@pytest.mark.parametrize("dtype", ["int8", "half", torch.int64, None])
def test_a_dtype_that_is_none_is_refused(dtype: Any, saved: Path) -> None:
    with pytest.raises(SettingsError, match="auto, float32, bfloat16, float16"):
        load_model(str(saved), dtype=dtype)


# Weights


def test_a_folder_without_weights_says_what_was_expected(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "a config but no weights: model.safetensors" in refusal(folder)


class Trap:
    """Unpickling this writes a file: what a hostile pickle could do."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple:
        return open, (self.path, "w")


@pytest.mark.parametrize("how", ["alone", "named in the config", "named in the index"])
def test_a_pickle_is_never_opened(how: str, folder: Path, tmp_path: Path) -> None:
    torch.save({"x": Trap(tmp_path / "sprung")}, folder / "pytorch_model.bin")
    (folder / "training_args.bin").write_bytes(b"")
    (folder / "model.safetensors").unlink()
    if how == "named in the config":
        edit(folder, transformers_weights="pytorch_model.bin")
    if how == "named in the index":
        index = {"metadata": {}, "weight_map": dict.fromkeys(llama().state_dict(), "pytorch_model.bin")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    message = refusal(folder)
    assert "only as pickles (pytorch_model.bin)" in message
    assert "can run hidden code" in message
    assert "save_pretrained('converted')" in message
    assert not (tmp_path / "sprung").exists()


def cut(content: bytes) -> bytes:
    return content[: len(content) // 2]


def stub(content: bytes) -> bytes:
    return content[:5]


def pointer(content: bytes) -> bytes:
    return b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12\n"


def long_header(content: bytes) -> bytes:
    return struct.pack("<Q", 2**40) + content[8:]


def lying_header(content: bytes) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    header["model.norm.weight"]["shape"] = [17]
    return struct.pack("<Q", len(text := json.dumps(header).encode())) + text + content[8 + length :]


@pytest.mark.parametrize("damage", [cut, stub, pointer, long_header, lying_header])
def test_damaged_safetensors_are_named(damage: Callable[[bytes], bytes], folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert refusal(folder).startswith(f"model.safetensors of {str(folder)!r} is damaged")


def test_shards_that_are_absent_or_damaged_are_named(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model", max_shard_size="5KB")
    second = sorted((tmp_path / "model").glob("*.safetensors"))[1]
    second.write_bytes(cut(second.read_bytes()))
    assert refusal(tmp_path / "model").startswith(f"{second.name} of")
    second.unlink()
    assert f"lacks 1 of its 7 weight files ({second.name})" in refusal(tmp_path / "model")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "9 are missing (model.layers.2.input_layernorm.weight"),
        ({"hidden_size": 32, "head_dim": 8}, "21 have another shape (lm_head.weight"),
        ({"model_type": "gpt2"}, "are missing"),
    ],
)
def test_weights_that_do_not_fit_the_config_are_refused(changes: dict, says: str, folder: Path) -> None:
    edit(folder, **changes)
    message = refusal(folder)
    assert "do not fit its config" in message
    assert says in message


@pytest.mark.parametrize("damage", ["absent", "of another shape"])
def test_an_expert_that_does_not_fit_is_named_and_no_unseen_report_is_pointed_to(damage: str, tmp_path: Path) -> None:
    weights = load_file(save(mixtral(), tmp_path) / "model.safetensors")
    name = next(key for key in weights if "layers.1." in key and ".experts." in key)
    weights = {key: value for key, value in weights.items() if key != name}
    weights |= {name: torch.zeros(3, 5)} if damage == "of another shape" else {}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelLoadError, match=r"1 weight cannot be put together .*layers\.1\.mlp\.experts") as refused:
        load_model(str(tmp_path))
    assert "report" not in str(refused.value)
    assert "size" in str(refused.value).lower()  # torch's own reason


def test_a_checkpoint_without_its_head_is_refused(tmp_path: Path) -> None:
    LlamaModel(llama().config).save_pretrained(tmp_path / "headless")
    assert "1 are missing (lm_head.weight)" in refusal(tmp_path / "headless")


# Configs


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{"model_type": ', "is not valid JSON"),
        ("[1]", "holds a JSON list"),
        ("{}", "names no model_type"),
        ('{"model_type": "flubber"}', "is of type 'flubber', which transformers"),
        ('{"model_type": "llama", "hidden_size": "wide"}', "is not valid.*hidden_size"),
        ('{"model_type": "llama", "num_attention_heads": 0}', "is not valid"),
        ('{"model_type": "llama", "hidden_act": "nonsense"}', "cannot be loaded.*nonsense"),
    ],
)
def test_a_config_that_is_none_is_refused(content: str, says: str, folder: Path) -> None:
    (folder / "config.json").write_text(content)
    with pytest.raises(ModelLoadError, match=says):
        load_model(str(folder))


@pytest.mark.parametrize(
    ("model", "says"),
    [
        pytest.param(lambda: BertForMaskedLM(bert()), "(bert) is an encoder", id="bert"),
        pytest.param(
            lambda: T5ForConditionalGeneration(T5Config(d_model=16, d_kv=8, num_layers=1, num_heads=2, d_ff=16)),
            "(t5) is an encoder-decoder model",
            id="t5",
        ),
        pytest.param(
            lambda: BartForConditionalGeneration(BartConfig(d_model=16, encoder_layers=1, decoder_layers=1)),
            "(bart) is an encoder-decoder model",
            id="bart",
        ),
        pytest.param(
            lambda: ViTModel(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=16)),
            "(vit) is a model that transformers has no causal language model for",
            id="vit",
        ),
    ],
)
def test_models_that_are_not_causal_are_refused(
    model: Callable[[], PreTrainedModel], says: str, tmp_path: Path
) -> None:
    model().save_pretrained(tmp_path / "model")
    assert says in refusal(tmp_path / "model")


@pytest.mark.parametrize("method", ["bitsandbytes", "gptq"])
def test_a_quantised_model_whose_package_is_not_here_is_said_so(method: str, folder: Path) -> None:
    package = {"bitsandbytes": "bitsandbytes", "gptq": "optimum"}[method]
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed here")
    edit(folder, quantization_config={"quant_method": method, "bits": 4, "load_in_4bit": True})
    assert f"is quantised with {method!r}, which cannot be loaded here" in refusal(folder)


# Code from the repository

REMOTE_CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM

Path({ran!r}).touch()


class FlubberConfig(LlamaConfig):
    model_type = "flubber"


class FlubberForCausalLM(LlamaForCausalLM):
    config_class = FlubberConfig
"""


@pytest.fixture
def with_code(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "path", list(sys.path))
    (folder / "flubber.py").write_text(REMOTE_CODE.format(ran=str(tmp_path / "ran")))
    classes = {"AutoConfig": "flubber.FlubberConfig", "AutoModelForCausalLM": "flubber.FlubberForCausalLM"}
    edit(folder, model_type="flubber", auto_map=classes)
    return folder


def test_code_from_a_repository_runs_only_when_trusted(with_code: Path, tmp_path: Path) -> None:
    message = refusal(with_code)
    assert "--trust-remote-code" in message
    assert "trust_remote_code=True" in message
    assert not (tmp_path / "ran").exists()
    loaded = load_model(str(with_code), trust_remote_code=True)
    assert (tmp_path / "ran").exists()
    assert loaded.facts["architecture"] == "FlubberForCausalLM"
    assert torch.equal(logits(loaded.model), logits(llama().eval()))


def test_a_known_model_with_code_of_its_own_runs_without_that_code(with_code: Path, tmp_path: Path) -> None:
    edit(with_code, model_type="llama")
    edit(with_code, "tokenizer_config.json", auto_map={"AutoTokenizer": ["flubber.Nothing", None]})
    loaded = load_model(str(with_code))
    assert not (tmp_path / "ran").exists()
    assert loaded.facts["architecture"] == "LlamaForCausalLM"
    with pytest.raises(ModelLoadError, match="trust-remote-code"):
        loaded.require_tokenizer()


def test_a_kernel_that_a_config_names_is_not_fetched(folder: Path) -> None:
    edit(folder, attn_implementation="someone/kernel")
    assert torch.equal(logits(load_model(str(folder)).model), logits(llama().eval()))


# Tokenizers


def test_a_model_without_tokenizer_is_loaded_and_says_so_when_text_comes(folder: Path) -> None:
    for path in folder.glob("*token*"):
        path.unlink()
    loaded = load_model(str(folder))
    assert loaded.tokenizer is None
    with pytest.raises(ModelLoadError, match="has no tokenizer"):
        loaded.require_tokenizer()


@pytest.mark.parametrize("content", ["{", '{"a": 1}', '{"model": {"type": "nonsense"}, "added_tokens": []}'])
def test_a_damaged_tokenizer_is_said_so_when_text_comes(content: str, folder: Path) -> None:
    (folder / "tokenizer.json").write_text(content)
    loaded = load_model(str(folder))
    with pytest.raises(ModelLoadError, match=r"tokenizer of .* cannot be read"):
        loaded.require_tokenizer()


# GGUF files


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf")


def write_gguf(path: Path, architecture: str = "llama", leave_out: str = "") -> Path:
    """The tiny Llama as a GGUF file, in float32 (its q and k rows are in llama.cpp's order, so outputs differ)."""
    from gguf import GGUFWriter

    writer = GGUFWriter(str(path), architecture)
    writer.add_block_count(2)
    writer.add_context_length(64)
    writer.add_embedding_length(32)
    writer.add_feed_forward_length(32)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(VOCABULARY)
    square, layer = (32, 32), {"attn_norm": (32,), "ffn_norm": (32,)}
    layer |= dict.fromkeys(("attn_q", "attn_output", "ffn_gate", "ffn_up", "ffn_down"), square)
    layer |= {"attn_k": (16, 32), "attn_v": (16, 32)}
    tensors = {"token_embd": (VOCABULARY, 32), "output": (VOCABULARY, 32), "output_norm": (32,)}
    tensors |= {f"blk.{index}.{name}": shape for index in range(2) for name, shape in layer.items()}
    chance = np.random.default_rng(0)
    for name, shape in tensors.items():
        if name != leave_out:
            writer.add_tensor(f"{name}.weight", chance.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_gguf_file_is_loaded_silently(
    gguf_file: Path, capfd: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / gguf_file.name).write_bytes(b"another file of this name in the current folder")
    monkeypatch.chdir(tmp_path)
    loaded = load_model(str(gguf_file))
    assert (loaded.facts["source"], loaded.facts["num_layers"], loaded.facts["dtype"]) == ("gguf", 2, "float32")
    assert loaded.facts["num_parameters"] == 2 * VOCABULARY * 32 + 32 + 2 * (2 * 32 + 5 * 32 * 32 + 2 * 16 * 32)
    assert torch.isfinite(logits(loaded.model)).all()
    assert capfd.readouterr() == ("", "")


def test_a_real_gguf_file_comes_with_its_tokenizer(smollm2_gguf: Path) -> None:
    loaded = load_model(str(smollm2_gguf), device="cpu")
    assert (loaded.facts["num_layers"], loaded.facts["num_parameters"]) == (30, 134_515_008)
    ids = loaded.require_tokenizer()("The capital of France is", return_tensors="pt").input_ids
    with torch.no_grad():
        assert loaded.tokenizer.decode(loaded.model(ids).logits[0, -1].argmax()) == " Paris"


def half_header(content: bytes) -> bytes:
    return content[:60]


def garbled(content: bytes) -> bytes:
    return content[:40] + b"\xff" * 20 + content[60:]


@pytest.mark.parametrize("damage", [cut, half_header, garbled])
def test_a_damaged_gguf_file_is_called_damaged(
    damage: Callable[[bytes], bytes], gguf_file: Path, tmp_path: Path
) -> None:
    (path := tmp_path / "damaged.gguf").write_bytes(damage(gguf_file.read_bytes()))
    assert "is damaged: its header or its weights end early" in refusal(path)


def test_other_files_named_gguf_are_not_taken_for_one(tmp_path: Path) -> None:
    (path := tmp_path / "x.gguf").write_bytes(pointer(b""))
    assert "is not a GGUF file" in refusal(path)


def test_a_gguf_file_of_an_unknown_architecture_is_said_so(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "x.gguf", architecture="flubber")
    assert "of the architecture 'flubber', which transformers" in refusal(path)


def test_a_gguf_file_without_all_weights_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "x.gguf", leave_out="blk.1.ffn_up")
    assert "1 are missing (model.layers.1.mlp.up_proj.weight)" in refusal(path)


def test_a_gguf_file_without_the_package_names_it(gguf_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "needs the package `gguf`" in refusal(gguf_file)


def test_a_folder_of_gguf_files_asks_for_one(gguf_file: Path) -> None:
    assert "GGUF files: tiny.gguf. Give the path of one" in refusal(gguf_file.parent)


# Adapters


@pytest.fixture
def adapter(saved: Path, tmp_path: Path) -> Path:
    """A LoRA adapter of the saved model, with weights that change its output."""
    peft = pytest.importorskip("peft")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(saved), config)
    model.save_pretrained(tmp_path / "adapter")
    torch.save(logits(model.eval()), tmp_path / "expected")
    return tmp_path / "adapter"


def test_an_adapter_is_put_on_its_base_model(adapter: Path, saved: Path) -> None:
    loaded = load_model(str(adapter))
    assert torch.equal(logits(loaded.model), torch.load(adapter.with_name("expected")))
    assert not torch.equal(logits(loaded.model), logits(llama().eval()))
    assert not loaded.model.training
    facts = {name: loaded.facts[name] for name in ("source", "name", "base_model", "architecture")}
    assert list(facts.values()) == ["adapter", adapter.name, saved.name, "LlamaForCausalLM"]
    assert loaded.facts["num_parameters"] == model_facts(llama())["num_parameters"] + 2 * 2 * (16 + 16)
    assert loaded.require_tokenizer() is not None


def test_an_adapter_beside_its_base_model_is_put_on_it(adapter: Path, folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    loaded = load_model(str(folder))
    assert loaded.facts["source"] == "adapter"
    torch.testing.assert_close(logits(loaded.model), torch.load(adapter.with_name("expected")))


def test_an_adapter_without_its_base_model_names_it(adapter: Path) -> None:
    edit(adapter, "adapter_config.json", base_model_name_or_path="/gone/base")
    assert "cannot be loaded: There is no file or folder '/gone/base'" in refusal(adapter)
    edit(adapter, "adapter_config.json", base_model_name_or_path=None)
    assert "does not name its base model" in refusal(adapter)
    edit(adapter, "adapter_config.json", base_model_name_or_path=str(adapter))
    assert "is an adapter itself" in refusal(adapter)


@pytest.mark.parametrize("beside", [False, True])
def test_an_adapter_that_is_a_pickle_is_never_opened(beside: bool, adapter: Path, folder: Path, tmp_path: Path) -> None:
    where = folder if beside else adapter
    if beside:
        shutil.copy(adapter / "adapter_config.json", folder)
    torch.save({"x": Trap(tmp_path / "sprung")}, where / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    assert "only as a pickle (adapter_model.bin)" in refusal(where)
    assert not (tmp_path / "sprung").exists()


def test_adapter_weights_that_are_absent_or_damaged_are_said_so(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    path.write_bytes(cut(path.read_bytes()))
    assert "adapter_model.safetensors of" in refusal(adapter)
    path.unlink()
    assert "has no weights" in refusal(adapter)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"num_hidden_layers": 3}, "2 of its weights are missing"),
        ({"hidden_size": 32}, "does not fit its base model.*size mismatch"),
    ],
)
def test_an_adapter_that_does_not_fit_its_base_is_refused(
    changes: dict, says: str, adapter: Path, tmp_path: Path
) -> None:
    edit(adapter, "adapter_config.json", base_model_name_or_path=str(save(llama(**changes), tmp_path / "other")))
    with pytest.raises(ModelLoadError, match=says):
        load_model(str(adapter))


def test_adapter_weights_without_a_place_are_refused_unless_they_add_nothing(adapter: Path, tmp_path: Path) -> None:
    base = save(llama(num_hidden_layers=1), tmp_path / "shallow")
    edit(adapter, "adapter_config.json", base_model_name_or_path=str(base))
    assert "2 of its weights have no place there" in refusal(adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    untrained = {name: tensor * ("lora_A" in name) for name, tensor in weights.items()}
    save_file(untrained, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    (note,) = load_model(str(adapter)).notes
    assert note.startswith(f"2 weights of the adapter have no place in its base model {base.name!r}")


def test_settings_of_an_adapter_that_peft_does_not_know_are_noted(adapter: Path) -> None:
    edit(adapter, "adapter_config.json", use_flubber=True, flubber_scale=None)
    (note,) = load_model(str(adapter)).notes
    assert "ignored: use_flubber." in note


def test_a_base_model_beside_its_adapter_is_held_against_its_config_too(adapter: Path, folder: Path) -> None:
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(adapter / name, folder)
    weights = load_file(folder / "model.safetensors")
    save_file(weights | {"model.layers.0.mlp.up_proj.bias": torch.ones(32)}, folder / "model.safetensors")
    assert "1 that are biases" in refusal(folder)
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors")
    assert "1 are missing (model.layers.0.mlp.up_proj.weight)" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"peft_type": "FLUBBER"}, "adapter_config.json is not valid"),
        ({"peft_type": "XLORA"}, "combines other adapters"),
        ({"target_modules": ["flubber"]}, "does not fit its base model"),
    ],
)
def test_an_adapter_config_that_makes_no_sense_is_refused(changes: dict, says: str, adapter: Path) -> None:
    edit(adapter, "adapter_config.json", **changes)
    assert says in refusal(adapter)


def test_an_adapter_without_peft_names_it(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "needs the package `peft`" in refusal(adapter)


# The Hub


def test_a_download_that_breaks_off_is_told_from_damage(saved: Path) -> None:
    checkpoint = find_checkpoint(str(saved))
    with pytest.raises(ModelLoadError, match="Hugging Face Hub"), load_errors(checkpoint, "weights"):
        raise OSError("transformers' own words") from LocalEntryNotFoundError("the network is down")
    with pytest.raises(ModelLoadError, match="transformers' own words"), load_errors(checkpoint, "weights"):
        raise OSError("transformers' own words")


def test_weights_that_do_not_fit_into_a_processors_memory_are_said_not_to_fit(saved: Path) -> None:
    checkpoint = find_checkpoint(str(saved))
    with pytest.raises(ModelLoadError, match="does not fit in memory"), load_errors(checkpoint, "weights"):
        torch.empty(2**60)


ASK = """
import json, sys
from depthscope.errors import ModelLoadError
from depthscope.loading.load import load_model
answers = {}
for name in sys.argv[1:]:
    name, _, revision = name.partition("@")
    try:
        loaded = load_model(name, revision=revision or None)
        answers[name] = [loaded.facts["source"], loaded.facts["revision"], loaded.facts.get("base_model")]
    except ModelLoadError as error:
        answers[name] = str(error)
print(json.dumps(answers))
"""


def ask(*names: str, **environment: str) -> dict[str, Any]:
    """What a fresh process says to each name, with the Hub's settings that are given; it must say nothing else."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", **environment}
    done = new_python("-c", ASK, *names, env=inherited | environment)
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def hub_folders(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hub")
    folders = {name: shutil.copytree(saved, root / name) for name in ("pickle", "damaged", "ggufs")}
    llama().save_pretrained(root / "sharded", max_shard_size="5KB")
    torch.save(load_file(saved / "model.safetensors"), folders["pickle"] / "pytorch_model.bin")
    (folders["pickle"] / "model.safetensors").unlink()
    weights = folders["damaged"] / "model.safetensors"
    weights.write_bytes(cut(weights.read_bytes()))
    for path in folders["ggufs"].iterdir():
        path.unlink()
    (folders["ggufs"] / "q4.gguf").write_bytes(b"GGUF")
    whole = {"org/whole": saved, "org/gated": saved, "org/broken": saved, "org/private": saved}
    return whole | {"org/sharded": root / "sharded"} | {f"org/{name}": path for name, path in folders.items()}


@pytest.fixture(scope="module")
def hub(hub_folders: dict[str, Path]) -> Iterator[LocalHub]:
    with LocalHub() as running:
        for name, folder in hub_folders.items():
            running.add_repository(name, folder, private=name == "org/private")
        running.repository("org/gated").gated = "manual"
        running.faults.always(path="*org/broken*", status=500)
        yield running


def test_repositories_are_loaded_at_a_commit_and_each_refusal_has_its_message(hub: LocalHub, tmp_path: Path) -> None:
    refused = {
        "org/gated": "is gated",
        "org/private": "no such repository on the Hugging Face Hub that you may see",
        "no-such-model": "no such repository on the Hugging Face Hub that you may see",
        "org/broken": "answered 500",
        "org/pickle": "only as pickles (pytorch_model.bin)",
        "org/damaged": "model.safetensors of 'org/damaged' is damaged",
        "org/ggufs": "GGUF files: q4.gguf. Download one",
    }
    answers = ask("org/whole", "org/sharded@main", *refused, HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    for name in ("org/whole", "org/sharded"):
        assert answers.pop(name) == ["hub", hub.repository(name).head.commit_id, None]
    assert {name: says for name, says in refused.items() if says not in answers[name]} == {}
    assert "no revision 'v9'" in ask("org/whole@v9", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))["org/whole"]


@pytest.mark.parametrize("setting", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}])
def test_without_the_hub_what_was_downloaded_is_found_and_the_rest_is_said_so(
    setting: dict[str, str], hub: LocalHub, tmp_path: Path
) -> None:
    ask("org/whole", HF_ENDPOINT=hub.url, HF_HOME=str(tmp_path))
    answers = ask("org/whole", "org/sharded", **setting, HF_HOME=str(tmp_path))
    assert answers["org/whole"] == ["hub", hub.repository("org/whole").head.commit_id, None]
    assert "it is not in the cache" in answers["org/sharded"]
    assert ("HF_HUB_OFFLINE" if "HF_HUB_OFFLINE" in setting else "cannot be reached") in answers["org/sharded"]
