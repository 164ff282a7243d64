"""Every error of the gateway as RFC 9457 application/problem+json, and its place in the OpenAPI document."""

from __future__ import annotations

import errno
import json
from http import HTTPStatus
from typing import Any

import sqlalchemy as sa
import structlog
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.responses import Response

from app.errors import BadRequest, DramError, Finding, InsufficientStorage, Invalid, Unavailable, findings_of

log = structlog.get_logger()

MEDIA_TYPE = "application/problem+json"
_RETRY_AFTER_S = "5"
_DETAILS = {
    404: "There is no such route. /openapi.json lists the routes.",
    405: "This route does not answer this method. The Allow header names the methods it answers.",
}


class ProblemFinding(BaseModel):
    code: str = Field(description="Stable name of what is wrong.")
    pointer: str = Field(description="JSON pointer into the body, or /query/…, /path/…, /header/…")
    detail: str


class Problem(BaseModel):
    """An error. Switch on `code`, show `detail`, quote `request_id` when you ask for help."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[ProblemFinding]
    request_id: str


def respond(error: DramError, request_id: str) -> Response:
    return Response(
        json.dumps(error.document(request_id=request_id), ensure_ascii=False),
        status_code=error.status,
        headers=error.headers,
        media_type=MEDIA_TYPE,
    )


def install(app: FastAPI) -> None:
    """Make the app answer every error as a problem, and say so in its OpenAPI document."""
    app.add_exception_handler(DramError, _dram_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.add_exception_handler(HTTPException, _http_exception)
    app.add_exception_handler(sa.exc.DBAPIError, _database_error)
    app.add_exception_handler(sa.exc.TimeoutError, _database_error)
    app.add_exception_handler(OSError, _os_error)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]


def unexpected(error: Exception) -> DramError:
    """What the caller is told of an error that nobody foresaw; the traceback goes to the log."""
    log.error("unexpected_error", exc_info=error)
    return DramError("Something went wrong inside the service. Quote the request_id when you report it.")


def _request_id(request: Request) -> str:
    return str(request.scope.get("request_id", ""))


async def _dram_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, DramError)
    return respond(error, _request_id(request))


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return respond(_from_validation(error), _request_id(request))


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    # FastAPI wraps what is raised while a body is read; the cause knows better what is wrong.
    known = error.__cause__ if isinstance(error.__cause__, DramError) else _from_http(error)
    return respond(known, _request_id(request))


async def _database_error(request: Request, error: Exception) -> Response:
    return respond(_from_database(error), _request_id(request))


async def _os_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, OSError)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        log.error("storage_full", error=str(error))
        return respond(_no_room(), _request_id(request))
    return respond(unexpected(error), _request_id(request))


def _from_validation(error: RequestValidationError) -> DramError:
    for item in error.errors():
        if item["type"] == "json_invalid":
            detail = f"The body is no valid JSON: {item['ctx']['error']} at character {item['loc'][-1]}."
            return BadRequest(detail, code="json_invalid")
    findings = findings_of(error.errors(), in_request=True)
    first = findings[0]
    more = f" (and {len(findings) - 1} more, see errors)" if len(findings) > 1 else ""
    return Invalid(f"{first.pointer or 'The body'}: {first.detail}{more}.", findings=findings)


def _from_http(error: HTTPException) -> DramError:
    status = HTTPStatus(error.status_code)
    problem = DramError(_DETAILS.get(status, str(error.detail)), headers=dict(error.headers or {}))
    problem.status = status.value
    problem.code = "too_large" if status == 413 else status.name.lower()
    problem.title = status.phrase
    return problem


def _from_database(error: Exception) -> DramError:
    reason = str(getattr(error, "orig", None) or error)
    if "disk is full" in reason or "No space left" in reason:
        log.error("database_full", error=reason)
        return _no_room()
    lost = getattr(error, "connection_invalidated", False)
    if not lost and not isinstance(
        error, sa.exc.OperationalError | sa.exc.InterfaceError | sa.exc.TimeoutError
    ):
        return unexpected(error)
    log.error("database_unavailable", error=reason)
    return Unavailable(
        "The database does not answer at present. Nothing was changed; try again soon.",
        code="database_unavailable",
        headers={"Retry-After": _RETRY_AFTER_S},
    )


def _no_room() -> DramError:
    return InsufficientStorage(
        "The service has no room left to store this. Delete what you do not need, or ask the operator for space."
    )


def _openapi(app: FastAPI) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=app.version,
            description=app.description,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        _document_problems(document)
        app.openapi_schema = document
    return app.openapi_schema


def _document_problems(document: dict[str, Any]) -> None:
    components = document.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for model in (ProblemFinding, Problem):
        schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
        schema.pop("$defs", None)
        schemas[model.__name__] = schema
    components["securitySchemes"] = {
        "api_key": {"type": "http", "scheme": "bearer", "bearerFormat": "dram_…"}
    }
    for path, operations in document["paths"].items():
        for operation in operations.values():
            _document_operation(operation, keyed=path.startswith("/v1/"))


def _document_operation(operation: dict[str, Any], keyed: bool) -> None:
    responses = operation["responses"]
    described = {"422": "The input is not valid", "default": "Any other error"}
    if keyed:
        operation["security"] = [{"api_key": []}]
        described |= {"401": "No valid API key", "403": "The key lacks the scope"}
    if "422" not in responses:
        del described["422"]
    for status, description in described.items():
        responses[status] = {"description": description}
    for status, response in responses.items():
        if status in described or (int(status) >= 400 and "content" not in response):
            response["content"] = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}}


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses=` of a route that answers with these error statuses."""
    return {status: {"description": HTTPStatus(status).phrase} for status in statuses}


__all__ = ["Finding", "Problem", "documented", "install", "respond", "unexpected"]
