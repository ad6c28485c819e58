"""The headline of a report, and the few numbers below it."""

import re
from html import escape

from depthscope import LayerReport
from depthscope.report.summary import of_layers
from depthscope.views import report_page
from depthscope.wording.numbers import format_number

__all__ = ["headline", "tiles"]

JOINT_DROP = re.compile(
    r"Dropping layers (\d+)-(\d+) together multiplies the loss by (\d+(?:\.\d+)?), measured", re.ASCII
)


def headline(report: LayerReport) -> str:
    """The number of layers near the identity, and the cost of dropping some of them, as plain text."""
    layers = report.model["num_layers"]
    near = report.near_identity()
    if near is None:
        return f"{layers} layers, in {len(report.layer_scores)} scores"
    count, whole = len(near.layers), of_layers(report, near.score)
    parts = [f"{count} {whole} {'is' if count == 1 else 'are'} near the identity"]
    if count == 0:
        parts = [f"None of the {whole.removeprefix('of ').removeprefix('the ')} is near the identity"]
    if cost := _cost(report):
        parts.append(cost)
    return "; ".join(parts)


def _cost(report: LayerReport) -> str:
    for note in report.notes:
        if match := JOINT_DROP.match(note):
            return f"dropping layers {match[1]}-{match[2]} together {_in_percent(float(match[3]))}"
    if ranked := report.ranked("skip_ratio"):
        layer, ratio = ranked[0]
        return f"dropping layer {layer}, the cheapest, {_in_percent(ratio)}"
    return ""


def _in_percent(ratio: float) -> str:
    """The cost of dropping layers, from the ratio of losses."""
    percent = 100 * (ratio - 1)
    if percent < 0.05:
        return "costs nothing" if percent > -0.05 else f"lowers the loss by {format_number(-percent, 2)}%"
    return f"costs {format_number(percent, 2)}% loss"


def tiles(report: LayerReport) -> str:
    """The numbers at the top of a report's page as HTML, each with its name and meaning."""
    cells = "".join(
        f"<div class='ds-tile'><strong>{escape(number)}</strong><span>{escape(of)}</span>"
        f"<span>{escape(meaning)}</span></div>"
        for number, of, meaning in report_page.tiles(report)
    )
    return f"<div class='ds-tiles'>{cells}</div>"
