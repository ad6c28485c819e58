"""Arguments and options that several commands take, each defined once."""

from pathlib import Path
from typing import Annotated

import typer

from depthscope.cli.paths import READS, READS_TREE, WRITES

__all__ = [
    "HOW",
    "OUTPUT",
    "TEXT",
    "AttnImplementation",
    "BaseModel",
    "BlockSize",
    "Bos",
    "Column",
    "Dataset",
    "Device",
    "Dtype",
    "Model",
    "Quiet",
    "ReportOut",
    "Revision",
    "Split",
    "Text",
    "TrustRemoteCode",
]

# Panels of the help.
TEXT, HOW, OUTPUT = "Text", "Model and device", "Output"

Model = Annotated[
    str,
    typer.Argument(help="A Hub id, a folder, a [bold].gguf[/] file or a PEFT adapter folder.", metavar="MODEL"),
    READS,
]


Text = Annotated[
    list[Path] | None,
    typer.Option(
        help="Text file or directory; may be given several times. Default: Python's own library source.",
        rich_help_panel=TEXT,
    ),
    READS_TREE,
]
Dataset = Annotated[
    str | None,
    typer.Option(help="A dataset name, or name:config, instead of --text.", rich_help_panel=TEXT),
    READS_TREE,
]
Column = Annotated[str | None, typer.Option(help="The column that holds the text.", rich_help_panel=TEXT)]
Split = Annotated[str | None, typer.Option(help="The split of the dataset.", rich_help_panel=TEXT)]
BlockSize = Annotated[int, typer.Option(help="Tokens in a block.", rich_help_panel=TEXT)]
Bos = Annotated[
    str,
    typer.Option(
        help="Whether each block begins with the beginning-of-sequence token, which no score includes: yes, no, or "
        "auto (as the tokenizer does by default).",
        rich_help_panel=TEXT,
    ),
]

Dtype = Annotated[
    str, typer.Option(help="auto, float32, bfloat16 or float16; auto is float32 on a CPU.", rich_help_panel=HOW)
]
Device = Annotated[
    str | None,
    typer.Option(help="cpu, cuda, cuda:1, mps, or auto to split over several devices.", rich_help_panel=HOW),
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the Hub.", rich_help_panel=HOW)]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run the code in the model's repository.", rich_help_panel=HOW)
]
AttnImplementation = Annotated[
    str | None,
    typer.Option(
        help="eager, sdpa, flash_attention_2, ...; by default the config's, or one that this machine runs.",
        rich_help_panel=HOW,
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(help="The base model of an adapter, if it has moved.", rich_help_panel=HOW),
    READS,
]

ReportOut = Annotated[Path | None, typer.Option(help="Write the report as JSON.", rich_help_panel=OUTPUT), WRITES]
Quiet = Annotated[bool, typer.Option("--quiet", help="Print no table and no progress.", rich_help_panel=OUTPUT)]
