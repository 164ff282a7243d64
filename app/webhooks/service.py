"""The rules of webhooks: where they may lead, how many there are, and how their secrets change."""

from __future__ import annotations

from dataclasses import dataclass

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from app import ids, paging
from app.db import owned, read_clock
from app.errors import Conflict, Finding, Invalid, NotFound
from app.security.egress import Egress, Refused
from app.security.principal import Principal
from app.security.secretbox import SecretBox
from app.webhooks import outbox, sending
from app.webhooks.schemas import WebhookOrder
from app.webhooks.sending import GONE, Outcome
from app.webhooks.tables import Webhook, WebhookDelivery
from app.wiring import Wiring
from models.errors import Unreachable

log = structlog.get_logger()

MOST_WEBHOOKS = 20
_MOST_OLD_SECRETS = 4


@dataclass(frozen=True)
class Issued:
    """A webhook with a new secret, which is shown once and can never be had again."""

    webhook: Webhook
    secret: str


def create(wiring: Wiring, principal: Principal, order: WebhookOrder) -> Issued:
    """Raises `Invalid` for an address that will not be asked, `Conflict` where there are enough, `Unavailable` where
    secrets cannot be encrypted."""
    _check(wiring, order.url)
    webhook_id, secret = ids.new("wh"), sending.new_secret()
    row = Webhook(
        id=webhook_id,
        tenant=principal.tenant,
        title=order.title,
        url=order.url,
        events=sorted(set(order.events)),
        secret=_sealed(wiring, secret, webhook_id),
        old_secrets={},
        disabled_at=None,
    )
    with wiring.database.writing() as session:
        count = sa.select(sa.func.count()).select_from(owned(Webhook, principal).subquery())
        if (session.scalar(count) or 0) >= MOST_WEBHOOKS:
            raise Conflict(
                f"You have {MOST_WEBHOOKS} webhooks, which is the most. Delete one that you do not need.",
                code="too_many_webhooks",
            )
        session.add(row)
    log.info("webhook_created", webhook=row.id)
    return Issued(row, secret)


def page(session: Session, principal: Principal, limit: int, after: str | None) -> tuple[list[Webhook], bool]:
    return paging.newest(session, owned(Webhook, principal), Webhook.id, limit=limit, after=after)


def get(session: Session, principal: Principal, webhook_id: str) -> Webhook:
    """Raises `NotFound`."""
    return _found(session, owned(Webhook, principal), webhook_id)


def lock(session: Session, principal: Principal, webhook_id: str) -> Webhook:
    """Like `get`; until the write unit ends nobody else changes the webhook, or what is sent to it."""
    return _found(session, owned(Webhook, principal).with_for_update(), webhook_id)


def delete(wiring: Wiring, principal: Principal, webhook_id: str) -> None:
    """Take it away with its secrets and messages. What is being sent just now still arrives."""
    with wiring.database.writing() as session:
        webhook = lock(session, principal, webhook_id)
        session.execute(sa.delete(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id))
        session.delete(webhook)
    log.info("webhook_deleted", webhook=webhook_id)


def replace_secret(wiring: Wiring, principal: Principal, webhook_id: str, overlap_s: float) -> Issued:
    """A new secret; for `overlap_s` messages are signed with the old one, too. 0: with none but the new one at once."""
    secret = sending.new_secret()
    sealed = _sealed(wiring, secret, webhook_id)
    with wiring.database.writing() as session:
        webhook = lock(session, principal, webhook_id)
        clock = read_clock(session)
        signing = sending.valid({**webhook.old_secrets, webhook.secret: clock + overlap_s}, clock)
        newest = sorted(signing, key=signing.__getitem__)[-_MOST_OLD_SECRETS:] if overlap_s else []
        webhook.old_secrets = {old: signing[old] for old in newest}
        webhook.secret = sealed
    log.info("webhook_secret_replaced", webhook=webhook_id)
    return Issued(webhook, secret)


def try_out(wiring: Wiring, principal: Principal, webhook_id: str) -> Outcome:
    """Send a message of type `webhook.test` now. One that is received enables a disabled webhook; 410 disables it."""
    with wiring.database.reading() as session:
        webhook = get(session, principal, webhook_id)
        clock = read_clock(session)
    payload = {
        "type": "webhook.test",
        "timestamp": outbox.timestamp(clock),
        "data": {"webhook_id": webhook_id},
    }
    keys = sending.open_secrets(wiring.settings, webhook, clock)
    egress = Egress(wiring.settings.egress_allow)
    outcome = sending.send(egress, webhook.url, keys, ids.new("msg"), payload, clock)
    gone = outcome.http_status == GONE
    if gone or (not outcome.reason and webhook.disabled_at is not None):
        with wiring.database.writing() as session:
            webhook = lock(session, principal, webhook_id)
            webhook.disabled_at = None
            if gone:
                outbox.disable(session, webhook, clock, outcome.reason)
    return outcome


def deliveries(
    session: Session, principal: Principal, webhook_id: str, limit: int, after: str | None
) -> tuple[list[WebhookDelivery], bool]:
    """What was and is to be sent to it, newest first. Raises `NotFound`."""
    get(session, principal, webhook_id)
    select = sa.select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook_id)
    return paging.newest(session, select, WebhookDelivery.id, limit=limit, after=after)


def send_again(wiring: Wiring, principal: Principal, webhook_id: str, delivery_id: str) -> WebhookDelivery:
    """Begin a message's attempts anew, whatever came of it. Raises `NotFound`, and `Conflict` while the webhook is
    disabled or the message under way."""
    with wiring.database.writing() as session:
        webhook = lock(session, principal, webhook_id)
        same = (WebhookDelivery.webhook_id == webhook_id) & (WebhookDelivery.id == delivery_id)
        row = session.scalar(sa.select(WebhookDelivery).where(same).with_for_update())
        if row is None:
            raise NotFound(
                f"There is no message '{delivery_id[:64]}' to webhook '{webhook_id}'. "
                f"GET /v1/webhooks/{webhook_id}/deliveries lists them."
            )
        if webhook.disabled_at is not None:
            raise Conflict(
                f"Webhook '{webhook_id}' was disabled, because its address answered 410 Gone. "
                f"POST /v1/webhooks/{webhook_id}/test enables it again where the answer is 2xx.",
                code="webhook_disabled",
            )
        clock = read_clock(session)
        if row.status == "sending" and (row.next_at or 0.0) > clock:
            raise Conflict(
                f"Message '{delivery_id}' is being sent just now. "
                f"GET /v1/webhooks/{webhook_id}/deliveries says what comes of it.",
                code="message_under_way",
            )
        row.status, row.attempts, row.next_at = "pending", 0, clock
        row.http_status, row.reason = None, ""
    return row


def _found(session: Session, select: sa.Select[Webhook], webhook_id: str) -> Webhook:
    webhook = session.scalar(select.where(Webhook.id == webhook_id))
    if webhook is None:
        raise NotFound(f"There is no webhook '{webhook_id[:64]}'. GET /v1/webhooks lists yours.")
    return webhook


def _check(wiring: Wiring, url: str) -> None:
    try:
        Egress(wiring.settings.egress_allow).check(url)
    except Unreachable as error:
        detail = f"{sending.told(error)} {error.hint}".strip()
        raise Invalid(f"/url: {detail}", findings=(Finding(Refused.code, "/url", detail),)) from None


def _sealed(wiring: Wiring, secret: str, webhook_id: str) -> str:
    return SecretBox.sealing(wiring.settings).seal(secret.encode(), webhook_id)
