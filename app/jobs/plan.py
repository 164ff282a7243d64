"""From an order to rows: which stages and shards a job has, under which keys, and what need not run again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import ids
from app.db import now
from app.jobs import events
from app.jobs.tables import Job, JobStage, Shard, StageOutput
from models.pipeline import JobShape, Method, Params, PlannedStage, inputs_of

#: The file that says what a teacher is; an ONNX file of a user's lies beside it.
TEACHER_FILE = "teacher.json"


def stages(
    method: Method, shape: JobShape, sources: Mapping[str, Mapping[str, Any]], params: Params, seed: int
) -> tuple[PlannedStage, ...]:
    """The method's stages for these sources (`{"support": {"files": {name: blob}}}`, …)."""
    return method.plan(shape, {name: _key(source["files"]) for name, source in sources.items()}, params, seed)


def _key(files: Mapping[str, str]) -> str:
    """A source is one file, and its content is its key. A teacher's names what else lies beside it."""
    if TEACHER_FILE in files:
        return files[TEACHER_FILE]
    (key,) = files.values()
    return key


def reusable(session: Session, tenant: str, planned: tuple[PlannedStage, ...]) -> set[str]:
    """Those shard keys whose output the tenant already has."""
    return set(session.scalars(sa.select(StageOutput.key).where(_outputs(tenant, planned))))


def write(session: Session, job: Job, planned: tuple[PlannedStage, ...]) -> None:
    """Write the job's stage and shard rows; what exists already is marked reused."""
    # Found by marking them as used, so that retention cannot take one away in between.
    used = sa.update(StageOutput).where(_outputs(job.tenant, planned)).values(used_at=now())
    existing = set(session.scalars(used.returning(StageOutput.key)))
    made = {entry.stage.output for entry in planned}
    stages, shards = [], []
    for position, entry in enumerate(planned):
        reused = existing.issuperset(entry.shard_keys)
        stage_id = ids.new("stg")
        needs = [name for name in inputs_of(entry.stage, made) if name in made]
        stages.append(
            {
                "id": stage_id, "job_id": job.id, "position": position, "name": entry.stage.name, "key": entry.key,
                "output": entry.stage.output, "needs": needs, "queue": entry.stage.queue,
                "weight": entry.stage.weight, "params": entry.params, "shards": len(entry.shard_keys),
                "status": "reused" if reused else "waiting", "percent": 100.0 if reused else 0.0,
            }
        )  # fmt: skip
        shards += [
            {
                "id": ids.new("shd"), "job_id": job.id, "stage_id": stage_id, "position": index, "key": key,
                "queue": entry.stage.queue, "status": "reused" if key in existing else "waiting",
            }
            for index, key in enumerate(entry.shard_keys)
        ]  # fmt: skip
        if reused:
            events.append(session, job, "stage.reused", stage=entry.stage.name)
    session.execute(sa.insert(JobStage), stages)
    session.execute(sa.insert(Shard), shards)


def _outputs(tenant: str, planned: tuple[PlannedStage, ...]) -> sa.ColumnElement[bool]:
    keys = [key for stage in planned for key in stage.shard_keys]
    return sa.and_(StageOutput.tenant == tenant, StageOutput.key.in_(keys))


def shape_of(classes: int, smallest_class: int, splits: Mapping[str, Mapping[str, Any]]) -> JobShape:
    """Counts of a data set that decide the plan."""
    counts = {name: int(split["images"]) for name, split in splits.items()}
    return JobShape(
        classes=classes,
        support=counts.get("support", 0),
        smallest_class=smallest_class,
        unlabelled=counts.get("unlabelled", 0),
        test=counts.get("test", 0),
    )


def shape_document(shape: JobShape) -> dict[str, int]:
    return asdict(shape)
