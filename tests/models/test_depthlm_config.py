"""DepthLMConfig: what can be built, what is refused and in which words, presets, and going to a file and back."""

from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig

from depthscope.models import PRESETS, DepthLMConfig

SMALL = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 8, "vocab_size": 90}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"num_key_value_heads": 3},
            r"num_key_value_heads must divide num_attention_heads \(8\): one of \[1, 2, 4, 8\]",
        ),
        ({"num_key_value_heads": 16}, "must divide"),
        ({"num_attention_heads": 7}, "not a multiple of num_attention_heads"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
        ({"hidden_size": -64}, "hidden_size must be at least 1, got -64"),
        ({"num_hidden_layers": 0}, "num_hidden_layers must be at least 1"),
        ({"intermediate_size": -1}, "intermediate_size must be at least 1"),
        ({"vocab_size": 0}, "vocab_size must be at least 1"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"sliding_window": 0}, "sliding_window must be at least 1"),
        ({"layer_types": ["sliding_attention"] * 4}, "give sliding_window"),
        ({"layer_types": ["full_attention"] * 3}, "num_hidden_layers"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types may hold full_attention and sliding_attention"),
        ({"attention_dropout": 1.0}, "attention_dropout must be at least 0 and below 1"),
        ({"norm_placement": "sandwich"}, "norm_placement must be one of 'pre', 'post', 'peri', 'mix', 'output'"),
        ({"norm_scaling": "width"}, "norm_scaling must be one of 'none', 'depth'"),
        ({"qk_norm": "layer"}, "qk_norm must be one of None, 'head', 'full'"),
        ({"hidden_act": "swiglu"}, "hidden_act must be one of"),
        ({"norm_scaling": "depth", "norm_placement": "post"}, "use 'pre' or 'peri'"),
        ({"norm_scaling": "depth", "norm_placement": "mix"}, "use 'pre' or 'peri'"),
        ({"norm_scaling": "depth", "norm_placement": "output"}, "use 'pre' or 'peri'"),
        ({"norm_placement": "mix", "mix_post_layers": 4}, "mix_post_layers must be from 1 to 3"),
        ({"mix_post_layers": 2}, "mix_post_layers is for norm_placement='mix'"),
        ({**EXPERTS, "num_experts_per_tok": 9}, r"num_experts_per_tok must be from 1 to num_experts \(8\), got 9"),
        ({**EXPERTS, "num_experts_per_tok": 0}, "num_experts_per_tok must be at least 1"),
        ({"num_experts": 0}, "num_experts must be at least 1"),
        ({**EXPERTS, "moe_intermediate_size": -5}, "moe_intermediate_size must be at least 1"),
        ({**EXPERTS, "shared_expert_intermediate_size": 0}, "shared_expert_intermediate_size must be at least 1"),
        ({**EXPERTS, "moe_layers": 5}, "moe_layers must be 'all', a step from 1 to 4, or a list of different layers"),
        ({**EXPERTS, "moe_layers": 0}, "a step from 1 to 4"),
        ({**EXPERTS, "moe_layers": [1, 4]}, "from 0 to 3"),
        ({**EXPERTS, "moe_layers": [1, 1]}, "different layers"),
        ({**EXPERTS, "moe_layers": []}, "moe_layers must be"),
        ({**EXPERTS, "moe_layers": "even"}, "moe_layers must be 'all'"),
        ({**EXPERTS, "router_aux_loss_coef": -0.1}, "router_aux_loss_coef must be 0 or more"),
        ({**EXPERTS, "mlp_bias": True}, "experts have no biases"),
        ({"moe_layers": 2}, "give num_experts too"),
        ({"moe_intermediate_size": 32}, "give num_experts too"),
        ({"shared_expert_intermediate_size": 32}, "give num_experts too"),
        ({"norm_placment": "post"}, "has no option 'norm_placment': did you mean 'norm_placement'"),
        ({"num_expert": 4}, "did you mean 'num_experts'"),
        ({"num_experts": "eight"}, "num_experts"),
        ({"moe_layers": 1.5, **EXPERTS}, "moe_layers"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_what_cannot_be_built_is_refused_at_construction(options: dict[str, object], said: str) -> None:
    with pytest.raises((ValueError, StrictDataclassError), match=said):
        DepthLMConfig(**{**SMALL, **options})


def test_the_defaults_are_the_papers_dense_model() -> None:
    config = DepthLMConfig()
    for name, value in PRESETS["dense-1b"].items():
        assert getattr(config, name) == value


def test_which_layers_have_experts() -> None:
    def layers(moe_layers: str | int | list[int]) -> list[int]:
        return DepthLMConfig(**SMALL, **EXPERTS, moe_layers=moe_layers).moe_layer_indices

    assert layers("all") == [0, 1, 2, 3]
    assert layers(1) == [0, 1, 2, 3]
    assert layers(2) == [1, 3]
    assert layers(3) == [2]
    assert layers([3, 0]) == [0, 3]
    assert DepthLMConfig(**SMALL).moe_layer_indices == []


def test_mix_places_post_norms_in_the_first_quarter_by_default() -> None:
    config = DepthLMConfig(**{**SMALL, "num_hidden_layers": 12}, norm_placement="mix")
    assert [config.norm_placement_of(layer) for layer in range(12)] == ["post"] * 3 + ["pre"] * 9


def test_norm_factors_are_those_of_layernorm_scaling() -> None:
    config = DepthLMConfig(**SMALL, norm_scaling="depth")
    assert [config.norm_factor_of(layer) for layer in range(4)] == pytest.approx([1, 2**-0.5, 3**-0.5, 0.5])


def test_depth_scaled_initialisation_beside_layernorm_scaling_warns(caplog: pytest.LogCaptureFixture) -> None:
    import logging

    from depthscope.models.configuration_depthlm import logger

    logger.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING):
            DepthLMConfig(**SMALL, norm_scaling="depth")
            DepthLMConfig(**SMALL, depth_scaled_init=True)
            assert not caplog.records
            DepthLMConfig(**SMALL, norm_scaling="depth", depth_scaled_init=True)
    finally:
        logger.removeHandler(caplog.handler)
    assert "loses its effect" in caplog.text


def test_an_unknown_preset_is_refused_with_the_names_there_are() -> None:
    with pytest.raises(ValueError, match=r"no preset 'dense-3b'\. The presets are: dense-1b, .*recipe"):
        DepthLMConfig.from_preset("dense-3b")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_survives_a_file(name: str, tmp_path: Path) -> None:
    config = DepthLMConfig.from_preset(name, num_hidden_layers=4)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert type(read) is DepthLMConfig
    where = {"_name_or_path": "", "auto_map": None}
    assert {**read.to_dict(), **where} == {**config.to_dict(), **where}


def test_the_papers_shapes() -> None:
    """The numbers of its released configurations (arXiv 2603.15389)."""
    dense, moe, recipe = (DepthLMConfig.from_preset(name) for name in ("dense-1b", "moe-7b-1b", "recipe"))
    assert (dense.hidden_size, dense.num_attention_heads, dense.intermediate_size) == (2048, 16, 8192)
    assert (moe.num_experts, moe.num_experts_per_tok, moe.router_aux_loss_coef) == (64, 8, 0.01)
    assert (recipe.num_hidden_layers, recipe.num_attention_heads // recipe.num_key_value_heads) == (32, 2)
    for name in PRESETS:
        config = DepthLMConfig.from_preset(name)
        assert not config.tie_word_embeddings
        assert config.initializer_range == 0.02
