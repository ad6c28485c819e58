"""Several points at once, each worker in a process of its own, with its share of the cores or its own GPU.

A worker that dies (out of memory, say) costs the point that it was at, not the sweep. Workers end with the process that
started them, whatever ends it.
"""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from depthscope.runs.layout import FAILED
from depthscope.sweep.data import open_corpus
from depthscope.sweep.grid import Grid, Point
from depthscope.sweep.point import PointRun, run_point, status_if_done
from depthscope.sweep.progress import Shown
from depthscope.sweep.specification import Specification

__all__ = ["costliest_first", "run_in_workers"]

GPUS = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True)
class _Work:
    """What all workers are told when they start."""

    specification: Specification
    grid: Grid
    out: Path
    jobs: int


@dataclass
class _Worker:
    """A process, and the point that it is at."""

    index: int
    process: Any
    connection: Connection
    point: Point | None = None


def run_in_workers(
    points: Sequence[Point], specification: Specification, grid: Grid, out: Path, jobs: int, shown: Shown
) -> dict[str, str]:
    """Run points in at most `jobs` processes, each with one `jobs`-th of the cores, and return the status of each."""
    work = _Work(specification, grid, out, jobs)
    rows = specification.tokenizer.rows(len(open_corpus(out, grid.longest).tokenizer))
    waiting = deque(costliest_first(points, rows))
    statuses: dict[str, str] = {}
    workers = [_start(index, work) for index in range(min(jobs, len(points)))]
    try:
        for worker in workers:
            _give(worker, waiting)
        while busy := {worker.connection: worker for worker in workers if worker.point is not None}:
            for connection in wait(list(busy)):
                assert isinstance(connection, Connection)
                worker = busy[connection]
                assert worker.point is not None
                name = worker.point.name
                message = _heard(connection)
                if message is not None and message[0] == "at":
                    shown.at(name, *message[1:])
                    continue
                if message is not None and message[0] == "noted":
                    shown.note(message[1])
                    continue
                statuses[name] = _status_after_death(worker, work) if message is None else message[1]
                shown.finished(name, statuses[name])
                if message is None and waiting:
                    workers[worker.index] = worker = _start(worker.index, work)
                _give(worker, waiting)
    finally:
        for worker in workers:
            worker.process.terminate()
        for worker in workers:
            worker.process.join()
    return statuses


def costliest_first(points: Sequence[Point], vocab_size: int) -> list[Point]:
    """Seed by seed the largest first, so that no worker is left with a large model when the others are done."""
    return sorted(points, key=lambda point: (point.seed, -point.flops(vocab_size)))


def _give(worker: _Worker, waiting: deque[Point]) -> None:
    """Give a worker the next point; one that has died meanwhile is found out when it should answer."""
    worker.point = waiting.popleft() if waiting else None
    if worker.point is not None:
        try:
            worker.connection.send(worker.point)
        except ConnectionError:  # as the system says it
            return


def _heard(connection: Connection) -> Any:
    """What the process at the other end says; None where it is no more."""
    try:
        return connection.recv()
    except (EOFError, ConnectionResetError):
        return None


def _start(index: int, work: _Work) -> _Worker:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, work), daemon=True)
    with _environment(_share(index, work.jobs)):
        process.start()
    theirs.close()
    return _Worker(index, process, ours)


def _share(index: int, jobs: int) -> dict[str, str]:
    """A worker's share of the machine, as variables that libraries read when they are imported."""
    import torch

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


def _serve(connection: Connection, work: _Work) -> None:
    """What a worker does: points that come through the connection, one after the other."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    _end_with_parent()

    corpus = open_corpus(work.out, work.grid.longest)

    def told(stage: str, done: int, total: int, loss: float | None) -> None:
        _tell(connection, ("at", stage, done, total, loss))

    def noted(line: str) -> None:
        _tell(connection, ("noted", line))

    while (point := _heard(connection)) is not None:
        status = run_point(point, work.specification, corpus, work.grid.shortest, work.out, told, noted)
        _tell(connection, ("done", status))


def _tell(connection: Connection, message: tuple[Any, ...]) -> None:
    """Tell the process that started this one; without it there is nothing to do, and no point has failed by that."""
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
    """What became of the point of a worker that is no more: failed, unless that happened after all was done."""
    assert worker.point is not None
    worker.process.join()
    run = PointRun(
        worker.point, work.specification, open_corpus(work.out, work.grid.longest), work.grid.shortest, work.out
    )
    done = status_if_done(run.folder)
    if done is not None:
        return done
    code = worker.process.exitcode
    how = f"by signal {-code} ({signal.Signals(-code).name})" if code and code < 0 else f"with exit code {code}"
    often = "; that is often the system running out of memory" if code == -signal.SIGKILL else ""
    run.folder.mkdir(parents=True, exist_ok=True)
    run.record_failure(f"its process was ended {how}{often}.")
    return FAILED
