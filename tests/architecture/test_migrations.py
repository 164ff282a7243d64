"""The migrations make exactly the tables that the code declares, on both databases."""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext

from app import migrate
from app.datasets.tables import Dataset, DatasetImage
from app.db import Database
from app.tables import Base


def test_the_migrated_schema_is_that_of_the_tables(database: Database) -> None:
    """Where this fails: `alembic revision --autogenerate -m "what changes"`, then read what it wrote."""
    with database.engine.connect() as connection:
        options = {"compare_type": True, "compare_server_default": True}
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Base.metadata) == []


def test_a_forgotten_column_would_be_seen(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(sa.text("ALTER TABLE jobs DROP COLUMN percent"))
    with database.engine.connect() as connection:
        found = compare_metadata(MigrationContext.configure(connection), Base.metadata)
    assert [change[0] for change in found] == ["add_column"]


def test_the_migrations_can_be_taken_back(database: Database) -> None:
    take_back(database, "base")
    with database.engine.connect() as connection:
        assert set(sa.inspect(connection).get_table_names()) == {"alembic_version"}
    assert migrate.to_head(database)


def test_taking_a_column_back_loses_no_row(database: Database) -> None:
    """SQLite deletes what refers to a table's rows when it makes the table anew without the column."""
    with database.writing() as session:
        session.add(data_set())
        session.flush()
        session.add(
            DatasetImage(
                id="img_1", dataset_id="ds_1", split="support", file="0.png", name="0.png", width=1, height=1
            )
        )
    take_back(database, "0004")
    with database.engine.connect() as connection:
        rows = [
            connection.scalar(sa.text(f"SELECT count(*) FROM {table}"))
            for table in ("datasets", "dataset_images")
        ]
    assert rows == [1, 1]


def test_masks_are_not_forgotten_by_taking_their_column_back(database: Database) -> None:
    with database.writing() as session:
        session.add(data_set(task="segmentation"))
    with pytest.raises(RuntimeError, match=r"masks of data sets \(1\)"):
        take_back(database, "0004")
    with database.writing() as session:
        session.execute(sa.update(Dataset).values(deleted_at=1.0))
    take_back(database, "0004")


def data_set(**changes: Any) -> Dataset:
    return Dataset(
        id="ds_1",
        tenant="t",
        name="n",
        digest="d",
        classes=[],
        splits={},
        smallest_class=0,
        report={},
        **changes,
    )


def take_back(database: Database, revision: str) -> None:
    with database.engine.begin() as connection:
        config = migrate._config()
        config.attributes["connection"] = connection
        command.downgrade(config, revision)


def test_there_is_one_newest_revision() -> None:
    assert len(migrate._scripts().get_heads()) == 1
