"""A budget of time or a precision decides how many blocks are measured; what was measured is as without one."""

import io
import re
import signal
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from torch import nn
from transformers import AutoTokenizer

from depthscope import Blocks, LayerReport, Settings, analyze, compare
from depthscope.analysis.analyze import analyze_blocks
from depthscope.errors import AnalysisInterrupted, CorpusError, ReportError, SettingsError
from depthscope.layers.facts import model_facts
from depthscope.views.report_page import reproduce
from models import random_blocks, tiny_llama
from tiny_tokenizer import save_tokenizer

BLOCKS = random_blocks(44, 16)
SIZES: dict[str, Any] = {"blocks": BLOCKS, "fit_blocks": 4}


class Clock:
    """A clock that goes on when a layer runs: by a second a block, also of examples that layers are found with."""

    def __init__(self) -> None:
        self.now = 0.0

    def on(self, layer: nn.Module) -> nn.Module:
        def advance(module: nn.Module, args: Any, output: Any) -> None:
            self.now += len(args[0])

        layer.register_forward_hook(advance)
        return layer


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """The clock of budgets."""
    made = Clock()
    monkeypatch.setattr("time.monotonic", lambda: made.now)
    return made


def timed(clock: Clock, **options: Any) -> LayerReport:
    """An analysis in which each pass of a block through the last layer takes a second."""
    model = tiny_llama()
    clock.on(model.model.layers[3])
    return analyze(model, **{**SIZES, **options})


def measured(report: LayerReport) -> dict[str, Any]:
    return report.model_dump(include={"scores", "layers", "pairs", "data"})


def equal_to_rounding(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(equal_to_rounding(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(equal_to_rounding, one, other))
    return one == (pytest.approx(other, rel=1e-5, abs=1e-8) if isinstance(other, float) else other)


@pytest.mark.parametrize(
    "options",
    [
        {"budget": 400},
        {"budget": "400s", "scores": "all", "pairs": 0.5, "probes": 3},
        {"budget": "3m", "scores": "skip,usefulness,variance,weight_sparsity,expert_load", "in_sample": True},
        {"budget": "3m", "scores": "skip,causal", "sublayers": True, "batch_size": 2},
        {"budget": 200.0, "scores": "jacobian", "fit_blocks": 0},
        {"precision": "7%"},
        {"precision": 0.07, "budget": "1h", "scores": "usefulness"},
    ],
)
def test_a_budget_that_measured_n_blocks_gives_what_eval_blocks_n_gives(clock: Clock, options: dict[str, Any]) -> None:
    bounded = timed(clock, **options)
    count = bounded.data["eval_blocks"]
    assert 2 < count < 40
    assert bounded.budget is not None
    assert bounded.budget["stopped"] == ("precision" if "precision" in options else "time")
    others = {name: value for name, value in options.items() if name not in ("budget", "precision")}
    fixed = timed(clock, **others, eval_blocks=count)
    assert fixed.budget is None
    assert equal_to_rounding(measured(bounded), measured(fixed))
    changed = {name for name, value in bounded.settings.items() if fixed.settings[name] != value}
    assert changed == {"budget", "precision"} & options.keys()
    assert not [line for line in compare([bounded, fixed]).warnings if "settings" in line or "data" in line]
    assert reproduce(bounded) == reproduce(fixed)
    assert LayerReport.from_json(bounded.to_json()) == bounded


def test_more_time_measures_more_blocks_and_none_takes_longer_than_it_was_given(clock: Clock) -> None:
    reports = [timed(clock, scores="skip,usefulness", budget=seconds) for seconds in (80, 120, 240, 480)]
    counts = [report.data["eval_blocks"] for report in reports]
    assert counts == sorted(set(counts))
    for seconds, report in zip((80, 120, 240, 480), reports, strict=True):
        assert report.budget is not None
        assert 0.5 * seconds < report.budget["seconds"] <= seconds


def test_a_budget_that_two_blocks_exceed_measures_two_and_says_so(clock: Clock) -> None:
    report = timed(clock, budget="0.5s")
    assert report.data["eval_blocks"] == 2
    assert report.budget is not None
    assert report.budget["stopped"] == "time"
    assert report.budget["seconds"] > 0.5
    assert report.scores["skip_ratio_se"] is not None
    (note,) = [note for note in report.notes if "took longer than the budget" in note]
    assert "2 blocks, the fewest that tell standard errors" in note
    before = re.search(r"(\d+) seconds of it before the first", note)
    assert before is not None
    assert int(before[1]) > 4  # four blocks were fitted on, after the layers were found


def test_a_precision_is_reached_or_the_report_says_what_ran_out() -> None:
    def largest(report: LayerReport) -> float:
        names = ("skip_ratio", "usefulness_ratio")
        return max(row[f"{name}_se"] / row[name] for row in report.layers for name in names)

    reached = analyze(tiny_llama(), **SIZES, scores="skip,usefulness", precision="6%")
    assert reached.budget is not None
    assert (reached.budget["stopped"], reached.budget["most_blocks"]) == ("precision", 40)
    assert largest(reached) == pytest.approx(reached.budget["precision"])
    assert largest(reached) <= 0.06
    assert any("precision of 6%" in note and "then the precision was reached" in note for note in reached.notes)
    for options, end, advice in (({}, "text", "Give more text."), ({"eval_blocks": 5}, "blocks", "Raise eval_blocks.")):
        short = analyze(tiny_llama(), **SIZES, scores="skip,usefulness", precision="0.1%", **options)
        assert short.budget is not None
        assert short.budget["stopped"] == end
        assert short.data["eval_blocks"] == short.budget["most_blocks"] == (5 if options else 40)
        assert largest(short) == pytest.approx(short.budget["precision"])
        assert largest(short) > 0.001
        assert any(f"precision of 0.1% was not reached. {advice}" in note for note in short.notes)


def test_the_first_of_budget_and_precision_ends_it(clock: Clock) -> None:
    both = {"scores": "skip", "fit_blocks": 0}
    soon = timed(clock, **both, budget=3600, precision=0.1)
    late = timed(clock, **both, budget=60, precision=0.0001)
    assert soon.budget is not None
    assert late.budget is not None
    assert (soon.budget["stopped"], late.budget["stopped"]) == ("precision", "time")
    assert any("not reached. Give more time" in note for note in late.notes)


OF_INTERRUPTED = {**SIZES, "scores": "skip,variance,jacobian", "fit_blocks": 0}


def interrupted(calls: float, **options: Any) -> tuple[LayerReport, int]:
    """An analysis that gets Ctrl-C when the last layer runs for the n-th time; and how often that ran."""
    model, done = tiny_llama(), 0

    def count(module: nn.Module, args: Any) -> None:
        nonlocal done
        done += 1
        if done == calls:
            signal.raise_signal(signal.SIGINT)

    model.model.layers[3].register_forward_pre_hook(count)
    report = analyze(model, **{**OF_INTERRUPTED, **options})
    assert sum(len(module._forward_hooks) for module in model.modules()) == 0
    return report, done


def calls_of(**options: Any) -> int:
    """How often the last layer runs."""
    return interrupted(float("inf"), **options)[1]


def test_an_interrupt_keeps_the_blocks_that_were_measured() -> None:
    calls = calls_of(eval_blocks=40, budget=3600, scores="skip,variance")
    report, _ = interrupted(calls - 1, eval_blocks=40, budget=3600)
    assert report.budget is not None
    assert report.budget["stopped"] == "interrupt"
    count = report.data["eval_blocks"]
    assert 2 <= count < 40
    assert report.settings["scores"] == ["variance", "skip"]
    fixed = analyze(tiny_llama(), **{**SIZES, "fit_blocks": 0}, scores="skip,variance", eval_blocks=count)
    assert equal_to_rounding(measured(report), measured(fixed))
    assert any("an interrupt (Ctrl-C) ended it" in note for note in report.notes)
    assert any("jacobian left out" in note for note in report.notes)


def test_an_interrupt_of_what_waits_for_the_number_of_blocks_keeps_the_others() -> None:
    calls = calls_of(eval_blocks=40, budget=3600)
    report, _ = interrupted(calls - 1, eval_blocks=40, budget=3600)
    assert report.data["eval_blocks"] == 40
    assert report.settings["scores"] == ["variance", "skip"]
    assert any("jacobian left out" in note for note in report.notes)


@pytest.mark.parametrize("options", [{"budget": 3600}, {"budget": 3600, "scores": "jacobian"}, {}])
def test_an_interrupt_before_two_blocks_or_without_a_budget_ends_with_nothing(options: dict[str, Any]) -> None:
    calls = calls_of(eval_blocks=2, **options)
    with pytest.raises(AnalysisInterrupted, match="Interrupted while at"):
        interrupted(calls if options.get("scores") else calls // 2, **{"eval_blocks": 40, **options})


def test_partial_reports_come_while_it_runs_and_grow_to_the_whole() -> None:
    partial: list[LayerReport] = []
    options = {**SIZES, "scores": "skip,causal,jacobian", "fit_blocks": 0, "eval_blocks": 7, "probes": 4}
    whole = analyze(tiny_llama(), **options, on_partial=partial.append)
    assert [report.data["eval_blocks"] for report in partial] == [2, 4, 7]
    assert whole.budget is None
    assert equal_to_rounding(measured(whole), measured(analyze(tiny_llama(), **options)))
    for report in partial:
        fixed = analyze(tiny_llama(), **{**options, "scores": "skip,causal", "eval_blocks": report.data["eval_blocks"]})
        assert equal_to_rounding(measured(report), measured(fixed))
        assert any("an analysis that goes on" in note for note in report.notes)
    assert not any("goes on" in note for note in whole.notes)


def test_the_ranking_so_far_stands_below_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = io.StringIO()
    console = Console(file=seen, force_terminal=True, width=120)
    monkeypatch.setattr("depthscope.console.progress.terminal", lambda **options: console)
    report = analyze(tiny_llama(), **SIZES, scores="skip", eval_blocks=12, budget=3600)
    order = [layer for layer, _ in report.ranked("skip_ratio")]
    assert f"12 blocks: costliest to skip {order[-1]}, {order[-2]}; cheapest {order[0]}, {order[1]};" in seen.getvalue()


def test_a_text_that_is_short_is_measured_as_far_as_it_goes(tmp_path: Path) -> None:
    text = tmp_path / "short.txt"
    text.write_text("the layers of a model pass on a stream of numbers " * 40)
    save_tokenizer(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    options = {"text": text, "block_size": 16, "scores": "skip", "fit_blocks": 1}
    model = tiny_llama(vocab_size=len(tokenizer))
    report = analyze(model, tokenizer, **options, budget="1h")
    assert report.budget is not None
    assert report.budget["stopped"] == "text"
    assert 2 <= report.data["eval_blocks"] == report.budget["most_blocks"] < 256
    with pytest.raises(CorpusError, match="were asked for"):
        analyze(model, tokenizer, **options, eval_blocks=256)
    with pytest.raises(CorpusError, match=r"need|asked for"):
        analyze(model, tokenizer, **{**options, "fit_blocks": 1000}, budget="1h")


def test_two_blocks_are_the_fewest(clock: Clock) -> None:
    with pytest.raises(CorpusError, match="fit_blocks=4 and at least 2 to measure on need 6"):
        analyze(tiny_llama(), blocks=BLOCKS[:5], fit_blocks=4, budget=60)
    with pytest.raises(SettingsError, match="eval_blocks is 1; give a whole number of at least 2"):
        Settings(eval_blocks=1, precision=0.1)


@pytest.mark.parametrize(
    ("given", "seconds"), [(60, 60), ("60", 60), ("60s", 60), ("1.5 m", 90), ("5min", 300), ("1h", 3600), ("1e2s", 100)]
)
def test_a_time_is_given_with_or_without_its_unit(given: Any, seconds: float) -> None:
    assert Settings(budget=given).budget == seconds


@pytest.mark.parametrize("given", [0.02, "2%", "0.02", " 2 %", ".02", "2.0%"])
def test_a_precision_is_given_as_a_share_or_in_percent(given: Any) -> None:
    assert Settings(precision=given).precision == pytest.approx(0.02)


BAD = ["", "abc", "nan", "inf", "-1", "0", "0s", "0%", "1e400", "2% of it", "5 days", "60s60s", "١", 0, -1.0, True]


@pytest.mark.parametrize("value", [*BAD, float("nan"), float("inf"), [], 2j, 10**400, 10**10, "9999h"])
def test_what_is_no_time_is_refused_by_name(value: object) -> None:
    with pytest.raises(SettingsError, match=r"^budget is .*; give a time above 0 and of at most a year: seconds, or"):
        Settings(budget=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [*BAD, float("nan"), [], 2j, 10**400, 1, 2, "2", "100%", "60s"])
def test_what_is_no_precision_is_refused_by_name(value: object) -> None:
    with pytest.raises(SettingsError, match=r"^precision is .*; give a relative standard error: a share above 0"):
        Settings(precision=value)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [{"scores": "variance"}, {"scores": "usefulness", "in_sample": True}])
def test_a_precision_without_loss_ratios_to_tell_it_of_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match="precision was asked for without a score that it is told of"):
        Settings(**options, precision=0.1)
    assert Settings(**options, budget=60).is_bounded


def test_the_most_blocks_follow_the_mode_unless_they_are_chosen() -> None:
    assert Settings().eval_blocks == Settings(budget=60).with_(budget=None).eval_blocks == 8
    assert Settings(budget=60).eval_blocks == Settings().with_(precision=0.1).eval_blocks == 256
    assert Settings(eval_blocks=8).with_(budget=60).eval_blocks == 8
    assert type(Settings().eval_blocks) is int


def test_a_report_whose_budget_is_broken_is_refused() -> None:
    report = analyze(tiny_llama(), **SIZES, scores="skip", eval_blocks=3)
    assert '"budget"' not in report.model_copy(update={"settings": {}}).to_json()
    facts = {"seconds": 1.0, "stopped": "time", "most_blocks": 9, "precision": None}
    kept = LayerReport.from_json(report.model_copy(update={"budget": facts}).to_json())
    assert kept.budget == facts
    for broken in ({"seconds": -1.0}, {"stopped": "boredom"}, {"precision": "2%"}, {"most_blocks": 0.5}):
        with pytest.raises(ReportError, match="budget"):
            LayerReport.from_json(report.model_copy(update={"budget": {**facts, **broken}}).to_json())


def limited(seconds: float, clock: Clock, interrupt: bool = False) -> LayerReport:
    model = tiny_llama()
    clock.on(model.model.layers[3])
    if interrupt:
        model.model.layers[3].register_forward_pre_hook(
            lambda *_: signal.raise_signal(signal.SIGINT) if clock.now > 100 else None
        )
    settings = Settings(scores="skip,jacobian", fit_blocks=0, eval_blocks=40, block_size=16)
    return analyze_blocks(model, Blocks.from_ids(BLOCKS), settings, facts=model_facts(model), time_limit=seconds)


def test_a_limit_from_outside_shows_only_where_it_ends_the_analysis(clock: Clock) -> None:
    free, cut = limited(10**6, clock), limited(200, clock)
    assert (free.data["eval_blocks"], free.budget, free.settings["budget"]) == (40, None, None)
    assert not any("budget" in note for note in free.notes)
    assert cut.budget is not None
    assert (cut.budget["stopped"], cut.settings["budget"]) == ("time", None)
    assert 2 <= cut.data["eval_blocks"] < 40
    assert any("then the time was spent" in note for note in cut.notes)


def test_an_interrupt_of_what_has_a_limit_from_outside_is_not_swallowed(clock: Clock) -> None:
    with pytest.raises(AnalysisInterrupted, match="Interrupted while at"):
        limited(10**6, clock, interrupt=True)
