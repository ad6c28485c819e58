"""The queue of jobs: they wait, run and can be stopped, and their results are cached for equal tasks.

At most `max_jobs` run at once and `max_waiting` wait; further jobs are refused. A job is stopped if its visitor does
not read for DESERTED_SECONDS (a closed page, a program that has ended).
"""

import contextvars
import itertools
import logging
import threading
import time
from collections import OrderedDict
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import anyio

from jobs import processes
from jobs.tasks import Task
from safety.limits import MIB, Limits, seconds
from safety.problems import Problem, deserted, stopped

__all__ = ["DESERTED_SECONDS", "Job", "Jobs", "Results", "has_left"]

logger = logging.getLogger(__name__)

LOOK_SECONDS = 0.1
WATCH_SECONDS = 0.5  # between two checks that the visitor still reads
DESERTED_SECONDS = seconds("DESERTED_SECONDS", 60)  # a visitor who has not read for so long has left
Runner = Callable[[Task, Limits, threading.Event], Iterator[dict[str, Any]]]
Heard = Callable[[str], float]


@dataclass(eq=False)
class Job:
    """One analysis of one visitor: its messages so far, and its end."""

    task: Task
    owner: str
    stop: threading.Event = field(default_factory=threading.Event)
    messages: list[dict[str, Any]] = field(default_factory=list)
    problem: Problem | None = None
    is_over: bool = False
    is_running: bool = False
    is_deserted: bool = False
    requested_at: float = field(default_factory=time.monotonic)
    began: float = 0.0
    on_end: Callable[[], None] = lambda: None


class Results:
    """Finished reports (JSON) by the key of their task: the last few in memory, and all in a store, if there is one.

    Args:
        most: the largest number of reports in memory.
        store: the store of all reports.
        most_bytes: the largest size of all reports in memory together; a larger report is not kept there.
    """

    def __init__(self, most: int, store: Any = None, most_bytes: int = 64 * MIB) -> None:
        self.most, self.most_bytes = most, most_bytes
        self.store = store
        self._kept: OrderedDict[str, bytes] = OrderedDict()
        self._bytes = 0
        self._lock = threading.Lock()

    def get(self, task: Task) -> str | None:
        """The cached report of the same task, if everybody may see it; otherwise None."""
        if not task.is_shareable:
            return None
        key = task.key()
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key].decode()
        found = self.store.get(key) if self.store is not None and task.is_storable else None
        return found if found is None else self._keep(key, found)

    def put(self, task: Task, report: str) -> None:
        """Keep a report, except of a model that is not public."""
        if task.is_shareable:
            self._keep(task.key(), report)
            if self.store is not None and task.is_storable:
                self.store.put(task, report)

    def _keep(self, key: str, report: str) -> str:
        with self._lock:
            encoded = report.encode()
            self._bytes += len(encoded) - len(self._kept.pop(key, b""))
            self._kept[key] = encoded
            while len(self._kept) > self.most or self._bytes > self.most_bytes:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return report


class Jobs:
    """The queue of a Space.

    Args:
        limits: the numbers of jobs that run, wait, and belong to one visitor.
        results: the cache of finished reports.
        runner: runs a task.
        heard: gives the time (`time.monotonic`) at which a visitor last read; 0 if never.
    """

    def __init__(
        self,
        limits: Limits,
        results: Results | None = None,
        runner: Runner = processes.run,
        heard: Heard = lambda owner: 0.0,
    ) -> None:
        self.limits = limits
        self.results = results or Results(limits.max_results)
        self._runner = runner
        self._last_read = heard
        self._pool = ThreadPoolExecutor(limits.max_jobs, thread_name_prefix="job")
        self._open: list[Job] = []  # waiting and running, in their order
        self._lock = threading.Lock()

    def submit(self, task: Task, owner: str, on_end: Callable[[], None] = lambda: None) -> Job:
        """Put a job into the queue; `on_end` is called once, in every case.

        Raises:
            Problem: the queue is full, or the visitor has too many jobs in it.
        """
        job = Job(task, owner, on_end=on_end)
        if (kept := self.results.get(task)) is not None:
            job.messages, job.is_over = [{"event": "done", "report": kept}], True
            on_end()
            return job
        with self._lock:
            waiting = sum(not other.is_running for other in self._open)
            if sum(other.owner == owner for other in self._open) >= self.limits.max_jobs_per_visitor:
                raise Problem("queue_full", "Your earlier analysis has not finished yet. Wait for it, or press Stop.")
            if waiting >= self.limits.max_waiting:
                raise Problem(
                    "queue_full",
                    f"The queue is full: {waiting} analyses are waiting already. Try again in a few minutes, or run it "
                    "on your own machine: pip install depthscope.",
                )
            self._open.append(job)
        threading.Thread(target=self._watch, args=(job,), daemon=True).start()
        self._pool.submit(contextvars.copy_context().run, self._work, job).add_done_callback(_log)
        return job

    def stop(self, owner: str) -> int:
        """Stop all jobs of a visitor; returns their number."""
        with self._lock:
            mine = [job for job in self._open if job.owner == owner]
        for job in mine:
            self._end(job)
        return len(mine)

    def place(self, job: Job) -> int:
        """The number of waiting jobs before this one."""
        with self._lock:
            return sum(1 for _ in itertools.takewhile(lambda other: other is not job, self._waiting()))

    async def listen(self, job: Job) -> AsyncIterator[dict[str, Any]]:
        """Yield a job's messages, and {"event": "waiting", "place": n} while it waits; the last one is "done".

        A slow reader (a page on a busy machine) gets only the newest message of each kind, so that the end of the job
        reaches it in time.

        Raises:
            Problem: the job failed.
        """
        sent, place = 0, -1
        while True:
            over = job.is_over  # before the messages are read, because none follows it
            messages = job.messages[sent:]
            sent += len(messages)
            for message in _newest(messages):
                yield message
            if over:
                break
            if not job.is_running and (now := self.place(job)) != place:
                place = now
                yield {"event": "waiting", "place": place}
            await anyio.sleep(LOOK_SECONDS)
        if job.problem is not None:
            raise job.problem

    def close(self) -> None:
        """Stop everything."""
        with self._lock:
            jobs = list(self._open)
        for job in jobs:
            self._end(job)
        self._pool.shutdown(wait=True)

    def _waiting(self) -> list[Job]:
        return [job for job in self._open if not job.is_running]

    def _work(self, job: Job) -> None:
        with self._lock:
            if job not in self._open:  # stopped while waiting
                return
            job.is_running, job.began = True, time.monotonic()
        try:
            self._follow(job)
        except Problem as problem:
            job.problem = deserted(DESERTED_SECONDS) if job.is_deserted else problem
        finally:
            if job.problem is None and not (job.messages and job.messages[-1]["event"] == "done"):
                job.problem = Problem("crashed", "The analysis could not be run. The log of this Space has the cause.")
            with self._lock:
                self._open.remove(job)
            job.on_end()
            job.is_over = True

    def _follow(self, job: Job) -> None:
        if job.stop.is_set():
            raise stopped()
        if (kept := self.results.get(job.task)) is not None:  # an equal task has finished while this one waited
            job.messages.append({"event": "done", "report": kept})
            return
        for message in self._runner(job.task, self.limits, job.stop):
            job.messages.append(message)
            if message["event"] == "done" and message.get("is_whole", True):
                self.results.put(job.task, message["report"])

    def _end(self, job: Job) -> None:
        """Stop a job: a waiting job leaves the queue at once, a running job is signalled."""
        job.stop.set()
        with self._lock:
            if job.is_running or job not in self._open:
                return
            self._open.remove(job)
        job.problem = deserted(DESERTED_SECONDS) if job.is_deserted else stopped()
        job.on_end()
        job.is_over = True

    def _watch(self, job: Job) -> None:
        """Stop a job whose visitor has left."""
        while not job.is_over:
            if has_left(max(job.requested_at, self._last_read(job.owner))):
                job.is_deserted = True
                self._end(job)
            time.sleep(WATCH_SECONDS)


def has_left(heard: float) -> bool:
    """Whether a visitor who was last heard at that time has left."""
    return time.monotonic() - heard > DESERTED_SECONDS


def _newest(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The last message of each kind, in the order of sending."""
    last = {message["event"]: number for number, message in enumerate(messages)}
    return [messages[number] for number in sorted(last.values())]


def _log(work: Future[None]) -> None:
    """Write an unexpected exception to the log of the Space."""
    if (error := work.exception()) is not None:
        logger.error("A job could not be run.", exc_info=error)
