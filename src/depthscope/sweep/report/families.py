"""A family of a sweep laid out for reading: what runs along the axis, which lines there are, means over seeds.

A family with one axis is one line. With two or more it is one line for each value of the others, along depth where that
is among them; where the variants are no such grid, they stand side by side under their names.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from depthscope.sweep.report.results import IndexedFamily, PointResult, SweepResults

__all__ = [
    "Axis",
    "Cell",
    "Layout",
    "Line",
    "Place",
    "as_number",
    "axis_label",
    "cell",
    "lay_out",
    "pooled_deviation",
    "shown_value",
]

DEPTH = "num_hidden_layers"
MOST_SHOWN = 40  # characters of a value

LABELS = {
    "num_hidden_layers": "layers",
    "hidden_size": "hidden size",
    "weight_decay": "weight decay",
    "sequence_length": "sequence length",
    "num_key_value_heads": "KV heads",
    "num_attention_heads": "heads",
    "num_experts": "experts",
    "num_experts_per_tok": "experts a token",
    "moe_intermediate_size": "expert size",
    "norm_placement": "norms",
    "norm_scaling": "norm scaling",
    "learning_rate": "learning rate",
    "initializer_range": "initial std",
    "tokens": "tokens",
}


@dataclass(frozen=True)
class Cell:
    """A number over seeds: mean, standard deviation (None from one seed), how many, and the error over blocks."""

    mean: float | None
    deviation: float | None
    seeds: int
    error: float | None  # of the mean over seeds, from the blocks alone


@dataclass(frozen=True)
class Axis:
    """What a family varies along."""

    setting: str | None  # None: the variants themselves
    label: str
    is_ordered: bool  # numbers; else a list of names
    is_scale: bool  # positive numbers, drawn on a logarithmic axis


@dataclass(frozen=True)
class Place:
    """A variant at its place on a line: its value on the axis, as a position, in words, and as it is in the file."""

    variant: str
    value: Any
    position: float
    label: str


@dataclass(frozen=True)
class Line:
    """Variants that differ in the axis alone; `label` says what they share, "" where there is one line."""

    label: str
    places: list[Place]


@dataclass(frozen=True)
class Layout:
    """A family as it is drawn and told."""

    family: IndexedFamily
    axes: list[str]  # the settings whose values differ
    axis: Axis
    lines: list[Line]

    @property
    def places(self) -> list[Place]:
        """Every variant once, line after line."""
        return [place for line in self.lines for place in line.places]

    @property
    def ticks(self) -> list[tuple[float, str]]:
        """The positions on the axis with their labels, in order."""
        found = {place.position: place.label for place in self.places}
        return sorted(found.items())

    def name_of(self, line: Line, place: Place) -> str:
        """What tells one variant from the others of the family."""
        own = place.label if self.axis.setting is None else f"{self.axis.label} {place.label}"
        return f"{own}, {line.label}" if line.label else own


def lay_out(results: SweepResults, family: IndexedFamily) -> Layout:
    """Find the axis of a family and its lines."""
    points = {variant: results.of_variant(variant)[0] for variant in family.variants}
    axes = [axis for axis in family.axes if len({_key(point.setting(axis)) for point in points.values()}) > 1]
    for main in sorted(axes, key=lambda axis: axis != DEPTH):
        lines = _lines(points, main, [axis for axis in axes if axis != main])
        if lines is not None:
            return _along(family, axes, main, lines, points)
    for main in axes:  # settings that go together, such as the numbers of experts and of those that are chosen
        if len({_key(point.setting(main)) for point in points.values()}) == len(points):
            return _along(family, axes, main, {"": list(points)}, points)
    places = [
        Place(variant, variant, float(index), _without_family(variant, family))
        for index, variant in enumerate(family.variants)
    ]
    return Layout(family, axes, Axis(None, "variant", False, False), [Line("", places)])


def _lines(points: dict[str, PointResult], main: str, others: list[str]) -> dict[str, list[str]] | None:
    """Variants by what they share beside the axis; None where most of them would stand alone."""
    lines: dict[str, list[str]] = {}
    for variant, point in points.items():
        shared = ", ".join(f"{axis_label(axis)} {shown_value(point.setting(axis))}" for axis in others)
        lines.setdefault(shared, []).append(variant)
    long_ones = sum(len(variants) for variants in lines.values() if len(variants) > 1)
    return lines if 2 * long_ones > len(points) or len(points) == 1 else None


def _along(
    family: IndexedFamily, axes: list[str], main: str, lines: dict[str, list[str]], points: dict[str, PointResult]
) -> Layout:
    values = {variant: point.setting(main) for variant, point in points.items()}
    numbers = {variant: as_number(value) for variant, value in values.items()}
    is_ordered = all(number is not None for number in numbers.values())
    is_scale = is_ordered and all(number > 0 for number in numbers.values() if number is not None)
    variants = sorted(values, key=lambda variant: numbers[variant] or 0.0) if is_ordered else list(values)
    order = list(dict.fromkeys(_key(values[variant]) for variant in variants))

    def place(variant: str) -> Place:
        position = numbers[variant] if is_scale else float(order.index(_key(values[variant])))
        assert position is not None
        return Place(variant, values[variant], position, shown_value(values[variant]))

    made = [Line(label, sorted(map(place, alike), key=lambda place: place.position)) for label, alike in lines.items()]
    return Layout(family, axes, Axis(main, axis_label(main), is_ordered, is_scale), made)


def cell(results: SweepResults, variant: str, name: str) -> Cell:
    """A derived number of a variant over its finished seeds."""
    numbers = [point.numbers for point in results.of_variant(variant)]
    values = [value for each in numbers if (value := each.get(name)) is not None]
    if not values:
        return Cell(None, None, 0, None)
    errors = [error for each in numbers if (error := each.get(f"{name}_se")) is not None]
    # All seeds are measured on the same blocks: their errors do not average out.
    error = fmean(errors) if len(errors) == len(values) else None
    return Cell(fmean(values), stdev(values) if len(values) > 1 else None, len(values), error)


def axis_label(setting: str) -> str:
    """A setting in words."""
    return LABELS.get(setting, setting.replace("_", " ")[:MOST_SHOWN])


def shown_value(value: Any) -> str:
    """A setting's value in words, not too long."""
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    number = as_number(value)
    if number is not None:
        text = f"{value:,}" if isinstance(value, int) else f"{number:g}"
    else:
        text = " ".join(str(value).split())
    return text if len(text) <= MOST_SHOWN else text[: MOST_SHOWN - 1] + "…"


def as_number(value: Any) -> float | None:
    """A value as a finite number, None where it is none."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def pooled_deviation(cells: Sequence[Cell]) -> float | None:
    """The standard deviation over seeds that several variants share, each counted by its degrees of freedom."""
    known = [(each.deviation, each.seeds - 1) for each in cells if each.deviation is not None]
    freedom = sum(count for _, count in known)
    # hypot, since squares of numbers out of a file may overflow
    return math.hypot(*(math.sqrt(count / freedom) * deviation for deviation, count in known)) if freedom else None


def _without_family(variant: str, family: IndexedFamily) -> str:
    return shown_value(variant.removeprefix(f"{family.name}-"))


def _key(value: Any) -> str:
    number = as_number(value)
    return f"number {number!r}" if number is not None else repr(value)
