"""What a worker does to a shard: take it, keep it, end it; and how it is taken back from a worker that is gone.

Each function is one part of a write unit (`Database.writing`) and locks the job's row first. A worker's writes carry
the epoch of its claim: after another worker claimed the shard they change nothing and raise `LeaseLost`. What follows
for the stage and the job is in `lifecycle`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app.db import now, read_clock, upsert
from app.jobs import lifecycle
from app.jobs.lifecycle import JobError, Ready
from app.jobs.tables import Job, JobMetric, JobStage, Shard, StageOutput
from app.settings import Settings

#: A job waits no longer than this by itself before it tries again; longer, and who ordered it is told.
LONGEST_PAUSE_S = 300.0

#: What a worker is to do after a renewal.
Verdict = Literal["go on", "cancel", "stalled"]


class LeaseLost(Exception):
    """Another worker has claimed this shard, or it was taken back. Stop, and write nothing."""


@dataclass(frozen=True)
class Claim:
    """The right to compute one shard until the lease ends, and all that is needed to do so."""

    shard_id: str
    job_id: str
    epoch: int
    attempt: int
    method: str
    stage: str
    output: str
    params: dict[str, Any]
    shape: dict[str, Any]
    seed: int
    shard: int
    shards: int
    inputs: dict[str, list[dict[str, str]]]  # artefact -> files (name -> blob digest) of each of its shards
    checkpoint: dict[str, Any] | None


def claim(
    session: Session, shard_id: str, worker: str, settings: Settings
) -> tuple[Claim | None, list[Ready]]:
    """Take a ready shard, or one whose lease has ended. (None, …): somebody else has it or it is not to be done.

    A shard whose output another job has made meanwhile is marked reused; what that makes ready is returned.
    """
    job_id = session.scalar(sa.select(Shard.job_id).where(Shard.id == shard_id))
    if job_id is None:
        return None, []
    job = lifecycle.lock(session, job_id)
    if job.status not in ("queued", "running"):
        return None, []
    takeable = sa.and_(Shard.status == "ready", Shard.ready_at <= now())
    expired = sa.and_(Shard.status == "running", Shard.lease_until < now())
    shard = session.scalar(sa.select(Shard).where(Shard.id == shard_id, takeable | expired))
    if shard is None:
        return None, []
    stage = session.get_one(JobStage, shard.stage_id)
    if session.get(StageOutput, (job.tenant, shard.key)) is not None:
        lifecycle.mark_running(session, job, stage)
        shard.status = "reused"
        return None, lifecycle.shard_done(session, job, stage, shard)
    if shard.status == "running":
        lifecycle.try_again(session, job, stage, shard, "its worker stopped answering")
    if shard.attempt >= settings.max_attempts:
        error = JobError(
            "attempts_exhausted", f"Stage '{stage.name}' was tried {shard.attempt} times without success."
        )
        lifecycle.fail_job(session, job, error, stage)
        return None, []
    lifecycle.mark_running(session, job, stage)
    clock = read_clock(session)
    shard.status, shard.worker = "running", worker
    shard.epoch += 1
    shard.attempt += 1
    shard.lease_until = clock + settings.lease_ttl_s
    shard.step_at = clock
    return _claim_of(session, job, stage, shard), []


def renew(
    session: Session, held: Claim, settings: Settings, step: int | None, total: int,
    points: Iterable[tuple[int, str, float]] = (), *, alive: bool = False,
) -> Verdict:  # fmt: skip
    """Keep the lease and record progress. Answers "go on", "cancel" or "stalled". Raises LeaseLost.

    `step`: None while the stage has not said where it is; a retried one goes on from its checkpoint, not from 0.
    `alive`: the stage has said something since the last renewal, be it that it still waits at this step.
    """
    job, stage, shard = holding(session, held)
    clock = read_clock(session)
    shard.lease_until = clock + settings.lease_ttl_s
    moved = False
    if step is not None and step != shard.step:
        moved = True
        shard.step, shard.total = step, total
        session.flush()
        lifecycle.roll_up(session, job, stage)
    if moved or alive:
        shard.step_at = clock
    if moved or job.shown_spent != job.queries_spent:
        lifecycle.tell_progress(session, job, stage, shard)
    rows = [
        {
            "job_id": job.id,
            "stage": stage.name,
            "shard": shard.position,
            "name": name,
            "step": at,
            "value": value,
        }
        for at, name, value in points
    ]
    upsert(session, JobMetric, rows, update=("value",))
    if job.deadline_at is not None and job.deadline_at < clock and job.status == "running":
        lifecycle.request_cancel(session, job, reason="deadline_exceeded")
    if job.status == "cancelling":
        return "cancel"
    return "stalled" if clock - (shard.step_at or clock) > settings.stall_s else "go on"


def keep_checkpoint(session: Session, held: Claim, step: int, files: dict[str, str]) -> set[str]:
    """Remember the newest checkpoint and the one before it. Returns the blobs of the third, which is forgotten.

    Raises LeaseLost.
    """
    _, _, shard = holding(session, held)
    before, third = shard.checkpoint, None
    if before is not None:
        third = before["previous"]
        before = {name: before[name] for name in ("step", "files")}
    shard.checkpoint = {"step": step, "files": files, "previous": before}
    return set() if third is None else set(third["files"].values())


def complete(
    session: Session, held: Claim, files: dict[str, str], size: int, facts: dict[str, Any] | None = None
) -> list[Ready]:
    """The shard's output exists. Returns what became ready. `facts`: about the student, with the bundle.

    Raises LeaseLost.
    """
    job, stage, shard = holding(session, held)
    row = {"tenant": job.tenant, "key": shard.key, "files": files, "bytes": size, "facts": facts}
    upsert(session, StageOutput, [row | {"created_at": now(), "used_at": now()}])
    shard.status, shard.lease_until = "succeeded", None
    shard.step = shard.total = max(shard.total, 1)
    return lifecycle.shard_done(session, job, stage, shard)


def fail(session: Session, held: Claim, error: JobError, settings: Settings) -> list[Ready]:
    """The shard's work failed. Tried again after a pause if that may help, else the job fails. Raises LeaseLost."""
    job, stage, shard = holding(session, held)
    may_help = error.retryable and error.after_s <= LONGEST_PAUSE_S
    if may_help and shard.attempt < settings.max_attempts and job.status != "cancelling":
        lifecycle.try_again(session, job, stage, shard, error.detail)
        pause = max(settings.reap_s * shard.attempt, error.after_s)
        shard.ready_at = read_clock(session) + pause
        return []
    shard.status, shard.lease_until = "failed", None
    lifecycle.fail_job(session, job, error, stage)
    return []


def release(session: Session, held: Claim) -> None:
    """Give a shard back unharmed, because its worker is asked to stop. The attempt does not count.

    Nobody rings for it here, or this worker itself might take it again; the maintenance loop rings soon.
    """
    job, _, shard = holding(session, held)
    if job.status == "cancelling":
        stopped(session, held)
        return
    shard.attempt -= 1
    lifecycle.make_ready(session, [shard])
    shard.rung_at = None


def stopped(session: Session, held: Claim) -> list[Ready]:
    """The worker has ended its compute process because the job is being cancelled. Raises LeaseLost."""
    job, _, shard = holding(session, held)
    shard.status, shard.lease_until = "cancelled", None
    session.flush()
    lifecycle.finish_cancel(session, job)
    return []


def reap(session: Session, shard_id: str, settings: Settings) -> list[Ready]:
    """Take back a shard whose lease has ended: ready again, or cancelled, or the job fails after too many times."""
    job = lifecycle.lock(session, session.scalars(sa.select(Shard.job_id).where(Shard.id == shard_id)).one())
    shard = session.scalar(
        sa.select(Shard).where(Shard.id == shard_id, Shard.status == "running", Shard.lease_until < now())
    )
    if shard is None:
        return []
    stage = session.get_one(JobStage, shard.stage_id)
    if job.status == "cancelling":
        shard.status, shard.lease_until = "cancelled", None
        session.flush()
        lifecycle.finish_cancel(session, job)
        return []
    if shard.attempt >= settings.max_attempts:
        shard.status, shard.lease_until = "failed", None
        detail = f"Stage '{stage.name}' lost its worker {shard.attempt} times."
        hint = "It may need more memory than the worker has: try a smaller batch_size, student or teacher."
        lifecycle.fail_job(session, job, JobError("worker_lost", detail, hint, retryable=True), stage)
        return []
    lifecycle.try_again(session, job, stage, shard, "its worker stopped answering")
    return [Ready(shard.id, shard.queue)]


def holding(session: Session, held: Claim) -> tuple[Job, JobStage, Shard]:
    """The rows of a claim, the job's locked, while it is the newest claim of its shard. Raises LeaseLost."""
    job = lifecycle.lock(session, held.job_id)
    same = sa.and_(Shard.id == held.shard_id, Shard.epoch == held.epoch, Shard.status == "running")
    shard = session.scalar(sa.select(Shard).where(same).execution_options(populate_existing=True))
    if shard is None:
        raise LeaseLost(held.shard_id)
    return job, session.get_one(JobStage, shard.stage_id), shard


def _claim_of(session: Session, job: Job, stage: JobStage, shard: Shard) -> Claim:
    inputs = {name: [source["files"]] for name, source in job.sources.items()}
    made = session.execute(
        sa.select(JobStage.output, Shard.position, StageOutput.files)
        .join(Shard, Shard.stage_id == JobStage.id)
        .join(StageOutput, (StageOutput.key == Shard.key) & (StageOutput.tenant == job.tenant))
        .where(JobStage.job_id == job.id, JobStage.output.in_(stage.needs))
        .order_by(JobStage.position, Shard.position)
    )
    for output, _, files in made:
        inputs.setdefault(output, []).append(files)
    return Claim(
        shard_id=shard.id, job_id=job.id, epoch=shard.epoch, attempt=shard.attempt, method=job.method,
        stage=stage.name, output=stage.output, params=stage.params, shape=job.shape, seed=job.seed,
        shard=shard.position, shards=stage.shards, inputs=inputs, checkpoint=shard.checkpoint,
    )  # fmt: skip
