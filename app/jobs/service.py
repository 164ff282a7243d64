"""The rules of jobs: what may be ordered, what is read, when a job may be cancelled or retried."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import ids
from app.db import now, owned, owned_rows, read_clock, upsert
from app.errors import Conflict, Gone, Invalid, NotFound, TooMany
from app.jobs import events, lifecycle, ordering, plan
from app.jobs.lifecycle import Ready
from app.jobs.schemas import (
    CurvePoint,
    EventView,
    JobErrorView,
    JobOrder,
    JobView,
    PlannedStageView,
    PlanView,
    Progress,
    Queries,
    StageView,
)
from app.jobs.tables import IdempotencyKey, Job, JobEvent, JobMetric, JobStage, Shard
from app.paging import newest
from app.security.principal import Principal
from app.teachers import service as teachers
from app.webhooks import outbox
from app.wiring import Wiring
from models.methods import METHODS
from models.pipeline import canonical, digest

# What GET job asks, made once: building a statement costs as much as running it.
_ASKED = Job.id.in_(sa.bindparam("ids", expanding=True))
_VERSIONS = owned_rows(Job, only=("id", "last_event", "status")).where(_ASKED)
_JOBS = owned_rows(Job, without=("sources", "shape", "queries_spent", "queries_cached")).where(_ASKED)
_STAGES = (
    sa.select(*[column for column in JobStage.__table__.c if column.name not in ("params", "needs", "key")])
    .where(JobStage.job_id.in_(sa.bindparam("jobs", expanding=True)))
    .order_by(JobStage.job_id, JobStage.position)
)


@dataclass(frozen=True)
class Submitted:
    job: JobView
    replayed: bool  # the idempotency key had been used for the same order before


def submit(
    wiring: Wiring, principal: Principal, order: JobOrder, idempotency_key: str | None = None
) -> Submitted:
    """Check the order, write the job with its stages, and ring for the stages that can start.

    An order whose idempotency key was used is not checked again: its job is there, whatever has changed since.
    """
    request = digest(order.model_dump())
    if idempotency_key is not None:
        with wiring.database.reading() as session:
            used = session.get(IdempotencyKey, (principal.tenant, idempotency_key))
            if used is not None:
                return Submitted(_replay(session, principal, used, request), replayed=True)
    choice = ordering.choose(wiring, principal, order)
    for name, document in choice.documents.items():
        _store(wiring, name, document)
    with wiring.database.writing() as session:
        job_id = ids.new("job")
        if idempotency_key is not None:
            # Written before all else: who comes second with the same key waits here, and then finds it taken.
            taken = {"tenant": principal.tenant, "key": idempotency_key, "request_digest": request,
                     "resource_id": job_id, "created_at": now()}  # fmt: skip
            if not upsert(session, IdempotencyKey, [taken]):
                used = session.get_one(IdempotencyKey, (principal.tenant, idempotency_key))
                return Submitted(_replay(session, principal, used, request), replayed=True)
        _check_quota(session, principal, wiring.settings.max_active_jobs)
        # Again, in the write unit: so the teacher is not deleted before the job is there that needs it.
        teachers.resolve(session, wiring.settings, principal, order.teacher_id)
        work = ordering.plan_work(session, principal, order, choice)
        job = Job(
            id=job_id, tenant=principal.tenant, dataset_id=order.dataset_id, teacher=order.teacher_id,
            method=choice.method.name, student=order.student, generator=choice.generator_id, preset=order.preset,
            params=choice.params.model_dump(mode="json"), seed=order.seed, labels=order.metadata,
            sources=work.sources, shape=plan.shape_document(work.shape), status="queued", attempt=1, percent=0.0,
            last_event=0, query_budget=order.query_budget, queries_planned=work.queries,
            created_at=read_clock(session),
        )  # fmt: skip
        if order.cancel_after_s is not None:
            job.deadline_at = job.created_at + order.cancel_after_s
        session.add(job)
        session.flush()
        events.append(
            session, job, "job.created", dataset=job.dataset_id, method=job.method, student=job.student
        )
        plan.write(session, job, work.planned)
        ready = lifecycle.start(session, job)
        session.flush()
        submitted = view(session, job)
    announce(wiring, ready)
    return Submitted(submitted, replayed=False)


def dry_run(wiring: Wiring, principal: Principal, order: JobOrder) -> PlanView:
    """The plan that `submit` would make, and what of it exists already."""
    choice = ordering.choose(wiring, principal, order)
    with wiring.database.reading() as session:
        work = ordering.plan_work(session, principal, order, choice)
        existing = plan.reusable(session, principal.tenant, work.planned)
    stages = [
        PlannedStageView(
            name=entry.stage.name, key=entry.key, shards=len(entry.shard_keys),
            reused=existing.issuperset(entry.shard_keys),
        )
        for entry in work.planned
    ]  # fmt: skip
    params = choice.params.model_dump(mode="json")
    return PlanView(object="plan", params=params, stages=stages, queries_planned=work.queries)


def announce(wiring: Wiring, ready: list[Ready]) -> None:
    """Ring for shards after their rows are committed. A ring that fails is made up for by the maintenance loop."""
    for entry in ready:
        if not wiring.doorbell.ring(entry.shard_id, entry.queue):
            return


def find(session: Session, principal: Principal, job_id: str) -> Job:
    job = session.scalar(owned(Job, principal).where(Job.id == job_id))
    if job is None:
        raise no_job(job_id)
    return job


@dataclass(frozen=True)
class Reading:
    """A job as JSON. `version` changes whenever the document does (but for the ETA, which is the last event's)."""

    version: int
    finished: bool
    document: bytes


def read(wiring: Wiring, tenant: str, job_ids: Collection[str]) -> dict[str, Reading]:
    """The tenant's jobs with these ids; ids that are not the tenant's are left out.

    One small query tells their versions; only what has changed since it was last rendered is read and rendered.
    """
    with wiring.database.rows() as connection:
        asked = {"tenant": tenant, "ids": list(job_ids)}
        versions = {row.id: row for row in connection.execute(_VERSIONS, asked)}
        kept = {job_id: wiring.rendered_jobs.get(job_id, row.last_event) for job_id, row in versions.items()}
        documents = {job_id: document for job_id, document in kept.items() if document is not None}
        changed = [job_id for job_id in versions if job_id not in documents]
        if changed:
            for view in _views(
                connection, connection.execute(_JOBS, {"tenant": tenant, "ids": changed}).all()
            ):
                document = view.model_dump_json().encode()
                # Under the version read first: what changed in between is rendered again at the next request.
                wiring.rendered_jobs.put(view.id, versions[view.id].last_event, document)
                documents[view.id] = document
    return {
        job_id: Reading(row.last_event, row.status in lifecycle.FINISHED, documents[job_id])
        for job_id, row in versions.items()
    }


def page(
    wiring: Wiring,
    principal: Principal,
    *,
    limit: int,
    after: str | None,
    status: str | None,
    dataset_id: str | None,
) -> tuple[list[bytes], bool]:
    """The tenant's jobs as JSON documents, newest first, and whether more follow."""
    select = owned(Job, principal).with_only_columns(Job.id)
    if status is not None:
        select = select.where(Job.status == status)
    if dataset_id is not None:
        select = select.where(Job.dataset_id == dataset_id)
    with wiring.database.reading() as session:
        job_ids, has_more = newest(session, select, Job.id, limit=limit, after=after)
    readings = read(wiring, principal.tenant, job_ids)
    return [readings[job_id].document for job_id in job_ids], has_more


def cancel(wiring: Wiring, principal: Principal, job_id: str) -> JobView:
    with wiring.database.writing() as session:
        find(session, principal, job_id)
        job = lifecycle.lock(session, job_id)
        if job.status in lifecycle.FINISHED:
            raise Conflict(
                f"Job {job_id} has ended already ({job.status}); there is nothing to cancel.",
                code="job_finished",
            )
        if job.status != "cancelling":
            lifecycle.request_cancel(session, job)
        session.flush()
        return view(session, job)


def retry(wiring: Wiring, principal: Principal, job_id: str) -> JobView:
    with wiring.database.writing() as session:
        find(session, principal, job_id)
        job = lifecycle.lock(session, job_id)
        if job.status not in ("failed", "cancelled"):
            raise Conflict(
                f"Job {job_id} is {job.status}; only a failed or cancelled job can be retried.",
                code="job_not_retryable",
            )
        if not job.sources:
            raise Gone(
                f"Job {job_id} cannot be retried: its data set was deleted, and its images are gone. Upload them "
                "again, and order a new job.",
                code="images_gone",
            )
        ready = lifecycle.retry(session, job)
        session.flush()
        _check_teacher_remains(wiring, session, principal, job)
        answer = view(session, job)
    announce(wiring, ready)
    return answer


def delete(wiring: Wiring, principal: Principal, job_id: str) -> None:
    """Take a job that has ended out of sight, and what it holds away: but for its student, which stays."""
    with wiring.database.writing() as session:
        find(session, principal, job_id)
        job = lifecycle.lock(session, job_id)
        if job.status not in lifecycle.FINISHED:
            raise Conflict(
                f"Job {job_id} is {job.status}; only a job that has ended can be deleted. Cancel it first.",
                code="job_not_finished",
            )
        for table in (JobEvent, JobMetric):
            session.execute(sa.delete(table).where(table.job_id == job_id))
        outbox.forget(session, job_id)
        session.execute(sa.update(Shard).where(Shard.job_id == job_id).values(checkpoint=sa.null()))
        job.sources, job.deleted_at = {}, read_clock(session)


def events_after(
    wiring: Wiring, principal: Principal, job_id: str, number: int, limit: int
) -> list[EventView]:
    with wiring.database.reading() as session:
        find(session, principal, job_id)
        return [event_view(event) for event in events.after(session, job_id, number, limit)]


def metrics(wiring: Wiring, principal: Principal, job_id: str) -> list[CurvePoint]:
    with wiring.database.reading() as session:
        find(session, principal, job_id)
        order = (JobMetric.stage, JobMetric.shard, JobMetric.name, JobMetric.step)
        rows = session.scalars(sa.select(JobMetric).where(JobMetric.job_id == job_id).order_by(*order))
        return [
            CurvePoint(stage=row.stage, shard=row.shard, name=row.name, step=row.step, value=row.value)
            for row in rows
        ]


def no_job(job_id: str) -> NotFound:
    return NotFound(f"There is no job '{job_id}'.", code="job_not_found")


# ---- rows to answers ------------------------------------------------------------------------------------------


def view(session: Session, job: Job) -> JobView:
    """The job as the API shows it."""
    return _views(session.connection(), [job])[0]


def _views(connection: sa.Connection, jobs: Sequence[Any]) -> list[JobView]:
    stages: dict[str, list[Any]] = {job.id: [] for job in jobs}
    for stage in connection.execute(_STAGES, {"jobs": list(stages)}):
        stages[stage.job_id].append(stage)
    clock = time.time()
    return [_view(job, stages[job.id], clock) for job in jobs]


def _view(job: Any, stages: list[Any], clock: float) -> JobView:
    at = f"/v1/jobs/{job.id}"
    urls = {"self": at, "events": f"{at}/events", "metrics": f"{at}/metrics", "cancel": f"{at}/cancel"}
    if job.student_id:
        urls["student"] = f"/v1/students/{job.student_id}"
    return JobView(
        object="job", id=job.id, status=job.status, attempt=job.attempt, dataset_id=job.dataset_id,
        teacher_id=job.teacher, method=job.method, student=job.student, generator_id=job.generator,
        preset=job.preset, params=job.params,
        seed=job.seed, progress=_progress(job, stages, clock), stages=[_stage_view(stage) for stage in stages],
        error=JobErrorView(**job.error) if job.error else None, student_id=job.student_id, metadata=job.labels,
        urls=urls, created_at=job.created_at, started_at=job.started_at,
        finished_at=job.finished_at,
        queries=Queries(
            budget=job.query_budget, planned=job.queries_planned, spent=job.shown_spent, cached=job.shown_cached
        ),
    )  # fmt: skip


def event_view(event: JobEvent) -> EventView:
    return EventView(id=event.number, type=event.type, data=event.data, created_at=event.created_at)


def _stage_view(stage: Any) -> StageView:
    return StageView(
        name=stage.name, status=stage.status, percent=stage.percent, shards=stage.shards, queue=stage.queue,
        started_at=stage.started_at, finished_at=stage.finished_at,
    )  # fmt: skip


def _progress(job: Any, stages: list[Any], clock: float) -> Progress:
    current = next((stage for stage in stages if stage.status == "running"), None)
    return Progress(
        percent=job.percent,
        stage=current.name if current else None,
        step=current.step if current else None,
        total_steps=current.total if current else None,
        eta=_eta(job, stages, clock),
    )


def _eta(job: Any, stages: list[Any], clock: float) -> float | None:
    """When the job may end, if the rest runs as fast as what its present attempt has done. None before it has."""
    since = job.resumed_at or job.started_at
    if job.status != "running" or since is None:
        return None
    total = sum(stage.weight for stage in stages) or 1.0
    reused = 100 * sum(stage.weight for stage in stages if stage.status == "reused") / total
    done: float = job.percent - max(reused, job.resumed_percent)
    if done < 1.0:
        return None
    return float(clock + (clock - since) * (100 - job.percent) / done)


# ---- checks ---------------------------------------------------------------------------------------------------


def _check_quota(session: Session, principal: Principal, most: int) -> None:
    unfinished = Job.status.not_in(lifecycle.FINISHED)
    active = session.scalar(
        sa.select(sa.func.count()).select_from(owned(Job, principal).where(unfinished).subquery())
    )
    if active is not None and active >= most:
        raise TooMany(
            f"You have {active} unfinished jobs and may have {most}. Wait for one to finish, or cancel one.",
            code="too_many_jobs", headers={"Retry-After": "60"},
        )  # fmt: skip


def _check_teacher_remains(wiring: Wiring, session: Session, principal: Principal, job: Job) -> None:
    """Who has deleted a teacher wants it asked no more."""
    method = METHODS.get(job.method)
    if method is None or not job.teacher.startswith(f"{teachers.PREFIX}_"):
        return
    open_stages = JobStage.status.not_in(lifecycle.DONE)
    names = session.scalars(sa.select(JobStage.name).where(JobStage.job_id == job.id, open_stages))
    if not any(method.stage(name).asks for name in names):
        return
    try:
        teachers.resolve(session, wiring.settings, principal, job.teacher)
    except Invalid:
        raise Conflict(
            f"Job {job.id} has questions left to teacher '{job.teacher}', which was deleted. Order a new job with "
            "another teacher.",
            code="teacher_deleted",
        ) from None


def _replay(session: Session, principal: Principal, used: IdempotencyKey, request: str) -> JobView:
    """The job that was ordered with this key, also if it was deleted since: who sends an order again, because no answer
    came, asks whether it was taken. Raises `Invalid` for another order."""
    if used.request_digest != request:
        raise Invalid(
            f"Idempotency-Key '{used.key}' was used for another order (job {used.resource_id}). Use a new key.",
            code="idempotency_key_reused",
        )
    job = session.scalars(owned(Job, principal, deleted=True).where(Job.id == used.resource_id)).one()
    return view(session, job)


def _store(wiring: Wiring, name: str, document: Any) -> str:
    """Keep a small JSON document as a blob; its digest."""
    known = digest(document)
    if not wiring.blobs.keep(known):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(canonical(document))
            wiring.blobs.put(path)
    return known
