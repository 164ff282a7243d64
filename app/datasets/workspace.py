"""A temporary folder for one upload, on the volume of the service's home.

The folder is locked while its process lives, so that a starting gateway removes only what dead ones left.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy.exc

from app import locks
from app.errors import InsufficientStorage
from app.settings import Settings

_NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_HALF_MADE_S = 3600


class Workspace:
    """Made by `create`; `remove` is always called in the end."""

    def __init__(self, folder: Path, lock: int) -> None:
        self.folder = folder
        self._lock = lock

    @classmethod
    def create(cls, settings: Settings) -> Workspace:
        root = _root(settings)
        with no_room_is_507():
            root.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix="new-", dir=root))
            lock = locks.take(made)
            assert lock is not None, f"{made} is new, and yet somebody holds its lock"
            folder = made.rename(made.with_name("upload-" + made.name.removeprefix("new-")))
        return cls(folder, lock)

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)
        os.close(self._lock)


def clean(settings: Settings) -> int:
    """Remove what gateways left behind that were killed in an upload; return how many folders."""
    removed = 0
    for folder in _root(settings).glob("*-*"):
        if folder.name.startswith("upload-"):
            dead = _unlocked(folder)
        else:
            dead = folder.name.startswith("new-") and _age(folder) > _HALF_MADE_S
        if dead:
            shutil.rmtree(folder, ignore_errors=True)
            removed += 1
    return removed


def check_room(settings: Settings, needed: int) -> None:
    """Raise `InsufficientStorage` where `needed` bytes more would use the reserve."""
    root = _root(settings)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if free - needed < settings.disk_reserve_bytes:
        raise InsufficientStorage(
            f"Storing this takes up to {_mib(needed)} MiB, and the server has {_mib(free)} MiB free of which it "
            f"keeps {_mib(settings.disk_reserve_bytes)} MiB in reserve. Nothing was stored; try a smaller upload, "
            "or again when the operator has made room."
        )


@contextmanager
def no_room_is_507() -> Iterator[None]:
    """Turn "no space left" of the file system or of SQLite into `InsufficientStorage`."""
    try:
        yield
    except OSError as error:
        if error.errno not in _NO_ROOM:
            raise
        raise _full() from error
    except sqlalchemy.exc.OperationalError as error:
        if "disk is full" not in str(error.orig):
            raise
        raise _full() from error


def _full() -> InsufficientStorage:
    return InsufficientStorage(
        "The server's disk is full. Nothing was stored; try again when the operator has made room."
    )


def _root(settings: Settings) -> Path:
    return settings.home.absolute() / "tmp"


def _unlocked(folder: Path) -> bool:
    try:
        lock = locks.take(folder)
    except OSError:
        return False
    if lock is None:
        return False
    os.close(lock)
    return True


def _age(folder: Path) -> float:
    try:
        return time.time() - folder.stat().st_mtime
    except OSError:
        return 0


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f}"
