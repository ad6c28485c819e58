"""The part of the page where a visitor chooses the text, the scores, the tokens and the precision."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gradio as gr

from depthscope.report.measures import MEASURES
from depthscope.settings import SCORE_NAMES, SPARSITY_NAMES
from jobs.tasks import PRECISIONS, make_text, read_text_file
from jobs.visitor import Choices
from page.start_stop import QUIETLY
from safety.limits import Limits
from safety.problems import Problem

__all__ = ["DEFAULT_SCORES", "DEFAULT_TOKENS", "ChoicesPanel", "default_block_size"]

DEFAULT_SCORES = (*SCORE_NAMES, *SPARSITY_NAMES)
TEXTS = {
    "Embedded sample (Python code)": "sample",
    "Pasted text": "pasted",
    "Text file": "file",
    "Hub dataset": "dataset",
}
BEGINNINGS = {"as the tokenizer does by default": "auto", "with BOS": "yes", "with the text": "no"}
TOKENS, BLOCK_SIZES = (256, 512, 1024, 2048, 4096, 8192), (64, 128, 256, 512, 1024)
DEFAULT_TOKENS, DEFAULT_BLOCK_SIZE = 512, 128


@dataclass(frozen=True)
class ChoicesPanel:
    """The inputs, in the order of `read`'s arguments, and those on which the time depends."""

    inputs: list[gr.components.Component]
    costly: list[Any]  # those that the time depends on

    @classmethod
    def build(cls, limits: Limits, tab: str) -> "ChoicesPanel":
        """Draw the panel into a tab of the present Blocks."""
        with gr.Accordion("Text, scores and precision", open=False):
            gr.Markdown("The defaults suit most models. More tokens give smaller errors and take longer.")
            text = gr.Radio(list(TEXTS), value=next(iter(TEXTS)), label="Text to measure on")
            pasted = gr.Textbox(label="Your text", lines=5, visible=False, placeholder="A few thousand words")
            file = gr.File(
                label="Your text file (UTF-8)",
                file_types=[".txt", ".md", ".py"],
                visible=False,
                height=120,
                elem_id=f"{tab}-text",
            )
            content = gr.State(None, time_to_live=3600)  # of that file, which is deleted as soon as it is read
            with gr.Row(visible=False) as dataset_row:
                dataset = gr.Textbox(label="Dataset", placeholder="Salesforce/wikitext:wikitext-2-v1", min_width=160)
                column = gr.Textbox(label="Column", placeholder="found by itself", min_width=120)
                split = gr.Textbox(label="Split", placeholder="train", min_width=120)
            scores = gr.CheckboxGroup(
                [(MEASURES[name].title, name) for name in DEFAULT_SCORES],
                value=list(DEFAULT_SCORES),
                label="Scores",
            )
            with gr.Row():
                tokens = gr.Dropdown(
                    _up_to(limits.max_tokens, TOKENS),
                    value=min(DEFAULT_TOKENS, limits.max_tokens),
                    label="Tokens to measure on",
                    min_width=140,
                )
                block = gr.Dropdown(
                    _up_to(min(limits.max_block_size, limits.max_tokens), BLOCK_SIZES),
                    value=default_block_size(limits),
                    label="Tokens in a block",
                    min_width=140,
                )
                dtype = gr.Dropdown(list(PRECISIONS.items()), value="auto", label="Precision", min_width=140)
                bos = gr.Dropdown(list(BEGINNINGS.items()), value="auto", label="Blocks begin", min_width=140)
        text.change(
            lambda chosen: (
                gr.update(visible=TEXTS[chosen] == "pasted"),
                gr.update(visible=TEXTS[chosen] == "file"),
                gr.update(visible=TEXTS[chosen] == "dataset"),
            ),
            text,
            [pasted, file, dataset_row],
            **QUIETLY,
        )
        file.change(partial(_read_uploaded_text, limits=limits), file, [content, file], **QUIETLY)
        return cls(
            [text, pasted, content, dataset, column, split, scores, tokens, block, dtype, bos], [scores, tokens, block]
        )

    @staticmethod
    def read(values: Sequence[Any], limits: Limits) -> Choices:
        """Turn the inputs' values into choices.

        Raises:
            Problem: a value is invalid.
        """
        text, pasted, content, dataset, column, split, scores, tokens, block, dtype, bos = values
        if tokens is None or block is None:
            raise Problem("settings", "Choose the number of tokens, and the number per block.")
        chosen = make_text(
            TEXTS.get(text, str(text)),
            pasted=pasted or "",
            file=content,
            dataset=dataset or "",
            column=column or "",
            split=split or "",
            limits=limits,
        )
        return Choices(tuple(scores or ()), int(tokens), int(block), dtype, chosen, bos)


def _up_to(most: int, choices: Sequence[int]) -> list[int]:
    """The choices up to a limit, and the limit itself if it is below the largest choice."""
    return sorted({number for number in choices if number <= most} | {min(most, max(choices))})


def default_block_size(limits: Limits) -> int:
    """The default number of tokens per block: at most the number of tokens."""
    return min(DEFAULT_BLOCK_SIZE, limits.max_block_size, limits.max_tokens)


def _read_uploaded_text(path: str | None, limits: Limits) -> tuple[str | None, Any]:
    """Read an uploaded text and delete its file; an invalid file is removed from the page, with a warning."""
    if not path:
        return None, gr.skip()
    try:
        return read_text_file(Path(path), limits), gr.skip()
    except Problem as problem:
        gr.Warning(str(problem))
        return None, None
    finally:
        Path(path).unlink(missing_ok=True)
