"""A teacher behind a real HTTP server that misbehaves: what is said, what is counted, and what is never told."""

from __future__ import annotations

import base64
import io
import json
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.security.egress import Egress
from models.errors import QuestionRefused, TeacherError, TryAgain
from models.teachers import ledger
from models.teachers.black_box import HttpTeacher, InputFormat, WireProtocol
from models.teachers.http_endpoint import HttpEndpoint, seconds_to_wait
from models.teachers.ledger import MemoryLedger, ask
from tests.unit.http_server import Asked, Behaviour, Exchange, Server, serving

SECRET = "tok-1234567890"
HEADERS = {"Authorization": f"Bearer {SECRET}", "X-Api-Key": "k3y:with,parts99"}
CLASSES = ("dark", "bright", "none")
IMAGES = [np.full((6, 6, 3), value, np.uint8) for value in range(0, 250, 50)]  # 5 images


def row(value: int) -> list[float]:
    """What the honest teacher says of an image of that brightness."""
    return [1 - value / 255, value / 255, 0.0]


def honest(exchange: Exchange, asked: Asked) -> None:
    """Answers a batch by Dram's own contract."""
    pictures = [base64.b64decode(text) for text in json.loads(asked.body)["images"]]
    values = [int(np.asarray(Image.open(io.BytesIO(picture)))[0, 0, 0]) for picture in pictures]
    exchange.say(200, json.dumps({"probabilities": [row(value) for value in values]}).encode())


def saying(body: Any, status: int = 200, **headers: str) -> Behaviour:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda exchange, asked: exchange.say(status, content, **headers)


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(honest) as running:
        yield running


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "_FIRST_PAUSE_S", 0.001)


def endpoint(server: Server, egress: Egress | None = None, **changes: Any) -> HttpEndpoint:
    given = {
        "batch_size": 2,
        "concurrency": 2,
        "retries": 2,
        "timeout_s": 5.0,
        "source": server.url,
        **changes,
    }
    spec = HttpTeacher(name="t", title="T", classes=CLASSES, input=InputFormat(height=6, width=6), **given)
    return HttpEndpoint(spec, egress or server.egress(), HEADERS)


def told(error: TeacherError) -> str:
    """The whole text of an error; fails where it holds a secret."""
    text = f"{error.detail} {error.hint} {error!r} {error.__cause__!r}"
    for secret in (SECRET, "k3y:with,parts99", "k3y", "parts99"):
        assert secret.lower() not in text.lower()
    return text


def test_an_honest_endpoint_is_asked_in_batches_with_the_headers(server: Server) -> None:
    kept = MemoryLedger(budget=5)
    answers = ask(endpoint(server), IMAGES, kept)
    assert answers == pytest.approx(np.array([row(value) for value in range(0, 250, 50)]), abs=1e-6)
    assert sorted(len(json.loads(asked.body)["images"]) for asked in server.asked) == [1, 2, 2]
    assert all(asked.headers["authorization"] == HEADERS["Authorization"] for asked in server.asked)
    assert kept.spent == 5


@pytest.mark.parametrize("protocol", list(WireProtocol))
def test_each_protocol_reaches_its_server_and_counts_alike(server: Server, protocol: WireProtocol) -> None:
    seen = []

    def behave(exchange: Exchange, asked: Asked) -> None:
        if protocol is WireProtocol.TORCHSERVE:
            value = int(np.asarray(Image.open(io.BytesIO(asked.body)))[0, 0, 0])
            seen.append(1)
            exchange.say(200, json.dumps(dict(zip(CLASSES, row(value), strict=True))).encode())
            return
        if protocol is WireProtocol.DRAM:
            seen.append(len(json.loads(asked.body)["images"]))
            honest(exchange, asked)
            return
        length = int(asked.headers.get("inference-header-content-length", len(asked.body)))
        document = json.loads(asked.body[:length])
        if protocol is WireProtocol.TENSORFLOW_SERVING:
            pixels = np.array(document["instances"])
        elif protocol is WireProtocol.KSERVE_V2:
            pixels = np.array(document["inputs"][0]["data"]).reshape(document["inputs"][0]["shape"])
        else:
            pixels = np.frombuffer(asked.body[length:], "<f4").reshape(document["inputs"][0]["shape"])
        seen.append(len(pixels))
        rows = np.array([row(round(255 * image.flat[0])) for image in pixels], "<f4")
        output = {"name": "p", "shape": list(rows.shape), "datatype": "FP32"}
        if protocol is WireProtocol.TENSORFLOW_SERVING:
            exchange.say(200, json.dumps({"predictions": rows.tolist()}).encode())
        elif protocol is WireProtocol.KSERVE_V2:
            exchange.say(200, json.dumps({"outputs": [{**output, "data": rows.ravel().tolist()}]}).encode())
        else:
            size = {"binary_data_size": rows.nbytes}
            head = json.dumps({"outputs": [{**output, "parameters": size}]}).encode()
            exchange.say(200, head + rows.tobytes(), Inference_Header_Content_Length=str(len(head)))

    server.behave = behave
    kept = MemoryLedger(budget=5)
    answers = ask(endpoint(server, protocol=protocol), IMAGES, kept)
    assert answers == pytest.approx(np.array([row(value) for value in range(0, 250, 50)]), abs=1e-6)
    assert sum(seen) == kept.spent == 5


GOOD = [row(0), row(50)]
WRONG = {
    "html": (saying(b"<html>Sign in</html>", Content_Type="text/html"), "HTML page"),
    "empty": (saying(b""), "is empty"),
    "no content": (saying(b"", 204), "is empty"),
    "truncated JSON": (saying(b'{"probabilities": [[0.2, 0'), "breaks off or is no JSON"),
    "NaN": (saying(b'{"probabilities": [[NaN, 0, 1], [0, 0, 1]]}'), "NaN"),
    "not summing to one": (
        saying({"probabilities": [[0.9, 0.9, 0.9], [0.5, 0.2, 0.3]]}),
        "sum to 2.7, not to 1",
    ),
    "logits": (saying({"probabilities": [[3.0, -1, 0], [0.5, 0.2, 0.3]]}), "no probabilities"),
    "more classes": (saying({"probabilities": [[0.25] * 4] * 2}), "4 outputs, the class list 3 names"),
    "fewer answers": (saying({"probabilities": GOOD[:1]}), "1 answers to 2 images"),
    "ragged": (saying({"probabilities": [GOOD[0], GOOD[1][:2]]}), "rows of the same length"),
    "other classes": (
        saying({"probabilities": GOOD, "classes": ["dark", "bright"]}),
        "classes are not those",
    ),
    "another contract": (saying({"predictions": GOOD}), "no 'probabilities'; it has: 'predictions'"),
    "an echo of secrets": (saying({HEADERS["Authorization"]: SECRET}), "it has: '***'"),
    "a flood": (
        lambda exchange, asked: exchange.wfile.write(
            b"HTTP/1.1 200 OK\r\nContent-Length: 100000000\r\n\r\n" + bytes(40_000_000)
        ),
        "answered more than",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_answer_ends_the_job_at_once_and_stays_counted(server: Server, name: str) -> None:
    server.behave, words = WRONG[name]
    kept = MemoryLedger(budget=4)
    with pytest.raises(TeacherError) as error:
        ask(endpoint(server, concurrency=1), IMAGES[:4], kept)
    assert words in told(error.value)
    assert not error.value.retryable
    assert (len(server.asked), kept.spent, kept.answers) == (1, 2, {})


TURNED_AWAY = {
    "401": (saying(f"bad token {SECRET}".encode(), 401), "refuses the credentials (HTTP 401)"),
    "403": (saying(b"", 403), "refuses the credentials (HTTP 403)"),
    "404": (saying({"error": "no model 'm'"}, 404), "(HTTP 404): {\"error\": \"no model 'm'\"}"),
    "413": (saying(b"too large", 413), "finds 2 images in a request too many (HTTP 413)"),
    "422": (saying(f"got {SECRET.upper()}\r\n\x1b[31m{'y' * 900}".encode(), 422), "(HTTP 422): got *** [31myyy"),
    "400": (saying(b"\xff\xfe\x00", 400), "rejects the request (HTTP 400)"),
    "redirect": (
        saying(b"", 302, Location=f"http://169.254.169.254/?t={SECRET}"),
        "redirects to http://169.254.169.254/?t=*** (HTTP 302)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TURNED_AWAY)
def test_a_question_that_is_turned_away_costs_nothing_and_is_not_repeated(server: Server, name: str) -> None:
    server.behave, words = TURNED_AWAY[name]
    kept = MemoryLedger(budget=2)
    with pytest.raises(QuestionRefused) as error:
        ask(endpoint(server), IMAGES[:2], kept)
    assert words in told(error.value)
    assert len(error.value.detail) < 300
    assert not error.value.retryable
    assert (len(server.asked), kept.spent) == (1, 0)


def broken_off(exchange: Exchange, asked: Asked) -> None:
    exchange.wfile.write(b'HTTP/1.1 200 OK\r\nContent-Length: 500\r\n\r\n{"probabilities": [[')
    exchange.close_connection = True


def hung_up(exchange: Exchange, asked: Asked) -> None:
    exchange.close_connection = True


AGAIN = {
    "429": (saying(b"", 429), "has no time now (HTTP 429); tried 3 times", 0),
    "429 with a pause": (saying(b"", 429, Retry_After="0"), "has no time now (HTTP 429); tried 3 times", 0),
    "503": (saying(b"", 503), "has no time now (HTTP 503); tried 3 times", 0),
    "500": (saying(SECRET.encode(), 500), "failed (HTTP 500); tried 3 times", 6),
    "504": (saying(b"", 504), "failed (HTTP 504); tried 3 times", 6),
    "closing mid-body": (broken_off, "broke off its answer, or does not speak HTTP/1.1; tried 3 times", 6),
    "hanging up": (hung_up, "without an answer; tried 3 times", 6),
    "slow": (lambda exchange, asked: time.sleep(0.5), "did not answer within 0.1 s; tried 3 times", 6),
}


@pytest.mark.parametrize("name", AGAIN)
def test_what_may_pass_is_tried_again_and_ends_in_an_error_that_can_be_retried(
    server: Server, name: str
) -> None:
    server.behave, words, spent = AGAIN[name]
    kept = MemoryLedger(budget=6)
    with pytest.raises(TryAgain) as error:
        ask(endpoint(server, timeout_s=0.1 if name == "slow" else 5.0), IMAGES[:2], kept)
    assert words in told(error.value)
    assert error.value.retryable
    assert (len(server.asked), kept.spent) == (3, spent)


def test_an_endpoint_that_is_down_costs_nothing() -> None:
    with serving(honest) as server:
        pass
    kept = MemoryLedger(budget=2)
    with pytest.raises(TryAgain, match="cannot be reached: connection refused; tried 3 times") as error:
        ask(endpoint(server), IMAGES[:2], kept)
    assert kept.spent == 0
    told(error.value)


def test_an_endpoint_that_recovers_is_asked_to_the_end(server: Server) -> None:
    trouble = iter([saying(b"", 500), saying(b"", 429), hung_up, saying(b"", 503, Retry_After="0")])
    lock = threading.Lock()

    def behave(exchange: Exchange, asked: Asked) -> None:
        with lock:
            chosen = next(trouble, honest)
        chosen(exchange, asked)

    server.behave = behave
    kept = MemoryLedger(budget=100)
    assert len(ask(endpoint(server, retries=5), IMAGES, kept)) == 5
    assert len(server.asked) == 7
    assert 5 + 2 <= kept.spent <= 5 + 4  # two requests of one or two images may have been worked on


def test_a_pause_that_the_endpoint_asks_for_is_kept(server: Server) -> None:
    times: list[float] = []

    def behave(exchange: Exchange, asked: Asked) -> None:
        times.append(time.monotonic())
        (honest if len(times) > 1 else saying(b"", 429, Retry_After="1"))(exchange, asked)

    server.behave = behave
    ask(endpoint(server), IMAGES[:2], MemoryLedger())
    assert 1.0 <= times[1] - times[0] < 2.0


@pytest.mark.parametrize(
    ("retry_after", "expected"),
    [("120", 120.0), (" 0 ", 0.0), ("Wed, 21 Oct 2015 07:28:00 GMT", 80.0), (formatdate(0, usegmt=True), 0.0),
     ("", None), ("soon", None), ("-5", None), ("1.5", None), ("9" * 400, None),
     ("Wed, 99 Oct 2015 07:28:00 GMT", None)],
    ids=[f"header{at}" for at in range(10)],
)  # fmt: skip
def test_retry_after_is_read_in_both_forms(retry_after: str, expected: float | None) -> None:
    assert seconds_to_wait(retry_after, now=1445412400.0) == expected


def test_an_endpoint_that_asks_for_an_hour_ends_the_job_now(server: Server) -> None:
    server.behave = saying(b"", 503, Retry_After="3600")
    with pytest.raises(TryAgain, match="it asks to wait for 3600 s"):
        ask(endpoint(server), IMAGES[:1], MemoryLedger())
    assert len(server.asked) == 1


@pytest.mark.parametrize(
    "url", ["http://10.0.0.1/predict", "https://127.0.0.1/predict", "https://private.example/predict"]
)
def test_an_endpoint_inside_is_refused_at_no_cost(server: Server, url: str) -> None:
    egress = Egress([server.address], resolver=lambda host, port: ["192.168.7.7"])
    kept = MemoryLedger(budget=2)
    with pytest.raises(QuestionRefused) as error:
        ask(endpoint(server, egress, source=url), IMAGES[:2], kept)
    assert "is not on the public internet" in told(error.value)
    assert "192.168.7.7" not in told(error.value)
    assert kept.spent == 0


def test_a_name_that_turns_private_after_its_registration_is_refused_at_no_cost(server: Server) -> None:
    addresses = iter([["93.184.216.34"], ["127.0.0.1"]])
    egress = Egress(resolver=lambda host, port: next(addresses))
    egress.check("https://rebinding.example/")
    kept = MemoryLedger(budget=2)
    with pytest.raises(QuestionRefused, match="not on the public internet"):
        ask(endpoint(server, egress, source="https://rebinding.example/"), IMAGES[:2], kept)
    assert (kept.spent, server.connections) == (0, 0)


def test_a_class_count_that_changes_on_the_way_keeps_what_was_answered(server: Server) -> None:
    def behave(exchange: Exchange, asked: Asked) -> None:
        (honest if len(server.asked) < 3 else saying({"probabilities": [[0.5, 0.5]]}))(exchange, asked)

    server.behave = behave
    kept = MemoryLedger()
    with pytest.raises(TeacherError, match="2 outputs, the class list 3 names"):
        ask(endpoint(server, concurrency=1), IMAGES, kept)
    assert (kept.spent, len(kept.answers)) == (5, 4)


def test_a_header_that_cannot_be_sent_is_told_by_its_name_only(server: Server) -> None:
    box = endpoint(server)
    box = HttpEndpoint(box.spec, server.egress(), {"X-Key": f"{SECRET}\n"})
    with pytest.raises(QuestionRefused, match="'X-Key' has a value that cannot be sent") as error:
        box.answer(IMAGES[:1])
    told(error.value)
    assert not server.asked


def test_a_long_secret_that_the_endpoint_repeats_is_hidden_although_it_is_cut_off(server: Server) -> None:
    secret = "".join(f"{number:04}" for number in range(30))
    spec = endpoint(server, answers="label").spec
    server.behave = saying({"labels": [f"Bearer {secret}"]})
    asked = HttpEndpoint(spec, server.egress(), {"Authorization": f"Bearer {secret}", "X-Key": "other"})
    with pytest.raises(TeacherError, match="named the class") as error:
        asked.answer(IMAGES[:1])
    assert secret[:8] not in error.value.detail


def test_the_users_headers_do_not_replace_those_of_the_protocol(server: Server) -> None:
    box = endpoint(server)
    HttpEndpoint(box.spec, server.egress(), {"content-type": "text/plain", "X-A": "b"}).answer(IMAGES[:1])
    assert server.asked[0].headers["content-type"] == "application/json"
    assert server.asked[0].headers["x-a"] == "b"


def test_a_kind_of_answer_that_the_protocol_cannot_carry_is_refused_at_the_start(server: Server) -> None:
    with pytest.raises(TeacherError, match="'top_k' cannot be read by the protocol 'kserve_v2'"):
        endpoint(server, protocol="kserve_v2", answers="top_k")
