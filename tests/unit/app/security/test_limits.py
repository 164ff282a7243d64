"""The order in which an upload's middleware does things, seen from inside."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from app.keys import service as keys
from app.security.limits import BodyLimits
from app.wiring import Wiring


class Exchange:
    """One request to an app that reads its whole body; records what happens, in order."""

    def __init__(self, wiring: Wiring, path: str, headers: dict[str, str], pieces: list[bytes]) -> None:
        app = SimpleNamespace(state=SimpleNamespace(wiring=wiring))
        self.scope = {
            "type": "http", "method": "POST", "path": path, "app": app,
            "headers": [(name.lower().encode(), value.encode()) for name, value in headers.items()],
        }  # fmt: skip
        self.pieces = pieces
        self.log: list[str] = []
        self.status = 0
        self.body = b""

    async def app(self, scope: Any, receive: Any, send: Any) -> None:
        self.log.append("app")
        while (await receive())["more_body"]:
            pass
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive(self) -> dict[str, Any]:
        self.log.append("read")
        if not self.pieces:
            await asyncio.sleep(60)
        return {"type": "http.request", "body": self.pieces.pop(0), "more_body": bool(self.pieces)}

    async def send(self, message: dict[str, Any]) -> None:
        if message["type"] == "http.response.start":
            self.log.append("answer")
            self.status = message["status"]
        self.body += message.get("body", b"")

    def run(self) -> Exchange:
        asyncio.run(BodyLimits(self.app)(self.scope, self.receive, self.send))  # type: ignore[arg-type]
        return self


@pytest.fixture(params=["sqlite"])
def database_url(tmp_path: Any, sqlite_template: Any) -> str:
    (tmp_path / "dram.db").write_bytes(sqlite_template.read_bytes())
    return f"sqlite:///{tmp_path / 'dram.db'}"


@pytest.mark.parametrize(
    "path",
    ["/v1/datasets", "/v1/datasets/", "/v1/students/stu_1/predict", "/v1/students/stu_1/class-map"],
)
def test_an_upload_without_a_key_is_answered_before_it_is_read(path: str, wiring: Wiring) -> None:
    exchange = Exchange(wiring, path, {"Content-Length": "30"}, [b"x" * 10] * 3).run()
    assert (exchange.status, json.loads(exchange.body)["code"]) == (401, "unauthenticated")
    assert exchange.log[0] == "answer"
    assert "app" not in exchange.log


def test_what_is_left_of_a_refused_body_is_read_away(wiring: Wiring) -> None:
    exchange = Exchange(wiring, "/v1/datasets", {"Content-Length": "30"}, [b"x" * 10] * 3).run()
    assert exchange.log == ["answer", "read", "read", "read"]


def test_a_client_that_waits_to_be_asked_for_its_body_is_not_asked(wiring: Wiring) -> None:
    headers = {"Content-Length": "30", "Expect": "100-continue"}
    assert Exchange(wiring, "/v1/datasets", headers, [b"x" * 30]).run().log == ["answer"]


def test_an_upload_with_a_key_reaches_the_route(wiring: Wiring) -> None:
    headers = {"Content-Length": "30", "Authorization": f"Bearer {keys.ensure_first_key(wiring)}"}
    exchange = Exchange(wiring, "/v1/datasets", headers, [b"x" * 10] * 3).run()
    assert (exchange.status, exchange.log) == (200, ["app", "read", "read", "read", "answer"])


def test_a_declared_size_is_compared_before_anything_is_read(wiring: Wiring) -> None:
    exchange = Exchange(wiring, "/v1/jobs", {"Content-Length": str(2**20 + 1)}, [b"x"]).run()
    assert (exchange.status, exchange.log[0]) == (413, "answer")
