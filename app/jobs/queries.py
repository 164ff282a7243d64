"""Questions to black-box teachers: what a job may still ask, and what its tenant's jobs were answered before.

Each function is one part of a write unit, like those of `claims`. What counts questions locks the job's row, so
that workers that ask at once never spend more than the budget together, and works only for the newest claim of its
shard. Whatever was reserved stays counted after a crash, a retry or a restart: it may have been paid.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.db import now, upsert
from app.jobs import claims
from app.jobs.claims import Claim
from app.jobs.tables import Job, TeacherAnswer
from app.settings import Settings
from app.teachers import service as teachers
from models.errors import BudgetSpent

_NAMES = 500  # in one statement


@dataclass(frozen=True)
class Known:
    """Answers by image; `earlier`: how many of them other jobs have paid for."""

    answers: dict[str, bytes]
    earlier: int


def reserve(session: Session, held: Claim, count: int) -> None:
    """Count questions before they are sent. Raises BudgetSpent, and LeaseLost."""
    job, _, _ = claims.holding(session, held)
    if job.query_budget is not None and job.queries_spent + count > job.query_budget:
        raise BudgetSpent(
            f"The job may put {job.query_budget} questions to its teacher; {job.queries_spent} are spent, and"
            f" {count} more are needed.",
            "Order the job again with a larger query_budget, or with fewer synthetic images. What the teacher has"
            " answered is kept, and not asked again.",
        )
    job.queries_spent += count


def release(session: Session, held: Claim, count: int) -> None:
    """Take back questions that the teacher refused without an answer. Raises LeaseLost."""
    job, _, _ = claims.holding(session, held)
    job.queries_spent -= count


def known_answers(session: Session, held: Claim, teacher: str, images: Sequence[str]) -> Known:
    """What the tenant's jobs were answered to these images, which are now used again. Raises LeaseLost."""
    job, _, _ = claims.holding(session, held)
    answers: dict[str, bytes] = {}
    earlier = 0
    for start in range(0, len(images), _NAMES):
        wanted = sa.and_(
            TeacherAnswer.tenant == job.tenant,
            TeacherAnswer.teacher == teacher,
            TeacherAnswer.image.in_(images[start : start + _NAMES]),
        )
        used = sa.update(TeacherAnswer).where(wanted).values(used_at=now())
        for image, answer, job_id in session.execute(
            used.returning(TeacherAnswer.image, TeacherAnswer.answer, TeacherAnswer.job_id)
        ):
            answers[image] = answer
            earlier += job_id != job.id
    return Known(answers, earlier)


def record_answers(session: Session, held: Claim, teacher: str, answers: Mapping[str, bytes]) -> None:
    """Keep answers. Where two jobs asked at once, the first stands.

    Also for a claim that was lost meanwhile: they are paid for, and the same whoever asked.
    """
    tenant = session.execute(sa.select(Job.tenant).where(Job.id == held.job_id)).scalar_one()
    rows = [
        {
            "tenant": tenant, "teacher": teacher, "image": image, "answer": answer, "job_id": held.job_id,
            "created_at": now(), "used_at": now(),
        }
        for image, answer in answers.items()
    ]  # fmt: skip
    upsert(session, TeacherAnswer, rows)


def count_cached(session: Session, held: Claim, count: int) -> None:
    """Count answers of earlier jobs that a shard used, in the write unit that completes it. Raises LeaseLost."""
    job, _, _ = claims.holding(session, held)
    job.queries_cached += count


def secret_headers(session: Session, settings: Settings, held: Claim) -> dict[str, str]:
    """What the job's teacher wants to be sent: for the compute process only. Raises Unavailable."""
    job = session.execute(sa.select(Job.tenant, Job.teacher).where(Job.id == held.job_id)).one()
    return teachers.headers(session, settings, job.tenant, job.teacher)
