"""Who is calling. Plain data."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Literal, get_args

#: What a key may be allowed to do. `admin` includes all of them and the management of keys.
Scope = Literal[
    "datasets:read",
    "datasets:write",
    "jobs:read",
    "jobs:write",
    "students:read",
    "students:write",
    "teachers:write",
    "webhooks:read",
    "webhooks:write",
    "admin",
]
SCOPES: tuple[Scope, ...] = get_args(Scope)


@dataclass(frozen=True)
class Principal:
    tenant: str
    scopes: frozenset[str]
    key_id: str = ""

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes


class PrincipalCache:
    """Callers that were looked up a moment ago, by the digest of their key; so that a request costs no query.

    Only touched from the event loop's thread and by `forget`; each step is one atomic dictionary operation.
    """

    def __init__(self, most: int = 10_000) -> None:
        self._most = most
        self._known: dict[bytes, tuple[Principal, float]] = {}

    def recall(self, digest: bytes) -> Principal | None:
        principal, until = self._known.get(digest, (None, 0.0))
        return principal if until > time.monotonic() else None

    def remember(self, digest: bytes, principal: Principal, seconds: float) -> None:
        if len(self._known) >= self._most:
            self._known.clear()
        self._known[digest] = (principal, time.monotonic() + seconds)

    def forget(self, key_id: str) -> None:
        """Drop a revoked key at once; other processes drop it when their own memory ends."""
        for digest, (principal, _) in list(self._known.items()):
            if principal.key_id == key_id:
                self._known.pop(digest, None)
