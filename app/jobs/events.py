"""What happened to a job, numbered without gaps. Appended in the transaction that made it happen.

The API shows of a job what its newest event left: an event also shows the questions counted until then.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.jobs.tables import Job, JobEvent
from app.webhooks import outbox

#: After one of these nothing more happens, unless the job is retried.
TERMINAL = frozenset({"job.succeeded", "job.failed", "job.cancelled"})


def append(session: Session, job: Job, type: str, **data: Any) -> None:
    """Add the job's next event, and tell the webhooks that want it. The caller holds the job's row lock, so numbers
    have no gaps."""
    job.last_event += 1
    job.shown_spent, job.shown_cached = job.queries_spent, job.queries_cached
    session.add(JobEvent(job_id=job.id, number=job.last_event, type=type, data=data))
    outbox.write(session, job, type)


def after(session: Session, job_id: str, number: int, limit: int) -> list[JobEvent]:
    """Events with a higher number, oldest first."""
    select = sa.select(JobEvent).where(JobEvent.job_id == job_id, JobEvent.number > number)
    return list(session.scalars(select.order_by(JobEvent.number).limit(limit)))
