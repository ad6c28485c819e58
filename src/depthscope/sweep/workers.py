"""Running several points at once in worker processes, each with a share of the cores or its own GPU.

If a worker dies (such as for lack of memory), only its current point fails. Workers end with the process that started
them, whatever ends it.
"""

import gc
import multiprocessing
import os
import signal
import sys
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch

from depthscope.runs.layout import FAILED
from depthscope.sweep.data import open_corpus
from depthscope.sweep.grid import Grid, Point
from depthscope.sweep.point import PointRun, run_point, status_if_done
from depthscope.sweep.progress import SweepProgress
from depthscope.sweep.specification import Specification

__all__ = ["costliest_first", "run_in_workers"]

GPUS = "CUDA_VISIBLE_DEVICES"
PRELOADED = ["depthscope.sweep.workers"]


@dataclass(frozen=True)
class _Work:
    """The arguments of all workers."""

    specification: Specification
    grid: Grid
    out: Path
    jobs: int


@dataclass
class _Worker:
    """A process, and its current point."""

    index: int
    process: Any
    connection: Connection
    point: Point | None = None


def run_in_workers(
    points: Sequence[Point], specification: Specification, grid: Grid, out: Path, jobs: int, progress: SweepProgress
) -> dict[str, str]:
    """Run points in at most `jobs` processes, each with 1 / `jobs` of the cores, and return their statuses."""
    work = _Work(specification, grid, out, jobs)
    rows = specification.tokenizer.rows(len(open_corpus(out, grid.longest).tokenizer))
    waiting = deque(costliest_first(points, rows))
    statuses: dict[str, str] = {}
    workers = [_start(index, work) for index in range(min(jobs, len(points)))]
    try:
        for worker in workers:
            _send_next(worker, waiting)
        while busy := {worker.connection: worker for worker in workers if worker.point is not None}:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker = busy[connection]
                assert worker.point is not None
                name = worker.point.name
                message = _receive(connection)
                if message is not None and message[0] == "at":
                    progress.at(name, *message[1:])
                    continue
                if message is not None and message[0] == "noted":
                    progress.note(message[1])
                    continue
                statuses[name] = _status_after_death(worker, work) if message is None else message[1]
                progress.finished(name, statuses[name])
                if message is None and waiting:
                    workers[worker.index] = worker = _start(worker.index, work)
                _send_next(worker, waiting)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
    return statuses


def costliest_first(points: Sequence[Point], vocab_size: int) -> list[Point]:
    """Sort points by seed, then the largest first, so that no large model is left for the end."""
    return sorted(points, key=lambda point: (point.seed, -point.flops(vocab_size)))


def _send_next(worker: _Worker, waiting: deque[Point]) -> None:
    """Send a worker the next point; if it has died meanwhile, the missing answer shows it."""
    worker.point = waiting.popleft() if waiting else None
    if worker.point is not None:
        try:
            worker.connection.send(worker.point)
        except ConnectionError:
            return


def _receive(connection: Connection) -> Any:
    """The next message from the process at the other end; None if it has ended."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return None


def _start(index: int, work: _Work) -> _Worker:
    context = _new_processes()
    ours, theirs = context.Pipe()
    share = _share(index, work.jobs)
    process = context.Process(target=_serve, args=(theirs, work, {**os.environ, **share}), daemon=True)
    with _environment(share):
        process.start()
    theirs.close()
    return _Worker(index, process, ours)


def _new_processes() -> Any:
    """How workers start: forked from one process that has imported what all need; with a GPU, each imports it itself.

    A process that may have asked for a GPU must not fork those that use it.
    """
    if sys.platform != "linux" or torch.accelerator.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def _share(index: int, jobs: int) -> dict[str, str]:
    """A worker's share of the machine, as environment variables that libraries read when they are imported."""
    share = {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}
    if count := torch.cuda.device_count():
        visible = os.environ.get(GPUS) or ",".join(map(str, range(count)))
        share[GPUS] = visible.split(",")[index % count]
    return share


@contextmanager
def _environment(settings: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in settings}
    os.environ.update(settings)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _serve(connection: Connection, work: _Work, environment: dict[str, str]) -> None:
    """Run the points that come through the connection, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    _end_with_parent()
    os.environ.update(environment)  # the process that this one is forked from may be older
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    gc.freeze()  # every Trainer asks for collections, which need not look at what was imported

    corpus = open_corpus(work.out, work.grid.longest)

    def report(stage: str, done: int, total: int, loss: float | None) -> None:
        _send(connection, ("at", stage, done, total, loss))

    def note(line: str) -> None:
        _send(connection, ("noted", line))

    while (point := _receive(connection)) is not None:
        status = run_point(point, work.specification, corpus, work.grid.shortest, work.out, report, note)
        _send(connection, ("done", status))


def _send(connection: Connection, message: tuple[Any, ...]) -> None:
    """Send a message to the parent process; if it has ended, exit, which fails no point."""
    try:
        connection.send(message)
    except ConnectionError as error:
        raise SystemExit(1) from error


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _status_after_death(worker: _Worker, work: _Work) -> str:
    """The status of the point of a worker that died: failed, unless the point was already done."""
    assert worker.point is not None
    worker.process.join()
    run = PointRun(
        worker.point, work.specification, open_corpus(work.out, work.grid.longest), work.grid.shortest, work.out
    )
    done = status_if_done(run.folder)
    if done is not None:
        return done
    code = worker.process.exitcode
    cause = f"by signal {-code} ({signal.Signals(-code).name})" if code and code < 0 else f"with exit code {code}"
    hint = "; that is often the system running out of memory" if code == -signal.SIGKILL else ""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.record_failure(f"its process was ended {cause}{hint}.")
    return FAILED
