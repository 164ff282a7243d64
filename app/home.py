"""The folder of an embedded service: what lies where, whether a service runs in it, and its first API key."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

#: Readers hold the lock for a moment; a service that starts tries this often before it believes in another one.
_TRIES = 10
_PAUSE_S = 0.05


class AlreadyRunning(Exception):
    """Another service lives in this folder."""


@dataclass(frozen=True)
class Running:
    """The service that holds a home. `url` is empty until it takes requests."""

    pid: int
    url: str


class Home:
    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.key_file = self.folder / "key"
        self.logs = self.folder / "logs"
        self._lock = self.folder / "up.lock"

    def running(self) -> Running | None:
        """The service that runs here now; None where none does. A service that was killed holds no lock."""
        try:
            with self._lock.open() as file:
                try:
                    fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
                except BlockingIOError:
                    found = _read(file.read())
                    # Who just took the lock has not yet wiped out what one that was killed has left.
                    return found if _lives(found.pid) else Running(0, "")
        except FileNotFoundError:
            pass
        return None

    @contextmanager
    def claimed(self) -> Iterator[Claim]:
        """Hold the home for one service. Raises AlreadyRunning."""
        self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with self._lock.open("a+") as file:
            for _ in range(_TRIES):
                with suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(_PAUSE_S)
            else:
                file.seek(0)
                other = _read(file.read())
                where = f" at {other.url}" if other.url else ""
                raise AlreadyRunning(
                    f"a service runs on '{self.folder}' already{where} (process {other.pid}). "
                    "Use that one, stop it, or give another folder with --home"
                )
            claim = Claim(file.fileno())
            claim.announce("")
            yield claim
            claim.announce("")

    def key(self) -> str | None:
        """The API key that the service made for this folder, if it is here."""
        try:
            return self.key_file.read_text().strip() or None
        except FileNotFoundError:
            return None

    def keep_key(self, token: str) -> None:
        """Keep the key where only its owner can read it."""
        temporary = self.key_file.with_name("key.new")
        temporary.unlink(missing_ok=True)
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(token + "\n")
            file.flush()
            os.fsync(handle)
        temporary.replace(self.key_file)


class Claim:
    """The held lock file, in which the holder says where it can be reached."""

    def __init__(self, handle: int) -> None:
        self._handle = handle

    def announce(self, url: str) -> None:
        os.ftruncate(self._handle, 0)
        os.pwrite(self._handle, json.dumps({"pid": os.getpid(), "url": url}).encode(), 0)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except PermissionError:  # of another user
        return True
    except ProcessLookupError:
        return False
    return True


def _read(text: str) -> Running:
    try:
        document = json.loads(text)
        return Running(int(document["pid"]), str(document["url"]))
    except (ValueError, KeyError, TypeError):
        return Running(0, "")
