"""What the answers of all resources share. Output schemas have no defaults: what is not set is a mistake."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from pydantic import AwareDatetime, BaseModel, ConfigDict, field_validator

#: A moment. Tables hold seconds since 1970; pydantic reads them as UTC and writes RFC 3339 ("…Z").
Time = AwareDatetime
_NOT_TEXT = re.compile("[\0\ud800-\udfff]")


class Answer(BaseModel):
    """Base of every answer: read straight from a table's row."""

    model_config = ConfigDict(from_attributes=True)


class Order(BaseModel):
    """Base of every request body: an unknown name is an error, not a silence."""

    model_config = ConfigDict(extra="forbid")

    @field_validator("*", mode="before")
    @classmethod
    def _can_be_stored(cls, value: Any) -> Any:
        """No database takes these characters as text, at whatever depth they stand."""
        waiting = [value]
        while waiting:
            held = waiting.pop()
            if isinstance(held, dict):
                waiting += [*held, *held.values()]
            elif isinstance(held, list):
                waiting += held
            elif isinstance(held, str) and _NOT_TEXT.search(held):
                raise ValueError("A text contains NUL or half a surrogate pair, which is no character")
        return value


def moment(seconds: float) -> datetime:
    """A table's seconds since 1970 as a moment in UTC."""
    return datetime.fromtimestamp(seconds, UTC)


def shown_url(url: str) -> str:
    """The URL without its fragment and the values of its parameters, which may be secrets."""
    parts = urlsplit(url)
    given = [item.partition("=") for item in parts.query.split("&") if item]
    query = "&".join(f"{name}=…" if sign else "…" for name, sign, _ in given)
    return parts._replace(query=query, fragment="").geturl()
