"""The terminal: tables that fit its width, and a stranger's text that stays text."""

import io
import re

import pytest
from rich.console import Console

from depthscope.report.comparison import compare
from depthscope.report.report import LayerReport
from depthscope.views.terminal import layer_table, print_comparison, print_report, scores_table
from reports import ALL_SCORES, sample_content, sample_report


def printed(report: LayerReport, width: int, encoding: str = "utf-8") -> str:
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding, newline="")
    print_report(report, Console(file=stream, width=width, color_system=None))
    stream.flush()
    return stream.buffer.getvalue().decode(encoding)  # type: ignore[attr-defined]


def columns(report: LayerReport, width: int | None) -> list[str]:
    return [str(column.header) for column in layer_table(report, width).columns]


@pytest.mark.parametrize("width", [40, 60, 80, 100, 120, 200])
def test_no_line_is_wider_than_the_terminal_and_no_layer_breaks_in_two(width: int) -> None:
    lines = printed(sample_report(), width).splitlines()
    assert max(map(len, lines)) <= width
    rows = [line for line in lines if re.match(r" *(≈ )?\d+ {2,}\S", line)]
    assert len(rows) == 30
    assert not any("…" in row for row in rows)


def test_a_narrow_terminal_keeps_the_important_columns() -> None:
    assert columns(sample_report(), 80) == [
        "layer", "variance", "linear", "skip", "", "causal", "permute", "Jacobian", "influence"
    ]  # fmt: skip
    assert columns(sample_report(), 40) == ["layer", "variance", "linear", "skip", "causal"]
    assert columns(sample_report(), 20) == ["layer", "skip"]
    assert set(columns(sample_report(), 80)) < set(columns(sample_report(), None))


@pytest.mark.parametrize("scores", [(), *[(score,) for score in ALL_SCORES]])
def test_only_scores_that_are_present_are_shown(scores: tuple[str, ...]) -> None:
    report = sample_report(3, scores)
    heads = {"skip": "skip", "usefulness": "linear", "variance": "variance", "causal": "causal"}
    for score, head in heads.items():
        assert (head in columns(report, None)) == (score in scores)
    assert len(scores_table(report).rows) == len(report.global_scores)
    assert "sample/toy-3" in printed(report, 80)


def test_the_values_are_the_reports() -> None:
    report = sample_report(6)
    text = printed(report, 120)
    for row in report.layers:
        assert f"{row['skip_ratio']:.4f}" in text
    assert "2.718 ± 0.071" in text
    assert text.index("Effective depth") < text.index("Near the identity") < text.index("layer  variance")
    assert text.index("Notes") > text.index("layer  variance")


def test_kinds_are_shown_where_they_differ() -> None:
    content = sample_content(3, ("skip",))
    assert "kind" not in columns(LayerReport(**content), None)
    content["layers"][1]["kind"] = "MambaLayer"
    assert "kind" in columns(LayerReport(**content), None)


def test_the_costliest_layer_has_the_longest_bar_and_a_free_one_none() -> None:
    content = sample_content(4, ("skip",))
    for row, ratio in zip(content["layers"], (2.0, 1.1, 1.0, 0.9), strict=True):
        row["skip_ratio"] = ratio
    bars = list(layer_table(LayerReport(**content)).columns[2].cells)
    assert [len(str(bar)) for bar in bars] == sorted((len(str(bar)) for bar in bars), reverse=True)
    assert str(bars[0]) == "█" * 8
    assert str(bars[2]) == str(bars[3]) == ""


def test_markup_in_a_report_is_printed_not_obeyed() -> None:
    content = sample_content(2)
    content["model"]["name"] = "[red]evil[/red] [link=https://example.org]x[/link] [/nothing]"
    content["notes"] = ["[bold]note[/bold] [/]"]
    content["scores"]["[blink]new[/blink]"] = 1.0
    content["layers"][0]["kind"] = "[/]"
    text = printed(LayerReport(**content), 120)
    assert "[red]evil[/red] [link=https://example.org]x[/link] [/nothing]" in text
    assert "[bold]note[/bold] [/]" in text
    assert "[blink]new[/blink]" in text


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_terminal_without_unicode_gets_a_table_too(encoding: str) -> None:
    text = printed(sample_report(), 100, encoding)
    assert "Effective depth" in text
    assert text.count("\n") > 60


@pytest.mark.parametrize("width", [60, 100, 160])
def test_a_comparison_shows_every_score_and_every_match(width: int) -> None:
    stream = io.StringIO()
    comparison = compare([sample_report(12), sample_report(4)])
    print_comparison(comparison, Console(file=stream, width=width, color_system=None))
    text = stream.getvalue()
    assert max(map(len, text.splitlines())) <= width
    assert "A: sample/toy-12" in text
    assert "B: sample/toy-4" in text
    assert "The depths differ" in text
    for depth in ("0.12", "0.38", "0.62", "0.88"):
        assert re.search(rf"^ *{depth} ", text, flags=re.MULTILINE)
    assert "two combined standard errors" in " ".join(text.split())
