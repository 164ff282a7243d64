"""Orders and answers about webhooks."""

from __future__ import annotations

from typing import Literal, get_args

from pydantic import Field

from app.schemas import Answer, Order, Time

#: What a webhook may be told, by the names that a job's events have.
Event = Literal["job.started", "job.succeeded", "job.failed", "job.cancelled"]
EVENTS: tuple[Event, ...] = get_args(Event)
_ENDS: list[Event] = ["job.succeeded", "job.failed", "job.cancelled"]


class WebhookOrder(Order):
    url: str = Field(
        min_length=1, max_length=2000, description="Public https address that messages are posted to."
    )
    events: list[Event] = Field(
        _ENDS, min_length=1, max_length=20, description="What to be told. Left out: how jobs end."
    )
    title: str = Field("", max_length=200, description="What people call it.")


class WebhookAnswer(Answer):
    object: Literal["webhook"]
    id: str
    title: str
    url: str = Field(description="The values of its parameters left out.")
    events: list[Event]
    old_secret_until: Time | None = Field(
        description="Until then messages are signed with a secret before this, too; null: there was none."
    )
    disabled_at: Time | None = Field(
        description="When its address answered 410 Gone: since then nothing is sent. A test that is answered with a "
        "2xx status enables it again."
    )
    created_at: Time


class NewSecret(WebhookAnswer):
    secret: str = Field(description="Signs the messages, see docs/webhooks.md. It is shown this once.")


class WebhookTestAnswer(Answer):
    """What came of a message of type `webhook.test`."""

    object: Literal["webhook_test"]
    webhook_id: str
    ok: bool = Field(description="Whether it was answered with a 2xx status.")
    http_status: int | None = Field(description="null: there was no answer.")
    reason: str = Field(description="What is wrong; empty where it is ok.")


class DeliveryAnswer(Answer):
    """A message. It counts as received when it is answered with a 2xx status."""

    object: Literal["webhook_delivery"]
    id: str = Field(description="The same in each attempt, as the header `webhook-id`.")
    webhook_id: str
    job_id: str
    event: Event
    status: Literal["pending", "sending", "succeeded", "failed"]
    attempts: int
    next_attempt_at: Time | None = Field(
        description="null: there will be none. While it is being sent: if the service does not live to see the answer."
    )
    http_status: int | None = Field(description="Of the last attempt; null: there was no answer.")
    reason: str = Field(description="Why the last attempt failed, else empty.")
    created_at: Time
