"""Requests and answers about API keys."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.schemas import Answer, Order, Time
from app.security.principal import SCOPES, Scope


class KeyOrder(Order):
    name: str = Field(min_length=1, max_length=100, description="What the key is for.")
    scopes: list[Scope] = Field(
        min_length=1, max_length=len(SCOPES), description="What the key may do; admin: everything."
    )
    expires_at: Time | None = Field(None, description="When the key ends. Empty: never.")


class Key(Answer):
    object: Literal["key"]
    id: str
    name: str
    scopes: list[Scope]
    created_at: Time
    expires_at: Time | None
    revoked_at: Time | None
    last_used_at: Time | None


class NewKey(Key):
    key: str = Field(description="The key itself. It is shown this once.")
