"""Alembic's entry: on the connection that `app.migrate` gives, or on the database of the settings."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import context

from app.db import Database
from app.settings import Settings
from app.tables import Base


def run(connection: sa.Connection) -> None:
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=connection.dialect.name == "sqlite",
        compare_type=True,
        compare_server_default=True,
    )
    with context.begin_transaction():
        context.run_migrations()


given = context.config.attributes.get("connection")
if given is not None:
    run(given)
else:
    database = Database(Settings().database)
    with database.engine.begin() as own:
        run(own)
    database.close()
