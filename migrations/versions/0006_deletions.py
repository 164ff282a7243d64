"""Jobs and students can be deleted. Taken back, those that were are seen again, without their files.

Revision: 0006, after 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0006'
down_revision = '0005'
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ('jobs', 'students'):
        with op.batch_alter_table(table, schema=None) as batch_op:
            batch_op.add_column(sa.Column('deleted_at', sa.Double(), nullable=True))


def downgrade() -> None:
    # Not in a batch: SQLite would make the tables anew, which rows that refer to their own forbid.
    op.drop_column('students', 'deleted_at')
    op.drop_column('jobs', 'deleted_at')
