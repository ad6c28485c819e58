"""The audit of a checkpoint: the model that is measured is the model in the files, or it is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    ApertusConfig,
    ApertusForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    HunYuanDenseV1Config,
    HunYuanDenseV1ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    XGLMConfig,
    XGLMForCausalLM,
)
from typer.testing import CliRunner

import depthscope
from depthscope.cli import app
from depthscope.conversion.checkpoint import convert_checkpoint
from depthscope.errors import ModelLoadError
from depthscope.loading.audit.codes import why_codes
from depthscope.loading.audit.placement import place
from depthscope.loading.audit.stored import StoredTensors
from depthscope.loading.checkpoint import find_checkpoint
from depthscope.loading.load import _load_checkpoint, _Options, load_model
from depthscope.loading.loaded import LoadedModel

IDS = torch.arange(20)[None] * 7 % 260
State = dict[str, torch.Tensor]
UP = "model.layers.0.mlp.up_proj"
Q = "model.layers.1.self_attn.q_proj"


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "vocab_size": 260}
    shape |= {"num_attention_heads": 4, "num_key_value_heads": 2, "initializer_range": 0.1}
    return LlamaForCausalLM(LlamaConfig(**shape | changes)).eval()


def write(
    folder: Path, model: PreTrainedModel | None = None, change: Callable[[State], Any] = len, **config: Any
) -> Path:
    """The checkpoint of a model, its tensors changed in place, its config edited (None takes a setting out)."""
    (model or llama()).save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "model.safetensors")
    settings = json.loads((folder / "config.json").read_text()) | config
    settings = {name: value for name, value in settings.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(settings))
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def refusal(folder: Path) -> str:
    with pytest.raises(ModelLoadError) as caught:
        load_model(str(folder))
    return str(caught.value)


def matrices(state: State) -> list[str]:
    return [name for name in state if name.endswith("proj.weight")]


# Codes


def float8(state: State, scale: str = "weight_scale") -> None:
    """A scale a matrix, as many tools write it."""
    for name in matrices(state):
        size = state[name].abs().max() / 448
        state[name] = (state[name] / size).to(torch.float8_e4m3fn)
        state[name.removesuffix("weight") + scale] = size.reshape(1)


def blocks(state: State, size: int = 16) -> None:
    """A scale a block of 16 by 16, as DeepSeek's own quantisation writes it."""
    for name in matrices(state):
        rows, columns = state[name].shape
        parts = state[name].reshape(rows // size, size, columns // size, size)
        scales = parts.abs().amax((1, 3)) / 448
        state[name] = (parts / scales[:, None, :, None]).reshape(rows, columns).to(torch.float8_e4m3fn)
        state[name + "_scale_inv"] = scales


BLOCKS = {"quant_method": "fp8", "weight_block_size": [16, 16], "activation_scheme": "dynamic"}


def int8(state: State) -> None:
    for name in matrices(state):
        state[name.removesuffix("weight") + "SCB"] = state[name].abs().amax(1)
        state[name] = (state[name] / state[name].abs().amax(1, keepdim=True) * 127).round().to(torch.int8)


def gptq(state: State) -> None:
    for name in matrices(state):
        weight, module = state.pop(name), name.removesuffix("weight")
        state[module + "qweight"] = torch.zeros(weight.shape[1] // 8, weight.shape[0], dtype=torch.int32)
        state[module + "qzeros"] = torch.zeros(1, weight.shape[0] // 8, dtype=torch.int32)
        state[module + "scales"] = torch.ones(1, weight.shape[0], dtype=torch.float16)
        state[module + "g_idx"] = torch.zeros(weight.shape[1], dtype=torch.int32)


def four_bits(state: State) -> None:
    """As bitsandbytes packs NF4."""
    for name in matrices(state):
        state[name + ".absmax"] = torch.ones(state[name].numel() // 64)
        state[name + ".quant_map"] = torch.linspace(-1, 1, 16)
        state[name + ".quant_state.bitsandbytes__nf4"] = torch.zeros(80, dtype=torch.uint8)
        state[name] = torch.zeros(state[name].numel() // 2, 1, dtype=torch.uint8)


def mlx(state: State) -> None:
    for name in matrices(state):
        rows, columns = state[name].shape
        state[name.removesuffix("weight") + "scales"] = torch.ones(rows, columns // 32)
        state[name.removesuffix("weight") + "biases"] = torch.ones(rows, columns // 32)
        state[name] = torch.zeros(rows, columns // 8, dtype=torch.uint32)


def without_scales(state: State) -> None:
    float8(state)
    for name in [name for name in state if name.endswith("_scale")]:
        del state[name]


def one_scale_gone(state: State) -> None:
    blocks(state)
    del state[f"{UP}.weight_scale_inv"]


def small_integers(state: State) -> None:
    state[f"{UP}.weight"] = state[f"{UP}.weight"].sign().to(torch.int8)


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        pytest.param(float8, {}, "28 tensors of type F8_E4M3.*28 scales.*no quantization_config", id="no config"),
        pytest.param(blocks, {}, "F8_E4M3.*weight_scale_inv.*no quantization_config", id="blocks"),
        pytest.param(
            lambda state: float8(state, "scale_weight"), {}, "F8_E4M3.*scale_weight", id="another name of scales"
        ),
        pytest.param(without_scales, {}, "28 tensors of type F8_E4M3", id="the scales are in no file"),
        pytest.param(float8, {"quantization_config": {"quant_method": "modelopt"}}, "'modelopt'", id="unknown method"),
        pytest.param(float8, {"quantization_config": BLOCKS}, "F8_E4M3.*'fp8'.*cannot undo", id="other scales"),
        pytest.param(one_scale_gone, {"quantization_config": BLOCKS}, "1 tensors of type F8_E4M3", id="one scale"),
        pytest.param(float8, {"compression_config": {"format": "float"}}, "'compression_config'", id="sparseml"),
        pytest.param(int8, {}, "tensors of type I8.*SCB", id="int8"),
        pytest.param(small_integers, {}, "1 tensors of type I8", id="integers alone"),
        pytest.param(gptq, {}, "tensors of type I32.*g_idx.*no quantization_config", id="gptq"),
        pytest.param(four_bits, {}, "tensors of type U8.*", id="bitsandbytes"),
        pytest.param(mlx, {"quantization": {"bits": 4}}, "tensors of type U32.*'quantization'", id="mlx"),
    ],
)
def test_codes_are_not_taken_for_weights(
    change: Callable[[State], None], config: dict, says: str, tmp_path: Path
) -> None:
    folder = write(tmp_path / "model", llama(num_hidden_layers=4) if "28" in says else None, change, **config)
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_model(str(folder))
    assert "model.layers" in str(caught.value)
    assert "Give the model that it was made from, or one that was dequantised" in str(caught.value)


def test_the_block_influence_of_codes_is_refused_and_not_measured(tmp_path: Path) -> None:
    """Truth: .536 .36 .33 .204; of the codes, which were analysed without a word: 1.009 .178 .175 .19."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
    )
    model = LlamaForCausalLM(config).eval()
    blocks_of_ids = torch.randint(0, 400, (2, 32))
    options: dict[str, Any] = {"blocks": blocks_of_ids, "fit_blocks": 0, "eval_blocks": 2, "progress": False}
    report = depthscope.analyze(model, scores="block_influence", **options)
    assert [round(float(row["block_influence"]), 3) for row in report.layers] == [0.536, 0.36, 0.33, 0.204]
    folder = write(tmp_path / "codes", model, lambda state: float8(state, "weight_scale"))
    with pytest.raises(ModelLoadError, match="codes of a quantisation"):
        depthscope.analyze(str(folder), scores="block_influence", **options)
    with pytest.raises(ModelLoadError, match="codes of a quantisation"):
        convert_checkpoint(str(folder), tmp_path / "converted")
    assert not (tmp_path / "converted").exists()
    for command in (["analyze"], ["sparsity"], ["convert", "--to", "depthlm"]):
        place_to_write = ["converted"] if command[0] == "convert" else []
        result = CliRunner().invoke(app, [command[0], str(folder), *place_to_write, *command[1:]])
        assert result.exit_code == 2
        assert "codes of a quantisation" in " ".join(result.output.split())


@pytest.mark.parametrize("has_scale", [True, False])
def test_codes_in_a_module_that_was_given_their_scales_are_its_own_affair(has_scale: bool, tmp_path: Path) -> None:
    """compressed-tensors keeps codes and scales in a plain Linear, and wraps its forward."""
    model = llama()
    module = model.get_submodule(UP)
    module.weight = torch.nn.Parameter(module.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    if has_scale:
        module.register_parameter("weight_scale", torch.nn.Parameter(torch.ones(64, 1)))
    folder = tmp_path / "model"
    model.save_pretrained(folder)
    checkpoint = find_checkpoint(str(folder))
    placed = place(model, StoredTensors(checkpoint, ["model.safetensors"]), set())
    assert (why_codes(checkpoint, {}, model, placed) is None) is has_scale


def test_float8_weights_that_were_never_scaled_are_weights(tmp_path: Path) -> None:
    def cast(state: State) -> None:
        state |= {name: state[name].to(torch.float8_e4m3fn) for name in matrices(state)}

    loaded = load_model(str(write(tmp_path / "model", change=cast)))
    expected = llama()
    expected.load_state_dict(
        {name: tensor.float() for name, tensor in load_file(tmp_path / "model/model.safetensors").items()}
    )
    assert torch.equal(logits(loaded.model), logits(expected))
    (note,) = loaded.notes
    assert note.startswith("14 weights are stored as float8 without scales")


def test_a_quantised_model_that_transformers_undoes_is_loaded(tmp_path: Path) -> None:
    loaded = load_model(str(write(tmp_path / "fp8", change=blocks, quantization_config=BLOCKS)))
    assert loaded.notes == []
    for name, weight in llama().state_dict().items():
        assert (loaded.model.state_dict()[name] - weight).abs().max() < weight.abs().max() / 8


def test_quantised_experts_that_transformers_undoes_are_loaded(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 1}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 260}
    model = Qwen3MoeForCausalLM(Qwen3MoeConfig(**shape, num_experts=4, num_experts_per_tok=2)).eval()
    loaded = load_model(str(write(tmp_path / "fp8", model, blocks, quantization_config=BLOCKS)))
    assert loaded.notes == []
    assert (logits(loaded.model) - logits(model)).abs().max() < 0.05


def test_four_bit_experts_that_transformers_undoes_are_loaded(tmp_path: Path) -> None:
    def pack(state: State) -> None:
        for name in [name for name in state if name.endswith(("gate_up_proj", "down_proj"))]:
            experts, rows, columns = state.pop(name).transpose(1, 2).shape
            state[f"{name}_blocks"] = torch.full((experts, rows, columns // 32, 16), 0x22, dtype=torch.uint8)
            state[f"{name}_scales"] = torch.full((experts, rows, columns // 32), 120, dtype=torch.uint8)

    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}
    model = GptOssForCausalLM(GptOssConfig(**shape, vocab_size=260))
    folder = write(tmp_path / "mxfp4", model, pack, quantization_config={"quant_method": "mxfp4"})
    loaded = load_model(str(folder))
    assert loaded.notes == []
    assert set(loaded.model.model.layers[0].mlp.experts.down_proj.unique().tolist()) == {2**-7}
    write(folder, model, pack)
    assert "tensors of type U8" in refusal(folder)


# Tensors without a place


def put(name: str, value: torch.Tensor) -> Callable[[State], None]:
    return lambda state: state.update({name: value})


def third_layer(state: State) -> None:
    state |= {
        name.replace("layers.1.", "layers.2."): tensor.clone() for name, tensor in state.items() if "s.1." in name
    }


def adapter(out: float) -> Callable[[State], None]:
    def change(state: State) -> None:
        state[f"{Q}.lora_A.default.weight"] = torch.ones(2, 32)
        state[f"{Q}.lora_B.default.weight"] = torch.full((32, 2), out)

    return change


def frequencies(
    base: float, kind: torch.dtype = torch.float32, once: torch.dtype = torch.float32
) -> Callable[[State], None]:
    values = (base ** -(torch.arange(4, dtype=torch.float64) / 4)).to(once).to(kind)
    return lambda state: state.update(
        {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": values.clone() for layer in range(2)}
    )


def table(base: float) -> Callable[[State], None]:
    angles = torch.arange(64.0)[:, None] * base ** -(torch.arange(4) / 4)
    return put("model.layers.0.self_attn.rotary_emb.cos_cached", torch.cat([angles, angles], 1).cos()[None, None])


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        pytest.param(third_layer, {}, r"9 of layers beyond the 2 that config.json counts.*layers\.2", id="layers"),
        pytest.param(put(f"{Q}.bias", torch.ones(32)), {}, rf"1 that are biases \({Q}.bias\)", id="biases"),
        pytest.param(put("lm_head.bias", torch.ones(260)), {}, "that are biases", id="bias of the head"),
        pytest.param(
            put("model.layers.0.self_attn.q_norm.weight", torch.ones(8)), {}, "1 of norms .*q_norm", id="norms"
        ),
        pytest.param(adapter(1.0), {}, "2 of an adapter that was never merged", id="adapter"),
        pytest.param(frequencies(5e5), {}, "2 for rotary positions, other than config.json gives", id="frequencies"),
        pytest.param(
            frequencies(1.1e4, once=torch.bfloat16), {}, "2 for rotary positions", id="frequencies that were bfloat16"
        ),
        pytest.param(table(5e5), {}, "1 for rotary positions", id="table"),
        pytest.param(put("model.layers.0.self_attn.sinks", torch.zeros(4)), {}, "of another kind", id="sinks"),
        pytest.param(put(f"{UP}.weight_scale", torch.tensor([2.0])), {}, "1 that scale others", id="scales"),
        pytest.param(
            put("model.layers.0.self_attn.bias", torch.ones(1, 1, 8, 8)),
            {},
            "that are biases",
            id="a mask that masks none",
        ),
        pytest.param(put("score.weight", torch.ones(1, 32)), {"tie_word_embeddings": True}, "score", id="reward model"),
    ],
)
def test_weights_without_a_place_that_change_the_function_are_refused(
    change: Callable[[State], None], config: dict, says: str, tmp_path: Path
) -> None:
    model = llama(tie_word_embeddings=config.get("tie_word_embeddings", False))
    folder = write(tmp_path / "model", model, change)
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_model(str(folder))
    assert "LlamaForCausalLM has no place for" in str(caught.value)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        pytest.param(put(f"{Q}.bias", torch.zeros(32)), "biases of zero: 1", id="biases"),
        pytest.param(adapter(0.0), "an adapter that adds nothing: 2", id="adapter"),
        pytest.param(frequencies(1e4), "rotary frequencies: 2", id="frequencies"),
        pytest.param(frequencies(1e4, torch.float16), "rotary frequencies: 2", id="frequencies in half precision"),
        pytest.param(frequencies(1e4, torch.bfloat16), "rotary frequencies: 2", id="frequencies in bfloat16"),
        pytest.param(
            frequencies(1e4, once=torch.float16), "rotary frequencies: 2", id="frequencies that were in half precision"
        ),
        pytest.param(
            frequencies(1e4, torch.float16, torch.bfloat16),
            "rotary frequencies: 2",
            id="frequencies that were bfloat16",
        ),
        pytest.param(table(1e4), "rotary frequencies: 1", id="table"),
        pytest.param(put(f"{UP}.weight_scale", torch.ones(1)), "scales of one: 1", id="scales"),
        pytest.param(
            put("model.layers.0.self_attn.k_scale", torch.tensor(0.5)), "scales of activations: 1", id="cache"
        ),
        pytest.param(put(f"{UP}.input_scale", torch.tensor(0.5)), "scales of activations: 1", id="activations"),
        pytest.param(put("model.layers.0.self_attn.bias", torch.ones(1, 1, 8, 8).tril()), "causal masks: 1", id="mask"),
        pytest.param(
            put("model.layers.0.self_attn.masked_bias", torch.tensor(-1e9)), "causal masks: 1", id="mask value"
        ),
        pytest.param(put("model.embed_positions.position_ids", torch.arange(64)[None]), "position ids: 1", id="ids"),
        pytest.param(
            put("model.vision_tower.proj.weight", torch.ones(4, 4)), "parts that are not for text: 1", id="vision"
        ),
        pytest.param(put("mtp.layers.0.eh_proj.weight", torch.ones(4, 4)), "heads for further tokens: 1", id="mtp"),
        pytest.param(put("v_head.summary.weight", torch.ones(1, 32)), "other heads: 1", id="value head"),
    ],
)
def test_weights_without_a_place_that_cannot_matter_are_noted(
    change: Callable[[State], None], says: str, tmp_path: Path
) -> None:
    loaded = load_model(str(write(tmp_path / "model", change=change)))
    assert torch.equal(logits(loaded.model), logits(llama()))
    (note,) = loaded.notes
    assert note.startswith("Left out of the checkpoint, without changing what the model computes: ")
    assert says in note


def test_a_table_that_the_model_computes_by_itself_is_noted_and_another_refused(tmp_path: Path) -> None:
    shape = {"d_model": 32, "ffn_dim": 64, "num_layers": 1, "attention_heads": 4, "max_position_embeddings": 64}
    model = XGLMForCausalLM(XGLMConfig(**shape, vocab_size=260)).eval()
    name = "model.embed_positions.weights"
    own = dict(model.named_buffers())[name]
    loaded = load_model(str(write(tmp_path / "model", model, put(name, own.half()))))
    assert torch.equal(logits(loaded.model), logits(model))
    assert f"buffers that XGLMForCausalLM computes: 1 ({name})" in loaded.notes[0]
    assert name in refusal(write(tmp_path / "other", model, put(name, own + 0.1)))


def test_layers_that_predict_further_tokens_are_left_out_with_a_note(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "moe_intermediate_size": 32, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 260, "n_routed_experts": 4}
    shape |= {"n_shared_experts": 1, "n_group": 1, "topk_group": 1, "num_experts_per_tok": 2, "q_lora_rank": 8}
    shape |= {"kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
    model = DeepseekV3ForCausalLM(DeepseekV3Config(**shape, first_k_dense_replace=1)).eval()

    def further(state: State) -> None:
        third_layer(state)
        state["model.layers.2.eh_proj.weight"] = torch.ones(32, 64)

    loaded = load_model(str(write(tmp_path / "model", model, further)))
    assert torch.equal(logits(loaded.model), logits(model))
    (note,) = loaded.notes
    assert "heads for further tokens: " in note
    assert "layers beyond the 2" in refusal(write(tmp_path / "other", model, third_layer))


def causal_masks(state: State, name: str) -> None:
    mask = torch.ones(16, 16, dtype=torch.bool).tril()[None, None]
    state |= {f"transformer.h.{layer}.attn.{name}": mask.clone() for layer in range(2)}


@pytest.mark.parametrize(
    ("model", "name"),
    [
        (GPT2LMHeadModel(GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=260)), "bias"),
        (
            GPTNeoForCausalLM(
                GPTNeoConfig(
                    hidden_size=16,
                    num_layers=2,
                    num_heads=2,
                    vocab_size=260,
                    attention_types=[[["global", "local"], 1]],
                )
            ),
            "attention.bias",
        ),
    ],
    ids=["gpt2", "gpt_neo"],
)
def test_masks_that_old_checkpoints_hold_are_noted(model: PreTrainedModel, name: str, tmp_path: Path) -> None:
    loaded = load_model(str(write(tmp_path / "model", model.eval(), lambda state: causal_masks(state, name))))
    assert torch.equal(logits(loaded.model), logits(model))
    assert f"2 (transformer.h.0.attn.{name}, transformer.h.1.attn.{name})" in loaded.notes[0]


def test_experts_beyond_those_of_the_config_are_refused(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**shape, num_key_value_heads=2, vocab_size=260, num_local_experts=4))
    message = refusal(write(tmp_path / "model", model, num_local_experts=3))
    assert "have another shape (model.layers.0.mlp" in message


# Weights that are there twice


def test_a_head_that_the_config_ties_and_the_file_holds_apart_is_refused(tmp_path: Path) -> None:
    message = refusal(write(tmp_path / "apart", tie_word_embeddings=True))
    assert "ties model.embed_tokens.weight" in message
    model = llama(tie_word_embeddings=True)
    copied = write(tmp_path / "copied", model, lambda state: put("lm_head.weight", model.lm_head.weight * 1)(state))
    loaded = load_model(str(copied))
    assert torch.equal(logits(loaded.model), logits(model))
    assert loaded.notes == []


def test_a_weight_under_two_names_is_refused_if_they_differ(tmp_path: Path) -> None:
    def twice(factor: float) -> Callable[[State], None]:
        short = f"{UP}.weight".removeprefix("model.")
        return lambda state: state.update({short: state[f"{UP}.weight"] * factor})

    assert "holds one weight twice with different numbers" in refusal(write(tmp_path / "two", change=twice(2.0)))
    loaded = load_model(str(write(tmp_path / "one", change=twice(1.0))))
    assert torch.equal(logits(loaded.model), logits(llama()))


def test_a_weight_in_two_shards_is_refused_if_they_differ(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    first, second, *_ = sorted((tmp_path / "model").glob("*.safetensors"))
    state, stale = load_file(second), load_file(first)
    name = next(iter(stale))
    save_file(state | {name: stale[name].clone()}, second)
    assert torch.equal(logits(load_model(str(tmp_path / "model")).model), logits(llama()))
    save_file(state | {name: stale[name] * 2}, second)
    message = refusal(tmp_path / "model")
    assert f"{name} in {first.name}, {name} in {second.name}" in message


def test_codes_in_shards_are_found(tmp_path: Path) -> None:
    llama().save_pretrained(tmp_path / "model", max_shard_size="20KB")
    for shard in (tmp_path / "model").glob("*.safetensors"):
        state = load_file(shard)
        float8(state)
        save_file(state, shard)
    assert "14 tensors of type F8_E4M3" in refusal(tmp_path / "model")


def test_shards_beside_a_whole_file_are_noted(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    (folder / "model.safetensors.index.json").write_text('{"metadata": {}, "weight_map": {}}')
    (note,) = load_model(str(folder)).notes
    assert "model.safetensors.index.json and its files beside it were not read" in note


def test_parts_of_a_distributed_training_are_not_taken_for_the_model(tmp_path: Path) -> None:
    folder = write(tmp_path / "model")
    save_file(llama().state_dict(), folder / "shard-00000-model-00001-of-00001.safetensors")
    message = refusal(folder)
    assert "(shard-00000-model-00001-of-00001.safetensors)" in message
    assert "consolidate_distributed_checkpoint" in message


# Settings


@pytest.mark.parametrize(
    ("config", "says"),
    [
        pytest.param({"rope_scaling": {"factor": 4.0}, "rope_parameters": None}, "factor = 4.0", id="no type"),
        pytest.param(
            {"rope_parameters": {"rope_type": "default", "factor": 4.0, "rope_theta": 1e4}},
            "factor = 4.0 in rope_parameters, where the type is 'default'",
            id="the default type",
        ),
        pytest.param(
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "attention_factor": 2.0, "rope_theta": 1e4}},
            "attention_factor = 2.0",
            id="another type's",
        ),
        pytest.param(
            {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}},
            "rope_parameters.full_attention",
            id="by layer type",
        ),
        pytest.param(
            {"rope_theta": 5e5}, "rope_theta = 500000.0 in config.json, where the model has 10000.0", id="base"
        ),
        pytest.param(
            {"rope_parameters": {"rope_theta": 5e5}, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_theta = 500000.0 in rope_parameters",
            id="two places",
        ),
        pytest.param({"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5", id="a part of each head"),
        pytest.param({"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0", id="cap"),
        pytest.param({"residual_multiplier": 0.2}, "residual_multiplier = 0.2", id="multiplier"),
        pytest.param({"alibi": True}, "alibi = True", id="switch"),
        pytest.param({"norm_eps": 1e-3, "rms_norm_eps": None}, "it is called rms_norm_eps there", id="epsilon"),
        pytest.param({"hidden_activation": "gelu", "hidden_act": None}, "it is called hidden_act there", id="function"),
    ],
)
def test_settings_that_change_the_function_and_are_not_used_are_refused(
    config: dict, says: str, tmp_path: Path
) -> None:
    message = refusal(write(tmp_path / "model", **config))
    assert "has settings that LlamaForCausalLM does not use" in message
    assert says in message


@pytest.mark.parametrize(
    "config",
    [
        {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_theta": 5e5, "rope_parameters": None},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}
         | {"high_freq_factor": 4.0, "original_max_position_embeddings": 512}},
        {"residual_multiplier": 1.0, "final_logit_softcapping": None, "alibi": False, "rope_interleaved": False},
        {"layer_norm_eps": 1e-3, "unsloth_version": "2025.1", "is_llama_config": True, "rope_ratio": 1},
        {"sliding_window": 4096, "use_sliding_window": False},
    ],
    ids=["linear", "llama3", "neutral", "harmless", "unused window"],
)  # fmt: skip
def test_settings_that_are_used_or_do_nothing_are_no_obstacle(config: dict, tmp_path: Path) -> None:
    assert load_model(str(write(tmp_path / "model", **config))).notes == []


def test_norms_of_queries_and_keys_that_a_class_always_has_may_be_named_in_its_config(tmp_path: Path) -> None:
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    shape |= {"num_key_value_heads": 2, "vocab_size": 260, "head_dim": 8}
    apertus = ApertusForCausalLM(ApertusConfig(**shape))
    hunyuan = HunYuanDenseV1ForCausalLM(HunYuanDenseV1Config(**shape))
    assert load_model(str(write(tmp_path / "apertus", apertus, qk_norm=True))).notes == []
    assert load_model(str(write(tmp_path / "hunyuan", hunyuan, use_qk_norm=True))).notes == []
    assert "use_qk_norm = True" in refusal(write(tmp_path / "llama", use_qk_norm=True))


def test_a_window_that_the_model_does_not_have_is_noted(tmp_path: Path) -> None:
    (note,) = load_model(str(write(tmp_path / "model", sliding_window=512))).notes
    assert note.startswith("config.json says sliding_window = 512, which LlamaForCausalLM does not use")


def test_a_quantisation_that_nobody_knows_of_weights_in_full_is_no_obstacle(tmp_path: Path) -> None:
    loaded = load_model(str(write(tmp_path / "model", quantization_config={"quant_method": "flubber"})))
    assert torch.equal(logits(loaded.model), logits(llama()))
    assert any("'flubber'" in note for note in loaded.notes)


# Types of numbers


def as_on_an_accelerator(folder: Path) -> LoadedModel:
    """Loaded in the checkpoint's own type, which a processor is spared."""
    options = _Options("auto", None, trust_remote_code=False, token=None, attn_implementation=None)
    return _load_checkpoint(find_checkpoint(str(folder)), options)


def test_the_type_that_most_weights_have_is_taken_where_the_config_names_none(tmp_path: Path) -> None:
    def mixed(state: State) -> None:
        state |= {name: tensor.to(torch.bfloat16) for name, tensor in state.items() if tensor.dim() > 1}
        state["lm_head.weight"] = state["lm_head.weight"].float()  # the first of the file

    folder = write(tmp_path / "model", change=mixed, dtype=None)
    loaded = as_on_an_accelerator(folder)
    assert loaded.facts["dtype"] == "bfloat16"
    assert loaded.notes == []


def test_weights_that_the_config_has_rounded_are_noted(tmp_path: Path) -> None:
    folder = write(tmp_path / "model", llama().to(torch.bfloat16), dtype="float16")
    loaded = as_on_an_accelerator(folder)
    assert loaded.notes == ["The weights are stored as bfloat16 and were rounded to float16, as config.json says."]
    assert load_model(str(folder), device="cpu").notes == []
