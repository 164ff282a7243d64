"""Answers about students."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from app.schemas import Answer, Time

Precision = Literal["fp32", "int8"]


class FileAnswer(Answer):
    name: str
    sha256: str
    url: str | None = Field(description="Where to get it; empty: it is inside bundle.zip.")


class StudentAnswer(Answer):
    object: Literal["student"]
    id: str
    job_id: str
    dataset_id: str
    teacher: str
    method: str
    architecture: str
    classes: list[str]
    summary: dict[str, Any] = Field(description="Headline figures of the report.")
    files: list[FileAnswer]
    created_at: Time


class ScoreAnswer(Answer):
    label: str
    score: float = Field(description="Probability, 0 to 1.")


class PredictionAnswer(Answer):
    object: Literal["prediction"]
    student_id: str
    precision: Precision
    predictions: list[ScoreAnswer] = Field(description="The most likely first.")
