"""What every measure is: one record each in measures.yaml, which tables, pages, figures, cards and the Space read.

A `Measure` is what a person chooses to compute, such as `skip`; its numbers are what a report then holds, one of each
layer and one of the whole model. No other place lists them. To add a score, write its file in `scores/` and its
record; docs/architecture.md shows one.

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

# Where a number is shown, beside the report itself, its CSV and its page, which hold all of them: the table of layers
# of a terminal; two reports side by side; the course of a training; a model card's table and its
# model-index; the panels of figures; the table of a sweep; the Space's table, and its figure over the depth of models.
Where = Literal["table", "compared", "run", "card", "index", "panel", "sweep", "space", "depth"]
Kind = Literal["effectiveness", "sparsity", "derived", "baseline"]
LAST = 1000  # the position of a number that names none: after all that do


@dataclass(frozen=True)
class Panel:
    """How a number of each layer is drawn as one panel of small multiples.

    Attributes:
        score: the number's name.
        title: of the panel.
        unit: of its axis.
        cost: it is a ratio of losses, drawn as (ratio - 1) in percent, on a logarithmic axis.
        log: it is always drawn on a logarithmic axis.
    """

    score: str
    title: str
    unit: str
    cost: bool = False
    log: bool = False


@dataclass(frozen=True)
class Term:
    """One number of a report: how it is called, written and drawn, and where it is shown.

    Attributes:
        label: its name, as short as it can be and still stand alone.
        unit: "" for a pure number, "× loss" for a ratio of losses.
        phrase: what it says, in one phrase.
        heading: shorter still, for the head of a narrow column; the label where it is empty.
        order: its position in a report.
        at: its position in each place where it is shown.
        better: which way means that layers contribute more; "" where neither does.
        ratio: it is a ratio of losses, near 1, which is written with four decimals.
        keep: how long its column stays in a table that is too narrow; those of 0 go first, those of None never go.
        panel: how it is drawn; None if it is not.
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
    """One thing to measure.

    Attributes:
        name: as `--scores` takes it.
        title: for people.
        meaning: what it says, in a sentence or two.
        formula: as text; layers are counted by l, tokens by t.
        unit: of its numbers.
        source: the paper that it is from.
        kind: "effectiveness" and "sparsity" have a class of `scores/` by the same name; "derived" ones are computed
            from others, and "baseline" is what all need.
        layers: its numbers of each layer.
        model: its numbers of the whole model.
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
        """Which way means that layers contribute more: "higher", "lower", or "" where neither does."""
        return next((term.better for term in (self.layers or self.model).values()), "")


# The loader in C is ten times as fast; what is loaded is our own, and both know plain values only.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
_TABLE = Path(__file__).with_name("measures.yaml").read_text(encoding="utf-8")


def _measure(name: str, record: dict[str, Any]) -> Measure:
    layers, model = (
        {each: _term(each, **fields) for each, fields in record.pop(of, {}).items()} for of in ("layers", "model")
    )
    return Measure(name, layers=layers, model=model, **record)


def _term(name: str, panel: dict[str, Any] | None = None, **fields: Any) -> Term:
    return Term(panel=None if panel is None else Panel(name, **panel), **fields)


MEASURES = {name: _measure(name, record) for name, record in yaml.load(_TABLE, _LOADER).items()}


def _numbers(of: Literal["layers", "model"]) -> dict[str, Term]:
    """All numbers by name, in the order of a report; the model's of sparsity are means of the layers'."""
    found: dict[str, Term] = {}
    for measure in MEASURES.values():
        if of == "model" and measure.kind == "sparsity":
            for name, term in measure.layers.items():
                phrase = f"mean over layers: {term.phrase}"
                found[name] = Term(f"mean {term.label}", term.unit, phrase, order=LAST + term.order)
        found |= getattr(measure, of)
    return dict(sorted(found.items(), key=lambda item: item[1].order))


LAYER_SCORES = _numbers("layers")
GLOBAL_SCORES = _numbers("model")
EXPLAINED = tuple(measure for measure in MEASURES.values() if measure.meaning)
# What can be asked for: what "all" means, and what is not effectiveness but at work behind it.
SCORE_NAMES = tuple(measure.name for measure in MEASURES.values() if measure.kind == "effectiveness")
SPARSITY_NAMES = tuple(measure.name for measure in MEASURES.values() if measure.kind == "sparsity")


def shown_in(place: Where, terms: Mapping[str, Term] = LAYER_SCORES) -> tuple[str, ...]:
    """The names of the numbers that are shown in a place, in its order."""
    return tuple(sorted((name for name in terms if place in terms[name].at), key=lambda name: terms[name].at[place]))


def measures_markdown() -> str:
    """A table of all measures, each with the beginning of its meaning; README shows it."""
    rows = [f"| {measure.title} | {re.split(r'[.:] | [(]', measure.meaning)[0]}. |" for measure in EXPLAINED]
    return "\n".join(["| score | in a sentence |", "| --- | --- |", *rows])


def in_order(names: set[str], known: Mapping[str, Term]) -> list[str]:
    """Sort the names of numbers: those in `known` in its order, then the others by name."""
    return [name for name in known if name in names] + sorted(names - known.keys())


def format_score(name: str, value: float | None) -> str:
    """Write one layer's number for a table: ratios of losses with four decimals, the rest with three digits."""
    if value is not None and name in LAYER_SCORES and LAYER_SCORES[name].ratio and abs(value) < 100:
        return f"{value:.4f}"
    return format_number(value, 3)
