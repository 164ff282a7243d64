"""Migrations when several processes start at once, and when one of them dies."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import sqlalchemy as sa

from app import ids, migrate
from app.db import Database

if TYPE_CHECKING:
    from tests.conftest import Postgres


@pytest.fixture(params=["sqlite", "postgresql"])
def empty_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """A database without any table."""
    if request.param == "sqlite":
        yield f"sqlite:///{tmp_path / 'dram.db'}"
        return
    server: Postgres = request.getfixturevalue("postgres")
    name = ids.new("empty")
    yield server.create(name)
    server.drop(name)


@pytest.fixture
def empty(empty_url: str) -> Iterator[Database]:
    database = Database(empty_url)
    yield database
    database.close()


def command(url: str, home: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "DRAM_DATABASE_URL": url, "DRAM_HOME": str(home), "DRAM_LOG_JSON": "true"}
    return subprocess.Popen(
        [sys.executable, "-m", "app.migrate"], env=environment, stderr=subprocess.PIPE, text=True
    )


def revision(database: Database) -> str | None:
    with database.engine.connect() as connection:
        return migrate.revision(connection)


def test_processes_that_start_at_once_migrate_once(empty_url: str, empty: Database, tmp_path: Path) -> None:
    processes = [command(empty_url, tmp_path) for _ in range(4)]
    logs = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, logs
    assert sum('"event": "migrated"' in log for log in logs) == 1
    assert revision(empty) == migrate.head()


def test_a_schema_at_head_is_left_alone_without_any_lock(empty: Database) -> None:
    assert migrate.to_head(empty) is True
    with migrate._alone(empty, 1):  # another process holds the lock
        started = time.monotonic()
        assert migrate.to_head(empty, wait_s=30) is False
        assert time.monotonic() - started < 5


def test_waiting_for_another_process_has_an_end(empty: Database, empty_url: str) -> None:
    other = Database(empty_url)
    with migrate._alone(other, 1), pytest.raises(migrate.MigrationError, match="Another process"):
        migrate.to_head(empty, wait_s=0.5)
    other.close()
    assert migrate.to_head(empty) is True


def test_who_waited_finds_the_work_done(empty: Database, empty_url: str) -> None:
    others = [Database(empty_url) for _ in range(3)]
    with ThreadPoolExecutor(3) as threads:
        assert sorted(threads.map(migrate.to_head, others)) == [False, False, True]
    for other in others:
        other.close()


def test_a_migration_that_fails_leaves_nothing_half_made(empty: Database) -> None:
    with empty.engine.begin() as connection:
        connection.execute(sa.text("CREATE TABLE students (in_the_way INTEGER)"))
    with pytest.raises(sa.exc.DBAPIError, match="students"):
        migrate.to_head(empty)
    with empty.engine.begin() as connection:
        assert "jobs" not in sa.inspect(connection).get_table_names()
        connection.execute(sa.text("DROP TABLE students"))
    assert migrate.to_head(empty) is True


def test_a_newer_schema_is_refused_in_words(empty: Database) -> None:
    migrate.to_head(empty)
    with empty.engine.begin() as connection:
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(migrate.MigrationError, match=r"9999.*newer version"):
        migrate.to_head(empty)


@pytest.mark.parametrize("empty_url", ["sqlite"], indirect=True)
def test_the_lock_of_a_dead_process_is_free(empty: Database, tmp_path: Path) -> None:
    program = f"import fcntl, time; f = open({str(tmp_path / 'dram.db.migrating')!r}, 'w'); fcntl.flock(f, 2); print()"
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{program}\nimport sys; sys.stdout.flush(); time.sleep(600)"],
        stdout=subprocess.PIPE,
    )
    assert holder.stdout is not None
    holder.stdout.readline()
    with (tmp_path / "dram.db.migrating").open("w") as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    threading.Timer(0.5, holder.kill).start()
    assert migrate.to_head(empty, wait_s=30) is True
    holder.wait()


def test_the_command_says_why_it_cannot(tmp_path: Path) -> None:
    failed = command(f"postgresql://nobody@/none?host={tmp_path}", tmp_path)
    log = failed.communicate(timeout=60)[1]
    assert failed.returncode == 1
    assert '"event": "migration_failed"' in log
