"""An analysis that adds blocks round by round, until its budget of time or its precision ends it.

Scores that must know the number of blocks before they measure one (`Score.waits`) are measured when it is known, so
that each score is what it is for that number of blocks without a budget.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from depthscope.analysis.budget import LEAST, Budget
from depthscope.analysis.measure import measure, total_work
from depthscope.analysis.ranking import precision_of
from depthscope.console.progress import Progress
from depthscope.errors import AnalysisInterrupted
from depthscope.layers.lanes.lanes import Lanes
from depthscope.processes import Processes
from depthscope.scores import SCORES
from depthscope.scores.base import Array, Score
from depthscope.scores.work import LEAST_BLOCKS
from depthscope.settings import Settings
from depthscope.text.blocks import Blocks

__all__ = ["Measured", "OnMeasured", "measure_growing"]


@dataclass(frozen=True)
class Measured:
    """The sums of all scores and of the baseline, with the settings of just these scores and blocks."""

    scores: Mapping[str, Score]
    baseline: dict[str, Array]
    settings: Settings
    budget: Budget
    notes: list[str] = field(default_factory=list)


OnMeasured = Callable[[Measured], None]


def measure_growing(
    lanes: Lanes,
    scores: Mapping[str, Score],
    blocks: Blocks,
    settings: Settings,
    processes: Processes,
    shown: Progress,
    *,
    begun: float,
    begin_small: bool = True,
    keep_interrupted: bool = False,
    on_partial: OnMeasured | None = None,
) -> Measured:
    """Measure as many blocks as the budget and the precision in `settings` take; see `Budget`."""
    stack = lanes.stack
    waiting = {name: score for name, score in scores.items() if score.waits}
    growing = {name: score for name, score in scores.items() if not score.waits}

    # At two sizes where losses are estimated, or exact, as they will be here; that of others is in line with them.
    few, many = (LEAST, LEAST + 1) if settings.eval_blocks < LEAST_BLOCKS else (LEAST_BLOCKS, 2 * LEAST_BLOCKS)
    known = [
        [total_work(stack, some, settings.with_(eval_blocks=size)) for size in (few, many)]
        for some in ([growing, waiting] if waiting else [growing])
    ]

    def work(count: int) -> tuple[float, float]:
        now, *later = (first + (last - first) / (many - few) * (count - few) for first, last in known)
        return now, sum(later)

    def on_round(some: Mapping[str, Score], baseline: dict[str, Array]) -> None:
        if on_partial is not None and some and budget.blocks >= LEAST:
            on_partial(Measured(some, baseline, settings.with_(eval_blocks=budget.blocks, scores=tuple(some)), budget))

    budget = Budget(
        settings,
        len(blocks) - settings.fit_blocks,
        processes,
        work,
        begun=begun,
        keep_interrupted=keep_interrupted and bool(growing),
        begin_small=begin_small,
        on_round=on_round if on_partial is not None else None,
    )
    shown.expect(sum(work(budget.most)) / processes.count)
    baseline, notes = measure(lanes, growing, blocks, settings, processes, shown, budget)
    if notes and budget.blocks < LEAST_BLOCKS <= settings.eval_blocks:
        notes.append(
            f"budget: so few blocks have exact losses where eval_blocks={budget.blocks} is asked for; here it was not "
            "known that there would be no more. exact_losses=True (--exact-losses) gives them in any case."
        )
    settings = settings.with_(eval_blocks=budget.blocks)
    baseline = {name: table[: budget.blocks] for name, table in baseline.items()}
    done: dict[str, Score] = {name: score.of_first(budget.blocks) for name, score in growing.items()}
    if waiting:
        try:
            if budget.stopped == "interrupt":
                raise AnalysisInterrupted
            waited = {name: SCORES[name](stack, settings, budget.blocks) for name in waiting}
            _, on_losses = measure(lanes, waited, blocks, settings, processes, shown)
            notes = notes or on_losses
            done |= waited
        except AnalysisInterrupted:
            if not budget.is_kept():
                raise
            settings = settings.with_(scores=tuple(done))
            notes.append(
                f"budget: {', '.join(waiting)} left out: they are measured after all others, when the number of blocks "
                "is known, and the interrupt came before."
            )
    budget.end(precision_of(done))
    return Measured({name: done[name] for name in settings.scores}, baseline, settings, budget, notes)
