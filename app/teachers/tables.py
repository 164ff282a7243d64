"""Black-box teachers of a tenant's own."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, now


class Teacher(Base):
    """An uploaded ONNX file or an HTTP endpoint. It does not change, but for its headers and its last probe."""

    __tablename__ = "teachers"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(index=True)
    title: Mapped[str]
    kind: Mapped[str]  # onnx, http
    spec: Mapped[dict[str, Any]]  # the document of models.teachers.AnyTeacher; holds no secret
    files: Mapped[dict[str, Any]]  # name -> blob digest
    header_names: Mapped[list[Any]]
    secret: Mapped[str | None]  # the headers, sealed by app.security.secretbox
    probe: Mapped[dict[str, Any] | None] = mapped_column(sa.JSON(none_as_null=True))  # report of the last one
    created_at: Mapped[float] = mapped_column(default=now())
    deleted_at: Mapped[float | None]
