"""Cursor lists: newest first, `after` is the id of the last item seen."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Generic, Literal, TypeVar

import sqlalchemy as sa
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

Item = TypeVar("Item")
Row = TypeVar("Row")

Limit = Annotated[int, Field(ge=1, le=100)]


class Page(BaseModel, Generic[Item]):
    """One page. When `has_more`, ask again with `after` = the id of the last item."""

    object: Literal["list"] = "list"
    data: Sequence[Item]
    has_more: bool


def newest(
    session: Session, select: sa.Select[Row], id_column: Any, *, limit: int, after: str | None
) -> tuple[list[Row], bool]:
    """Rows below `after`, newest first (ids sort by time), and whether more follow."""
    if after is not None:
        select = select.where(id_column < after)
    rows = list(session.scalars(select.order_by(id_column.desc()).limit(limit + 1)))
    return rows[:limit], len(rows) > limit
