"""FastAPI dependencies: the wiring of this process, and who is calling."""

from __future__ import annotations

from typing import Annotated, Any, cast

from fastapi import Depends, Request

from app.errors import Forbidden
from app.keys import service as keys
from app.security.principal import Principal
from app.wiring import Wiring


async def wiring(request: Request) -> Wiring:
    """Of this process. A coroutine, because FastAPI sends plain functions through the thread pool."""
    return wiring_of(request)


def wiring_of(request: Request) -> Wiring:
    return cast(Wiring, request.app.state.wiring)


Wired = Annotated[Wiring, Depends(wiring)]


async def caller(request: Request, scope: str) -> Principal:
    """Who calls, with this scope. For a route that takes the request itself, because each FastAPI dependency costs
    as much as a small query."""
    principal = await keys.authenticate(wiring_of(request), request.headers)
    if not principal.may(scope):
        raise Forbidden(
            f"This key has no scope '{scope}' (it has: {', '.join(sorted(principal.scopes)) or 'none'}). "
            "Ask an administrator for a key with it."
        )
    return principal


def allowed(scope: str) -> Any:
    """`principal: Annotated[Principal, allowed("jobs:read")]`: 401 without a valid key, 403 without the scope."""

    async def principal(request: Request) -> Principal:
        return await caller(request, scope)

    return Depends(principal)
