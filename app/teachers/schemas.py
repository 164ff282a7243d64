"""Answers about teachers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from app.schemas import Answer


class TeacherAnswer(Answer):
    object: Literal["teacher"]
    id: str
    title: str
    kind: str
    source: str = Field(description="Package, hub id, or 'local' for a folder of the operator's.")
    revision: str | None = Field(description="The pinned commit at the hub.")
    input_size: int
    parameters: int
    embedding_dim: int
    offers: list[str] = Field(description="What a method may ask it for.")
    licence: str
    licence_url: str
    resident_mib: int = Field(description="Memory that the loaded network takes, about.")
    available: bool
    reason: str = Field(description="Where it comes from, or why it cannot be had now.")
