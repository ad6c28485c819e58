"""The command line in processes of its own, without the seconds that each would take to import torch and transformers.

They are forked from one process that has imported those two and nothing of depthscope; whatever else a command needs it
imports itself. Where there is no fork, a new interpreter runs each.
"""

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

__all__ = ["depthscope"]

PRELOADED = ["torch", "transformers.modeling_utils", "transformers.models.auto.modeling_auto"]
SECONDS = 300


def depthscope(*arguments: object, **environment: str) -> "subprocess.CompletedProcess[str]":
    """Run `python -m depthscope ARGUMENTS`, with more variables in the environment."""
    words = [str(argument) for argument in arguments]
    settings = {**os.environ, "COLUMNS": "100", "NO_COLOR": "1", **environment}
    if "forkserver" not in multiprocessing.get_all_start_methods():
        command = [sys.executable, "-m", "depthscope", *words]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS, env=settings)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    with tempfile.TemporaryDirectory() as name:
        out, err = Path(name, "out"), Path(name, "err")
        process = context.Process(target=_run, args=(words, settings, out, err))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise subprocess.TimeoutExpired(words, SECONDS, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(words, process.exitcode, out.read_text(), err.read_text())


def _run(words: list[str], settings: dict[str, str], out: Path, err: Path) -> None:
    """What the new process does; it ends with the exit status of the command."""
    os.environ.clear()
    os.environ.update(settings)
    tempfile.tempdir = None  # found anew, where the environment names another
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.argv = ["depthscope", *words]
    runpy.run_module("depthscope", run_name="__main__", alter_sys=True)
