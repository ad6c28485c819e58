"""A Space under visitors who upload, leave, stop, are killed and send junk, among others who only want an analysis.

`visitors(seed, seconds)` serves the real Space, lets four visitors at a time do what one seeded `random.Random` says,
and looks afterwards for whatever should not be there: see `benchmarks/soak.py`, which runs it.

    python benchmarks/soak_visitors.py [SEED] [SECONDS]
"""

import json
import math
import random
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

import depthscope

ROOT = Path(__file__).parents[1]
sys.path += [str(ROOT / "tests" / "support"), str(ROOT / "tests" / "space")]

from models import tiny_llama  # noqa: E402
from rest import Refused, Visitor, reset  # noqa: E402
from served import Served, serving  # noqa: E402
from tiny_tokenizer import save_tokenizer  # noqa: E402

__all__ = ["visitors"]

DESERTED_SECONDS = 5
AT_ONCE = 4
TOKENS, BLOCK_SIZE = 128, 64
SENTENCE = "A layer of a model adds a little to the stream of numbers that it is given. "
NOT_HERE = "queue_full"  # an honest answer to one visitor too many
GROWTH = 1.3  # of the server's memory, from a tenth of the time on, that is still called flat


@dataclass
class Soak:
    """What all visitors share: where they go, what they bring, what they have seen."""

    space: Served
    models: dict[str, Path]  # packed; "long" takes minutes
    right: dict[tuple[str, int], list[dict[str, Any]]]  # the layers of the report, by model and text
    counts: Counter[str] = field(default_factory=Counter)
    kept: set[str] = field(default_factory=set)  # uploads that nobody asked about, which stay for an hour
    lock: threading.Lock = field(default_factory=threading.Lock)

    def count(self, what: str) -> None:
        """Count something that happened."""
        with self.lock:
            self.counts[what] += 1

    def fault(self, what: str, words: object) -> None:
        """Count what should not have happened, and say it."""
        print(f"{what}: {str(words)[:500]}", flush=True)
        self.count(f"fault: {what}")


def visitors(seed: int, seconds: float) -> dict[str, int]:
    """Let visitors come for so many seconds; gives counts, of which those of `fault: ...` should be absent.

    `first MiB` and `last MiB` are the memory of the server (its RSS) after a tenth of the time and at the end.
    """
    chance = random.Random(seed)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        models, right = _models(folder)
        settings = {
            "DEPTHSCOPE_SPACE_DESERTED_SECONDS": str(DESERTED_SECONDS),
            "DEPTHSCOPE_SPACE_MAX_JOB_BYTES": "4e9",
            "DEPTHSCOPE_SPACE_MAX_RESULTS": "4",
        }
        with serving(folder, settings) as space:
            soak = Soak(space, models, right)
            _visit_until(soak, chance, seconds)
            _look_around(soak)
            server = psutil.Process(space.pid)
            started = server.children(recursive=True)
            port = Visitor(space.url).address
            space.process.send_signal(signal.SIGTERM)
            space.process.wait(10)
            _look_behind(soak, started, port)
        return dict(soak.counts)


def _models(folder: Path) -> tuple[dict[str, Path], dict[tuple[str, int], list[dict[str, Any]]]]:
    """Packed models, and what depthscope itself measures of the short ones."""
    models, right = {}, {}
    for name, layers in (("three", 3), ("four", 4), ("long", 40)):
        place = folder / name
        tiny_llama(layers, vocab_size=300).save_pretrained(place)
        save_tokenizer(place)
        models[name] = folder / f"{name}.zip"
        with zipfile.ZipFile(models[name], "w") as packed:
            for file in sorted(place.iterdir()):
                packed.write(file, file.name)
        for number in range(3 if name != "long" else 0):
            right[name, number] = depthscope.analyze(
                str(place),
                text=[_text(number)],
                scores="variance,skip",
                fit_blocks=0,
                eval_blocks=TOKENS // BLOCK_SIZE,
                block_size=BLOCK_SIZE,
                dtype="float32",
            ).layers
    whole = models["three"].read_bytes()
    for name, content in {"cut": whole[: len(whole) // 2], "noise": b"PK\x03\x04" + whole[::-1], "empty": b""}.items():
        models[name] = folder / f"{name}.zip"
        models[name].write_bytes(content)
    return models, right


def _text(number: int) -> str:
    return f"{number}. " + SENTENCE * (20 + number)


def _visit_until(soak: Soak, chance: random.Random, seconds: float) -> None:
    begun = time.monotonic()
    server = psutil.Process(soak.space.pid)
    slots = threading.Semaphore(AT_ONCE)
    with ThreadPoolExecutor(AT_ONCE) as pool:
        while (gone := time.monotonic() - begun) < seconds or "first MiB" not in soak.counts:
            slots.acquire()
            act, given = _plan(chance)

            def one(act: Callable[..., None] = act, given: tuple[Any, ...] = given) -> None:
                try:
                    act(soak, *given)
                    soak.count(act.__name__.strip("_").replace("_", " "))
                except Exception as error:  # the next visitors come all the same
                    soak.fault("a visitor was treated as none should be", f"{act.__name__}: {error!r}")
                finally:
                    slots.release()

            pool.submit(one)
            if gone > seconds / 10 and "first MiB" not in soak.counts:
                soak.counts["first MiB"] = server.memory_info().rss >> 20
    soak.counts["last MiB"] = server.memory_info().rss >> 20


def _plan(chance: random.Random) -> tuple[Callable[..., None], tuple[Any, ...]]:
    """What the next visitor does, and how exactly."""
    kind = chance.choice([_analyses, _analyses, _leaves, _is_killed, _stops, _cuts_an_upload, _sends_junk])
    if kind is _analyses:
        return kind, (chance.choice(["three", "four"]), chance.randrange(3))
    if kind is _leaves:
        return kind, (chance.choice(["never reads", "resets", "closes half", "closes"]), chance.uniform(0, 3))
    if kind in (_is_killed, _stops):
        return kind, (chance.uniform(0.2, 3),)
    if kind is _cuts_an_upload:
        return kind, (chance.randrange(1, 200_000), chance.choice(["resets", "closes", "waits"]))
    return kind, (chance.randrange(len(JUNK)),)


def _long(visitor: Visitor, soak: Soak, session: str | None = None) -> str:
    asked = ("variance,skip,causal,permutation", 8192, 64, "float32", "", "auto")
    return visitor.ask("analyze_upload", visitor.upload(soak.models["long"]), *asked, session=session)


def _analyses(soak: Soak, model: str, number: int) -> None:
    visitor = Visitor(soak.space.url)
    upload = visitor.upload(soak.models[model])
    asked = ("variance,skip", TOKENS, BLOCK_SIZE, "float32", _text(number), "auto")
    try:
        layers = visitor.call("analyze_upload", upload, *asked)["layers"]
    except Refused as refused:
        if NOT_HERE in str(refused):
            return soak.count("queue was full")
        if "not there any more" in str(refused):  # another visitor's job has just ended with the same bytes
            return soak.count("upload was gone")
        return soak.fault("an analysis was refused", refused)
    for layer, known in zip(layers, soak.right[model, number], strict=True):
        for score in ("variance", "skip_ratio"):
            if not math.isclose(layer[score], known[score], rel_tol=1e-5):
                soak.fault("a result is wrong", f"{score} is {layer[score]}, not {known[score]}")
    soak.count("right results")


def _leaves(soak: Soak, how: str, after: float) -> None:
    visitor = Visitor(soak.space.url)
    event = _long(visitor, soak)
    if how == "never reads":
        return
    with visitor.reading("analyze_upload", event) as connection:
        time.sleep(after)
        if how == "resets":
            reset(connection)
        elif how == "closes half":
            connection.shutdown(socket.SHUT_WR)
            time.sleep(after)


def _is_killed(soak: Soak, after: float) -> None:
    visitor = Visitor(soak.space.url)
    address = f"{soak.space.url}/gradio_api/call/analyze_upload/{_long(visitor, soak)}"
    program = "import sys, urllib.request as u\nu.urlopen(sys.argv[1]).read()"
    with subprocess.Popen([sys.executable, "-c", program, address], stderr=subprocess.DEVNULL) as reader:
        time.sleep(after)
        reader.kill()


def _stops(soak: Soak, after: float) -> None:
    visitor, session = Visitor(soak.space.url), f"stops-{time.monotonic_ns()}"
    event = _long(visitor, soak, session)
    time.sleep(after)
    visitor.ask("stop", session=session)
    try:
        visitor.read("analyze_upload", event)
    except Refused as refused:
        if not any(words in str(refused) for words in ("stopped: ", NOT_HERE, "not there any more")):
            soak.fault("a stopped analysis ended otherwise", refused)


def _cuts_an_upload(soak: Soak, sent: int, how: str) -> None:
    connection = Visitor(soak.space.url).begin_upload(announced=1_000_000, sent=sent)
    if how == "resets":
        reset(connection)
    elif how == "waits":
        connection.settimeout(4 * DESERTED_SECONDS)
        if b"400" not in connection.recv(100):
            soak.fault("an upload", "that stood still was not given up")
    connection.close()


def _sends_junk(soak: Soak, which: int) -> None:
    visitor = Visitor(soak.space.url)
    try:
        answer = JUNK[which](visitor, soak)
    except (Refused, httpx.HTTPError) as error:
        answer = error
    if isinstance(answer, httpx.Response) and answer.status_code >= 500:
        soak.fault("junk broke something", f"{which}: {answer.status_code} {answer.text[:200]}")
    elif isinstance(answer, Refused) and ("crashed" in str(answer) or "Error" in str(answer)):
        soak.fault("junk broke something", f"{which}: {answer}")


def _upload(name: str) -> Callable[[Visitor, Soak], Any]:
    def send(visitor: Visitor, soak: Soak) -> Any:
        upload = visitor.upload(soak.models[name])
        return visitor.call("analyze_upload", upload, "variance", 64, 64, "float32", "", "auto")

    return send


def _call(endpoint: str, *data: Any) -> Callable[[Visitor, Soak], Any]:
    return lambda visitor, soak: visitor.call(endpoint, *data)


def _post(path: str, content: Any) -> Callable[[Visitor, Soak], Any]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    headers = {"Content-Type": "application/json"}
    return lambda visitor, soak: visitor.client.post(path, content=body, headers=headers)


def _nowhere(path: str, content: Any) -> Callable[[Visitor, Soak], Any]:
    """What there is not, which Gradio answers with 500 and a traceback in the log."""
    post = _post(path, content)
    return lambda visitor, soak: post(visitor, soak).status_code


def _unasked_upload(visitor: Visitor, soak: Soak) -> None:
    with soak.lock:
        soak.kept.add(visitor.upload(soak.models["cut"])["path"])


JUNK: list[Callable[[Visitor, Soak], Any]] = [
    *(_upload(name) for name in ("cut", "noise", "empty")),
    _unasked_upload,
    _call("analyze_upload", *[None] * 7),
    _call("analyze", *[None] * 8),
    _call("estimate", 1, 2, 3),
    _call("summarize", {"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}),
    _call("summarize", {"path": ["a"], "meta": {"_type": "gradio.FileData"}}),
    _call("analyze_upload", {"path": "x"}, {}, [], "y", 1, " ", 2),
    _post("/call/analyze", b"{not JSON"),
    _post("/call/analyze", []),
    _nowhere("/call/no_such_endpoint", {"data": []}),
    _nowhere("/queue/join", {"data": [None] * 20, "fn_index": 10**6, "session_hash": "junk"}),
    _post("/queue/join", {"data": "text", "fn_index": "one", "session_hash": 5}),
    _post("/upload", b"--nothing"),
    lambda visitor, soak: visitor.client.get("/queue/data"),
    lambda visitor, soak: visitor.client.get("/file=/etc/passwd"),
    lambda visitor, soak: visitor.client.post("/upload", files={"wrong": ("a.zip", b"123")}),
    lambda visitor, soak: visitor.client.post("/upload", files={"files": ("../../a.zip", b"")}),
]


def _look_around(soak: Soak) -> None:
    """What a Space may not have any more when all visitors are gone."""
    end = time.monotonic() + DESERTED_SECONDS + 20
    while time.monotonic() < end and soak.space.jobs():
        time.sleep(0.5)
    if soak.space.leftovers():
        soak.fault("a job is left", soak.space.leftovers())
    files = [path for path in soak.space.left() if str(path) not in soak.kept and path.name != "a.zip"]
    if files:
        soak.fault("a file is left", files)
    server = psutil.Process(soak.space.pid)
    processes = [process for process in server.children(recursive=True) if process.cpu_percent(0.5) > 5]
    if processes or len(server.children(recursive=True)) > 2:  # the fork server and the tracker of its resources
        soak.fault("a process is left", server.children(recursive=True))
    open_ones = [other for other in server.net_connections("inet") if other.status != psutil.CONN_LISTEN]
    if len(open_ones) > AT_ONCE:
        soak.fault("a connection is left", open_ones)
    if soak.counts["last MiB"] > GROWTH * soak.counts["first MiB"]:
        soak.fault("memory grew", f"{soak.counts['first MiB']} to {soak.counts['last MiB']} MiB")
    logged = soak.space.log.read_text(errors="replace")
    soak.counts["tracebacks in the log"] = logged.count("Traceback")


def _look_behind(soak: Soak, started: list[psutil.Process], port: tuple[str, int]) -> None:
    """What may not be there when the Space has ended."""
    _, alive = psutil.wait_procs(started, 5)
    if alive:
        soak.fault("a process outlived the Space", alive)
    if files := [path for path in soak.space.folder.rglob("*") if path.is_file()]:
        soak.fault("a file outlived the Space", files)
    try:
        socket.create_server(port).close()
    except OSError as error:
        soak.fault("the port is taken", error)


if __name__ == "__main__":
    for name, number in sorted(visitors(int([*sys.argv, "0"][1]), float([*sys.argv, "0", "120"][2])).items()):
        print(f"{number:8}  {name}")
