"""The paper's results along the axes that a sweep can vary, shown beside the results of the sweep.

arXiv 2603.15389: models of 1 billion parameters (width 2048, 16 heads) on 5 billion tokens of FineWeb-Edu, with 16
layers unless depth varies. Only the directions are comparable with a small model's, not the numbers. Numbers that were
read off a plot are marked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from depthscope.sweep.report.families import as_number

__all__ = ["SOURCE", "PaperSeries", "direction", "paper_series"]

SOURCE = "arXiv 2603.15389, 1B parameters, 5B tokens"


@dataclass(frozen=True)
class PaperSeries:
    """One score of the paper along one axis.

    Attributes:
        setting: the setting of the axis, by this program's name.
        axis: the paper's name of the axis.
        score: the derived number that it can be compared with.
        positions: values on the axis, as labels.
        values: the score at each.
        read_off: whether the values were read off a plot.
        note: a remark.
    """

    setting: str
    axis: str
    score: str
    positions: tuple[str, ...]
    values: tuple[float, ...]
    read_off: bool = False
    note: str = ""


DEPTHS = ("12", "16", "24", "32")
DECAYS = ("0", "0.01", "0.1", "1.0", "3.0")
LENGTHS = ("256", "512", "1,024", "2,048", "4,096", "8,192")
GROUPS = ("16", "4", "1 (MHA)")  # in the order in which the number of key/value heads rises
SMALL_SPARSE = ("dense 400M", "MoE 2B/400M")
SPARSE = ("dense 1B", "MoE 7B/1B")

ALL: tuple[PaperSeries, ...] = (
    PaperSeries("num_hidden_layers", "layers", "causal", DEPTHS, (0.355, 0.336, 0.289, 0.259)),
    PaperSeries("num_hidden_layers", "layers", "permutation", DEPTHS, (0.985, 0.713, 0.438, 0.306)),
    PaperSeries("num_hidden_layers", "layers", "usefulness", DEPTHS, (1.0, 0.813, 0.625, 0.562)),
    PaperSeries("num_hidden_layers", "layers", "variance_last", DEPTHS, (400.0, 600.0, 850.0, 1200.0), True),
    PaperSeries("num_hidden_layers", "layers", "jacobian_first", DEPTHS, (0.0142, 0.0125, 0.0100, 0.0075), True),
    PaperSeries("num_hidden_layers", "layers", "jacobian_last", DEPTHS, (0.0066, 0.0044, 0.0027, 0.0020), True),
    PaperSeries("weight_decay", "weight decay", "perplexity", DECAYS, (15.63, 15.20, 14.83, 15.55, 773.42)),
    PaperSeries("weight_decay", "weight decay", "usefulness", DECAYS, (0.75, 0.75, 0.81, 0.69, 0.63)),
    PaperSeries(
        "sequence_length", "sequence length", "perplexity", LENGTHS, (18.51, 15.71, 14.77, 14.51, 14.52, 16.30)
    ),
    PaperSeries("sequence_length", "sequence length", "usefulness", LENGTHS, (0.69, 0.75, 0.75, 0.81, 0.81, 0.75)),
    PaperSeries("num_key_value_heads", "heads per KV head", "perplexity", GROUPS, (14.47, 14.50, 14.52)),
    PaperSeries("num_key_value_heads", "heads per KV head", "usefulness", GROUPS, (0.87, 0.87, 0.81)),
    PaperSeries("num_experts", "model", "perplexity", SPARSE, (14.52, 13.82)),
    PaperSeries("num_experts", "model", "usefulness", SPARSE, (0.81, 0.94)),
    PaperSeries("num_experts", "model", "perplexity", SMALL_SPARSE, (17.56, 15.89), note="400M active"),
    PaperSeries("num_experts", "model", "usefulness", SMALL_SPARSE, (0.87, 0.94), note="400M active"),
)


def paper_series(setting: str | None, values: Sequence[Any]) -> list[PaperSeries]:
    """The paper's results along an axis with these values; [] if they are not comparable."""
    if setting == "num_experts" and not any((as_number(value) or 0) <= 1 for value in values):
        return []  # the paper compares experts with a dense model only
    return [series for series in ALL if series.setting == setting]


def direction(series: PaperSeries, first: Any, last: Any) -> tuple[float, float]:
    """The paper's values at the ends of the axis, in the sweep's order from `first` to `last`."""
    ends = (series.values[0], series.values[-1])
    return ends if (as_number(last) or 0) >= (as_number(first) or 0) else ends[::-1]
