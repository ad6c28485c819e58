"""A sweep that is killed, again and again, at any moment: its report and weights are those of one that never was."""

import contextlib
import importlib
import json
import multiprocessing
import multiprocessing.forkserver
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from commands import prepare
from depthscope.cli import app
from sweeps import reported, weights, write_sweep

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the sweeps are forked, so that each starts at once"),
]

KILLS = 20
POINTS = ("depth-L2-seed0", "depth-L3-seed0")
# Functions to be killed in, by what the sweep is doing when it calls them; "replace" is the end of every atomic write.
MOMENTS = {
    "tokenizing": ("depthscope.sweep.token_stream:TokenStream._append", 1),
    "checkpointing": ("transformers.trainer:Trainer._save_optimizer_and_scheduler", 6),
    "clearing checkpoints": ("shutil:rmtree", 6),
    "saving a model": ("depthscope.sweep.point:save_model", 6),
    "writing records": ("depthscope.sweep.point:write_atomically", 9),
    "scoring": ("depthscope.sweep.point:held_out_loss", 4),
    "reporting": ("depthscope.sweep.report.page:write_atomically", 5),
    "replacing a file": ("os:replace", 30),
}


def command(sweep: Path, out: Path, jobs: int = 1) -> int:
    """`depthscope sweep run`, and its exit code."""
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        try:
            app(["sweep", "run", str(sweep), "--out", str(out), "--jobs", str(jobs)], standalone_mode=True)
        except SystemExit as done:
            return int(done.code or 0)
    return 0


def dying(function: Callable[..., Any], at: int) -> Callable[..., Any]:
    """The function, whose `at`-th call kills the process: in half of the cases after its work, else before."""
    calls = iter(range(10**6))

    def called(*args: Any, **kwargs: Any) -> Any:
        now = next(calls) == at // 2
        if now and at % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args, **kwargs)
        if now:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    return called


def child(sweep: Path, out: Path, moment: str | None, at: int, jobs: int) -> None:
    multiprocessing.forkserver._forkserver.__init__()  # its workers are forked from a process of its own
    if moment is not None:
        module, _, names = MOMENTS[moment][0].partition(":")
        *owners, name = names.split(".")
        place: Any = importlib.import_module(module)
        for owner in owners:
            place = getattr(place, owner)
        setattr(place, name, dying(getattr(place, name), at))
    os._exit(command(sweep, out, jobs))


def started(sweep: Path, out: Path, moment: str | None = None, at: int = 0, jobs: int = 1) -> Any:
    process = multiprocessing.get_context("fork").Process(target=child, args=(sweep, out, moment, at, jobs))
    process.start()
    return process


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, float]:
    """The sweep's file, the folder of a run that was not interrupted, and its seconds."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    sweep = write_sweep(folder, tracking={"log_every": 2, "checkpoint_every": 3, "publish_every": 8})
    assert command(sweep, folder / "first") == 0  # imports what the forked ones need
    begun = time.perf_counter()
    process = started(sweep, folder / "out")
    process.join()
    assert process.exitcode == 0
    return sweep, folder / "out", time.perf_counter() - begun


def assert_same(out: Path, whole: Path) -> None:
    expected = reported(whole)
    assert {name for name, content in reported(out).items() if content != expected[name]} == set()
    for point in POINTS:
        models = sorted(
            path.parent.relative_to(whole) for path in (whole / "points" / point).rglob("model.safetensors")
        )
        assert len(models) == 6  # steps 0, 1, 2, 4 and 8, and the trained one
        for model in models:
            assert weights(out / model) == weights(whole / model)
        left = {path.name for path in (out / "points" / point).iterdir()}
        assert not [name for name in left if "checkpoint" in name or "part" in name]


def test_killed_twenty_times_the_report_and_the_weights_are_the_same(
    uninterrupted: tuple[Path, Path, float], tmp_path: Path
) -> None:
    sweep, whole, seconds = uninterrupted
    chance = random.Random(11)
    # Every kind of moment at least once, and as many kills at any time.
    planned: list[str | None] = [*MOMENTS, *[None] * 10, "checkpointing", "reporting", "scoring"]
    chance.shuffle(planned)
    kills, runs, out = 0, 0, tmp_path / "0"
    while kills < KILLS:
        assert runs < 80
        moment = planned[kills % len(planned)]
        process = started(sweep, out, moment, chance.randrange(2 * MOMENTS[moment][1]) if moment else 0)
        if moment is None:
            process.join(timeout=chance.uniform(0, seconds))
            process.kill()
        process.join(timeout=120)
        kills += process.exitcode == -signal.SIGKILL
        if process.exitcode != -signal.SIGKILL:
            assert process.exitcode == 0
            assert_same(out, whole)
            runs += 1
            out = tmp_path / str(runs)
    assert command(sweep, out) == 0
    assert_same(out, whole)


def test_killed_while_workers_train_they_end_with_it_and_the_next_run_ends_the_same(
    uninterrupted: tuple[Path, Path, float], tmp_path: Path
) -> None:
    sweep, whole, _ = uninterrupted
    for sign in ("checkpoint-*/complete", "*report.json"):
        before = set(tmp_path.glob(f"points/*/{sign}"))
        process = started(sweep, tmp_path, jobs=2)
        while process.is_alive() and set(tmp_path.glob(f"points/*/{sign}")) <= before:
            time.sleep(0.01)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert len(workers) >= 2
        assert psutil.wait_procs(workers, timeout=30)[1] == []
    prepare()
    assert command(sweep, tmp_path, jobs=2) == 0
    assert_same(tmp_path, whole)


def test_killed_after_the_last_checkpoint_it_trains_no_step_more(
    uninterrupted: tuple[Path, Path, float], tmp_path: Path
) -> None:
    sweep, whole, _ = uninterrupted
    # The models of five published steps are saved before the trained one.
    process = started(sweep, tmp_path, "saving a model", 2 * 5)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    folder = tmp_path / "points" / POINTS[0]
    assert (folder / "checkpoint-12" / "complete").is_file()
    assert not (folder / "model").exists()
    assert command(sweep, tmp_path) == 0
    assert_same(tmp_path, whole)
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [2, 4, 6, 8, 10, 12]


def test_killed_where_the_loss_is_no_longer_finite_it_is_recorded_as_diverged(
    uninterrupted: tuple[Path, Path, float], tmp_path: Path
) -> None:
    grid = {"rate": {"num_hidden_layers": 2, "learning_rate": 1e30}}
    sweep = write_sweep(tmp_path, grid=grid, tracking={"log_every": 2, "checkpoint_every": 2})
    assert command(sweep, tmp_path / "whole") == 0
    for at in (3, 4, 5, 6):  # about the writing of log.jsonl, which follows on the last checkpoint
        out = tmp_path / str(at)
        process = started(sweep, out, "writing records", at)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        assert command(sweep, out) == 0
        assert reported(out) == reported(tmp_path / "whole")
        logs = [(folder / "points/rate-seed0/log.jsonl").read_text() for folder in (out, tmp_path / "whole")]
        assert logs[0] == logs[1]


def test_ctrl_c_says_how_to_go_on(uninterrupted: tuple[Path, Path, float], tmp_path: Path) -> None:
    sweep, _, _ = uninterrupted
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.dup2(write, 2)
        sys.stderr = os.fdopen(2, "w", buffering=1)
        try:
            app(["sweep", "run", str(sweep), "--out", str(tmp_path), "--jobs", "1"], standalone_mode=True)
        except SystemExit as done:
            os._exit(int(done.code or 0))
        os._exit(0)
    os.close(write)
    while not (tmp_path / "points" / POINTS[0]).is_dir():
        time.sleep(0.005)
    os.kill(pid, signal.SIGINT)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 130
    assert "Run the same command again to continue." in os.read(read, 10_000).decode()
