"""The tab that explains the scores: their meaning, our depth sweep and the paper's, and their limits."""

import json
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from depthscope.report.measures import EXPLAINED
from depthscope.views.plots.depth import DepthPoint, against_depth
from page.results import parts

__all__ = ["build"]

NUMBERS = Path(parts.__file__).with_name("depth_sweep.json")
PAPER = "https://arxiv.org/abs/2603.15389"
LIMITS = (
    (
        "A layer at a time.",
        "Two layers that can each be left out may not be left out together; the headline's run of layers is measured "
        "together for that reason.",
    ),
    (
        "On one text.",
        "Another text may need other layers. Measure on a text like yours. The standard errors cover blocks of this "
        "text only.",
    ),
    (
        "Loss, not skill.",
        "A layer that hardly changes the loss may still matter for a rare skill, such as recalling a name or copying a "
        "number.",
    ),
    (
        "Dilution.",
        "In a deeper model each layer has a smaller share of the work, so means over layers fall with depth even if "
        "no layer is wasted. Look also at sums and at the effective depth.",
    ),
    (
        "The threshold.",
        "Usefulness counts layers with a loss ratio above 1.1. Small models have few; compare the ratios themselves.",
    ),
    (
        "An untrained model also has scores.",
        "A random model has a high causal score (1.18 at 4 layers, 0.80 at 16), and a permutation score near zero. A "
        "causal score alone does not prove useful work.",
    ),
)


def build() -> None:
    """Draw the tab."""
    gr.HTML(
        "<h2>What is measured</h2><p>The layers of a transformer read from the residual stream and add to it. In deep "
        "models its variance grows, so each later layer changes it less: the <em>curse of depth</em>. "
        f"These scores measure the contribution of each layer. They come from <a href='{PAPER}' target='_blank' "
        "rel='noopener'>When Does Sparsity Mitigate the Curse of Depth in LLMs</a> and from work on pruning.</p>"
    )
    rows = "".join(
        f"<tr><th scope='row'>{escape(score.title)}</th><td>{escape(score.meaning)}<br>"
        f"<code>{escape(score.formula)}</code><span class='ds-caption'> Unit: {escape(score.unit)}. "
        f"Source: {escape(score.source)}.</span></td></tr>"
        for score in EXPLAINED
    )
    gr.HTML(
        "<table class='ds-scores'><caption class='ds-caption'>Layers count from 0, losses are in "
        f"nats.</caption>{rows}</table>"
    )
    sweep = json.loads(NUMBERS.read_text(encoding="utf-8"))
    gr.HTML(f"<h2>The curse of depth, in our numbers and the paper's</h2><p>{escape(sweep['description'])}</p>")
    ours, paper = _points(sweep["ours"], "depthscope"), _points(sweep["paper"], "the paper")
    for title, points, references, name in (
        ("Small models, trained for this", ours, (), "depth-sweep"),
        ("The paper's models", paper, (), "depth-paper"),
    ):
        figure = against_depth(points, references)
        if figure is not None:
            gr.HTML(f"<h3>{escape(title)}</h3>")
            gr.Plot(parts.plot_data(figure, name), show_label=False, container=False, elem_id=f"plot-{name}")
    gr.HTML(f"<p class='ds-caption'>{escape(sweep['reading'])}</p>")
    limits = "".join(f"<li><strong>{escape(title)}</strong> {escape(words)}</li>" for title, words in LIMITS)
    gr.HTML(f"<h2>What these scores cannot tell</h2><ul class='ds-limits'>{limits}</ul>")


def _points(rows: list[dict[str, Any]], name: str) -> list[DepthPoint]:
    return [DepthPoint(f"{name}, {row['layers']} layers", row["layers"], row["scores"]) for row in rows]
