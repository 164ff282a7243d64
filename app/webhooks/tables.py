"""Webhooks, and what is or was to be sent to them."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, now


class Webhook(Base):
    __tablename__ = "webhooks"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(index=True)
    title: Mapped[str]
    url: Mapped[str]
    events: Mapped[list[Any]]
    secret: Mapped[str]  # sealed by app.security.secretbox, as are those before it
    old_secrets: Mapped[dict[str, Any]]  # which sign, too -> until when
    disabled_at: Mapped[float | None]  # its address answered 410 Gone
    created_at: Mapped[float] = mapped_column(default=now())


class WebhookDelivery(Base):
    """A message to one webhook; its id is the `webhook-id` of every attempt.

    No foreign keys: what ends a job never waits for, or fails by, a webhook that is deleted at the same moment. A
    message whose webhook is gone is sent no more, and forgotten by retention.
    """

    __tablename__ = "webhook_deliveries"
    __table_args__ = (
        sa.Index("ix_webhook_deliveries_status_next_at", "status", "next_at"),
        sa.Index("ix_webhook_deliveries_webhook_id_status_next_at", "webhook_id", "status", "next_at"),
    )

    id: Mapped[str] = mapped_column(primary_key=True)
    webhook_id: Mapped[str]
    job_id: Mapped[str] = mapped_column(index=True)
    event: Mapped[str]
    payload: Mapped[dict[str, Any]]
    status: Mapped[str] = mapped_column(default="pending")  # pending, sending, succeeded, failed
    attempts: Mapped[int] = mapped_column(default=0)
    #: When it may be sent; while it is being sent, when another process may take it. None: no more.
    next_at: Mapped[float | None]
    http_status: Mapped[int | None]  # of the last attempt's answer
    reason: Mapped[str] = mapped_column(default="")  # why the last attempt failed
    created_at: Mapped[float] = mapped_column(default=now())
