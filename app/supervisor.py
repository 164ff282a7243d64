"""Child processes that are started, watched, restarted with growing pauses, and never left behind.

Each child leads a process group of its own, so a Ctrl-C in the terminal reaches the supervisor only, which
then stops the children in order. If the supervisor itself is killed, the kernel kills the children
(PR_SET_PDEATHSIG, Linux).
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from app.processes import dying_with

_PR_SET_CHILD_SUBREAPER = 36
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 30.0
#: A child that ran for so long was well: its next restart is quick again.
_WELL_AFTER_S = 30.0
_LARGEST_LOG = 20 * 2**20


@dataclass(frozen=True)
class Program:
    """A child to keep running. `grace_s`: time to end by itself after SIGTERM, before it is killed."""

    name: str
    command: Sequence[str]
    grace_s: float = 10.0
    pass_fds: tuple[int, ...] = ()


@dataclass
class _Child:
    program: Program
    process: subprocess.Popen[bytes]
    started: float
    failures: int = 0
    restart_at: float | None = field(default=None)


class Supervisor:
    """Use it from one thread, the one that lives longest: a child dies with the *thread* that started it."""

    def __init__(self, logs: Path, environment: Mapping[str, str], say: Callable[[str], None]) -> None:
        self._logs = logs
        self._environment = dict(environment)
        self._say = say
        self._children: list[_Child] = []
        logs.mkdir(parents=True, exist_ok=True)
        if _LIBC is not None:
            _LIBC.prctl(
                _PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0
            )  # grandchildren that lose their parent become ours

    def start(self, program: Program) -> None:
        """Start a child and keep it running from now on."""
        process = self._spawn(program)
        self._children.append(_Child(program, process, time.monotonic()))

    def tend(self) -> None:
        """One round: reap what has ended, restart what is due. Call it several times a second."""
        now = time.monotonic()
        for child in self._children:
            if child.restart_at is not None:
                if now >= child.restart_at:
                    child.process, child.started, child.restart_at = self._spawn(child.program), now, None
            elif (status := child.process.poll()) is not None:
                _kill_group(child.process.pid, signal.SIGKILL)
                child.failures = 1 if now - child.started > _WELL_AFTER_S else child.failures + 1
                pause = min(_LONGEST_PAUSE_S, _FIRST_PAUSE_S * 2.0 ** (child.failures - 1))
                child.restart_at = now + pause
                self._say(
                    f"{child.program.name} {_ending(status)}; it starts again in {pause:g} s "
                    f"(see {self.log_of(child.program)})"
                )
        self._reap_orphans()

    def log_of(self, program: Program) -> Path:
        return self._logs / f"{program.name}.log"

    def stop(self) -> None:
        """End the children, the last started first; each gets its grace, then it is killed with its group."""
        while self._children:
            child = self._children.pop()
            if child.restart_at is None:
                _kill_group(child.process.pid, signal.SIGTERM)
                with suppress(subprocess.TimeoutExpired):
                    child.process.wait(child.program.grace_s)
            _kill_group(child.process.pid, signal.SIGKILL)
            child.process.wait()
        self._kill_orphans()

    def _spawn(self, program: Program) -> subprocess.Popen[bytes]:
        path = self.log_of(program)
        with suppress(FileNotFoundError):
            if path.stat().st_size > _LARGEST_LOG:
                path.replace(path.with_suffix(".log.1"))
        with path.open("ab") as log:
            return subprocess.Popen(
                program.command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self._environment,
                pass_fds=program.pass_fds,
                start_new_session=True,
                preexec_fn=dying_with(os.getpid()),
            )

    def _reap_orphans(self) -> None:
        """Collect grandchildren that were handed to us and have ended."""
        known = {child.process.pid for child in self._children}
        for pid in _own_children() - known:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def _kill_orphans(self) -> None:
        """Kill what the children left behind; killing one may hand us the next."""
        while pids := _own_children():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                with suppress(ChildProcessError):
                    os.waitpid(pid, 0)


def _own_children() -> set[int]:
    """Processes whose parent we are, by /proc; empty where the kernel does not tell."""
    try:
        text = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    except OSError:
        return set()
    return {int(pid) for pid in text.split()}


def _kill_group(pid: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _ending(status: int) -> str:
    if status >= 0:
        return f"ended with status {status}"
    try:
        return f"was ended by {signal.Signals(-status).name}"
    except ValueError:
        return f"was ended by signal {-status}"
