"""A job in its own process, with limits: if it hangs, grows or crashes, nothing else is affected.

The process is started by multiprocessing's fork server, which has imported torch and transformers, so a job starts in a
fraction of a second. Messages are sent through a pipe as JSON, never as pickles.
"""

import gc
import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from multiprocessing.connection import Connection, wait
from multiprocessing.util import get_temp_dir
from pathlib import Path
from typing import Any

import psutil
from huggingface_hub import constants

from jobs.tasks import HAS_GPU, Task
from safety.limits import Limits
from safety.problems import Problem, stopped

__all__ = [
    "forget_owner",
    "gradio_folder",
    "is_own",
    "own_folder",
    "own_folders",
    "remove_own_folders",
    "remove_stale_folders",
    "run",
    "run_apart",
]

FOLDER = re.compile(r"depthscope-space-[a-z]+-(\d+)-\w+", re.ASCII)  # the purpose, and the process id
GRADIO_PLACE = "GRADIO_TEMP_DIR"
TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
PRELOADED = ("torch", "depthscope.analysis.analyze", "transformers.models.llama.modeling_llama", "gguf")
LARGEST_MESSAGE = 64 * 2**20
LOOK_SECONDS = 0.2  # between two checks of time and memory
TELL_SECONDS = 0.5  # between two messages about progress
# The signals that end a process without memory: the system kills it, or a library aborts it.
WITHOUT_MEMORY = (-signal.SIGKILL, -signal.SIGABRT)
NICENESS = 5  # the pages are answered first
Apart = Callable[[Path, Limits, Callable[[dict[str, Any]], None]], None]
# The processor's own memory for a process's data, such as a model's weights; CUDA reserves far more than it takes.
GUARDED_BY_KERNEL = not HAS_GPU


def run(task: Task, limits: Limits, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Run an analysis and yield its messages (see `worker`); the last one is "done". Otherwise like `run_apart`."""
    from jobs.worker import work

    return run_apart(partial(work, task), limits, stop)


def run_apart(job: Apart, limits: Limits, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Run a job in its own process, with its own folder and limits, and yield its messages.

    In every case, also if the iterator is closed early, the process is ended and its files are removed.

    Raises:
        Problem: the job failed, was stopped, took too much time or memory, or crashed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    folder = own_folder("job")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(sending, job, str(folder), limits), daemon=True)
    try:
        process.start()
        sending.close()
        yield from _messages(process, receiving, limits, stop)
    finally:
        if process.pid is not None:
            process.kill()
            process.join()
        receiving.close()
        shutil.rmtree(folder, ignore_errors=True)


def own_folder(purpose: str) -> Path:
    """Make an empty folder for temporary files of this process."""
    return Path(tempfile.mkdtemp(prefix=_prefix(purpose)))


def own_folders(purpose: str) -> list[Path]:
    """The existing folders that this process has created for a purpose."""
    return list(Path(tempfile.gettempdir()).glob(f"{_prefix(purpose)}*"))


def _prefix(purpose: str) -> str:
    return f"depthscope-space-{purpose}-{os.getpid()}-"


def gradio_folder() -> Path:
    """Create an empty folder for Gradio's uploads and downloads, in GRADIO_TEMP_DIR if it is set."""
    place = os.environ.get(GRADIO_PLACE)
    if place:
        Path(place).mkdir(parents=True, exist_ok=True)
    return Path(tempfile.mkdtemp(prefix=_prefix("gradio"), dir=place)).resolve()


def is_own(folder: Path) -> bool:
    """Whether this process has created the folder, so that no other process writes there."""
    return _maker(folder) == os.getpid()


def remove_own_folders() -> None:
    """Remove every folder that this process has created; called at its end."""
    own = Path(os.environ.get(GRADIO_PLACE, ""))
    for folder in (own, *Path(tempfile.gettempdir()).iterdir()):
        if is_own(folder):
            shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(get_temp_dir(), ignore_errors=True)  # the fork server's socket


def remove_stale_folders() -> None:
    """Remove the folders of an earlier run that was killed; called before this process creates any."""
    for place in {tempfile.gettempdir(), os.environ.get(GRADIO_PLACE) or tempfile.gettempdir()}:
        for folder in Path(place).iterdir() if Path(place).is_dir() else ():
            maker = _maker(folder)
            if maker is not None and (maker == os.getpid() or not psutil.pid_exists(maker)):
                shutil.rmtree(folder, ignore_errors=True)


def _maker(folder: Path) -> int | None:
    """The process that created a folder, from the folder's name."""
    match = FOLDER.fullmatch(folder.name)
    return None if match is None else int(match[1])


def forget_owner() -> None:
    """Remove the token of the Space's owner from the environment, so that a job reads only public repositories."""
    for name in TOKENS:
        os.environ.pop(name, None)
    constants.HF_HUB_DISABLE_IMPLICIT_TOKEN = True
    constants.HF_TOKEN_PATH = os.devnull


def _messages(process: Any, receiving: Connection, limits: Limits, stop: threading.Event) -> Iterator[dict[str, Any]]:
    end = time.monotonic() + limits.max_job_seconds
    stage = "starting"
    while True:
        if stop.is_set():
            raise stopped()
        if time.monotonic() > end:
            raise Problem(
                "timed_out",
                f"The analysis took longer than {limits.max_job_seconds} seconds, the limit of this Space (stage: "
                f"{stage}). Choose fewer scores or tokens, or run it on your own machine: pip install "
                "depthscope.",
            )
        if _private_bytes(process.pid) > limits.max_job_bytes:
            raise Problem("out_of_memory", _grown(limits, stage))
        if not receiving.poll(LOOK_SECONDS):
            continue
        try:
            message = json.loads(receiving.recv_bytes(LARGEST_MESSAGE))
        except (EOFError, OSError):
            raise _ended(process, limits, stage) from None
        if message["event"] == "failed":
            raise Problem(message["kind"], message["message"])
        stage = message.get("stage", stage)
        yield message
        if message["event"] == "done":
            return


def _grown(limits: Limits, stage: str) -> str:
    return (
        f"The analysis needs more memory than {limits.max_job_bytes / 2**30:.3g} GiB, the limit of this Space (stage: "
        f"{stage}). Choose fewer tokens or a smaller model, or run it on your own machine: pip install depthscope."
    )


def _ended(process: Any, limits: Limits, stage: str) -> Problem:
    process.join(5)
    if process.exitcode in WITHOUT_MEMORY:
        return Problem("out_of_memory", _grown(limits, stage))
    return Problem(
        "crashed",
        f"The analysis ended unexpectedly (stage: {stage}). The cause is in the log of this Space.",
    )


def _private_bytes(pid: int) -> int:
    """The private memory of a process: without files and memory shared with the fork server."""
    try:
        memory = psutil.Process(pid).memory_info()
    except psutil.NoSuchProcess:
        return 0
    return memory.rss - getattr(memory, "shared", 0)


def _child(sending: Connection, job: Apart, folder: str, limits: Limits) -> None:
    os.nice(NICENESS)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is sent to every process; the Space ends this one
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    forget_owner()
    _limit_resources(limits)
    gc.freeze()  # garbage collections need not look at what was imported
    import torch

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // limits.max_jobs))
    last = 0.0

    def emit(message: dict[str, Any]) -> None:
        nonlocal last
        now = time.monotonic()
        if message["event"] == "stage" and message["share"] > 0 and now - last < TELL_SECONDS:
            return
        last = now
        sending.send_bytes(json.dumps(message).encode())

    job(Path(folder), limits, emit)


def _end_with_parent(folder: str) -> None:
    """End this process when the Space that reads its messages has ended, also if it was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        wait([parent.sentinel])
        shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)


def _limit_resources(limits: Limits) -> None:
    """Set the kernel's limits to what an honest job needs."""
    wanted = {resource.RLIMIT_CORE: 0, resource.RLIMIT_FSIZE: max(limits.max_unpacked_bytes, limits.max_download_bytes)}
    if GUARDED_BY_KERNEL:
        wanted[resource.RLIMIT_DATA] = limits.max_job_bytes
    for kind, most in wanted.items():
        hard = resource.getrlimit(kind)[1]
        most = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(kind, (most, most))
