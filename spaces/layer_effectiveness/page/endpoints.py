"""The API for programs: named endpoints over the same queue, limits and results as the page."""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import anyio
import gradio as gr

from depthscope import LayerReport
from depthscope.text.choices import BOS_CHOICES
from jobs.service import Service, Visit
from jobs.tasks import DTYPES, make_text
from jobs.visitor import Choices, Planned, read_report
from page.choices_panel import DEFAULT_SCORES, DEFAULT_TOKENS, default_block_size
from page.results.headline import headline
from safety.problems import Kind, Problem

__all__ = ["EXAMPLES", "build", "require_arguments"]

EXAMPLES = """\
from gradio_client import Client, handle_file

client = Client("{place}")
report = client.predict("HuggingFaceTB/SmolLM2-135M", api_name="/analyze")     # a LayerReport as a dictionary
report = client.predict("EleutherAI/pythia-70m", scores="skip,causal", tokens=256, api_name="/analyze")
report = client.predict(handle_file("model.zip"), api_name="/analyze_upload")  # or a .gguf file
plan = client.predict("openai-community/gpt2", api_name="/estimate")           # seconds, layers, revision
words = client.predict(handle_file("report.json"), api_name="/summarize")

job = client.submit("HuggingFaceTB/SmolLM2-135M", api_name="/analyze")         # without waiting
client.predict(api_name="/stop")                                               # ends this client's analyses
"""

NAMES = ("analyze", "analyze_upload", "estimate", "summarize", "stop")
EXPECTED = {
    "model": "the id of a model on the Hub, such as HuggingFaceTB/SmolLM2-135M",
    "revision": 'a branch, tag or commit, or "" for the newest',
    "scores": "names of scores with commas between them, such as variance,skip",
    "tokens": f"a whole number, such as {DEFAULT_TOKENS}",
    "block_size": "a whole number, such as 128",
    "precision": f"one of {', '.join(sorted(DTYPES))}",
    "text": 'a text, or "" for the embedded sample',
    "bos": f"one of {', '.join(BOS_CHOICES)}",
    "upload": "an uploaded .zip of a save_pretrained folder, or a .gguf file",
    "report": "an uploaded .json file that depthscope analyze --out wrote",
}


LARGEST = 1e15
KIND_OF_FILE: dict[str, Kind] = {"upload": "upload", "report": "report"}


def build(service: Service) -> None:
    """Add the endpoints to the Blocks that are being built; nothing of them is seen on the page."""
    model = gr.Textbox(label="model", visible=False)
    revision = gr.Textbox("", label="revision", visible=False)
    scores = gr.Textbox(",".join(DEFAULT_SCORES), label="scores", visible=False)
    tokens = gr.Number(min(DEFAULT_TOKENS, service.limits.max_tokens), precision=0, label="tokens", visible=False)
    block_size = gr.Number(default_block_size(service.limits), precision=0, label="block_size", visible=False)
    precision = gr.Textbox("auto", label="precision", visible=False)
    text = gr.Textbox("", label="text", visible=False)
    bos = gr.Textbox("auto", label="bos", visible=False)
    upload = gr.File(label="upload", visible=False)
    report = gr.File(label="report", visible=False)
    result = gr.JSON(label="result", visible=False)
    words = gr.Textbox(label="words", visible=False)
    measured = [scores, tokens, block_size, precision, text, bos]

    def choices(scores: str, tokens: float, block_size: float, precision: str, text: str, bos: str) -> Choices:
        chosen = make_text("pasted" if text else "sample", pasted=text, limits=service.limits)
        names = tuple(name.strip() for name in scores.split(","))
        return Choices(names, int(tokens), int(block_size), precision, chosen, bos)

    async def finished(planned: Planned, visit: Visit) -> dict[str, Any]:
        last: LayerReport | None = None
        async for step in service.follow(planned, visit):
            last = step if isinstance(step, LayerReport) else last
        return {} if last is None else json.loads(last.to_json())

    # Programs name the parameters as these functions do.
    async def analyze(
        request: gr.Request,
        model: str,
        revision: str,
        scores: str,
        tokens: float,
        block_size: float,
        precision: str,
        text: str,
        bos: str,
    ) -> dict[str, Any]:
        with _errors_for_clients(), service.visit(str(request.session_hash)) as visit:
            planned = await service.plan(
                model, revision, None, choices(scores, tokens, block_size, precision, text, bos)
            )
            return await finished(planned, visit)

    async def analyze_upload(
        request: gr.Request,
        upload: str | None,
        scores: str,
        tokens: float,
        block_size: float,
        precision: str,
        text: str,
        bos: str,
    ) -> dict[str, Any]:
        with _errors_for_clients(), service.visit(str(request.session_hash)) as visit:
            planned = await service.plan(
                None, "", [upload] if upload else [], choices(scores, tokens, block_size, precision, text, bos)
            )
            return await finished(planned, visit)

    async def estimate(
        model: str, revision: str, scores: str, tokens: float, block_size: float, precision: str, text: str, bos: str
    ) -> dict[str, Any]:
        with _errors_for_clients():
            planned = await service.plan(
                model, revision, None, choices(scores, tokens, block_size, precision, text, bos)
            )
        return {
            "seconds": round(planned.seconds, 1),
            "layers": planned.shape.layers,
            "words": planned.in_words(),
            "revision": planned.task.identity,
        }

    async def summarize(report: str | None) -> str:
        with _errors_for_clients():
            found = await anyio.to_thread.run_sync(read_report, report, service.limits, limiter=service.drawing)
        return f"{headline(found)}\n{found.summary()}"

    def stop(request: gr.Request) -> None:
        service.stop(str(request.session_hash))

    _endpoint(
        "analyze",
        analyze,
        [model, revision, *measured],
        result,
        "Measure how much every layer of a model on the Hub contributes; returns a LayerReport.",
    )
    _endpoint(
        "analyze_upload",
        analyze_upload,
        [upload, *measured],
        result,
        "Measure an uploaded model: a .zip of a save_pretrained folder, or a .gguf file.",
    )
    _endpoint(
        "estimate", estimate, [model, revision, *measured], result, "Estimate the time of an analysis in seconds."
    )
    _endpoint("summarize", summarize, [report], words, "Summarise a report in words.")
    _endpoint("stop", stop, [], None, "Stop this client's analyses.", queue=False)


def _endpoint(
    name: str, function: Callable[..., Any], inputs: list[Any], outputs: Any, description: str, *, queue: bool = True
) -> None:
    gr.Button(visible=False).click(
        function, inputs, outputs, api_name=name, api_description=description, concurrency_limit=None, queue=queue
    )


def require_arguments(name: str | None, inputs: Sequence[Any], given: Sequence[Any]) -> None:
    """Refuse arguments of the endpoint `name` that are missing, null or of the wrong type for its `inputs`.

    Raises:
        gr.Error: the message names the argument and the expected value.
    """
    if name not in NAMES:
        return
    with _errors_for_clients():
        if len(given) != len(inputs):
            listed = f" ({', '.join(component.label for component in inputs)})" if inputs else ""
            raise Problem("settings", f"{name} takes {len(inputs)} arguments{listed}; {len(given)} were given.")
        for component, value in zip(inputs, given, strict=True):
            if not _fits(component, value):
                kind: Kind = KIND_OF_FILE.get(component.label, "settings")
                shown = "null" if value is None else ascii(value)[:60]
                raise Problem(kind, f"{component.label} is {shown}; give {EXPECTED[component.label]}.")


def _fits(component: Any, value: Any) -> bool:
    if isinstance(component, gr.File):
        return isinstance(value, dict) and isinstance(value.get("path"), str)
    if isinstance(component, gr.Number):
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return is_number and abs(value) < LARGEST and value == int(value)  # neither infinite nor NaN
    return isinstance(value, str)


@contextmanager
def _errors_for_clients() -> Iterator[None]:
    """Turn a problem into the error that Gradio sends to a client."""
    try:
        yield
    except Problem as problem:
        raise gr.Error(f"{problem.kind}: {problem}", print_exception=False) from problem
