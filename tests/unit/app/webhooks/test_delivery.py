"""The outbox and who empties it: nothing is lost, nothing is sent by two at once, nobody waits for a slow address."""

from __future__ import annotations

import base64
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from pydantic import SecretStr
from standardwebhooks import Webhook as Verifier

from app import ids, retention
from app.jobs import claims, lifecycle
from app.jobs import service as jobs
from app.jobs.lifecycle import JobError
from app.jobs.tables import JobEvent
from app.security.principal import Principal
from app.webhooks import delivery, service
from app.webhooks.delivery import PAUSES_S, Claim, Courier
from app.webhooks.schemas import EVENTS, WebhookOrder
from app.webhooks.sending import Outcome
from app.webhooks.service import Issued
from app.webhooks.tables import Webhook, WebhookDelivery
from app.wiring import Wiring
from tests.conftest import eventually
from tests.unit.http_server import Asked, Exchange, Server, serving
from tests.unit.workers.jobs import claim_of, status_of, submit_to

ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
REFUSED = Outcome(500, "It answered 500.")


@pytest.fixture
def receiver() -> Iterator[Server]:
    with serving(lambda exchange, asked: exchange.say(204, b"")) as server:
        yield server


def subscribe(wiring: Wiring, url: str, *events: Any, tenant: str = "t") -> Issued:
    order = WebhookOrder(url=url, events=list(events or EVENTS))
    return service.create(wiring, Principal(tenant, frozenset()), order)


def cancelled(wiring: Wiring, **columns: Any) -> str:
    """A job that was cancelled while it waited; its id."""
    job_id = submit_to(wiring, **columns)
    cancel(wiring, job_id)
    return job_id


def cancel(wiring: Wiring, job_id: str, *, dies: bool = False) -> None:
    """`dies`: before the commit."""
    with wiring.database.writing() as session:
        lifecycle.request_cancel(session, lifecycle.lock(session, job_id))
        session.flush()
        if dies:
            raise RuntimeError


def fill(wiring: Wiring, webhook: Webhook, count: int) -> None:
    """Messages that are due."""
    with wiring.database.writing() as session:
        session.add_all(
            WebhookDelivery(
                id=ids.new("msg"), webhook_id=webhook.id, job_id="job_1", event="job.failed", payload={}, next_at=1.0
            )
            for _ in range(count)
        )  # fmt: skip


def messages(wiring: Wiring) -> list[WebhookDelivery]:
    """The oldest first."""
    with wiring.database.reading() as session:
        return list(session.scalars(sa.select(WebhookDelivery).order_by(WebhookDelivery.id)))


def only(wiring: Wiring) -> WebhookDelivery:
    (message,) = messages(wiring)
    return message


def make_due(wiring: Wiring) -> None:
    with wiring.database.writing() as session:
        open_ = WebhookDelivery.status.in_(("pending", "sending"))
        session.execute(sa.update(WebhookDelivery).where(open_).values(next_at=1.0))


def taken(wiring: Wiring) -> list[Claim]:
    return delivery.claim(wiring.database, [])


# ---- what is written ------------------------------------------------------------------------------------------


def test_a_message_is_written_with_its_event_or_not_at_all(wiring: Wiring, receiver: Server) -> None:
    webhook = subscribe(wiring, receiver.url).webhook
    subscribe(wiring, receiver.url, tenant="rival")
    subscribe(wiring, receiver.url, "job.started")
    job_id = submit_to(wiring)
    with pytest.raises(RuntimeError):
        cancel(wiring, job_id, dies=True)
    assert messages(wiring) == []
    cancel(wiring, job_id)
    message = only(wiring)
    assert (message.webhook_id, message.event, message.job_id) == (webhook.id, "job.cancelled", job_id)
    with wiring.database.reading() as session:
        newest = session.scalars(sa.select(JobEvent.type).order_by(JobEvent.number.desc())).first()
    assert newest == "job.cancelled"


def test_a_message_says_which_job_and_what_became_of_it_and_no_more(wiring: Wiring, receiver: Server) -> None:
    subscribe(wiring, receiver.url)
    job_id = submit_to(wiring, labels={"team": "line-4"})
    held = claim_of(wiring, job_id)
    with wiring.database.writing() as session:
        claims.fail(session, held, JobError("teacher_unusable", "Its file is damaged."), wiring.settings)
    started, failed = sorted(messages(wiring), key=lambda message: message.event, reverse=True)
    assert (started.payload["type"], started.payload["data"]["status"]) == ("job.started", "running")
    assert failed.payload.keys() == {"type", "timestamp", "data"}
    assert failed.payload["type"] == "job.failed"
    assert failed.payload["timestamp"].endswith("Z")
    assert failed.payload["data"] == {
        "id": job_id,
        "status": "failed",
        "student_id": None,
        "error_code": "teacher_unusable",
        "metadata": {"team": "line-4"},
        "urls": {"job": f"/v1/jobs/{job_id}"},
    }


@ONCE
def test_metadata_that_would_make_a_message_heavy_are_left_out(wiring: Wiring, receiver: Server) -> None:
    subscribe(wiring, receiver.url)
    cancelled(wiring, labels={"log": "x" * 20_000})
    assert only(wiring).payload["data"]["metadata"] is None


# ---- what is sent ---------------------------------------------------------------------------------------------


def test_what_was_committed_before_a_crash_is_sent_after_it(wiring: Wiring, receiver: Server) -> None:
    issued = subscribe(wiring, receiver.url)
    job_id = cancelled(wiring)
    assert receiver.asked == []
    with Courier(wiring):
        eventually(lambda: only(wiring).status == "succeeded", "the message")
    message, asked = only(wiring), receiver.asked[0]
    assert (message.attempts, message.http_status, message.reason, message.next_at) == (1, 204, "", None)
    assert Verifier(issued.secret).verify(asked.body, dict(asked.headers))["data"]["id"] == job_id
    assert asked.headers["webhook-id"] == message.id
    with Courier(wiring):
        time.sleep(0.1)
    assert len(receiver.asked) == 1


def test_what_a_process_had_claimed_when_it_died_is_sent_by_another_under_the_same_id(
    wiring: Wiring, receiver: Server
) -> None:
    subscribe(wiring, receiver.url)
    cancelled(wiring)
    (dead,) = taken(wiring)
    assert taken(wiring) == []  # while the claim holds
    make_due(wiring)
    with Courier(wiring):
        eventually(lambda: only(wiring).status == "succeeded", "the message")
    assert [asked.headers["webhook-id"] for asked in receiver.asked] == [dead.delivery_id]
    delivery.record(wiring.database, dead, REFUSED)  # it was not dead, only slow
    message = only(wiring)
    assert (message.status, message.attempts, message.reason, message.next_at) == ("succeeded", 2, "", None)


def test_an_address_that_fails_and_recovers_gets_the_message_later(wiring: Wiring) -> None:
    answers = [503, 200]
    with serving(lambda exchange, asked: exchange.say(answers.pop(0), b"")) as server:
        issued = subscribe(wiring, server.url)
        cancelled(wiring)
        with Courier(wiring):
            eventually(lambda: only(wiring).http_status == 503, "the first attempt")
            message = only(wiring)
            assert (message.status, message.attempts) == ("pending", 1)
            assert "It answered 503" in message.reason
            assert message.next_at == pytest.approx(time.time() + PAUSES_S[0], abs=4)
            make_due(wiring)
            eventually(lambda: only(wiring).status == "succeeded", "the second attempt")
    assert (only(wiring).attempts, only(wiring).reason) == (2, "")
    first, second = server.asked
    assert first.headers["webhook-id"] == second.headers["webhook-id"]
    assert first.body == second.body
    assert Verifier(issued.secret).verify(second.body, dict(second.headers))


@ONCE
def test_attempts_follow_the_schedule_for_a_day_and_end_with_a_reason(
    wiring: Wiring, receiver: Server
) -> None:
    subscribe(wiring, receiver.url)
    cancelled(wiring)
    pauses = []
    while only(wiring).status == "pending":
        make_due(wiring)
        (held,) = taken(wiring)
        assert only(wiring).status == "sending"
        delivery.record(wiring.database, held, REFUSED)
        if (until := only(wiring).next_at) is not None:
            pauses.append(until - time.time())
    assert len(pauses) == len(PAUSES_S)
    for pause, planned in zip(pauses, PAUSES_S, strict=True):
        assert 0.75 * planned < pause < 1.25 * planned
    assert 24 < sum(PAUSES_S) / 3600 < 36
    assert (only(wiring).status, only(wiring).attempts) == ("failed", 8)
    assert only(wiring).reason == "It answered 500."
    assert taken(wiring) == []


@ONCE
def test_a_longer_pause_that_the_address_asks_for_is_kept_up_to_a_day(
    wiring: Wiring, receiver: Server
) -> None:
    subscribe(wiring, receiver.url)
    cancelled(wiring)
    for asked, kept in ((3600.0, 3600.0), (1e9, 86400.0)):
        make_due(wiring)
        (held,) = taken(wiring)
        delivery.record(wiring.database, held, replace(REFUSED, after_s=asked))
        assert only(wiring).next_at == pytest.approx(time.time() + kept, abs=60)


def test_410_disables_the_webhook_and_ends_all_that_waits_for_it(wiring: Wiring, receiver: Server) -> None:
    gone = subscribe(wiring, receiver.url.replace("predict", "gone")).webhook
    receiver.behave = lambda exchange, asked: exchange.say(410 if asked.path == "/gone" else 200, b"")
    fill(wiring, gone, 5)
    with Courier(wiring):
        eventually(
            lambda: {message.status for message in messages(wiring)} == {"failed"}, "the end of all five"
        )
    assert {message.reason for message in messages(wiring)} == {
        "It answered 410 Gone: the webhook was disabled."
    }
    assert len(receiver.asked) <= 2
    with wiring.database.reading() as session:
        assert session.get_one(Webhook, gone.id).disabled_at == pytest.approx(time.time(), abs=60)
    other = subscribe(wiring, receiver.url).webhook
    cancelled(wiring)
    assert messages(wiring)[-1].webhook_id == other.id
    assert len(messages(wiring)) == 6


@ONCE
def test_an_address_that_turned_private_is_not_asked(wiring: Wiring, receiver: Server) -> None:
    subscribe(wiring, receiver.url)
    cancelled(wiring)
    strict = replace(wiring, settings=wiring.settings.model_copy(update={"egress_allow": ()}))
    with Courier(strict):
        eventually(lambda: only(wiring).reason != "", "the attempt")
    assert "not on the public internet" in only(wiring).reason
    assert (only(wiring).status, receiver.connections) == ("pending", 0)


@ONCE
def test_a_secret_that_cannot_be_opened_is_a_reason_and_ends_no_courier(
    wiring: Wiring, receiver: Server
) -> None:
    subscribe(wiring, receiver.url)
    cancelled(wiring)
    key = SecretStr(base64.b64encode(bytes(32)).decode())
    with Courier(replace(wiring, settings=wiring.settings.model_copy(update={"secret_key": key}))):
        eventually(lambda: only(wiring).reason != "", "the attempt")
    assert "cannot be opened with this service's key" in only(wiring).reason
    assert receiver.asked == []
    make_due(wiring)
    with Courier(wiring):
        eventually(lambda: only(wiring).status == "succeeded", "the message")


def test_what_is_deleted_while_it_is_sent_is_gone_and_harms_nobody(wiring: Wiring, receiver: Server) -> None:
    webhook = subscribe(wiring, receiver.url).webhook
    fill(wiring, webhook, 1)
    (held,) = taken(wiring)
    service.delete(wiring, Principal("t", frozenset()), webhook.id)
    delivery.record(wiring.database, held, REFUSED)
    assert messages(wiring) == []
    fill(wiring, webhook, 1)  # by a job that ended at the same moment
    assert taken(wiring) == []


def test_a_message_received_while_its_webhook_was_disabled_counts_and_one_refused_then_is_the_last(
    wiring: Wiring, receiver: Server
) -> None:
    fill(wiring, subscribe(wiring, receiver.url).webhook, 2)
    first, second = taken(wiring)
    with wiring.database.writing() as session:
        session.execute(sa.update(Webhook).values(disabled_at=1.0))
    delivery.record(wiring.database, first, Outcome(200, ""))
    delivery.record(wiring.database, second, REFUSED)
    by_id = {message.id: message for message in messages(wiring)}
    assert (by_id[first.delivery_id].status, by_id[second.delivery_id].status) == ("succeeded", "failed")


@ONCE
def test_what_was_written_for_a_webhook_while_it_was_disabled_ends_with_the_next_sweep(
    wiring: Wiring, receiver: Server
) -> None:
    webhook = subscribe(wiring, receiver.url).webhook
    with wiring.database.writing() as session:
        session.execute(sa.update(Webhook).values(disabled_at=1.0))
    fill(wiring, webhook, 1)
    assert taken(wiring) == []
    retention.sweep(wiring)
    assert (only(wiring).status, only(wiring).reason) == ("failed", "The webhook is disabled.")


@ONCE
def test_messages_about_a_job_go_with_it(wiring: Wiring, receiver: Server) -> None:
    subscribe(wiring, receiver.url)
    job_id, other = cancelled(wiring), cancelled(wiring)
    jobs.delete(wiring, Principal("t", frozenset()), job_id)
    assert [message.job_id for message in messages(wiring)] == [other]


@ONCE
def test_an_outcome_is_written_down_when_the_database_is_back(
    wiring: Wiring, receiver: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    subscribe(wiring, receiver.url)
    cancelled(wiring)
    failures = [sa.exc.OperationalError("", {}, Exception("away"))] * 2
    write = delivery.record

    def failing(*about: Any) -> None:
        if failures:
            raise failures.pop()
        write(*about)

    monkeypatch.setattr(delivery, "_POLL_S", 0.05)
    monkeypatch.setattr(delivery, "record", failing)
    with Courier(wiring):
        eventually(lambda: only(wiring).status == "succeeded", "the outcome")
    assert (len(receiver.asked), failures) == (1, [])


@ONCE
def test_a_message_whose_outcomes_are_never_written_down_is_not_sent_for_ever(
    wiring: Wiring, receiver: Server
) -> None:
    subscribe(wiring, receiver.url)
    cancelled(wiring)
    attempts = 0
    while taken(wiring):
        attempts += 1
        assert attempts <= 8
        make_due(wiring)
    assert (attempts, only(wiring).status) == (8, "failed")
    assert "could not be written down" in only(wiring).reason


# ---- who waits for whom ---------------------------------------------------------------------------------------


def test_several_processes_take_each_message_once(wiring: Wiring, receiver: Server) -> None:
    webhook = subscribe(wiring, receiver.url).webhook
    fill(wiring, webhook, 8)
    with ThreadPoolExecutor(8) as processes:
        found = list(processes.map(lambda _: taken(wiring), range(8)))
    counted = Counter(held.delivery_id for claims in found for held in claims)
    assert set(counted.values()) == {1}
    while more := taken(wiring):  # what was passed over because somebody held it just then
        counted.update(held.delivery_id for held in more)
    assert len(counted) == 8


@ONCE
def test_a_tenant_whose_addresses_hang_delays_no_other(wiring: Wiring) -> None:
    released = threading.Event()

    def behave(exchange: Exchange, asked: Asked) -> None:
        if asked.path.startswith("/hangs"):
            released.wait(30)
        exchange.say(200, b"")

    with serving(behave) as server:
        for number in range(4):
            fill(wiring, subscribe(wiring, f"http://{server.address}/hangs/{number}").webhook, 10)
        fill(wiring, subscribe(wiring, f"http://{server.address}/works", tenant="other").webhook, 5)
        with Courier(wiring):
            eventually(
                lambda: sum(message.status == "succeeded" for message in messages(wiring)) == 5,
                "the other tenant's messages",
                seconds=20,
            )
            hanging = Counter(asked.path for asked in server.asked if asked.path != "/works")
            released.set()
            eventually(lambda: all(m.status == "succeeded" for m in messages(wiring)), "the rest")
    assert sum(hanging.values()) <= 4
    assert max(hanging.values()) <= 2
    assert len(server.asked) == 45


@ONCE
def test_the_next_free_place_is_of_the_tenant_that_has_none(wiring: Wiring, receiver: Server) -> None:
    for tenant in "abcd":
        for _ in range(2):
            fill(wiring, subscribe(wiring, receiver.url, tenant=tenant).webhook, 10)
    under_way = taken(wiring)
    assert Counter(held.webhook.tenant for held in under_way) == dict.fromkeys("abcd", 4)
    late = subscribe(wiring, receiver.url, tenant="e").webhook
    fill(wiring, late, 1)
    with wiring.database.writing() as session:  # the others wait for longer
        mine = WebhookDelivery.webhook_id == late.id
        session.execute(sa.update(WebhookDelivery).where(mine).values(next_at=2.0))
    (held,) = delivery.claim(wiring.database, under_way[1:], 1)
    assert held.webhook.tenant == "e"


@ONCE
def test_the_maintenance_process_sends_and_takes_back_leases_while_an_address_hangs(
    wiring: Wiring, receiver: Server, tmp_path: Path
) -> None:
    released = threading.Event()
    receiver.behave = lambda *_: released.wait(30) and None
    subscribe(wiring, receiver.url)
    cancelled(wiring)
    environment = {
        "DRAM_HOME": str(wiring.settings.home), "DRAM_DATABASE_URL": wiring.settings.database_url,
        "DRAM_REDIS_URL": wiring.settings.redis_url, "DRAM_REAP_S": "0.1", "DRAM_EGRESS_ALLOW": "127.0.0.0/8",
        "DRAM_SECRET_KEY": wiring.settings.secret_key.get_secret_value(),
    }  # fmt: skip
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "workers.maintenance"], cwd=Path(__file__).parents[4],
            env={**os.environ, **environment}, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        eventually(lambda: len(receiver.asked) == 1, "the first message")
        late = submit_to(wiring, deadline_at=time.time() - 1)
        eventually(lambda: status_of(wiring, late) == "cancelled", "a round of the loop")
        assert sorted(message.status for message in messages(wiring)) == ["pending", "sending"]
        released.set()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
    finally:
        released.set()
        process.kill()
        process.wait()
    assert "whsec_" not in (tmp_path / "log").read_text()


def test_messages_are_forgotten_when_they_are_old_and_done(wiring: Wiring, receiver: Server) -> None:
    webhook = subscribe(wiring, receiver.url).webhook
    fill(wiring, webhook, 4)
    old, done, young, waiting = messages(wiring)
    fill(wiring, Webhook(id=ids.new("wh")), 1)  # to one that was deleted
    with wiring.database.writing() as session:
        for message, values in (
            (old, {"status": "failed", "created_at": 1.0}),
            (done, {"status": "succeeded", "created_at": 1.0}),
            (young, {"status": "succeeded"}),
            (waiting, {"created_at": 1.0}),
        ):
            session.execute(
                sa.update(WebhookDelivery).where(WebhookDelivery.id == message.id).values(**values)
            )
    retention.sweep(wiring)
    assert [message.id for message in messages(wiring)] == [young.id, waiting.id]
