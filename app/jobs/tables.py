"""Jobs, their stages and shards, what they made, and what happened. The database is the truth."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, now


class Job(Base):
    __tablename__ = "jobs"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(index=True)
    dataset_id: Mapped[str] = mapped_column(sa.ForeignKey("datasets.id"))
    teacher: Mapped[str]
    method: Mapped[str]
    student: Mapped[str]
    generator: Mapped[str | None]  # None: the method reads none
    preset: Mapped[str]
    params: Mapped[dict[str, Any]]
    seed: Mapped[int]
    labels: Mapped[dict[str, Any]]  # the caller's own metadata
    #: Source -> {"files": {name: blob digest}}; empty: let go of, with the data set.
    sources: Mapped[dict[str, Any]]
    shape: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(index=True)
    percent: Mapped[float] = mapped_column(default=0.0)
    attempt: Mapped[int] = mapped_column(default=1)
    error: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    student_id: Mapped[str | None]
    last_event: Mapped[int] = mapped_column(default=0)  # number of the newest event
    query_budget: Mapped[int | None]  # most questions to the teacher
    queries_planned: Mapped[int | None]  # None: the method asks no black box
    queries_spent: Mapped[int] = mapped_column(default=0, server_default=sa.text("0"))
    queries_cached: Mapped[int] = mapped_column(default=0, server_default=sa.text("0"))
    # The two as they were at the newest event, which is how the API shows them.
    shown_spent: Mapped[int] = mapped_column(default=0, server_default=sa.text("0"))
    shown_cached: Mapped[int] = mapped_column(default=0, server_default=sa.text("0"))
    created_at: Mapped[float] = mapped_column(default=now())
    started_at: Mapped[float | None]
    # When the job last left the queue and how far it was then: its end is reckoned from there.
    resumed_at: Mapped[float | None]
    resumed_percent: Mapped[float] = mapped_column(default=0.0, server_default=sa.text("0"))
    finished_at: Mapped[float | None]
    deadline_at: Mapped[float | None]
    deleted_at: Mapped[float | None]


class JobStage(Base):
    __tablename__ = "job_stages"
    __table_args__ = (sa.UniqueConstraint("job_id", "position"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id"), index=True)
    position: Mapped[int]
    name: Mapped[str]
    key: Mapped[str]
    output: Mapped[str]
    needs: Mapped[list[Any]]  # outputs of other stages that must exist first
    queue: Mapped[str]
    weight: Mapped[float]
    params: Mapped[dict[str, Any]]
    shards: Mapped[int]
    status: Mapped[str]  # waiting, ready, running, succeeded, reused, failed, cancelled
    percent: Mapped[float] = mapped_column(default=0.0)
    step: Mapped[int] = mapped_column(default=0)  # summed over its shards
    total: Mapped[int] = mapped_column(default=0)
    started_at: Mapped[float | None]
    finished_at: Mapped[float | None]


class Shard(Base):
    """The unit of work: what one worker claims. `epoch` is the fencing token of the newest claim."""

    __tablename__ = "shards"
    __table_args__ = (sa.Index("ix_shards_status_lease_until", "status", "lease_until"),)

    id: Mapped[str] = mapped_column(primary_key=True)
    job_id: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id"), index=True)
    stage_id: Mapped[str] = mapped_column(sa.ForeignKey("job_stages.id"), index=True)
    position: Mapped[int]
    key: Mapped[str] = mapped_column(index=True)
    queue: Mapped[str]
    status: Mapped[str]  # waiting, ready, running, succeeded, reused, failed, cancelled
    epoch: Mapped[int] = mapped_column(default=0)
    attempt: Mapped[int] = mapped_column(default=0)
    worker: Mapped[str | None]
    lease_until: Mapped[float | None]
    ready_at: Mapped[float | None]
    rung_at: Mapped[float | None]
    rings: Mapped[int] = mapped_column(default=0)
    step: Mapped[int] = mapped_column(default=0)
    total: Mapped[int] = mapped_column(default=0)
    step_at: Mapped[float | None]
    checkpoint: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))  # {"step", "files"}


class StageOutput(Base):
    """What a shard made, by its key: found again by any later job of the tenant with the same key."""

    __tablename__ = "stage_outputs"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    files: Mapped[dict[str, Any]]  # name -> blob digest
    bytes: Mapped[int]
    facts: Mapped[dict[str, Any] | None] = mapped_column(
        sa.JSON(none_as_null=True)
    )  # of the student; bundle only
    created_at: Mapped[float] = mapped_column(default=now())
    used_at: Mapped[float] = mapped_column(default=now())


class TeacherAnswer(Base):
    """What a black-box teacher answered to an image: asked again by no later job of the tenant."""

    __tablename__ = "teacher_answers"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    teacher: Mapped[str] = mapped_column(primary_key=True)  # key of its answers, see BlackBoxSpec.answers_key
    image: Mapped[str] = mapped_column(primary_key=True)  # digest of its pixels
    answer: Mapped[bytes]  # float32 [C], see models.teachers.ledger
    job_id: Mapped[str]  # that paid for it
    created_at: Mapped[float] = mapped_column(default=now())
    used_at: Mapped[float] = mapped_column(default=now(), index=True)


class JobEvent(Base):
    __tablename__ = "job_events"

    job_id: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id"), primary_key=True)
    number: Mapped[int] = mapped_column(primary_key=True)
    type: Mapped[str]
    data: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(default=now())


class JobMetric(Base):
    """A point of a training curve. A resumed stage writes the same points again: the newest stands."""

    __tablename__ = "job_metrics"

    job_id: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id"), primary_key=True)
    stage: Mapped[str] = mapped_column(primary_key=True)
    shard: Mapped[int] = mapped_column(primary_key=True)
    name: Mapped[str] = mapped_column(primary_key=True)
    step: Mapped[int] = mapped_column(primary_key=True)
    value: Mapped[float]


class IdempotencyKey(Base):
    __tablename__ = "idempotency_keys"

    tenant: Mapped[str] = mapped_column(primary_key=True)
    key: Mapped[str] = mapped_column(primary_key=True)
    request_digest: Mapped[str]
    resource_id: Mapped[str]
    created_at: Mapped[float] = mapped_column(default=now())


#: A worker that has not been seen for so many seconds is not counted as alive.
WORKER_SILENCE_S = 60.0


class Worker(Base):
    """A worker process that is alive; its row is what readiness looks at."""

    __tablename__ = "workers"

    id: Mapped[str] = mapped_column(primary_key=True)
    queues: Mapped[list[Any]]
    device: Mapped[str]
    #: Teacher -> [available, reason] as the worker sees it; None until it has looked.
    teachers: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    #: The same of generators.
    generators: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))
    started_at: Mapped[float] = mapped_column(default=now())
    seen_at: Mapped[float] = mapped_column(default=now())
