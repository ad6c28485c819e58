"""The summary of a report in a few sentences, from the scores that it has."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from depthscope.wording.messages import counted, ranges
from depthscope.wording.numbers import format_number, format_with_error

if TYPE_CHECKING:
    from depthscope.report.report import LayerReport

__all__ = ["beginning", "effective_depth", "of_layers", "summarize"]


def summarize(report: "LayerReport") -> str:
    """Summarize in a few lines what was measured, which layers are near the identity, and which are cheap to drop."""
    lines = [
        _subject(report),
        effective_depth(report),
        _near_the_identity(report),
        _cost_of_skipping(report),
        _usefulness(report),
        _variance(report),
    ]
    return "\n".join(line for line in lines if line)


def effective_depth(report: "LayerReport") -> str:
    """The effective depth as "x of L layers", for each way of measuring it; empty if it was not measured."""
    ways = (
        ("effective_depth_skip", "skip_ratio", "by skipping"),
        ("effective_depth_linear", "usefulness_ratio", "by linearising"),
    )
    parts: list[str] = []
    previous = ""
    for name, score, way in ways:
        value, error = report.scores.get(name), report.scores.get(f"{name}_se")
        if value is not None:
            number = format_with_error(value, error) if error else format_number(value, 3)
            layers = of_layers(report, score)
            parts.append(f"{number} {way}" if layers == previous else f"{number} {layers} {way}")
            previous = layers
    return f"Effective depth: {', '.join(parts)}." if parts else ""


def of_layers(report: "LayerReport", score: str) -> str:
    """The phrase "of N layers" for a number that was counted over the layers with `score`."""
    layers, scored = report.model["num_layers"], len(report.ranked(score))
    if scored in (0, layers):  # 0: the report holds only the global number
        return f"of {counted(layers, 'layer')}"
    return f"of the {counted(scored, 'layer')} with a score ({layers} in all)"


def beginning(data: Mapping[str, Any]) -> str:
    """The phrase that names the special tokens at the start of every block; empty if none are known."""
    ids = data.get("bos") or []
    tokens = ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")
    return f"each beginning with BOS (token {tokens}), which no score includes" if ids else ""


def _subject(report: "LayerReport") -> str:
    data, size = report.data, ""
    if "eval_blocks" in data and "block_size" in data:
        size = f", {counted(data['eval_blocks'], 'block')} of {counted(data['block_size'], 'token')}"
        size += f", {start}" if (start := beginning(data)) else ""
    layers = counted(report.model["num_layers"], "layer")
    return f"{report.model['name']}: {layers}, measured on {data['name']}{size}."


def _near_the_identity(report: "LayerReport") -> str:
    near = report.near_identity()
    if near is None:
        return ""
    layers = f": {ranges(near.layers)}" if near.layers else ""
    return f"Near the identity ({near.criterion}): {len(near.layers)} {of_layers(report, near.score)}{layers}."


def _cost_of_skipping(report: "LayerReport") -> str:
    ranked = report.ranked("skip_ratio")
    if len(ranked) < 2:
        return ""
    most = min(3, len(ranked) // 2)
    cheapest = ", ".join(f"{layer} (loss ×{ratio:.4f})" for layer, ratio in ranked[:most])
    costliest = ", ".join(f"{layer} (loss ×{ratio:.4f})" for layer, ratio in reversed(ranked[-most:]))
    noun = "layer" if most == 1 else "layers"
    return f"Cheapest {noun} to drop, one at a time: {cheapest}. Costliest: {costliest}."


def _usefulness(report: "LayerReport") -> str:
    mean, share = report.scores.get("usefulness_ratio"), report.scores.get("usefulness")
    if mean is None:
        return ""
    text = f"Making one layer affine multiplies the loss by {mean:.4f} on average"
    threshold = report.settings.get("threshold")
    if share is not None and isinstance(threshold, (int, float)):
        counted = len(report.ranked("usefulness_ratio")) or report.model["num_layers"]
        layers = of_layers(report, "usefulness_ratio")
        text += f", and by more than {threshold:g} for {round(share * counted)} {layers}"
    return f"{text}."


def _variance(report: "LayerReport") -> str:
    values = report.column("variance")
    first, last = values[0], values[-1]
    if len(values) < 2 or first is None or last is None:
        return ""
    text = f"Variance of the residual stream: {format_number(first, 3)} after layer 0, "
    text += f"{format_number(last, 3)} after layer {len(values) - 1}"
    if first:
        text += f" (×{format_number(last / first, 3)})"
    layer, peak = report.ranked("variance")[-1]
    if peak > max(first, last):
        text += f", with its peak of {format_number(peak, 3)} after layer {layer}"
    return f"{text}."
