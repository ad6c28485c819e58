"""The changes in a family of a sweep, in words: their direction, and whether they exceed the noise.

A change is clear if it exceeds twice the noise. The noise of a change between two variants is the standard error of the
difference of their means over seeds, s sqrt(1/n + 1/m), where s is the standard deviation pooled over all variants of
the line. With one seed, it combines the two standard errors over blocks as independent ones. Neither covers other data,
other sizes or longer training.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from depthscope.runs.layout import DIVERGED, FAILED, FINISHED, NOT_RUN, UNFINISHED, UNREADABLE
from depthscope.sweep.report.derived import COLUMNS, CONTROL
from depthscope.sweep.report.families import Cell, Layout, Line, Place, axis_label, cell, pooled_deviation
from depthscope.sweep.report.paper import direction, paper_series
from depthscope.sweep.report.results import SweepResults
from depthscope.wording.numbers import format_number

__all__ = ["Change", "changes", "family_title", "family_words", "noise_words", "status_lines"]

CLEAR = 2.0  # times the noise

# Scores that only the comparison with the paper mentions.
PAPER_ONLY = ("usefulness", "perplexity", "jacobian_first", "jacobian_last")

PROBLEMS = {
    DIVERGED: "Diverged (losses or activations were not finite)",
    FAILED: "Failed",
    UNREADABLE: "Unreadable",
    UNFINISHED: "Started but not finished",
    NOT_RUN: "Not run yet",
}
REMEDIES = {
    UNREADABLE: "To measure it again, delete its result.json and run again; to train it again, delete its folder."
}
ANEW, AGAIN = (
    "To run the point again, delete its folder.",
    "It may be intact: make it readable, and try again.",
)


@dataclass(frozen=True)
class Change:
    """The change of one score from one variant of a line to another."""

    name: str
    first: float
    last: float
    noise: float | None
    turn: tuple[str, float] | None = None  # a variant in between whose score lies clearly beyond both

    @property
    def clear(self) -> bool | None:
        """Whether the change exceeds twice the noise; None if the noise is unknown."""
        return None if self.noise is None else abs(self.last - self.first) > CLEAR * self.noise

    def text(self) -> str:
        """The change in words."""
        verb = "rises" if self.last > self.first else "falls" if self.last < self.first else "stays"
        ends = f"{format_number(self.first, 3)} to {format_number(self.last, 3)}"
        between = f" ({format_number(self.turn[1], 3)} at {self.turn[0]})" if self.turn else ""
        return f"{COLUMNS[self.name].label} {verb} from {ends}{between}"


def changes(results: SweepResults, places: Sequence[Place], first: Place, last: Place) -> list[Change]:
    """The known changes of the scores between two variants.

    Args:
        results: the sweep.
        places: the variants whose spread over seeds gives the noise, in the order of the axis, if it has one.
        first: the variant before the change.
        last: the variant after the change.
    """
    items = []
    for name in (*CONTROL, *PAPER_ONLY):
        cells = {place.variant: cell(results, place.variant, name) for place in places}
        ends = [cells[place.variant] for place in (first, last)]
        if ends[0].mean is not None and ends[1].mean is not None:
            pooled = pooled_deviation(list(cells.values()))
            noise = _noise(ends[0], ends[1], pooled)
            between = [
                (place.label, each.mean, CLEAR * max(noises))
                for place in places
                if (each := cells[place.variant]).mean is not None
                and (noises := [noise_value for end in ends if (noise_value := _noise(each, end, pooled)) is not None])
            ]
            turn = _turn(between, ends[0].mean, ends[1].mean) if noise is not None else None
            items.append(Change(name, ends[0].mean, ends[1].mean, noise, turn))
    return items


def family_words(results: SweepResults, layout: Layout, most: int = len(CONTROL), paper: bool = True) -> list[str]:
    """The changes along the axis, and their agreement with the paper.

    Args:
        results: the sweep.
        layout: the family.
        most: the largest number of changes to list.
        paper: whether to compare with the paper.
    """
    sentences = []
    for index, line in enumerate(layout.lines):
        for first, last in _compared(layout, line, results):
            places = line.places if layout.axis.is_ordered else [first, last]
            compared = changes(results, places, first, last)
            place_note = f" ({line.label})" if line.label else ""
            axis = f"{layout.axis.label} " if layout.axis.setting is not None else ""
            sentences.append(_sentences(f"From {axis}{first.label} to {last.label}{place_note}.", compared, most))
            if paper and index == 0:
                sentences.append(_paper(layout, first, last, compared))
    sentences += [_sentences(head, compared, most) for head, compared in _across(results, layout)]
    return [sentence for sentence in sentences if sentence] or [
        "Too few variants of this family are finished for a comparison."
    ]


def _across(results: SweepResults, layout: Layout) -> Iterator[tuple[str, list[Change]]]:
    """The first line compared with each other line, at the last place that both have finished."""
    first = layout.lines[0]
    for other in layout.lines[1:]:
        finished_places = {place.position: place for place in first.places if _done(results, place)}
        both = [(finished_places[place.position], place) for place in other.places if place.position in finished_places]
        both = [(first_place, second_place) for first_place, second_place in both if _done(results, second_place)]
        if both:
            first_place, second_place = both[-1]
            head = f"At {layout.axis.label} {first_place.label}, from {first.label} to {other.label}."
            yield head, changes(results, [first_place, second_place], first_place, second_place)


def _done(results: SweepResults, place: Place) -> bool:
    return any(point.finished for point in results.of_variant(place.variant))


def _compared(layout: Layout, line: Line, results: SweepResults) -> Iterator[tuple[Place, Place]]:
    """The pairs of finished variants to compare: first and last on a scale, first and every other in a list."""
    done = [place for place in line.places if _done(results, place)]
    if len(done) < 2:
        return
    for other in done[-1:] if layout.axis.is_ordered else done[1:]:
        yield done[0], other


def _sentences(head: str, compared: list[Change], most: int) -> str:
    main = [change for change in compared if change.name in CONTROL]
    groups = {
        "Clear": [change.text() for change in main if change.clear],
        "Within the noise": [COLUMNS[change.name].label for change in main if change.clear is False],
        "Noise unknown": [change.text() for change in main if change.clear is None],
    }
    parts = [f"{kind}: {_some(items, most)}." for kind, items in groups.items() if items]
    return " ".join([head, *parts]) if parts else ""


def _some(items: list[str], most: int) -> str:
    more = [f"and {len(items) - most} more"] if len(items) > most else []
    return "; ".join(items[:most] + more)


def _turn(between: Sequence[tuple[str, float, float]], first: float, last: float) -> tuple[str, float] | None:
    """The place that lies furthest beyond both ends, if it does so by more than its third entry."""

    def beyond(value: float) -> float:
        return max(value - max(first, last), min(first, last) - value)

    far = [(label, value) for label, value, least in between if beyond(value) > least]
    return max(far, key=lambda each: beyond(each[1]), default=None)


def _paper(layout: Layout, first: Place, last: Place, compared: list[Change]) -> str:
    """The agreement of the directions with the paper's."""
    values = [place.value for place in layout.places]
    by_name = {change.name: change for change in compared}
    groups: dict[str, list[str]] = {"Same direction here": [], "Opposite direction here": [], "Not clear here": []}
    for series in paper_series(layout.axis.setting, values):
        change = by_name.get(series.score)
        if change is None or series.note:
            continue
        paper_ends = direction(series, first.value, last.value)
        agrees = (paper_ends[1] - paper_ends[0]) * (change.last - change.first) > 0
        kind = (
            "Not clear here"
            if change.clear is not True
            else "Same direction here"
            if agrees
            else "Opposite direction here"
        )
        turn = _turn([(at, value, 0.0) for at, value in zip(series.positions, series.values, strict=True)], *paper_ends)
        between = f" ({turn[1]:g} at {turn[0]})" if turn else ""
        groups[kind].append(f"{COLUMNS[series.score].label} {paper_ends[0]:g} to {paper_ends[1]:g}{between}")
    parts = [f"{kind}: {'; '.join(items)}." for kind, items in groups.items() if items]
    return " ".join([f"The paper, from {_range(layout, first, last)}.", *parts]) if parts else ""


def _range(layout: Layout, first: Place, last: Place) -> str:
    series = paper_series(layout.axis.setting, [place.value for place in layout.places])[0]
    ends = direction(replace(series, values=(0.0, 1.0)), first.value, last.value)
    labels = [series.positions[0 if end == 0 else -1] for end in ends]
    return f"{series.axis} {labels[0]} to {labels[1]}"


def _noise(first: Cell, other: Cell, pooled: float | None) -> float | None:
    """The standard error of the difference of two means: over seeds where their spread is known, else over blocks."""
    if pooled is not None:
        return pooled * math.sqrt(1 / first.seeds + 1 / other.seeds)
    return None if first.error is None or other.error is None else math.hypot(first.error, other.error)


def noise_words(results: SweepResults) -> str:
    """The meaning of ± and of the noise in this sweep."""
    counts = {
        len({point.seed for point in results.of_variant(v)}) for family in results.families for v in family.variants
    }
    if max(counts) > 1:
        return (
            f"± is the standard deviation over {max(counts)} seeds. A change is clear if it exceeds twice "
            "the standard error of the difference of two means, from the deviation pooled over the variants "
            "of its line."
        )
    return (
        "There is one seed, so the spread over seeds is unknown. A change is clear if it exceeds twice the "
        "standard error over blocks of text, which is smaller than the effect of another seed."
    )


def status_lines(results: SweepResults) -> list[str]:
    """The number of finished points, then one line per reason for unfinished or damaged points."""
    lines = [f"{len(results.with_status(FINISHED))} of {len(results.points)} points are finished."]
    for status, text in PROBLEMS.items():
        points = results.with_status(status)
        for reason, is_unread in dict.fromkeys((point.reason, point.is_unread) for point in points):
            names = [point.name for point in points if point.reason == reason]
            remedy = AGAIN if is_unread else REMEDIES.get(status, "")
            lines.append(f"{text}: {', '.join(names)}. {reason} {remedy}".rstrip())
    for word, notes, remedy in (("Damaged", "notes", ANEW), ("Not read", "unread", AGAIN)):
        for note in dict.fromkeys(note for point in results.points for note in getattr(point, notes)):
            names = [point.name for point in results.points if note in getattr(point, notes)]
            lines.append(f"{word}: {', '.join(names)}. {note}. {remedy}")
    return lines


def family_title(layout: Layout) -> str:
    """A family's name with the settings that vary in it."""
    if layout.axis.setting is None:
        return layout.family.name
    return f"{layout.family.name}: {', '.join(axis_label(axis) for axis in layout.axes)}"
