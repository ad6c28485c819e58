"""Reports side by side: which differences exceed their errors, which layers match, and what is not comparable."""

import math
from typing import Any

import pytest

from depthscope.errors import SettingsError
from depthscope.report.comparison import Comparison, ScoreRow, compare
from depthscope.report.report import LayerReport
from reports import sample_content, sample_report


def report_with(change: dict[str, dict[str, Any]], num_layers: int = 4) -> LayerReport:
    content = sample_content(num_layers)
    for part, values in change.items():
        content[part] |= values
    return LayerReport(**content)


def row(comparison: Comparison, name: str) -> ScoreRow:
    return next(row for row in comparison.scores if row.name == name)


def test_a_report_does_not_differ_from_itself() -> None:
    comparison = compare([sample_report(), sample_report()])
    assert comparison.warnings == ()
    assert all(row.differences == (0.0, 0.0) for row in comparison.scores)
    assert not any(row.exceeds[1] for row in comparison.scores)
    assert {row.name for row in comparison.scores} == set(sample_report().global_scores)


@pytest.mark.parametrize(("value", "exceeds"), [(2.0, False), (2.99, False), (3.01, True), (1.01, False), (0.99, True)])
def test_a_difference_is_held_against_two_combined_errors(value: float, exceeds: bool) -> None:
    first = report_with({"scores": {"loss": 2.0, "loss_se": 0.3}})
    second = report_with({"scores": {"loss": value, "loss_se": 0.4}})
    loss = row(compare([first, second]), "loss")
    assert loss.differences[1] == pytest.approx(value - 2.0)
    assert loss.exceeds == (None, exceeds)


def test_without_an_error_a_difference_is_neither_large_nor_small() -> None:
    first = report_with({"scores": {"loss": 2.0, "loss_se": None}})
    second = report_with({"scores": {"loss": 9.0, "loss_se": 0.1}})
    assert row(compare([first, second]), "loss").exceeds == (None, None)


def test_the_errors_of_sampling_and_probing_count_too() -> None:
    first = report_with({"scores": {"permutation": 1.0, "permutation_se": 0.3, "permutation_sampling_se": 0.4}})
    second = report_with({"scores": {"permutation": 1.9, "permutation_se": 0.0}})
    permutation = row(compare([first, second]), "permutation")
    assert permutation.errors[0] == pytest.approx(0.5)
    assert permutation.exceeds == (None, False)
    assert "permutation_sampling_se" not in {row.name for row in compare([first, second]).scores}


def test_a_score_that_one_report_lacks_has_no_difference() -> None:
    comparison = compare([sample_report(4, ("skip",)), sample_report(4, ("causal",))])
    causal = row(comparison, "causal")
    assert causal.values[0] is None
    assert causal.differences == (None, None)
    assert comparison.layer_scores == []


def test_models_of_equal_depth_match_layer_by_layer() -> None:
    comparison = compare([sample_report(5), sample_report(5, seed=1)])
    assert comparison.same_depth
    assert [match.layers for match in comparison.matches] == [(layer, layer) for layer in range(5)]


def test_models_of_unequal_depth_match_at_relative_depth() -> None:
    comparison = compare([sample_report(12), sample_report(4)])
    assert not comparison.same_depth
    assert [match.layers for match in comparison.matches] == [(1, 0), (4, 1), (7, 2), (10, 3)]
    assert any("depths differ" in warning for warning in comparison.warnings)


@pytest.mark.parametrize("depths", [(1, 7), (3, 10), (29, 30), (64, 5)])
def test_matched_layers_exist_and_never_step_back(depths: tuple[int, int]) -> None:
    matches = compare([sample_report(depth, ("skip",)) for depth in depths]).matches
    assert len(matches) == min(depths)
    for index, depth in enumerate(depths):
        layers = [match.layers[index] for match in matches]
        assert layers == sorted(set(layers))
        assert 0 <= layers[0] <= layers[-1] < depth


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"data": {"fingerprint": "other"}}, "The text or its tokenization differs"),
        ({"data": {"block_size": 512}}, "block_size differs"),
        ({"data": {"eval_blocks": 2}}, "eval_blocks differs"),
        ({"model": {"vocab_size": 1000}}, "vocabularies differ"),
        ({"model": {"dtype": "bfloat16"}}, "dtype differs"),
        ({"settings": {"paper_code": True}}, "paper_code differs"),
        ({"settings": {"threshold": 1.01}}, "threshold differs"),
        ({"settings": {"pairs": "adjacent"}}, "pairs differs"),
        ({"settings": {"probes": "exact"}}, "probes differs"),
        ({"settings": {"seed": 7}}, "seed differs"),
    ],
)
def test_what_makes_reports_incomparable_is_said(change: dict[str, dict[str, Any]], words: str) -> None:
    (warning,) = compare([report_with({}), report_with(change)]).warnings
    assert words in warning


@pytest.mark.parametrize("change", [{"settings": {"batch_size": 1}}, {"settings": {"scores": []}}, {"versions": {}}])
def test_what_does_not_change_the_scores_is_no_warning(change: dict[str, dict[str, Any]]) -> None:
    assert compare([report_with({}), report_with(change)]).warnings == ()


def test_a_warning_stays_short_whatever_the_report_holds() -> None:
    change = {"settings": {"seed": "x" * 20_000}}
    (warning,) = compare([report_with({}), report_with(change)]).warnings
    assert len(warning) < 300


def test_labels_tell_reports_of_one_model_apart() -> None:
    same = sample_report(4)
    assert compare([same, sample_report(5)]).labels == ("sample/toy-4", "sample/toy-5")
    assert compare([same, report_with({"model": {"revision": "main"}})]).labels == (
        "sample/toy-4@01234567",
        "sample/toy-4@main",
    )
    assert compare([same, report_with({"model": {"dtype": "bfloat16"}})]).labels[1].endswith("bfloat16")
    assert compare([same, same]).labels == ("sample/toy-4 #1", "sample/toy-4 #2")


def test_the_frame_has_a_row_for_each_score_and_report() -> None:
    comparison = compare([sample_report(4), sample_report(6), sample_report(8)])
    frame = comparison.to_frame()
    assert len(frame) == 3 * len(comparison.scores)
    assert list(frame.columns) == ["score", "report", "value", "se", "difference", "exceeds_2se"]
    first = frame[frame["report"] == "sample/toy-4"]
    assert set(first["difference"]) == {0.0}
    assert set(first["exceeds_2se"]) == {None}


def test_the_layers_of_all_reports_stand_below_each_other_with_their_relative_depth() -> None:
    frame = compare([sample_report(4), sample_report(2, ("skip",))]).layers_frame()
    assert len(frame) == 6
    assert frame["relative_depth"].tolist() == [0.125, 0.375, 0.625, 0.875, 0.25, 0.75]
    assert math.isnan(frame["causal"].iloc[4])


@pytest.mark.parametrize("count", [0, 1])
def test_a_comparison_takes_two_reports(count: int) -> None:
    with pytest.raises(SettingsError, match=f"not {count}"):
        compare([sample_report(2)] * count)
