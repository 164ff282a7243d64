"""The state machine of jobs and stages: which state follows which, and what the ends of shards lead to.

Each function is one part of a write unit (`Database.writing`) that has locked the job's row (`lock`), so changes to
one job happen one after another and its events are numbered without gaps. Whatever the API shows of a job changes
only together with an event, so the number of the newest event is the version of the job. What a worker does to a
shard is in `claims`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import ids
from app.db import now, read_clock
from app.jobs import events
from app.jobs.tables import Job, JobStage, Shard, StageOutput
from app.students.tables import Student

#: From which state a job may go to which.
TRANSITIONS: Mapping[str, frozenset[str]] = {
    "queued": frozenset({"running", "succeeded", "failed", "cancelled"}),
    "running": frozenset({"succeeded", "failed", "cancelling", "cancelled"}),
    "cancelling": frozenset({"cancelled", "failed"}),
    "succeeded": frozenset(),
    "failed": frozenset({"queued"}),
    "cancelled": frozenset({"queued"}),
}
FINISHED = frozenset({"succeeded", "failed", "cancelled"})
DONE = frozenset({"succeeded", "reused"})  # states of stages and shards whose output exists
#: The artefact that makes a student.
BUNDLE = "bundle"


@dataclass(frozen=True)
class Ready:
    """A shard to ring for."""

    shard_id: str
    queue: str


@dataclass(frozen=True)
class JobError:
    """Why a job failed. `detail` is for people and holds no traceback. `after_s`: not to be tried again before."""

    code: str
    detail: str
    hint: str = ""
    retryable: bool = False
    after_s: float = 0.0


def lock(session: Session, job_id: str) -> Job:
    """The job's row as it is once it is locked, until the write unit ends (SQLite locks as a whole).

    What the session has read of it before may have changed while this waited for the lock.
    """
    select = sa.select(Job).where(Job.id == job_id).with_for_update()
    return session.execute(select, execution_options={"populate_existing": True}).scalar_one()


def move(session: Session, job: Job, status: str) -> None:
    """Change the job's status along `TRANSITIONS`."""
    if status not in TRANSITIONS[job.status]:
        raise ValueError(f"job {job.id} cannot go from {job.status} to {status}")
    job.status = status
    if status in FINISHED:
        job.finished_at = read_clock(session)


# ---- what users and the maintenance loop ask for --------------------------------------------------------------


def start(session: Session, job: Job) -> list[Ready]:
    """Make a new or retried job's first stages ready; where everything was reused the job is done at once."""
    return _advance(session, job)


def request_cancel(session: Session, job: Job, reason: str | None = None) -> None:
    """Stop a job. What runs is stopped by its worker at its next heartbeat; the rest is cancelled now."""
    if reason:
        job.error = {"code": reason, "detail": "The job ran past its cancel_after_s.", "stage": None,
                     "hint": "Allow more time, or choose the preset 'draft'.", "retryable": True}  # fmt: skip
    if job.status == "running":
        move(session, job, "cancelling")
        events.append(session, job, "job.cancelling", reason=reason or "requested")
    waiting = Shard.status.in_(("waiting", "ready"))
    session.execute(sa.update(Shard).where(Shard.job_id == job.id, waiting).values(status="cancelled"))
    session.flush()
    finish_cancel(session, job)


def retry(session: Session, job: Job) -> list[Ready]:
    """Continue a failed or cancelled job: finished stages stay, the newest checkpoint is used."""
    move(session, job, "queued")
    job.error, job.finished_at, job.deadline_at = None, None, None
    job.attempt += 1
    kept = sa.update(StageOutput).where(
        StageOutput.tenant == job.tenant,
        StageOutput.key.in_(sa.select(Shard.key).where(Shard.job_id == job.id)),
    )
    made = list(session.scalars(kept.values(used_at=now()).returning(StageOutput.key)))
    forgotten = Shard.key.not_in(made)  # by retention, since then
    lacking = Shard.status.in_(("failed", "cancelled")) | forgotten
    reset = {"status": "waiting", "attempt": 0, "lease_until": None}
    session.execute(sa.update(Shard).where(Shard.job_id == job.id, lacking).values(reset))
    begun = sa.select(Shard.stage_id).where(Shard.job_id == job.id, Shard.status == "waiting")
    unfinished = JobStage.status.not_in(DONE) | JobStage.id.in_(begun)
    reset = {"status": "waiting", "finished_at": None}
    session.execute(sa.update(JobStage).where(JobStage.job_id == job.id, unfinished).values(reset))
    session.expire_all()
    events.append(session, job, "job.retried", attempt=job.attempt)
    return _advance(session, job)


# ---- what follows for the stage and the job from what a worker does to a shard --------------------------------


def mark_running(session: Session, job: Job, stage: JobStage) -> None:
    """A shard of the stage is being worked on, so the stage runs, and the job."""
    clock = read_clock(session)
    if job.status == "queued":
        move(session, job, "running")
        job.started_at = job.started_at or clock
        job.resumed_at, job.resumed_percent = clock, job.percent
        events.append(session, job, "job.started")
    if stage.status in ("waiting", "ready"):
        stage.status, stage.started_at = "running", clock
        events.append(session, job, "stage.started", stage=stage.name, shards=stage.shards)


def roll_up(session: Session, job: Job, stage: JobStage) -> None:
    """Percent of the stage from its shards, of the job from its stages. The job's never falls."""
    shards = session.execute(
        sa.select(Shard.status, Shard.step, Shard.total).where(Shard.stage_id == stage.id)
    ).all()
    stage.step, stage.total = sum(step for _, step, _ in shards), sum(total for _, _, total in shards)
    parts = [1.0 if status in DONE else step / total if total else 0.0 for status, step, total in shards]
    stage.percent = round(100 * sum(parts) / len(parts), 2)
    session.flush()
    stages = session.execute(
        sa.select(JobStage.weight, JobStage.percent).where(JobStage.job_id == job.id)
    ).all()
    percent = sum(weight * share for weight, share in stages) / (sum(weight for weight, _ in stages) or 1.0)
    job.percent = max(job.percent, round(min(percent, 99.9), 2))


def tell_progress(session: Session, job: Job, stage: JobStage, shard: Shard) -> None:
    """An event of how far the shard, its stage and the job are, with the questions counted until now."""
    spent = {} if job.queries_planned is None else {"queries_spent": job.queries_spent}
    events.append(
        session, job, "stage.progress",
        stage=stage.name, shard=shard.position, step=shard.step, total=shard.total, percent=stage.percent,
        job_percent=job.percent, **spent,
    )  # fmt: skip


def shard_done(session: Session, job: Job, stage: JobStage, shard: Shard) -> list[Ready]:
    """A shard's output exists: the stage may be done with it, and the job. Returns what became ready."""
    session.flush()
    states = set(session.scalars(sa.select(Shard.status).where(Shard.stage_id == stage.id)))
    if states <= DONE:
        stage.status = "reused" if states == {"reused"} else "succeeded"
        stage.finished_at = read_clock(session)
        events.append(session, job, f"stage.{stage.status}", stage=stage.name)
    roll_up(session, job, stage)
    if stage.status not in DONE:
        tell_progress(session, job, stage, shard)
    if stage.status in DONE and job.status == "running":
        return _advance(session, job)
    if job.status == "cancelling":
        finish_cancel(session, job)
    return []


def try_again(session: Session, job: Job, stage: JobStage, shard: Shard, why: str) -> None:
    """The shard's present attempt is over; it will be tried again."""
    job.attempt += 1
    make_ready(session, [shard])
    events.append(
        session, job, "stage.retried",
        stage=stage.name, shard=shard.position, attempt=job.attempt, reason=why,
        from_step=(shard.checkpoint or {}).get("step", 0),
    )  # fmt: skip


def make_ready(session: Session, shards: Iterable[Shard]) -> None:
    """From now on a worker may claim these shards, and they are rung for again from the start."""
    clock = read_clock(session)
    for shard in shards:
        shard.status, shard.lease_until, shard.worker = "ready", None, None
        shard.ready_at, shard.rung_at, shard.rings = clock, clock, 0


def fail_job(session: Session, job: Job, error: JobError, stage: JobStage) -> None:
    """End the job as failed: its other shards are cancelled; workers that hold one find their lease lost."""
    job.error = {"code": error.code, "detail": error.detail, "stage": stage.name, "hint": error.hint,
                 "retryable": error.retryable}  # fmt: skip
    stage.status, stage.finished_at = "failed", read_clock(session)
    session.flush()
    unfinished = Shard.status.in_(("waiting", "ready", "running"))
    lost = {"status": "cancelled", "lease_until": None, "epoch": Shard.epoch + 1}
    session.execute(sa.update(Shard).where(Shard.job_id == job.id, unfinished).values(lost))
    _cancel_stages(session, job)
    move(session, job, "failed")
    events.append(session, job, "job.failed", error=job.error)


def finish_cancel(session: Session, job: Job) -> None:
    """End a job that is being cancelled, once no worker has a shard of it any more."""
    running = sa.select(sa.func.count()).where(Shard.job_id == job.id, Shard.status == "running")
    if job.status in FINISHED or session.scalar(running):
        return
    _cancel_stages(session, job)
    move(session, job, "cancelled")
    events.append(session, job, "job.cancelled", reason=(job.error or {}).get("code", "requested"))


# ---- inside ---------------------------------------------------------------------------------------------------


def _advance(session: Session, job: Job) -> list[Ready]:
    """Make ready what can start; finish the job when nothing is left."""
    session.flush()
    stages = list(
        session.scalars(sa.select(JobStage).where(JobStage.job_id == job.id).order_by(JobStage.position))
    )
    made = {stage.output for stage in stages if stage.status in DONE}
    ready: list[Ready] = []
    for stage in stages:
        if stage.status != "waiting" or not made.issuperset(stage.needs):
            continue
        stage.status = "ready"
        select = sa.select(Shard).where(Shard.stage_id == stage.id, Shard.status == "waiting")
        shards = list(session.scalars(select.order_by(Shard.position)))
        make_ready(session, shards)
        ready += [Ready(shard.id, shard.queue) for shard in shards]
    if all(stage.status in DONE for stage in stages):
        job.student_id = _record_student(session, job)
        job.percent = 100.0
        move(session, job, "succeeded")
        events.append(session, job, "job.succeeded", student_id=job.student_id)
    return ready


def _cancel_stages(session: Session, job: Job) -> None:
    unfinished = JobStage.status.in_(("waiting", "ready", "running"))
    cancelled = sa.update(JobStage).where(JobStage.job_id == job.id, unfinished).values(status="cancelled")
    session.execute(cancelled)


def _record_student(session: Session, job: Job) -> str:
    key = session.scalars(
        sa.select(Shard.key).join(JobStage, Shard.stage_id == JobStage.id)
        .where(JobStage.job_id == job.id, JobStage.output == BUNDLE)
    ).one()  # fmt: skip
    made = session.get_one(StageOutput, (job.tenant, key))
    facts = made.facts or {}
    student = Student(
        id=ids.new("stu"), tenant=job.tenant, job_id=job.id, dataset_id=job.dataset_id, teacher=job.teacher,
        method=job.method, architecture=job.student, classes=facts["classes"], files=made.files,
        summary=facts["summary"],
    )  # fmt: skip
    session.add(student)
    return student.id
