"""The Space as a visitor meets it: its own process on the loopback interface, with a Hub of our own behind it."""

import os
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

SPACE = Path(__file__).parents[2] / "spaces" / "layer_effectiveness"
STARTING_SECONDS = 300


@dataclass(frozen=True)
class Served:
    """Where the Space answers, where it keeps files, and its process."""

    url: str
    folder: Path
    log: Path
    pid: int

    def leftovers(self) -> list[Path]:
        """Folders of jobs and uploads that have not been removed."""
        return [
            path
            for path in self.folder.iterdir()
            if path.name.startswith(("depthscope-space-job", "depthscope-space-up"))
        ]


@contextmanager
def serving(folder: Path, settings: Mapping[str, str] | None = None) -> Iterator[Served]:
    """Run `app.py`, with all its temporary files in `folder`."""
    port = _free_port()
    temporary = Path(tempfile.mkdtemp(prefix="t", dir="/tmp"))  # a short path: sockets lie in it
    environment = {
        **os.environ,
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_SERVER_NAME": "127.0.0.1",
        "GRADIO_ANALYTICS_ENABLED": "False",
        "GRADIO_TEMP_DIR": str(temporary / "gradio"),
        "TMPDIR": str(temporary),
        "OMP_NUM_THREADS": "1",
        **(settings or {}),
    }
    log = folder / "space.log"
    with log.open("wb") as file:
        process = subprocess.Popen([sys.executable, "app.py"], cwd=SPACE, env=environment, stdout=file, stderr=file)
    try:
        _wait(f"http://127.0.0.1:{port}/", process, log)
        yield Served(f"http://127.0.0.1:{port}", temporary, log, process.pid)
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _free_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def _wait(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
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
