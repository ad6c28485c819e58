"""The part of the page that shows a report: headline, numbers, figures, table, downloads, code."""

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from depthscope import LayerReport
from page.results import parts
from page.results.headline import headline, tiles

__all__ = ["ResultsPanel"]

PNG_SCRIPT = "() => { window.depthscopePng && window.depthscopePng(); }"
# Figures that are side by side if there is room.
ROWS = (("effectiveness",), ("skip_cost",), ("variance_growth",), ("causal_map", "permutation_map"), ("sparsity",))


@dataclass(frozen=True)
class ResultsPanel:
    """The outputs that show one report; `update` fills them."""

    area: gr.Column
    title: gr.HTML
    numbers: gr.HTML
    groups: dict[str, gr.Column]
    plots: dict[str, gr.Plot]
    table: gr.Dataframe
    facts: gr.HTML
    buttons: dict[str, gr.DownloadButton]
    downloads: gr.Row
    code: gr.HTML

    @classmethod
    def build(cls) -> "ResultsPanel":
        """Draw the panel, hidden until there is a report."""
        with gr.Column(visible=False, elem_id="results", elem_classes="ds-results") as area:
            title, numbers = gr.HTML(elem_id="headline"), gr.HTML()
            with gr.Row(visible=False, elem_id="downloads") as downloads:
                buttons = {
                    kind: gr.DownloadButton(label, size="sm", elem_id=f"download-{kind}", min_width=110)
                    for kind, label in (("json", "Report (JSON)"), ("csv", "Layers (CSV)"), ("html", "Page (HTML)"))
                }
                png = gr.Button("Plots (PNG)", size="sm", elem_id="download-png", min_width=110)
            png.click(None, js=PNG_SCRIPT, api_visibility="private")
            groups: dict[str, gr.Column] = {}
            plots: dict[str, gr.Plot] = {}
            for names in ROWS:
                with gr.Row(equal_height=False):
                    for name in names:
                        groups[name], plots[name] = _figure(name)
            gr.HTML(
                "<h3>The layers</h3><p class='ds-caption'>Click a heading to sort. A ratio multiplies the loss.</p>"
            )
            table = gr.Dataframe(
                interactive=False,
                show_label=False,
                label="Layers",
                elem_id="layers",
                pinned_columns=1,
                max_height=480,
                buttons=["copy", "fullscreen"],
            )
            gr.HTML("<h3>What was measured</h3>")
            facts = gr.HTML()
            gr.HTML("<h3>Reproduce it</h3>")
            code = gr.HTML(elem_id="code")
        return cls(area, title, numbers, groups, plots, table, facts, buttons, downloads, code)

    @property
    def outputs(self) -> list[Any]:
        """All components that `update` may change."""
        return [
            *(self.area, self.title, self.numbers, self.table, self.facts, self.downloads, self.code),
            *self.groups.values(),
            *self.plots.values(),
            *self.buttons.values(),
        ]

    def update(self, report: LayerReport, *, is_whole: bool) -> dict[Any, Any]:
        """Show a finished or partial report; a finished report also has files to download."""
        figures = parts.drawn(report)
        name = escape(report.model["name"])
        part = "" if is_whole else "<p class='ds-caption'>Partial results; the measurement continues.</p>"
        if is_whole and report.budget is not None and report.budget["stopped"] == "time":
            part = "<p class='ds-caption'>The time was up before all blocks were measured; the notes say where.</p>"
        changes: dict[Any, Any] = {
            self.area: gr.update(visible=True),
            self.title: f"<p class='ds-eyebrow'>{name}</p><h2>{escape(headline(report))}</h2>{part}",
            self.numbers: tiles(report),
            self.table: parts.layer_table(report),
            self.facts: parts.facts(report),
            self.code: parts.listing(parts.code(report), "Commands"),
            self.downloads: gr.update(visible=is_whole),
        }
        for figure, group in self.groups.items():
            changes[group] = gr.update(visible=figure in figures)
            if figure in figures:
                changes[self.plots[figure]] = figures[figure]
        if is_whole:
            changes |= {self.buttons[kind]: path for kind, path in parts.files([report]).items()}
        return changes

    def hide(self) -> dict[Any, Any]:
        """Remove the last report from the page."""
        return {self.area: gr.update(visible=False)}


def _figure(name: str) -> tuple[gr.Column, gr.Plot]:
    """One figure with its title and explanation."""
    with gr.Column(visible=False, min_width=320) as group:
        gr.HTML(f"<h3>{parts.titles[name]}</h3>")
        plot = gr.Plot(show_label=False, elem_id=f"plot-{name}", container=False)
        gr.HTML(f"<p class='ds-caption'>{escape(parts.explanations[name])}</p>")
    return group, plot
