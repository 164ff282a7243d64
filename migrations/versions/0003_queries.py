"""Questions to black-box teachers: what a job may ask and has asked, and the answers.

Revision: 0003, after 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = '0003'
down_revision = '0002'
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table('teacher_answers',
    sa.Column('tenant', sa.String(), nullable=False),
    sa.Column('teacher', sa.String(), nullable=False),
    sa.Column('image', sa.String(), nullable=False),
    sa.Column('answer', sa.LargeBinary(), nullable=False),
    sa.Column('job_id', sa.String(), nullable=False),
    sa.Column('created_at', sa.Double(), nullable=False),
    sa.PrimaryKeyConstraint('tenant', 'teacher', 'image', name=op.f('pk_teacher_answers'))
    )
    with op.batch_alter_table('teacher_answers', schema=None) as batch_op:
        batch_op.create_index(batch_op.f('ix_teacher_answers_created_at'), ['created_at'], unique=False)

    with op.batch_alter_table('jobs', schema=None) as batch_op:
        batch_op.add_column(sa.Column('query_budget', sa.BigInteger(), nullable=True))
        batch_op.add_column(sa.Column('queries_planned', sa.BigInteger(), nullable=True))
        for name in ('queries_spent', 'queries_cached', 'shown_spent', 'shown_cached'):
            batch_op.add_column(sa.Column(name, sa.BigInteger(), server_default=sa.text('0'), nullable=False))


def downgrade() -> None:
    # Not in a batch: SQLite would make the table anew, which rows that refer to its own forbid.
    for name in ('shown_cached', 'shown_spent', 'queries_cached', 'queries_spent', 'queries_planned', 'query_budget'):
        op.drop_column('jobs', name)

    with op.batch_alter_table('teacher_answers', schema=None) as batch_op:
        batch_op.drop_index(batch_op.f('ix_teacher_answers_created_at'))

    op.drop_table('teacher_answers')
