"""The layout of a family of a sweep: its axis, its lines, and means over seeds.

A family with one axis is one line. With several axes it has one line per value of the others, along depth if depth is
one of them. Variants that form no such grid are placed side by side with their names.
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
    "format_value",
    "lay_out",
    "pooled_deviation",
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
    "num_experts_per_tok": "experts per token",
    "moe_intermediate_size": "expert size",
    "norm_placement": "norms",
    "norm_scaling": "norm scaling",
    "learning_rate": "learning rate",
    "initializer_range": "initial std",
    "tokens": "tokens",
}


@dataclass(frozen=True)
class Cell:
    """A number over seeds: mean, standard deviation (None for one seed), number of seeds, and error over blocks."""

    mean: float | None
    deviation: float | None
    seeds: int
    error: float | None  # of the mean over seeds, from the blocks alone


@dataclass(frozen=True)
class Axis:
    """The axis of a family."""

    setting: str | None  # None: the variants themselves
    label: str
    is_ordered: bool  # numbers; else a list of names
    is_scale: bool  # positive numbers, drawn on a logarithmic axis


@dataclass(frozen=True)
class Place:
    """A variant on a line: its value on the axis as in the file, as a position, and as a label."""

    variant: str
    value: Any
    position: float
    label: str


@dataclass(frozen=True)
class Line:
    """Variants that differ only along the axis; `label` names their shared settings, "" for a single line."""

    label: str
    places: list[Place]


@dataclass(frozen=True)
class Layout:
    """A family as figures and sentences show it."""

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
        labels = {place.position: place.label for place in self.places}
        return sorted(labels.items())

    def name_of(self, line: Line, place: Place) -> str:
        """The name that distinguishes a variant in its family."""
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
    for main in axes:  # settings that change together, such as the numbers of experts and of chosen experts
        if len({_key(point.setting(main)) for point in points.values()}) == len(points):
            return _along(family, axes, main, {"": list(points)}, points)
    places = [
        Place(variant, variant, float(index), _without_family(variant, family))
        for index, variant in enumerate(family.variants)
    ]
    return Layout(family, axes, Axis(None, "variant", False, False), [Line("", places)])


def _lines(points: dict[str, PointResult], main: str, others: list[str]) -> dict[str, list[str]] | None:
    """Variants grouped by their settings outside the axis; None if most would be alone."""
    lines: dict[str, list[str]] = {}
    for variant, point in points.items():
        shared = ", ".join(f"{axis_label(axis)} {format_value(point.setting(axis))}" for axis in others)
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
        return Place(variant, values[variant], position, format_value(values[variant]))

    line_list = [
        Line(label, sorted(map(place, alike), key=lambda place: place.position)) for label, alike in lines.items()
    ]
    return Layout(family, axes, Axis(main, axis_label(main), is_ordered, is_scale), line_list)


def cell(results: SweepResults, variant: str, name: str) -> Cell:
    """A derived number of a variant over its finished seeds."""
    numbers = [point.numbers for point in results.of_variant(variant)]
    values = [value for each in numbers if (value := each.get(name)) is not None]
    if not values:
        return Cell(None, None, 0, None)
    errors = [error for each in numbers if (error := each.get(f"{name}_se")) is not None]
    # All seeds are measured on the same blocks, so their errors do not average out.
    error = fmean(errors) if len(errors) == len(values) else None
    return Cell(fmean(values), stdev(values) if len(values) > 1 else None, len(values), error)


def axis_label(setting: str) -> str:
    """The label of a setting."""
    return LABELS.get(setting, setting.replace("_", " ")[:MOST_SHOWN])


def format_value(value: Any) -> str:
    """A setting's value as a short text."""
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
    """A value as a finite number; None if it is not one."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def pooled_deviation(cells: Sequence[Cell]) -> float | None:
    """The standard deviation over seeds pooled over variants, weighted by their degrees of freedom."""
    deviations = [(each.deviation, each.seeds - 1) for each in cells if each.deviation is not None]
    freedom = sum(count for _, count in deviations)
    # hypot, since squares of numbers from a file may overflow
    return math.hypot(*(math.sqrt(count / freedom) * deviation for deviation, count in deviations)) if freedom else None


def _without_family(variant: str, family: IndexedFamily) -> str:
    return format_value(variant.removeprefix(f"{family.name}-"))


def _key(value: Any) -> str:
    number = as_number(value)
    return f"number {number!r}" if number is not None else repr(value)
