"""Data sets of images with masks: what a data set is for, and where an image's mask lies.

Revision: 0005, after 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0005'
down_revision = '0004'
branch_labels = None
depends_on = None


def upgrade() -> None:
    with op.batch_alter_table('datasets', schema=None) as batch_op:
        batch_op.add_column(sa.Column('task', sa.String(), server_default='classification', nullable=False))

    with op.batch_alter_table('dataset_images', schema=None) as batch_op:
        batch_op.add_column(sa.Column('mask', sa.String(), nullable=True))


def downgrade() -> None:
    held = op.get_bind().scalar(sa.text(
        "SELECT count(*) FROM datasets WHERE task = 'segmentation' AND deleted_at IS NULL"
    ))
    if held:
        raise RuntimeError(
            f'Revision 0004 would forget the masks of data sets ({held}). Delete these first '
            '(DELETE /v1/datasets/ID), or keep this revision.'
        )
    # Not in a batch: SQLite would make the tables anew, and what refers to their rows would be deleted with them.
    op.drop_column('dataset_images', 'mask')
    op.drop_column('datasets', 'task')
