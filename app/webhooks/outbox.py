"""The outbox: what is to be sent is written in the transaction that made it happen, and sent by `delivery`."""

from __future__ import annotations

import json
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from app import ids
from app.db import owned, read_clock
from app.jobs.tables import Job
from app.schemas import moment
from app.security.principal import Principal
from app.webhooks.schemas import EVENTS
from app.webhooks.tables import Webhook, WebhookDelivery

#: Metadata whose JSON is longer is left out: a message is to have less than 20 kB.
_MOST_METADATA = 16_000


def write(session: Session, job: Job, event: str) -> None:
    """Tell every webhook of the job's tenant that wants this event. Part of the write unit of the event."""
    if event not in EVENTS:
        return
    enabled = owned(Webhook, Principal(job.tenant, frozenset())).where(Webhook.disabled_at.is_(None))
    told = [webhook for webhook in session.scalars(enabled) if event in webhook.events]
    if not told:
        return
    clock = read_clock(session)
    payload = {"type": event, "timestamp": timestamp(clock), "data": _data(job)}
    session.add_all(
        WebhookDelivery(
            id=ids.new("msg"), webhook_id=webhook.id, job_id=job.id, event=event, payload=payload, next_at=clock
        )
        for webhook in told
    )  # fmt: skip


def disable(session: Session, webhook: Webhook, clock: float, reason: str) -> None:
    """Its address wants no more: what waits for it is not sent. What is under way ends by itself."""
    webhook.disabled_at = clock
    give_up(session, WebhookDelivery.webhook_id == webhook.id, reason)


def give_up(session: Session, which: sa.ColumnElement[bool], reason: str) -> None:
    """No more attempts for those of these messages that wait."""
    failed = {"status": "failed", "reason": reason, "next_at": None}
    session.execute(
        sa.update(WebhookDelivery).where(which, WebhookDelivery.status == "pending").values(failed)
    )


def forget(session: Session, job_id: str) -> None:
    """Of a job that is deleted nothing more is told."""
    session.execute(sa.delete(WebhookDelivery).where(WebhookDelivery.job_id == job_id))


def timestamp(seconds: float) -> str:
    return moment(seconds).isoformat().replace("+00:00", "Z")


def _data(job: Job) -> dict[str, Any]:
    urls = {"job": f"/v1/jobs/{job.id}"}
    if job.student_id:
        urls["student"] = f"/v1/students/{job.student_id}"
    return {
        "id": job.id,
        "status": job.status,
        "student_id": job.student_id,
        "error_code": job.error["code"] if job.error else None,
        "metadata": job.labels if len(json.dumps(job.labels)) <= _MOST_METADATA else None,
        "urls": urls,
    }
