"""The Space as a visitor meets it: its own process on the loopback interface, with a Hub of our own behind it."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from commands import Started, started

STARTING_SECONDS = 300
ENDING_SECONDS = 5


@dataclass(frozen=True)
class Served:
    """Where the Space answers, where it keeps files, and its process."""

    url: str
    folder: Path
    log: Path
    process: "Started | subprocess.Popen[bytes]"

    @property
    def pid(self) -> int:
        """The server's process."""
        return self.process.pid

    def leftovers(self) -> list[Path]:
        """Folders of jobs and uploads that have not been removed."""
        return [
            path
            for path in self.folder.iterdir()
            if path.name.startswith(("depthscope-space-job", "depthscope-space-up"))
        ]

    def jobs(self) -> list[Path]:
        """The folders of the jobs that run."""
        return [path for path in self.leftovers() if "-job-" in path.name]

    def left(self) -> list[Path]:
        """Whatever the Space keeps of jobs and uploads."""
        return [path for path in self.folder.glob("gradio/**/*") if path.is_file()] + self.leftovers()


@contextmanager
def serving(
    folder: Path, settings: Mapping[str, str] | None = None, ending: signal.Signals = signal.SIGTERM
) -> Iterator[Served]:
    """Run `depthscope space`, with all its temporary files in a folder of its own, and end it by a signal.

    Raises:
        AssertionError: it did not end by that signal in time.
    """
    port = _free_port()
    temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # a short path: sockets lie in it
    environment = {
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(temporary / "gradio"),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        **(settings or {}),
    }
    log = folder / "space.log"
    process = _started(["-m", "depthscope", "space", "--port", str(port)], log, environment)
    try:
        _wait(f"http://127.0.0.1:{port}/", process, log)
        yield Served(f"http://127.0.0.1:{port}", temporary, log, process)
    finally:
        try:
            if process.poll() is None:
                process.send_signal(ending)
                assert process.wait(ENDING_SECONDS) == -ending
        finally:
            process.kill()
            process.wait(ENDING_SECONDS)


def _started(words: list[str], log: Path, environment: Mapping[str, str]) -> "Started | subprocess.Popen[bytes]":
    if not any(name.startswith("HF_") for name in environment):
        return started(*words, output=log, **environment)
    with log.open("wb") as file:  # the Hub's variables are read when its libraries are imported
        settings = {**os.environ, **environment}
        return subprocess.Popen([sys.executable, *words], env=settings, stdout=file, stderr=file)


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _wait(url: str, process: "Started | subprocess.Popen[bytes]", log: Path) -> None:
    end = time.monotonic() + STARTING_SECONDS
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RuntimeError(f"the Space ended: {log.read_text(errors='replace')[-3000:]}")
        try:
            with urllib.request.urlopen(url, timeout=5):
                return
        except (urllib.error.URLError, TimeoutError, ConnectionError):
            time.sleep(0.3)
    raise TimeoutError(f"the Space did not answer: {log.read_text(errors='replace')[-3000:]}")
