"""Sizes: parameters by hand, FLOPs against those that torch counts, and a documentation that is current."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, LlamaConfig

from depthscope.models import PRESETS, DepthLMConfig
from depthscope.models.preset_table import preset_markdown
from depthscope.models.sizes import layer_sizes, model_size

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 90}


def test_parameters_of_a_dense_model_by_hand() -> None:
    size = model_size(DepthLMConfig(**SMALL, num_key_value_heads=2))
    attention, mlp, norms = 64 * 64 * 2 + 64 * 16 * 2, 3 * 64 * 96, 2 * 64
    assert size.total == size.active == 2 * 90 * 64 + 4 * (attention + mlp + norms) + 64


def test_parameters_of_experts_by_hand() -> None:
    config = DepthLMConfig(
        **SMALL,
        num_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        shared_expert_intermediate_size=16,
        moe_layers=2,
    )
    size = model_size(config)
    expert, shared, router, dense = 3 * 64 * 32, 3 * 64 * 16, 8 * 64, 3 * 64 * 96
    rest = 2 * 90 * 64 + 4 * (4 * 64 * 64 + 2 * 64) + 64 + 2 * dense + 2 * (shared + router)
    assert size.total == rest + 2 * 8 * expert
    assert size.active == rest + 2 * 2 * expert


@pytest.mark.parametrize(
    "options",
    [
        *({"norm_placement": placement} for placement in ("pre", "post", "peri", "mix", "output")),
        *({"num_experts": 4, "num_experts_per_tok": 2, "moe_layers": which} for which in ("all", 1, 3, 4, [0, 3])),
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_layers": 2, "norm_placement": "mix"},
        {"qk_norm": "full", "attention_bias": True, "tie_word_embeddings": True},
        {"layer_types": ["full_attention", "sliding_attention"] * 2, "sliding_window": 8},
    ],
)
def test_layers_counted_by_their_kind_are_all_the_layers_of_the_model(options: dict) -> None:
    config = DepthLMConfig(**SMALL, **options)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    sizes = layer_sizes(config)
    layers = [sum(weight.numel() for weight in layer.parameters()) for layer in model.model.layers]
    moe = set(config.moe_layer_indices)
    assert layers == [sizes.moe.total if layer in moe else sizes.dense.total for layer in range(len(layers))]
    assert (sizes.moe_layers, sizes.dense_layers) == (len(moe), len(layers) - len(moe))
    assert model_size(config).total == model.num_parameters() == sizes.rest.total + sum(layers)


@pytest.mark.parametrize("tied", [False, True])
def test_flops_are_those_that_torch_counts(tied: bool) -> None:
    length = 24
    config = DepthLMConfig(**SMALL, num_key_value_heads=2, tie_word_embeddings=tied)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    ids = torch.arange(length)[None]
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=ids).loss.backward()
    # Eager attention multiplies masked positions too: `length` of them instead of (length + 1) / 2 on average.
    masked = 12 * 64 * config.num_hidden_layers * (length - (length + 1) / 2)
    # torch counts the backward pass of the first layer's input as well, which an embedding needs: nothing is left out.
    assert counter.get_total_flops() == pytest.approx(
        length * (model_size(config, length).training_flops_per_token + masked), rel=2e-3
    )


def test_a_sliding_window_attends_to_fewer_positions() -> None:
    whole, window = (model_size(DepthLMConfig(**SMALL, sliding_window=w), 100) for w in (None, 10))
    attended = [sum(min(position + 1, w) for position in range(100)) / 100 for w in (100, 10)]
    difference = whole.training_flops_per_token - window.training_flops_per_token
    assert difference == pytest.approx(12 * 64 * 4 * (attended[0] - attended[1]), abs=1)


def test_other_architectures_are_counted_too() -> None:
    options = {**SMALL, "num_key_value_heads": 2, "max_position_embeddings": 128}
    assert model_size(LlamaConfig(**options)) == model_size(DepthLMConfig(**options))


@pytest.mark.parametrize(
    ("preset", "total", "active"),
    [("dense-1b", 1.28e9, 1.28e9), ("moe-7b-1b", 6.92e9, 1.28e9), ("moe-2b-400m", 1.98e9, 0.4e9)],
)
def test_the_papers_models_have_the_sizes_of_their_names(preset: str, total: float, active: float) -> None:
    size = model_size(DepthLMConfig.from_preset(preset))
    assert (size.total, size.active) == (pytest.approx(total, rel=0.01), pytest.approx(active, rel=0.01))


def test_small_presets_have_the_sizes_of_their_names() -> None:
    for name in PRESETS:
        kind, _, millions = name.rpartition("-")
        if kind in ("dense", "moe") and int(millions[:-1]) <= 30 and millions.endswith("m"):
            assert model_size(DepthLMConfig.from_preset(name)).total == pytest.approx(int(millions[:-1]) * 1e6, rel=0.2)


def test_the_documented_table_is_current() -> None:
    document = (Path(__file__).parents[2] / "docs" / "presets.md").read_text()
    assert document.partition("<!-- presets -->\n")[2].partition("\n<!-- /presets -->")[0] == preset_markdown()
