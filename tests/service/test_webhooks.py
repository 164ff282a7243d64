"""Webhooks over HTTP: made, shown, tried, given new secrets, and asked what was sent; and the clients for it."""

from __future__ import annotations

import asyncio
import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import sqlalchemy as sa
import structlog
from pydantic import SecretStr
from standardwebhooks import Webhook as Verifier
from standardwebhooks import WebhookVerificationError

from app import ids
from app.client import AsyncDram, Dram, DramApiError
from app.settings import Settings
from app.webhooks.service import MOST_WEBHOOKS
from app.webhooks.tables import Webhook, WebhookDelivery
from app.wiring import Wiring
from tests.unit.http_server import Asked, Server, serving

if TYPE_CHECKING:
    from tests.conftest import Gateway

ONCE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
GUIDE = Path(__file__).parents[2] / "docs" / "webhooks.md"


@pytest.fixture
def settings(settings: Settings) -> Settings:
    """The loopback may be asked, and there is a key on either database."""
    key = base64.b64encode(bytes(range(32))).decode()
    return settings.model_copy(update={"egress_allow": ("127.0.0.1",), "secret_key": SecretStr(key)})


@pytest.fixture
def receiver() -> Iterator[Server]:
    with serving(lambda exchange, asked: exchange.say(200, b"{}")) as server:
        yield server


def made(client: httpx.Client, url: str, **more: Any) -> dict[str, Any]:
    answer = client.post("/v1/webhooks", json={"url": url, **more})
    assert answer.status_code == 201, answer.text
    document: dict[str, Any] = answer.json()
    assert answer.headers["location"] == f"/v1/webhooks/{document['id']}"
    return document


def add_message(wiring: Wiring, webhook_id: str, **columns: Any) -> str:
    row = WebhookDelivery(
        webhook_id=webhook_id, job_id="job_1", event="job.failed", payload={"type": "job.failed"},
        **{"id": ids.new("msg"), **columns},
    )  # fmt: skip
    with wiring.database.writing() as session:
        session.add(row)
    return row.id


def test_a_webhook_is_made_listed_and_deleted(client: httpx.Client, receiver: Server) -> None:
    first = made(client, receiver.url)
    assert first["events"] == ["job.cancelled", "job.failed", "job.succeeded"]
    second = made(client, receiver.url, events=["job.started", "job.started"], title="CI")
    assert (second["events"], second["title"], second["disabled_at"]) == (["job.started"], "CI", None)
    assert [item["id"] for item in client.get("/v1/webhooks").json()["data"]] == [second["id"], first["id"]]
    page = client.get(f"/v1/webhooks?limit=1&after={second['id']}").json()
    assert ([item["id"] for item in page["data"]], page["has_more"]) == ([first["id"]], False)
    url = f"/v1/webhooks/{second['id']}"
    assert client.get(url).json() == {name: value for name, value in second.items() if name != "secret"}
    assert [client.delete(url).status_code for _ in range(2)] == [204, 404]
    assert client.get(url).json()["code"] == "not_found"


def test_the_secret_is_shown_once_and_stands_nowhere(
    client: httpx.Client, receiver: Server, wiring: Wiring, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with structlog.testing.capture_logs() as logs:
        webhook = made(client, receiver.url)
        url = f"/v1/webhooks/{webhook['id']}"
        later = [client.post(f"{url}/test"), client.get(url), client.get("/v1/webhooks")]
        replaced = client.post(f"{url}/secret").json()
        later += [client.post(f"{url}/test"), client.get(url), client.get(f"{url}/deliveries")]
    secrets = [webhook["secret"], replaced["secret"]]
    assert all(re.fullmatch(r"whsec_[A-Za-z0-9+/]{43}=", secret) for secret in secrets)
    said = capfd.readouterr()
    with wiring.database.reading() as session:
        row = session.get_one(Webhook, webhook["id"])
        everything = "".join([*(a.text for a in later), str(logs), said.out, said.err, str(vars(row))])
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
    for secret in secrets:
        kept = secret.removeprefix("whsec_")
        assert kept not in everything
        assert kept.encode() not in stored


def test_another_tenants_webhook_is_not_found(
    client: httpx.Client, gateway: Gateway, receiver: Server, wiring: Wiring
) -> None:
    own = made(client, receiver.url)["id"]
    message = add_message(wiring, own, status="failed")
    with gateway.client(gateway.key_of("rival", "admin")) as rival:
        theirs = made(rival, receiver.url)["id"]
        for method, path in (
            ("GET", own), ("DELETE", own), ("POST", f"{own}/secret"), ("POST", f"{own}/test"),
            ("GET", f"{own}/deliveries"), ("POST", f"{own}/deliveries/{message}/retry"),
            ("POST", f"{theirs}/deliveries/{message}/retry"),
        ):  # fmt: skip
            answer = rival.request(method, f"/v1/webhooks/{path}")
            assert (answer.status_code, answer.json()["code"]) == (404, "not_found"), (method, path)
        assert own not in rival.get("/v1/webhooks").text
    assert receiver.asked == []
    assert client.get(f"/v1/webhooks/{own}").status_code == 200


@ONCE
def test_a_key_that_only_reads_changes_nothing(
    client: httpx.Client, gateway: Gateway, receiver: Server
) -> None:
    url = f"/v1/webhooks/{made(client, receiver.url)['id']}"
    with gateway.client(gateway.key_of("default", "webhooks:read")) as reader:
        assert [reader.get(path).status_code for path in ("/v1/webhooks", url, f"{url}/deliveries")] == [
            200
        ] * 3
        assert reader.post("/v1/webhooks", json={"url": receiver.url}).status_code == 403
        assert [reader.post(f"{url}/{path}").status_code for path in ("test", "secret")] == [403] * 2
        assert reader.delete(url).status_code == 403


@ONCE
@pytest.mark.parametrize(
    ("order", "pointer", "words"),
    [
        ({"url": "https://10.0.0.1/"}, "/url", "not on the public internet"),
        ({"url": "https://[::ffff:169.254.169.254]/"}, "/url", "not on the public internet"),
        ({"url": "ftp://1.1.1.1/"}, "/url", "https"),
        ({"url": "http://1.1.1.1/"}, "/url", "over https"),
        ({"url": "https://1.1.1.1:22/"}, "/url", "Port 22"),
        ({"url": "https://me:secret@1.1.1.1/"}, "/url", "user name"),
        ({"url": "https://1.1.1.1/", "events": ["job.exploded"]}, "/events/0", "job.failed"),
        ({"url": "https://1.1.1.1/", "events": []}, "/events", "at least 1"),
        ({"url": "https://1.1.1.1/", "secret": "mine"}, "/secret", "not permitted"),
    ],
)
def test_what_cannot_be_told_is_refused_with_where_and_why(
    client: httpx.Client, order: dict[str, Any], pointer: str, words: str
) -> None:
    answer = client.post("/v1/webhooks", json=order)
    assert answer.status_code == 422
    (finding,) = answer.json()["errors"]
    assert (finding["pointer"], words in finding["detail"]) == (pointer, True), finding
    assert client.get("/v1/webhooks").json()["data"] == []


@ONCE
def test_a_tenant_has_a_greatest_number_of_webhooks(
    client: httpx.Client, gateway: Gateway, receiver: Server
) -> None:
    for _ in range(MOST_WEBHOOKS):
        last = made(client, receiver.url)
    refused = client.post("/v1/webhooks", json={"url": receiver.url})
    assert (refused.status_code, refused.json()["code"]) == (409, "too_many_webhooks")
    with gateway.client(gateway.key_of("rival", "webhooks:write")) as rival:
        made(rival, receiver.url)
    client.delete(f"/v1/webhooks/{last['id']}")
    made(client, receiver.url)


@ONCE
def test_parameters_of_an_address_are_sent_but_not_shown(client: httpx.Client, receiver: Server) -> None:
    webhook = made(client, f"{receiver.url}?team=bolts&token=t0ken&s3cret#h1dden")
    assert webhook["url"] == f"{receiver.url}?team=…&token=…&…"
    client.post(f"/v1/webhooks/{webhook['id']}/test")
    assert receiver.asked[0].path == "/predict?team=bolts&token=t0ken&s3cret"


def test_a_test_is_sent_at_once_and_what_comes_back_is_told(client: httpx.Client, receiver: Server) -> None:
    webhook = made(client, receiver.url)
    url = f"/v1/webhooks/{webhook['id']}/test"
    assert client.post(url).json() == {
        "object": "webhook_test", "webhook_id": webhook["id"], "ok": True, "http_status": 200, "reason": "",
    }  # fmt: skip
    asked = receiver.asked[0]
    told = Verifier(webhook["secret"]).verify(asked.body, dict(asked.headers))
    assert (told["type"], told["data"]) == ("webhook.test", {"webhook_id": webhook["id"]})
    receiver.behave = lambda exchange, asked: exchange.say(302, b"", Location="/elsewhere")
    report = client.post(url).json()
    assert (report["ok"], report["http_status"], "not followed" in report["reason"]) == (False, 302, True)
    down = made(client, "http://127.0.0.1:9/")
    report = client.post(f"/v1/webhooks/{down['id']}/test").json()
    assert (report["ok"], report["http_status"], "cannot be reached" in report["reason"]) == (
        False,
        None,
        True,
    )


def test_a_new_secret_signs_at_once_and_the_old_one_for_a_day(
    client: httpx.Client, receiver: Server, wiring: Wiring
) -> None:
    old = made(client, receiver.url)
    url = f"/v1/webhooks/{old['id']}"
    new = client.post(f"{url}/secret").json()
    assert new["old_secret_until"] is not None
    client.post(f"{url}/test")
    with wiring.database.writing() as session:
        row = session.get_one(Webhook, old["id"])
        row.old_secrets = dict.fromkeys(row.old_secrets, 1.0)
    client.post(f"{url}/test")
    during, afterwards = ([*asked.headers["webhook-signature"].split()] for asked in receiver.asked)
    assert (len(during), len(afterwards)) == (2, 1)
    for secret in (old["secret"], new["secret"]):
        Verifier(secret).verify(receiver.asked[0].body, dict(receiver.asked[0].headers))
    Verifier(new["secret"]).verify(receiver.asked[1].body, dict(receiver.asked[1].headers))


def signing(asked: Asked, *secrets: str) -> list[bool]:
    """Whether each of the secrets has signed."""
    found = []
    for secret in secrets:
        try:
            Verifier(secret).verify(asked.body, dict(asked.headers))
            found.append(True)
        except WebhookVerificationError:
            found.append(False)
    return found


@ONCE
def test_a_secret_replaced_twice_still_signs_unless_it_is_to_be_out(
    client: httpx.Client, receiver: Server, wiring: Wiring
) -> None:
    webhook = made(client, receiver.url)
    url = f"/v1/webhooks/{webhook['id']}"
    second, third = (client.post(f"{url}/secret").json()["secret"] for _ in range(2))
    client.post(f"{url}/test")
    assert signing(receiver.asked[-1], webhook["secret"], second, third) == [True] * 3
    with wiring.database.writing() as session:  # sealed by a key that was lost
        row = session.get_one(Webhook, webhook["id"])
        row.old_secrets = {f"lost{sealed}": until for sealed, until in row.old_secrets.items()}
    assert client.post(f"{url}/test").json()["ok"]
    assert signing(receiver.asked[-1], second, third) == [False, True]
    last = client.post(f"{url}/secret?overlap_s=0").json()
    assert last["old_secret_until"] is None
    client.post(f"{url}/test")
    assert signing(receiver.asked[-1], third, last["secret"]) == [False, True]
    assert client.post(f"{url}/secret?overlap_s=-1").status_code == 422


def test_messages_are_listed_with_what_became_of_them_and_sent_again(
    client: httpx.Client, receiver: Server, wiring: Wiring
) -> None:
    own, other = made(client, receiver.url)["id"], made(client, receiver.url)["id"]
    failed = add_message(
        wiring, own, id="msg_1", status="failed", attempts=8, http_status=500, reason="It answered 500."
    )
    waiting = add_message(wiring, own, id="msg_2", attempts=1, next_at=4e9)
    add_message(wiring, other, next_at=4e9)
    url = f"/v1/webhooks/{own}/deliveries"
    newest = client.get(f"{url}?limit=1").json()
    assert ([item["id"] for item in newest["data"]], newest["has_more"]) == ([waiting], True)
    assert newest["data"][0]["next_attempt_at"] == "2096-10-02T07:06:40Z"
    (oldest,) = client.get(f"{url}?after={waiting}").json()["data"]
    shown = {name: oldest[name] for name in ("id", "status", "attempts", "http_status", "reason", "job_id")}
    assert list(shown.values()) == [failed, "failed", 8, 500, "It answered 500.", "job_1"]
    again = client.post(f"{url}/{failed}/retry")
    assert (again.status_code, again.json()["status"], again.json()["attempts"]) == (202, "pending", 0)
    assert (again.json()["http_status"], again.json()["reason"]) == (None, "")
    assert again.json()["next_attempt_at"] < "2096"
    assert client.post(f"{url}/msg_none/retry").status_code == 404
    under_way = add_message(wiring, own, status="sending", next_at=4e9)
    refused = client.post(f"{url}/{under_way}/retry")
    assert (refused.status_code, refused.json()["code"]) == (409, "message_under_way")
    left_behind = add_message(wiring, own, status="sending", next_at=1.0)
    assert client.post(f"{url}/{left_behind}/retry").status_code == 202


def test_a_disabled_webhook_is_enabled_by_a_test_that_arrives(
    client: httpx.Client, receiver: Server, wiring: Wiring
) -> None:
    webhook_id = made(client, receiver.url)["id"]
    message = add_message(wiring, webhook_id, status="failed")
    url = f"/v1/webhooks/{webhook_id}"
    with wiring.database.writing() as session:
        session.execute(sa.update(Webhook).values(disabled_at=1.0))
    refused = client.post(f"{url}/deliveries/{message}/retry")
    assert (refused.status_code, refused.json()["code"]) == (409, "webhook_disabled")
    receiver.behave = lambda exchange, asked: exchange.say(500, b"")
    client.post(f"{url}/test")
    assert client.get(url).json()["disabled_at"] is not None
    receiver.behave = lambda exchange, asked: exchange.say(200, b"")
    client.post(f"{url}/test")
    assert client.get(url).json()["disabled_at"] is None
    assert client.post(f"{url}/deliveries/{message}/retry").status_code == 202
    receiver.behave = lambda exchange, asked: exchange.say(410, b"")
    assert "disabled" in client.post(f"{url}/test").json()["reason"]
    assert client.get(url).json()["disabled_at"] is not None
    (ended,) = client.get(f"{url}/deliveries").json()["data"]
    assert (ended["status"], ended["next_attempt_at"]) == ("failed", None)


@ONCE
def test_the_receiver_of_the_guide_knows_what_is_genuine(client: httpx.Client, receiver: Server) -> None:
    webhook = made(client, receiver.url)
    client.post(f"/v1/webhooks/{webhook['id']}/test")
    asked = receiver.asked[0]
    code = re.search(r"<!-- receiver -->\n```python\n(.+?)```", GUIDE.read_text(), re.DOTALL)
    assert code is not None
    guide: dict[str, Any] = {}
    exec(code[1], guide)
    is_genuine = guide["is_genuine"]
    assert is_genuine(asked.headers, asked.body, webhook["secret"])
    assert not is_genuine(asked.headers, asked.body + b" ", webhook["secret"])
    assert not is_genuine(asked.headers, asked.body, "whsec_AAAA")
    late = {**asked.headers, "webhook-timestamp": str(int(asked.headers["webhook-timestamp"]) - 600)}
    assert not is_genuine(late, asked.body, webhook["secret"])


@ONCE
def test_the_client_does_all_of_it(gateway: Gateway, receiver: Server) -> None:
    with Dram(gateway.url, gateway.key) as dram:
        webhook = dram.webhooks.create(receiver.url, events=["job.failed"], title="CI")
        assert webhook.secret is not None
        assert dram.webhooks.get(webhook.id).secret is None
        assert [item.title for item in dram.webhooks.list().data] == ["CI"]
        assert dram.webhooks.test(webhook.id).ok
        assert dram.webhooks.replace_secret(webhook.id).secret not in (None, webhook.secret)
        message = add_message(gateway.wiring, webhook.id, status="failed")
        assert [item.status for item in dram.webhooks.deliveries(webhook.id, limit=5).data] == ["failed"]
        assert dram.webhooks.send_again(webhook.id, message).status == "pending"
        dram.webhooks.delete(webhook.id)
        with pytest.raises(DramApiError):
            dram.webhooks.get(webhook.id)


@ONCE
def test_the_asynchronous_client_does_all_of_it(gateway: Gateway, receiver: Server) -> None:
    async def use() -> None:
        async with AsyncDram(gateway.url, gateway.key) as dram:
            webhook = await dram.webhooks.create(receiver.url)
            assert (await dram.webhooks.get(webhook.id)).events == webhook.events
            assert [item.id for item in (await dram.webhooks.list()).data] == [webhook.id]
            assert (await dram.webhooks.test(webhook.id)).http_status == 200
            assert (await dram.webhooks.replace_secret(webhook.id)).secret != webhook.secret
            message = add_message(gateway.wiring, webhook.id, status="failed")
            assert [item.id for item in (await dram.webhooks.deliveries(webhook.id)).data] == [message]
            assert (await dram.webhooks.send_again(webhook.id, message)).attempts == 0
            await dram.webhooks.delete(webhook.id)
            assert list((await dram.webhooks.list()).data) == []

    asyncio.run(use())
