"""What jobs of tests do in their processes, each of which imports this file and need not import the tests' own."""

import os
import signal
import time


def sleep_for(seconds, folder, limits, emit):
    (folder / "file").write_bytes(bytes(1000))
    emit({"event": "stage", "stage": "sleeping", "share": 0.0})
    time.sleep(seconds)


def take(gigabytes, folder, limits, emit):
    taken = [bytearray(2**28) for _ in range(4 * gigabytes)]
    emit({"event": "done", "bytes": sum(map(len, taken))})


def crash(folder, limits, emit):
    raise ZeroDivisionError


def fault(folder, limits, emit):
    os.kill(os.getpid(), signal.SIGSEGV)


def write(mebibytes, folder, limits, emit):
    (folder / "file").write_bytes(bytes(mebibytes << 20))
    emit({"event": "done"})


def as_on_zero_gpu(task, folder, limits, emit):
    from jobs.zero_gpu import on_gpu

    for message in on_gpu(task, str(folder), limits):
        emit(message)


def as_stopped_on_zero_gpu(task, folder, limits, emit):
    from jobs.zero_gpu import STOP

    (folder / STOP).touch()
    as_on_zero_gpu(task, folder, limits, emit)
