"""Students: what a job made, ready to download."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, now


class Student(Base):
    __tablename__ = "students"

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(index=True)
    job_id: Mapped[str] = mapped_column(sa.ForeignKey("jobs.id"), unique=True)
    dataset_id: Mapped[str] = mapped_column(sa.ForeignKey("datasets.id"))
    teacher: Mapped[str]
    method: Mapped[str]
    architecture: Mapped[str]
    classes: Mapped[list[Any]]
    files: Mapped[dict[str, Any]]  # "model.onnx", "bundle.zip", "report.json", … -> blob digest
    summary: Mapped[dict[str, Any]]  # headline figures of the report
    created_at: Mapped[float] = mapped_column(default=now())
    deleted_at: Mapped[float | None]
