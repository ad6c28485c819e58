"""The figures: what they draw is what the report says, for any subset of scores."""

import json
import math
import re
from collections.abc import Callable
from typing import Any

import plotly.graph_objects as go
import pytest

from depthscope.errors import ReportError, SettingsError
from depthscope.report.report import LayerReport
from depthscope.views.plots import report as plots
from reports import ALL_SCORES, sample_content, sample_report

NEEDS = {
    "effectiveness": "causal",
    "skip_cost": "skip",
    "variance_growth": "variance",
    "causal_map": "causal",
    "permutation_map": "permutation",
}


def lines_of(figure: go.Figure) -> list[Any]:
    """The traces that are lines with a name, not the bands under them."""
    return [trace for trace in figure.data if trace.type == "scatter" and trace.fill is None]


def as_json(figure: go.Figure) -> str:
    return json.dumps(figure.to_plotly_json(), sort_keys=True, allow_nan=False)


def test_every_figure_can_be_drawn_has_a_title_and_an_explanation() -> None:
    drawn = plots.figures(sample_report())
    assert list(drawn) == list(plots.FIGURES)
    for name, figure in drawn.items():
        assert figure.layout.title.text
        assert figure.layout.meta == plots.EXPLANATIONS[name]
        assert figure.layout.autosize is True
        assert figure.layout.width is None
    assert set(plots.EXPLANATIONS) == {*plots.FIGURES, "compare_layers"}


@pytest.mark.parametrize("scores", [(), *[(score,) for score in ALL_SCORES]])
def test_a_report_with_one_score_gets_the_figures_of_that_score(scores: tuple[str, ...]) -> None:
    drawn = plots.figures(sample_report(5, scores))
    assert set(drawn) - {"effectiveness"} == {
        name for name, score in NEEDS.items() if score in scores and name != "effectiveness"
    }
    assert ("effectiveness" in drawn) == bool(scores and scores != ("variance",))


@pytest.mark.parametrize("name", NEEDS)
def test_a_figure_without_its_score_says_which_to_compute(name: str) -> None:
    draw: Callable[[LayerReport], go.Figure] = getattr(plots, name)
    with pytest.raises(ReportError, match=f"--scores .*{NEEDS[name]}"):
        draw(sample_report(4, ()))


@pytest.mark.parametrize("num_layers", [1, 2, 64])
def test_figures_can_be_drawn_for_any_number_of_layers(num_layers: int) -> None:
    for figure in plots.figures(sample_report(num_layers)).values():
        json.loads(as_json(figure))


def test_the_same_report_gives_the_same_figure() -> None:
    for name, draw in plots.FIGURES.items():
        assert as_json(draw(sample_report())) == as_json(draw(sample_report())), name


def test_the_lines_hold_every_layer_and_its_value() -> None:
    report = sample_report(9, ("jacobian",))
    (line,) = lines_of(plots.effectiveness(report))
    assert list(line.x) == list(range(9))
    assert list(line.y) == pytest.approx(report.column("jacobian"), rel=1e-5)
    assert [data[0] for data in line.customdata] == list(range(9))


def test_a_cost_is_drawn_as_the_rise_of_the_loss_in_percent() -> None:
    content = sample_content(3, ("skip",))
    for row, ratio in zip(content["layers"], (1.5, 1.01, 0.9), strict=True):
        row["skip_ratio"] = ratio
    (line,) = lines_of(plots.effectiveness(LayerReport(**content)))
    assert list(line.y) == pytest.approx([50.0, 1.0, 100 * plots.SMALLEST_COST])
    assert list(line.marker.symbol) == ["circle", "circle", "circle-open"]
    assert "0.9" in line.customdata[2][1]


def test_the_band_is_one_standard_error_on_either_side() -> None:
    content = sample_content(2, ("jacobian",))
    for row in content["layers"]:
        row |= {"jacobian": 4.0, "jacobian_se": 0.5}
    band = next(trace for trace in plots.effectiveness(LayerReport(**content)).data if trace.fill == "toself")
    assert list(band.x) == [0, 1, 1, 0, None]
    assert list(band.y) == [4.5, 4.5, 3.5, 3.5, None]


def test_a_missing_layer_leaves_a_gap() -> None:
    content = sample_content(5, ("jacobian",))
    content["layers"][2] |= {"jacobian": None, "jacobian_se": None}
    figure = plots.effectiveness(LayerReport(**content))
    assert lines_of(figure)[0].y[2] is None
    band = next(trace for trace in figure.data if trace.fill == "toself")
    assert list(band.x) == [0, 1, 1, 0, None, 3, 4, 4, 3, None]


@pytest.mark.parametrize("name", ["causal", "permutation"])
def test_the_cells_of_a_map_are_the_pairs_and_undefined_ones_are_empty(name: str) -> None:
    report = sample_report(6)
    (trace,) = plots.FIGURES[f"{name}_map"](report).data
    assert trace.hoverongaps is False
    for row in range(6):
        for column in range(6):
            value, drawn = report.pairs[name][row][column], trace.z[row][column]
            if value is None:
                assert drawn is None
            else:
                assert 10**drawn == pytest.approx(value, rel=1e-4) or drawn == pytest.approx(trace.zmin)
                assert trace.customdata[row][column] != "–"


def test_a_map_draws_exact_zeros_and_equal_values() -> None:
    content = sample_content(3, ("permutation",))
    content["pairs"]["permutation"] = [[None, 0.0, 0.2], [0.0, None, 0.0], [0.2, 0.0, None]]
    (trace,) = plots.permutation_map(LayerReport(**content)).data
    assert trace.z[0][1] == trace.zmin < trace.z[0][2] == pytest.approx(math.log10(0.2))
    content["pairs"]["permutation"] = [[None, 0.0, None], [0.0, None, None], [None, None, None]]
    json.loads(as_json(plots.permutation_map(LayerReport(**content))))


def test_layer_0_is_at_the_top_of_a_map() -> None:
    assert plots.causal_map(sample_report(4)).layout.yaxis.autorange == "reversed"


def test_the_ranking_is_from_the_cheapest_to_the_costliest() -> None:
    report = sample_report(12)
    figure = plots.skip_cost(report)
    order = [int(layer) for layer in figure.layout.xaxis.categoryarray]
    ratios = report.column("skip_ratio")
    assert order == sorted(range(12), key=lambda layer: ratios[layer])
    near = report.near_identity()
    assert near is not None
    assert sorted(int(layer) for layer in figure.data[0].x) == list(near.layers)


def test_a_bar_that_runs_off_the_scale_carries_its_value() -> None:
    content = sample_content(8, ("skip",))
    for layer, row in enumerate(content["layers"]):
        row["skip_ratio"] = 4.0 if layer == 0 else 1.05
    bars = plots.skip_cost(LayerReport(**content)).data[1]
    assert bars.text[-1] == "300%"
    assert max(bars.y) == pytest.approx(20.0)
    assert set(bars.text[:-1]) == {""}


def test_the_growth_bars_add_up_to_the_change_of_the_variance() -> None:
    report = sample_report(10)
    figure = plots.variance_growth(report)
    update, covariance = (trace for trace in figure.data if trace.type == "bar")
    net = next(trace for trace in figure.data if trace.name == "net")
    after = [row["variance"] for row in report.layers]
    for layer in range(1, 10):
        change = (after[layer] - after[layer - 1]) / max(after[layer], after[layer - 1])
        assert update.y[layer] + covariance.y[layer] == pytest.approx(change, abs=1e-4)
        assert net.y[layer] == pytest.approx(change, abs=1e-4)


def test_without_a_growth_split_the_variance_is_still_drawn() -> None:
    content = sample_content(4, ("variance",))
    for row in content["layers"]:
        for name in ("variance_update", "variance_covariance", "attention_variance", "mlp_variance"):
            row[name] = None
    figure = plots.variance_growth(LayerReport(**content))
    assert [trace.name for trace in lines_of(figure)] == ["residual stream"]


def test_reports_of_unequal_depth_share_an_axis_of_relative_depth() -> None:
    figure = plots.compare_layers([sample_report(4, ("jacobian",)), sample_report(8, ("jacobian",))])
    first, second = lines_of(figure)
    assert list(first.x) == [0.125, 0.375, 0.625, 0.875]
    assert (second.x[0], second.x[-1]) == (1 / 16, 15 / 16)
    assert first.line.dash != second.line.dash
    assert first.line.color != second.line.color
    same = plots.compare_layers([sample_report(4, ("jacobian",)), sample_report(4, ("jacobian",), seed=1)])
    assert list(lines_of(same)[0].x) == [0, 1, 2, 3]


def test_reports_without_a_common_score_cannot_be_drawn_together() -> None:
    with pytest.raises(ReportError, match="share a score"):
        plots.compare_layers([sample_report(4, ("jacobian",)), sample_report(4, ("causal",))])
    with pytest.raises(SettingsError):
        plots.compare_layers([sample_report(4)])


def test_a_name_in_a_legend_cannot_carry_markup() -> None:
    content = sample_content(3, ("skip",))
    content["model"]["name"] = '<a href="https://example.org">click</a>'
    figure = plots.compare_layers([LayerReport(**content), sample_report(3, ("skip",))])
    assert not any("<a" in (trace.name or "") for trace in figure.data)
    assert lines_of(figure)[0].name.startswith("&lt;a href=")


def _shown_by_plotly(text: str) -> str:
    """A text as plotly.js shows it (svg_text_utils.js): of HTML's named entities it knows eight."""
    known = {"mu": "μ", "amp": "&", "lt": "<", "gt": ">", "nbsp": "\xa0", "times": "×", "plusmn": "±", "deg": "°"}
    return re.sub(
        r"&(#\d+|[a-z]+);",
        lambda found: chr(int(found[1][1:])) if found[1][0] == "#" else known.get(found[1], found[0]),
        text,
    )


@pytest.mark.parametrize("name", ['my "best" model', "it's", "a & b", "&quot;", "<b>bold</b>", "%{x} %{y}", "&amp;lt;"])
def test_a_name_is_shown_as_it_stands(name: str) -> None:
    content = sample_content(3, ("skip",))
    content["model"]["name"] = name
    drawn = lines_of(plots.compare_layers([LayerReport(**content), sample_report(3, ("skip",))]))[0].name
    assert _shown_by_plotly(drawn) == name
    assert not re.search(r"%\{|<", drawn)  # neither markup nor a value of a hover


def test_neighbouring_panels_have_colours_of_the_colour_blind_safe_palette() -> None:
    colors = [line.line.color for line in lines_of(plots.effectiveness(sample_report()))]
    assert len(set(colors)) == len(colors) == 6
    assert set(colors) <= set(plots.PALETTE)
    assert set(plots.PALETTE) <= {"#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9"}
