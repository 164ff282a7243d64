"""An embedded service for the duration of one command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from app.home import Home
from app.processes import dying_with

#: The first start on a slow machine migrates, compiles Python files and loads the worker.
_START_S = 180.0
_STOP_S = 60.0


class EmbeddedError(Exception):
    """The service did not come up; the message says what it said."""


@contextmanager
def serving(home: Home) -> Iterator[str]:
    """The address of a service in `home` that lives as long as this block. Raises EmbeddedError."""
    home.logs.mkdir(parents=True, exist_ok=True)
    log = home.logs / "up.log"
    with log.open("ab") as words:
        start = words.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "app.up"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,  # it prints the first key
            stderr=words,
            env={**os.environ, "DRAM_HOME": str(home.folder), "DRAM_PORT": "0", "DRAM_HOST": "127.0.0.1"},
            start_new_session=True,
            preexec_fn=dying_with(os.getpid()),
        )
    try:
        yield _address(home, process, log, start)
    finally:
        process.send_signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_S)
        process.kill()
        process.wait()


def _address(home: Home, process: subprocess.Popen[bytes], log: Path, start: int) -> str:
    until = time.monotonic() + _START_S
    while time.monotonic() < until:
        running = home.running()
        if running is not None and running.url and running.pid == process.pid:
            return running.url
        if process.poll() is not None:
            with log.open("rb") as words:
                words.seek(start)
                said = words.read().decode(errors="replace").strip().splitlines()
            raise EmbeddedError(said[-1] if said else f"the service ended at once; see {log}")
        time.sleep(0.1)
    raise EmbeddedError(f"the service did not come up within {_START_S:.0f} seconds; see {home.logs}")
