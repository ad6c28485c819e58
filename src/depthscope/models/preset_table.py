"""The presets with their sizes, as a table in a terminal and in Markdown."""

from collections.abc import Iterator

from rich.table import Table

from depthscope.models.configuration_depthlm import DepthLMConfig
from depthscope.models.presets_depthlm import PRESETS
from depthscope.models.sizes import model_size

__all__ = ["preset_markdown", "preset_table"]

# The paper's depth sweep: one preset at several depths.
_VARIANTS: dict[str, list[dict[str, int]]] = {"dense-1b": [{"num_hidden_layers": depth} for depth in (12, 16, 24, 32)]}
# The title of each column, and its short title for a terminal (None: not shown there).
COLUMNS: dict[str, str | None] = {
    "preset": "preset",
    "layers": "layers",
    "hidden": "hidden",
    "heads / KV": "heads",
    "MLP": None,
    "experts": "experts",
    "parameters": "params",
    "active": "active",
    "FLOPs per token": "FLOPs",
    "at T": None,
}


def preset_table() -> Table:
    """The presets as a table for a terminal of 80 columns."""
    table = Table(
        box=None,
        padding=(0, 2, 0, 0),
        header_style="bold",
        caption="active: parameters that process one token\nFLOPs: training FLOPs per token, at the longest sequence",
        caption_justify="left",
    )
    for title in filter(None, COLUMNS.values()):
        table.add_column(title, justify="left" if title == "preset" else "right", no_wrap=True)
    for row in _rows():
        table.add_row(*(cell for cell, title in zip(row, COLUMNS.values(), strict=True) if title))
    return table


def preset_markdown() -> str:
    """The presets as a table in Markdown."""
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- |" + " ---: |" * (len(COLUMNS) - 1)]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in _rows()])


def _rows() -> Iterator[list[str]]:
    for name in PRESETS:
        for changes in _VARIANTS.get(name, [{}]):
            yield _row(name, DepthLMConfig.from_preset(name, **changes))


def _row(name: str, config: DepthLMConfig) -> list[str]:
    size = model_size(config)
    experts = "" if config.num_experts is None else f"{config.num_experts_per_tok} of {config.num_experts}"
    if config.shared_expert_intermediate_size is not None:
        experts += " + 1"
    width = config.intermediate_size if config.num_experts is None else config.moe_intermediate_size
    return [
        name,
        str(config.num_hidden_layers),
        str(config.hidden_size),
        f"{config.num_attention_heads}/{config.num_key_value_heads}",
        str(width),
        experts,
        _millions(size.total),
        _millions(size.active),
        _flops(size.training_flops_per_token),
        str(size.sequence_length),
    ]


def _millions(number: int) -> str:
    if number >= 1e9:
        return f"{number / 1e9:.2f} B"
    return f"{number / 1e6:.0f} M" if number >= 1e8 else f"{number / 1e6:.1f} M"


def _flops(number: int) -> str:
    return f"{number / 1e9:.3g} G" if number >= 1e9 else f"{number / 1e6:.3g} M"
