"""Comparing reports: how global scores and layers differ, and whether by more than their errors.

Layers of models of unequal depth are matched by relative depth, `(layer + 1/2) / L`. The errors of two reports on the
same text are correlated, so two combined standard errors are a cautious bound on a difference.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from depthscope.errors import SettingsError
from depthscope.report.measures import GLOBAL_SCORES, LAYER_SCORES, in_order
from depthscope.report.report import LayerReport

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Comparison", "LayerMatch", "ScoreRow", "compare"]

# Settings that do not change what is measured.
# "bos" is the option; `data` states whether blocks begin with the token.
HARMLESS_SETTINGS = frozenset(
    {"batch_size", "bos", "budget", "device", "html", "out", "precision", "scores", "sublayers"}
)


@dataclass(frozen=True)
class ScoreRow:
    """One global score in every report, and its difference from the first report's.

    `exceeds[i]`: whether report i's difference is larger than two combined standard errors; None if an error or a value
    is missing.
    """

    name: str
    values: tuple[float | None, ...]
    errors: tuple[float | None, ...]
    differences: tuple[float | None, ...]
    exceeds: tuple[bool | None, ...]


@dataclass(frozen=True)
class LayerMatch:
    """The layers at one relative depth: `layers[i]` is the layer of report i."""

    relative_depth: float
    layers: tuple[int, ...]


@dataclass(frozen=True)
class Comparison:
    """Two or more reports side by side; `labels` name them, `warnings` state what is not comparable."""

    reports: tuple[LayerReport, ...]
    labels: tuple[str, ...]
    scores: tuple[ScoreRow, ...]
    matches: tuple[LayerMatch, ...]
    warnings: tuple[str, ...]

    @property
    def same_depth(self) -> bool:
        """Whether all models have the same number of layers, so that layers match one to one."""
        return len({report.model["num_layers"] for report in self.reports}) == 1

    @property
    def layer_scores(self) -> list[str]:
        """The per-layer scores that at least two reports have, in the order of a report."""
        counts = Counter(name for report in self.reports for name in report.layer_scores)
        return in_order({name for name, count in counts.items() if count > 1}, LAYER_SCORES)

    def to_frame(self) -> "pd.DataFrame":
        """The global scores as a pandas frame, one row per score and report.

        Columns: score, report, value, se, difference (from the first report), exceeds_2se (None where unknown).
        """
        import pandas as pd  # takes half a second, so only these methods import it

        rows: list[dict[str, Any]] = [
            {
                "score": row.name,
                "report": label,
                "value": row.values[index],
                "se": row.errors[index],
                "difference": row.differences[index],
                "exceeds_2se": row.exceeds[index],
            }
            for row in self.scores
            for index, label in enumerate(self.labels)
        ]
        frame = pd.DataFrame(rows, columns=["score", "report", "value", "se", "difference", "exceeds_2se"])
        return frame.astype({"value": "float64", "se": "float64", "difference": "float64", "exceeds_2se": "object"})

    def layers_frame(self) -> "pd.DataFrame":
        """The layers of all reports as one pandas frame, with the columns `report` and `relative_depth`."""
        import pandas as pd

        frames = []
        for label, report in zip(self.labels, self.reports, strict=True):
            frame = report.to_frame()
            frame.insert(0, "report", label)
            frame.insert(2, "relative_depth", [relative_depth(layer, len(frame)) for layer in range(len(frame))])
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)


def require_reports(reports: Any) -> None:
    """Check that an argument is a list of reports.

    Raises:
        SettingsError: it is not a list, or one of its items is not a report.
    """
    if not isinstance(reports, Sequence):
        raise SettingsError(f"reports is {type(reports).__name__}; give a list of LayerReport.")
    for index, report in enumerate(reports):
        if not isinstance(report, LayerReport):
            raise SettingsError(
                f"reports[{index}] is {type(report).__name__}, not a LayerReport; LayerReport.load reads one."
            )


def compare(reports: Sequence[LayerReport]) -> Comparison:
    """Compare two or more reports with the first of them.

    Raises:
        SettingsError: fewer than two reports are given.
    """
    require_reports(reports)
    if len(reports) < 2:
        raise SettingsError(f"a comparison needs two or more reports, not {len(reports)}; add another report.")
    names = in_order({name for report in reports for name in report.global_scores}, GLOBAL_SCORES)
    labels = _labels(reports)
    return Comparison(
        reports=tuple(reports),
        labels=labels,
        scores=tuple(_score_row(name, reports) for name in names if not name.endswith("_se")),
        matches=_matches([report.model["num_layers"] for report in reports]),
        warnings=tuple(_warnings(reports, labels)),
    )


def relative_depth(layer: int, num_layers: int) -> float:
    """The relative position of a layer's middle, between 0 (the embeddings) and 1 (the head)."""
    return (layer + 0.5) / num_layers


def _score_row(name: str, reports: Sequence[LayerReport]) -> ScoreRow:
    values = tuple(report.scores.get(name) for report in reports)
    errors = tuple(_error(report, name) for report in reports)
    differences = tuple(None if v is None or values[0] is None else v - values[0] for v in values)
    exceeds = tuple(
        None
        if index == 0 or difference is None or errors[0] is None or (error := errors[index]) is None
        else abs(difference) > 2 * math.hypot(errors[0], error)
        for index, difference in enumerate(differences)
    )
    return ScoreRow(name, values, errors, differences, exceeds)


def _error(report: LayerReport, name: str) -> float | None:
    """The standard error of a global score: over blocks, combined with those of sampled pairs and probes."""
    error = report.scores.get(f"{name}_se")
    others = [report.scores.get(f"{name}_{source}_se") or 0.0 for source in ("sampling", "probe")]
    return None if error is None else math.hypot(error, *others)


def _labels(reports: Sequence[LayerReport]) -> tuple[str, ...]:
    """Name the reports by model, and add what distinguishes those of the same name."""
    additions: list[Callable[[LayerReport], str]] = [
        lambda report: "",
        lambda report: f"@{(report.model.get('revision') or 'none')[:8]}",
        lambda report: f" {report.model.get('dtype', '')}",
        lambda report: f" on {report.data['name']}",
    ]
    for addition in additions:
        labels = [f"{report.model['name']}{addition(report)}" for report in reports]
        if len(set(labels)) == len(labels):
            return tuple(labels)
    return tuple(f"{report.model['name']} #{index + 1}" for index, report in enumerate(reports))


def _matches(depths: Sequence[int]) -> tuple[LayerMatch, ...]:
    """For each layer of the shallowest model, find the layer of every model whose span holds its middle."""
    shallowest = min(depths)
    middles = [relative_depth(layer, shallowest) for layer in range(shallowest)]
    return tuple(LayerMatch(middle, tuple(int(middle * depth) for depth in depths)) for middle in middles)


def _warnings(reports: Sequence[LayerReport], labels: Sequence[str]) -> list[str]:
    """What makes the reports hard to compare, one sentence each."""
    warnings = []
    if len({report.data["fingerprint"] for report in reports}) > 1:
        texts = _each(labels, [report.data["name"] for report in reports])
        warnings.append(
            f"The text or its tokenization differs ({texts}), so differences may come from it, not from the model."
        )
    starts = [report.data.get("bos") or [] for report in reports]  # older reports lack the key, and had no BOS
    if len({bool(start) for start in starts}) > 1:
        answers = _each(labels, ["yes" if start else "no" for start in starts])
        warnings.append(
            f"Not all reports have a beginning-of-sequence token in each block ({answers}). The token changes the "
            "outputs of a model that was trained with it, and most of all its losses."
        )
    if len({report.model.get("vocab_size") for report in reports}) > 1:
        warnings.append("The vocabularies differ, so losses per token are not comparable; ratios of losses are.")
    for key in ("block_size", "eval_blocks", "fit_blocks"):
        warnings += _difference(f"data: {key}", labels, [report.data.get(key) for report in reports])
    warnings += _difference("model: dtype", labels, [report.model.get("dtype") for report in reports])
    settings = sorted({name for report in reports for name in report.settings} - HARMLESS_SETTINGS)
    for key in settings:
        warnings += _difference(f"settings: {key}", labels, [report.settings.get(key) for report in reports])
    depths = [report.model["num_layers"] for report in reports]
    if len(set(depths)) > 1:
        warnings.append(
            f"The depths differ ({_each(labels, depths)}): means over layers fall with depth by dilution alone, so "
            "also compare sums, and the layers at equal relative depth."
        )
    return warnings


def _difference(what: str, labels: Sequence[str], values: Sequence[object]) -> list[str]:
    # Compared as text, because 1 == True and lists cannot be put in a set.
    return [f"{what} differs ({_each(labels, values)})."] if len({repr(value) for value in values}) > 1 else []


def _each(labels: Sequence[str], values: Sequence[object]) -> str:
    return ", ".join(f"{_short(label)}: {_short(value)}" for label, value in zip(labels, values, strict=True))


def _short(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
