"""From when and from which percent a job's end is reckoned; two columns go that nobody read.

Revision: 0008, after 0007
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


# Not in batches: SQLite would make the tables anew, and what refers to their rows would be deleted with them.
def upgrade() -> None:
    op.add_column("jobs", sa.Column("resumed_at", sa.Double(), nullable=True))
    op.add_column(
        "jobs", sa.Column("resumed_percent", sa.Double(), server_default=sa.text("0"), nullable=False)
    )
    op.drop_column("jobs", "cancel_requested")
    op.drop_column("shards", "started_at")


def downgrade() -> None:
    op.add_column("shards", sa.Column("started_at", sa.Double(), nullable=True))
    op.add_column(
        "jobs", sa.Column("cancel_requested", sa.Boolean(), server_default=sa.false(), nullable=False)
    )
    op.drop_column("jobs", "resumed_percent")
    op.drop_column("jobs", "resumed_at")
