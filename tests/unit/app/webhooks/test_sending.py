"""One message, signed and sent once to a real server: what arrives, and what is made of the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
from standardwebhooks import Webhook, WebhookVerificationError

from app.security.egress import Egress
from app.webhooks import sending
from app.webhooks.sending import Outcome
from tests.conftest import eventually
from tests.unit.http_server import Asked, Behaviour, Exchange, Server, serving

PAYLOAD = {"type": "job.succeeded", "data": {"id": "job_1", "metadata": {"ort": "Köln"}}}


@pytest.fixture
def receiver() -> Iterator[Server]:
    with serving(lambda exchange, asked: exchange.say(204, b"")) as server:
        yield server


def send(server: Server, *keys: str, clock: float | None = None) -> Outcome:
    at = time.time() if clock is None else clock
    return sending.send(server.egress(), server.url, keys or ["whsec_AAAA"], "msg_1", PAYLOAD, at)


def test_the_signature_is_that_of_the_standards_own_example() -> None:
    signed = sending.signature(
        "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw",
        "msg_p5jXN8AQM9LWM0D4loKWxJek",
        1614265330,
        b'{"test": 2432232314}',
    )
    assert signed == "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE="


def test_the_standards_library_accepts_a_message_with_each_of_its_keys_and_no_other(receiver: Server) -> None:
    new, old, other = (sending.new_secret() for _ in range(3))
    assert len({new, old, other}) == 3
    assert send(receiver, new, old) == Outcome(204, "")
    asked = receiver.asked[0]
    for secret in (new, old):
        assert Webhook(secret).verify(asked.body, dict(asked.headers)) == PAYLOAD
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(other).verify(asked.body, dict(asked.headers))
    with pytest.raises(WebhookVerificationError, match="No matching signature"):
        Webhook(new).verify(asked.body.replace(b"job_1", b"job_2"), dict(asked.headers))
    assert asked.headers["content-type"] == "application/json"


def test_the_time_of_the_attempt_is_signed(receiver: Server) -> None:
    secret = sending.new_secret()
    send(receiver, secret, clock=1614265330.9)
    asked = receiver.asked[0]
    assert asked.headers["webhook-timestamp"] == "1614265330"
    with pytest.raises(WebhookVerificationError, match="too old"):
        Webhook(secret).verify(asked.body, dict(asked.headers))


def redirecting(exchange: Exchange, asked: Asked) -> None:
    exchange.say(307, b"", Location="/elsewhere")


def busy(exchange: Exchange, asked: Asked) -> None:
    exchange.say(503, b"", Retry_After="120")


def silent(exchange: Exchange, asked: Asked) -> None:
    exchange.close_connection = True


@pytest.mark.parametrize(
    ("behave", "status", "words", "after_s"),
    [
        (redirecting, 307, "redirects are not followed", 0),
        (busy, 503, "It answered 503", 120),
        (lambda exchange, _: exchange.say(410, b""), 410, "disabled", 0),
        (lambda exchange, _: exchange.say(404, b""), 404, "It answered 404", 0),
        (silent, None, "closed the connection without an answer", 0),
    ],
    ids=["redirect", "503", "410", "404", "silent"],
)
def test_all_but_a_2xx_answer_is_a_failure_with_its_reason(
    behave: Behaviour, status: int | None, words: str, after_s: float
) -> None:
    with serving(behave) as server:
        outcome = send(server)
    assert (outcome.http_status, outcome.after_s) == (status, after_s)
    assert words in outcome.reason
    assert [asked.path for asked in server.asked] == ["/predict"]


def test_a_2xx_answer_is_enough_however_much_or_little_follows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_TIMEOUT_S", 5)

    def promises(exchange: Exchange, asked: Asked) -> None:
        exchange.send_response(200)
        exchange.send_header("Content-Length", "1000000")
        exchange.end_headers()
        released.wait(10)
        exchange.close_connection = True

    released = threading.Event()
    with serving(promises) as server:
        outcome = send(server)
        released.set()
    assert outcome == Outcome(200, "")


def test_an_address_that_hangs_is_left_after_the_longest_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "_TIMEOUT_S", 0.2)
    released = threading.Event()
    with serving(lambda *_: released.wait(10) and None) as server:
        outcome = send(server)
        released.set()
    assert outcome.http_status is None
    assert "did not answer within 0.2 s" in outcome.reason


def test_an_address_that_is_not_public_is_never_asked(receiver: Server) -> None:
    outcome = sending.send(Egress(), receiver.url, ["whsec_AAAA"], "msg_1", PAYLOAD, 0.0)
    assert "'127.0.0.1' is not on the public internet" in outcome.reason
    assert (outcome.http_status, receiver.connections) == (None, 0)


def test_no_connection_is_left_open(receiver: Server) -> None:
    egress = receiver.egress()
    for _ in range(2):
        assert sending.send(egress, receiver.url, ["whsec_AAAA"], "msg_1", PAYLOAD, 0.0) == Outcome(204, "")
    assert receiver.connections == 2
    eventually(lambda: receiver.ended == 2, "the end of both connections", seconds=10)
