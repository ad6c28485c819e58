"""The numbers that a sweep compares, each computed from a point's report by one formula.

Layers count from 0 to L - 1. `no0` leaves out layer 0, which turns embeddings into the residual stream and has a far
larger score. `mean` and `sum` are over layers: a mean also falls with depth if all layers together do the same work
(dilution), which the sum shows. Each number of a report (`SCORES`) has three columns: for the trained model, for the
same model before training (`untrained_...`), and their difference (`gain_...`, trained minus untrained).

Standard errors are over blocks of text. Those of means and sums over layers are the mean and sum of the layers' errors,
an upper bound, since all layers are measured on the same blocks.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from depthscope.report.measures import GLOBAL_SCORES, LAYER_SCORES, shown_in
from depthscope.report.report import LayerReport

__all__ = ["COLUMNS", "CONTROL", "LOW_THRESHOLD", "MAIN", "SCORES", "Number", "Numbers", "derive"]

Numbers = dict[str, float | None]
Compute = Callable[[LayerReport], float | None]

LOW_THRESHOLD = 1.01  # of usefulness: at small scale only layer 0 exceeds 1.1


@dataclass(frozen=True)
class Number:
    """One derived number.

    Attributes:
        name: the name of its column.
        label: a short name for people.
        unit: "" for a pure number.
        phrase: its meaning in one phrase.
        formula: its formula from a report.
        compute: computes it from a report; None if the report lacks it.
        error: computes its standard error over blocks; None if it is unknown.
    """

    name: str
    label: str
    unit: str
    phrase: str
    formula: str
    compute: Compute = lambda report: None
    error: Compute = lambda report: None


def derive(sizes: Numbers, report: LayerReport | None, untrained: LayerReport | None) -> Numbers:
    """All numbers of one point, by the names of `COLUMNS`, and `<name>_se` if the error is known.

    Args:
        sizes: numbers that are in no report: sizes, and the losses over the whole held-out text with their error. The
            report's own loss is over fewer blocks.
        report: the report of the trained model.
        untrained: the report of the same model before training.
    """
    loss, untrained_loss = sizes.get("loss"), sizes.get("untrained_loss")
    numbers: Numbers = {name: sizes.get(name) for name in ("parameters", "active_parameters", "tokens", "flops")}
    numbers |= {"loss": loss, "loss_se": sizes.get("loss_se")}
    numbers |= {"untrained_loss": untrained_loss, "gain_loss": _difference(loss, untrained_loss)}
    numbers["perplexity"] = math.exp(loss) if loss is not None and loss < 700 else None
    numbers["perplexity_se"] = _product(numbers["perplexity"], numbers["loss_se"])
    for score in SCORES:
        trained, control = (None if each is None else score.compute(each) for each in (report, untrained))
        numbers[score.name] = trained
        numbers[f"{score.name}_se"] = None if report is None else score.error(report)
        numbers[f"untrained_{score.name}"] = control
        numbers[f"gain_{score.name}"] = _difference(trained, control)
    return numbers


# ------------------------------------------------------------------------------------------------- parts of formulas


def _single(name: str) -> Compute:
    return lambda report: report.scores.get(name)


def _of_layer(name: str, layer: int) -> Compute:
    return lambda report: report.column(name)[layer]


def _over_layers(total: Callable[[Sequence[float]], float], name: str, first: int, less: float = 0.0) -> Compute:
    """The mean or sum of `score - less` over the layers from `first` on that have the score."""

    def compute(report: LayerReport) -> float | None:
        values = _defined(report.column(name)[first:])
        return total([value - less for value in values]) if values else None

    return compute


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _growth(report: LayerReport) -> float | None:
    values = report.column("variance")
    growth = values[-1] / values[0] if values[0] and values[-1] is not None else math.inf
    return growth if math.isfinite(growth) else None


def _later_share(report: LayerReport) -> float | None:
    values = report.column("variance")
    return (values[-1] - values[0]) / values[-1] if values[0] is not None and values[-1] else None


def _share_above(report: LayerReport, threshold: float) -> float | None:
    ratios = _defined(report.column("usefulness_ratio"))
    return sum(ratio > threshold for ratio in ratios) / len(ratios) if ratios else None


def _pairs_without_first(report: LayerReport, name: str) -> float | None:
    """The mean of a matrix over the pairs i < j of layers, without layer 0."""
    matrix = report.pairs.get(name, [])
    values = _defined(value for i, row in enumerate(matrix) if i > 0 for value in row[i + 1 :])
    return _mean(values) if values else None


def _defined(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _difference(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first - second


def _product(first: float | None, second: float | None) -> float | None:
    return None if first is None or second is None else first * second


# ------------------------------------------------------------------------------------------------------- the numbers


def _global(name: str, formula: str) -> Number:
    """A number that the report contains."""
    term = GLOBAL_SCORES[name]
    return Number(name, term.label, term.unit, term.phrase, formula, _single(name), _single(f"{name}_se"))


def _over_all(prefix: str, score: str, label: str, less: float, formula: str) -> list[Number]:
    """Mean and sum over layers of one score, with and without layer 0."""
    numbers = []
    phrase = LAYER_SCORES[score].phrase + (", minus 1" if less else "")
    for total, word in ((_mean, "mean"), (math.fsum, "sum")):
        for first, without, layers in ((0, "", "all layers"), (1, "_no0", "layers from 1 on")):
            numbers.append(
                Number(
                    f"{prefix}_{word}{without}",
                    f"{word} {label}" + (", no layer 0" if first else ""),
                    LAYER_SCORES[score].unit,
                    f"{word} over {layers}: {phrase}",
                    f"{word} of {formula} over {layers}",
                    _over_layers(total, score, first, less),
                    _over_layers(total, f"{score}_se", first),
                )
            )
    return numbers


def _scores() -> list[Number]:
    variance = LAYER_SCORES["variance"]
    share, distance = GLOBAL_SCORES["usefulness"].phrase, LAYER_SCORES["jacobian"].phrase
    later_share = "share of the last variance that the layers after layer 0 add"
    return [
        Number(
            "variance_first",
            "first variance",
            variance.unit,
            "variance of the residual stream after layer 0",
            "v_0",
            _of_layer("variance", 0),
            _of_layer("variance_se", 0),
        ),
        Number(
            "variance_last",
            GLOBAL_SCORES["variance"].label,
            variance.unit,
            "variance of the residual stream after the last layer",
            "v_(L-1)",
            _of_layer("variance", -1),
            _of_layer("variance_se", -1),
        ),
        Number(
            "variance_growth",
            GLOBAL_SCORES["variance_growth"].label,
            "×",
            GLOBAL_SCORES["variance_growth"].phrase,
            "v_(L-1) / v_0",
            _growth,
            _single("variance_growth_se"),
        ),
        Number(
            "variance_later_share", "share of later layers", "", later_share, "(v_(L-1) - v_0) / v_(L-1)", _later_share
        ),
        _global("usefulness", "share of layers with r_l above the threshold of the settings, r_l the linearise ratio"),
        Number(
            "usefulness_at_1.01",
            f"usefulness at {LOW_THRESHOLD}",
            "",
            f"{share}, from a rise of the loss by {LOW_THRESHOLD - 1:.0%} on",
            f"share of layers with r_l > {LOW_THRESHOLD}",
            partial(_share_above, threshold=LOW_THRESHOLD),
        ),
        *_over_all("linearise_excess", "usefulness_ratio", "cost of linearising", 1.0, "r_l - 1"),
        *_over_all("skip_excess", "skip_ratio", "cost of skipping", 1.0, "s_l - 1, s_l the skip ratio,"),
        _global("causal", "mean of C[s, l] over pairs s < l"),
        Number(
            "causal_no0",
            "causal score, no layer 0",
            "",
            "change of later updates when a layer is skipped, without layer 0",
            "mean of C[s, l] over pairs 1 <= s < l",
            partial(_pairs_without_first, name="causal"),
            partial(_pairs_without_first, name="causal_se"),
        ),
        _global("permutation", "mean of P[i, j] over pairs i < j"),
        Number(
            "permutation_no0",
            "permutation score, no layer 0",
            "",
            "change of the loss when two layers are swapped, without layer 0",
            "mean of P[i, j] over pairs 1 <= i < j",
            partial(_pairs_without_first, name="permutation"),
            partial(_pairs_without_first, name="permutation_se"),
        ),
        *_over_all("jacobian", "jacobian", "Jacobian distance", 0.0, "D_l"),
        Number(
            "jacobian_first",
            "first Jacobian distance",
            "",
            f"{distance}, layer 0",
            "D_0",
            _of_layer("jacobian", 0),
            _of_layer("jacobian_se", 0),
        ),
        Number(
            "jacobian_last",
            "last Jacobian distance",
            "",
            f"{distance}, last layer",
            "D_(L-1)",
            _of_layer("jacobian", -1),
            _of_layer("jacobian_se", -1),
        ),
        *_over_all("block_influence", "block_influence", "block influence", 0.0, "1 - cosine"),
        _global("effective_depth_skip", "(sum e)^2 / sum e^2, e = max(s_l - 1, 0)"),
        _global("effective_depth_linear", "(sum e)^2 / sum e^2, e = max(r_l - 1, 0)"),
        *(_global(name, "as in the report") for name in shown_in("sweep", GLOBAL_SCORES)),
    ]


SCORES: tuple[Number, ...] = tuple(_scores())

_SIZES = (
    Number("parameters", "parameters", "", "all parameters", "counted"),
    Number("active_parameters", "active parameters", "", "parameters that process one token", "counted"),
    Number("tokens", "tokens", "", "tokens trained on", "steps x tokens per step"),
    Number("flops", "FLOPs", "", "of forward and backward passes over the whole training", "FLOPs per token x tokens"),
    Number(
        "loss",
        "held-out loss",
        GLOBAL_SCORES["loss"].unit,
        f"{GLOBAL_SCORES['loss'].phrase} on held-out text",
        "mean over tokens of -log p",
    ),
    Number("perplexity", "perplexity", "", "the held-out loss as a perplexity", "exp(loss)"),
)

# Every number by the name of its column, in the order of the tables.
COLUMNS: dict[str, Number] = {number.name: number for number in (*_SIZES, *SCORES)}
# The columns that tables show, and those that are compared with the models before training.
MAIN = (
    "loss",
    "perplexity",
    "variance_last",
    "variance_growth",
    "usefulness",
    "usefulness_at_1.01",
    "linearise_excess_mean_no0",
    "linearise_excess_sum_no0",
    "skip_excess_mean_no0",
    "skip_excess_sum_no0",
    "causal",
    "permutation",
    "permutation_no0",
    "jacobian_mean_no0",
    "effective_depth_skip",
    *shown_in("sweep", GLOBAL_SCORES),
)
CONTROL = tuple(name for name in MAIN if name not in ("perplexity", "usefulness", "usefulness_at_1.01"))
