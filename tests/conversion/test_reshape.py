"""Changing the shape of a DepthLM: pooled and repeated heads, upcycled experts, added layers."""

from typing import Any

import pytest
import torch

from depthlm import KINDS, tiny_depthlm
from depthscope.conversion import deepen, to_gqa, upcycle
from depthscope.conversion.assemble import largest_logit_difference
from depthscope.errors import ConversionError
from depthscope.models import DepthLMForCausalLM

DENSE = [kind for kind in KINDS if not kind.startswith("moe")]


def same_weights(one: DepthLMForCausalLM, other: DepthLMForCausalLM) -> bool:
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


@pytest.mark.parametrize("options", [{}, {"qk_norm": "full"}, {"qk_norm": "head", "attention_bias": True}], ids=str)
def test_repeating_heads_changes_nothing_and_pooling_takes_it_back(options: dict[str, Any]) -> None:
    model = tiny_depthlm(num_key_value_heads=2, **options)
    repeated = to_gqa(model, 4)
    assert repeated.config.num_key_value_heads == 4
    assert largest_logit_difference(model, repeated) < 1e-5
    assert same_weights(to_gqa(repeated, 2), model)


def test_pooled_heads_are_the_mean_of_those_they_stand_for() -> None:
    model = tiny_depthlm(attention_bias=True)
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.v_proj.bias.normal_()
    pooled = to_gqa(model, 2).model.layers[1].self_attn
    original = model.model.layers[1].self_attn
    width = model.config.head_dim
    for name in ("k_proj", "v_proj"):
        heads = getattr(original, name).weight.split(width)
        torch.testing.assert_close(getattr(pooled, name).weight[:width], (heads[0] + heads[1]) / 2)
        torch.testing.assert_close(getattr(pooled, name).weight[width:], (heads[2] + heads[3]) / 2)
    biases = original.v_proj.bias.split(width)
    torch.testing.assert_close(pooled.v_proj.bias[width:], (biases[2] + biases[3]) / 2)


def test_a_number_of_heads_that_cannot_be_had_is_refused() -> None:
    with pytest.raises(ConversionError, match="4 key and value heads can become 1, 2 or 4, not 3"):
        to_gqa(tiny_depthlm(), 3)
    with pytest.raises(ConversionError, match="not 8"):
        to_gqa(tiny_depthlm(), 8)
    with pytest.raises(ConversionError, match="not 0"):
        to_gqa(tiny_depthlm(), 0)


@pytest.mark.parametrize("kind", DENSE)
def test_an_upcycled_model_starts_with_the_same_output(kind: str) -> None:
    # Weights that do not blow up rounding: the sum of a token's expert weights is 1 only to the last bit.
    model = tiny_depthlm(kind, initializer_range=0.1)
    sparse = upcycle(model, 6, 3, moe_layers=2)
    assert sparse.config.moe_layer_indices == [1, 3]
    assert largest_logit_difference(model, sparse) < 1e-5


def test_upcycled_experts_are_copies_that_training_lets_differ() -> None:
    model = tiny_depthlm()
    sparse = upcycle(model, 4, 2).train()
    experts = sparse.model.layers[0].mlp.experts
    assert all(torch.equal(experts.down_proj[0], expert) for expert in experts.down_proj)
    ids = torch.arange(3, 35)[None]
    optimizer = torch.optim.SGD(sparse.parameters(), lr=0.1)
    sparse(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(experts.down_proj[0], experts.down_proj[1])


def test_upcycling_is_seeded_and_says_what_it_cannot_do() -> None:
    model = tiny_depthlm()
    assert same_weights(upcycle(model, 4, 2, seed=1), upcycle(model, 4, 2, seed=1))
    assert not same_weights(upcycle(model, 4, 2, seed=1), upcycle(model, 4, 2, seed=2))
    with pytest.raises(ConversionError, match="has 8 experts already"):
        upcycle(tiny_depthlm("moe"), 4, 2)
    with pytest.raises(ConversionError, match="biases"):
        upcycle(tiny_depthlm(mlp_bias=True), 4, 2)
    with pytest.raises(ConversionError, match=r"num_experts_per_tok must be from 1 to num_experts \(4\), got 5"):
        upcycle(model, 4, 5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "post"])
def test_added_layers_may_start_as_the_identity(kind: str) -> None:
    model = tiny_depthlm(kind)
    deeper = deepen(model, 10, preserve_function=True)
    assert deeper.config.num_hidden_layers == 10
    assert largest_logit_difference(model, deeper) == 0
    ids = torch.arange(3, 35)[None]
    deeper.train()(ids, labels=ids).loss.backward()
    added = deeper.model.layers[9].parameters()
    assert any(weight.grad is not None and weight.grad.abs().max() > 0 for weight in added)


@pytest.mark.parametrize("kind", KINDS)
def test_a_stacked_model_repeats_its_layers(kind: str) -> None:
    model = tiny_depthlm(kind)
    deeper = deepen(model, 7)
    config = deeper.config
    assert config.layer_types == (model.config.layer_types * 2)[:7]
    assert config.moe_layer_indices == [layer for layer in range(7) if layer % 4 in model.config.moe_layer_indices]
    for layer in range(7):
        ours, theirs = deeper.model.layers[layer].state_dict(), model.model.layers[layer % 4].state_dict()
        assert [tuple(weight.shape) for weight in ours.values()] == [tuple(weight.shape) for weight in theirs.values()]
        assert all(torch.equal(one, other) for one, other in zip(ours.values(), theirs.values(), strict=True))
    assert [layer.norm_factor for layer in deeper.model.layers] == [config.norm_factor_of(layer) for layer in range(7)]


def test_what_cannot_be_deepened_is_refused() -> None:
    with pytest.raises(ConversionError, match="has 4 layers; deepen needs more than that, not 4"):
        deepen(tiny_depthlm(), 4)
    with pytest.raises(ConversionError, match="Post-LN"):
        deepen(tiny_depthlm("post"), 6, preserve_function=True)
