"""Who is calling. Plain data."""

from __future__ import annotations

from dataclasses import dataclass

#: What a key may be allowed to do. `admin` includes all of them and the management of keys.
SCOPES = ("datasets:read", "datasets:write", "jobs:read", "jobs:write", "students:read", "admin")


@dataclass(frozen=True)
class Principal:
    tenant: str
    scopes: frozenset[str]
    key_id: str = ""

    def may(self, scope: str) -> bool:
        return scope in self.scopes or "admin" in self.scopes
