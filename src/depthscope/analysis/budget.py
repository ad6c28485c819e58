"""How many blocks are measured: where a budget of time or a precision decides, it is asked after each round of blocks.

Rounds begin with one block for each process and grow with what has been measured, up to the size of a batch. Another
round begins only if it is expected to end in time, as quickly as the last one, with what the scores that wait for the
number of blocks will take. At least two blocks are measured, so that there are standard errors.
"""

import time
from collections.abc import Callable, Iterator, Mapping
from typing import cast

from depthscope.analysis.ranking import RANKING, precision_of, ranking_in_words
from depthscope.console.progress import Progress
from depthscope.processes import Processes
from depthscope.report.report import BudgetFacts, Stopped
from depthscope.scores.base import Array, Score
from depthscope.settings import Settings
from depthscope.wording.messages import counted
from depthscope.wording.units import format_seconds, format_share

__all__ = ["LEAST", "Budget", "Work"]

LEAST = 2  # blocks, for standard errors
# The work on so many blocks, in forward passes of one layer over one block: of the scores that are measured round by
# round, and of those that wait.
Work = Callable[[int], tuple[float, float]]
OnRound = Callable[[Mapping[str, Score], dict[str, Array]], None]


class Budget:
    """The stopping rule of one analysis, and what was reached.

    Args:
        settings: with the budget of time, the precision, and the most blocks.
        available: the evaluation blocks that the text holds.
        processes: those that share the blocks; the main one decides for all.
        work: what blocks take.
        begun: when the analysis began, by `time.monotonic`.
        keep_interrupted: whether Ctrl-C may leave what has been measured as the result.
        begin_small: whether rounds begin with one block, to learn how long it takes; else with a batch, where an
            analysis like this one is known to end in time.
        on_round: gets the scores and the baseline of the blocks so far, after each round.
    """

    def __init__(
        self,
        settings: Settings,
        available: int,
        processes: Processes,
        work: Work,
        *,
        begun: float,
        keep_interrupted: bool = False,
        begin_small: bool = True,
        on_round: OnRound | None = None,
    ) -> None:
        self.seconds = None if settings.budget is None else float(settings.budget)
        self.wanted = None if settings.precision is None else float(settings.precision)
        self.most = min(settings.eval_blocks, available)
        self.at_most: Stopped = "text" if available < settings.eval_blocks else "blocks"
        self.processes = processes
        self.blocks = 0  # that have been measured
        self.stopped: Stopped | None = None
        self.precision: float | None = None
        self.took = 0.0  # seconds, once it has ended
        self._work = work
        # What scores that wait take of a block, for what the others do.
        now, later = (more - less for less, more in zip(work(LEAST), work(LEAST + 1), strict=True))
        self._waiting_share = later / now
        self._on_round = on_round
        self._begun = begun
        self._before_blocks = 0.0  # seconds
        self._each: float | None = None  # seconds a block, once one has been measured
        self._begin_small, self._keep_interrupted = begin_small, keep_interrupted

    def rounds(
        self, size: int, scores: Mapping[str, Score], baseline: dict[str, Array], shown: Progress
    ) -> Iterator[range]:
        """The next blocks to measure, until it is enough; `size` is the most of one process at a time."""
        self._before_blocks = self._gone()
        count, self.stopped = self.processes.agreed(self._next(size))
        while self.stopped is None:
            part = range(self.blocks, min(self.blocks + count, self.most))
            begun = time.monotonic()
            yield part
            self.blocks, self._each = part.stop, (time.monotonic() - begun) / len(part)
            self._look(scores, baseline, shown)
            count, self.stopped = self.processes.agreed(self._next(size))
            shown.expect(sum(self._work(self._likely())) / self.processes.count)

    def is_kept(self) -> bool:
        """Whether an interrupt leaves the blocks so far as the result, as it does where one process works alone."""
        alone = self.processes.count == 1 and not self.processes.in_step
        if self._keep_interrupted and alone and self.blocks >= LEAST:
            self.stopped = "interrupt"
        return self.stopped == "interrupt"

    def end(self, precision: float | None) -> None:
        """Note the time that it took, and what the whole came to."""
        self.took, self.precision = self._gone(), precision

    def facts(self) -> BudgetFacts:
        """What was reached, as the report has it."""
        facts = {
            "seconds": round(self.took, 3),
            "stopped": self.stopped,
            "most_blocks": self.most,
            "precision": self.precision,
        }
        return cast("BudgetFacts", facts)

    def notes(self) -> list[str]:
        """What was asked for and what was reached, in sentences."""
        asked = [f"a budget of {format_seconds(self.seconds)}"] if self.seconds is not None else []
        asked += [f"a precision of {format_share(self.wanted)}"] if self.wanted is not None else []
        ends: dict[Stopped | None, str] = {
            "time": "then the time was spent",
            "precision": "then the precision was reached",
            "blocks": f"all that eval_blocks={self.most} allows",
            "text": "all that the text holds",
            "interrupt": "then an interrupt (Ctrl-C) ended it",
        }
        reached = f"{counted(self.blocks, 'block')} measured in {format_seconds(self.took)}, {ends[self.stopped]}"
        notes = [f"budget: {' and '.join(asked)}: {reached}{self._precision_in_words()}."]
        if self.seconds is not None and self.took > self.seconds and self.blocks <= max(LEAST, self.processes.count):
            notes.append(
                f"budget: {self.blocks} blocks, the fewest that tell standard errors, took longer than the budget, "
                f"{format_seconds(self._before_blocks)} of it before the first (finding the layers, and fitting linear "
                "maps). Give more time, fewer scores, or lower fit_blocks."
            )
        if self.wanted is not None and not self._is_precise():
            more = {"text": "Give more text", "blocks": "Raise eval_blocks"}.get(self.stopped or "", "Give more time")
            notes.append(f"budget: the precision of {format_share(self.wanted)} was not reached. {more}.")
        return notes

    def _look(self, scores: Mapping[str, Score], baseline: dict[str, Array], shown: Progress) -> None:
        """See what the blocks so far tell, of all processes."""
        chosen = [name for name in scores if self._on_round is not None or name in RANKING]
        some = {name: scores[name].of_first(self.blocks) for name in chosen}
        common = {name: table[: self.blocks].copy() for name, table in baseline.items()}
        for tables in (common, *(some[name].sums for name in sorted(some))):
            self.processes.add_up_tables(tables)
        self.precision = precision_of(some)
        if shown.is_seen:
            shown.so_far(ranking_in_words(some, self.blocks))
        if self._on_round is not None and self.processes.is_main:
            self._on_round(some, common)

    def _next(self, size: int) -> tuple[int, Stopped | None]:
        """How many blocks to measure next, or why no more."""
        share = self.processes.count
        if self._is_precise():
            return 0, "precision"
        left = self.most - self.blocks
        if left == 0:
            return 0, self.at_most
        count = min(size * share, left)
        if self._begin_small or self.wanted is not None:
            count = min(count, max(self.blocks, share))
        count = min(count, self._in_time() // share * share)
        if count > 0:
            return count, None
        return (0, "time") if self.blocks >= LEAST else (min(share, left), None)

    def _in_time(self) -> int:
        """How many more blocks are expected to be measured in time."""
        if self.seconds is None or self._each is None:
            return self.most
        waiting = self._each * self._waiting_share
        return max(0, int((self.seconds - self._gone() - waiting * self.blocks) / max(self._each + waiting, 1e-9)))

    def _likely(self) -> int:
        """How many blocks will probably have been measured at the end, from the last round."""
        if self.stopped is not None:
            return self.blocks
        likely = min(self.most, self.blocks + self._in_time())
        if self.wanted is not None and self.precision is not None:
            likely = min(likely, int(self.blocks * (self.precision / self.wanted) ** 2))
        return max(likely, self.blocks + 1)

    def _is_precise(self) -> bool:
        return self.wanted is not None and self.precision is not None and self.precision <= self.wanted

    def _precision_in_words(self) -> str:
        if self.precision is None:
            return ""
        return f"; the loss ratios of layers have relative standard errors of at most {format_share(self.precision)}"

    def _gone(self) -> float:
        return time.monotonic() - self._begun
