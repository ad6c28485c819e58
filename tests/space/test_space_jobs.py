"""The queue, the limits of a job's process, and the results that are kept."""

import os
import resource
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import anyio
import pytest

from forks import new_python
from job_functions import crash, fault, sleep_for, take, write
from jobs.estimate import Shape
from jobs.processes import remove_stale_folders, run, run_apart
from jobs.queue import Job, Jobs, Results
from jobs.service import Service, _with_own_files
from jobs.tasks import SAMPLE, Task, Text, choose_settings
from jobs.visitor import Planned
from safety.archives import unpack
from safety.limits import Limits
from safety.problems import Problem
from safety.repository import HubModel

LIMITS = Limits(max_jobs=1, max_waiting=3, max_jobs_per_visitor=2, max_job_bytes=3 * 2**30, max_job_seconds=60)


def task(name="model", restricted=False, **changes):
    model = HubModel(name, "c0ffee", (), 0, 0, {}, restricted)
    settings = choose_settings(["variance"], 32, 16, layers=4, width=1, limits=LIMITS)
    return replace(Task(name, model, "c0ffee", SAMPLE, settings), **changes)


def heard(jobs, job, messages=None):
    """All messages of a job; `messages` has what came before the problem of one that fails."""
    messages = [] if messages is None else messages

    async def listen():
        async for message in jobs.listen(job):
            messages.append(message)

    anyio.run(listen)
    return messages


class Gate:
    """A runner whose jobs end when they are let through; each gives its own task's name."""

    def __init__(self):
        self.open = threading.Event()
        self.runs = []

    def __call__(self, task, limits, stop):
        self.runs.append(task.name)
        while not self.open.wait(0.01):
            if stop.is_set():
                raise Problem("stopped", "Stopped, as you asked.")
        yield {"event": "done", "report": f"report of {task.name}"}


@pytest.fixture
def gate():
    return Gate()


@pytest.fixture
def jobs(gate):
    made = Jobs(LIMITS, runner=gate)
    yield made
    gate.open.set()
    made.close()


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def test_every_visitor_gets_the_result_of_their_own_job(jobs, gate):
    started = [jobs.submit(task(f"model {index}"), f"visitor {index}") for index in range(4)]
    gate.open.set()
    assert [heard(jobs, job)[-1]["report"] for job in started] == [f"report of model {index}" for index in range(4)]


def test_a_result_that_ended_early_is_not_kept_for_the_next_visitor():
    def runner(task, limits, stop):
        yield {"event": "done", "report": task.name, "is_whole": task.name == "whole"}

    jobs = Jobs(LIMITS, runner=runner)
    for name in ("whole", "cut"):
        assert heard(jobs, jobs.submit(task(name), "visitor"))[-1]["report"] == name
    assert [jobs.results.get(task(name)) for name in ("whole", "cut")] == ["whole", None]
    jobs.close()


def test_a_slow_listener_hears_only_what_is_new_and_then_the_end():
    def runner(task, limits, stop):
        for share in range(100):
            yield {"event": "stage", "stage": "skip", "share": share / 100}
            if share % 50 == 49:
                yield {"event": "partial", "report": str(share)}
        raise Problem("stopped", "Stopped, as you asked.")

    jobs = Jobs(LIMITS, runner=runner)
    job = jobs.submit(task(), "visitor")
    wait_for(lambda: job.is_over)
    news = []
    with pytest.raises(Problem, match="Stopped"):
        heard(jobs, job, news)
    assert news == [
        {"event": "stage", "stage": "skip", "share": 0.99},
        {"event": "partial", "report": "99"},
    ]
    jobs.close()


def test_a_full_queue_is_said_to_be_full_and_takes_jobs_again_later(jobs, gate):
    started = [jobs.submit(task("first"), "visitor")]
    wait_for(lambda: gate.runs)
    started += [jobs.submit(task(f"model {index}"), f"visitor {index}") for index in range(3)]
    assert [jobs.place(job) for job in started[1:]] == [0, 1, 2]
    with pytest.raises(Problem, match="queue is full") as refused:
        jobs.submit(task("one too many"), "somebody")
    assert refused.value.kind == "queue_full"
    gate.open.set()
    for job in started:
        heard(jobs, job)
    assert heard(jobs, jobs.submit(task("again"), "somebody"))[-1]["report"] == "report of again"


def test_one_visitor_cannot_fill_the_queue(jobs):
    for index in range(LIMITS.max_jobs_per_visitor):
        jobs.submit(task(f"model {index}"), "the same")
    with pytest.raises(Problem, match="not finished yet"):
        jobs.submit(task("another"), "the same")


def test_stop_ends_the_jobs_of_one_visitor_only(jobs, gate):
    mine, waiting, other = (
        jobs.submit(task(name), owner) for name, owner in (("a", "me"), ("b", "me"), ("c", "somebody"))
    )
    wait_for(lambda: gate.runs)
    assert jobs.stop("me") == 2
    for job in (mine, waiting):
        with pytest.raises(Problem, match="Stopped"):
            heard(jobs, job)
    gate.open.set()
    assert heard(jobs, other)[-1]["event"] == "done"


def test_a_job_that_waits_leaves_the_queue_as_soon_as_it_is_stopped(jobs, gate):
    ended = []
    other = jobs.submit(task("other"), "somebody")
    wait_for(lambda: gate.runs)
    mine = jobs.submit(task("mine"), "me", lambda: ended.append("mine"))
    behind = jobs.submit(task("behind"), "a third")
    assert jobs.stop("me") == 1
    assert mine.is_over
    assert mine.problem.kind == "stopped"
    assert jobs.place(behind) == 0
    gate.open.set()
    for job in (other, behind):
        assert heard(jobs, job)[-1]["event"] == "done"
    assert (gate.runs, ended) == (["other", "behind"], ["mine"])


def test_a_job_that_waits_and_that_nobody_listens_to_leaves_the_queue(gate, monkeypatch):
    monkeypatch.setattr("jobs.queue.DESERTED_SECONDS", 0.5)
    jobs = Jobs(
        LIMITS, runner=lambda task, limits, stop: iter(gate.open.wait(30) and [{"event": "done", "report": ""}])
    )
    jobs.submit(task("runs whatever happens"), "somebody")
    gone = jobs.submit(task("waits"), "gone")
    wait_for(lambda: gone.is_over)
    assert gone.problem.kind == "stopped"
    gate.open.set()
    jobs.close()


def test_stop_while_the_model_is_looked_up_keeps_the_analysis_from_starting(gate, tmp_path):
    upload = tmp_path / "model.zip"
    upload.write_bytes(b"zip")
    service = Service(LIMITS)
    service.jobs = Jobs(LIMITS, runner=gate)

    async def ask():
        with service.visit("me") as visit:
            service.stop("somebody else")
            visit.go_on()
            service.stop("me")
            return [step async for step in service.follow(planned_upload(upload), visit)]

    with pytest.raises(Problem, match="Stopped"):
        anyio.run(ask)
    assert not gate.runs
    assert upload.exists()
    service.jobs.close()


def test_the_end_of_one_visitors_job_leaves_the_files_of_another_with_the_same_upload(tmp_path, own_folder):
    upload = tmp_path / "hash-of-the-bytes" / "model.zip"
    upload.parent.mkdir()
    upload.write_bytes(b"zip")
    (first, clean_first), (second, clean_second) = (_with_own_files(planned_upload(upload)) for _ in range(2))
    clean_first()
    assert not Path(first.task.model[0]).exists()
    assert Path(second.task.model[0]).read_bytes() == b"zip"
    clean_second()
    with pytest.raises(Problem, match="have been deleted"):
        _with_own_files(planned_upload(upload))


def test_what_killed_processes_left_is_removed_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = [f"depthscope-space-{what}-{dead.pid}-ab" for what in ("job", "upload", "files")]
    for name in (*stale, "depthscope-space-job-1-ab", "somebody-elses"):
        (tmp_path / name).mkdir()
    remove_stale_folders()
    assert {path.name for path in tmp_path.iterdir()} == {"depthscope-space-job-1-ab", "somebody-elses"}


TOKEN_JOB = """
import sys, threading
from pathlib import Path

def whose(folder, limits, emit):
    from huggingface_hub import get_token
    from huggingface_hub.utils import build_hf_headers
    emit({"event": "done", "token": get_token(), "sent": "authorization" in build_hf_headers()})

if __name__ == "__main__":
    from huggingface_hub import get_token
    from safety.limits import Limits
    from jobs.processes import run_apart
    assert get_token() == "hf_of_the_owner"
    print(*run_apart(whose, Limits(), threading.Event()))
"""


def test_a_job_cannot_find_the_token_of_the_spaces_owner(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(TOKEN_JOB)
    places = os.pathsep.join(sys.path)
    environment = {**os.environ, "HF_TOKEN": "hf_of_the_owner", "PYTHONPATH": places}
    done = new_python(script, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "{'event': 'done', 'token': None, 'sent': False}"


def test_a_job_that_nobody_listens_to_is_stopped(jobs, gate, monkeypatch):
    monkeypatch.setattr("jobs.queue.DESERTED_SECONDS", 0.2)
    job = jobs.submit(task(), "gone")
    wait_for(lambda: job.is_over)
    assert job.problem.kind == "stopped"


def test_a_runner_that_breaks_is_logged_and_told_and_the_next_job_runs(caplog):
    def broken(task, limits, stop):
        raise ZeroDivisionError("of the runner")
        yield

    jobs = Jobs(LIMITS, runner=broken)
    with pytest.raises(Problem, match="log of this Space"):
        heard(jobs, jobs.submit(task(), "me"))
    wait_for(lambda: "of the runner" in caplog.text)
    jobs._runner = lambda task, limits, stop: iter([{"event": "done", "report": "whole"}])
    assert heard(jobs, jobs.submit(task(), "me"))[-1]["report"] == "whole"
    jobs.close()


def test_what_ends_is_cleaned_up_once(jobs, gate):
    ended = []
    gate.open.set()
    job = jobs.submit(task(), "me", lambda: ended.append(1))
    heard(jobs, job)
    heard(jobs, jobs.submit(task(), "me", lambda: ended.append(2)))  # kept: nothing runs
    assert ended == [1, 2]


def test_the_same_question_is_answered_at_once_and_a_different_one_measured(jobs, gate):
    gate.open.set()
    for asked in (
        task(),
        task(),
        task(text=Text("pasted", "other words")),
        task(dtype="bfloat16"),
        task(identity="beef"),
    ):
        heard(jobs, jobs.submit(asked, "me"))
    assert len(gate.runs) == 4


def test_results_of_models_that_not_everybody_may_read_are_not_kept(jobs, gate):
    gate.open.set()
    for _ in range(2):
        heard(jobs, jobs.submit(task(restricted=True, token="secret"), "me"))
    assert len(gate.runs) == 2
    assert "secret" not in repr(task(token="secret"))


def test_results_that_are_kept_take_only_so_much_memory():
    results = Results(most=100, most_bytes=1000)
    asked = [task(f"model {index}") for index in range(4)]
    for one in asked[:3]:
        results.put(one, "x" * 400)
    assert [len(results.get(one) or "") for one in asked] == [0, 400, 400, 0]
    for _ in range(9):
        results.put(asked[1], "\u00e9" * 200)
    assert [len(results.get(one) or "") for one in asked] == [0, 200, 400, 0]
    results.put(asked[3], "x" * 1001)
    assert results.get(asked[3]) is None
    results.put(asked[0], "x" * 1000)
    assert len(results.get(asked[0])) == 1000


def test_only_so_many_results_are_kept():
    results = Results(most=2)
    asked = [task(f"model {index}") for index in range(3)]
    for one in asked:
        results.put(one, one.name)
    assert [results.get(one) for one in asked] == [None, "model 1", "model 2"]


def ended(job, limits=LIMITS, stop=None):
    return list(run_apart(job, limits, stop or threading.Event()))


@pytest.fixture
def own_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    yield tmp_path
    assert not list(tmp_path.glob("depthscope-space-*"))


def test_a_job_that_hangs_is_ended_when_its_time_is_over(own_folder):
    with pytest.raises(Problem) as problem:
        ended(partial(sleep_for, 600), replace(LIMITS, max_job_seconds=3))
    assert problem.value.kind == "timed_out"
    assert "sleeping" in str(problem.value) or "starting" in str(problem.value)


def test_a_job_that_takes_too_much_memory_is_ended(own_folder):
    with pytest.raises(Problem) as problem:
        ended(partial(take, 8))
    assert problem.value.kind in ("out_of_memory", "crashed")


def test_a_job_that_writes_too_much_is_ended(own_folder):
    with pytest.raises(Problem):
        ended(partial(write, 64), replace(LIMITS, max_unpacked_bytes=2**20, max_download_bytes=2**20))


def test_a_job_that_crashes_says_so_and_the_next_one_runs(own_folder):
    with pytest.raises(Problem) as problem:
        ended(crash)
    assert problem.value.kind == "crashed"
    assert ended(partial(write, 1))[-1]["event"] == "done"


def test_a_job_that_is_ended_by_its_own_fault_is_not_said_to_need_memory(own_folder):
    with pytest.raises(Problem) as problem:
        ended(fault)
    assert problem.value.kind == "crashed"


def test_an_upload_that_the_disk_has_no_room_for_is_not_blamed_on_who_sent_it(short_model, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(Problem, match="no room left on its disk") as problem:
            unpack(short_model, tmp_path, LIMITS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert problem.value.kind == "crashed"


def test_a_stopped_job_ends_at_once_and_leaves_nothing(own_folder):
    stop = threading.Event()
    threading.Timer(2.0, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Problem) as problem:
        ended(partial(sleep_for, 600), stop=stop)
    assert problem.value.kind == "stopped"
    assert time.monotonic() - begun < 60


def test_an_iterator_that_is_closed_early_ends_its_process(own_folder):
    messages = run_apart(partial(sleep_for, 600), LIMITS, threading.Event())
    assert next(messages)["stage"] == "sleeping"
    messages.close()


def test_a_job_is_what_the_runner_of_the_space_takes():
    assert Jobs(LIMITS)._runner is run
    assert Job(task(), "me").problem is None


def planned_upload(path):
    return Planned(task(model=(str(path),)), Shape(1, 1, 1.0, 1), 1.0)


def test_the_upload_of_a_visitor_who_is_turned_away_is_deleted(tmp_path, own_folder, gate):
    upload = tmp_path / "model.zip"
    upload.write_bytes(b"zip")
    service = Service(LIMITS)
    service.jobs = Jobs(replace(LIMITS, max_jobs_per_visitor=1), runner=gate)
    service.jobs.submit(task(), "me")

    async def ask():
        with service.visit("me") as visit:
            return [step async for step in service.follow(planned_upload(upload), visit)]

    with pytest.raises(Problem, match="not finished yet"):
        anyio.run(ask)
    assert not upload.exists()
    gate.open.set()
    service.jobs.close()
