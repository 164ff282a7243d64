"""API keys: the secret is kept as a digest only."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, now


class ApiKey(Base):
    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    secret_digest: Mapped[str]
    scopes: Mapped[list[Any]]
    created_at: Mapped[float] = mapped_column(default=now())
    expires_at: Mapped[float | None]
    revoked_at: Mapped[float | None]
    last_used_at: Mapped[float | None]
