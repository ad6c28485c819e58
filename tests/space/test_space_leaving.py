"""Visitors who leave a served Space, each in their own way, and those who come after them."""

import itertools
import signal
import socket
import subprocess
import sys
import time

import psutil
import pytest

pytest.importorskip("gradio", reason="gradio is not installed")

from conftest import LEFT_SECONDS
from rest import Refused, Visitor, reset
from served import serving

SECONDS = LEFT_SECONDS
SLACK = 30.0  # for a machine that others use too: to end one process, and to start the next
LONG = ["variance,skip,causal,permutation", 8192, 64, "float32", "", "auto"]
NUMBERS = itertools.count()


def short():
    """Settings of a short analysis, on a text that nobody has asked about before: its result is not kept yet."""
    return ["variance", 64, 64, "float32", f"{next(NUMBERS)}: {'A layer adds to a stream of numbers. ' * 40}", "auto"]


def wait_for(condition, seconds=SECONDS + SLACK):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.1)


@pytest.fixture
def is_clean(space):
    """Whether nothing is left of what the test asked for."""
    before = set(space.left())
    return lambda: set(space.left()) <= before


def begin(space, model):
    """Ask for a long analysis, and wait until it runs."""
    visitor = Visitor(space.url)
    event = visitor.ask("analyze_upload", visitor.upload(model), *LONG)
    wait_for(lambda: space.jobs())
    return visitor, event


def never_reads(visitor, event):
    visitor.client.close()


def drops_the_connection(visitor, event):
    with visitor.reading("analyze_upload", event) as connection:
        assert connection.recv(100)
        reset(connection)


def closes_half_of_the_connection(visitor, event):
    with visitor.reading("analyze_upload", event) as connection:
        assert connection.recv(100)
        connection.shutdown(socket.SHUT_WR)
        wait_for(lambda: not connection.recv(100))  # the server closes the other half


def is_killed_while_reading(visitor, event):
    host, port = visitor.address
    address = f"http://{host}:{port}/gradio_api/call/analyze_upload/{event}"
    program = "import sys, urllib.request as u\nwith u.urlopen(sys.argv[1]) as a: print(1, flush=True); a.read()"
    with subprocess.Popen([sys.executable, "-c", program, address], stdout=subprocess.PIPE) as reader:
        assert reader.stdout.readline()
        reader.kill()


def reads_what_another_one_asked(visitor, event):
    visitor.ask("summarize", None)  # a stream of one's own keeps nobody else's analysis
    with pytest.raises(Refused), visitor.client.stream("GET", "/queue/data?session_hash=another") as lines:
        raise Refused(next(lines.iter_lines()))


@pytest.mark.parametrize(
    "leave",
    [
        never_reads,
        drops_the_connection,
        closes_half_of_the_connection,
        is_killed_while_reading,
        reads_what_another_one_asked,
    ],
)
def test_a_visitor_who_leaves_does_not_keep_the_next_one_waiting(space, is_clean, long_model, short_model, leave):
    leave(*begin(space, long_model))
    gone = time.monotonic()
    second = Visitor(space.url)
    report = second.call("analyze_upload", second.upload(short_model), *short())
    assert len(report["layers"]) == 4
    assert time.monotonic() - gone < SECONDS + SLACK
    wait_for(is_clean)


def test_a_page_that_only_shows_that_it_is_alive_has_left(space, is_clean, long_model):
    visitor = Visitor(space.url)
    visitor.join("analyze_upload", visitor.upload(long_model), *LONG, session="alive")
    with visitor.client.stream("GET", "/heartbeat/alive") as answer:
        beats = answer.iter_lines()  # kept: without it the connection is closed
        wait_for(space.jobs)
        assert next(beats)
        wait_for(is_clean)


def test_a_closed_tab_has_left(space, is_clean, long_model):
    visitor = Visitor(space.url)
    visitor.join("analyze_upload", visitor.upload(long_model), *LONG, session="tab")
    with (
        visitor.client.stream("GET", "/heartbeat/tab") as alive,
        visitor.client.stream("GET", "/queue/data?session_hash=tab") as answer,
    ):
        beats, news = alive.iter_lines(), answer.iter_lines()  # kept: without them the connections are closed
        assert next(beats)
        assert next(news)
        wait_for(space.jobs)
        time.sleep(SECONDS + 1)
        assert space.jobs()
    wait_for(is_clean)


def test_many_who_leave_the_queue_do_not_keep_it_full(space, is_clean, long_model, short_model):
    visitors = [begin(space, long_model)[0]]
    for number in range(3):  # each the same bytes, and settings of their own
        visitors.append(Visitor(space.url))
        visitors[-1].ask("analyze_upload", visitors[-1].upload(long_model), LONG[0], 8100 + number, *LONG[2:])
    last = Visitor(space.url)
    with pytest.raises(Refused, match="queue_full"):
        last.call("analyze_upload", last.upload(short_model), *short())
    wait_for(is_clean)  # of all at about the same time, not of one after the other
    assert last.call("analyze_upload", last.upload(short_model), *short())["layers"]


def test_who_reads_is_served_however_long_it_takes(space, is_clean, long_model, short_model):
    first, event = begin(space, long_model)
    begun = time.monotonic()
    with first.reading("analyze_upload", event):
        second = Visitor(space.url)
        waiting = second.ask("analyze_upload", second.upload(short_model), *short())
        with second.reading("analyze_upload", waiting) as connection:
            while time.monotonic() - begun < 3 * SECONDS:
                time.sleep(0.1)
            assert space.jobs()
            assert b"complete" not in connection.recv(2000)
            first.ask("stop", session=event)
            answer = b""
            while b"\ndata: [" not in answer:
                answer += connection.recv(100_000)
    assert b"event: complete" in answer
    wait_for(is_clean)


def test_who_comes_back_for_an_answer_is_told_why_there_is_none(space, is_clean, long_model):
    visitor, event = begin(space, long_model)
    wait_for(is_clean)
    with pytest.raises(Refused, match=f"stopped: Nobody read the answer for {SECONDS} seconds"):
        visitor.read("analyze_upload", event)


@pytest.mark.parametrize("leave", [reset, socket.socket.close, lambda connection: time.sleep(2 * SECONDS)])
def test_nothing_stays_of_an_upload_that_stops_in_the_middle(space, is_clean, leave):
    logged = len(space.log.read_text())
    connection = Visitor(space.url).begin_upload(announced=10_000_000, sent=1_000_000)
    wait_for(lambda: not is_clean())
    leave(connection)
    wait_for(is_clean, SLACK)
    connection.close()
    assert "Traceback" not in space.log.read_text()[logged:]


def is_gone(process):
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # nobody waits for it in a container
    except psutil.NoSuchProcess:
        return True


def end(space, number):
    """End a Space by a signal while it works; gives the signal that it ended by, and all its processes are gone."""
    wait_for(lambda: len(psutil.Process(space.pid).children(recursive=True)) > 2, 60)  # the third one is the job
    started = psutil.Process(space.pid).children(recursive=True)
    space.process.send_signal(number)
    wait_for(lambda: space.process.poll() is not None and all(map(is_gone, started)), 5)
    with socket.create_server(Visitor(space.url).address):  # the port is free
        return -space.process.returncode


def test_killed_it_leaves_its_port_free_and_no_process(long_model, tmp_path):
    with serving(tmp_path, {"DEPTHSCOPE_SPACE_MAX_JOB_BYTES": "4e9"}) as space:
        begin(space, long_model)
        assert end(space, signal.SIGKILL) == signal.SIGKILL
        assert not space.jobs()


def test_told_to_end_it_leaves_its_port_free_and_no_process_and_no_file(space, long_model):
    visitor, event = begin(space, long_model)
    with visitor.reading("analyze_upload", event):
        assert end(space, signal.SIGTERM) == signal.SIGTERM  # as systemd expects
    assert [path.name for path in space.folder.rglob("*")] == ["gradio"]
