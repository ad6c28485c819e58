"""The tab that analyses one model, or shows one report."""

from collections.abc import AsyncIterator
from functools import partial
from html import escape
from typing import Any

import anyio
import gradio as gr

from depthscope import LayerReport
from jobs.service import Service, Visit
from jobs.visitor import failed, progress_bar, read_report
from page.choices_panel import ChoicesPanel
from page.results.panel import ResultsPanel
from page.start_stop import QUIETLY, StartStop, with_token
from safety.problems import Problem

__all__ = ["build"]

HUB, UPLOAD, REPORT = "Model on the Hub", "Upload a model", "Upload a report"
SOURCES = (HUB, UPLOAD, REPORT)
MODEL_FILES = [".zip", ".gguf", ".safetensors", ".json", ".txt", ".model"]
MOST_RECENT = 8
MOST_KEPT = 6  # reports of a visitor that Compare offers


def build(service: Service, page: gr.Blocks, kept: gr.State) -> None:
    """Draw the tab of a `page`; finished reports are appended to `kept`, a visitor's own list of JSON texts."""
    recent = gr.BrowserState([], storage_key="depthscope-recent", secret="depthscope")  # names only
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            source = gr.Radio(list(SOURCES), value=HUB, label="What to look at", elem_id="source")
            with gr.Group(visible=True) as hub_group:
                model = gr.Dropdown(
                    service.examples,
                    value=service.examples[0],
                    allow_custom_value=True,
                    label="Model",
                    info="Any id on the Hugging Face Hub, or an example from the list",
                    elem_id="model",
                )
                revision = gr.Textbox(
                    label="Revision",
                    placeholder="main",
                    info="Branch, tag or commit; optional",
                    elem_id="revision",
                )
            with gr.Group(visible=False) as upload_group:
                upload = gr.File(
                    label="A .zip, the files, or a .gguf",
                    file_count="multiple",
                    file_types=MODEL_FILES,
                    height=160,
                    elem_id="upload",
                )
                gr.HTML(
                    "<p class='ds-caption ds-inside'>A folder of <code>save_pretrained</code> as a .zip or as its "
                    "files together (config, tokenizer, safetensors), or one GGUF file.</p>"
                )
            with gr.Group(visible=False) as report_group:
                report = gr.File(
                    label="A report (.json)",
                    file_types=[".json"],
                    height=160,
                    elem_id="report",
                )
                gr.HTML("<p class='ds-caption ds-inside'>A file of <code>depthscope analyze --out</code>.</p>")
            panel = ChoicesPanel.build(service.limits, "analyze")
            estimated = gr.HTML(elem_id="estimate")
            buttons = StartStop.build("Analyze", "analyze", "stop")
            if service.offers_login:
                gr.LoginButton(size="sm")
                gr.HTML(
                    "<p class='ds-caption'>Sign in to analyse gated models that you may read. Your token is used "
                    "only for the download, and never stored.</p>"
                )
        with gr.Column(scale=3, min_width=320):
            status = gr.HTML(_welcome(service), elem_id="status")
            results = ResultsPanel.build()

    source.change(
        lambda chosen: [gr.update(visible=chosen == name) for name in SOURCES],
        source,
        [hub_group, upload_group, report_group],
        **QUIETLY,
    )

    async def draw(report: LayerReport, *, is_whole: bool) -> dict[Any, Any]:
        work = partial(results.update, report, is_whole=is_whole)
        return await anyio.to_thread.run_sync(work, limiter=service.drawing)

    async def analyse(visit: Visit, token: str | None, values: tuple[Any, ...]) -> AsyncIterator[dict[Any, Any]]:
        chosen, name, branch, uploaded, given, reports, named, *choices = values
        yield {
            **buttons.busy,
            status: progress_bar("Looking at what you chose", 0.0),
            estimated: "",
            **results.hide(),
        }
        finished: LayerReport | None = None
        message = ""
        try:
            if chosen == REPORT:
                read = partial(read_report, given, service.limits)
                finished = await anyio.to_thread.run_sync(read, limiter=service.drawing)
            else:
                on_hub = (name or "") if chosen == HUB else None
                planned = await service.plan(on_hub, branch or "", uploaded, panel.read(choices, service.limits), token)
                async for step in service.follow(planned, visit):
                    if isinstance(step, str):
                        yield {status: step}
                    else:
                        finished = step
                        yield await draw(step, is_whole=False)
        except Problem as problem:
            message = failed(problem, partly=finished is not None)
        last: dict[Any, Any] = {**buttons.idle, status: message}
        if chosen == UPLOAD:
            last[upload] = None  # the job has removed the files
        if finished is not None and not message:
            last |= await draw(finished, is_whole=True)
            text = finished.to_json()
            last[kept] = [*(other for other in reports if other != text), text][-MOST_KEPT:]
            if chosen == HUB:
                last[recent] = [name, *(other for other in named or () if other != name)][:MOST_RECENT]
        yield last

    inputs = [source, model, revision, upload, report, kept, recent, *panel.inputs]
    buttons.bind(service, analyse, inputs, status, [estimated, upload, kept, recent, *results.outputs])

    async def say_estimate(owner: str, token: str | None, values: tuple[Any, ...]) -> AsyncIterator[str]:
        chosen, name, branch, uploaded, *choices = values
        if chosen == REPORT or (chosen == UPLOAD and not uploaded) or (chosen == HUB and not name):
            yield ""
            return
        try:
            on_hub = name if chosen == HUB else None
            planned = await service.plan(on_hub, branch or "", uploaded, panel.read(choices, service.limits), token)
            message = planned.in_words()
        except Problem as problem:
            message = str(problem)
        yield f"<p class='ds-caption'>{escape(message)}</p>"

    gr.on(
        [page.load, source.change, model.change, revision.blur, upload.change, *(part.change for part in panel.costly)],
        with_token(service, say_estimate),
        [source, model, revision, upload, *panel.inputs],
        estimated,
        trigger_mode="always_last",
        concurrency_limit=8,
        **QUIETLY,
    )
    recent.change(
        lambda named: gr.update(
            choices=[*(named or ()), *(name for name in service.examples if name not in (named or ()))]
        ),
        recent,
        model,
        **QUIETLY,
    )


def _welcome(service: Service) -> str:
    largest = service.limits.max_parameters / 1e9
    return (
        "<div class='ds-welcome'><h2>Which layers of a language model do the work?</h2><p>Name a model on the Hub, or "
        "upload one, and press <strong>Analyze</strong>. Each layer is left out, replaced by an affine map and "
        "swapped with others, and the page shows the effect on the model: which layers matter, which are near the "
        f"identity, and the cost of leaving them out.</p><p class='ds-caption'>Models of up to {largest:.3g} billion "
        "parameters, in safetensors or GGUF. No code of a model is run. What you upload is deleted when its analysis "
        "ends.</p></div>"
    )
