"""Files that may not be read, for whoever runs the tests: the superuser is one of many for a while."""

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

__all__ = ["without_permission"]

VERSION = 0x20080522  # of the capabilities that Linux keeps for each thread
OVERRIDING = (1 << 1) | (1 << 2)  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH: permissions do not count


@contextlib.contextmanager
def without_permission(path: Path, mode: int = 0) -> Iterator[None]:
    """Take permissions off a file or folder for a while, from this thread too if it is the superuser's."""
    before = path.stat().st_mode
    path.chmod(mode)
    try:
        with _as_one_of_many():
            yield
    finally:
        path.chmod(before)


@contextlib.contextmanager
def _as_one_of_many() -> Iterator[None]:
    if os.geteuid() != 0:
        yield
        return
    if not sys.platform.startswith("linux"):
        pytest.skip("the superuser reads everything here")
    system = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(VERSION, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable: the low half of each, then the high
    assert system.capget(header, sets) == 0
    had = sets[0]
    sets[0] = had & ~OVERRIDING
    assert system.capset(header, sets) == 0
    try:
        yield
    finally:
        sets[0] = had
        assert system.capset(header, sets) == 0
