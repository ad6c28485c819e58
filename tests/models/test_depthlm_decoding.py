"""DepthLM decodes like a decoder of transformers: caches, generate, attention backends, padding, packing, files."""

import json
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from depthlm import (
    KINDS,
    LAYERS,
    MOE_KINDS,
    expert_layers,
    naive_logits,
    random_ids,
    tiny_depthlm,
)
from depthscope.models import DepthLMForCausalLM, DepthLMModel

# Logits here have a standard deviation of about 1, and two orders of summation differ by up to 6e-6.
CLOSE = {"rtol": 0, "atol": 3e-5}
NEW_TOKENS = 12


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=MOE_KINDS)
def moe_kind(request: pytest.FixtureRequest) -> str:
    return request.param


@cache
def model_of(kind: str) -> DepthLMForCausalLM:
    """One model of each kind for the tests that leave it as it is."""
    return tiny_depthlm(kind)


@torch.no_grad()
def logits_of(model: DepthLMForCausalLM, ids: Tensor, **inputs: object) -> Tensor:
    """Logits without any cache."""
    return model(ids, use_cache=False, **inputs).logits


def greedily(model: DepthLMForCausalLM, ids: Tensor, **options: object) -> Tensor:
    """What generate adds to the prompts."""
    return model.generate(ids, do_sample=False, max_new_tokens=NEW_TOKENS, **options)[:, ids.shape[1] :]


def argmax_continuation(model: DepthLMForCausalLM, ids: Tensor) -> Tensor:
    """Greedy decoding by full forward passes."""
    for _ in range(NEW_TOKENS):
        ids = torch.cat([ids, logits_of(model, ids)[:, -1:].argmax(-1)], dim=1)
    return ids[:, -NEW_TOKENS:]


# --- what the kinds are worth as test cases -------------------------------------------------------------------------


def test_no_layer_of_any_kind_can_be_left_out_unnoticed(kind: str) -> None:
    model, ids = tiny_depthlm(kind), random_ids(2, 12)
    logits = logits_of(model, ids)
    for layer in model.model.layers:
        skip = layer.register_forward_hook(lambda module, inputs, output: inputs[0])
        assert (logits_of(model, ids) - logits).std() > 0.2 * logits.std()
        skip.remove()


def test_no_two_kinds_are_the_same_network() -> None:
    # All have the same seed, so two kinds that ignored their options would agree.
    ids = random_ids(1, 12)
    logits = [logits_of(model_of(kind), ids) for kind in KINDS]
    for one in range(len(logits)):
        for other in range(one):
            assert (logits[one] - logits[other]).abs().max() > 0.05


# --- caches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("static", [False, True], ids=["dynamic", "static"])
def test_decoding_with_a_cache_gives_the_logits_of_one_forward(kind: str, static: bool) -> None:
    model, ids = model_of(kind), random_ids(2, 14)
    past = StaticCache(config=model.config, max_cache_len=20) if static else DynamicCache(config=model.config)
    # A prompt, then two tokens at once (as in assisted decoding), then one by one, past the sliding window of five.
    steps = [(0, 4), (4, 6), *((at, at + 1) for at in range(6, 14))]
    with torch.no_grad():
        parts = [model(ids[:, start:end], past_key_values=past).logits for start, end in steps]
    torch.testing.assert_close(torch.cat(parts, dim=1), logits_of(model, ids), **CLOSE)


def test_a_forward_makes_its_own_cache_and_goes_on_from_it(kind: str) -> None:
    model, ids = model_of(kind), random_ids(2, 9)
    with torch.no_grad():
        first = model(ids[:, :-1], use_cache=True)
        second = model(ids[:, -1:], past_key_values=first.past_key_values)
    torch.testing.assert_close(second.logits, logits_of(model, ids)[:, -1:], **CLOSE)
    assert model(ids, use_cache=False).past_key_values is None


# --- generate -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", [None, "dynamic", "static"])
def test_greedy_generation_is_the_argmax_of_full_forwards(kind: str, implementation: str | None) -> None:
    model, ids = model_of(kind), random_ids(2, 7)
    generated = greedily(model, ids, cache_implementation=implementation, use_cache=implementation is not None)
    assert torch.equal(generated, argmax_continuation(model, ids))


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_with_router_outputs_switched_on_is_the_same(moe_kind: str, implementation: str) -> None:
    # Stock OLMoE fails here: the mask of a static cache does not fit its load-balancing loss.
    model, ids = tiny_depthlm(moe_kind, output_router_logits=True), random_ids(2, 7)
    generated = greedily(model, ids, cache_implementation=implementation)
    assert torch.equal(generated, argmax_continuation(model_of(moe_kind), ids))


@pytest.mark.parametrize("implementation", ["dynamic", "static"])
def test_generation_in_training_mode_is_the_same(moe_kind: str, implementation: str) -> None:
    # Trainers that sample from the model while it learns do not always switch it to evaluation.
    model, ids = tiny_depthlm(moe_kind).train(), random_ids(2, 7)
    generated = greedily(model, ids, cache_implementation=implementation)
    assert torch.equal(generated, argmax_continuation(model_of(moe_kind), ids))


def test_sampling_follows_the_seed_whatever_the_cache(kind: str) -> None:
    model, ids = model_of(kind), random_ids(4, 5)

    def sampled(seed: int, **options: object) -> Tensor:
        torch.manual_seed(seed)
        return model.generate(ids, do_sample=True, top_k=0, max_new_tokens=NEW_TOKENS, **options)

    first = sampled(0)
    assert torch.equal(sampled(0), first)
    assert torch.equal(sampled(0, cache_implementation="static"), first)
    assert not torch.equal(sampled(1), first)
    torch.manual_seed(0)
    only_the_best = model.generate(ids, do_sample=True, top_k=1, max_new_tokens=NEW_TOKENS)
    assert torch.equal(only_the_best[:, 5:], argmax_continuation(model, ids))


def test_the_scores_of_beams_are_the_likelihoods_of_their_texts(kind: str) -> None:
    # Wrong whenever reordering the cache between beams goes wrong.
    model, ids = model_of(kind), random_ids(2, 5)
    beams = model.generate(
        ids,
        num_beams=3,
        num_return_sequences=3,
        do_sample=False,
        max_new_tokens=NEW_TOKENS,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert len({tuple(text.tolist()) for text in beams.sequences}) == 6
    log_odds = logits_of(model, beams.sequences).log_softmax(-1)[:, :-1]
    chosen = log_odds.gather(-1, beams.sequences[:, 1:, None]).squeeze(-1)[:, -NEW_TOKENS:]
    # A beam's score is divided by its length.
    torch.testing.assert_close(beams.sequences_scores, chosen.mean(-1), rtol=0, atol=1e-5)


def test_prompts_of_different_lengths_continue_as_each_would_alone(kind: str) -> None:
    model = model_of(kind)
    prompts = [random_ids(1, length, seed=length) for length in (3, 8, 5)]
    ids, mask = torch.zeros(3, 8, dtype=torch.long), torch.zeros(3, 8, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, 8 - prompt.shape[1] :], mask[row, 8 - prompt.shape[1] :] = prompt, 1
    alone = torch.cat([argmax_continuation(model, prompt) for prompt in prompts])
    assert torch.equal(greedily(model, ids, attention_mask=mask), alone)
    assert torch.equal(greedily(model, ids, attention_mask=mask, cache_implementation="static"), alone)


# --- attention and experts by other means ---------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("implementation", ["sdpa", "flex_attention"])
def test_every_attention_implementation_gives_the_same_logits(kind: str, implementation: str) -> None:
    model, ids = tiny_depthlm(kind), random_ids(2, 12)
    model.set_attn_implementation("eager")
    expected = logits_of(model, ids)
    model.set_attn_implementation(implementation)
    # Uncompiled flex attention does the same in milliseconds; the next test compiles it once.
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(logits_of(model, ids), expected, **CLOSE)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
def test_compiled_flex_attention_gives_the_same_logits() -> None:
    model, ids = tiny_depthlm("gqa", sliding_window=5, num_hidden_layers=2), random_ids(2, 12)
    model.set_attn_implementation("eager")
    expected = logits_of(model, ids)
    model.set_attn_implementation("flex_attention")
    torch.testing.assert_close(logits_of(model, ids), expected, **CLOSE)


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
def test_every_expert_implementation_gives_the_same_logits(moe_kind: str, implementation: str) -> None:
    model, ids = tiny_depthlm(moe_kind), random_ids(1, 12)
    model.set_experts_implementation(implementation)
    assert model.config._experts_implementation == implementation
    torch.testing.assert_close(logits_of(model, ids)[0], naive_logits(model, ids[0]).float(), **CLOSE)


# --- padding and packing --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_logits(kind: str, side: str, implementation: str) -> None:
    model, ids = tiny_depthlm(kind), random_ids(2, 9)
    model.set_attn_implementation(implementation)
    expected = logits_of(model, ids)
    # The padding holds ordinary tokens: only the mask says that it is none.
    padding, nothing, everything = random_ids(2, 4, seed=1), torch.zeros(2, 4).long(), torch.ones(2, 9).long()
    if side == "left":
        padded, mask, kept = torch.cat([padding, ids], 1), torch.cat([nothing, everything], 1), slice(4, None)
    else:
        padded, mask, kept = torch.cat([ids, padding], 1), torch.cat([everything, nothing], 1), slice(None, 9)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    # Without positions the text stands four places later, which rotary embeddings do not see.
    for inputs in ({"position_ids": positions}, {}):
        logits = logits_of(model, padded, attention_mask=mask, **inputs)
        torch.testing.assert_close(logits[:, kept], expected, **CLOSE)
    # The same by a cache: the padded prompt, then one token.
    with torch.no_grad():
        past = model(padded[:, :-1], attention_mask=mask[:, :-1], use_cache=True).past_key_values
        last = model(padded[:, -1:], attention_mask=mask, past_key_values=past).logits
    if side == "left":
        torch.testing.assert_close(last, expected[:, -1:], **CLOSE)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("implementation", ["eager", "sdpa", "flex_attention"])
def test_packed_sequences_do_not_see_one_another(kind: str, implementation: str) -> None:
    model = tiny_depthlm(kind)
    texts = [random_ids(1, length, seed=length) for length in (6, 9, 3)]
    alone = torch.cat([logits_of(model, text) for text in texts], dim=1)
    model.set_attn_implementation(implementation)
    positions = torch.cat([torch.arange(text.shape[1]) for text in texts])[None]
    with torch.compiler.set_stance("force_eager"):
        packed = logits_of(model, torch.cat(texts, dim=1), position_ids=positions)
    torch.testing.assert_close(packed, alone, **CLOSE)


# --- outputs and inputs ---------------------------------------------------------------------------------------------


def test_hidden_states_are_the_stream_before_each_layer_and_the_normed_end(kind: str) -> None:
    model, ids = tiny_depthlm(kind), random_ids(2, 7)
    entering: list[Tensor] = []
    for layer in model.model.layers:
        layer.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    with torch.no_grad():
        outputs = model(ids, output_hidden_states=True)
        assert len(outputs.hidden_states) == LAYERS + 1
        assert all(torch.equal(*pair) for pair in zip(outputs.hidden_states[:-1], entering, strict=True))
        assert torch.equal(model.lm_head(outputs.hidden_states[-1]), outputs.logits)
        assert torch.equal(model.model(ids).last_hidden_state, outputs.hidden_states[-1])
    assert model(ids).hidden_states is None


def test_attentions_are_distributions_over_the_tokens_seen(kind: str) -> None:
    model, ids = tiny_depthlm(kind), random_ids(2, 9)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attentions = model(ids, output_attentions=True).attentions
    assert len(attentions) == LAYERS
    distance = torch.arange(9)[:, None] - torch.arange(9)
    for attention, layer_type in zip(attentions, model.config.layer_types, strict=True):
        assert attention.shape == (2, 4, 9, 9)
        torch.testing.assert_close(attention.sum(-1), torch.ones(2, 4, 9))
        seen = (distance >= 0) & ((distance < 5) | (layer_type == "full_attention"))
        assert (attention[..., seen] > 0).all()
        assert (attention[..., ~seen] == 0).all()


def test_router_logits_come_one_tensor_an_expert_layer(moe_kind: str) -> None:
    model, ids = tiny_depthlm(moe_kind), random_ids(3, 7)
    routed: list[Tensor] = []
    for layer in expert_layers(model):
        layer.mlp.gate.register_forward_hook(lambda module, inputs, output: routed.append(inputs[0] @ module.weight.T))
    with torch.no_grad():
        outputs = model(ids, output_router_logits=True)
        assert model(ids).router_logits is None
    assert len(outputs.router_logits) == len(model.config.moe_layer_indices) == (4 if moe_kind == "moe" else 2)
    for logits, expected in zip(outputs.router_logits, routed, strict=False):
        assert logits.shape == (3 * 7, 8)
        torch.testing.assert_close(logits, expected)


def test_a_step_of_decoding_has_router_logits_but_no_router_losses(moe_kind: str) -> None:
    # The mask of a cache is longer than the step, so losses over it would be wrong.
    model, ids = tiny_depthlm(moe_kind, output_router_logits=True), random_ids(2, 7)
    with torch.no_grad():
        prompt = model(ids, use_cache=True)
        step = model(ids[:, -1:], attention_mask=torch.ones(2, 8).long(), past_key_values=prompt.past_key_values)
    assert prompt.aux_loss is not None
    assert step.aux_loss is step.z_loss is None
    assert [logits.shape for logits in step.router_logits] == [(2, 8)] * len(expert_layers(model))


def test_a_dense_model_has_no_router_outputs() -> None:
    with torch.no_grad():
        outputs = model_of("dense")(random_ids(2, 5), output_router_logits=True)
    assert outputs.router_logits is outputs.aux_loss is outputs.z_loss is None


def test_bfloat16_stays_near_float32(kind: str) -> None:
    ids = random_ids(4, 12)
    expected = logits_of(model_of(kind), ids)
    logits = logits_of(tiny_depthlm(kind).to(torch.bfloat16), ids)
    assert logits.dtype == torch.bfloat16
    # The median over tokens: rounding may send a few tokens to other experts, whose logits then differ by more.
    errors = (logits.float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert errors.median() < 0.04


def test_logits_to_keep_keeps_the_last_or_the_chosen_ones(kind: str) -> None:
    model, ids = model_of(kind), random_ids(2, 9)
    logits = logits_of(model, ids)
    torch.testing.assert_close(logits_of(model, ids, logits_to_keep=2), logits[:, -2:], **CLOSE)
    chosen = torch.tensor([0, 4, 8])
    torch.testing.assert_close(logits_of(model, ids, logits_to_keep=chosen), logits[:, chosen], **CLOSE)


def test_embeddings_may_stand_in_for_tokens(kind: str) -> None:
    model, ids = model_of(kind), random_ids(2, 7)
    vectors = model.get_input_embeddings()(ids).detach()
    assert torch.equal(logits_of(model, None, inputs_embeds=vectors), logits_of(model, ids))
    generated = model.generate(inputs_embeds=vectors, do_sample=False, max_new_tokens=NEW_TOKENS)
    assert torch.equal(generated, argmax_continuation(model, ids))
    with pytest.raises(ValueError, match="exactly one"):
        model(input_ids=ids, inputs_embeds=vectors)


# --- saving and loading ---------------------------------------------------------------------------------------------


@pytest.fixture
def saved(kind: str, tmp_path: Path) -> Path:
    """A checkpoint of each kind."""
    model_of(kind).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize("loader", [DepthLMForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_saving_and_loading_changes_nothing(kind: str, loader: type, shard_size: str | None, tmp_path: Path) -> None:
    model, ids = model_of(kind), random_ids(2, 9)
    model.save_pretrained(tmp_path, **({"max_shard_size": shard_size} if shard_size else {}))
    assert (len(list(tmp_path.glob("*.safetensors"))) > 5) == bool(shard_size)
    loaded, info = loader.from_pretrained(tmp_path, output_loading_info=True)
    assert {name: list(keys) for name, keys in info.items()} == {
        "missing_keys": [],
        "unexpected_keys": [],
        "mismatched_keys": [],
        "error_msgs": [],
    }
    assert type(loaded) is DepthLMForCausalLM
    assert not loaded.training
    weights, loaded_weights = model.state_dict(), loaded.state_dict()
    assert weights.keys() == loaded_weights.keys()
    assert all(torch.equal(weight, loaded_weights[name]) for name, weight in weights.items())
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert loaded.config.to_diff_dict() | {"_name_or_path": None} == model.config.to_diff_dict() | {
        "_name_or_path": None
    }


def test_the_model_without_a_head_loads_from_the_same_files(kind: str, saved: Path) -> None:
    ids = random_ids(2, 9)
    bare = DepthLMModel.from_pretrained(saved)
    with torch.no_grad():
        assert torch.equal(bare(ids).last_hidden_state, model_of(kind).model(ids).last_hidden_state)


def test_checkpoints_keep_one_tensor_an_expert(tmp_path: Path) -> None:
    # As OLMoE and Qwen do, which is what other tools read.
    model_of("moe").save_pretrained(tmp_path)
    names = load_file(tmp_path / "model.safetensors").keys()
    experts = {name for name in names if name.startswith("model.layers.3.mlp.experts.")}
    assert experts == {
        f"model.layers.3.mlp.experts.{expert}.{part}_proj.weight"
        for expert in range(8)
        for part in ("gate", "up", "down")
    }


@pytest.mark.parametrize("shard_size", [None, "20KB"])
def test_tied_embeddings_are_saved_once_and_loaded_tied(shard_size: str | None, tmp_path: Path) -> None:
    model_of("tied").save_pretrained(tmp_path, **({"max_shard_size": shard_size} if shard_size else {}))
    names = [name for file in tmp_path.glob("*.safetensors") for name in load_file(file)]
    assert names.count("model.embed_tokens.weight") == 1
    assert "lm_head.weight" not in names
    loaded = DepthLMForCausalLM.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_loading_by_a_device_map(kind: str, saved: Path, device_map: str | dict) -> None:
    ids = random_ids(2, 9)
    loaded = DepthLMForCausalLM.from_pretrained(saved, device_map=device_map)
    expected = logits_of(model_of(kind), ids)
    logits = logits_of(loaded, ids.to(loaded.device)).cpu()
    if loaded.device.type == "cpu":
        assert torch.equal(logits, expected)
    else:
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def test_layers_left_on_the_disk_are_fetched_when_they_are_needed(kind: str, saved: Path, tmp_path: Path) -> None:
    model, ids = model_of(kind), random_ids(2, 9)
    # No room for all: accelerate decides, by _no_split_modules, what stays on the disk.
    size = sum(weight.numel() * 4 for weight in model.parameters())
    device_map = infer_auto_device_map(
        model, max_memory={"cpu": int(size * 0.6)}, no_split_module_classes=list(model._no_split_modules)
    )
    on_disk = [name for name, place in device_map.items() if place == "disk"]
    assert "model.layers.3" in on_disk
    assert not any(name.count(".") > 2 for name in device_map), "a layer was split"
    loaded = DepthLMForCausalLM.from_pretrained(saved, device_map=device_map, offload_folder=tmp_path / "offloaded")
    assert loaded.model.layers[3].self_attn.q_proj.weight.device.type == "meta"
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    assert torch.equal(greedily(loaded, ids), argmax_continuation(model, ids))


# --- damaged files --------------------------------------------------------------------------------------------------


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """A checkpoint to damage: experts in layers 1 and 3, each beside a shared one."""
    model_of("moe_shared").save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture
def damaged_shards(tmp_path: Path) -> Path:
    """The same in many files."""
    model_of("moe_shared").save_pretrained(tmp_path, max_shard_size="20KB")
    return tmp_path


def leave_out(folder: Path, prefix: str) -> None:
    """Write the weights again without those whose names begin so."""
    weights = load_file(folder / "model.safetensors")
    kept = {name: weight for name, weight in weights.items() if not name.startswith(prefix)}
    assert len(kept) < len(weights)
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("loader", [DepthLMForCausalLM, AutoModelForCausalLM])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.2.self_attn.q_proj.weight",
        "model.layers.2.mlp.down_proj.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.1.mlp.shared_expert.up_proj.weight",
        "model.layers.3.post_attention_layernorm.weight",
        "model.norm.weight",
        "lm_head.weight",
    ],
)
def test_a_checkpoint_that_lacks_a_weight_is_refused_by_its_name(damaged: Path, name: str, loader: type) -> None:
    leave_out(damaged, name)
    with pytest.raises(OSError, match=f"lacks 1 weight.*{name}"):
        loader.from_pretrained(damaged)
    _, info = loader.from_pretrained(damaged, output_loading_info=True)
    assert info["missing_keys"] == {name}
    assert isinstance(loader.from_pretrained(damaged, allow_missing_keys=True), DepthLMForCausalLM)


@pytest.mark.parametrize(
    "missing", ["experts.5.up_proj", "experts.5.down_proj", "experts.0.", "experts.5.", "experts.7.", "experts."]
)
def test_a_checkpoint_that_lacks_an_expert_is_refused_by_its_layer(damaged: Path, missing: str) -> None:
    leave_out(damaged, f"model.layers.1.mlp.{missing}")
    with pytest.raises(OSError, match=r"model\.layers\.1\.mlp\.experts"):
        DepthLMForCausalLM.from_pretrained(damaged)


def test_a_weight_without_a_place_is_refused_by_its_name(damaged: Path) -> None:
    weights = load_file(damaged / "model.safetensors")
    weights["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2, 2)
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"model\.layers\.7\.mlp\.up_proj\.weight"):
        DepthLMForCausalLM.from_pretrained(damaged)


def test_a_weight_of_another_shape_is_refused_by_its_name(damaged: Path) -> None:
    weights = load_file(damaged / "model.safetensors")
    weights["model.norm.weight"] = torch.ones(5)
    save_file(weights, damaged / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(OSError, match=r"model\.norm\.weight"):
        DepthLMForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_a_truncated_weights_file_is_refused_by_its_name(damaged: Path, kept: int) -> None:
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(OSError, match=r"model\.safetensors"):
        DepthLMForCausalLM.from_pretrained(damaged)


def test_a_truncated_shard_is_refused_by_its_name(damaged_shards: Path) -> None:
    shard = sorted(damaged_shards.glob("*.safetensors"))[2]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(OSError, match=shard.name):
        DepthLMForCausalLM.from_pretrained(damaged_shards)


def test_a_missing_shard_is_refused_by_its_name(damaged_shards: Path) -> None:
    shard = sorted(damaged_shards.glob("*.safetensors"))[2]
    shard.unlink()
    with pytest.raises(OSError, match=shard.name):
        DepthLMForCausalLM.from_pretrained(damaged_shards)


def test_weights_that_are_not_there_at_all_are_refused(damaged: Path) -> None:
    (damaged / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        DepthLMForCausalLM.from_pretrained(damaged)


@pytest.mark.parametrize("loader", [DepthLMForCausalLM, AutoModelForCausalLM])
def test_a_truncated_configuration_is_refused_by_its_name(damaged: Path, loader: type) -> None:
    text = (damaged / "config.json").read_text()
    (damaged / "config.json").write_text(text[: len(text) // 2])
    with pytest.raises(OSError, match=r"config\.json"):
        loader.from_pretrained(damaged)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("hidden_size", None),
        ("num_experts", "8"),
        ("norm_placement", "prae"),
        ("num_hidden_layers", 5),
        ("num_key_value_heads", 3),
        ("moe_layers", [0, 9]),
        ("norm_topk_probs", True),
    ],
)
def test_a_configuration_with_a_damaged_value_is_refused_by_the_option(
    damaged: Path, option: str, value: object
) -> None:
    settings = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(settings | {option: value}))
    # ValueError and the StrictDataclassErrors of huggingface_hub.
    with pytest.raises(Exception, match=option) as caught:
        DepthLMForCausalLM.from_pretrained(damaged)
    assert type(caught.value).__name__ in (
        "ValueError",
        "StrictDataclassFieldValidationError",
        "StrictDataclassClassValidationError",
    )


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"norm_placement": "peri"}, "attention_output_layernorm"),
        ({"norm_placement": "output"}, "input_layernorm"),
        ({"qk_norm": "head"}, "self_attn.k_norm"),
        ({"moe_layers": 4}, "layers.1.mlp"),
        ({"num_experts": 4}, "mlp.experts"),
        ({"num_experts": 12}, "mlp.experts"),
        ({"num_key_value_heads": 4}, "self_attn.k_proj"),
        ({"shared_expert_intermediate_size": None}, "shared_expert"),
    ],
)
def test_a_configuration_of_another_model_is_refused(damaged: Path, changes: dict, named: str) -> None:
    settings = json.loads((damaged / "config.json").read_text())
    (damaged / "config.json").write_text(json.dumps(settings | changes))
    with pytest.raises(OSError, match=named.replace(".", r"\.")):
        DepthLMForCausalLM.from_pretrained(damaged)
