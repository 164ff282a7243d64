"""Engine, sessions and the rules every table follows.

Timestamps are seconds since 1970 by the *database's* clock (`now()`), so that leases compare on one clock.
Reads run in autocommit; a write unit is one short transaction that takes SQLite's write lock at its start,
because a read that becomes a write fails at once there instead of waiting.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import GenericFunction

from app.security.principal import Principal

# First SQLite with the fix of the WAL-reset corruption bug (sqlite.org/wal.html#walresetbug).
WAL_FIXED = (3, 51, 3)
# In one statement: SQLite takes 32766 values in one, PostgreSQL twice as many.
_ROWS = 1000


class Base(orm.DeclarativeBase):
    metadata = sa.MetaData(
        naming_convention={
            "ix": "ix_%(column_0_N_label)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012
        dict[str, Any]: sa.JSON,
        list[Any]: sa.JSON,
        float: sa.Double,
        int: sa.BigInteger,  # byte counts and seeds pass 2**31
    }


class now(GenericFunction[float]):  # noqa: N801 - a SQL function
    """Seconds since 1970 by the database's clock, also inside a transaction."""

    type = sa.Double()
    inherit_cache = True
    name = "dram_now"


@compiles(now, "sqlite")
def _now_sqlite(element: now, compiler: Any, **options: Any) -> str:
    return "((julianday('now') - 2440587.5) * 86400.0)"


@compiles(now, "postgresql")
def _now_postgresql(element: now, compiler: Any, **options: Any) -> str:
    return "EXTRACT(EPOCH FROM clock_timestamp())::float8"


def read_clock(session: orm.Session) -> float:
    """Seconds since 1970 by the database's clock, now."""
    return session.execute(sa.select(now())).scalar_one()


class Database:
    """One engine. Make it after a fork, never before."""

    def __init__(self, url: str) -> None:
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)
        self.sqlite = url.startswith("sqlite")
        options: dict[str, Any] = {"pool_size": 10, "max_overflow": 30, "pool_timeout": 10}
        if not self.sqlite:  # a server that is away is told soon, not after the system's two minutes
            options |= {"pool_pre_ping": True, "connect_args": {"connect_timeout": 5}}
        self.engine = sa.create_engine(url, **options)
        # Its own pool: to change the mode of a connection for each read costs as much as a small read.
        self._reader = sa.create_engine(url, isolation_level="AUTOCOMMIT", **options)
        if self.sqlite:
            sa.event.listen(self.engine, "connect", _configure_sqlite)
            sa.event.listen(self._reader, "connect", _configure_sqlite)
            sa.event.listen(self.engine, "begin", _begin_sqlite)

    @contextmanager
    def reading(self) -> Iterator[orm.Session]:
        """A session for reads, without a transaction."""
        with orm.Session(self._reader, autoflush=False) as session:
            yield session

    @contextmanager
    def rows(self) -> Iterator[sa.Connection]:
        """A connection for reads of plain rows: half the price of a session, for what is asked most often."""
        with self._reader.connect() as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[orm.Session]:
        """One write unit: committed at the end, rolled back on an exception. Keep it short."""
        with orm.Session(self.engine, expire_on_commit=False) as session, session.begin():
            yield session

    def close(self) -> None:
        self.engine.dispose()
        self._reader.dispose()


Row = TypeVar("Row", bound=Base)


def owned(table: type[Row], principal: Principal, *, deleted: bool = False) -> sa.Select[Row]:
    """The only way to select a tenant's rows: those that were not deleted, or with `deleted` those too."""
    select = sa.select(table).where(table.tenant == principal.tenant)  # type: ignore[attr-defined]
    return select if deleted else select.where(*_kept(table))


def owned_rows(
    table: type[Base], *, only: tuple[str, ...] = (), without: tuple[str, ...] = ()
) -> sa.Select[Any]:
    """Like `owned`, as plain rows and made once: give `tenant` (and what you add) when executing."""
    columns = table.__table__.c
    chosen = [
        column for column in columns if column.name not in without and (not only or column.name in only)
    ]
    return sa.select(*chosen).where(columns.tenant == sa.bindparam("tenant"), *_kept(table))


def _kept(table: type[Base]) -> list[sa.ColumnElement[bool]]:
    """What keeps deleted rows out of sight, where a table has such."""
    columns = table.__table__.c
    return [columns.deleted_at.is_(None)] if "deleted_at" in columns else []


def _configure_sqlite(connection: sqlite3.Connection, record: Any) -> None:
    journal = "WAL" if sqlite3.sqlite_version_info >= WAL_FIXED else "TRUNCATE"
    connection.isolation_level = None  # the transaction starts in _begin_sqlite
    for pragma in ("busy_timeout=15000", f"journal_mode={journal}", "synchronous=FULL", "foreign_keys=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin_sqlite(connection: sa.Connection) -> None:
    connection.exec_driver_sql("BEGIN IMMEDIATE")


def upsert(
    session: orm.Session, table: type[Base], rows: list[dict[str, Any]], *, update: tuple[str, ...] = ()
) -> int:
    """Insert rows; where the primary key exists, set the `update` columns, or leave the old row if there are none.

    Returns how many rows were written.
    """
    if len(rows) > _ROWS:
        parts = (rows[start : start + _ROWS] for start in range(0, len(rows), _ROWS))
        return sum(upsert(session, table, part, update=update) for part in parts)
    if not rows:
        return 0
    insert = postgresql.insert if session.get_bind().dialect.name == "postgresql" else sqlite.insert
    statement = insert(table).values(rows)
    key = list(sa.inspect(table).primary_key)
    if update:
        statement = statement.on_conflict_do_update(
            index_elements=key, set_={name: statement.excluded[name] for name in update}
        )
    else:
        statement = statement.on_conflict_do_nothing(index_elements=key)
    return len(session.execute(statement.returning(*key)).all())  # drivers differ in what rowcount says
