"""A job of one stage to claim, keep and end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa

from app import ids
from app.jobs import claims, lifecycle
from app.jobs.claims import Claim
from app.jobs.tables import Job, JobStage, Shard
from app.tables import Dataset
from app.wiring import Wiring

Submit = Callable[..., str]


def submit_to(wiring: Wiring, shards: int = 1, labels: dict[str, str] | None = None, **columns: Any) -> str:
    """A queued job with ready shards; `columns` of its row. The job's id."""
    with wiring.database.writing() as session:
        dataset = Dataset(
            id=ids.new("ds"), tenant="t", name="d", digest=ids.new("digest"), classes=["a"], splits={},
            smallest_class=2, report={},
        )  # fmt: skip
        session.add(dataset)
        session.flush()
        job = Job(
            id=ids.new("job"), tenant="t", dataset_id=dataset.id, teacher="x", method="toy", student="s",
            preset="draft", params={}, seed=0, labels=labels or {}, sources={}, shape={}, status="queued", attempt=1,
            percent=0.0, last_event=0, **columns,
        )  # fmt: skip
        session.add(job)
        session.flush()
        stage = JobStage(
            id=ids.new("stg"), job_id=job.id, position=0, name="only", key="k", output="trained", needs=[],
            queue="cpu", weight=1.0, params={}, shards=shards, status="waiting",
        )  # fmt: skip
        session.add(stage)
        session.flush()
        for position in range(shards):
            session.add(
                Shard(
                    id=ids.new("shd"), job_id=job.id, stage_id=stage.id, position=position, queue="cpu",
                    key=ids.new("key"), status="waiting",
                )
            )  # fmt: skip
        lifecycle.start(session, job)
    return job.id


def claim_of(wiring: Wiring, job_id: str, worker: str = "w") -> Claim:
    """The claim of the job's first ready shard."""
    with wiring.database.writing() as session:
        ready = sa.select(Shard.id).where(Shard.job_id == job_id, Shard.status == "ready")
        claim, _ = claims.claim(
            session, session.scalars(ready.order_by(Shard.position)).first() or "", worker, wiring.settings
        )
    assert claim is not None
    return claim


def shard_of(wiring: Wiring, job_id: str) -> Shard:
    with wiring.database.reading() as session:
        return session.scalars(
            sa.select(Shard).where(Shard.job_id == job_id).order_by(Shard.position)
        ).first() or pytest.fail("the job has no shard")


def change_shards(wiring: Wiring, **values: Any) -> None:
    with wiring.database.writing() as session:
        session.execute(sa.update(Shard).values(**values))


def status_of(wiring: Wiring, job_id: str) -> str:
    with wiring.database.reading() as session:
        return session.get_one(Job, job_id).status
