"""Generators of images: which one a job reads, and which a worker can load.

Revision: 0004, after 0003
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0004'
down_revision = '0003'
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table('jobs', schema=None) as batch_op:
        batch_op.add_column(sa.Column('generator', sa.String(), nullable=True))

    with op.batch_alter_table('workers', schema=None) as batch_op:
        batch_op.add_column(sa.Column('generators', sa.JSON(none_as_null=True), nullable=True))


def downgrade() -> None:
    # Not in a batch: SQLite would make the tables anew, which rows that refer to theirs forbid.
    op.drop_column('workers', 'generators')
    op.drop_column('jobs', 'generator')
