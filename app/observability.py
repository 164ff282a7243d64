"""Logs with the ids of request, job, stage and shard; metrics by route template; the outermost middleware.

The middleware is one thin ASGI layer, because every request pays for it: request id, security headers, metrics,
access log, and the answer to an error that nobody foresaw. It also refuses an address with NUL, which PostgreSQL takes
in no text.
"""

from __future__ import annotations

import logging
import re
import secrets
import sys
import time
from typing import Any

import structlog
from prometheus_client import CollectorRegistry, Counter, GCCollector, Histogram, ProcessCollector
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from structlog.contextvars import bind_contextvars, reset_contextvars

from app import problem
from app.errors import BadRequest, DramError

log = structlog.get_logger()

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._-]{1,64}")
_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 60.0)
_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_SNIFF = (b"x-content-type-options", b"nosniff")
_NO_STORE = (b"cache-control", b"no-store")
_SLOW_S = 1.0
_CLIENT_LEFT = 499  # in logs and metrics only: the request ended without an answer


def configure(level: str, as_json: bool) -> None:
    """Send structlog's and the standard library's records to stderr in one form."""
    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    number = logging.getLevelNamesMapping()[level.upper()]
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    last = (
        [structlog.processors.format_exc_info, structlog.processors.JSONRenderer(ensure_ascii=False)]
        if as_json
        else [
            structlog.dev.ConsoleRenderer(
                colors=sys.stderr.isatty(),
                exception_formatter=structlog.dev.plain_traceback,  # rich's prints every local variable
            )
        ]
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, *last],
        )
    )
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(number)
    for name in ("uvicorn", "uvicorn.error", "uvicorn.access"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
    logging.getLogger("uvicorn.access").disabled = True  # the middleware writes its own
    for name in ("alembic", "httpx", "PIL", "asyncio", "multipart"):
        logging.getLogger(name).setLevel(max(number, logging.WARNING))


class Metrics:
    """The gateway's counters. One registry for each app, so that two apps in one process do not mix."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._requests = Counter(
            "dram_http_requests_total",
            "Answered requests.",
            ("method", "route", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "dram_http_request_seconds",
            "Time from a request's head to the end of its answer.",
            ("route",),
            buckets=_BUCKETS,
            registry=self.registry,
        )
        # `labels()` checks and joins its arguments each time; a dictionary does not.
        self._counted: dict[tuple[str, str, int], Counter] = {}
        self._timed: dict[str, Histogram] = {}

    def observe(self, method: str, route: str, status: int, seconds: float) -> None:
        key = (method, route, status)
        counter = self._counted.get(key)
        if counter is None:
            counter = self._counted[key] = self._requests.labels(method, route, str(status))
        counter.inc()
        histogram = self._timed.get(route)
        if histogram is None:
            histogram = self._timed[route] = self._seconds.labels(route)
        histogram.observe(seconds)


class Observed:
    """Outermost middleware: `scope["request_id"]`, X-Request-Id, nosniff, no-store, metrics, the last resort."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id = _given_id(scope) or f"req_{secrets.token_hex(12)}"
        scope["request_id"] = request_id
        header = (b"x-request-id", request_id.encode())
        started = time.perf_counter()
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = message["headers"] = [*message.get("headers", ()), header, _SNIFF]
                if not any(name == b"cache-control" for name, _ in headers):
                    headers.append(_NO_STORE)
            await send(message)

        tokens = bind_contextvars(request_id=request_id)
        try:
            _check_address(scope)
            await self.app(scope, receive, send_with_headers)
        except ClientDisconnect:
            log.info("client_left")  # nobody is left to hear an answer
        except Exception as error:
            if status:
                problem.unexpected(error)
                raise  # the answer has begun: the server must cut the connection
            known = error if isinstance(error, DramError) else problem.unexpected(error)
            await problem.respond(known, request_id)(scope, receive, send_with_headers)
        finally:
            self._record(scope, status, time.perf_counter() - started)
            reset_contextvars(**tokens)

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        status = status or _CLIENT_LEFT
        method = scope["method"] if scope["method"] in _METHODS else "other"
        route = getattr(scope.get("route"), "path", None) or "unmatched"
        self.metrics.observe(method, route, status, seconds)
        # Polls that went well would drown everything else.
        quiet = status < 400 and method in ("GET", "HEAD") and seconds < _SLOW_S
        (log.debug if quiet else log.info)(
            "request", method=method, route=route, status=status, ms=round(seconds * 1000, 1)
        )


def _check_address(scope: Scope) -> None:
    if "\0" in scope["path"] or b"%00" in scope.get("query_string", b""):
        raise BadRequest(
            "The address contains the character NUL (%00), and no id or name here does. Leave it out.",
            code="address_invalid",
        )


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            return str(value.decode()) if _REQUEST_ID.fullmatch(value) else None
    return None
