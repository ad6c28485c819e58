"""What moves in a family of a sweep, in words: in which direction, and whether by more than the noise.

A change is called clear where it exceeds twice the noise. The noise of a change between two variants is the standard
error of the difference of their means over seeds, s sqrt(1/n + 1/m) with s the standard deviation that all variants of
the line share (pooled); with one seed, the standard errors over blocks of the two, as independent ones add up. Neither
says anything of other data, other sizes or longer training.
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

__all__ = ["Change", "changes", "family_words", "noise_words", "standing", "titled"]

CLEAR = 2.0  # times the noise

# What the sentences are about, in this order; the tables have more.
# Told only beside the paper's, which has them.
PAPER_ONLY = ("usefulness", "perplexity", "jacobian_first", "jacobian_last")

PROBLEMS = {
    DIVERGED: "Diverged (losses or activations were not finite)",
    FAILED: "Failed",
    UNREADABLE: "Unreadable",
    UNFINISHED: "Begun and not finished",
    NOT_RUN: "Not run yet",
}
REMEDIES = {
    UNREADABLE: "To have it measured anew, delete its result.json and run again; to have it trained anew, its folder."
}
ANEW, AGAIN = (
    "Delete the folder of the point to have it anew.",
    "It may be whole: see that it can be read, and try again.",
)


@dataclass(frozen=True)
class Change:
    """One score from one variant of a line to another."""

    name: str
    first: float
    last: float
    noise: float | None
    turn: tuple[str, float] | None = None  # a variant in between that lies clearly beyond both

    @property
    def clear(self) -> bool | None:
        """Whether the change exceeds twice the noise; None where the noise is not known."""
        return None if self.noise is None else abs(self.last - self.first) > CLEAR * self.noise

    def words(self) -> str:
        """The change in words."""
        verb = "rises" if self.last > self.first else "falls" if self.last < self.first else "stays"
        ends = f"{format_number(self.first, 3)} to {format_number(self.last, 3)}"
        between = f" ({format_number(self.turn[1], 3)} at {self.turn[0]})" if self.turn else ""
        return f"{COLUMNS[self.name].label} {verb} from {ends}{between}"


def changes(results: SweepResults, places: Sequence[Place], first: Place, last: Place) -> list[Change]:
    """The changes of the scores between two variants, those that are known.

    Args:
        results: the sweep.
        places: the variants whose spread over seeds makes the noise; in the order of the axis, if it has one.
        first: one of them.
        last: another.
    """
    found = []
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
                and (noises := [some for end in ends if (some := _noise(each, end, pooled)) is not None])
            ]
            turn = _turn(between, ends[0].mean, ends[1].mean) if noise is not None else None
            found.append(Change(name, ends[0].mean, ends[1].mean, noise, turn))
    return found


def family_words(results: SweepResults, layout: Layout, most: int = len(CONTROL), paper: bool = True) -> list[str]:
    """What changes along the axis, and how that stands to the paper.

    Args:
        results: the sweep.
        layout: the family.
        most: how many of the clear changes to tell with their numbers.
        paper: whether to tell what the paper reports.
    """
    said = []
    for index, line in enumerate(layout.lines):
        for first, last in _compared(layout, line, results):
            places = line.places if layout.axis.is_ordered else [first, last]
            told = changes(results, places, first, last)
            where = f" ({line.label})" if line.label else ""
            axis = f"{layout.axis.label} " if layout.axis.setting is not None else ""
            said.append(_sentences(f"From {axis}{first.label} to {last.label}{where}.", told, most))
            if paper and index == 0:
                said.append(_paper(layout, first, last, told))
    said += [_sentences(head, told, most) for head, told in _across(results, layout)]
    return [sentence for sentence in said if sentence] or ["Too little of this family is finished to compare anything."]


def _across(results: SweepResults, layout: Layout) -> Iterator[tuple[str, list[Change]]]:
    """The first line with each other one, at the last place that both have finished."""
    first = layout.lines[0]
    for other in layout.lines[1:]:
        here = {place.position: place for place in first.places if _done(results, place)}
        both = [(here[place.position], place) for place in other.places if place.position in here]
        both = [(one, two) for one, two in both if _done(results, two)]
        if both:
            one, two = both[-1]
            head = f"At {layout.axis.label} {one.label}, from {first.label} to {other.label}."
            yield head, changes(results, [one, two], one, two)


def _done(results: SweepResults, place: Place) -> bool:
    return any(point.finished for point in results.of_variant(place.variant))


def _compared(layout: Layout, line: Line, results: SweepResults) -> Iterator[tuple[Place, Place]]:
    """The first variant with the last of a scale, with each other one of a list of names; finished ones only."""
    done = [place for place in line.places if _done(results, place)]
    if len(done) < 2:
        return
    for other in done[-1:] if layout.axis.is_ordered else done[1:]:
        yield done[0], other


def _sentences(head: str, told: list[Change], most: int) -> str:
    main = [change for change in told if change.name in CONTROL]
    kept = {
        "Clear": [change.words() for change in main if change.clear],
        "Within the noise": [COLUMNS[change.name].label for change in main if change.clear is False],
        "Of unknown noise": [change.words() for change in main if change.clear is None],
    }
    parts = [f"{kind}: {_some(found, most)}." for kind, found in kept.items() if found]
    return " ".join([head, *parts]) if parts else ""


def _some(found: list[str], most: int) -> str:
    more = [f"and {len(found) - most} more"] if len(found) > most else []
    return "; ".join(found[:most] + more)


def _turn(between: Sequence[tuple[str, float, float]], first: float, last: float) -> tuple[str, float] | None:
    """The place that lies furthest beyond both ends, of those that do by more than the third entry."""

    def beyond(value: float) -> float:
        return max(value - max(first, last), min(first, last) - value)

    far = [(label, value) for label, value, least in between if beyond(value) > least]
    return max(far, key=lambda each: beyond(each[1]), default=None)


def _paper(layout: Layout, first: Place, last: Place, told: list[Change]) -> str:
    """How the directions stand to the paper's."""
    values = [place.value for place in layout.places]
    known = {change.name: change for change in told}
    kept: dict[str, list[str]] = {"As here": [], "Other than here": [], "Not clear here": []}
    for series in paper_series(layout.axis.setting, values):
        change = known.get(series.score)
        if change is None or series.note:
            continue
        theirs = direction(series, first.value, last.value)
        agrees = (theirs[1] - theirs[0]) * (change.last - change.first) > 0
        kind = "Not clear here" if change.clear is not True else "As here" if agrees else "Other than here"
        turn = _turn([(at, value, 0.0) for at, value in zip(series.positions, series.values, strict=True)], *theirs)
        between = f" ({turn[1]:g} at {turn[0]})" if turn else ""
        kept[kind].append(f"{COLUMNS[series.score].label} {theirs[0]:g} to {theirs[1]:g}{between}")
    parts = [f"{kind}: {'; '.join(found)}." for kind, found in kept.items() if found]
    return " ".join([f"The paper, from {_range(layout, first, last)}.", *parts]) if parts else ""


def _range(layout: Layout, first: Place, last: Place) -> str:
    series = paper_series(layout.axis.setting, [place.value for place in layout.places])[0]
    ends = direction(replace(series, values=(0.0, 1.0)), first.value, last.value)
    labels = [series.positions[0 if end == 0 else -1] for end in ends]
    return f"{series.axis} {labels[0]} to {labels[1]}"


def _noise(one: Cell, other: Cell, pooled: float | None) -> float | None:
    """The standard error of the difference of two means: over seeds where their spread is known, else over blocks."""
    if pooled is not None:
        return pooled * math.sqrt(1 / one.seeds + 1 / other.seeds)
    return None if one.error is None or other.error is None else math.hypot(one.error, other.error)


def noise_words(results: SweepResults) -> str:
    """What ± and noise mean in this sweep."""
    counts = {
        len({point.seed for point in results.of_variant(v)}) for family in results.families for v in family.variants
    }
    if max(counts) > 1:
        return (
            f"± is the standard deviation over {max(counts)} seeds. A change is called clear where it exceeds twice "
            "the standard error of the difference of two means, from the deviation that the variants of its line share."
        )
    return (
        "There is one seed, so no spread over seeds is known. A change is called clear where it exceeds twice the "
        "standard error over blocks of text, which is less than what another seed would change."
    )


def standing(results: SweepResults) -> list[str]:
    """How many points are finished, which are not and why not, and what is damaged: a line for each reason."""
    lines = [f"{len(results.with_status(FINISHED))} of {len(results.points)} points are finished."]
    for status, words in PROBLEMS.items():
        points = results.with_status(status)
        for reason, is_unread in dict.fromkeys((point.reason, point.is_unread) for point in points):
            names = [point.name for point in points if point.reason == reason]
            remedy = AGAIN if is_unread else REMEDIES.get(status, "")
            lines.append(f"{words}: {', '.join(names)}. {reason} {remedy}".rstrip())
    for word, notes, remedy in (("Damaged", "notes", ANEW), ("Not read", "unread", AGAIN)):
        for note in dict.fromkeys(note for point in results.points for note in getattr(point, notes)):
            names = [point.name for point in results.points if note in getattr(point, notes)]
            lines.append(f"{word}: {', '.join(names)}. {note}. {remedy}")
    return lines


def titled(layout: Layout) -> str:
    """A family's name with what varies in it."""
    if layout.axis.setting is None:
        return layout.family.name
    return f"{layout.family.name}: {', '.join(axis_label(axis) for axis in layout.axes)}"
