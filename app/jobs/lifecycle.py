"""The state machine of jobs, stages and shards. Every change of state is here, and is a compare-and-set.

Each function is one part of a write unit (`Database.writing`). It locks the job's row first, so changes to one
job happen one after another and its events are numbered without gaps. A worker's writes carry the epoch of its
claim: after another worker claimed the shard they change nothing and raise `LeaseLost`. Whatever the API shows of
a job changes only together with an event, so the number of the newest event is the version of the job.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import ids
from app.db import now, upsert
from app.jobs import events
from app.jobs.tables import Job, JobMetric, JobStage, Shard, StageOutput
from app.settings import Settings
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
#: A job waits no longer than this by itself before it tries again; longer, and who ordered it is told.
LONGEST_PAUSE_S = 300.0


#: What a worker is to do after a renewal.
Verdict = Literal["go on", "cancel", "stalled"]


class LeaseLost(Exception):
    """Another worker has claimed this shard, or it was taken back. Stop, and write nothing."""


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
        job.finished_at = session.scalar(sa.select(now()))


# ---- a worker takes, keeps and ends a shard ------------------------------------------------------------------


def claim(
    session: Session, shard_id: str, worker: str, settings: Settings
) -> tuple[Claim | None, list[Ready]]:
    """Take a ready shard, or one whose lease has ended. (None, …): somebody else has it or it is not to be done.

    A shard whose output another job has made meanwhile is marked reused; what that makes ready is returned.
    """
    job_id = session.scalar(sa.select(Shard.job_id).where(Shard.id == shard_id))
    if job_id is None:
        return None, []
    job = lock(session, job_id)
    if job.status not in ("queued", "running"):
        return None, []
    takeable = sa.and_(Shard.status == "ready", Shard.ready_at <= now())
    expired = sa.and_(Shard.status == "running", Shard.lease_until < now())
    shard = session.scalar(sa.select(Shard).where(Shard.id == shard_id, takeable | expired))
    if shard is None:
        return None, []
    stage = session.get_one(JobStage, shard.stage_id)
    if _output(session, job.tenant, shard.key) is not None:
        _start(session, job, stage)
        shard.status = "reused"
        return None, _after_shard(session, job, stage, shard)
    if shard.status == "running":
        _lost(session, job, stage, shard, "its worker stopped answering")
    if shard.attempt >= settings.max_attempts:
        error = JobError(
            "attempts_exhausted", f"Stage '{stage.name}' was tried {shard.attempt} times without success."
        )
        fail_job(session, job, error, stage)
        return None, []
    _start(session, job, stage)
    clock = session.scalar(sa.select(now())) or 0.0
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
    clock = session.scalar(sa.select(now())) or 0.0
    shard.lease_until = clock + settings.lease_ttl_s
    moved = False
    if step is not None and step != shard.step:
        moved = True
        shard.step, shard.total = step, total
        session.flush()
        _roll_up(session, job, stage)
    if moved or alive:
        shard.step_at = clock
    if moved or job.shown_spent != job.queries_spent:
        _progressed(session, job, stage, shard)
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
        request_cancel(session, job, reason="deadline_exceeded")
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
    return _after_shard(session, job, stage, shard)


def fail(session: Session, held: Claim, error: JobError, settings: Settings) -> list[Ready]:
    """The shard's work failed. Tried again after a pause if that may help, else the job fails. Raises LeaseLost."""
    job, stage, shard = holding(session, held)
    may_help = error.retryable and error.after_s <= LONGEST_PAUSE_S
    if may_help and shard.attempt < settings.max_attempts and job.status != "cancelling":
        _lost(session, job, stage, shard, error.detail)
        pause = max(settings.reap_s * shard.attempt, error.after_s)
        shard.ready_at = (session.scalar(sa.select(now())) or 0.0) + pause
        return []
    shard.status, shard.lease_until = "failed", None
    fail_job(session, job, error, stage)
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
    _make_ready(session, [shard])
    shard.rung_at = None


def stopped(session: Session, held: Claim) -> list[Ready]:
    """The worker has ended its compute process because the job is being cancelled. Raises LeaseLost."""
    job, _, shard = holding(session, held)
    shard.status, shard.lease_until = "cancelled", None
    session.flush()
    _finish_cancel(session, job)
    return []


# ---- what users and the maintenance loop ask for -------------------------------------------------------------


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
    _finish_cancel(session, job)


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


def reap(session: Session, shard_id: str, settings: Settings) -> list[Ready]:
    """Take back a shard whose lease has ended: ready again, or cancelled, or the job fails after too many times."""
    job = lock(session, session.scalars(sa.select(Shard.job_id).where(Shard.id == shard_id)).one())
    shard = session.scalar(
        sa.select(Shard).where(Shard.id == shard_id, Shard.status == "running", Shard.lease_until < now())
    )
    if shard is None:
        return []
    stage = session.get_one(JobStage, shard.stage_id)
    if job.status == "cancelling":
        shard.status, shard.lease_until = "cancelled", None
        session.flush()
        _finish_cancel(session, job)
        return []
    if shard.attempt >= settings.max_attempts:
        shard.status, shard.lease_until = "failed", None
        detail = f"Stage '{stage.name}' lost its worker {shard.attempt} times."
        hint = "It may need more memory than the worker has: try a smaller batch_size, student or teacher."
        fail_job(session, job, JobError("worker_lost", detail, hint, retryable=True), stage)
        return []
    _lost(session, job, stage, shard, "its worker stopped answering")
    return [Ready(shard.id, shard.queue)]


def fail_job(session: Session, job: Job, error: JobError, stage: JobStage) -> None:
    """End the job as failed: its other shards are cancelled; workers that hold one find their lease lost."""
    job.error = {"code": error.code, "detail": error.detail, "stage": stage.name, "hint": error.hint,
                 "retryable": error.retryable}  # fmt: skip
    clock = session.scalar(sa.select(now()))
    stage.status, stage.finished_at = "failed", clock
    session.flush()
    unfinished = Shard.status.in_(("waiting", "ready", "running"))
    lost = {"status": "cancelled", "lease_until": None, "epoch": Shard.epoch + 1}
    session.execute(sa.update(Shard).where(Shard.job_id == job.id, unfinished).values(lost))
    open_stages = JobStage.status.in_(("waiting", "ready", "running"))
    session.execute(
        sa.update(JobStage).where(JobStage.job_id == job.id, open_stages).values(status="cancelled")
    )
    move(session, job, "failed")
    events.append(session, job, "job.failed", error=job.error)


# ---- inside ---------------------------------------------------------------------------------------------------


def holding(session: Session, held: Claim) -> tuple[Job, JobStage, Shard]:
    """The rows of a claim, the job's locked, while it is the newest claim of its shard. Raises LeaseLost."""
    job = lock(session, held.job_id)
    same = sa.and_(Shard.id == held.shard_id, Shard.epoch == held.epoch, Shard.status == "running")
    shard = session.scalar(sa.select(Shard).where(same).execution_options(populate_existing=True))
    if shard is None:
        raise LeaseLost(held.shard_id)
    return job, session.get_one(JobStage, shard.stage_id), shard


def _start(session: Session, job: Job, stage: JobStage) -> None:
    clock = session.scalar(sa.select(now()))
    if job.status == "queued":
        move(session, job, "running")
        job.started_at = job.started_at or clock
        job.resumed_at, job.resumed_percent = clock, job.percent
        events.append(session, job, "job.started")
    if stage.status in ("waiting", "ready"):
        stage.status, stage.started_at = "running", clock
        events.append(session, job, "stage.started", stage=stage.name, shards=stage.shards)


def _lost(session: Session, job: Job, stage: JobStage, shard: Shard, why: str) -> None:
    """The shard's present attempt is over; it will be tried again."""
    job.attempt += 1
    _make_ready(session, [shard])
    events.append(
        session, job, "stage.retried",
        stage=stage.name, shard=shard.position, attempt=job.attempt, reason=why,
        from_step=(shard.checkpoint or {}).get("step", 0),
    )  # fmt: skip


def _make_ready(session: Session, shards: Iterable[Shard]) -> None:
    clock = session.scalar(sa.select(now()))
    for shard in shards:
        shard.status, shard.lease_until, shard.worker = "ready", None, None
        shard.ready_at, shard.rung_at, shard.rings = clock, clock, 0


def _after_shard(session: Session, job: Job, stage: JobStage, shard: Shard) -> list[Ready]:
    session.flush()
    states = set(session.scalars(sa.select(Shard.status).where(Shard.stage_id == stage.id)))
    if states <= DONE:
        stage.status = "reused" if states == {"reused"} else "succeeded"
        stage.finished_at = session.scalar(sa.select(now()))
        events.append(session, job, f"stage.{stage.status}", stage=stage.name)
    _roll_up(session, job, stage)
    if stage.status not in DONE:
        _progressed(session, job, stage, shard)
    if stage.status in DONE and job.status == "running":
        return _advance(session, job)
    if job.status == "cancelling":
        _finish_cancel(session, job)
    return []


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
        _make_ready(session, shards)
        ready += [Ready(shard.id, shard.queue) for shard in shards]
    if all(stage.status in DONE for stage in stages):
        job.student_id = _record_student(session, job)
        job.percent = 100.0
        move(session, job, "succeeded")
        events.append(session, job, "job.succeeded", student_id=job.student_id)
    return ready


def _finish_cancel(session: Session, job: Job) -> None:
    running = sa.select(sa.func.count()).where(Shard.job_id == job.id, Shard.status == "running")
    if job.status in FINISHED or session.scalar(running):
        return
    open_stages = JobStage.status.in_(("waiting", "ready", "running"))
    session.execute(
        sa.update(JobStage).where(JobStage.job_id == job.id, open_stages).values(status="cancelled")
    )
    move(session, job, "cancelled")
    events.append(session, job, "job.cancelled", reason=(job.error or {}).get("code", "requested"))


def _roll_up(session: Session, job: Job, stage: JobStage) -> None:
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


def _progressed(session: Session, job: Job, stage: JobStage, shard: Shard) -> None:
    spent = {} if job.queries_planned is None else {"queries_spent": job.queries_spent}
    events.append(
        session, job, "stage.progress",
        stage=stage.name, shard=shard.position, step=shard.step, total=shard.total, percent=stage.percent,
        job_percent=job.percent, **spent,
    )  # fmt: skip


def _output(session: Session, tenant: str, key: str) -> StageOutput | None:
    return session.get(StageOutput, (tenant, key))


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
