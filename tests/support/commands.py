"""Programs in processes of their own, without the seconds that each would take to import torch and transformers.

They are forked from one process that has imported those two and nothing of depthscope; whatever else a program needs,
it imports itself. Where there is no fork, a new interpreter runs each. Where the order of imports matters, or variables
that libraries read when they are imported, forks.py runs a program.
"""

import gc
import multiprocessing
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["Started", "depthscope", "in_two_processes", "prepare", "python", "side_by_side", "started"]

PRELOADED = [
    "torch",
    "transformers.modeling_utils",
    "transformers.models.auto.modeling_auto",
    "transformers.models.llama.modeling_llama",
    "transformers.trainer",
]
SECONDS = 300
HOST = "127.0.0.1"


def _new_processes() -> Any:
    """What multiprocessing starts processes with that have nothing of this one."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def prepare() -> None:
    """Start the one process that all are forked from, before a sweep would start it with what its workers need."""
    if _new_processes().get_start_method() == "forkserver":
        multiprocessing.forkserver.ensure_running()


def in_two_processes(work: Callable[..., None], *arguments: object) -> None:
    """Call `work(rank, *arguments)` in each of two processes.

    Raises:
        AssertionError: one of them failed, which it says on standard error.
    """
    processes = [_new_processes().Process(target=work, args=(rank, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]


def depthscope(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m depthscope ARGUMENTS`, with more variables in the environment."""
    return python("-m", "depthscope", *arguments, **{"COLUMNS": "100", "NO_COLOR": "1", **environment})


def python(*words: object, cwd: Path | None = None, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `python WORDS`, which name a module (-m), code (-c) or a file, with more variables in the environment."""
    return _done([environment], words, cwd)[0]


def side_by_side(count: int, *words: object, cwd: Path | None = None) -> "list[subprocess.CompletedProcess[str]]":
    """Run `python WORDS` in several processes that find each other as those of torchrun do."""
    with socket.socket() as server:
        server.bind((HOST, 0))
        world = {"MASTER_ADDR": HOST, "MASTER_PORT": str(server.getsockname()[1]), "WORLD_SIZE": str(count)}
    return _done([{**world, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)], words, cwd)


class Started:
    """A program that runs, as subprocess.Popen has it."""

    def __init__(self, process: Any) -> None:
        self._process = process
        self.pid: int = process.pid

    @property
    def returncode(self) -> int | None:
        """How it ended; a signal is below zero."""
        return self._process.exitcode

    def poll(self) -> int | None:
        """How it ended; None while it runs."""
        return self._process.exitcode

    def wait(self, seconds: float) -> int | None:
        """Wait for its end, but not for ever."""
        self._process.join(seconds)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()


def started(*words: object, output: Path, session: bool = False, **environment: str) -> Started:
    """Begin `python WORDS`, which is to be ended from here.

    What it writes goes to the end of a file, or to a terminal; a session is one of the system's, which it leads.
    """
    return Started(_start(words, output, output, None, environment, session))


def _start(
    words: tuple[object, ...],
    output: Path,
    errors: Path,
    cwd: Path | None,
    environment: Mapping[str, str],
    session: bool = False,
) -> Any:
    settings = {**os.environ, **environment}
    arguments = ([str(word) for word in words], settings, output, errors, cwd, session)
    process = _new_processes().Process(target=_run, args=arguments)
    process.start()
    return process


def _done(
    environments: list[dict[str, str]], words: tuple[object, ...], cwd: Path | None
) -> "list[subprocess.CompletedProcess[str]]":
    """Run the same in processes side by side, to the end."""
    with tempfile.TemporaryDirectory() as name:
        files = [(Path(name, f"out-{index}"), Path(name, f"err-{index}")) for index in range(len(environments))]
        processes = [_start(words, *two, cwd, more) for two, more in zip(files, environments, strict=True)]
        done = []
        for process, (out, err) in zip(processes, files, strict=True):
            process.join(SECONDS)
            if process.exitcode is None:
                for each in processes:
                    each.kill()
                raise subprocess.TimeoutExpired(str(words), SECONDS, out.read_text(), err.read_text())
            done.append(subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text()))
        return done


def _run(words: list[str], settings: dict[str, str], out: Path, err: Path, cwd: Path | None, session: bool) -> None:
    """What the new process does; it ends with the exit status of the program."""
    gc.freeze()  # what was imported stays
    multiprocessing.forkserver._forkserver.__init__()  # of the program's own, should it want one
    multiprocessing.resource_tracker._resource_tracker.__init__()
    os.environ.clear()
    os.environ.update(settings)
    tempfile.tempdir = None  # found anew, where the environment names another
    if session:
        os.setsid()
    if cwd is not None:
        os.chdir(cwd)
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOCTTY), number)
    first, *others = words
    sys.path[:0] = [str(Path(first).parent) if not first.startswith("-") else ""]
    if first == "-m":
        sys.argv = others
        runpy.run_module(others[0], run_name="__main__", alter_sys=True)
    elif first == "-c":
        sys.argv = [first, *others[1:]]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        exec(compile(others[0], "<string>", "exec"), main.__dict__)
    else:
        sys.argv = words
        runpy.run_path(first, run_name="__main__")
