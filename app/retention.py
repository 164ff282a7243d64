"""Forgets what nobody needs any more: old stage outputs, teachers' answers, idempotency keys, worker rows, messages
to webhooks; the images of deleted data sets; and blobs without a row."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from app.datasets.tables import Dataset, DatasetImage
from app.db import now
from app.jobs.lifecycle import DONE, FINISHED
from app.jobs.tables import IdempotencyKey, Job, Shard, StageOutput, TeacherAnswer, Worker
from app.storage import YOUNG_S
from app.students.tables import Student
from app.teachers.tables import Teacher
from app.webhooks import outbox
from app.webhooks.tables import Webhook, WebhookDelivery
from app.wiring import Wiring

log = structlog.get_logger()

_WORKER_MEMORY_S = 3600.0


def sweep(wiring: Wiring) -> int:
    """Delete old rows, then the blobs that no row names. Returns how many blobs went."""
    age = wiring.settings.retention_days * 86400
    with wiring.database.writing() as session:
        in_use = sa.select(Shard.key).join(Job, Shard.job_id == Job.id).where(Job.status.not_in(FINISHED))
        old = sa.and_(StageOutput.used_at < now() - age, StageOutput.key.not_in(in_use))
        session.execute(sa.delete(StageOutput).where(old))
        session.execute(sa.delete(TeacherAnswer).where(TeacherAnswer.used_at < now() - age))
        session.execute(sa.delete(IdempotencyKey).where(IdempotencyKey.created_at < now() - age))
        disabled = sa.select(Webhook.id).where(
            Webhook.disabled_at.is_not(None)
        )  # just when they were written
        outbox.give_up(session, WebhookDelivery.webhook_id.in_(disabled), "The webhook is disabled.")
        ended = WebhookDelivery.status.in_(("succeeded", "failed"))
        sent = sa.and_(ended, WebhookDelivery.created_at < now() - age)
        to_nobody = WebhookDelivery.webhook_id.not_in(sa.select(Webhook.id))
        session.execute(sa.delete(WebhookDelivery).where(sent | to_nobody))
        session.execute(sa.delete(Worker).where(Worker.seen_at < now() - _WORKER_MEMORY_S))
        _let_go(session, sa.and_(Job.status.in_(FINISHED), Job.finished_at < now() - age))
    candidates = list(wiring.blobs.older_than(YOUNG_S))
    with wiring.database.reading() as session:
        named = set(_named(session))
    swept = sum(wiring.blobs.forget(digest, YOUNG_S) for digest in candidates if digest not in named)
    wiring.blobs.tidy()
    log.info("swept", blobs=swept)
    return swept


def _let_go(session: Session, ended: sa.ColumnElement[bool]) -> None:
    """Jobs that ended long ago keep no checkpoint, nor what deleted data sets were made of: they cannot be retried."""
    long_ago = Shard.job_id.in_(sa.select(Job.id).where(ended))
    session.execute(
        sa.update(Shard).where(Shard.checkpoint.is_not(None), long_ago).values(checkpoint=sa.null())
    )
    deleted = sa.select(Dataset.id).where(Dataset.deleted_at.is_not(None))
    held = sa.cast(Job.sources, sa.String) != "{}"
    session.execute(sa.update(Job).where(ended, held, Job.dataset_id.in_(deleted)).values(sources={}))
    session.execute(sa.delete(DatasetImage).where(DatasetImage.dataset_id.in_(deleted)))


def _named(session: Session) -> Iterable[str]:
    """Every digest that a row names."""
    for splits in session.scalars(sa.select(Dataset.splits).where(Dataset.deleted_at.is_(None))):
        yield from (split["digest"] for split in splits.values())
    for files in session.scalars(sa.select(Teacher.files).where(Teacher.deleted_at.is_(None))):
        yield from files.values()
    for sources in session.scalars(sa.select(Job.sources)):
        yield from (digest for source in sources.values() for digest in source["files"].values())
    for files in session.scalars(sa.select(StageOutput.files)):
        yield from files.values()
    for files in session.scalars(sa.select(Student.files).where(Student.deleted_at.is_(None))):
        yield from files.values()
    unfinished = sa.and_(Shard.checkpoint.is_not(None), Shard.status.not_in(DONE))
    for checkpoint in session.scalars(sa.select(Shard.checkpoint).where(unfinished)):
        yield from _checkpoint_digests(checkpoint)


def _checkpoint_digests(checkpoint: dict[str, Any] | None) -> Iterable[str]:
    while checkpoint:
        yield from checkpoint["files"].values()
        checkpoint = checkpoint.get("previous")
