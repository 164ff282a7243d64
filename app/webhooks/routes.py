"""Webhooks over HTTP: who is told how jobs end, instead of asking."""

from __future__ import annotations

from functools import cache
from typing import Annotated

import anyio
import anyio.to_thread
from fastapi import APIRouter, Query, Response

from app.paging import Limit, Page
from app.problem import documented
from app.schemas import shown_url
from app.security.dependencies import Wired, allowed
from app.security.principal import Principal
from app.webhooks import service
from app.webhooks.schemas import DeliveryAnswer, NewSecret, WebhookAnswer, WebhookOrder, WebhookTestAnswer
from app.webhooks.service import Issued
from app.webhooks.tables import Webhook, WebhookDelivery

router = APIRouter(prefix="/v1/webhooks", tags=["webhooks"])

Reader = Annotated[Principal, allowed("webhooks:read")]
Writer = Annotated[Principal, allowed("webhooks:write")]
Overlap = Annotated[
    float,
    Query(
        ge=0, le=86400, description="So long, in seconds, the old secret signs, too. 0: it is out at once."
    ),
]

#: What is looked up or asked for one tenant at the same time, by each gateway process; more waits.
_MOST_AT_ONCE = 4


@cache
def _room(tenant: str) -> anyio.CapacityLimiter:
    return anyio.CapacityLimiter(_MOST_AT_ONCE)


@router.post("", status_code=201, responses=documented(409, 503))
async def create(order: WebhookOrder, wiring: Wired, principal: Writer, response: Response) -> NewSecret:
    """Be told of events of your jobs. The answer is the only place where the signing secret ever appears."""
    room = _room(principal.tenant)
    issued = await anyio.to_thread.run_sync(service.create, wiring, principal, order, limiter=room)
    response.headers["Location"] = f"/v1/webhooks/{issued.webhook.id}"
    return _with_secret(issued)


@router.get("")
def index(
    wiring: Wired, principal: Reader, limit: Limit = 20, after: str | None = None
) -> Page[WebhookAnswer]:
    """Your webhooks, newest first."""
    with wiring.database.reading() as session:
        webhooks, more = service.page(session, principal, limit, after)
    return Page(data=[_answer(webhook) for webhook in webhooks], has_more=more)


@router.get("/{webhook_id}", responses=documented(404))
def show(webhook_id: str, wiring: Wired, principal: Reader) -> WebhookAnswer:
    with wiring.database.reading() as session:
        return _answer(service.get(session, principal, webhook_id))


@router.delete("/{webhook_id}", status_code=204, responses=documented(404))
def delete(webhook_id: str, wiring: Wired, principal: Writer) -> None:
    """Take a webhook away with its secret, and what was still to be sent to it."""
    service.delete(wiring, principal, webhook_id)


@router.post("/{webhook_id}/secret", responses=documented(404, 503))
def replace_secret(
    webhook_id: str, wiring: Wired, principal: Writer, overlap_s: Overlap = 86400
) -> NewSecret:
    """Make a new secret. For a while messages carry a signature of the old one, too."""
    return _with_secret(service.replace_secret(wiring, principal, webhook_id, overlap_s))


@router.post("/{webhook_id}/test", responses=documented(404, 503))
async def try_out(webhook_id: str, wiring: Wired, principal: Writer) -> WebhookTestAnswer:
    """Send a message of type `webhook.test` now, once, and say what came back."""
    room = _room(principal.tenant)
    outcome = await anyio.to_thread.run_sync(service.try_out, wiring, principal, webhook_id, limiter=room)
    return WebhookTestAnswer(
        object="webhook_test",
        webhook_id=webhook_id,
        ok=not outcome.reason,
        http_status=outcome.http_status,
        reason=outcome.reason,
    )


@router.get("/{webhook_id}/deliveries", responses=documented(404))
def deliveries(
    webhook_id: str, wiring: Wired, principal: Reader, limit: Limit = 20, after: str | None = None
) -> Page[DeliveryAnswer]:
    """The messages to a webhook, newest first, and what became of them."""
    with wiring.database.reading() as session:
        rows, more = service.deliveries(session, principal, webhook_id, limit, after)
    return Page(data=[_delivery(row) for row in rows], has_more=more)


@router.post("/{webhook_id}/deliveries/{delivery_id}/retry", status_code=202, responses=documented(404, 409))
def send_again(webhook_id: str, delivery_id: str, wiring: Wired, principal: Writer) -> DeliveryAnswer:
    """Send a message again, under the same `webhook-id`; its attempts are counted anew."""
    return _delivery(service.send_again(wiring, principal, webhook_id, delivery_id))


def _answer(webhook: Webhook) -> WebhookAnswer:
    until = max(webhook.old_secrets.values(), default=None)
    shown = {"object": "webhook", "url": shown_url(webhook.url), "old_secret_until": until}
    return WebhookAnswer.model_validate({**vars(webhook), **shown})


def _with_secret(issued: Issued) -> NewSecret:
    return NewSecret(**_answer(issued.webhook).model_dump(), secret=issued.secret)


def _delivery(row: WebhookDelivery) -> DeliveryAnswer:
    shown = {"object": "webhook_delivery", "next_attempt_at": row.next_at}
    return DeliveryAnswer.model_validate({**vars(row), **shown})
