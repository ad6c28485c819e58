"""Cutting layers out of a model in memory: logits as by hand, settings that say of the kept layers what they said."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from packaging import version
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMultimodalLM,
    BertConfig,
    BertForMaskedLM,
    Gemma4TextConfig,
    GPT2Config,
    PreTrainedModel,
)

from depthlm import tiny_depthlm
from depthscope import LayerStack
from depthscope.conversion import deepen, to_native
from depthscope.errors import NoLayerStackError, NonFiniteError, SettingsError, SurgeryError
from depthscope.loading.load import load_model
from depthscope.surgery import cut, original_layers, prove
from depthscope.surgery.proof import relative_difference
from depthscope.surgery.settings import read_settings
from gguf_files import write_gguf
from models import VOCABULARY, random_blocks, tiny_llama
from zoo import example_ids, tiny_config, tiny_model

needs_the_documented_version = pytest.mark.skipif(
    version.parse(transformers.__version__) < version.parse("5.23"), reason="earlier versions build it differently"
)


def logits_of(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False).logits


def with_skipped(model: PreTrainedModel, kept: tuple[int, ...], ids: Tensor) -> Tensor:
    stack = LayerStack(model)
    with torch.no_grad(), stack.skipping(*set(range(len(stack))) - set(kept)):
        return stack.logits(ids)


# By hand


def test_a_cut_llama_computes_what_one_does_whose_layers_were_deleted_by_hand() -> None:
    model = tiny_llama(5)
    ids = random_blocks(2, 20)
    weights = {name: weight.clone() for name, weight in model.state_dict().items()}
    small = cut(model, [0, 2, 3])
    assert all(torch.equal(weight, weights[name]) for name, weight in model.state_dict().items())
    assert model.config.num_hidden_layers == 5
    del model.model.layers[4], model.model.layers[1]
    assert torch.equal(logits_of(small, ids), logits_of(model, ids))
    assert (small.config.num_hidden_layers, small.config.kept_layers) == (3, [0, 2, 3])
    assert [layer.self_attn.layer_idx for layer in small.model.layers] == [0, 1, 2]


def test_a_cut_gpt2_computes_what_its_formula_says_with_the_scale_of_each_layers_first_number() -> None:
    torch.manual_seed(0)
    sizes = {"n_layer": 4, "n_embd": 16, "n_head": 2, "vocab_size": 30, "n_positions": 32, "initializer_range": 0.3}
    model = AutoModelForCausalLM.from_config(GPT2Config(**sizes, scale_attn_by_inverse_layer_idx=True)).eval()
    ids = torch.arange(10)[None]
    expected = gpt2_by_hand(model, (1, 3), ids)
    torch.testing.assert_close(logits_of(cut(model, (1, 3)), ids), expected, rtol=1e-4, atol=1e-5)
    model.config.scale_attn_by_inverse_layer_idx = False  # a configuration that its layers were not built from
    with pytest.raises(SurgeryError, match="scaling is"):
        cut(model, (1, 3))


def gpt2_by_hand(model: Any, layers: tuple[int, ...], ids: Tensor) -> Tensor:
    """Attention of the layers of numbers l is divided by l + 1."""
    weights = {name.removeprefix("transformer."): weight for name, weight in model.state_dict().items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return torch.nn.functional.layer_norm(x, x.shape[-1:], weights[f"{name}.weight"], weights[f"{name}.bias"])

    def affine(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"] + weights[f"{name}.bias"]

    tokens, width, heads = ids.shape[1], model.config.n_embd, model.config.n_head
    h = weights["wte.weight"][ids[0]] + weights["wpe.weight"][:tokens]
    unseen = torch.ones(tokens, tokens).triu(1).bool()
    for layer in layers:
        q, k, v = affine(norm(h, f"h.{layer}.ln_1"), f"h.{layer}.attn.c_attn").split(width, -1)
        q, k, v = (x.view(tokens, heads, -1).transpose(0, 1) for x in (q, k, v))
        scores = q @ k.transpose(1, 2) / math.sqrt(width // heads) / (layer + 1)
        mixed = scores.masked_fill(unseen, -math.inf).softmax(-1) @ v
        h = h + affine(mixed.transpose(0, 1).reshape(tokens, width), f"h.{layer}.attn.c_proj")
        inner = torch.nn.functional.gelu(affine(norm(h, f"h.{layer}.ln_2"), f"h.{layer}.mlp.c_fc"), approximate="tanh")
        h = h + affine(inner, f"h.{layer}.mlp.c_proj")
    return (norm(h, "ln_f") @ weights["lm_head.weight"].T)[None]


# What a configuration says


def test_a_model_that_is_cut_twice_knows_the_first_numbers_of_its_layers() -> None:
    model = tiny_llama(6)
    once = cut(model, [0, 2, 3, 5])
    twice = cut(once, [1, 3])
    assert original_layers(model.config) is None
    assert original_layers(twice.config) == (2, 5)
    ids = random_blocks(2, 12)
    assert torch.equal(logits_of(twice, ids), logits_of(cut(model, [2, 5]), ids))


def test_tied_embeddings_stay_one_tensor_and_belong_to_the_new_model_alone() -> None:
    model = tiny_llama(tie_word_embeddings=True)
    small = cut(model, [0, 3])
    assert small.lm_head.weight is small.model.embed_tokens.weight
    before = {weight.data_ptr() for weight in model.parameters()}
    assert not before & {weight.data_ptr() for weight in small.parameters()}


def test_lists_indices_prefixes_and_keys_are_each_read_as_what_they_are() -> None:
    settings = {
        "num_hidden_layers": 4,
        "layer_types": ["a", "b", "c", "d"],
        "moe_layers": [0, 1, 2, 3],
        "no_rope_layers": [1, 0, 1, 0],
        "attn_layer_indices": [1, 2],
        "first_k_dense_replace": 2,
        "num_kv_shared_layers": 1,
        "per_layer_config": {"1": "x", "3": "y"},
        "eos_token_id": [1, 2, 3, 4],
        "intermediate_size": 4096,
    }
    assert read_settings(settings, "num_hidden_layers", (1, 3), 4).settings == {
        "num_hidden_layers": 2,
        "layer_types": ["b", "d"],
        "moe_layers": [0, 1],
        "no_rope_layers": [0, 0],
        "attn_layer_indices": [0],
        "first_k_dense_replace": 1,
        "num_kv_shared_layers": 1,
        "per_layer_config": {"0": "x", "1": "y"},
        "eos_token_id": [1, 2, 3, 4],
        "intermediate_size": 4096,
    }


@pytest.mark.parametrize(
    ("settings", "kept", "expected"),
    [
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, (1, 3, 5, 7), {(2, 0)}),
        ({"attn_layer_period": 4, "attn_layer_offset": 1}, (0, 2), {(3, 2)}),  # none
        ({"decoder_sparse_step": 2, "mlp_only_layers": [3]}, (0, 1, 3, 5), {(1, (0, 2))}),
        (
            {"moe_layer_start_index": 1, "moe_layer_end_index": 6, "moe_layer_interval": 1},
            (0, 2, 3, 7),
            {(1, 2, 1)},
        ),
    ],
)
def test_rules_for_every_nth_layer_name_the_same_layers_by_new_numbers(
    settings: dict[str, Any], kept: tuple[int, ...], expected: set[tuple[Any, ...]]
) -> None:
    read = read_settings(settings, "num_hidden_layers", kept, 8).settings
    found = tuple(tuple(value) if isinstance(value, list) else value for value in read.values())
    assert found in expected


def test_layers_that_no_rule_can_name_are_refused_by_the_names_of_the_settings() -> None:
    settings = {"attn_layer_period": 2, "attn_layer_offset": 1}
    with pytest.raises(SurgeryError, match="attn_layer_period and attn_layer_offset cannot say"):
        read_settings(settings, "num_hidden_layers", (0, 1, 3), 4)


def test_experts_after_dense_layers_stay_where_they_are_when_the_dense_ones_go() -> None:
    model = tiny_model("deepseek_v3")  # layer 0 is dense
    small = cut(model, [1, 2])
    assert small.config.first_k_dense_replace == 0
    ids = example_ids(model)
    assert relative_difference(logits_of(small, ids), with_skipped(model, (1, 2), ids)) <= 1e-5


@needs_the_documented_version
def test_embeddings_for_each_layer_are_cut_with_their_layers() -> None:
    model = tiny_model("gemma4_text")
    table = model.model.embed_tokens_per_layer.weight
    small = cut(model, [0, 3])
    assert torch.equal(small.model.embed_tokens_per_layer.weight, torch.cat([table[:, :16], table[:, 48:]], 1))


@needs_the_documented_version
def test_windows_that_no_short_text_shows_are_refused_where_the_class_would_change_them() -> None:
    torch.manual_seed(0)
    rotation = {"rope_type": "default", "rope_theta": 10000.0}
    config = Gemma4TextConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        global_head_dim=8,
        vocab_size=VOCABULARY,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=VOCABULARY,
        sliding_window=512,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        rope_parameters={"full_attention": rotation, "sliding_attention": rotation},
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    assert cut(model, [0, 2]).config.layer_types == ["full_attention", "full_attention"]
    with pytest.raises(SurgeryError, match=r"would see other tokens.*sliding_window is None, not 512"):
        cut(model, [0, 1])  # its class lets the last layer see everything


@needs_the_documented_version
def test_a_shared_block_with_adapters_keeps_the_adapter_of_each_kept_layer() -> None:
    model = tiny_model("zamba2")  # layers 1 and 3 share a block, and have an adapter each
    ids = example_ids(model)
    for kept in ((0, 3), (1, 2), (2, 3)):
        assert relative_difference(logits_of(cut(model, kept), ids), with_skipped(model, kept, ids)) <= 1e-5


# DepthLM


@pytest.mark.parametrize("kept", [(0, 3), (1, 2), (2,)])
def test_a_cut_depthlm_scales_its_norms_by_the_first_numbers_of_its_layers(kept: tuple[int, ...]) -> None:
    model = tiny_depthlm(num_hidden_layers=4, norm_scaling="depth").eval()
    ids = torch.arange(3, 35).view(2, 16)
    small = cut(model, kept)
    assert [layer.norm_factor for layer in small.model.layers] == [(layer + 1) ** -0.5 for layer in kept]
    assert relative_difference(logits_of(small, ids), with_skipped(model, kept, ids)) <= 1e-6
    assert relative_difference(logits_of(to_native(small), ids), logits_of(small, ids)) <= 1e-5
    deeper = deepen(small, 5, preserve_function=True)
    assert relative_difference(logits_of(deeper, ids), logits_of(small, ids)) <= 1e-5


@pytest.mark.parametrize(
    ("settings", "kept", "expected"),
    [
        ({"norm_placement": "mix", "mix_post_layers": 2}, (0, 3), ("mix", 1)),
        ({"norm_placement": "mix", "mix_post_layers": 2}, (2, 3), ("pre", None)),
        ({"norm_placement": "mix", "mix_post_layers": 2}, (0, 1), ("post", None)),
        ({"num_experts": 4, "num_experts_per_tok": 2, "moe_layers": 2}, (1, 2), ("pre", None)),
        ({"num_experts": 4, "num_experts_per_tok": 2, "moe_layers": [0]}, (1, 2), ("pre", None)),
        ({"sliding_window": 5, "layer_types": ["full_attention", "sliding_attention"] * 2}, (1, 2), ("pre", None)),
    ],
)
def test_a_cut_depthlm_keeps_the_norms_experts_and_windows_of_its_layers(
    settings: dict[str, Any], kept: tuple[int, ...], expected: tuple[str, int | None]
) -> None:
    model = tiny_depthlm(num_hidden_layers=4, **settings).eval()
    ids = torch.arange(3, 35).view(2, 16)
    small = cut(model, kept)
    assert (small.config.norm_placement, small.config.mix_post_layers) == expected
    assert relative_difference(logits_of(small, ids), with_skipped(model, kept, ids)) <= 1e-6


# What cannot be cut


@pytest.mark.parametrize(
    ("kept", "message"),
    [
        ([], "names no layer"),
        ([0, 1, 2, 3], r"names all layers \(0-3\)"),
        ([0, 4], "names layer 4, but this model has layers 0 to 3"),
        ([-1], "is -1; give a whole number of at least 0"),
        ([0, 0], "names layer 0 twice"),
        ([2, 1], "names layer 1 after layer 2"),
        ([0.5], "is 0.5; give a whole number"),
        ([True], "is True; give a whole number"),
        ([float("nan")], "is nan"),
        ("01", "kept is '01'; give the numbers"),
        (3, "kept is 3; give the numbers"),
        (None, "kept is None"),
    ],
)
def test_layers_that_make_no_cut_are_refused_in_words(kept: Any, message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        cut(tiny_llama(), kept)


def test_the_layers_may_come_as_any_whole_numbers() -> None:
    model = tiny_llama()
    for kept in (np.array([0, 3]), range(0, 4, 3), (layer for layer in (0, 3)), {0: "a", 3: "b"}):
        assert original_layers(cut(model, kept).config) == (0, 3)


def test_weights_that_are_not_numbers_are_refused_by_name_if_they_are_kept() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[2].mlp.up_proj.weight[0, 0] = math.nan
    with pytest.raises(NonFiniteError, match=r"not finite: model.layers.1.mlp.up_proj.weight"):
        cut(model, [0, 2])
    assert torch.isfinite(logits_of(cut(model, [0, 1]), random_blocks(2, 12))).all()


def test_an_encoder_is_refused() -> None:
    config = BertConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32, vocab_size=VOCABULARY
    )
    with pytest.raises(NoLayerStackError):
        cut(BertForMaskedLM(config).eval(), [0, 1])


def test_adapters_quantized_and_offloaded_weights_are_refused_with_what_to_do(tmp_path: Any) -> None:
    adapted = get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(SurgeryError, match="PEFT adapter"):
        cut(adapted, [0, 1])
    with pytest.raises(SurgeryError, match="PEFT adapter"):
        cut(adapted.get_base_model(), [0, 1])
    assert cut(adapted.merge_and_unload(), [0, 1]).num_parameters() > 0
    quantized = tiny_llama()
    linear = quantized.model.layers[0].mlp.up_proj
    linear.weight = torch.nn.Parameter(linear.weight.data.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(SurgeryError, match=r"quantized .*Linear holds codes of type torch.float8_e4m3fn"):
        cut(quantized, [0, 1])
    packed = tiny_llama()
    packed.model.layers[0].mlp.up_proj.register_buffer("qweight", torch.ones(4, 4, dtype=torch.int32))
    with pytest.raises(SurgeryError, match=r"quantized .*codes of type torch.int32"):
        cut(packed, [0, 1])
    tiny_llama().save_pretrained(tmp_path)
    with pytest.raises(SurgeryError, match="not in memory"):
        cut(load_model(tmp_path, device="cpu", offload=True).model, [0, 1])


def test_what_a_file_was_packed_with_does_not_stand_in_the_configuration_of_weights_in_full(tmp_path: Any) -> None:
    model = load_model(write_gguf(tmp_path / "model.gguf", tiny_model("llama")), device="cpu").model
    model.config.quantization_config = {"quant_method": "mxfp4"}  # as of weights that were unpacked when they were read
    small = cut(model, [0, 3])
    assert not hasattr(small.config, "quantization_config")
    small.save_pretrained(tmp_path / "small")
    assert load_model(tmp_path / "small", device="cpu").notes == []


@pytest.mark.parametrize("kept", [(0, 3), (1, 2)])
def test_the_language_model_of_one_that_sees_is_cut_and_its_tower_stays(kept: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(tiny_config(CONFIG_MAPPING["llava"], 4)).eval()
    small = cut(model, kept)
    assert small.config.text_config.num_hidden_layers == len(small.model.language_model.layers) == 2
    assert small.config.vision_config.num_hidden_layers == 4
    assert original_layers(small.config) == kept
    for name, weight in model.model.vision_tower.state_dict().items():
        assert torch.equal(small.model.vision_tower.state_dict()[name], weight)


@needs_the_documented_version
def test_layers_that_get_features_of_an_image_each_stay() -> None:
    torch.manual_seed(0)
    model = AutoModelForMultimodalLM.from_config(tiny_config(CONFIG_MAPPING["qwen3_vl"], 5)).eval()
    assert original_layers(cut(model, (0, 1, 2, 4)).config) == (0, 1, 2, 4)
    with pytest.raises(SurgeryError, match="deepstack_visual_indexes: the first 3 layers"):
        cut(model, (0, 2, 3, 4))


def test_a_model_that_was_cut_by_hand_and_whose_configuration_does_not_know_is_refused() -> None:
    model = tiny_llama(5)
    del model.model.layers[4]
    with pytest.raises(SurgeryError, match="num_hidden_layers of the configuration is 5, and the model has 4 layers"):
        cut(model, [0, 3])


@needs_the_documented_version
def test_layers_that_later_ones_need_are_refused_with_the_setting() -> None:
    with pytest.raises(SurgeryError, match=r"does not run without layers 2 .*indexer_types.*keep them"):
        cut(tiny_model("hy_v4"), [0, 1, 3])


@needs_the_documented_version
def test_what_depends_on_the_number_of_a_layer_and_cannot_be_said_is_refused_by_name() -> None:
    with pytest.raises(SurgeryError, match="attn_residual_add_idx is 4, not 8"):
        cut(tiny_model("beam"), [0, 3])


# Other models than plain ones


def test_a_compiled_model_is_cut_as_it_was_written() -> None:
    model = tiny_llama()
    ids = random_blocks(2, 12)
    expected = logits_of(cut(model, [0, 3]), ids)
    assert torch.equal(logits_of(cut(torch.compile(model), [0, 3]), ids), expected)
    model.model.layers[3] = torch.compile(model.model.layers[3])
    assert torch.equal(logits_of(cut(model, [0, 3]), ids), expected)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 2**-6), (torch.float64, 1e-10)])
def test_a_cut_model_has_the_dtype_and_the_mode_of_the_original(dtype: torch.dtype, tolerance: float) -> None:
    model = AutoModelForCausalLM.from_config(tiny_llama().config, dtype=dtype).train()
    small = cut(model, [0, 3])
    assert small.dtype == dtype
    assert small.training
    assert model.training
    proof = prove(model, small, [0, 3], new_tokens=4)
    assert proof.difference <= proof.tolerance == tolerance


def test_a_model_that_was_rounded_as_a_whole_is_compared_as_such_and_has_its_frequencies_in_full_again() -> None:
    model = tiny_llama(hidden_size=64, max_position_embeddings=4096).to(torch.bfloat16)
    small = cut(model, [0, 3])
    assert small.model.rotary_emb.inv_freq.dtype == torch.float32
    proof = prove(model, small, [0, 3], torch.arange(3, 83).repeat(1, 20), new_tokens=4)
    assert proof.difference == 0
    assert "model.rotary_emb.inv_freq" in proof.notes[0]
    assert small.model.rotary_emb.inv_freq.dtype == torch.float32


def test_a_proof_fails_for_a_model_of_other_layers() -> None:
    model = tiny_llama()
    small = cut(model, [0, 3])
    assert prove(model, small, [0, 3]).new_tokens == 64
    with pytest.raises(SurgeryError, match="does not compute what it does"):
        prove(model, small, [0, 2])


def test_decoding_with_a_broken_cache_is_noticed() -> None:
    model = tiny_llama()
    small = cut(model, [0, 3])
    small.model.layers[1].self_attn.layer_idx = 0  # the two layers would share a place in the cache
    with pytest.raises(SurgeryError, match="does not decode with a cache as it does without"):
        prove(model, small, [0, 3], new_tokens=8)
