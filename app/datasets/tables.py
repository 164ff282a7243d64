"""Data sets: immutable, named by the digest of their content."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Mapped, mapped_column

from app.db import Base, now


class Dataset(Base):
    """One version of a few-shot image set. Each split is one blob (models/data/archive.py)."""

    __tablename__ = "datasets"
    __table_args__ = (
        sa.Index("uq_datasets_live_digest", "tenant", "digest", unique=True,
                 sqlite_where=sa.text("deleted_at IS NULL"), postgresql_where=sa.text("deleted_at IS NULL")),
    )  # fmt: skip

    id: Mapped[str] = mapped_column(primary_key=True)
    tenant: Mapped[str] = mapped_column(index=True)
    name: Mapped[str]
    digest: Mapped[str]
    task: Mapped[str] = mapped_column(default="classification", server_default="classification")
    classes: Mapped[list[Any]]
    splits: Mapped[dict[str, Any]]  # split -> {"digest": blob, "images": count, "bytes": size}
    smallest_class: Mapped[int]
    report: Mapped[dict[str, Any]]
    created_at: Mapped[float] = mapped_column(default=now())
    deleted_at: Mapped[float | None]


class DatasetImage(Base):
    """Where an image of a data set lies: a member of its split's archive."""

    __tablename__ = "dataset_images"

    id: Mapped[str] = mapped_column(primary_key=True)
    dataset_id: Mapped[str] = mapped_column(sa.ForeignKey("datasets.id", ondelete="CASCADE"), index=True)
    split: Mapped[str]
    file: Mapped[str]
    label: Mapped[str | None]
    name: Mapped[str]
    width: Mapped[int]
    height: Mapped[int]
    mask: Mapped[str | None]  # the member with the classes of its pixels
