"""Weight sparsity is that of the weights that act: adapters merged in, masks and parametrizations applied."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoHaConfig, LoraConfig, OFTConfig, PeftModel, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.weight_norm import weight_norm
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

from depthscope import LayerReport, analyze
from depthscope.callbacks import SparsityCallback, read_history
from depthscope.layers.acting_weights import NoWeightsError
from depthscope.scores.weight_sparsity import WEIGHT_METRICS, weight_sparsity
from models import random_blocks, tiny_llama
from runs import trainer


def tiny_mixtral() -> PreTrainedModel:
    torch.manual_seed(0)
    sizes = {"vocab_size": 90, "hidden_size": 24, "intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "initializer_range": 0.3}
    return AutoModelForCausalLM.from_config(MixtralConfig(**sizes, **heads)).eval()


def lora(model: nn.Module, **options: Any) -> PeftModel:
    return get_peft_model(model, LoraConfig(**{"r": 4, "target_modules": ["q_proj", "down_proj"], **options}))


def two_adapters(model: nn.Module) -> PeftModel:
    adapted = lora(model)
    adapted.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    adapted.base_model.set_adapter(["default", "other"])
    return adapted


FEED_FORWARD = {"target_modules": ["k_proj", "down_proj"], "feedforward_modules": ["down_proj"]}
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ADAPTED: dict[str, tuple[Callable[[], PreTrainedModel], Callable[[nn.Module], PeftModel]]] = {
    "lora": (tiny_llama, lora),
    "dora": (tiny_llama, lambda model: lora(model, use_dora=True)),
    "rslora": (tiny_llama, lambda model: lora(model, use_rslora=True, lora_alpha=32)),
    "saved": (tiny_llama, lambda model: lora(model, modules_to_save=["up_proj"])),
    "ia3": (tiny_llama, lambda model: get_peft_model(model, IA3Config(**FEED_FORWARD))),
    "loha": (tiny_llama, lambda model: get_peft_model(model, LoHaConfig(r=4, target_modules=["q_proj"]))),
    "oft": (tiny_llama, lambda model: get_peft_model(model, OFTConfig(oft_block_size=8, target_modules=["q_proj"]))),
    "experts": (tiny_mixtral, lambda model: lora(model, target_modules=["q_proj"], target_parameters=EXPERTS)),
    "all linear": (tiny_mixtral, lambda model: lora(model, target_modules="all-linear")),
}


def sparsity_of(model: nn.Module) -> list[float]:
    inner = model.get_base_model() if isinstance(model, PeftModel) else model
    return [value for layer in inner.model.layers for value in weight_sparsity(layer).values()]


def train(model: nn.Module) -> None:
    """Change whatever is trained, by a lot."""
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad:
                weight.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(weight.numel())) * 0.3)


@pytest.mark.parametrize("method", ADAPTED)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_what_merging_it_does(method: str) -> None:
    build, adapt = ADAPTED[method]
    base = sparsity_of(build())
    model = adapt(build())
    assert sparsity_of(model) == base
    train(model)
    before = copy.deepcopy(model.state_dict())
    acting = sparsity_of(model)
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert not any(getattr(module, "merged_adapters", None) for module in model.modules())
    with model.disable_adapter():
        assert sparsity_of(model) == base
    merged = sparsity_of(copy.deepcopy(model).merge_and_unload())
    assert acting == merged
    assert merged != base
    model.merge_adapter()
    assert sparsity_of(model) == merged
    with model.disable_adapter():  # as the next forward pass will be, which takes the adapter out again
        assert sparsity_of(model) == pytest.approx(base, abs=1e-6)
    assert any(getattr(module, "merged_adapters", None) for module in model.modules())


def test_all_adapters_that_act_are_merged_and_no_other() -> None:
    model = two_adapters(tiny_llama())
    train(model)
    both = sparsity_of(model)
    assert both == pytest.approx(sparsity_of(copy.deepcopy(model).merge_and_unload()), abs=1e-6)
    model.set_adapter("default")
    alone = sparsity_of(model)
    assert alone != both
    report = measured(model)
    assert "of the base with adapter default merged in; adapter other does not act." in report.notes[-1]
    with model.disable_adapter():
        assert "the base's own; adapter default, other does not act." in measured(model).notes[-1]


def test_what_a_half_precision_adapter_adds_is_not_rounded_away() -> None:
    model = lora(tiny_llama().bfloat16())
    base = sparsity_of(model)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.fill_(1e-5)  # far below the rounding of the base's weights
    assert sparsity_of(model) != base


def measured(model: nn.Module, **options: Any) -> LayerReport:
    settings = {"fit_blocks": 0, "eval_blocks": 2, "scores": "weight_sparsity", **options}
    return analyze(model, blocks=random_blocks(2, 8), **settings)


def test_a_report_says_whose_weights_it_measured() -> None:
    assert not any("weight_sparsity" in note for note in measured(tiny_llama()).notes)
    model = lora(tiny_llama())
    report = measured(model)
    assert "with adapter default merged in" in report.notes[-1]
    assert [row["weight_hoyer"] for row in report.layers] == [
        row["weight_hoyer"] for row in measured(tiny_llama()).layers
    ]
    assert not any("weight_sparsity" in note for note in measured(model, scores="variance").notes)


def masked(linear: nn.Linear) -> torch.Tensor:
    prune.l1_unstructured(linear, "weight", amount=0.5)
    linear.weight_orig.data *= 3  # a step of training: what was set at the last forward pass is out of date
    return linear.weight_orig * linear.weight_mask


def normed(linear: nn.Linear) -> torch.Tensor:
    weight_norm(linear)
    linear.weight_g.data *= torch.linspace(0.1, 9, 16)[:, None]
    return linear.weight_v / linear.weight_v.norm(dim=1, keepdim=True) * linear.weight_g


def orthogonal(linear: nn.Linear) -> torch.Tensor:
    return parametrizations.orthogonal(linear).weight


@pytest.mark.parametrize("change", [masked, normed, orthogonal])
def test_what_a_weight_is_made_of_is_not_the_weight(change: Callable[[nn.Linear], torch.Tensor]) -> None:
    torch.manual_seed(0)
    linear, plain = nn.Linear(24, 16, bias=False), nn.Linear(24, 16, bias=False)
    weight = change(linear)
    with torch.no_grad():
        plain.weight.copy_(weight)
    assert weight_sparsity(linear) == pytest.approx(weight_sparsity(plain), abs=1e-6)


def test_a_matrix_of_zeros_is_the_sparsest() -> None:
    layer = nn.ModuleList([nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)])
    nn.init.zeros_(layer[0].weight)
    assert weight_sparsity(layer[0]) == pytest.approx(dict.fromkeys(WEIGHT_METRICS, 1.0))
    for name, value in weight_sparsity(layer).items():
        assert value == pytest.approx((1 + weight_sparsity(layer[1])[name]) / 2), name
    experts = nn.Parameter(torch.zeros(4, 8, 8))
    experts.data[1:] = torch.randn(3, 8, 8)
    layer = nn.ParameterList([experts])
    assert weight_sparsity(layer)["weights_below_1pct"] >= 0.25
    small = nn.Linear(8, 8, bias=False)
    with torch.no_grad():
        small.weight.copy_(layer[0][1] * 1e-30)  # its squares are less than the smallest number
    large = nn.ParameterList([experts[1:2]])
    assert weight_sparsity(small) == pytest.approx(weight_sparsity(large), rel=1e-5)


def test_a_layer_whose_weights_cannot_be_had_is_left_out_and_said() -> None:
    model = tiny_llama()
    codes = torch.randint(-9, 9, (48, 24), dtype=torch.int8)
    model.model.layers[1].mlp.extra = nn.Module()
    model.model.layers[1].mlp.extra.register_buffer("qweight", codes)
    with pytest.raises(NoWeightsError, match="int8"):
        weight_sparsity(model.model.layers[1])
    report = measured(model)
    assert [row["weight_hoyer"] is None for row in report.layers] == [False, True, False, False]
    assert any("has no values in layer 1: Module holds codes of type torch.int8." in note for note in report.notes)


def test_a_training_with_an_adapter_logs_the_weights_that_act(tmp_path: Path) -> None:
    model = lora(tiny_llama())
    trainer(model, tmp_path, [SparsityCallback(every=1, sequences=0)], max_steps=2, logging_steps=2).train()
    merged = model.merge_and_unload()
    layers = read_history(tmp_path)[-1]["layers"]
    for index, layer in enumerate(merged.model.layers):
        found = [layers[name][index] for name in WEIGHT_METRICS]
        np.testing.assert_allclose(found, list(weight_sparsity(layer).values()), rtol=1e-5)
