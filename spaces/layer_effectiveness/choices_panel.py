"""The part of the page where a visitor chooses the text, the scores, the tokens and the precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

from depthscope.scores import EXPLANATIONS
from depthscope.settings import SCORE_NAMES, SPARSITY_NAMES
from limits import Limits
from tasks import PRECISIONS, make_text
from visitor import Choices

__all__ = ["DEFAULT_SCORES", "ChoicesPanel"]

DEFAULT_SCORES = (*SCORE_NAMES, *SPARSITY_NAMES)
TEXTS = {
    "Embedded sample (Python code)": "sample",
    "Pasted text": "pasted",
    "Text file": "file",
    "Hub dataset": "dataset",
}
TOKENS, BLOCK_SIZES = (256, 512, 1024, 2048, 4096, 8192), (64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class ChoicesPanel:
    """The inputs, in the order in which `read` takes their values, and those that the time depends on."""

    inputs: list[gr.components.Component]
    costly: list[Any]  # those that the time depends on

    @classmethod
    def build(cls, limits: Limits) -> "ChoicesPanel":
        """Draw the panel into the Blocks that are being built."""
        with gr.Accordion("Text, scores and precision", open=False):
            gr.Markdown("The defaults suit most models. More tokens make the numbers surer, and take longer.")
            text = gr.Radio(list(TEXTS), value=next(iter(TEXTS)), label="Text to measure on")
            pasted = gr.Textbox(label="Your text", lines=5, visible=False, placeholder="A few thousand words")
            file = gr.File(label="Your text file (UTF-8)", file_types=[".txt", ".md", ".py"], visible=False, height=120)
            with gr.Row(visible=False) as dataset_row:
                dataset = gr.Textbox(label="Dataset", placeholder="Salesforce/wikitext:wikitext-2-v1", min_width=160)
                column = gr.Textbox(label="Column", placeholder="found by itself", min_width=120)
                split = gr.Textbox(label="Split", placeholder="train", min_width=120)
            scores = gr.CheckboxGroup(
                [(EXPLANATIONS[name].title, name) for name in DEFAULT_SCORES],
                value=list(DEFAULT_SCORES),
                label="Scores",
            )
            with gr.Row():
                tokens = gr.Dropdown(
                    [n for n in TOKENS if n <= limits.max_tokens],
                    value=512,
                    label="Tokens to measure on",
                    min_width=140,
                )
                block = gr.Dropdown(
                    [n for n in BLOCK_SIZES if n <= limits.max_block_size],
                    value=128,
                    label="Tokens in a block",
                    min_width=140,
                )
                dtype = gr.Dropdown(list(PRECISIONS.items()), value="auto", label="Precision", min_width=140)
        text.change(
            lambda chosen: (
                gr.update(visible=TEXTS[chosen] == "pasted"),
                gr.update(visible=TEXTS[chosen] == "file"),
                gr.update(visible=TEXTS[chosen] == "dataset"),
            ),
            text,
            [pasted, file, dataset_row],
            api_visibility="private",
            show_progress="hidden",
        )
        return cls([text, pasted, file, dataset, column, split, scores, tokens, block, dtype], [scores, tokens, block])

    @staticmethod
    def read(values: Sequence[Any], limits: Limits) -> Choices:
        """Turn the inputs' values into choices.

        Raises:
            Problem: they make no sense.
        """
        text, pasted, file, dataset, column, split, scores, tokens, block, dtype = values
        chosen = make_text(
            TEXTS.get(text, "sample"),
            pasted=pasted or "",
            file=file,
            dataset=dataset or "",
            column=column or "",
            split=split or "",
            limits=limits,
        )
        return Choices(tuple(scores or ()), int(tokens), int(block), dtype, chosen)
