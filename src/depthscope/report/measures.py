"""The measures: one record each in measures.yaml, which tables, pages, figures, cards and the Space read.

A `Measure` is a quantity that a user chooses to compute, such as `skip`; a report holds its numbers, per layer and for
the whole model. No other place lists them. To add a score, write its file in `scores/` and its record;
docs/architecture.md shows one.

`LAYER_SCORES` and `GLOBAL_SCORES` are all numbers by name, in the order in which a report lists them.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from depthscope.wording.numbers import format_number

__all__ = [
    "EXPLAINED",
    "GLOBAL_SCORES",
    "LAYER_SCORES",
    "MEASURES",
    "SCORE_NAMES",
    "SPARSITY_NAMES",
    "Measure",
    "Panel",
    "Term",
    "Where",
    "format_score",
    "in_order",
    "measures_markdown",
    "shown_in",
]

# Where a number is shown. A report, its CSV and its page show all numbers. The other places: the table of layers in a
# terminal; a comparison; a training run; a model card's table and its model-index; the panels of figures; the table of
# a sweep; the Space's table, and its figure over the depth of models.
Where = Literal["table", "compared", "run", "card", "index", "panel", "sweep", "space", "depth"]
Kind = Literal["effectiveness", "sparsity", "derived", "baseline"]
LAST = 1000  # the position of a number whose record names none


@dataclass(frozen=True)
class Panel:
    """How a per-layer number is drawn as one panel of a figure.

    Attributes:
        score: the number's name.
        title: the panel's title.
        unit: the unit on its axis.
        cost: whether it is a ratio of losses, drawn as (ratio - 1) in percent on a logarithmic axis.
        log: whether its axis is always logarithmic.
    """

    score: str
    title: str
    unit: str
    cost: bool = False
    log: bool = False


@dataclass(frozen=True)
class Term:
    """One number of a report: its name, how it is written and drawn, and where it is shown.

    Attributes:
        label: its name for people, short but clear without context.
        unit: "" for a pure number, "× loss" for a ratio of losses.
        phrase: its meaning in one phrase.
        heading: a shorter name for a narrow column; if empty, the label is used.
        order: its position in a report.
        at: its position in each place where it is shown.
        better: whether "higher" or "lower" means that layers contribute more; "" for neither.
        ratio: whether it is a ratio of losses near 1, which is written with four decimals.
        keep: the rank of its column in a table that is too wide; columns of 0 are dropped first, those of None never.
        panel: how it is drawn; None if it is not drawn.
    """

    label: str
    unit: str = ""
    phrase: str = ""
    heading: str = ""
    order: int = LAST
    at: Mapping[Where, int] = field(default_factory=dict)
    better: Literal["higher", "lower", ""] = ""
    ratio: bool = False
    keep: int | None = 0
    panel: Panel | None = None


@dataclass(frozen=True)
class Measure:
    """One quantity to measure.

    Attributes:
        name: its name in `--scores`.
        title: its name for people.
        meaning: its meaning in a sentence or two.
        formula: its formula as text; l is a layer, t a token.
        unit: the unit of its numbers.
        source: the paper that defines it.
        kind: "effectiveness" and "sparsity" measures have a class in `scores/` of the same name; "derived" ones are
            computed from others, and every measure needs the "baseline".
        layers: its numbers per layer.
        model: its numbers for the whole model.
    """

    name: str
    title: str = ""
    meaning: str = ""
    formula: str = ""
    unit: str = ""
    source: str = ""
    kind: Kind = "effectiveness"
    layers: Mapping[str, Term] = field(default_factory=dict)
    model: Mapping[str, Term] = field(default_factory=dict)

    @property
    def better(self) -> str:
        """Whether "higher" or "lower" means that layers contribute more; "" for neither."""
        return next((term.better for term in (self.layers or self.model).values()), "")


# The loader in C is ten times as fast; both load plain values only.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TABLE = Path(__file__).with_name("measures.yaml").read_text(encoding="utf-8")


def _measure(name: str, record: dict[str, Any]) -> Measure:
    layers, model = (
        {each: _term(each, **fields) for each, fields in record.pop(key, {}).items()} for key in ("layers", "model")
    )
    return Measure(name, layers=layers, model=model, **record)


def _term(name: str, panel: dict[str, Any] | None = None, **fields: Any) -> Term:
    return Term(panel=None if panel is None else Panel(name, **panel), **fields)


MEASURES = {name: _measure(name, record) for name, record in yaml.load(_TABLE, _LOADER).items()}


def _numbers(level: Literal["layers", "model"]) -> dict[str, Term]:
    """All numbers by name, in the order of a report; a model's sparsity numbers are means over its layers."""
    terms: dict[str, Term] = {}
    for measure in MEASURES.values():
        if level == "model" and measure.kind == "sparsity":
            for name, term in measure.layers.items():
                phrase = f"mean over layers: {term.phrase}"
                terms[name] = Term(f"mean {term.label}", term.unit, phrase, order=LAST + term.order)
        terms |= getattr(measure, level)
    return dict(sorted(terms.items(), key=lambda item: item[1].order))


LAYER_SCORES = _numbers("layers")
GLOBAL_SCORES = _numbers("model")
EXPLAINED = tuple(measure for measure in MEASURES.values() if measure.meaning)
# The scores of "all", and the sparsity scores.
SCORE_NAMES = tuple(measure.name for measure in MEASURES.values() if measure.kind == "effectiveness")
SPARSITY_NAMES = tuple(measure.name for measure in MEASURES.values() if measure.kind == "sparsity")


def shown_in(place: Where, terms: Mapping[str, Term] = LAYER_SCORES) -> tuple[str, ...]:
    """The names of the numbers that a place shows, in its order."""
    return tuple(sorted((name for name in terms if place in terms[name].at), key=lambda name: terms[name].at[place]))


def measures_markdown() -> str:
    """A Markdown table of all measures with the first clause of each meaning; README shows it."""
    rows = [f"| {measure.title} | {re.split(r'[.:] | [(]', measure.meaning)[0]}. |" for measure in EXPLAINED]
    return "\n".join(["| score | meaning |", "| --- | --- |", *rows])


def in_order(names: set[str], terms: Mapping[str, Term]) -> list[str]:
    """Sort the names of numbers: those in `terms` in its order, then the others by name."""
    return [name for name in terms if name in names] + sorted(names - terms.keys())


def format_score(name: str, value: float | None) -> str:
    """Write a per-layer number for a table: ratios of losses with four decimals, others with three digits."""
    if value is not None and name in LAYER_SCORES and LAYER_SCORES[name].ratio and abs(value) < 100:
        return f"{value:.4f}"
    return format_number(value, 3)
