"""The sparsity of each layer in one figure: small weights, unattended positions, unused experts."""

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from depthscope.report.measures import LAYER_SCORES
from depthscope.report.report import LayerReport
from depthscope.views.plots.report import FEW_LAYERS
from depthscope.views.plots.style import PALETTE, TEXT_GREY, finish
from depthscope.wording.numbers import format_with_error

__all__ = ["EXPLANATION", "TITLE", "sparsity"]

TITLE = "Sparsity by layer: weights, attention, experts"
EXPLANATION = (
    "Each panel shows one kind of sparsity over the layers. Weights: the share that is small relative to the others in "
    "its matrix (8% for weights drawn at random). Attention: the share of the visible positions that get less than an "
    "even share of a token's attention. Experts: the load of the busiest expert over the fair share."
)
PANELS = {
    "weights_below_10pct": "Weights below 10% of their matrix's RMS",
    "attention_below_fair": "Attention below an even share",
    "expert_load_max": "Load of the busiest expert, × fair share",
}
PANEL_HEIGHT = 150


def sparsity(report: LayerReport) -> go.Figure | None:
    """Draw the sparsity that the report holds; None if it holds none."""
    names = [name for name in PANELS if report.has(name)]
    if not names:
        return None
    height = PANEL_HEIGHT * len(names) + 70
    figure = make_subplots(
        rows=len(names),
        cols=1,
        shared_xaxes=True,
        subplot_titles=[PANELS[name] for name in names],
        vertical_spacing=min(0.9 / max(len(names) - 1, 1), 38 / height),
    )
    figure.update_annotations(font={"size": 13, "color": TEXT_GREY}, x=0, xanchor="left")
    for row, (name, color) in enumerate(zip(names, PALETTE, strict=False), start=1):
        values, errors = report.column(name), report.column(f"{name}_se")
        figure.add_scatter(
            x=list(range(len(values))),
            y=values,
            mode="lines+markers",
            line={"color": color, "width": 2},
            marker={"size": 6, "color": color},
            customdata=[format_with_error(value, error) for value, error in zip(values, errors, strict=True)],
            hovertemplate=f"layer %{{x}}: {LAYER_SCORES[name].label} %{{customdata}}<extra></extra>",
            row=row,
            col=1,
        )
        if not name.startswith("expert"):
            figure.update_yaxes(tickformat=".0%", row=row, col=1)
    figure.update_xaxes(zeroline=False)
    if len(report.layers) <= FEW_LAYERS:
        figure.update_xaxes(dtick=1)
    figure.update_xaxes(title_text="layer", row=len(names), col=1)
    figure.update_yaxes(rangemode="tozero", automargin=True)
    finish(figure, EXPLANATION, height=height, showlegend=False, margin={"l": 62, "r": 12, "t": 30, "b": 48})
    return figure
