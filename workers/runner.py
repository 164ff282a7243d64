"""Parent side of the compute process: start it, give it a claim, hear its messages, kill its process group.

The child (`workers.compute`) is the only one that imports torch. It stays warm between shards, so that a teacher
is loaded once; it dies with its parent, and its memory and GPU really return when it is killed.
"""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any

from app.jobs.claims import Claim
from app.processes import dying_with
from app.settings import HANDED_ON, Settings

CHILD = (sys.executable, "-m", "workers.compute")
#: The child is given the headers that its claim needs, and not what would open all others.
_KEPT_BACK = ("DRAM_SECRET_KEY", "DRAM_DATABASE_URL")


@dataclass(frozen=True)
class Moved:
    """Progress of the stage."""

    step: int
    total: int
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Kept:
    """A checkpoint has been stored."""

    step: int
    files: dict[str, str]


@dataclass(frozen=True)
class Asked:
    """A call of the stage's ledger (`workers.answering`), which waits for the reply."""

    call: str
    arguments: dict[str, Any]


@dataclass(frozen=True)
class Done:
    """The output has been stored. `facts`: about the student, where this was the bundle."""

    files: dict[str, str]
    bytes: int
    facts: dict[str, Any] | None


@dataclass(frozen=True)
class Failed:
    code: str
    detail: str
    hint: str
    retryable: bool
    after_s: float = 0.0


@dataclass(frozen=True)
class Died:
    """The process ended without a word: its exit status, negative for a signal."""

    status: int


Message = Moved | Kept | Asked | Done | Failed | Died
_KINDS: dict[str, type[Moved | Kept | Asked | Done | Failed]] = {
    "moved": Moved,
    "kept": Kept,
    "ask": Asked,
    "done": Done,
    "failed": Failed,
}


class ComputeProcess:
    """One child, started when first needed."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._process: subprocess.Popen[bytes] | None = None
        self._pending = b""

    def start(self, claim: Claim, headers: Mapping[str, str] | None = None) -> None:
        """Hand a claim to the child, with the headers that its teacher wants: they are secret."""
        if self._process is None or self._process.poll() is not None:
            self.kill()
            self._process = subprocess.Popen(
                CHILD,
                env=_environment(self._settings),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                start_new_session=True,
                preexec_fn=dying_with(os.getpid()),
            )
        self._say({**asdict(claim), "headers": dict(headers or {})})

    def reply(self, document: Mapping[str, Any]) -> None:
        """Answer what the child has asked."""
        self._say(document)

    def message(self, timeout: float) -> Message | None:
        """The child's next message, or None after `timeout` seconds."""
        assert self._process is not None
        assert self._process.stdout is not None
        if b"\n" not in self._pending:
            ended = self._process.poll() is not None  # asked first: what it said is then in the pipe already
            readable, _, _ = select.select([self._process.stdout], [], [], timeout)
            if not readable:  # after its end the pipe stays open while a process that it started holds it
                return self._died() if ended else None
            chunk = os.read(self._process.stdout.fileno(), 1 << 16)
            if not chunk:
                return self._died()
            self._pending += chunk
            if b"\n" not in self._pending:
                return None
        line, self._pending = self._pending.split(b"\n", 1)
        document = json.loads(line)
        return _KINDS[document.pop("kind")](**document)

    def kill(self) -> None:
        """End the child and everything it started."""
        if self._process is None:
            return
        with suppress(ProcessLookupError):  # it ended by itself
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):  # a claim that it did not read any more
                    pipe.close()
        self._process, self._pending = None, b""

    def _say(self, document: Mapping[str, Any]) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(document).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return  # it died just now: `message` says so

    def _died(self) -> Died:
        """At once with all that it started, whose memory and GPU the next attempt needs."""
        assert self._process is not None
        status = self._process.wait()
        self.kill()
        return Died(status)


def _environment(settings: Settings) -> dict[str, str]:
    """Of the child: this process's, with its settings and without what it has no use for."""
    kept = {name: value for name, value in os.environ.items() if name.upper() not in _KEPT_BACK}
    return {**kept, HANDED_ON: settings.model_dump_json(exclude={"database_url"})}
