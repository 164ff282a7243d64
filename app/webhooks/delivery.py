"""Sends what the outbox holds, again and again until it is received or given up.

A message is claimed by compare-and-set until a moment of the database's clock, so several processes may send; where
one dies, another sends the message again: it arrives at least once. Nobody waits for a slow address but its own
webhook: of each webhook and each tenant only so many messages are under way at the same time.
"""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from app.db import Database, now
from app.errors import Unavailable
from app.security.egress import Egress
from app.webhooks import sending
from app.webhooks.sending import GONE, Outcome
from app.webhooks.tables import Webhook, WebhookDelivery
from app.wiring import Wiring

log = structlog.get_logger()

#: Pauses between attempts in seconds: Standard Webhooks' schedule as far as its eighth attempt, after 32 hours.
PAUSES_S = (5, 300, 1800, 2 * 3600, 5 * 3600, 10 * 3600, 14 * 3600)
#: Each is made shorter or longer by up to this share, so that what failed together is not tried again together.
_JITTER = 0.2
_LONGEST_PAUSE_S = 86400.0
#: Longer than an attempt can take: until then no other process takes the message.
_CLAIM_S = 120.0
_MOST, _MOST_OF_A_TENANT, _MOST_OF_A_WEBHOOK = 16, 4, 2
_POLL_S = 1.0
#: What is under way when the process is to end has so long to end, too.
_GRACE_S = 5.0


@dataclass(frozen=True, eq=False)
class Claim:
    """The right to send a message until the database's clock says `until`."""

    delivery_id: str
    event: str
    payload: dict[str, Any]
    webhook: Webhook
    clock: float
    until: float


def claim(database: Database, under_way: Collection[Claim], most: int = _MOST) -> list[Claim]:
    """Take up to `most` messages that are due, the longest due first. `under_way`: what this process sends already."""
    with database.reading() as session:  # mostly there is nothing, and nobody is to wait for a write unit
        if session.execute(_due(now(), under_way)).first() is None:
            return []
    claims: list[Claim] = []
    with database.writing() as session:
        clock = session.scalar(sa.select(now())) or 0.0
        while len(claims) < most:
            due = _due(clock, [*under_way, *claims])
            row = session.execute(due.with_for_update(of=WebhookDelivery, skip_locked=True)).first()
            if row is None:
                break
            delivery, webhook = row
            delivery.attempts += 1
            delivery.next_at = clock + _CLAIM_S
            claims.append(
                Claim(delivery.id, delivery.event, delivery.payload, webhook, clock, delivery.next_at)
            )
    return claims


def record(database: Database, held: Claim, outcome: Outcome) -> None:
    """Write down what came of an attempt, unless the message was meanwhile deleted or claimed again."""
    with database.writing() as session:
        webhook = session.get(Webhook, held.webhook.id, with_for_update=True)
        same = (WebhookDelivery.id == held.delivery_id) & (WebhookDelivery.next_at == held.until)
        row = session.scalar(sa.select(WebhookDelivery).where(same).with_for_update())
        if webhook is None or row is None:
            return
        clock = session.scalar(sa.select(now())) or 0.0
        row.http_status, row.reason = outcome.http_status, outcome.reason
        if not outcome.reason:
            row.status, row.next_at = "succeeded", None
        elif outcome.http_status == GONE:
            webhook.disabled_at = clock
            _give_up(session, webhook.id, outcome.reason)
        elif row.attempts > len(PAUSES_S):
            row.status, row.next_at = "failed", None
        else:
            pause = PAUSES_S[row.attempts - 1] * random.uniform(1 - _JITTER, 1 + _JITTER)
            row.next_at = clock + min(max(pause, outcome.after_s), _LONGEST_PAUSE_S)


def _due(clock: Any, under_way: Collection[Claim]) -> sa.Select[WebhookDelivery, Webhook]:
    """The message that is due for longest, of tenants and webhooks that may have one more under way."""
    tenants = Counter(held.webhook.tenant for held in under_way)
    webhooks = Counter(held.webhook.id for held in under_way)
    busy_tenants = [tenant for tenant, count in tenants.items() if count >= _MOST_OF_A_TENANT]
    busy_webhooks = [webhook for webhook, count in webhooks.items() if count >= _MOST_OF_A_WEBHOOK]
    return (
        sa.select(WebhookDelivery, Webhook)
        .join(Webhook, Webhook.id == WebhookDelivery.webhook_id)
        .where(WebhookDelivery.status == "pending", WebhookDelivery.next_at <= clock)
        .where(Webhook.disabled_at.is_(None), Webhook.tenant.not_in(busy_tenants))
        .where(Webhook.id.not_in(busy_webhooks))
        .order_by(WebhookDelivery.next_at)
        .limit(1)
    )


def _give_up(session: Session, webhook_id: str, reason: str) -> None:
    """No more attempts for what waits to be sent to a webhook."""
    pending = (WebhookDelivery.webhook_id == webhook_id) & (WebhookDelivery.status == "pending")
    failed = {"status": "failed", "reason": reason, "next_at": None}
    session.execute(sa.update(WebhookDelivery).where(pending).values(failed))


class Courier:
    """Sends in threads of its own while the `with` block lasts; what it waits for delays nobody else."""

    def __init__(self, wiring: Wiring) -> None:
        self._wiring = wiring
        self._egress = Egress(wiring.settings.egress_allow)
        self._under_way: set[Claim] = set()
        self._lock = threading.Lock()
        self._wake = threading.Event()
        self._ending = False
        self._thread = threading.Thread(target=self._run, name="webhooks", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ending = True
        self._wake.set()
        until = time.monotonic() + _GRACE_S
        self._thread.join(_GRACE_S)
        while self._under_way and time.monotonic() < until:
            time.sleep(0.05)

    def _run(self) -> None:
        while not self._ending:
            self._wake.clear()
            try:
                self._begin()
            except Exception as error:  # whatever it is, the next message is to be sent
                log.warning("webhooks_not_read", error=repr(error))
            self._wake.wait(_POLL_S)

    def _begin(self) -> None:
        """Begin to send what is due, as far as there is room."""
        with self._lock:
            under_way = list(self._under_way)
        if len(under_way) == _MOST:
            return
        for held in claim(self._wiring.database, under_way, _MOST - len(under_way)):
            with self._lock:
                self._under_way.add(held)
            threading.Thread(target=self._deliver, args=(held,), daemon=True).start()

    def _deliver(self, held: Claim) -> None:
        try:
            outcome = self._attempt(held)
            record(self._wiring.database, held, outcome)
            log.info(
                "webhook_sent", webhook=held.webhook.id, message=held.delivery_id, event_type=held.event,
                http_status=outcome.http_status, reason=outcome.reason,
            )  # fmt: skip
        except sa.exc.SQLAlchemyError as error:  # when the claim has ended, the message is sent again
            log.warning("webhook_outcome_lost", message=held.delivery_id, error=str(error))
        finally:
            with self._lock:
                self._under_way.discard(held)
            self._wake.set()

    def _attempt(self, held: Claim) -> Outcome:
        try:
            keys = sending.open_secrets(self._wiring.settings, held.webhook, held.clock)
            return sending.send(
                self._egress, held.webhook.url, keys, held.delivery_id, held.payload, held.clock
            )
        except Unavailable as error:
            return Outcome(None, error.detail)
        except Exception:
            log.exception("webhook_attempt_broke", message=held.delivery_id)
            return Outcome(None, "Something went wrong inside the service; its log says what.")
