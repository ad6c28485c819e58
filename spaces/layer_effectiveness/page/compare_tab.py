"""The tab that compares two to six models or reports."""

from collections.abc import AsyncIterator, Sequence
from functools import partial
from html import escape
from typing import Any

import anyio
import gradio as gr
import pandas as pd

from depthscope import LayerReport, compare
from depthscope.report.measures import GLOBAL_SCORES
from depthscope.views.plots.depth import EXPLANATION as DEPTH_EXPLANATION
from depthscope.views.plots.depth import TRAINING_EXPLANATION, against_depth, of_reports, over_training
from depthscope.views.plots.report import EXPLANATIONS, compare_layers
from depthscope.wording.numbers import format_with_error
from jobs.published_sweeps import Sweep, read_sweep
from jobs.service import Service, Visit
from jobs.visitor import failed, progress_bar, read_report
from page.choices_panel import ChoicesPanel
from page.results import parts
from page.start_stop import QUIETLY, StartStop
from safety.problems import Problem

__all__ = ["build", "compared"]

FEWEST, MOST = 2, 6


def build(service: Service, kept: gr.State) -> None:
    """Draw the tab; `kept` holds the reports that the visitor made before."""
    gr.HTML(
        "<p>Compare two to six models: reports, models that you have just analysed, and models on the Hub, which are "
        "analysed one after the other. They are only comparable on the same text with the same settings; the page "
        "lists differences.</p>"
    )
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            mine = gr.CheckboxGroup([], label="Analysed on this page", visible=False, elem_id="compare-mine")
            reports = gr.File(
                label="Reports (JSON)",
                file_count="multiple",
                file_types=[".json"],
                height=160,
                elem_id="compare-reports",
            )
            models = gr.Textbox(
                label="Models on the Hub, one per line",
                lines=3,
                placeholder="EleutherAI/pythia-70m\nEleutherAI/pythia-160m",
                elem_id="compare-models",
            )
            sweep = gr.Textbox(
                label="Or a depth sweep",
                info="The dataset of reports that depthscope push created",
                placeholder="NAMESPACE/NAME",
                elem_id="compare-sweep",
            )
            panel = ChoicesPanel.build(service.limits, "compare")
            buttons = StartStop.build("Compare", "compare", "compare-stop")
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(elem_id="compare-status")
            with gr.Column(visible=False, elem_id="compared") as area:
                title = gr.HTML()
                with gr.Row(elem_id="compare-downloads"):
                    csv = gr.DownloadButton("Layers (CSV)", size="sm", elem_id="compare-csv", min_width=110)
                    page = gr.DownloadButton("Page (HTML)", size="sm", elem_id="compare-html", min_width=110)
                gr.HTML("<h3>Layer by layer</h3>")
                layers = gr.Plot(show_label=False, container=False, elem_id="plot-compare")
                gr.HTML(f"<p class='ds-caption'>{escape(EXPLANATIONS['compare_layers'])}</p>")
                with gr.Column(visible=False) as depth_area:
                    gr.HTML("<h3>Against depth</h3>")
                    depth = gr.Plot(show_label=False, container=False, elem_id="plot-depth")
                    gr.HTML(f"<p class='ds-caption'>{escape(DEPTH_EXPLANATION)}</p>")
                with gr.Column(visible=False) as course_area:
                    gr.HTML("<h3>Variance over training</h3>")
                    course = gr.Plot(show_label=False, container=False, elem_id="plot-course")
                    gr.HTML(f"<p class='ds-caption'>{escape(TRAINING_EXPLANATION)}</p>")
                gr.HTML(
                    "<h3>The scores</h3><p class='ds-caption'>With a star: differs from the first by more than two "
                    "combined standard errors.</p>"
                )
                table = gr.Dataframe(
                    interactive=False, show_label=False, label="Scores", elem_id="compare-table", pinned_columns=1
                )

    outputs = [reports, area, title, layers, depth_area, depth, course_area, course, table, csv, page]

    def show(found: Sequence[LayerReport], read: Sweep | None) -> dict[Any, Any]:
        drawn = compared(found, read)
        files = parts.files(found)
        return {
            area: gr.update(visible=True),
            title: drawn["title"],
            layers: drawn["layers"],
            depth_area: gr.update(visible=drawn["depth"] is not None),
            depth: drawn["depth"],
            course_area: gr.update(visible=drawn["course"] is not None),
            course: drawn["course"],
            table: drawn["table"],
            csv: files["csv"],
            page: files["html"],
        }

    async def run(visit: Visit, token: str | None, values: tuple[Any, ...]) -> AsyncIterator[dict[Any, Any]]:
        chosen, uploaded, named, published, own, *choices = values
        yield {
            **buttons.busy,
            area: gr.update(visible=False),
            status: progress_bar("Reading the reports", 0.0),
        }
        message: str = ""
        change: dict[Any, Any] = {}
        try:
            picked = [own[index] for index in chosen or () if index < len(own)]
            names = [line.strip() for line in (named or "").splitlines() if line.strip()]
            read: Sweep | None = None
            count = len(picked) + len(uploaded or ()) + len(names)
            if (published or "").strip():
                _require_count(count, fewest=0)
                work = partial(read_sweep, published, service.limits, visit.stop)
                read = await anyio.to_thread.run_sync(work, limiter=service.reading)
            else:
                _require_count(count)
            found = [LayerReport.from_json(text) for text in picked]
            for path in uploaded or ():
                found.append(await anyio.to_thread.run_sync(read_report, path, service.limits, limiter=service.drawing))
            if read is not None:
                found += _one_per_depth(read.trained, MOST - count)
            _require_count(len(found) + len(names))
            for index, name in enumerate(names):
                planned = await service.plan(name, "", None, panel.read(choices, service.limits), token)
                async for step in service.follow(planned, visit):
                    if isinstance(step, str):
                        yield {status: f"<p class='ds-eyebrow'>{escape(name)} ({index + 1} of {len(names)})</p>{step}"}
                    else:
                        last = step
                found.append(last)
            change = await anyio.to_thread.run_sync(partial(show, found, read), limiter=service.drawing)
        except Problem as problem:
            message = failed(problem)
        yield {**buttons.idle, status: message, **change}

    buttons.bind(service, run, [mine, reports, models, sweep, kept, *panel.inputs], status, outputs)

    def offer(own: list[str]) -> dict[str, Any]:
        names = [LayerReport.from_json(text).model["name"] for text in own]
        offered = [
            (f"{name} ({index + 1})" if names.count(name) > 1 else name, index) for index, name in enumerate(names)
        ]
        return gr.update(choices=offered, value=[index for _, index in offered], visible=bool(own))

    kept.change(offer, kept, mine, **QUIETLY)


def compared(reports: Sequence[LayerReport], sweep: Sweep | None = None) -> dict[str, Any]:
    """A comparison on the page: a title with warnings, figures and a table; for a sweep, all its models."""
    _require_count(len(reports))
    comparison = compare(reports)
    if not comparison.layer_scores:
        raise Problem(
            "report", "No two of the reports share a score per layer. Analyse the models with the same scores."
        )
    depth = against_depth(
        of_reports(reports if sweep is None else sweep.trained), of_reports(sweep.untrained if sweep else ())
    )
    courses = [(f"{course.name}", course.steps, course.values) for course in sweep.courses] if sweep else []
    warnings = "".join(f"<li>{escape(warning)}</li>" for warning in comparison.warnings)
    listed = f"<p><strong>Before comparing</strong></p><ul class='ds-notes'>{warnings}</ul>" if warnings else ""
    rows = []
    for row in comparison.scores:
        cells = {"score": GLOBAL_SCORES[row.name].label if row.name in GLOBAL_SCORES else row.name}
        for label, value, error, exceeds in zip(comparison.labels, row.values, row.errors, row.exceeds, strict=True):
            cells[label] = format_with_error(value, error) + (" *" if exceeds else "")
        rows.append(cells)
    return {
        "title": f"<h2>{escape(' and '.join(comparison.labels))}</h2>{listed}",
        "layers": parts.plot_data(compare_layers(reports), "comparison"),
        "depth": None if depth is None else parts.plot_data(depth, "against-depth"),
        "course": parts.plot_data(over_training(courses), "over-training") if courses else None,
        "table": pd.DataFrame(rows),
    }


def _one_per_depth(reports: Sequence[LayerReport], most: int) -> list[LayerReport]:
    """The first report of each depth; where there are too many depths, some of them, spread evenly."""
    by_depth: dict[int, LayerReport] = {}
    for report in reports:
        by_depth.setdefault(report.model["num_layers"], report)
    depths = sorted(by_depth)
    if len(depths) > most:
        depths = [depths[round(place * (len(depths) - 1) / max(1, most - 1))] for place in range(most)]
    return [by_depth[depth] for depth in depths]


def _require_count(count: int, fewest: int = FEWEST) -> None:
    if not fewest <= count <= MOST:
        raise Problem("settings", f"{count} models or reports were chosen; choose {FEWEST} to {MOST}.")
