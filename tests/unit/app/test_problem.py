"""Every error is a problem document, and none of them gives away what it should not."""

from __future__ import annotations

import asyncio
import errno
from typing import Annotated, Any, Literal

import httpx
import pytest
import sqlalchemy as sa
from fastapi import FastAPI, Header, HTTPException
from pydantic import BaseModel, Field

from app import observability, problem
from app.errors import Conflict, TooLarge

SECRET = "hunter2-the-secret"


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class Inner(BaseModel):
    steps: int = Field(ge=1)


class Order(BaseModel):
    name: str = Field(max_length=5)
    inner: dict[str, Inner] = {}
    pet: Annotated[Cat | Dog, Field(discriminator="kind")] | None = None


def raises(error: Exception) -> Any:
    def route() -> None:
        raise error

    return route


def _operational(reason: str) -> sa.exc.OperationalError:
    return sa.exc.OperationalError("SELECT secret FROM users", {}, Exception(reason))


class Broken(Exception):
    pass


@pytest.fixture(scope="module")
def app() -> FastAPI:
    app = FastAPI(redirect_slashes=False)
    problem.install(app)
    app.add_middleware(observability.Observed, metrics=observability.Metrics())
    errors: dict[str, Exception] = {
        "conflict": Conflict("It has ended.", code="job_ended", headers={"X-More": "yes"}),
        "database": _operational("connection refused"),
        "full-database": _operational("database or disk is full"),
        "statement": sa.exc.ProgrammingError(f"SELECT '{SECRET}'", {}, Exception("syntax error")),
        "pool": sa.exc.TimeoutError("QueuePool limit"),
        "full-disk": OSError(errno.ENOSPC, "No space left on device", "/srv/secret"),
        "file": FileNotFoundError("/srv/secret"),
        "bug": Broken(SECRET),
        "teapot": HTTPException(418, "short and stout"),
    }
    for path, error in errors.items():
        app.add_api_route(f"/{path}", raises(error))

    def order(order: Order, limit: int = 1, token: Annotated[int | None, Header()] = None) -> None: ...

    app.add_api_route("/orders", order, methods=["POST"])

    async def wrapped() -> None:
        try:
            raise TooLarge("Too many bytes.")
        except TooLarge as cause:
            raise HTTPException(400, "There was an error parsing the body") from cause

    app.add_api_route("/wrapped", wrapped)
    return app


def ask(app: FastAPI, method: str, path: str, **more: Any) -> httpx.Response:
    async def send() -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://dram") as client:
            return await client.request(method, path, **more)

    return asyncio.run(send())


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/conflict", 409, "job_ended"),
        ("GET", "/nowhere", 404, "not_found"),
        ("GET", "/conflict/", 404, "not_found"),
        ("DELETE", "/conflict", 405, "method_not_allowed"),
        ("GET", "/teapot", 418, "im_a_teapot"),
        ("GET", "/database", 503, "database_unavailable"),
        ("GET", "/pool", 503, "database_unavailable"),
        ("GET", "/full-database", 507, "insufficient_storage"),
        ("GET", "/full-disk", 507, "insufficient_storage"),
        ("GET", "/statement", 500, "internal_error"),
        ("GET", "/file", 500, "internal_error"),
        ("GET", "/bug", 500, "internal_error"),
        ("GET", "/wrapped", 413, "too_large"),
    ],
)
def test_every_error_is_a_problem_document(
    app: FastAPI, method: str, path: str, status: int, code: str
) -> None:
    answer = ask(app, method, path)
    assert (answer.status_code, answer.headers["content-type"]) == (status, "application/problem+json")
    document = answer.json()
    assert problem.Problem.model_validate(document)
    assert document.keys() == problem.Problem.model_fields.keys()
    assert (document["status"], document["code"]) == (status, code)
    assert document["type"] == f"urn:dram:error:{code}"
    assert document["request_id"] == answer.headers["x-request-id"]
    assert SECRET not in answer.text
    assert "/srv" not in answer.text


def test_an_errors_own_headers_are_sent(app: FastAPI) -> None:
    assert ask(app, "GET", "/conflict").headers["x-more"] == "yes"
    assert ask(app, "DELETE", "/conflict").headers["allow"] == "GET"


def test_a_database_that_is_away_says_when_to_come_back(app: FastAPI) -> None:
    assert int(ask(app, "GET", "/database").headers["retry-after"]) > 0


def test_validation_names_every_place_by_pointer(app: FastAPI) -> None:
    body = {"name": "too long", "inner": {"a/b~c": {"steps": 0}}}
    answer = ask(app, "POST", "/orders?limit=x", json=body, headers={"token": "y"})
    assert answer.status_code == 422
    found = {(item["pointer"], item["code"]) for item in answer.json()["errors"]}
    assert found == {
        ("/name", "string_too_long"),
        ("/inner/a~1b~0c/steps", "greater_than_equal"),
        ("/query/limit", "int_parsing"),
        ("/header/token", "int_parsing"),
    }


@pytest.mark.parametrize(
    "body", [{"name": SECRET}, {"name": "a", "pet": {"kind": SECRET}}, {"name": {"a": SECRET}}]
)
def test_validation_never_repeats_the_input(app: FastAPI, body: dict[str, Any]) -> None:
    answer = ask(app, "POST", "/orders", json=body)
    assert answer.status_code == 422
    assert SECRET not in answer.text


def test_a_body_that_is_no_json_is_a_400_that_says_where(app: FastAPI) -> None:
    answer = ask(app, "POST", "/orders", content=b'{"name": ', headers={"content-type": "application/json"})
    assert (answer.status_code, answer.json()["code"]) == (400, "json_invalid")
    assert "character 9" in answer.json()["detail"]


def test_thousands_of_findings_are_cut_short(app: FastAPI) -> None:
    body = {"name": "a", "inner": {str(number): {"steps": 0} for number in range(5000)}}
    assert len(ask(app, "POST", "/orders", json=body).json()["errors"]) == 100
