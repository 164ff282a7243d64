"""The rules of jobs: what may be ordered, what is read, when a job may be cancelled or retried."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from pydantic import ValidationError
from sqlalchemy.orm import Session

from app import ids
from app.datasets import service as datasets
from app.db import now, owned, owned_rows, upsert
from app.errors import Conflict, Finding, Invalid, NotFound, TooMany
from app.jobs import events, lifecycle, plan
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
    StageView,
)
from app.jobs.tables import IdempotencyKey, Job, JobEvent, JobMetric, JobStage
from app.paging import newest
from app.security.principal import Principal
from app.teachers import service as teachers
from app.wiring import Wiring
from models.methods import METHODS
from models.pipeline import Method, Params, canonical, digest
from models.students import STUDENTS
from models.teachers import TeacherSpec

# What GET job asks, made once: building a statement costs as much as running it.
_ASKED = Job.id.in_(sa.bindparam("ids", expanding=True))
_VERSIONS = owned_rows(Job, only=("id", "last_event", "status")).where(_ASKED)
_JOBS = owned_rows(Job, without=("sources", "shape")).where(_ASKED)
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
    """Check the order, write the job with its stages, and ring for the stages that can start."""
    method, params, teacher = _resolve(wiring, order)
    request = digest(order.model_dump(mode="json"))
    teacher_files = _store(wiring, "teacher.json", teacher.model_dump(mode="json"))
    student_files = _store(wiring, "student.json", {"name": order.student})
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
        sources, shape = _sources(session, principal, order.dataset_id, teacher_files, student_files)
        job = Job(
            id=job_id, tenant=principal.tenant, dataset_id=order.dataset_id, teacher=order.teacher_id,
            method=method.name, student=order.student, preset=order.preset, params=params.model_dump(mode="json"),
            seed=order.seed, labels=order.metadata, sources=sources, shape=plan.shape_document(shape),
            status="queued", attempt=1, percent=0.0, last_event=0, created_at=session.scalar(sa.select(now())),
        )  # fmt: skip
        if order.cancel_after_s is not None:
            job.deadline_at = job.created_at + order.cancel_after_s
        session.add(job)
        session.flush()
        events.append(
            session, job, "job.created", dataset=job.dataset_id, method=job.method, student=job.student
        )
        plan.write(session, job, plan.stages(method, shape, sources, params, order.seed))
        ready = lifecycle.start(session, job)
        session.flush()
        submitted = view(session, job)
    announce(wiring, ready)
    return Submitted(submitted, replayed=False)


def dry_run(wiring: Wiring, principal: Principal, order: JobOrder) -> PlanView:
    """The plan that `submit` would make, and what of it exists already."""
    method, params, teacher = _resolve(wiring, order)
    teacher_files = {"teacher.json": digest(teacher.model_dump(mode="json"))}
    student_files = {"student.json": digest({"name": order.student})}
    with wiring.database.reading() as session:
        sources, shape = _sources(session, principal, order.dataset_id, teacher_files, student_files)
        planned = plan.stages(method, shape, sources, params, order.seed)
        existing = plan.reusable(session, principal.tenant, planned)
    stages = [
        PlannedStageView(
            name=entry.stage.name, key=entry.key, shards=len(entry.shard_keys),
            reused=existing.issuperset(entry.shard_keys),
        )
        for entry in planned
    ]  # fmt: skip
    return PlanView(object="plan", params=params.model_dump(mode="json"), stages=stages)


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
        ready = lifecycle.retry(session, job)
        session.flush()
        answer = view(session, job)
    announce(wiring, ready)
    return answer


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
        teacher_id=job.teacher, method=job.method, student=job.student, preset=job.preset, params=job.params,
        seed=job.seed, progress=_progress(job, stages, clock), stages=[_stage_view(stage) for stage in stages],
        error=JobErrorView(**job.error) if job.error else None, student_id=job.student_id, metadata=job.labels,
        urls=urls, created_at=job.created_at, started_at=job.started_at,
        finished_at=job.finished_at,
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
    """When the job may end, if the rest runs as fast as what this job itself has done. None before it has."""
    if job.status != "running" or job.started_at is None:
        return None
    total = sum(stage.weight for stage in stages) or 1.0
    before = 100 * sum(stage.weight for stage in stages if stage.status == "reused") / total
    done: float = job.percent - before
    if done < 1.0:
        return None
    return float(clock + (clock - job.started_at) * (100 - job.percent) / done)


# ---- checks ---------------------------------------------------------------------------------------------------


def _resolve(wiring: Wiring, order: JobOrder) -> tuple[Method, Params, TeacherSpec]:
    """The method, its parameters and the teacher, or Invalid with every finding at once."""
    findings = []
    method = METHODS.get(order.method)
    if method is None:
        findings.append(_unknown("method", "/method", order.method, list(METHODS)))
    if order.student not in STUDENTS:
        findings.append(_unknown("student", "/student", order.student, list(STUDENTS)))
    catalogue = teachers.catalogue(wiring.settings)
    teacher = catalogue.get(order.teacher_id)
    if teacher is None:
        findings.append(_unknown("teacher", "/teacher_id", order.teacher_id, list(catalogue)))
    params: Params | None = None
    if method is not None:
        try:
            params = method.resolve(order.preset, _overrides(order))
        except ValidationError as error:
            findings += [_parameter_finding(method, problem) for problem in error.errors(include_url=False)]
    if findings or method is None or params is None or teacher is None:
        raise Invalid(
            " ".join(finding.detail for finding in findings), code=findings[0].code, findings=tuple(findings)
        )
    missing = method.needs - teacher.offers
    if missing:
        raise Invalid(
            f"Method '{method.name}' needs {_words(missing)} of its teacher; '{order.teacher_id}' offers only "
            f"{_words(teacher.offers)}. Choose another teacher or method.",
            code="teacher_offers_too_little",
        )
    available = teachers.availability(wiring, [teacher])[teacher.name]
    if not available.available:
        raise Invalid(
            f"Teacher '{order.teacher_id}' cannot be used: {available.reason}", code="teacher_unavailable"
        )
    return method, params, teacher


def _overrides(order: JobOrder) -> dict[str, Any]:
    if order.precision == "fp32":
        return order.params
    export = order.params.get("export", {})
    return order.params | {"export": {**export, "int8": True}} if isinstance(export, dict) else order.params


def _unknown(what: str, pointer: str, given: str, valid: list[str]) -> Finding:
    return Finding(
        f"unknown_{what}", pointer, f"There is no {what} '{given}'; there are: {', '.join(sorted(valid))}."
    )


def _parameter_finding(method: Method, problem: Any) -> Finding:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path)
    if problem["type"] != "extra_forbidden":
        return Finding(
            "parameter_invalid", "/params/" + "/".join(path), f"Parameter '{name}': {problem['msg']}."
        )
    fields: Any = method.params.model_fields
    for part in path[:-1]:
        fields = fields[part].annotation.model_fields
    known = ", ".join(".".join([*path[:-1], field]) for field in fields)
    detail = f"Method '{method.name}' has no parameter '{name}'; there are: {known}."
    return Finding("unknown_parameter", "/params/" + "/".join(path), detail)


def _words(outputs: frozenset[Any]) -> str:
    return ", ".join(sorted(str(output) for output in outputs))


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


def _replay(session: Session, principal: Principal, used: IdempotencyKey, request: str) -> JobView:
    if used.request_digest != request:
        raise Invalid(
            f"Idempotency-Key '{used.key}' was used for another order (job {used.resource_id}). Use a new key.",
            code="idempotency_key_reused",
        )
    return view(session, find(session, principal, used.resource_id))


def _sources(
    session: Session, principal: Principal, dataset_id: str,
    teacher_files: dict[str, str], student_files: dict[str, str],
) -> tuple[dict[str, Any], Any]:  # fmt: skip
    dataset = datasets.get(session, principal, dataset_id)
    sources = {split: {"files": {"images.zip": about["digest"]}} for split, about in dataset.splits.items()}
    sources |= {"teacher": {"files": teacher_files}, "student": {"files": student_files}}
    return sources, plan.shape_of(len(dataset.classes), dataset.smallest_class, dataset.splits)


def _store(wiring: Wiring, name: str, value: Any) -> dict[str, str]:
    """A small JSON document as a blob, as the files of a source."""
    known = digest(value)
    if not wiring.blobs.keep(known):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_bytes(canonical(value))
            wiring.blobs.put(path)
    return {name: known}
