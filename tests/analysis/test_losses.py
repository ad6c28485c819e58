"""Losses of changed models that are estimated where the vocabulary is large: right on average, and rightly unsure."""

from typing import Any

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

import naive
from depthscope import Blocks, LayerReport, analyze
from depthscope.analysis import losses
from depthscope.errors import SettingsError
from models import tiny_llama

VOCABULARY, BLOCKS, TOKENS = 16384, 10, 48
SIZES: dict[str, Any] = {"fit_blocks": 2, "eval_blocks": 8, "scores": "skip,usefulness", "progress": False}
NOTE = "were estimated"


def model_of_a_large_vocabulary(**changes: Any) -> PreTrainedModel:
    """A Llama that is sure of some tokens, as trained ones are: frequent ones lie far out."""
    model = tiny_llama(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, **changes)
    with torch.no_grad():
        frequency = 1 / torch.arange(1, VOCABULARY + 1) ** 0.5
        model.lm_head.weight.mul_(4 * frequency[:, None] / frequency[100])
    return model


def text(seed: int = 0, blocks: int = BLOCKS) -> torch.Tensor:
    """Token ids whose small ones are frequent."""
    uniform = torch.rand((blocks, TOKENS), generator=torch.Generator().manual_seed(seed))
    return (VOCABULARY * uniform**3).long().clamp(0, VOCABULARY - 1)


def is_estimated(report: LayerReport) -> bool:
    return any(NOTE in note for note in report.notes)


def column(report: LayerReport, name: str) -> np.ndarray:
    return np.array([row[name] for row in report.layers], dtype=float)


def test_estimates_are_right_on_average_and_their_errors_are_about_those_of_exact_losses() -> None:
    model, ids = model_of_a_large_vocabulary(), text()
    exact = analyze(model, blocks=ids, exact_losses=True, **SIZES)
    runs = [analyze(model, blocks=ids, seed=seed, **SIZES) for seed in range(8)]
    assert not is_estimated(exact)
    assert all(map(is_estimated, runs))
    for name in ("skip_ratio", "usefulness_ratio"):
        estimates = np.array([column(run, name) for run in runs])
        spread = estimates.std(0, ddof=1)
        assert (spread > 0).all(), "positions are sampled"
        bias = estimates.mean(0) - column(exact, name)
        assert (np.abs(bias) < 4 * spread / np.sqrt(len(runs))).all()
        errors = np.array([column(run, f"{name}_se") for run in runs]).mean(0) / column(exact, f"{name}_se")
        assert (errors < 1.1).all()
    assert all(run.scores["loss"] == exact.scores["loss"] for run in runs)


def test_exact_losses_are_those_of_whole_forward_passes() -> None:
    model, ids = model_of_a_large_vocabulary(), text()
    report = analyze(model, blocks=ids, exact_losses=True, **SIZES)
    expected = naive.loss(model, ids[2:])
    for layer, row in enumerate(report.layers):
        with naive.replaced(model.model.layers, layer, lambda hidden: hidden):
            assert row["skip_ratio"] == pytest.approx(naive.loss(model, ids[2:]) / expected, rel=1e-5)


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {"eval_blocks": 7}),
        ({}, {"paper_code": True}),
        ({"vocab_size": 8000}, {}),
        ({"hidden_size": 512, "intermediate_size": 8192, "num_hidden_layers": 1}, {"scores": "skip"}),
    ],
)
def test_losses_are_exact_where_estimates_would_not_pay(changes: dict[str, Any], options: dict[str, Any]) -> None:
    sizes = {"vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 32}
    ids = text().clamp(0, 7999)
    model = tiny_llama(**{**sizes, **changes})
    assert not is_estimated(analyze(model, blocks=ids, **{**SIZES, **options}))


@pytest.mark.parametrize("size", [1, 3])
def test_estimates_do_not_depend_on_the_batch_size(size: int) -> None:
    model, ids = model_of_a_large_vocabulary(), text()
    scores = {**SIZES, "scores": "skip,permutation", "pairs": 0.5}
    one, other = (analyze(model, blocks=ids, batch_size=each, **scores) for each in (8, size))
    assert is_estimated(one)
    for name, value in one.scores.items():
        assert other.scores[name] == pytest.approx(value, rel=1e-5), name


def test_predictions_that_do_not_count_are_not_sampled() -> None:
    model, ids = model_of_a_large_vocabulary(), text()
    mask = torch.ones_like(ids)
    mask[:, : TOKENS // 2] = 0  # padding on the left
    mask[3] = 0
    mask[3, -2:] = 1  # one prediction is left
    blocks = Blocks(ids, attention_mask=mask)
    exact, estimated = (analyze(model, blocks=blocks, exact_losses=each, **SIZES) for each in (True, False))
    assert is_estimated(estimated)
    for one, other in zip(exact.layers, estimated.layers, strict=True):
        assert other["skip_ratio"] == pytest.approx(one["skip_ratio"], abs=one["skip_ratio_se"])


def test_a_head_that_is_more_than_a_matrix_is_read_exactly() -> None:
    model, ids = model_of_a_large_vocabulary(), text()
    plain = analyze(model, blocks=ids, exact_losses=True, **SIZES)
    model.lm_head = torch.nn.Sequential(model.lm_head)
    report = analyze(model, blocks=ids, **SIZES)
    assert not is_estimated(report)
    assert report.scores == pytest.approx(plain.scores)


def test_a_share_is_all_positions_where_the_first_block_cannot_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(losses, "SLACK", 0.0)  # no error is small enough
    model, ids = model_of_a_large_vocabulary(), text()
    exact, report = (analyze(model, blocks=ids, exact_losses=each, **SIZES) for each in (True, False))
    assert column(report, "skip_ratio") == pytest.approx(column(exact, "skip_ratio"), rel=1e-2)
    assert any("at 9" in note for note in report.notes), "all but of the first block"


def test_exact_losses_is_a_yes_or_a_no() -> None:
    with pytest.raises(SettingsError, match="exact_losses is 1"):
        analyze(tiny_llama(), exact_losses=1)


def test_blocks_that_are_added_one_by_one_have_the_estimates_of_as_many_at_once() -> None:
    options = {**SIZES, "blocks": text(blocks=14), "eval_blocks": 12}
    model = model_of_a_large_vocabulary()
    grown = analyze(model, **options, precision=0.1)
    assert grown.budget is not None
    assert grown.budget["stopped"] == "precision"
    assert grown.data["eval_blocks"] == 8
    assert is_estimated(grown)
    fixed = analyze(model, **{**options, "eval_blocks": grown.data["eval_blocks"]})
    for name in ("skip_ratio", "skip_ratio_se", "usefulness_ratio"):
        np.testing.assert_allclose(column(grown, name), column(fixed, name), rtol=1e-5)


def test_a_budget_that_ends_before_estimates_are_usual_says_that_they_are_estimates() -> None:
    options = {**SIZES, "blocks": text(), "scores": "skip", "precision": 0.5}
    model = model_of_a_large_vocabulary()
    few, exact = analyze(model, **options), analyze(model, **options, exact_losses=True)
    assert few.data["eval_blocks"] == exact.data["eval_blocks"] == 2
    assert is_estimated(few)
    assert any("so few blocks have exact losses where eval_blocks=2" in note for note in few.notes)
    fixed = analyze(model, **{**options, "precision": None, "eval_blocks": 2})
    np.testing.assert_allclose(column(exact, "skip_ratio"), column(fixed, "skip_ratio"), rtol=1e-5)
    assert not any("exact losses" in note for note in exact.notes)
