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
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import sqlalchemy as sa
import structlog
from sqlalchemy.orm import Session

from app.db import Database, read_clock
from app.errors import Unavailable
from app.security.egress import Egress
from app.webhooks import outbox, sending
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
#: So long an outcome is tried to be written down, within the claim.
_RECORDING_S = 90.0
_NOT_RECORDED = "What came of the last attempt could not be written down."
#: Of these one is sent when it is due: it waits, or who sent it died.
_OPEN = ("pending", "sending")
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
    """Take up to `most` messages that are due. `under_way`: what this process sends already.

    They are chosen without a lock; the write unit only takes those that nobody else took meanwhile.
    """
    with database.reading() as session:
        clock = read_clock(session)
        chosen = _chosen(session, clock, under_way, most)
    if not chosen:
        return []
    chosen.sort(key=lambda pair: pair[0].id)  # all processes lock rows in one order
    with database.writing() as session:
        taken = [_taken(session, message, webhook, clock) for message, webhook in chosen]
    return [held for held in taken if held is not None]


def record(database: Database, held: Claim, outcome: Outcome) -> None:
    """Write down what came of an attempt, unless the message was meanwhile deleted or claimed again."""
    with database.writing() as session:
        webhook = session.get(Webhook, held.webhook.id, with_for_update=True)
        same = (WebhookDelivery.id == held.delivery_id) & (WebhookDelivery.next_at == held.until)
        row = session.scalar(sa.select(WebhookDelivery).where(same).with_for_update())
        if webhook is None or row is None:
            return
        clock = read_clock(session)
        row.http_status, row.reason = outcome.http_status, outcome.reason
        if outcome.http_status == GONE:
            outbox.disable(session, webhook, clock, outcome.reason)
        if not outcome.reason:
            row.status, row.next_at = "succeeded", None
        elif webhook.disabled_at is not None or row.attempts > len(PAUSES_S):
            row.status, row.next_at = "failed", None
        else:
            pause = PAUSES_S[row.attempts - 1] * random.uniform(1 - _JITTER, 1 + _JITTER)
            row.status, row.next_at = "pending", clock + min(max(pause, outcome.after_s), _LONGEST_PAUSE_S)


def _chosen(
    session: Session, clock: float, under_way: Collection[Claim], most: int
) -> list[tuple[WebhookDelivery, Webhook]]:
    """Messages that are due, one after the other for the tenant that has fewest under way, there the longest due."""
    due = sa.and_(WebhookDelivery.status.in_(_OPEN), WebhookDelivery.next_at <= clock)
    if session.scalar(sa.select(WebhookDelivery.id).where(due).limit(1)) is None:
        return []
    oldest = sa.select(sa.func.min(WebhookDelivery.next_at)).where(
        WebhookDelivery.webhook_id == Webhook.id, due
    )
    since = oldest.correlate(Webhook).scalar_subquery()
    enabled = sa.select(Webhook, since).where(Webhook.disabled_at.is_(None))
    waiting = {webhook: first for webhook, first in session.execute(enabled) if first is not None}
    of_tenant = Counter(held.webhook.tenant for held in under_way)
    of_webhook = Counter(held.webhook.id for held in under_way)
    sent = [held.delivery_id for held in under_way]
    rows: dict[Webhook, Iterator[WebhookDelivery]] = {}
    chosen: list[tuple[WebhookDelivery, Webhook]] = []
    while waiting and len(chosen) < most:
        webhook = min(waiting, key=lambda each: (of_tenant[each.tenant], waiting[each]))
        if of_tenant[webhook.tenant] >= _MOST_OF_A_TENANT:  # then all that wait have as many
            break
        if webhook not in rows:
            own = sa.select(WebhookDelivery).where(WebhookDelivery.webhook_id == webhook.id, due)
            few = own.where(WebhookDelivery.id.not_in(sent)).order_by(WebhookDelivery.next_at)
            room = max(0, _MOST_OF_A_WEBHOOK - of_webhook[webhook.id])
            rows[webhook] = iter(session.scalars(few.limit(room)).all())
        message = next(rows[webhook], None)
        if message is None:
            del waiting[webhook]
            continue
        of_tenant[webhook.tenant] += 1
        chosen.append((message, webhook))
    return chosen


def _taken(session: Session, message: WebhookDelivery, webhook: Webhook, clock: float) -> Claim | None:
    """Claim a message by compare-and-set; None where another was faster, or there were attempts enough."""
    until = clock + _CLAIM_S
    sent: dict[str, Any] = {"status": "sending", "next_at": until, "attempts": message.attempts + 1}
    ended = {"status": "failed", "next_at": None, "reason": _NOT_RECORDED}
    is_last = message.attempts > len(PAUSES_S)
    same = (WebhookDelivery.id == message.id) & (WebhookDelivery.next_at == message.next_at)
    update = sa.update(WebhookDelivery).where(same, WebhookDelivery.status.in_(_OPEN))
    changed = update.values(ended if is_last else sent).returning(WebhookDelivery.id)
    if session.scalar(changed) is None or is_last:
        return None
    return Claim(message.id, message.event, message.payload, webhook, clock, until)


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
        if len(under_way) == _MOST or self._ending:
            return
        for held in claim(self._wiring.database, under_way, _MOST - len(under_way)):
            with self._lock:
                self._under_way.add(held)
            try:
                threading.Thread(target=self._deliver, args=(held,), daemon=True).start()
            except RuntimeError:  # no more threads: it is sent when its claim has ended
                with self._lock:
                    self._under_way.discard(held)
                raise

    def _deliver(self, held: Claim) -> None:
        try:
            outcome = self._attempt(held)
            self._record(held, outcome)
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

    def _record(self, held: Claim, outcome: Outcome) -> None:
        """Again and again while the database is away: what was received is not to be sent again."""
        until = time.monotonic() + _RECORDING_S
        while True:
            try:
                return record(self._wiring.database, held, outcome)
            except sa.exc.SQLAlchemyError:
                if self._ending or time.monotonic() > until:
                    raise
                time.sleep(_POLL_S)

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
