"""The page of the Space: scores the layers of a model on the Hub, on a text.

evaluate's own widget needs a Gradio before version 4. Models are untrusted: their code is not run, their weights must
be safetensors of a limited size, and the token of the Space's owner is not sent for them.
"""

import inspect
import json.decoder
import os
from pathlib import Path
from typing import Any

os.environ["HF_HUB_DISABLE_IMPLICIT_TOKEN"] = "1"  # before huggingface_hub is imported, which reads it once

import gradio as gr
import pandas as pd
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from layer_effectiveness_measurement import DESCRIPTION, LayerEffectiveness

import depthscope
from depthscope.errors import ModelLoadError

LARGEST_GB = 1.5  # of weights; a free Space has 16 GB of memory and two cores
MOST_CHARACTERS = 20_000
SCORES = ["variance", "block_influence", "update", "skip", "causal", "usefulness"]


def measure(model: str, text: str, scores: list[str]) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The scores of a model's layers as a table, and the global scores."""
    if not scores:
        raise gr.Error("Choose at least one score.")
    try:
        revision = bounded_revision(model.strip())
        found = LayerEffectiveness(keep_in_memory=True).compute(
            data=[text[:MOST_CHARACTERS]], model=model.strip(), revision=revision, scores=",".join(scores)
        )
    except depthscope.DepthscopeError as error:
        raise gr.Error(str(error)) from error
    columns = {name.removeprefix("layer_"): values for name, values in found.items() if isinstance(values, list)}
    table = pd.DataFrame({"layer": range(found["num_layers"]), **columns})
    return table.round(4), {name: value for name, value in found.items() if not isinstance(value, list)}


def bounded_revision(model: str) -> str:
    """The commit of a model, if its weights are small enough.

    Raises:
        ModelLoadError: the model does not exist on the Hub, has no safetensors, or is too large.
    """
    try:
        validate_repo_id(model)
    except HFValidationError as error:
        raise ModelLoadError(f"{model!r} is not the id of a model on the Hub: {error}") from error
    if Path(model).exists():
        raise ModelLoadError(f"{model!r} is a folder of this Space; give the id of a model on the Hub.")
    try:
        api = HfApi()
        revision = api.model_info(model).sha
        tree = api.list_repo_tree(model, revision=revision)
        sizes = [file.size for file in tree if file.path.endswith(".safetensors")]
    except (HfHubHTTPError, HTTPError) as error:
        raise ModelLoadError(f"The Hub has no public model {model!r}: {type(error).__name__}.") from error
    if not sizes:
        raise ModelLoadError(f"{model!r} has no weights as safetensors; other formats are not loaded.")
    if sum(sizes) > LARGEST_GB * 1e9:
        raise ModelLoadError(
            f"The weights of {model!r} take {sum(sizes) / 1e9:.1f} GB; the limit of this Space is {LARGEST_GB} GB. "
            f"Measure it on your own machine: depthscope analyze {model}"
        )
    return str(revision)


def build() -> gr.Blocks:
    """The page."""
    with gr.Blocks(title="Layer effectiveness") as page:
        gr.Markdown(f"# Layer effectiveness\n{DESCRIPTION}")
        with gr.Row():
            model = gr.Textbox("HuggingFaceTB/SmolLM2-135M", label="Model on the Hub", max_length=120)
            scores = gr.CheckboxGroup(SCORES, value=["variance", "block_influence", "skip"], label="Scores")
        text = gr.Textbox(example_text(), label="Text", lines=6, max_lines=12, max_length=MOST_CHARACTERS)
        button = gr.Button("Measure", variant="primary")
        table = gr.Dataframe(label="Layers, from 0", interactive=False)
        overall = gr.JSON(label="Of the whole model")
        button.click(measure, [model, text, scores], [table, overall], api_name="measure", concurrency_limit=1)
        gr.Markdown(readme())
    return page


def example_text() -> str:
    """Source of Python's own library as a sample."""
    return inspect.getsource(json.decoder)[:MOST_CHARACTERS]


def readme() -> str:
    """README.md without the Space's settings at its top."""
    return (Path(__file__).parent / "README.md").read_text(encoding="utf-8").split("---", 2)[2]


if __name__ == "__main__":
    build().launch()
