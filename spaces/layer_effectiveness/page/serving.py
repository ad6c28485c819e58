"""The process of the Space: at its end it frees its port, ends its processes and removes its files."""

import os
import signal
import sys
import threading
import time
from typing import Any, NoReturn

import gradio as gr
import psutil

from jobs.processes import remove_own_folders
from jobs.service import Service

__all__ = ["serve"]

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # Ctrl-C; systemd and docker stop; a closed terminal
CLOSING_SECONDS = 2.0  # for jobs to end, and for visitors who still read an answer


class _EndSignal(BaseException):
    """A signal that ends the Space; no `except Exception` of a library catches it."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number


def serve(page: gr.Blocks, service: Service, options: dict[str, Any]) -> NoReturn:
    """Serve a page until a signal arrives, and then end with that signal."""

    def tell(number: int, frame: Any) -> NoReturn:
        raise _EndSignal(number)

    for number in ENDING:
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores this signal on purpose
            signal.signal(number, tell)
    try:
        page.launch(prevent_thread_lock=True, **options)
        while True:
            signal.pause()
    except _EndSignal as signalled:
        for number in ENDING:  # a second one ends it at once
            signal.signal(number, signal.SIG_DFL)
        print("The page is no longer served.", file=sys.stderr, flush=True)
        _close(page, service)
        _end_by(signalled.number)


def _close(page: gr.Blocks, service: Service) -> None:
    """Free the port, end the jobs' processes and remove every file."""
    works = (lambda: page.close(verbose=False), service.close)
    threads = [threading.Thread(target=work, daemon=True) for work in works]
    end = time.monotonic() + CLOSING_SECONDS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, end - time.monotonic()))
    for process in psutil.Process().children(recursive=True):  # such as a fork server that still imports
        process.kill()
    remove_own_folders()


def _end_by(number: int) -> NoReturn:
    """End by the signal itself, without waiting for threads that still read from the Hub."""
    sys.stdout.flush()
    os.kill(os.getpid(), number)
    os._exit(128 + number)  # the first process of a container is not ended by its own signal
