"""Measured and predicted variance of each layer in one figure."""

import math
from collections.abc import Sequence

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from depthscope.errors import ReportError, SettingsError
from depthscope.report.report import LayerReport
from depthscope.theory.recursion import VariancePrediction
from depthscope.views.plots.style import BLUE, GREEN, ORANGE, TEXT_GREY, VERMILION, finish
from depthscope.wording.numbers import format_number

__all__ = ["EXPLANATION", "variance_theory"]

EXPLANATION = (
    "Solid lines are measured. Dashed lines are the prediction for independent random weights of the same sizes. "
    "Above: the variance of the residual stream after each layer. Below: the variance of the outputs of attention and "
    "MLP. Where the lines differ, the weights have learnt directions that fit the residual stream or one another."
)
PANEL_HEIGHT = 250
STREAM_TITLE, SUBLAYER_TITLE = "Variance of the residual stream", "Variance of the outputs of attention and MLP"

Pair = tuple[LayerReport, VariancePrediction]


def variance_theory(report: LayerReport, prediction: VariancePrediction, initial: Pair | None = None) -> go.Figure:
    """Draw measured and predicted variance over the layers, on logarithmic axes.

    Args:
        report: a report with a variance score.
        prediction: the prediction for the same model and tokens.
        initial: report and prediction of the model before training, drawn in the same figure.

    Raises:
        ReportError: a report has no variance.
        SettingsError: a report and its prediction differ in their number of layers.
    """
    for measured, predicted in [(report, prediction), *([initial] if initial else [])]:
        _require_match(measured, predicted)
    rows = 2 if report.has("attention_variance") or report.has("mlp_variance") else 1
    figure = make_subplots(
        rows=rows,
        cols=1,
        shared_xaxes=True,
        subplot_titles=[STREAM_TITLE, SUBLAYER_TITLE][:rows],
        vertical_spacing=0.09,
    )
    # The panels' titles, at their left end.
    figure.update_annotations(font={"size": 13, "color": TEXT_GREY}, x=0, xanchor="left")
    name = "trained" if initial else "residual stream"
    _draw(figure, 1, report.column("variance"), prediction.variance.tolist(), BLUE, name)
    if initial:
        _draw(figure, 1, initial[0].column("variance"), initial[1].variance.tolist(), ORANGE, "at initialisation")
    if report.has("attention_variance"):
        predicted_attention = prediction.attention_variance.tolist()
        _draw(figure, rows, report.column("attention_variance"), predicted_attention, VERMILION, "attention")
    if report.has("mlp_variance"):
        _draw(figure, rows, report.column("mlp_variance"), prediction.mlp_variance.tolist(), GREEN, "MLP")
    return _laid_out(figure, rows, len(report.layers))


def _require_match(report: LayerReport, prediction: VariancePrediction) -> None:
    if not report.has("variance"):
        raise ReportError("The report has no variance, so there is nothing to draw; analyse with --scores variance.")
    if len(report.layers) != len(prediction.variance):
        raise SettingsError(
            f"The report has {len(report.layers)} layers and the prediction {len(prediction.variance)}: "
            "give a report and a prediction of the same model."
        )


def _draw(
    figure: go.Figure, row: int, measured: Sequence[float | None], predicted: Sequence[float], color: str, name: str
) -> None:
    """Draw one quantity twice: measured with markers, predicted dashed in the same colour."""
    for kind, values in (("measured", measured), ("predicted", predicted)):
        figure.add_scatter(
            x=list(range(len(values))),
            y=[_drawable(value) for value in values],
            mode="lines+markers" if kind == "measured" else "lines",
            line={"color": color, "width": 2, "dash": "solid" if kind == "measured" else "dash"},
            marker={"size": 6, "color": color},
            customdata=[format_number(value) for value in values],
            hovertemplate=f"{name}, {kind}, layer %{{x}}: %{{customdata}}<extra></extra>",
            name=name if kind == "measured" else f"{name}, predicted",
            legendgroup=name,
            showlegend=kind == "measured",
            row=row,
            col=1,
        )


def _drawable(value: float | None) -> float | None:
    """Six significant digits; a logarithmic axis has no zero."""
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) and value > 0 else None


def _laid_out(figure: go.Figure, rows: int, layers: int) -> go.Figure:
    """Give the figure the fonts, grid and transparent background of the other figures."""
    title = {"text": "Variance, measured (solid) and predicted (dashed)", "x": 0, "xref": "paper"}
    figure.update_layout(title=title, title_font_size=17)
    finish(
        figure,
        EXPLANATION,
        height=PANEL_HEIGHT * rows + 140,
        autosize=True,
        margin={"l": 62, "r": 12, "t": 70, "b": 75},
        legend={"orientation": "h", "x": 0, "y": 0, "yref": "container", "yanchor": "bottom"},
    )
    figure.update_xaxes(zeroline=False, dtick=1 if layers <= 16 else None)
    figure.update_xaxes(title_text="layer", title_standoff=4, row=rows, col=1)
    # Ticks at powers of ten, and at two and five times them if a panel spans few.
    figure.update_yaxes(type="log", dtick="D2", tickformat=",~g", automargin=True)
    return figure
