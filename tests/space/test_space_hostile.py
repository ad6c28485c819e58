"""Hostile uploads: each gets its message in bounded time and memory, and leaves nothing behind."""

import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hostile import CASES, honest
from jobs.processes import run
from jobs.tasks import SAMPLE, Task, choose_settings
from safety.limits import Limits
from safety.problems import Problem

SECONDS = 30
WITNESS = Path("/tmp/depthscope-space-was-here")


@pytest.fixture(scope="module")
def temporary(tmp_path_factory):
    """A folder for temporary files that nobody else writes to, and the job processes' own."""
    folder = tmp_path_factory.mktemp("temporary")
    before, tempfile.tempdir = tempfile.tempdir, str(folder)
    start_the_fork_server()
    yield folder
    tempfile.tempdir = before


def start_the_fork_server():
    """Let it import torch before times are taken."""
    with pytest.raises(Problem):
        analysed([], Limits(max_job_bytes=4 * 2**30, max_job_seconds=300))


def left_in(folder):
    """What is there beside the socket of the fork server, which goes on."""
    return [path for path in folder.iterdir() if not path.name.startswith("pymp-")]


def analysed(paths, limits, text=None):
    """What becomes of an upload: the last message of its job, or the problem."""
    settings = choose_settings(["variance"], 32, 16, layers=4, width=1, limits=limits)
    task = Task("upload", tuple(map(str, paths)), "fingerprint", text or SAMPLE, settings)
    return list(run(task, limits, threading.Event()))[-1]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_hostile_upload_is_refused_with_a_message(case, model_folder, tmp_path, temporary, job_limits):
    limits = replace(job_limits, max_unpacked_bytes=2**26, max_job_seconds=SECONDS)
    uploaded = case.build(model_folder, tmp_path)
    begun = time.monotonic()
    with pytest.raises(Problem) as refused:
        analysed(uploaded, limits)
    assert refused.value.kind in case.kinds, f"{refused.value.kind}: {refused.value}"
    message = str(refused.value)
    assert 20 < len(message) < 700
    assert str(temporary) not in message
    assert message.isprintable()
    assert time.monotonic() - begun < SECONDS + 10
    assert not left_in(temporary)
    assert not WITNESS.exists()


def test_an_honest_upload_is_analysed_after_all_those(model_folder, tmp_path, temporary, job_limits):
    assert analysed(honest(model_folder, tmp_path), job_limits)["event"] == "done"
    assert not left_in(temporary)
