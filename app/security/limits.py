"""Caps on request bodies, before anything parses them: who sends, how much, how long.

FastAPI parses a body before it solves a route's dependencies, and uvicorn limits neither size nor time. Headers
that never end are the reverse proxy's concern: ASGI sees a request only when its headers are complete.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import problem
from app.errors import DramError, RequestTimeout, TooLarge
from app.keys import service as keys
from app.settings import Settings
from app.wiring import Wiring

#: Largest body of a route that takes no files.
SMALL_BODY = 2**20
#: Seconds in which the rest of a refused body is read and thrown away, so that the client gets to see the answer.
LINGER_S = 2.0
#: A teacher's description: 10,000 class names of 100 characters of 4 bytes.
MAX_SPEC_BYTES = 5 * 2**20
_FORM_OVERHEAD = 2**16

#: Routes that take files: method, path, largest body.
UPLOADS: tuple[tuple[str, re.Pattern[str], Callable[[Settings], int]], ...] = (
    ("POST", re.compile(r"/v1/datasets"), lambda settings: settings.max_upload_bytes),
    (
        "POST",
        re.compile(r"/v1/students/[^/]+/(predict|class-map)"),
        lambda settings: settings.max_image_bytes + _FORM_OVERHEAD,
    ),
    (
        "POST",
        re.compile(r"/v1/teachers"),
        lambda settings: settings.max_model_bytes + MAX_SPEC_BYTES + _FORM_OVERHEAD,
    ),
    ("POST", re.compile(r"/v1/teachers/[^/]+/probe"), lambda settings: settings.max_image_bytes),
)


class BodyLimits:
    """Pure ASGI middleware. Reads the wiring from `app.state.wiring`.

    An upload's API key is checked before the first byte of its body is read. A body larger than its route's
    cap is answered with 413, at once where it says its length; one that takes too long to arrive with 408.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        length = headers.get("content-length")
        if length == "0" or (
            length is None and "transfer-encoding" not in headers and scope["method"] != "POST"
        ):
            await self.app(scope, receive, send)
            return
        wiring: Wiring = scope["app"].state.wiring
        cap = _upload_cap(wiring.settings, scope["method"], scope["path"])
        body = _Body(receive, send, cap or SMALL_BODY, wiring.settings.upload_deadline_s, "expect" in headers)
        try:
            if length is not None and int(length) > body.cap:
                raise _too_large(body.cap)
            if cap is not None:
                await keys.authenticate(wiring, headers)
        except DramError as error:
            response = problem.respond(error, str(scope.get("request_id", "")))
            await response(scope, body.receive, body.send)
            return
        await self.app(scope, body.receive, body.send)


class _Body:
    """Counts and times what arrives; lets the client read an answer that comes before its body has ended."""

    def __init__(self, receive: Receive, send: Send, cap: int, deadline_s: float, expects: bool) -> None:
        self.cap = cap
        self._receive = receive
        self._send = send
        self._deadline_s = deadline_s
        self._ends_at = time.monotonic() + deadline_s
        self._client_waits = expects  # for "100 Continue", which the first receive sends
        self._received = 0
        self._complete = False

    async def receive(self) -> Message:
        if self._complete:
            return await self._receive()
        self._client_waits = False
        try:
            async with asyncio.timeout(self._ends_at - time.monotonic()):
                message = await self._receive()
        except TimeoutError:
            raise RequestTimeout(
                f"The request body did not arrive within {self._deadline_s:g} s. Nothing was stored; "
                "send it over a faster connection or in smaller data sets.",
                headers={"Connection": "close"},
            ) from None
        self._received += len(message.get("body", b""))
        self._complete = not message.get("more_body", False)
        if self._received > self.cap:
            raise _too_large(self.cap)
        return message

    async def send(self, message: Message) -> None:
        if self._complete or self._client_waits:
            await self._send(message)
        elif message["type"] == "http.response.start":
            named = {name.lower() for name, _ in message.get("headers", ())}
            close = [] if b"connection" in named else [(b"connection", b"close")]
            await self._send({**message, "headers": [*message.get("headers", ()), *close]})
        elif message["type"] == "http.response.body" and not message.get("more_body", False):
            await self._send({**message, "more_body": True})
            await self._drain()
            await self._send({"type": "http.response.body", "body": b""})
        else:
            await self._send(message)

    async def _drain(self) -> None:
        try:
            async with asyncio.timeout(LINGER_S):
                while (await self._receive()).get("more_body", False):
                    pass
        except TimeoutError:
            pass


def _upload_cap(settings: Settings, method: str, path: str) -> int | None:
    for expected, pattern, cap in UPLOADS:
        if method == expected and pattern.fullmatch(path.rstrip("/")):
            return cap(settings)
    return None


def _too_large(cap: int) -> TooLarge:
    size = f"{cap / 2**20:,.1f} MiB" if cap >= 2**20 else f"{cap:,} bytes"
    return TooLarge(
        f"The request body is larger than the {size} that this route takes. Nothing was stored; "
        "send less, for example images scaled down to 1024 pixels.",
        headers={"Connection": "close"},
    )
