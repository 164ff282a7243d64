"""The embedded service: the same parts as in production, on this machine, below one folder.

    python -m app.up        (what `dram up` becomes)

SQLite, a blob folder, a redis-server on a private socket, the gateway, a worker and the maintenance loop run as
supervised children. Ctrl-C or SIGTERM stops them all; what was unfinished goes on at the next start.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from types import FrameType

import httpx
import sqlalchemy as sa

from app import migrate, observability, redis_server
from app.home import AlreadyRunning, Home
from app.keys import service as keys
from app.redis_server import RedisMissingError
from app.settings import Settings
from app.supervisor import Program, Supervisor
from app.wiring import Wiring

_ROUND_S = 0.2
_REDIS_START_S = 30.0
#: After this the service is announced although a part is missing; the supervisor goes on trying.
_READY_S = 90.0


class UpError(Exception):
    """The service cannot start here; the message says why and what to do."""


class Signals:
    """Remembers that somebody asked this process to stop."""

    def __init__(self) -> None:
        self.stop = False
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._asked)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        self.stop = True


def main() -> int:
    settings = Settings()
    observability.configure(settings.log_level, settings.log_json)
    try:
        run(settings, Signals())
    except (UpError, AlreadyRunning, RedisMissingError, migrate.MigrationError) as error:
        _say(f"dram up: {error}.")
        return 1
    except (OSError, sa.exc.OperationalError) as error:
        _say(f"dram up: cannot start below '{settings.home}': {error}")
        return 1
    return 0


def run(settings: Settings, signals: Signals) -> None:
    """Serve until told to stop. Raises UpError, AlreadyRunning, RedisMissingError, MigrationError."""
    home = Home(settings.home)
    with home.claimed() as claim, _listening(settings.host, settings.port) as listener:
        service = _Service(settings, home, listener)
        try:
            new_key = service.prepare()
            service.start(signals)
            if signals.stop:
                return
            claim.announce(service.url)
            service.introduce(new_key)
            while not signals.stop:
                service.supervisor.tend()
                time.sleep(_ROUND_S)
            _say("Stopping …")
        finally:
            service.supervisor.stop()
        _say("Stopped. Unfinished jobs go on at the next start.")


@dataclass
class _Service:
    settings: Settings
    home: Home
    listener: socket.socket

    def __post_init__(self) -> None:
        self.socket = redis_server.socket_path(self.home.folder)
        self.own_redis = not self.settings.redis_url
        redis_url = redis_server.url(self.socket) if self.own_redis else self.settings.redis_url
        self.settings = self.settings.model_copy(update={"home": self.home.folder, "redis_url": redis_url})
        self.url = _url(self.settings.host, self.listener.getsockname()[1])
        environment = {
            **os.environ,
            "DRAM_HOME": str(self.home.folder),
            "DRAM_REDIS_URL": redis_url,
            "PYTHONUNBUFFERED": "1",
        }
        self.supervisor = Supervisor(self.home.logs, environment, _say)

    def prepare(self) -> str | None:
        """Migrate, and make the first API key. Returns the key where it was made just now."""
        wiring = Wiring.build(self.settings)
        try:
            migrate.to_head(wiring.database)
            token = keys.ensure_first_key(wiring)
        finally:
            wiring.close()
        if token is not None:
            self.home.keep_key(token)
        return token

    def start(self, signals: Signals) -> None:
        """Start every part and wait until the service is ready."""
        if self.own_redis:
            server = redis_server.find()
            program = redis_server.program(server, self.home.folder / "redis", self.socket)
            self.supervisor.start(program)
            self._await_redis(program, signals)
        for part in self._programs():
            self.supervisor.start(part)
        missing = self._await_ready(signals)
        if missing:
            _say(f"Not ready yet: {missing} The parts are restarted as needed; see {self.home.logs}.")

    def introduce(self, new_key: str | None) -> None:
        """Say where the service is and how to use it."""
        if new_key is not None:
            key = f"{new_key}\n              (shown this once, kept in {self.home.key_file})"
        elif self.home.key() is not None:
            key = f"kept in {self.home.key_file}"
        else:
            key = "made elsewhere; give it to the command line as DRAM_API_KEY"
        docs = f"\n    docs      {self.url}/docs" if self.settings.docs else ""
        print(
            f"""
Dram is up.
    url       {self.url}{docs}
    API key   {key}
    logs      {self.home.logs}

    dram distill FOLDER --out student.onnx     one folder of images for each class
    dram teachers                              what can teach
Ctrl-C stops it.""",
            flush=True,
        )

    def _programs(self) -> list[Program]:
        """The parts in the order in which they start."""
        python = sys.executable
        gateway = [
            *(python, "-m", "uvicorn", "app.main:from_environment", "--factory"),
            *(
                "--fd",
                str(self.listener.fileno()),
            ),  # the socket stays ours: no request is refused in a restart
            *("--no-access-log", "--no-server-header", "--timeout-graceful-shutdown", "3"),
        ]
        worker = [
            *(python, "-m", "celery", "-A", "workers.celery_app", "worker", "-P", "prefork", "-c", "1"),
            *("-Q", "gpu,cpu", "--without-gossip", "--without-mingle", "--loglevel", "INFO"),
        ]
        return [
            Program("gateway", gateway, pass_fds=(self.listener.fileno(),)),
            Program("worker", worker, grace_s=15),
            Program("maintenance", [python, "-m", "workers.maintenance"]),
        ]

    def _await_redis(self, program: Program, signals: Signals) -> None:
        until = time.monotonic() + _REDIS_START_S
        while not redis_server.answers(self.socket) and not signals.stop:
            self.supervisor.tend()
            if time.monotonic() > until:
                raise UpError(
                    f"redis-server does not answer; its log is {self.supervisor.log_of(program)}. It holds nothing "
                    f"that cannot be made again: '{self.home.folder / 'redis'}' may be removed"
                )
            time.sleep(0.05)

    def _await_ready(self, signals: Signals) -> str:
        """Wait until the gateway says that all is well. Returns what is missing when patience ends."""
        until = time.monotonic() + _READY_S
        missing = "the gateway does not answer."
        while not signals.stop and time.monotonic() < until:
            self.supervisor.tend()
            try:
                answer = httpx.get(f"{self.url}/readyz", timeout=5, trust_env=False)
                if answer.is_success:
                    return ""
                checks = answer.json()["checks"]
                missing = " ".join(
                    f"{name}: {check['reason']}" for name, check in checks.items() if not check["ok"]
                )
            except (httpx.TransportError, ValueError, KeyError):
                pass
            time.sleep(_ROUND_S)
        return missing


@contextmanager
def _listening(host: str, port: int) -> Iterator[socket.socket]:
    """The gateway's socket, made here so that a port in use is found before anything starts."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        named = error.errno is not None and error.errno > 0  # a name that does not resolve has a negative one
        reason = os.strerror(error.errno or 0) if named else str(error.strerror)
        raise UpError(
            f"cannot listen on {host}:{port} ({reason.lower()}). Choose another port with --port; 0 takes any free one"
        ) from error
    with listener:
        yield listener


def _url(host: str, port: int) -> str:
    """Where a client on this machine reaches the service."""
    local = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{local}]:{port}" if ":" in local else f"http://{local}:{port}"


def _say(text: str) -> None:
    with suppress(OSError):  # who started us may no longer listen
        print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
