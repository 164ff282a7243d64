"""What the answers of all resources share. Output schemas have no defaults: what is not set is a mistake."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

from pydantic import AwareDatetime, BaseModel, ConfigDict, field_validator

#: A moment. Tables hold seconds since 1970; pydantic reads them as UTC and writes RFC 3339 ("…Z").
Time = AwareDatetime


class Answer(BaseModel):
    """Base of every answer: read straight from a table's row."""

    model_config = ConfigDict(from_attributes=True)


class Order(BaseModel):
    """Base of every request body: an unknown name is an error, not a silence."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _no_nul(cls, value: Any) -> Any:
        """PostgreSQL takes it in no text."""
        if isinstance(value, str) and "\0" in value:
            raise ValueError("The text contains the character NUL (\\u0000). Leave it out")
        return value


def moment(seconds: float) -> datetime:
    """A table's seconds since 1970 as a moment in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def moment_or_none(seconds: float | None) -> datetime | None:
    return None if seconds is None else moment(seconds)
