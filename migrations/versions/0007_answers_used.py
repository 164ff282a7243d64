"""A teacher's answer lives from when it was last used, not from when it was given.

Revision: 0007, after 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0007'
down_revision = '0006'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column('teacher_answers', sa.Column('used_at', sa.Double(), nullable=True))
    op.execute('UPDATE teacher_answers SET used_at = created_at')
    with op.batch_alter_table('teacher_answers', schema=None) as batch_op:
        batch_op.alter_column('used_at', existing_type=sa.Double(), nullable=False)
        batch_op.drop_index(batch_op.f('ix_teacher_answers_created_at'))
        batch_op.create_index(batch_op.f('ix_teacher_answers_used_at'), ['used_at'], unique=False)


def downgrade() -> None:
    with op.batch_alter_table('teacher_answers', schema=None) as batch_op:
        batch_op.drop_index(batch_op.f('ix_teacher_answers_used_at'))
        batch_op.create_index(batch_op.f('ix_teacher_answers_created_at'), ['created_at'], unique=False)
        batch_op.drop_column('used_at')
