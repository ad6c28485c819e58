"""Every score against its naive re-computation, on tiny random models of several families and on SmolLM2-135M."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import naive
from depthscope import LayerReport, LayerStack, analyze
from models import random_blocks, tiny_llama
from zoo import example_ids, tiny_model

FIT, EVAL, LENGTH = 12, 4, 16
TYPES = ("llama", "gpt2", "gpt_neox", "bloom", "falcon", "opt", "mixtral", "olmoe", "qwen2", "gemma", "phi")


@pytest.fixture(scope="module", params=TYPES)
def measured(request: pytest.FixtureRequest) -> tuple[LayerReport, nn.Module, nn.ModuleList, torch.Tensor]:
    model = tiny_model(request.param)
    ids = example_ids(model, batch=FIT + EVAL, length=LENGTH)
    report = analyze(model, blocks=ids, fit_blocks=FIT, eval_blocks=EVAL, probes="exact")
    return report, model, LayerStack(model).layers, ids


def column(report: LayerReport, name: str) -> np.ndarray:
    return np.array([np.nan if row[name] is None else row[name] for row in report.layers], dtype=float)


def matrix(report: LayerReport, name: str) -> np.ndarray:
    return np.array(report.pairs[name], dtype=float)


def assert_close(one: np.ndarray, other: np.ndarray, tolerance: float = 1e-4) -> None:
    np.testing.assert_allclose(one, other, rtol=tolerance, atol=1e-6)


def test_the_loss(measured) -> None:
    report, model, _, ids = measured
    losses = naive.block_losses(model, ids[FIT:])
    assert report.scores["loss"] == pytest.approx(losses.mean(), rel=1e-5)
    assert report.scores["loss_se"] == pytest.approx(losses.std(ddof=1) / np.sqrt(EVAL), rel=1e-3)


def test_variance_and_its_growth(measured) -> None:
    report, model, layers, ids = measured
    expected = naive.variance(model, layers, ids[FIT:])
    own, shared = naive.growth_split(model, layers, ids[FIT:])
    assert_close(column(report, "variance"), expected)
    assert_close(column(report, "variance_update"), own)
    np.testing.assert_allclose(column(report, "variance_covariance"), shared, rtol=1e-4, atol=1e-5 * expected.max())
    assert report.scores["variance"] == pytest.approx(expected[-1], rel=1e-4)


@pytest.mark.quick
def test_usefulness(measured) -> None:
    report, model, layers, ids = measured
    expected = naive.usefulness_ratios(model, layers, ids[:FIT], ids[FIT:])
    assert_close(column(report, "usefulness_ratio"), expected)
    assert report.scores["usefulness"] == pytest.approx((expected > 1.1).mean())
    assert report.scores["usefulness_ratio"] == pytest.approx(expected.mean(), rel=1e-4)
    assert report.scores["effective_depth_linear"] == pytest.approx(naive.participation_ratio(expected - 1), rel=1e-2)


def test_the_papers_code(measured) -> None:
    _, model, layers, ids = measured
    report = analyze(model, blocks=ids, fit_blocks=FIT, eval_blocks=EVAL, scores="usefulness", paper_code=True)
    expected = naive.usefulness_ratios(model, layers, ids[:FIT], ids[FIT:], paper_code=True)
    assert_close(column(report, "usefulness_ratio"), expected, 1e-3)


@pytest.mark.quick
def test_skip_ratios(measured) -> None:
    report, model, layers, ids = measured
    expected = naive.skip_ratios(model, layers, ids[FIT:])
    assert_close(column(report, "skip_ratio"), expected)
    assert report.scores["effective_depth_skip"] == pytest.approx(naive.participation_ratio(expected - 1), rel=1e-2)


def test_causal_effects(measured) -> None:
    report, model, layers, ids = measured
    expected = naive.causal_matrix(model, layers, ids[FIT:])
    assert_close(matrix(report, "causal"), expected)
    assert report.scores["causal"] == pytest.approx(np.nanmean(expected), rel=1e-4)
    assert_close(column(report, "causal")[:-1], np.nanmean(expected[:-1], axis=1))
    assert report.layers[-1]["causal"] is None


def test_permutation_scores(measured) -> None:
    report, model, layers, ids = measured
    expected = naive.permutation_matrix(model, layers, ids[FIT:])
    given = matrix(report, "permutation")
    kinds = LayerStack(model).layer_types
    alike = np.array([[one == other for other in kinds] for one in kinds]) & ~np.eye(len(kinds), dtype=bool)
    assert (np.isnan(given) == ~alike).all()
    # A score is a small difference of two losses: its own rounding is that of the loss.
    np.testing.assert_allclose(given[alike], expected[alike], rtol=1e-4, atol=2e-6)


def test_jacobian_distances(measured) -> None:
    report, model, layers, ids = measured
    expected = naive.jacobian_distance(model, layers, ids[FIT:])
    assert_close(column(report, "jacobian"), expected)
    assert report.scores["jacobian"] == pytest.approx(expected.mean(), rel=1e-4)


def test_geometry(measured) -> None:
    report, model, layers, ids = measured
    for name, expected in naive.geometry(model, layers, ids[FIT:]).items():
        np.testing.assert_allclose(column(report, name), expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_attention_and_mlp_variance() -> None:
    model, ids = tiny_llama(), random_blocks(6, LENGTH)
    report = analyze(model, blocks=ids, fit_blocks=0, eval_blocks=6, scores="variance")
    layers = model.model.layers
    assert_close(
        column(report, "attention_variance"), naive.submodule_variance(model, [x.self_attn for x in layers], ids)
    )
    assert_close(column(report, "mlp_variance"), naive.submodule_variance(model, [x.mlp for x in layers], ids))


def test_standard_errors_are_those_of_leaving_out_one_block() -> None:
    model, ids = tiny_llama(), random_blocks(6, LENGTH)
    report = analyze(model, blocks=ids, fit_blocks=0, eval_blocks=6, scores="skip")
    baseline = naive.block_losses(model, ids)
    with naive.replaced(model.model.layers, 1, lambda hidden: hidden):
        skipped = naive.block_losses(model, ids)
    expected = naive.jackknife_se(np.stack([skipped, baseline], 1), lambda rows: rows[:, 0].sum() / rows[:, 1].sum())
    assert report.layers[1]["skip_ratio_se"] == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
def test_smollm2_agrees_with_the_naive_scores(smollm2_gguf: Path, prose: Path) -> None:
    """On the real model: layers chosen at the start, in the middle, where activations are massive, and at the end."""
    from depthscope import load_blocks, load_model

    loaded = load_model(str(smollm2_gguf), device="cpu")
    model, layers = loaded.model, LayerStack(loaded.model).layers
    blocks = load_blocks(prose, loaded.tokenizer, num_blocks=14, block_size=96)
    report = analyze(model, blocks=blocks, fit_blocks=12, eval_blocks=2, scores="skip,causal,usefulness,variance")
    fit_ids, eval_ids = blocks.input_ids[:12], blocks.input_ids[12:]
    chosen = [0, 11, 12, 20, 29]
    assert_close(column(report, "skip_ratio")[chosen], naive.skip_ratios(model, layers, eval_ids, chosen)[chosen])
    expected = naive.usefulness_ratios(model, layers, fit_ids, eval_ids, only=chosen)[chosen]
    assert_close(column(report, "usefulness_ratio")[chosen], expected)
    expected = naive.causal_matrix(model, layers, eval_ids, chosen)[chosen]
    assert_close(matrix(report, "causal")[chosen], expected)
    assert_close(column(report, "variance"), naive.variance(model, layers, eval_ids))
    swaps = analyze(model, blocks=blocks, fit_blocks=12, eval_blocks=2, scores="permutation", pairs="adjacent")
    for i in (0, 11, 28):
        expected = naive.permutation_score(model, layers, eval_ids, i, i + 1)
        assert swaps.pairs["permutation"][i][i + 1] == pytest.approx(expected, rel=1e-4, abs=2e-6)
