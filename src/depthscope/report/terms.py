"""What the names in a report mean: label, unit and one phrase for each score, and how its numbers are written.

Everything that shows a report to a person (tables, plots, page, cards) takes its words from here, so that one score is
called by one name everywhere. The order of both tables is the order in which a report lists its scores.
"""

import math
import sys
from dataclasses import dataclass

__all__ = [
    "GLOBAL_SCORES",
    "LAYER_SCORES",
    "SPARSITY_SCORES",
    "Term",
    "format_count",
    "format_number",
    "format_score",
    "format_with_error",
    "in_order",
]

MISSING = "–"


@dataclass(frozen=True)
class Term:
    """How one score is called.

    Attributes:
        label: its name, as short as it can be and still stand alone.
        unit: "" for a pure number, "× loss" for a ratio of losses.
        phrase: what it says, in one phrase.
        heading: shorter still, for the head of a narrow column; the label where it is empty.
    """

    label: str
    unit: str
    phrase: str
    heading: str = ""


LAYER_SCORES: dict[str, Term] = {
    "variance": Term("variance", "", "variance of the residual stream after the layer, over the hidden dimension"),
    "variance_input": Term("variance before", "", "variance of the residual stream before the layer"),
    "variance_update": Term("Var(update)", "", "variance of what the layer adds to the stream"),
    "variance_covariance": Term("2 Cov", "", "twice the covariance of the stream with what the layer adds to it"),
    "attention_variance": Term("attention variance", "", "variance of the attention's output", "attention"),
    "mlp_variance": Term("MLP variance", "", "variance of the MLP's output", "MLP"),
    "usefulness_ratio": Term(
        "linearise ratio", "× loss", "loss with the layer replaced by its best affine map, over the loss", "linear"
    ),
    "skip_ratio": Term("skip ratio", "× loss", "loss with the layer left out, over the loss", "skip"),
    "causal": Term("causal", "", "relative change of the later layers' updates when the layer is left out"),
    "permutation": Term(
        "permutation", "", "relative change of the loss when the layer is swapped with another", "permute"
    ),
    "jacobian": Term("Jacobian distance", "", "distance of the layer's Jacobian from the identity", "Jacobian"),
    "block_influence": Term("block influence", "", "1 − cosine of the layer's input and output", "influence"),
    "angular_distance": Term("angular distance", "× π", "angle between the layer's input and output", "angle"),
    "update_norm": Term("update norm", "", "norm of what the layer adds, over the norm of the stream", "norm"),
    "update_cosine": Term("update cosine", "", "cosine of what the layer adds with the stream", "cosine"),
    "weights_below_1pct": Term("weights below 1%", "", "share of weights below 1% of their matrix's RMS", "w<1%"),
    "weights_below_10pct": Term("weights below 10%", "", "share of weights below 10% of their matrix's RMS", "w<10%"),
    "weights_below_50pct": Term("weights below 50%", "", "share of weights below 50% of their matrix's RMS", "w<50%"),
    "weight_hoyer": Term("Hoyer sparsity", "", "0: all weights of equal size, 1: all but one are zero", "Hoyer"),
    "attention_below_fair": Term(
        "attention below 1/n", "", "share of visible positions with less than an even share of attention", "a<1/n"
    ),
    "attention_below_tenth": Term(
        "attention below 0.1/n", "", "share of visible positions with less than a tenth of an even share", "a<.1/n"
    ),
    "attention_context": Term("context", "positions", "how many positions a token attends to, in effect", "context"),
    "attention_context_share": Term("context share", "", "the same, over the positions that it sees", "of n"),
    "attention_first": Term("attention to the first", "", "attention that goes to the first visible position", "first"),
    "expert_load_max": Term("largest expert load", "× fair", "load of the busiest expert, over the fair share", "max"),
    "expert_load_min": Term("smallest expert load", "× fair", "load of the idlest expert, over the fair share", "min"),
    "expert_load_entropy": Term("load entropy", "", "entropy of the load over that of an even one", "even"),
    "experts_dead": Term("dead experts", "", "share of experts with less than 1% of the fair share", "dead"),
    "router_confidence": Term("router confidence", "", "probability of the chosen experts together", "sure"),
    "router_top1": Term("router top-1", "", "largest probability that the router gives", "top-1"),
    "router_entropy": Term("router entropy", "", "entropy of the router's choice, over log E", "entropy"),
}

GLOBAL_SCORES: dict[str, Term] = {
    "loss": Term("loss", "nats/token", "next-token cross-entropy of the whole model"),
    "effective_depth_skip": Term("effective depth, skipping", "layers", "how many layers share the cost of skipping"),
    "effective_depth_linear": Term("effective depth, linearising", "layers", "how many share the cost of linearising"),
    "usefulness": Term("usefulness", "", "share of layers that an affine map cannot replace"),
    "usefulness_ratio": Term("mean linearise ratio", "× loss", "loss with one layer made affine"),
    "usefulness_excess": Term("sum of linearising", "× loss", "what making each layer affine adds, in sum"),
    "skip_ratio": Term("mean skip ratio", "× loss", "loss with one layer left out"),
    "causal": Term("mean causal score", "", "change of later updates when a layer is skipped"),
    "permutation": Term("mean permutation score", "", "change of the loss when two layers are swapped"),
    "permutation_sampling_se": Term("permutation, sampling error", "", "from measuring a sample of the pairs"),
    "jacobian": Term("mean Jacobian distance", "", "distance of a layer's Jacobian from the identity"),
    "jacobian_probe_se": Term("Jacobian, probing error", "", "from measuring some of all directions"),
    "variance": Term("last variance", "", "of the residual stream after the last layer"),
    "variance_growth": Term("variance growth", "×", "variance after the last layer over the first"),
    "block_influence": Term("mean block influence", "", "1 − cosine of a layer's input and output"),
    "angular_distance": Term("mean angular distance", "× π", "angle between a layer's input and output"),
    "update_norm": Term("mean update norm", "", "norm of an update over that of the stream"),
    "update_cosine": Term("mean update cosine", "", "cosine of an update with the stream"),
}


# In the order in which a report lists them; the single numbers are means over layers.
SPARSITY_SCORES = tuple(name for name in LAYER_SCORES if name.startswith(("weight", "attention_below", "attention_c")))
SPARSITY_SCORES += ("attention_first", *(name for name in LAYER_SCORES if name.startswith(("expert", "router"))))
for _name in SPARSITY_SCORES:
    _term = LAYER_SCORES[_name]
    GLOBAL_SCORES[_name] = Term(f"mean {_term.label}", _term.unit, f"mean over layers: {_term.phrase}")


def in_order(names: set[str], known: dict[str, Term]) -> list[str]:
    """Sort the names of scores: those in `known` in its order, then the others by name."""
    return [name for name in known if name in names] + sorted(names - known.keys())


def format_number(value: float | None, digits: int = 4) -> str:
    """Write a number with `digits` significant digits, thousands separated; a dash where there is none."""
    if value is None:
        return MISSING
    if value == 0:
        return "0"
    if not math.isfinite(value):
        return f"{value:g}"
    rounded = float(f"{value:.{digits - 1}e}")
    exponent = int(f"{rounded:e}".split("e")[1])
    if exponent >= 15 or exponent < -5:
        return f"{rounded:.{digits - 1}e}"
    return f"{rounded:,.{max(0, digits - 1 - exponent)}f}"


def format_count(number: float, gap: str = " ") -> str:
    """Write a count with three significant digits and its unit, `gap` between them: 97 k, 475 M, 1.28 B, 1.5 T."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * size:  # from here on three digits round it up to the unit
            return f"{number / size:.3g}{gap}{unit}"
    return f"{number:.3g}"


def format_score(name: str, value: float | None) -> str:
    """Write one layer's score for a table: ratios of losses with four decimals, the rest with three digits."""
    if value is not None and name.endswith("_ratio") and abs(value) < 100:
        return f"{value:.4f}"
    return format_number(value, 3)


def format_with_error(value: float | None, error: float | None) -> str:
    """Write `value ± error`, the error with two significant digits and the value to the same decimal place."""
    if value is None or error is None or not math.isfinite(value) or not math.isfinite(error):
        return format_number(value)
    if error <= abs(value) * sys.float_info.epsilon:  # none, or less than the value itself can tell
        return format_number(value)
    decimals = 1 - _exponent(error, 2)
    if decimals > 8 or max(abs(value), error) >= 1e15:
        shown = f"{value:.{max(1, decimals + _exponent(value, 2))}e}" if value else "0"
        return f"{shown} ± {error:.1e}"
    places = max(0, decimals)
    # Adding 0 takes the sign off a value that rounds to 0.
    return f"{round(value, decimals) + 0.0:,.{places}f} ± {round(error, decimals):,.{places}f}"


def _exponent(value: float, digits: int) -> int:
    """The power of ten of a number's first digit, once it is rounded to `digits` significant ones."""
    return int(f"{value:.{digits - 1}e}".split("e")[1])
