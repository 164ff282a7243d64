"""Bring the database's schema to the newest revision; safe when several processes start at once.

    python -m app.migrate

Alembic itself takes no lock. Whoever finds the schema up to date goes on at once. Otherwise one process
migrates and the others wait for it, for a bounded time: on PostgreSQL behind a session-level advisory lock on a
connection of its own (not through a pooler in transaction mode), on SQLite behind a lock on a file beside the
database. Both locks end with the process that holds them.
"""

from __future__ import annotations

import fcntl
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import sqlalchemy as sa
import structlog
from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory

from app import observability
from app.db import Database
from app.settings import Settings

log = structlog.get_logger()

#: Any number, as long as every version of Dram uses the same.
_LOCK = 0x6472616D
_POLL_S = 0.2
WAIT_S = 120.0
SCRIPTS = Path(__file__).resolve().parent.parent / "migrations"


class MigrationError(Exception):
    """The schema could not be brought up to date; the message says what to do."""


@cache
def head() -> str:
    """The newest revision that this version of Dram knows."""
    return str(_scripts().get_current_head())


def revision(connection: sa.Connection) -> str | None:
    """The revision that the database is at; None where there is no schema yet."""
    return MigrationContext.configure(connection).get_current_revision()


def to_head(database: Database, wait_s: float = WAIT_S) -> bool:
    """Bring the schema to `head()`. False when it was there already. Raises `MigrationError`."""
    if _present(database) == head():
        return False
    with _alone(database, wait_s):
        present = _present(database)
        if present == head():  # another process was faster
            return False
        if present is not None and present not in {script.revision for script in _scripts().walk_revisions()}:
            raise MigrationError(
                f"The database is at revision {present}, which this version of Dram does not know: a newer version "
                "has been here. Start that version, or restore a backup from before it."
            )
        log.info("migrating", present=present, head=head())
        with database.engine.begin() as connection:
            config = _config()
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
        log.info("migrated", head=head())
    return True


def main() -> int:
    """The command: 0 when the schema is at head, 1 with a sentence when it cannot be brought there."""
    settings = Settings()
    observability.configure(settings.log_level, settings.log_json)
    settings.home.mkdir(parents=True, exist_ok=True)
    database = Database(settings.database)
    try:
        changed = to_head(database)
    except (MigrationError, sa.exc.OperationalError) as error:
        log.error("migration_failed", reason=str(error))
        return 1
    finally:
        database.close()
    log.info("schema_ready", changed=changed, revision=head())
    return 0


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    return config


@cache
def _scripts() -> ScriptDirectory:
    return ScriptDirectory.from_config(_config())


def _present(database: Database) -> str | None:
    with database.reading() as session:
        return revision(session.connection())


@contextmanager
def _alone(database: Database, wait_s: float) -> Iterator[None]:
    if not database.sqlite:
        with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            _wait(lambda: bool(connection.scalar(sa.select(sa.func.pg_try_advisory_lock(_LOCK)))), wait_s)
            try:
                yield
            finally:
                connection.execute(sa.select(sa.func.pg_advisory_unlock(_LOCK)))
        return
    path = database.engine.url.database
    if not path or path == ":memory:":
        yield
        return
    with Path(f"{path}.migrating").open("w") as file:
        _wait(lambda: _locked(file.fileno()), wait_s)
        yield  # closing the file, or dying, gives the lock back


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _wait(take: Callable[[], bool], wait_s: float) -> None:
    until = time.monotonic() + wait_s
    while not take():
        if time.monotonic() > until:
            raise MigrationError(
                f"Another process has been migrating this database for {wait_s:.0f} seconds. Look at its log; "
                "when it is gone, start this again."
            )
        time.sleep(_POLL_S)


if __name__ == "__main__":
    sys.exit(main())
