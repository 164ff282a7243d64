"""Locks on folders, between threads, processes and containers that share a file system; a dead process holds none."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def holding(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Wait for the folder's lock and hold it. Those who hold it `shared` do not exclude each other."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH if shared else fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def take(folder: Path) -> int | None:
    """The folder's lock as a file descriptor, held until it is closed; None where somebody holds it."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        return None
    return handle
