"""The outermost layer: ids, headers, metrics, logs, and answers that break off."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx
import pytest
import structlog
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse
from prometheus_client import generate_latest
from starlette.requests import ClientDisconnect

from app import observability, problem


@pytest.fixture
def app() -> FastAPI:
    app = FastAPI()
    app.state.metrics = observability.Metrics()
    problem.install(app)
    app.add_middleware(observability.Observed, metrics=app.state.metrics)

    @app.get("/things/{thing_id}")
    async def thing(thing_id: str) -> str:
        return str(structlog.contextvars.get_contextvars()["request_id"])

    @app.get("/kept")
    async def kept() -> Response:
        return Response(headers={"Cache-Control": "private, no-cache"})

    @app.get("/broken-off")
    async def broken_off() -> StreamingResponse:
        async def pieces() -> AsyncIterator[bytes]:
            yield b"half"
            raise RuntimeError("the disk is gone")

        return StreamingResponse(pieces())

    @app.get("/left")
    async def left() -> None:
        raise ClientDisconnect

    return app


def ask(app: FastAPI, path: str, method: str = "GET", **headers: str | bytes) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://dram") as client:
            return await client.request(method, path, headers=list(headers.items()))  # type: ignore[arg-type]

    return asyncio.run(send())


def counted(app: FastAPI) -> str:
    return generate_latest(app.state.metrics.registry).decode()


def test_a_request_id_is_made_and_is_in_the_log_context(app: FastAPI) -> None:
    answer = ask(app, "/things/1")
    assert answer.headers["x-request-id"].startswith("req_")
    assert answer.json() == answer.headers["x-request-id"]
    assert ask(app, "/things/1").headers["x-request-id"] != answer.headers["x-request-id"]
    assert structlog.contextvars.get_contextvars() == {}


def test_a_request_id_that_is_given_is_kept(app: FastAPI) -> None:
    assert ask(app, "/things/1", **{"X-Request-Id": "trace-7.a"}).json() == "trace-7.a"


@pytest.mark.parametrize("given", ["a b", "x" * 65, 'x"}', "ü", ""])
def test_a_request_id_that_could_harm_the_log_is_not_kept(app: FastAPI, given: str) -> None:
    answer = ask(app, "/things/1", **{"X-Request-Id": given.encode()})
    assert answer.headers["x-request-id"].startswith("req_")


def test_answers_are_not_sniffed_and_not_stored_unless_the_route_says_so(app: FastAPI) -> None:
    for path in ("/things/1", "/nowhere"):
        assert ask(app, path).headers["x-content-type-options"] == "nosniff"
        assert ask(app, path).headers["cache-control"] == "no-store"
    assert ask(app, "/kept").headers["cache-control"] == "private, no-cache"


def test_requests_are_counted_by_route_template_not_by_path(app: FastAPI) -> None:
    for number in range(3):
        ask(app, f"/things/{number}")
    ask(app, "/nowhere/else")
    ask(app, "/things/1", "BREW")
    text = counted(app)
    assert 'dram_http_requests_total{method="GET",route="/things/{thing_id}",status="200"} 3.0' in text
    assert 'dram_http_requests_total{method="GET",route="unmatched",status="404"} 1.0' in text
    assert 'method="other"' in text
    assert "BREW" not in text
    assert 'dram_http_request_seconds_count{route="/things/{thing_id}"} 4.0' in text


def test_an_answer_that_breaks_off_is_cut_and_not_made_into_two(app: FastAPI) -> None:
    with pytest.raises(RuntimeError, match="the disk is gone"):
        ask(app, "/broken-off")


def test_a_client_that_leaves_is_no_error(app: FastAPI) -> None:
    with pytest.raises(AssertionError):  # httpx: no answer was begun
        ask(app, "/left")
    assert 'route="/left",status="499"} 1.0' in counted(app)


@pytest.fixture
def records(capsys: pytest.CaptureFixture[str]) -> Iterator[Any]:
    root = logging.getLogger()
    before = (root.handlers, root.level)

    def read() -> list[dict[str, Any]]:
        return [json.loads(line) for line in capsys.readouterr().err.splitlines()]

    yield read
    root.handlers, root.level = before
    structlog.reset_defaults()


def test_logs_are_json_with_the_ids_of_their_context(records: Any) -> None:
    observability.configure("INFO", as_json=True)
    with structlog.contextvars.bound_contextvars(job="job_1", stage="distill", shard="shd_1"):
        structlog.get_logger().info("claimed", attempt=2)
        logging.getLogger("a.library").warning("careful")
        structlog.get_logger().debug("not at this level")
    first, second = records()
    assert (first["event"], first["job"], first["stage"], first["shard"], first["attempt"]) == (
        "claimed",
        "job_1",
        "distill",
        "shd_1",
        2,
    )
    assert (second["event"], second["level"], second["job"]) == ("careful", "warning", "job_1")


@pytest.mark.parametrize("as_json", [True, False])
def test_an_unexpected_error_is_logged_with_its_traceback_but_no_variables(
    capsys: pytest.CaptureFixture[str], records: Any, as_json: bool
) -> None:
    observability.configure("INFO", as_json=as_json)
    key = "".join(("dram", "_", "secret"))
    try:
        raise RuntimeError("a bug" * bool(key))
    except RuntimeError as error:
        problem.unexpected(error)
    written = capsys.readouterr().err
    assert "RuntimeError: a bug" in written
    assert "test_observability" in written
    assert key not in written
