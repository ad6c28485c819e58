"""Conversions to and from native architectures: exact, or refused with the reason."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, LlamaModel, PreTrainedModel

from depthlm import KINDS, tiny_config, tiny_depthlm
from depthscope.conversion import to_depthlm, to_native
from depthscope.conversion.assemble import largest_logit_difference
from depthscope.conversion.forms import FORMS
from depthscope.errors import ConversionError
from depthscope.loading.load import load_model
from depthscope.models import DepthLMForCausalLM
from models import random_blocks

MOE = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
NARROW = {"num_key_value_heads": 2, "head_dim": 16}

# Options -> the architecture that expresses them.
EXPRESSED: list[tuple[dict[str, Any], str]] = [
    ({}, "llama"),
    ({"attention_bias": True, "mlp_bias": True, **NARROW}, "llama"),
    ({"tie_word_embeddings": True, "norm_scaling": "depth"}, "llama"),
    ({"rope_parameters": {"rope_type": "linear", "rope_theta": 5e4, "factor": 4.0}}, "llama"),
    ({"sliding_window": 5, **NARROW}, "mistral"),
    ({"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2}, "qwen2"),
    ({"qk_norm": "head", "attention_bias": True, "norm_scaling": "depth", **NARROW}, "qwen3"),
    ({"qk_norm": "head", "sliding_window": 5}, "qwen3"),
    ({"qk_norm": "full", "norm_placement": "output", "num_key_value_heads": 2}, "olmo2"),
    ({**MOE, "norm_topk_prob": True, **NARROW}, "mixtral"),
    ({**MOE, "norm_topk_prob": True, "sliding_window": 5}, "mixtral"),
    ({**MOE, "qk_norm": "full", "num_key_value_heads": 2, "norm_scaling": "depth"}, "olmoe"),
    ({**MOE, "qk_norm": "full", "norm_topk_prob": True, "attention_bias": True}, "olmoe"),
    ({**MOE, "qk_norm": "head", "moe_layers": [0, 3], **NARROW}, "qwen3_moe"),
    ({**MOE, "norm_scaling": "depth"}, "qwen2_moe"),
    ({**MOE, "shared_expert_intermediate_size": 20, "moe_layers": 2}, "qwen2_moe"),
]


def with_random_biases(model: PreTrainedModel, but_not: str = "") -> PreTrainedModel:
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".bias") and not (but_not and but_not in name):
                weight.normal_(std=0.3)
    return model


@pytest.mark.parametrize(("options", "architecture"), EXPRESSED, ids=lambda value: str(value)[:60])
def test_a_depthlm_becomes_the_architecture_that_expresses_it(
    options: dict[str, Any], architecture: str, tmp_path: Path
) -> None:
    model = with_random_biases(tiny_depthlm(**options))
    native = to_native(model)
    assert native.config.model_type == architecture
    assert largest_logit_difference(model, native) < 1e-5
    native.save_pretrained(tmp_path)
    assert not list(tmp_path.glob("*.py"))
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert largest_logit_difference(loaded, native) == 0
    back = to_depthlm(loaded)
    assert largest_logit_difference(native, back) == 0
    if "norm_scaling" not in options:
        assert {name: getattr(back.config, name) for name in options if name != "moe_layers"} == {
            name: getattr(model.config, name) for name in options if name != "moe_layers"
        }
        assert back.config.moe_layer_indices == model.config.moe_layer_indices


@pytest.mark.quick
def test_gradients_are_those_of_the_native_model() -> None:
    model = tiny_depthlm(norm_scaling="depth")
    native = to_native(model)
    ids = random_blocks(2, 16)
    for either in (model, native):
        either(ids, labels=ids).loss.backward()
    torch.testing.assert_close(model.lm_head.weight.grad, native.lm_head.weight.grad, atol=1e-6, rtol=1e-5)
    down = [either.model.layers[2].mlp.down_proj.weight.grad for either in (model, native)]
    torch.testing.assert_close(*down, atol=1e-6, rtol=1e-5)


def test_the_source_stays_as_it_is_and_shares_nothing_with_the_result() -> None:
    model = tiny_depthlm(norm_scaling="depth")
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    native = to_native(model)
    with torch.no_grad():
        for weight in native.parameters():
            weight.zero_()
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())


def test_a_copy_has_its_own_configuration() -> None:
    model = tiny_depthlm(**MOE)
    copy = to_depthlm(model)
    copy.set_experts_implementation("eager")
    copy.config.router_aux_loss_coef = 5.0
    assert model.config._experts_implementation == "grouped_mm"
    assert model.config.router_aux_loss_coef == 0.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"norm_placement": "peri"}, "Llama, Mistral and Qwen2 cannot have norm_placement='peri'"),
        ({"norm_placement": "post"}, "norm_placement='post'"),
        ({"norm_placement": "mix"}, "norm_placement='mix'"),
        ({"norm_placement": "output"}, "norm_placement='output'"),
        ({**MOE, "norm_placement": "peri"}, "Qwen2-MoE cannot have norm_placement='peri'"),
        ({**MOE, "head_dim": 16}, "Qwen2-MoE cannot have heads of width 16"),
        ({**MOE, "sliding_window": 5}, "cannot have"),
        ({**MOE, "qk_norm": "full", "moe_layers": 2}, "OLMoE cannot have experts in some layers only"),
        (
            {**MOE, "qk_norm": "head", "shared_expert_intermediate_size": 20},
            "Qwen3-MoE cannot have a shared expert",
        ),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_no_architecture_expresses_is_refused_with_the_reason(options: dict[str, Any], said: str) -> None:
    with pytest.raises(ConversionError, match="no exact native form: .*" + said):
        to_native(tiny_depthlm(**options))


def test_biases_that_a_form_cannot_hold_are_refused_and_zeros_are_not() -> None:
    sliding = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"] * 2, "attention_bias": True}
    with pytest.raises(ConversionError, match="biases in these attention projections"):
        to_native(with_random_biases(tiny_depthlm(**sliding)))
    model = with_random_biases(tiny_depthlm(**sliding), but_not="o_proj")
    native = to_native(model)
    assert native.config.model_type == "qwen2"
    assert largest_logit_difference(model, native) == 0
    assert largest_logit_difference(native, to_depthlm(native)) == 0


def test_one_architecture_may_be_asked_for() -> None:
    model = tiny_depthlm()
    for architecture in ("llama", "mistral", "qwen2"):
        native = to_native(model, architecture)
        assert native.config.model_type == architecture
        assert largest_logit_difference(model, native) == 0
    with pytest.raises(ConversionError, match="Qwen3 cannot have qk_norm=None"):
        to_native(model, "qwen3")
    with pytest.raises(ConversionError, match=r"'gpt2' is not an architecture .* llama, mistral"):
        to_native(model, "gpt2")


def test_layernorm_scaling_is_not_folded_into_weights_that_would_round_it() -> None:
    with pytest.raises(ConversionError, match="float32"):
        to_native(tiny_depthlm(norm_scaling="depth").to(torch.bfloat16))
    plain = tiny_depthlm().to(torch.bfloat16)
    assert to_native(plain).dtype == torch.bfloat16


def test_a_conversion_keeps_dtype_and_mode_and_generation_settings() -> None:
    model = tiny_depthlm().to(torch.bfloat16).train()
    model.generation_config.max_length = 77
    native = to_native(model)
    assert (native.dtype, native.training, native.generation_config.max_length) == (torch.bfloat16, True, 77)


def test_what_depthlm_does_not_have_is_not_read() -> None:
    olmoe = to_native(tiny_depthlm(**MOE, qk_norm="full"))
    olmoe.config.clip_qkv = 8.0
    with pytest.raises(ConversionError, match=r"clip_qkv=8\.0"):
        to_depthlm(olmoe)
    qwen = to_native(tiny_depthlm(**MOE, shared_expert_intermediate_size=20))
    with torch.no_grad():
        qwen.model.layers[1].mlp.shared_expert_gate.weight.fill_(0.1)
    with pytest.raises(ConversionError, match="gate that depends on the token"):
        to_depthlm(qwen)
    gpt2 = AutoModelForCausalLM.from_config(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    with pytest.raises(ConversionError, match=r"GPT2LMHeadModel \(gpt2\) cannot be read .* llama, mistral"):
        to_depthlm(gpt2)
    with pytest.raises(ConversionError, match="LlamaModel"):
        to_depthlm(LlamaModel(to_native(tiny_depthlm()).config))
    with pytest.raises(ConversionError, match="takes a DepthLMForCausalLM"):
        to_native(gpt2)


def test_every_kind_is_either_exact_or_refused() -> None:
    refused = set()
    for kind in KINDS:
        model = tiny_depthlm(kind)
        try:
            native = to_native(model)
        except ConversionError:
            refused.add(kind)
        else:
            assert largest_logit_difference(model, native) < 1e-5
    # No dense Pre-LN architecture norms queries and keys over all heads together, and OLMo 2 norms nothing else.
    assert refused == {"qk_norm_full", "peri", "post", "mix", "output", "scaled_peri"}


def test_every_form_is_reached() -> None:
    assert {architecture for _, architecture in EXPRESSED} == {form.model_type for form in FORMS}


@pytest.mark.slow
def test_smollm2_becomes_a_depthlm_and_llama_again(smollm2_gguf: Path) -> None:
    llama = load_model(str(smollm2_gguf), dtype="float32").model
    depthlm = to_depthlm(llama)
    assert type(depthlm) is DepthLMForCausalLM
    assert largest_logit_difference(llama, depthlm) == 0
    assert depthlm.config.num_key_value_heads == 3
    assert largest_logit_difference(to_native(depthlm), llama) == 0


def test_the_config_of_a_result_names_no_folder(tmp_path: Path) -> None:
    tiny_depthlm().save_pretrained(tmp_path)
    model = DepthLMForCausalLM.from_pretrained(tmp_path)
    assert str(tmp_path) not in to_native(model).config.to_json_string()
    assert tiny_config().to_json_string()
