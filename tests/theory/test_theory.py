"""The theory of the variance: what it predicts of random models is what random models do, and what it says is so."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, LlamaConfig, MixtralConfig

from depthscope import DepthLMConfig, DepthLMForCausalLM, LayerReport, LayerStack, analyze
from depthscope.conversion import to_native
from depthscope.errors import ConversionError, ReportError, SettingsError
from depthscope.theory import (
    VariancePrediction,
    decayed_std,
    equilibrium_std,
    predict_from_model,
    predict_variance,
    variance_theory,
)
from depthscope.theory.moments import (
    averaged_correlation,
    correlation,
    gated_correlation,
    gated_second_moment,
    router_moments,
)
from models import tiny_llama
from reports import sample_report

LAYERS, LENGTH, SEEDS = 5, 48, 4
SHAPE: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 96,
    "intermediate_size": 192,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 6,
    "initializer_range": 0.1,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {},
    "small weights": {"initializer_range": 0.02},
    "one KV head": {"num_key_value_heads": 1},
    "LayerNorm Scaling": {"norm_scaling": "depth"},
    "experts": EXPERTS,
    "experts whose weights sum to 1": {**EXPERTS, "norm_topk_prob": True},
    "experts beside a shared one": {**EXPERTS, "shared_expert_intermediate_size": 64},
    "experts in every second layer": {**EXPERTS, "moe_layers": 2},
    "peri": {"norm_placement": "peri"},
    "post": {"norm_placement": "post"},
    "mix": {"norm_placement": "mix"},
    "output": {"norm_placement": "output"},
    "norms of queries and keys": {"qk_norm": "head", "initializer_range": 0.02},
    "outputs near the epsilon of their norm": {"norm_placement": "peri", "initializer_range": 0.01},
    "windows": {"sliding_window": 8},
    "shrunken output projections": {"depth_scaled_init": True},
}


def config(**changes: Any) -> DepthLMConfig:
    return DepthLMConfig(**{**SHAPE, **changes})


def model(seed: int = 0, **changes: Any) -> DepthLMForCausalLM:
    torch.manual_seed(seed)
    return DepthLMForCausalLM(config(**changes)).eval()


def token_ids(rows: int = 4, length: int = LENGTH) -> Tensor:
    return torch.randint(SHAPE["vocab_size"], (rows, length), generator=torch.Generator().manual_seed(1))


def measured(one: Any, ids: Tensor | None = None) -> LayerReport:
    ids = token_ids() if ids is None else ids
    return analyze(one, blocks=ids, scores="variance", fit_blocks=0, eval_blocks=len(ids), progress=False)


def mean_over_seeds(column: str, build: Callable[[int], Any]) -> np.ndarray:
    """A column of the reports of models that differ in their seed: the mean, [L]."""
    return np.mean([measured(build(seed)).column(column) for seed in range(SEEDS)], axis=0)


# ---------------------------------------------------------------------------------------------------- at initialisation


@pytest.mark.parametrize("kind", KINDS)
def test_the_variance_after_every_layer_is_predicted_from_the_configuration_alone(kind: str) -> None:
    # A matrix of width 96 has a gain that varies by some percent with the seed, and four seeds are averaged.
    predicted = predict_variance(config(**KINDS[kind]), token_ids())
    reports = [measured(model(seed, **KINDS[kind])) for seed in range(SEEDS)]
    for column, tolerance in (("variance", 0.08), ("mlp_variance", 0.15), ("attention_variance", 0.2)):
        found = np.mean([report.column(column) for report in reports], axis=0)
        np.testing.assert_allclose(getattr(predicted, column), found, rtol=tolerance, err_msg=column)


@pytest.mark.parametrize("kind", ["dense", "experts", "experts beside a shared one"])
def test_how_alike_the_streams_at_two_positions_become_is_predicted(kind: str) -> None:
    found = []
    for seed in range(SEEDS):
        stack = LayerStack(model(seed, **KINDS[kind]))
        with torch.no_grad(), stack.capture() as seen:
            stack.logits(token_ids())
        units = torch.nn.functional.normalize(seen.resid_post[LAYERS - 1], dim=-1)  # [B, T, d]
        cosines = units @ units.mT
        found.append((cosines.sum((1, 2)) - LENGTH).mean().item() / (LENGTH * (LENGTH - 1)))
    predicted = predict_variance(config(**KINDS[kind]), token_ids()).position_correlation
    assert predicted[-1] == pytest.approx(np.mean(found), rel=0.1)


@pytest.mark.parametrize("kind", ["dense", "experts"])
@pytest.mark.parametrize("density", [0.5, 0.2])
def test_masking_weights_leaves_the_variance_that_is_predicted_for_their_density(density: float, kind: str) -> None:
    def masked(seed: int) -> DepthLMForCausalLM:
        one = model(seed, **KINDS[kind])
        with torch.no_grad():
            for name, weight in one.model.layers.named_parameters():
                if weight.dim() >= 2 and ".gate.weight" not in name:
                    weight.mul_(torch.rand_like(weight) < density)
        return one

    predicted = predict_variance(config(**KINDS[kind]), token_ids(), density=density)
    np.testing.assert_allclose(predicted.variance, mean_over_seeds("variance", masked), rtol=0.08)


def test_masking_weights_shrinks_attention_by_the_square_and_a_small_mlp_by_the_cube_of_the_density() -> None:
    small = config(initializer_range=0.002)  # logits near 0, and silu near x / 2
    whole, masked = predict_variance(small, LENGTH), predict_variance(small, LENGTH, density=0.5)
    assert masked.attention_variance[0] / whole.attention_variance[0] == pytest.approx(0.5**2, rel=1e-3)
    assert masked.mlp_variance[0] / whole.mlp_variance[0] == pytest.approx(0.5**3, rel=1e-3)


@pytest.mark.parametrize("density", [0.5, 0.2])
def test_attention_that_sees_a_random_share_of_the_positions_writes_what_is_predicted(density: float) -> None:
    written = []
    for seed in range(SEEDS):
        one = model(seed)
        one.set_attn_implementation("eager")
        kept = (torch.rand(4, 1, LENGTH, LENGTH) < density) | torch.eye(LENGTH, dtype=torch.bool)
        mask = torch.zeros(kept.shape).masked_fill(~kept.tril(), torch.finfo(torch.float32).min)
        with torch.no_grad(), LayerStack(one).capture(sublayers=True) as seen:
            one(token_ids(), attention_mask=mask)
        written.append([seen.attn_out[layer].var(-1).mean().item() for layer in range(LAYERS)])
    predicted = predict_variance(config(), token_ids(), attention_density=density).attention_variance
    np.testing.assert_allclose(predicted, np.mean(written, axis=0), rtol=0.15)


def test_sparser_attention_adds_more_to_the_first_layer_and_longer_context_less() -> None:
    def first(length: int, density: float = 1.0) -> float:
        return predict_variance(config(), length, attention_density=density).attention_variance[0]

    assert first(64, 0.2) > 1.5 * first(64, 0.5) > 1.5 * first(64)
    assert first(32) > 1.5 * first(64) > 1.5 * 1.5 * first(128)


def test_repeated_tokens_raise_what_attention_writes() -> None:
    ids = token_ids() % 4
    repeated, different = predict_variance(config(), ids), predict_variance(config(), LENGTH)
    assert repeated.attention_variance[0] > 2 * different.attention_variance[0]
    found = np.mean([measured(model(seed), ids).column("attention_variance")[0] for seed in range(SEEDS)])
    # Four embeddings of width 96 are no large sample: their own correlations vary with the seed.
    assert repeated.attention_variance[0] == pytest.approx(found, rel=0.25)


# ------------------------------------------------------------------------------------------- what the theory says


def test_a_dense_pre_ln_stack_grows_by_nearly_the_same_in_every_layer() -> None:
    growth = np.diff(predict_variance(config(num_hidden_layers=32), 256).variance)
    assert growth.max() < 1.5 * growth.min()


def test_layernorm_scaling_lets_mlps_fall_with_the_square_of_the_layer() -> None:
    small = {"num_hidden_layers": 8, "initializer_range": 0.01, "norm_scaling": "depth"}
    written = predict_variance(config(**small), LENGTH).mlp_variance
    np.testing.assert_allclose(written[0] / written, np.arange(1, 9) ** 2, rtol=0.03)


def test_sharing_key_value_heads_changes_no_prediction() -> None:
    one, all_heads = predict_variance(config(num_key_value_heads=1), LENGTH), predict_variance(config(), LENGTH)
    np.testing.assert_array_equal(one.variance, all_heads.variance)


def test_experts_weighted_by_an_unnormalised_softmax_write_less_the_more_of_them_there_are() -> None:
    def written(**changes: Any) -> float:
        return predict_variance(config(**{**EXPERTS, **changes}), LENGTH).mlp_variance[0]

    assert written(num_experts=32) < 0.5 * written()
    # Where the weights sum to 1, the number of experts that are not chosen hardly matters: what damps is averaging.
    normalised = written(norm_topk_prob=True)
    assert written(norm_topk_prob=True, num_experts=32) == pytest.approx(normalised, rel=0.15)
    assert written(norm_topk_prob=True, num_experts_per_tok=1) > 1.5 * normalised
    dense = predict_variance(config(intermediate_size=96), LENGTH).mlp_variance[0]
    assert written(norm_topk_prob=True, num_experts_per_tok=1) == pytest.approx(dense)


def test_the_share_of_a_deep_layer_hardly_depends_on_the_density_once_the_embeddings_are_outgrown() -> None:
    def last_share(density: float) -> float:
        stack = predict_variance(config(num_hidden_layers=32, initializer_range=0.2), 64, density=density)
        return 1 - stack.variance[-2] / stack.variance[-1]

    assert last_share(1.0) == pytest.approx(1 / 32, rel=0.15)
    assert last_share(0.5) == pytest.approx(last_share(1.0), rel=0.15)


# ----------------------------------------------------------------------------------------------------- from a model


@pytest.mark.parametrize("kind", ["dense", "experts beside a shared one", "LayerNorm Scaling", "peri", "post"])
def test_from_a_model_the_size_of_every_matrix_and_norm_counts(kind: str) -> None:
    def stretched(seed: int) -> DepthLMForCausalLM:
        one = model(seed, **KINDS[kind])
        generator = torch.Generator().manual_seed(0)  # the same factors for every seed
        with torch.no_grad():
            for name, weight in one.model.named_parameters():
                if name.startswith("layers") and ".gate.weight" not in name:
                    weight.mul_(0.5 + 1.5 * torch.rand((), generator=generator))
            one.model.embed_tokens.weight.mul_(3)
        return one

    models = [stretched(seed) for seed in range(SEEDS)]
    for column, tolerance in (("variance", 0.1), ("mlp_variance", 0.2)):
        predicted = np.mean([getattr(predict_from_model(one, token_ids()), column) for one in models], axis=0)
        found = np.mean([measured(one).column(column) for one in models], axis=0)
        np.testing.assert_allclose(predicted, found, rtol=tolerance, err_msg=column)


def test_from_a_fresh_model_and_from_its_configuration_the_prediction_is_the_same() -> None:
    from_model = predict_from_model(model(), token_ids())
    np.testing.assert_allclose(from_model.variance, predict_variance(config(), token_ids()).variance, rtol=0.05)
    assert from_model.input_variance == pytest.approx(0.1**2, rel=0.05)


def test_a_native_model_is_predicted_as_the_depthlm_that_it_equals() -> None:
    ours = model(**EXPERTS, norm_topk_prob=True)
    one, other = predict_from_model(to_native(ours), token_ids()), predict_from_model(ours, token_ids())
    np.testing.assert_allclose(one.variance, other.variance)


def test_layers_that_are_not_independent_grow_faster_than_predicted_by_their_covariance() -> None:
    one = model()
    for layer in one.model.layers[1:]:
        layer.load_state_dict(one.model.layers[0].state_dict())
    report, predicted = measured(one), predict_from_model(one, token_ids())
    assert report.column("variance")[-1] > 1.3 * predicted.variance[-1]
    excess = report.column("variance")[-1] - predicted.variance[-1]
    covariance = sum(report.column("variance_covariance")[1:])
    assert covariance > 0.5 * excess


def test_predicting_leaves_the_model_as_it_was() -> None:
    one = model().train()
    before = {name: weight.clone() for name, weight in one.state_dict().items()}
    predict_from_model(one, token_ids())
    assert one.training
    assert all(torch.equal(weight, before[name]) for name, weight in one.state_dict().items())


# ----------------------------------------------------------------------------------------------------- configurations


def test_a_llama_or_mixtral_configuration_is_read_as_the_depthlm_that_it_is() -> None:
    shape = {**SHAPE, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
    llama, ours = predict_variance(LlamaConfig(**shape), LENGTH), predict_variance(config(**shape), LENGTH)
    np.testing.assert_array_equal(llama.variance, ours.variance)
    mixtral = MixtralConfig(**shape, num_local_experts=8, num_experts_per_tok=2, sliding_window=None)
    experts = config(**shape, num_experts=8, num_experts_per_tok=2, norm_topk_prob=True)
    found = predict_variance(mixtral, LENGTH).variance
    np.testing.assert_allclose(found, predict_variance(experts, LENGTH).variance)


def test_another_architecture_is_refused_with_the_names_of_those_that_have_a_theory() -> None:
    with pytest.raises(SettingsError, match=r"no theory for 'gpt2'.*llama"):
        predict_variance(GPT2Config(), LENGTH)
    other = tiny_llama()
    other.config.model_type = "gpt2"
    with pytest.raises(ConversionError, match="cannot be read as a DepthLM"):
        predict_from_model(other, token_ids())


@pytest.mark.parametrize("options", [{"density": 0.0}, {"density": 1.5}, {"attention_density": 0.0}])
def test_a_density_that_is_no_share_is_refused(options: dict[str, float]) -> None:
    with pytest.raises(SettingsError, match=f"{next(iter(options))} is"):
        predict_variance(config(), LENGTH, **options)


def test_standard_deviations_are_one_or_one_a_layer() -> None:
    same = predict_variance(config(), LENGTH, weight_std=[0.1] * LAYERS)
    np.testing.assert_allclose(same.variance, predict_variance(config(), LENGTH).variance)
    only_last = predict_variance(config(), LENGTH, weight_std=[0.1] * (LAYERS - 1) + [1e-4])
    assert only_last.variance[-1] == pytest.approx(same.variance[-2], rel=1e-3)
    with pytest.raises(SettingsError, match=f"2 standard deviations were given for {LAYERS} layers"):
        predict_variance(config(), LENGTH, weight_std=[0.1, 0.1])


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan"), float("inf"), [0.1] * (LAYERS - 1) + [0.0]])
def test_a_standard_deviation_that_is_not_above_0_is_refused(std: float | list[float]) -> None:
    with pytest.raises(SettingsError, match=r"weight_std is .* above 0"):
        predict_variance(config(), LENGTH, weight_std=std)


def test_a_configuration_without_random_weights_is_refused() -> None:
    with pytest.raises(SettingsError, match=r"initializer_range is 0\.0"):
        predict_variance(config(initializer_range=0.0), LENGTH)


@pytest.mark.parametrize("length", [np.int64(LENGTH), np.uint8(LENGTH), np.array(LENGTH), torch.tensor(LENGTH)])
def test_a_length_may_be_a_whole_number_of_any_kind(length: Any) -> None:
    found, expected = predict_variance(config(), length), predict_variance(config(), LENGTH)
    np.testing.assert_array_equal(found.variance, expected.variance)
    assert found.sequence_length == LENGTH


@pytest.mark.parametrize(
    ("tokens", "said"),
    [
        (0, "tokens is 0; give a sequence length of at least 1"),
        (-1, "tokens is -1; give a sequence length of at least 1"),
        (np.int64(-1), "tokens is -1; give a sequence length of at least 1"),
        (4.0, "tokens is of type float64; give whole numbers"),
        (float("nan"), "tokens is of type float64; give whole numbers"),
        (torch.arange(5), r"matrix \[B, T\], but 1 dimensions"),
        ([[1, 2], [3]], r"matrix \[B, T\], but rows of different lengths"),
        ([[]], "holds no token"),
        (torch.zeros(2, 0, dtype=torch.long), "holds no token"),
    ],
)
def test_tokens_that_are_neither_a_length_nor_a_matrix_of_ids_are_refused(tokens: Any, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        predict_variance(config(), tokens)


# --------------------------------------------------------------------------------------------------------- expectations


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
@pytest.mark.parametrize("gate", [0.01, 1.0, 20.0])
def test_the_moments_of_a_gated_product_are_those_of_draws(activation: str, gate: float) -> None:
    act = {"silu": torch.nn.functional.silu, "gelu": torch.nn.functional.gelu, "relu": torch.relu}[activation]
    generator = torch.Generator().manual_seed(0)
    r = 0.6
    first, second = torch.randn(2, 2, 400_000, generator=generator, dtype=torch.float64)  # [gate or up, draws]
    partner = r * first + (1 - r**2) ** 0.5 * second
    one = act(first[0] * gate**0.5) * first[1] * 2**0.5
    other = act(partner[0] * gate**0.5) * partner[1] * 2**0.5
    assert gated_second_moment(activation, gate, 2.0) == pytest.approx(one.square().mean().item(), rel=0.02)
    drawn = (one * other).mean() / one.square().mean()
    assert gated_correlation(activation, gate, np.array(r)) == pytest.approx(drawn.item(), abs=0.01)


def test_a_gated_product_passes_on_equality_and_independence() -> None:
    np.testing.assert_allclose(gated_correlation("silu", 0.7, np.array([0.0, 1.0])), [0.0, 1.0])


@pytest.mark.parametrize(("logit_variance", "tolerance"), [(0.1, 0.02), (0.7, 0.05), (1.5, 0.12)])
def test_attention_with_random_queries_and_keys_averages_as_predicted(logit_variance: float, tolerance: float) -> None:
    # Tokens that repeat and share a component, so that their correlations are of all sizes.
    length, width, head = 40, 400, 64
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(30, width, generator=generator, dtype=torch.float64)
    hidden = rows[torch.randint(30, (length,), generator=generator)] + 0.5 * rows[0]
    hidden = hidden / hidden.square().mean(-1, keepdim=True).sqrt()
    std = (logit_variance**0.5 / width) ** 0.5  # so that query times key has this variance
    total = torch.zeros(length, length, dtype=torch.float64)
    for _ in range(150):
        query, key = torch.randn(2, head, width, generator=generator, dtype=torch.float64) * std
        logits = (hidden @ query.T) @ (hidden @ key.T).T / head**0.5
        weights = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        mixed = weights @ hidden
        total += mixed @ mixed.T / width / 150
    gram = (hidden @ hidden.T / width).numpy()
    predicted = averaged_correlation(correlation(gram), logit_variance, head)
    np.testing.assert_allclose(predicted[0, 0], 1.0)
    np.testing.assert_allclose(np.diagonal(predicted)[10:], total.diagonal()[10:], rtol=2 * tolerance)
    np.testing.assert_allclose(predicted[10:, 10:].mean(), total[10:, 10:].mean(), rtol=tolerance)


def test_without_logits_or_correlations_attention_averages_over_all_it_sees() -> None:
    found = np.diagonal(averaged_correlation(np.eye(6), 0.0, 16))
    np.testing.assert_allclose(found, 1 / np.arange(1, 7))
    windowed = np.diagonal(averaged_correlation(np.eye(6), 0.0, 16, window=3))
    np.testing.assert_allclose(windowed, [1, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 1 / 3])
    np.testing.assert_allclose(averaged_correlation(np.ones((6, 6)), 3.0, 16), 1.0)


def test_very_large_logits_nearly_choose_one_position() -> None:
    found = np.diagonal(averaged_correlation(np.eye(6), 1e4, 16))
    assert found.min() > 0.9
    assert found.max() <= 1.0


def test_router_weights_of_all_experts_or_of_one_are_what_they_must_be() -> None:
    square, overlaps = router_moments(8, 1, 1.0, True)
    assert square == 1.0
    assert overlaps[-1] == pytest.approx(1.0)
    assert overlaps[0] == pytest.approx(1 / 8, rel=0.1)  # two unrelated tokens meet in one of 8 experts
    assert router_moments(8, 8, 1e-9, False)[0] == pytest.approx(1 / 8)


# --------------------------------------------------------------------------------------------------------- weight decay


@pytest.mark.parametrize("weight_decay", [0.3, 1.0])
def test_adamw_on_noise_leaves_weights_of_the_predicted_size(weight_decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(0.3 * torch.randn(4000, generator=generator))
    rate, steps = 0.01, 500
    optimizer = torch.optim.AdamW([weight], lr=rate, betas=(0.9, 0.95), weight_decay=weight_decay)
    for _ in range(steps):
        weight.grad = torch.randn(4000, generator=generator)
        optimizer.step()
    found = weight.detach().square().mean().sqrt().item()
    assert decayed_std(0.3, [rate] * steps, weight_decay) == pytest.approx(found, rel=0.05)


def test_decay_ends_in_the_equilibrium() -> None:
    assert decayed_std(1.0, [0.01] * 3000, 1.0) == pytest.approx(equilibrium_std(0.01, 1.0), rel=1e-6)
    assert equilibrium_std(1e-3, 0.1) == pytest.approx((1e-3 / 0.2) ** 0.5, rel=1e-3)
    with pytest.raises(SettingsError, match="no equilibrium"):
        equilibrium_std(1e-3, 0.0)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ((float("nan"), [0.01], 0.1), "initial_std is nan"),
        ((-0.1, [0.01], 0.1), "initial_std is -0.1"),
        ((0.1, [0.01, float("nan")], 0.1), r"learning_rates\[1\] is nan"),
        ((0.1, np.array([0.01, -0.01]), 0.1), r"learning_rates\[1\] is -0.01"),
        ((0.1, [float("inf")], 0.1), r"learning_rates\[0\] is inf"),
        ((0.1, [0.01], float("nan")), "weight_decay is nan"),
        ((0.1, [], -0.1), "weight_decay is -0.1"),
    ],
)
def test_weight_decay_of_what_is_no_size_is_refused(numbers: tuple[Any, ...], said: str) -> None:
    with pytest.raises(SettingsError, match=f"{said}; give a finite number of at least 0"):
        decayed_std(*numbers)


def test_weights_and_learning_rates_may_start_at_0_and_there_may_be_no_decay() -> None:
    assert decayed_std(0.0, [0.0, 0.3, 0.4], 0.0) == pytest.approx(0.5)


# --------------------------------------------------------------------------------------------------------------- figure


def example(layers: int = 5) -> VariancePrediction:
    values = np.linspace(0.1, 1.0, layers)
    return VariancePrediction(values, values / 10, values / 5, values / 2, 0.05, LENGTH)


def test_the_figure_draws_what_the_report_and_the_prediction_say() -> None:
    report, predicted = sample_report(5), example()
    figure = variance_theory(report, predicted, initial=(report, replace(predicted, variance=predicted.variance * 2)))
    drawn = {trace.name: list(trace.y) for trace in figure.data}
    np.testing.assert_allclose(drawn["trained"], report.column("variance"), rtol=1e-5)
    np.testing.assert_allclose(drawn["trained, predicted"], predicted.variance, rtol=1e-5)
    np.testing.assert_allclose(drawn["at initialisation, predicted"], 2 * predicted.variance, rtol=1e-5)
    np.testing.assert_allclose(drawn["attention, predicted"], predicted.attention_variance, rtol=1e-5)
    np.testing.assert_allclose(drawn["MLP"], report.column("mlp_variance"), rtol=1e-5)
    assert "Dashed" in figure.layout.meta
    assert list(figure.data[0].x) == [0, 1, 2, 3, 4]


def test_a_figure_of_what_does_not_belong_together_is_refused() -> None:
    with pytest.raises(SettingsError, match="5 layers and the prediction 4"):
        variance_theory(sample_report(5), example(4))
    with pytest.raises(ReportError, match="--scores variance"):
        variance_theory(sample_report(5, ("skip",)), example())
